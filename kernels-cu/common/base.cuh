// What every kernel stands on: integer types, the two ways to compile, element types, registers and shared memory.
//
// The same text has two readers. nvcc and NVRTC take the first argument of PTX_DO, which is inline assembly; a host
// compiler takes the rest, which calls the emulator (kernels-cu/emu). PTX_AT gives the emulator the line of the kernel
// that called a wrapper, so that its reports name it; a wrapper of wrappers hands it on with PTX_FROM. Kernels themselves contain neither assembly nor an #if.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#else
#include <cstdint>
#endif

#define PTX_DO(device, ...) device
#define PTX_AT
#define PTX_AT_ONLY
#define PTX_FROM
#define PTX_FROM_ONLY
#define PTX_FN __device__ __forceinline__
#define PTX_BOTH __host__ __device__ constexpr
// Wrappers of instructions that only Hopper has; other architectures do not see them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PTX_SM90 1
#else
#define PTX_SM90 0
#endif

// Dynamic shared memory of the block. State the alignment that the kernel needs: the emulator promises no more.
extern __shared__ __align__(1024) unsigned char ptx_smem_dynamic[];
#define SMEM_DYNAMIC(name, align) unsigned char* name = ptx_smem_dynamic
// A static array in shared memory.
#define SMEM_ARRAY(T, name, count) __shared__ T name[count]
// An array meant for registers: REG(float, acc, [8][4]). The emulator fills it with NaN.
#define REG(T, name, dims) T name dims
// Makes an `extern "C"` kernel known by name to whoever loads it.
#define KERNEL_EXPORT(name)

#else

#include "../emu/language.h"

#define PTX_DO(device, ...) __VA_ARGS__
#define PTX_AT , emu::At at = emu::At::current()
#define PTX_AT_ONLY emu::At at = emu::At::current()
#define PTX_FROM , at
#define PTX_FROM_ONLY at
#define PTX_FN inline
#define PTX_BOTH constexpr
#define PTX_SM90 1

#define SMEM_DYNAMIC(name, align) unsigned char* name = emu::smem_dynamic(align)
#define SMEM_ARRAY(T, name, count)    \
    static const char name##_key = 0; \
    T* name = static_cast<T*>(emu::smem_static(&name##_key, sizeof(T) * (count), alignof(T)))
#define REG(T, name, dims) \
    T name dims;           \
    emu::poison(&name, sizeof(name))
#define KERNEL_EXPORT(name) static const emu::Registered name##_registered(#name, &name)

#endif

namespace ptx {

// Elements as they lie in memory.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };

// The element that a source is compiled for: an operator's kernels are written once, for T.
#if defined(ELEMENT_F32)
using T = float;
#elif defined(ELEMENT_BF16)
using T = bf16;
#elif defined(ELEMENT_F16)
using T = f16;
#endif

template <class T, class U> struct Same { static constexpr bool value = false; };
template <class T> struct Same<T, T> { static constexpr bool value = true; };
template <class T, class U> constexpr bool same = Same<T, U>::value;

constexpr uint32_t kFullMask = 0xffffffffu;

// Bytes that SmemPlan leaves between two regions: red zones on the emulator, nothing on the GPU.
constexpr int kRedZone = PTX_DO(0, 128);

// The 32-bit address of a pointer into the block's shared memory.
PTX_FN uint32_t smem_u32(const void* p PTX_AT) {
    PTX_DO(return static_cast<uint32_t>(__cvta_generic_to_shared(p)), return emu::smem_u32(p, at));
}

// A tensor map (cuTensorMapEncodeTiled); opaque here. Kernels take it as `const __grid_constant__ ptx::TensorMap`.
struct alignas(64) TensorMap { uint64_t opaque[16]; };

}  // namespace ptx

// Lays regions out in shared memory, at compile time on both sides:
//     constexpr SmemPlan plan; int q = plan.take(bytes, 128); ... plan.bytes()
struct SmemPlan {
    int end = 0;
    PTX_BOTH int take(int bytes, int align = 16) {
        int start = (end + align - 1) / align * align;
        end = start + bytes + ptx::kRedZone;
        return start;
    }
    PTX_BOTH int bytes() const { return end; }
};

namespace ptx {

// Forbids the red zone behind a region of a SmemPlan; nothing on the GPU. Call it once per region, by every thread.
PTX_FN void smem_guard([[maybe_unused]] unsigned char* smem, [[maybe_unused]] int end_of_region) {
    PTX_DO((void)0, emu::forbid(smem + end_of_region, kRedZone));
}

}  // namespace ptx
