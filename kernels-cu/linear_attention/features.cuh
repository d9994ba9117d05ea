// The feature maps, and what the tensor-core kernels of the operator share: a head's matrix in shared memory, split into two
// bf16, and rows of tokens times it.
#pragma once
#include "../common/ptx.cuh"
#include "../common/fragments.cuh"

using namespace ptx;

__device__ __forceinline__ float phi(int map, float x) { return map ? fmaxf(x, 0.0f) : x > 0.0f ? x + 1.0f : __expf(x); }
__device__ __forceinline__ float phi_slope(int map, float x) { return x > 0.0f ? 1.0f : map ? 0.0f : __expf(x); }

// A head of E columns: whole steps of 16 along it, perhaps one of 8, tiles of 8 columns and of 16 rows.
template <int E> struct Width {
    static_assert(E % 8 == 0, "rows of whole 16-byte units");
    static constexpr int kPitch = odd_pitch(E), kTiles = E / 8, kSteps = E / 16, kRowTiles = (E + 15) / 16;
    static constexpr bool kTail = E % 16 != 0;
    // Tokens of a tile: where sums go over them, and where a warp owns 32 of them alone.
    static constexpr int kSumTokens = 64, kRowTokens = 128;
    // Tiles of columns of the first of two warps that share them; the other has the rest.
    static constexpr int kHalf = (kTiles + 1) / 2;
    static __device__ __forceinline__ int half_tiles(int half) { return half ? kTiles - kHalf : kHalf; }
};

// 16 rows of E columns as the A operand.
template <int E> struct Operand {
    using W = Width<E>;
    uint32_t full[W::kSteps][4], tail[2];

    __device__ __forceinline__ void load(uint32_t rows) {
#pragma unroll
        for (int s = 0; s < W::kSteps; s++) load_a<W::kPitch>(full[s], rows + s * 32);
        if constexpr (W::kTail) load_a_8<W::kPitch>(tail, rows + W::kSteps * 32);
    }
    // Each value becomes its feature; sum is the features of rows g and g + 8 by `totals`.
    __device__ __forceinline__ void to_features(int map, const float* totals, float (&sum)[2]) {
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int s = 0; s < W::kSteps; s++) {
#pragma unroll
            for (int r = 0; r < 4; r++) one(full[s][r], map, totals + s * 16 + r / 2 * 8, sum[r % 2]);
        }
        if constexpr (W::kTail) {
#pragma unroll
            for (int r = 0; r < 2; r++) one(tail[r], map, totals + W::kSteps * 16, sum[r]);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(kFullMask, sum[r], 1);
            sum[r] += __shfl_xor_sync(kFullMask, sum[r], 2);
        }
    }
    static __device__ __forceinline__ void one(uint32_t& pair, int map, const float* totals, float& sum) {
        const float2 by = *reinterpret_cast<const float2*>(totals + 2 * (lane_id() % 4));
        pair = pack<bf16>(phi(map, unpack_lo<bf16>(pair)), phi(map, unpack_hi<bf16>(pair)));
        sum = fmaf(unpack_lo<bf16>(pair), by.x, fmaf(unpack_hi<bf16>(pair), by.y, sum));
    }
};

// [E][E] floats into shared memory as a matrix of their upper halves and one of the rest.
template <int E> __device__ __forceinline__ void load_split(uint32_t to, const float* from) {
    constexpr int kPairs = E / 2;
    for (int i = threadIdx.x; i < E * kPairs; i += 128) {
        const float2 v = reinterpret_cast<const float2*>(from)[i];
        const Split s = split(v.x, v.y);
        const uint32_t at = to + i / kPairs * Width<E>::kPitch + i % kPairs * 4;
        st_shared_u32(at, s.high), st_shared_u32(at + E * Width<E>::kPitch, s.low);
    }
}

// The B operand of a step of 16 (or the tail of 8) along the sum for two tiles of columns, the second perhaps absent; kByRow
// as in `product`.
template <int E, bool kByRow> __device__ __forceinline__ void matrix_step(uint32_t (&b)[4], uint32_t matrix, int column,
                                                                         int step, bool two) {
    using W = Width<E>;
    const uint32_t at = kByRow ? matrix + step * 16 * W::kPitch + column * 2 : matrix + column * W::kPitch + step * 32;
    if (step < W::kSteps && two) {
        if constexpr (kByRow)
            load_b_pair<W::kPitch>(b, at);
        else
            load_b_pair_rows<W::kPitch>(b, at);
    } else if (step < W::kSteps) {
        uint32_t one[2];
        if constexpr (kByRow)
            load_b<W::kPitch>(one, at);
        else
            load_b_rows<W::kPitch>(one, at);
        b[0] = one[0], b[1] = one[1];
    } else if (two) {
        uint32_t pair[2];
        if constexpr (kByRow)
            load_b_pair_8<W::kPitch>(pair, at);
        else
            load_b_pair_rows_8<W::kPitch>(pair, at);
        b[0] = pair[0], b[2] = pair[1];
    } else {
        uint32_t one[1];
        if constexpr (kByRow)
            load_b_8<W::kPitch>(one, at);
        else
            load_b_rows_8<W::kPitch>(one, at);
        b[0] = one[0];
    }
}

// 32 rows times kCount tiles of 8 columns of the split matrix from tile `first` on, or `tiles` of them where that is less:
// done(m, column, acc) for each tile of 16 rows. kByRow: the sum is over the matrix's rows, else over its columns.
template <int E, bool kByRow, int kCount, class F>
__device__ __forceinline__ void product(const Operand<E> (&left)[2], uint32_t matrix, int first, int tiles, F done) {
    using W = Width<E>;
#pragma unroll
    for (int tile = 0; tile < kCount; tile += 2) {
        if (tile >= tiles) continue;
        const bool two = tile + 1 < kCount && tile + 1 < tiles;
        const int column = (first + tile) * 8;
        float acc[2][2][4];
#pragma unroll
        for (int i = 0; i < 16; i++) acc[i / 8][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll
        for (int step = 0; step < W::kRowTiles; step++) {
#pragma unroll
            for (int part = 0; part < 2; part++) {
                uint32_t b[4] = {};
                matrix_step<E, kByRow>(b, matrix + part * E * W::kPitch, column, step, two);
#pragma unroll
                for (int m = 0; m < 2; m++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        if (j == 1 && !two) continue;
                        if (step < W::kSteps)
                            mma_m16n8k16<bf16>(acc[m][j], left[m].full[step], b[2 * j], b[2 * j + 1]);
                        else
                            mma_m16n8k8<bf16>(acc[m][j], left[m].tail, b[2 * j]);
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
            done(m, column, acc[m][0]);
            if (two) done(m, column + 8, acc[m][1]);
        }
    }
}
