// Shared memory of a block: regions, addresses, bounds; alignment of accesses to global memory.
#include <algorithm>
#include <stdexcept>

#include "runtime.h"

namespace emu {

namespace {
// Gap before each static array, forbidden under ASan.
constexpr size_t kGap = 128;

void place_memory(Block& b, unsigned align) {
    if (b.placed) return;
    // Promise no more alignment than was asked for: swizzles and descriptors see real address bits.
    b.shift = config().seed && align < 1024 ? align : 0;
    b.base = b.arena + b.shift;
    b.used = b.shift + b.dynamic;
    b.placed = true;
#if EMU_ASAN
    __asan_unpoison_memory_region(b.base, b.dynamic);
#endif
}

// Lanes run one after the other between collectives, so a lane's k-th access at a place belongs to the k-th request.
void gather(uint64_t address, uint32_t bytes, bool is_shared, bool store, At at) {
    Quiet quiet;
    Fiber* f = self();
    Warp& warp = *f->warp_state;
    auto open = [&](const Gather& x) {
        return x.shared == is_shared && x.store == store && x.bytes == bytes && same_site(x.at, at) &&
               !(x.lanes >> f->lane & 1);
    };
    auto g = std::find_if(warp.gathers.begin(), warp.gathers.end(), open);
    if (g == warp.gathers.end()) g = warp.gathers.insert(g, Gather{at, 0, bytes, is_shared, store, {}});
    g->lanes |= 1u << f->lane;
    g->address[f->lane] = address;
    if (g->lanes == warp.exist) {
        f->worker->counters.count(*g);
        warp.gathers.erase(g);
    }
}
}  // namespace

unsigned char* smem_dynamic(unsigned align) {
    Block& b = *self()->home;
    place_memory(b, align);
    return reinterpret_cast<unsigned char*>(b.base);
}

void* smem_static(const void* key, size_t bytes, size_t align) {
    Fiber* f = self();
    Block& b = *f->home;
    place_memory(b, 16);
    for (unsigned i = 0; i < b.array_count; i++)
        if (b.arrays[i].key == key) return b.arrays[i].p;
    if (b.array_count == kStaticArrays) f->worker->fail("more than 32 SMEM_ARRAYs [" + identity(*f) + "]");
    size_t start = (b.used + kGap + align - 1) / align * align;
    if (start + bytes > b.shift + b.dynamic + kStaticMax)
        f->worker->fail("more than 48 KiB of static shared memory [" + identity(*f) + "]");
    char* p = b.arena + start;
    b.used = start + bytes;
    b.arrays[b.array_count++] = {key, p};
#if EMU_ASAN
    __asan_unpoison_memory_region(p, bytes);
#endif
    return p;
}

void forbid([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if EMU_ASAN
    __asan_poison_memory_region(p, bytes);
#endif
}

uint32_t smem_u32(const void* p, At at) {
    Block& b = *self()->home;
    const char* c = static_cast<const char*>(p);
    if (!b.placed || c < b.base || c > b.arena + b.used)
        die(at, "%p does not point into the block's shared memory", p);
    return uint32_t(c - b.arena) + kWindow;
}

char* at_address(Block& b, uint32_t address) { return b.arena + (address - kWindow); }

SharedAt resolve(uint32_t address, uint32_t bytes, At at) {
    Fiber* f = self();
    Block* b = f->home;
    uint32_t rank = address >> 24, offset = address & 0xffffff;
    if (rank) {
        if (rank > f->cluster_size) die(at, "shared address %#x names block %u of a cluster of %u", address, rank - 1,
                                        f->cluster_size);
        b = f->worker->blocks[rank - 1].get();
        if (b != f->home && b->alive == 0)
            die(at, "shared address %#x: block %u of the cluster has exited; a cluster barrier must come first",
                address, rank - 1);
    }
    if (!b->placed || offset < kWindow + b->shift || offset - kWindow + bytes > b->used)
        die(at, "shared address %#x (+%u) is outside the block's %zu bytes", address, bytes,
            b->placed ? b->used - b->shift : 0);
    return {b, offset, at_address(*b, offset)};
}

uint32_t mapa(uint32_t address, uint32_t rank, At at) {
    Fiber* f = self();
    if (rank >= f->cluster_size) die(at, "mapa: block %u of a cluster of %u", rank, f->cluster_size);
    if (address >> 24) die(at, "mapa of %#x, which is mapped already", address);
    return (rank + 1) << 24 | address;
}

void* shared(uint32_t address, uint32_t bytes, bool store, At at) {
    if (address % bytes) die(at, "shared address %#x is not aligned to %u bytes", address, bytes);
    SharedAt s = resolve(address, bytes, at);
    if (config().count) gather(s.address, bytes, true, store, at);
    addressable(s.p, bytes, "shared memory", at);
    return s.p;
}

void global(const void* p, uint32_t bytes, bool store, At at) {
    if (reinterpret_cast<uintptr_t>(p) % bytes) die(at, "global address %p is not aligned to %u bytes", p, bytes);
    count_global(p, bytes, store, at);
    addressable(p, bytes, "global memory", at);
}

void flush_gathers(Warp& warp, Counters& counters) {
    Quiet quiet;
    for (Gather& x : warp.gathers) counters.count(x);
    warp.gathers.clear();
}

void count_global(const void* p, uint32_t bytes, bool store, At at) {
    if (config().count) gather(reinterpret_cast<uintptr_t>(p), bytes, false, store, at);
}

void addressable([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes, [[maybe_unused]] const char* what,
                 [[maybe_unused]] At at) {
#if EMU_ASAN
    void* bad = bytes ? __asan_region_is_poisoned(const_cast<void*>(p), bytes) : nullptr;
    if (bad) {
        die(at, "%s: byte %ld of %zu is out of bounds", what,
            long(static_cast<char*>(bad) - static_cast<const char*>(p)), bytes);
    }
#endif
}

uint32_t swizzled(uint32_t address, uint32_t swizzle) {
    uint32_t rows = swizzle == 128 ? 7 : swizzle == 64 ? 3 : swizzle == 32 ? 1 : 0;
    return address ^ (address >> 7 & rows) << 4;
}

}  // namespace emu
