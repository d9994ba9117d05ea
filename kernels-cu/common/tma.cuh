// TMA: boxes of tensors and runs of bytes between global and shared memory, by the copy engine. Hopper only.
//
// One thread issues; loads end by counting bytes at an mbarrier, stores by bulk groups. Coordinates are in elements,
// innermost first. A box lies in shared memory row by row; with a swizzle, the 16-byte chunk index of an address
// (bits 4 to 6) is XORed with its bits 7 to 9 (128 B), 7 to 8 (64 B) or 7 (32 B). Elements outside the tensor are
// read as zero and not written.
#pragma once
#include "base.cuh"

#if PTX_SM90
namespace ptx {

// L2 policies, as the instruction encodes them.
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

PTX_FN void tma_prefetch_map(const TensorMap* map) {
    PTX_DO(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"), (void)map);
}

#define PTX_TMA_LOAD(dims, coords, policy_at, ...)                                                                    \
    asm volatile("cp.async.bulk.tensor." dims ".shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint" \
                 " [%0], [%1, {" coords "}], [%2], %" policy_at ";"                                                    \
                 ::"r"(dst), "l"(map), "r"(bar), __VA_ARGS__, "l"(Policy) : "memory")
#define PTX_TMA_MULTICAST(dims, coords, mask_at, policy_at, ...)                                              \
    asm volatile("cp.async.bulk.tensor." dims ".shared::cluster.global.tile.mbarrier::complete_tx::bytes"      \
                 ".multicast::cluster.L2::cache_hint [%0], [%1, {" coords "}], [%2], %" mask_at ", %" policy_at ";" \
                 ::"r"(dst), "l"(map), "r"(bar), __VA_ARGS__, "h"(blocks), "l"(Policy) : "memory")
#define PTX_TMA_STORE(op, dims, coords, ...)                                                      \
    asm volatile(op "." dims ".global.shared::cta." PTX_TMA_KIND ".bulk_group [%0, {" coords "}], [%1];" \
                 ::"l"(map), "r"(src), __VA_ARGS__ : "memory")

// Loads the box at coordinate `c` to `dst`; counts its bytes, also those outside the tensor, at `bar`.
template <uint64_t Policy = kEvictNormal, int R>
PTX_FN void tma_load(uint32_t dst, const TensorMap* map, const int (&c)[R], uint32_t bar PTX_AT) {
    static_assert(R <= 5, "a tensor has 1 to 5 dimensions");
    if constexpr (R == 1)
        PTX_DO(PTX_TMA_LOAD("1d", "%3", "4", "r"(c[0])),
               emu::tma_load(dst, map, c, R, bar, 0, at));
    else if constexpr (R == 2)
        PTX_DO(PTX_TMA_LOAD("2d", "%3, %4", "5", "r"(c[0]), "r"(c[1])),
               emu::tma_load(dst, map, c, R, bar, 0, at));
    else if constexpr (R == 3)
        PTX_DO(PTX_TMA_LOAD("3d", "%3, %4, %5", "6", "r"(c[0]), "r"(c[1]), "r"(c[2])),
               emu::tma_load(dst, map, c, R, bar, 0, at));
    else if constexpr (R == 4)
        PTX_DO(PTX_TMA_LOAD("4d", "%3, %4, %5, %6", "7", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])),
               emu::tma_load(dst, map, c, R, bar, 0, at));
    else
        PTX_DO(PTX_TMA_LOAD("5d", "%3, %4, %5, %6, %7", "8", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])),
               emu::tma_load(dst, map, c, R, bar, 0, at));
}
// The same box to the same place of every block of the cluster whose bit is set; each block's barrier counts it.
template <uint64_t Policy = kEvictNormal, int R>
PTX_FN void tma_load_multicast(uint32_t dst, const TensorMap* map, const int (&c)[R], uint32_t bar,
                               uint16_t blocks PTX_AT) {
    static_assert(R <= 5, "a tensor has 1 to 5 dimensions");
    if constexpr (R == 1)
        PTX_DO(PTX_TMA_MULTICAST("1d", "%3", "4", "5", "r"(c[0])),
               emu::tma_load(dst, map, c, R, bar, blocks, at));
    else if constexpr (R == 2)
        PTX_DO(PTX_TMA_MULTICAST("2d", "%3, %4", "5", "6", "r"(c[0]), "r"(c[1])),
               emu::tma_load(dst, map, c, R, bar, blocks, at));
    else if constexpr (R == 3)
        PTX_DO(PTX_TMA_MULTICAST("3d", "%3, %4, %5", "6", "7", "r"(c[0]), "r"(c[1]), "r"(c[2])),
               emu::tma_load(dst, map, c, R, bar, blocks, at));
    else if constexpr (R == 4)
        PTX_DO(PTX_TMA_MULTICAST("4d", "%3, %4, %5, %6", "7", "8", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])),
               emu::tma_load(dst, map, c, R, bar, blocks, at));
    else
        PTX_DO(PTX_TMA_MULTICAST("5d", "%3, %4, %5, %6, %7", "8", "9", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])),
               emu::tma_load(dst, map, c, R, bar, blocks, at));
}
// Stores the box from `src`; part of the next bulk group.
template <int R> PTX_FN void tma_store(const TensorMap* map, const int (&c)[R], uint32_t src PTX_AT) {
    static_assert(R <= 5, "a tensor has 1 to 5 dimensions");
#define PTX_TMA_KIND "tile"
    if constexpr (R == 1)
        PTX_DO(PTX_TMA_STORE("cp.async.bulk.tensor", "1d", "%2", "r"(c[0])),
               emu::tma_store(map, c, R, src, false, at));
    else if constexpr (R == 2)
        PTX_DO(PTX_TMA_STORE("cp.async.bulk.tensor", "2d", "%2, %3", "r"(c[0]), "r"(c[1])),
               emu::tma_store(map, c, R, src, false, at));
    else if constexpr (R == 3)
        PTX_DO(PTX_TMA_STORE("cp.async.bulk.tensor", "3d", "%2, %3, %4", "r"(c[0]), "r"(c[1]), "r"(c[2])),
               emu::tma_store(map, c, R, src, false, at));
    else if constexpr (R == 4)
        PTX_DO(PTX_TMA_STORE("cp.async.bulk.tensor", "4d", "%2, %3, %4, %5", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])),
               emu::tma_store(map, c, R, src, false, at));
    else
        PTX_DO(PTX_TMA_STORE("cp.async.bulk.tensor", "5d", "%2, %3, %4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])),
               emu::tma_store(map, c, R, src, false, at));
#undef PTX_TMA_KIND
}
// Adds the box from `src` to global memory, element by element, atomically, in any order.
template <int R> PTX_FN void tma_reduce_add(const TensorMap* map, const int (&c)[R], uint32_t src PTX_AT) {
    static_assert(R <= 5, "a tensor has 1 to 5 dimensions");
#define PTX_TMA_KIND "add.tile"
    if constexpr (R == 1)
        PTX_DO(PTX_TMA_STORE("cp.reduce.async.bulk.tensor", "1d", "%2", "r"(c[0])),
               emu::tma_store(map, c, R, src, true, at));
    else if constexpr (R == 2)
        PTX_DO(PTX_TMA_STORE("cp.reduce.async.bulk.tensor", "2d", "%2, %3", "r"(c[0]), "r"(c[1])),
               emu::tma_store(map, c, R, src, true, at));
    else if constexpr (R == 3)
        PTX_DO(PTX_TMA_STORE("cp.reduce.async.bulk.tensor", "3d", "%2, %3, %4", "r"(c[0]), "r"(c[1]), "r"(c[2])),
               emu::tma_store(map, c, R, src, true, at));
    else if constexpr (R == 4)
        PTX_DO(PTX_TMA_STORE("cp.reduce.async.bulk.tensor", "4d", "%2, %3, %4, %5", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])),
               emu::tma_store(map, c, R, src, true, at));
    else
        PTX_DO(PTX_TMA_STORE("cp.reduce.async.bulk.tensor", "5d", "%2, %3, %4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])),
               emu::tma_store(map, c, R, src, true, at));
#undef PTX_TMA_KIND
}

