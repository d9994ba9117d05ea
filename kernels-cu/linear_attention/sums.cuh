// Parts of the tokens, and sums over them of outer products on the tensor cores.
#pragma once
#include "features.cuh"

// Parts of a head's tokens, in whole tiles of kTokens.
struct Part {
    int sample, head, first, end;
    size_t index;
    __device__ __forceinline__ size_t partial(int parts, int part) const { return index * parts + part; }
};
__device__ __forceinline__ int part_of_block(int h, int parts) { return int(blockIdx.x) / h % parts; }
template <int kTokens> __device__ __forceinline__ Part place_of_part(int n, int h, int parts) {
    const int head = int(blockIdx.x) % h, part = part_of_block(h, parts), sample = int(blockIdx.x) / h / parts;
    const int tiles = (n + kTokens - 1) / kTokens, each = (tiles + parts - 1) / parts * kTokens;
    const int first = min(n, part * each);
    return {sample, head, first, min(n, first + each), size_t(sample) * h + head};
}

// Sums over the tokens, one warp's share: columns d of its half, all rows e, as the accumulators of Sᵀ.
template <int E> struct Sums {
    using W = Width<E>;
    float acc[W::kRowTiles][W::kHalf][4], total[W::kHalf];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int j = 0; j < W::kHalf; j++) {
            total[j] = 0.0f;
#pragma unroll
            for (int i = 0; i < W::kRowTiles; i++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
        }
    }
    // acc += rightᵀ[e][token]·left[token][d] over 16 tokens; `feature` makes a pair of tokens of the B operand, as a sum of
    // two where `rest` says that the second is not zero.
    template <bool kSplit, class F>
    __device__ __forceinline__ void add(uint32_t left, uint32_t right, bool rest, F feature) {
        const int half = warp_id() % 2, column = half * W::kHalf * 16;
        uint32_t b[W::kHalf + 1][2], low[W::kHalf][2];
#pragma unroll
        for (int j = 0; j < W::kHalf; j += 2) {
            if (j + 1 < W::half_tiles(half)) {
                uint32_t pair[4];
                load_b_pair<W::kPitch>(pair, left + column + j * 16);
                b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
            } else if (j < W::half_tiles(half)) {
                load_b<W::kPitch>(b[j], left + column + j * 16);
                b[j + 1][0] = b[j + 1][1] = 0;
            } else {
                b[j][0] = b[j][1] = b[j + 1][0] = b[j + 1][1] = 0;
            }
        }
#pragma unroll
        for (int j = 0; j < W::kHalf; j++)
            if (j < W::half_tiles(half)) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const Split made = feature(b[j][r], r, total[j]);
                    b[j][r] = made.high, low[j][r] = made.low;
                }
            }
#pragma unroll
        for (int i = 0; i < W::kRowTiles; i++) {
            uint32_t a[4];
            load_a_trans<W::kPitch>(a, right + i * 32, i < W::kSteps);
#pragma unroll
            for (int j = 0; j < W::kHalf; j++)
                if (j < W::half_tiles(half)) mma_m16n8k16<bf16>(acc[i][j], a, b[j][0], b[j][1]);
            if constexpr (kSplit) {
                if (!rest) continue;
#pragma unroll
                for (int j = 0; j < W::kHalf; j++)
                    if (j < W::half_tiles(half)) mma_m16n8k16<bf16>(acc[i][j], a, low[j][0], low[j][1]);
            }
        }
    }
    // The two pairs of warps are added in `sums`, [E][E + 1] floats that nobody else uses any more, and go to `to`.
    __device__ __forceinline__ void store(float* sums, float* to) {
        const int half = warp_id() % 2, group = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int j = 0; j < W::kHalf; j++) {
            total[j] += __shfl_xor_sync(kFullMask, total[j], 1);
            total[j] += __shfl_xor_sync(kFullMask, total[j], 2);
        }
        for (int turn = 0; turn < 2; turn++) {
            __syncthreads();
            if (warp_id() / 2 != turn) continue;
#pragma unroll
            for (int j = 0; j < W::kHalf; j++) {
                if (j >= W::half_tiles(half)) continue;
                const int column = (half * W::kHalf + j) * 8;
#pragma unroll
                for (int i = 0; i < W::kRowTiles; i++) {
#pragma unroll
                    for (int r = 0; r < 4; r++) {
                        const int e = i * 16 + group + r / 2 * 8, d = column + 2 * t + r % 2;
                        if (e < E) put(sums + d * (E + 1) + e, acc[i][j][r], turn);
                    }
                }
                if (t == 0) put(sums + (column + group) * (E + 1) + E, total[j], turn);
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < E * (E + 1); i += 128) to[i] = sums[i];
    }
    static __device__ __forceinline__ void put(float* at, float v, int turn) { *at = turn ? *at + v : v; }
};
