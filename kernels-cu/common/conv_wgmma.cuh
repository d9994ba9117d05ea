// The products of conv_mma.cuh by wgmma: a warpgroup has 64 pixels and every filter of the tile. Hopper only.
//
// The filters' stage is what wgmma reads, rows of 128 bytes with the 128-byte swizzle. The windows go through registers:
// their rows in shared memory begin at any pixel of the halo, which no descriptor can say, and ldmatrix can.
#pragma once
#include "conv_mma.cuh"
#include "mbarrier.cuh"
#include "wgmma.cuh"

#if PTX_SM90
namespace ptx {

template <int N> struct ConvWgmmaTile : ConvTile<128, N, 8, 1> {
    using Tile = ConvTile<128, N, 8, 1>;
    static_assert(Tile::kRows == 1, "a warp has 16 rows of its warpgroup's 64");

    // cp.async writes as any store does; wgmma reads by another way.
    static PTX_FN void hand_over(PTX_AT_ONLY) { fence_proxy_async(PTX_FROM_ONLY); }

    template <class F>
    static PTX_FN void multiply(float (&acc)[1][Tile::kColumns][4], uint32_t a, uint32_t b, F row_of PTX_AT) {
        float(&sums)[N / 2] = reinterpret_cast<float(&)[N / 2]>(acc);
        uint32_t left[kConvDepth / 16][4];
#pragma unroll
        for (int k = 0; k < kConvDepth / 16; k++) fragment_a<kConvRow>(left[k], a, row_of(0), 16 * k PTX_FROM);
        const uint64_t right = wgmma_desc(b, 16, 8 * kConvRow, 128);
        wgmma_fence(PTX_FROM_ONLY);
#pragma unroll
        for (int k = 0; k < kConvDepth / 16; k++) {
            // 32 bytes along the row, in units of 16.
            wgmma_rs<bf16, N>(sums, left[k], right + 2 * k, 1 PTX_FROM);
        }
        wgmma_commit(PTX_FROM_ONLY);
        wgmma_wait<0>(PTX_FROM_ONLY);
    }
};

}  // namespace ptx
#endif