// ---- runs of bytes: addresses and sizes are multiples of 16 ----

PTX_FN void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar PTX_AT) {
    PTX_DO(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                        ::"r"(dst), "l"(src), "r"(bytes), "r"(bar) : "memory"),
           emu::bulk_load(dst, src, bytes, bar, 0, at));
}
PTX_FN void bulk_load_multicast(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar, uint16_t blocks PTX_AT) {
    PTX_DO(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                        " [%0], [%1], %2, [%3], %4;"
                        ::"r"(dst), "l"(src), "r"(bytes), "r"(bar), "h"(blocks) : "memory"),
           emu::bulk_load(dst, src, bytes, bar, blocks, at));
}
PTX_FN void bulk_store(void* dst, uint32_t src, uint32_t bytes PTX_AT) {
    PTX_DO(asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                        ::"l"(dst), "r"(src), "r"(bytes) : "memory"),
           emu::bulk_store(dst, src, bytes, false, at));
}
PTX_FN void bulk_reduce_add_f32(float* dst, uint32_t src, uint32_t bytes PTX_AT) {
    PTX_DO(asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
                        ::"l"(dst), "r"(src), "r"(bytes) : "memory"),
           emu::bulk_store(dst, src, bytes, true, at));
}
// To another block of the cluster: `dst` and `bar` come from mapa and lie in the same block.
PTX_FN void bulk_copy_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar PTX_AT) {
    PTX_DO(asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                        ::"r"(dst), "r"(src), "r"(bytes), "r"(bar) : "memory"),
           emu::bulk_copy_cluster(dst, src, bytes, bar, at));
}

// ---- bulk groups of the calling thread ----

PTX_FN void bulk_commit(PTX_AT_ONLY) {
    PTX_DO(asm volatile("cp.async.bulk.commit_group;" ::: "memory"), emu::bulk_commit(at));
}
// Until at most `Pending` groups still read shared memory: it may then be written again.
template <int Pending> PTX_FN void bulk_wait_read(PTX_AT_ONLY) {
    PTX_DO(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory"),
           emu::bulk_wait(Pending, true, at));
}
// Until at most `Pending` groups are in flight: their writes are then visible to this thread.
template <int Pending> PTX_FN void bulk_wait(PTX_AT_ONLY) {
    PTX_DO(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory"),
           emu::bulk_wait(Pending, false, at));
}

}  // namespace ptx
#endif
