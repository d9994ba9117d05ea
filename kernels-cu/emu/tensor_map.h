// What the emulator keeps in the 128 bytes of a tensor map.
#pragma once
#include <cstdint>

namespace emu {

// The numbers of CUtensorMapDataType.
enum class Element : uint8_t { U8, U16, U32, S32, U64, S64, F16, F32, F64, BF16 };

struct MapFields {
    char* base;
    uint64_t dim[5], stride[4];  // strides of dimensions 1 and up, in bytes
    uint32_t box[5];
    uint8_t rank, bytes, swizzle;  // bytes of an element; swizzle 0, 32, 64, 128
    Element element;
    uint32_t magic;
};
static_assert(sizeof(MapFields) <= 128);
constexpr uint32_t kMapMagic = 0x50414d54;

}  // namespace emu

// As cuTensorMapEncodeTiled without interleave and with zero fill; `element` and `swizzle` have the driver's numbers
// (0: none, 1: 32 B, 2: 64 B, 3: 128 B). `strides` are those of dimensions 1 and up, in bytes. Null, or what is wrong.
extern "C" const char* emu_tensor_map(void* map, int element, unsigned rank, void* base, const uint64_t* dims,
                                      const uint64_t* strides, const uint32_t* box, int swizzle);
