// What the attention kernels of Hopper share: how tiles of a head lie in shared memory, the two products on them, and
// the way of a warpgroup's sums to global memory.
//
// A tile of `rows` tokens of one head lies as boxes of columns, one behind the other: `Head::kWide` boxes of 64 columns
// with a swizzle of 128 bytes, and a last one of 16 columns with 32 bytes for a width like 72, whose columns past the
// width TMA fills with zeros (never with the next head's, which may hold Inf). `Narrow` tiles are boxes of 16 alone:
// the same tile is then K-major (a product over columns) and MN-major (a product over tokens).
#pragma once
#include "../common/ptx.cuh"

namespace ptx {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

PTX_BOTH int round_up(int value, int to) { return (value + to - 1) / to * to; }

// A head of kWidth columns in boxes of 64 columns and a last one of 16.
template <int kWidth> struct Head {
    static_assert(kWidth % 64 == 0 || kWidth % 64 == 8 || kWidth % 64 == 16, "a last box of 16 columns");
    static constexpr int kWide = kWidth / 64;
    static constexpr int kRest = kWidth % 64 ? 1 : 0;
    static constexpr int kColumns = 64 * kWide + 16 * kRest;
    PTX_BOTH static int bytes(int rows) { return rows * kColumns * 2; }
};

// The same in boxes of 16 columns.
template <int kWidth> struct Narrow {
    static constexpr int kBoxes = (kWidth + 15) / 16;
    static constexpr int kColumns = 16 * kBoxes;
    PTX_BOTH static int bytes(int rows) { return rows * kColumns * 2; }
};

// d = a·bᵀ over the head's columns: 64 rows of a warpgroup at `a`, kRows rows at `b`.
template <int kWidth, int kRows> PTX_FN void score(float (&d)[kRows / 2], uint32_t a, uint32_t b) {
    using H = Head<kWidth>;
#pragma unroll
    for (int k = 0; k < 4 * H::kWide; k++)
        wgmma_ss<bf16, kRows>(d, wgmma_desc(a + k / 4 * 64 * 128 + k % 4 * 32, 16, 1024, 128),
                              wgmma_desc(b + k / 4 * kRows * 128 + k % 4 * 32, 16, 1024, 128), k != 0);
    if constexpr (H::kRest)
        wgmma_ss<bf16, kRows>(d, wgmma_desc(a + H::kWide * 64 * 128, 16, 256, 32),
                              wgmma_desc(b + H::kWide * kRows * 128, 16, 256, 32), H::kWide != 0);
}

// The same for narrow tiles.
template <int kWidth, int kRows> PTX_FN void score_narrow(float (&d)[kRows / 2], uint32_t a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < Narrow<kWidth>::kBoxes; k++)
        wgmma_ss<bf16, kRows>(d, wgmma_desc(a + k * 64 * 32, 16, 256, 32), wgmma_desc(b + k * kRows * 32, 16, 256, 32),
                              k != 0);
}

// The same where the 64 rows are in registers (load_narrow).
template <int kWidth, int kRows>
PTX_FN void score_narrow(float (&d)[kRows / 2], const uint32_t (&a)[Narrow<kWidth>::kBoxes][4], uint32_t b) {
#pragma unroll
    for (int k = 0; k < Narrow<kWidth>::kBoxes; k++)
        wgmma_rs<bf16, kRows>(d, a[k], wgmma_desc(b + k * kRows * 32, 16, 256, 32), k != 0);
}

// A narrow tile of 64 rows as the left operand in registers.
template <int kWidth> PTX_FN void load_narrow(uint32_t (&a)[Narrow<kWidth>::kBoxes][4], uint32_t tile) {
    uint32_t lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    uint32_t at = tile + row * 32 + ((lane / 16) ^ (row / 4 % 2)) * 16;
#pragma unroll
    for (int k = 0; k < Narrow<kWidth>::kBoxes; k++) ldmatrix_x4(a[k], at + k * 64 * 32);
}

// d += weights·b over kRows tokens: b lies in boxes of kSwizzle / 2 columns, kColumns of which are summed.
template <int kRows, int kColumns, int kSwizzle>
PTX_FN void weigh(float (&d)[kColumns / 2], const uint32_t (&weights)[kRows / 16][4], uint32_t b) {
#pragma unroll
    for (int k = 0; k < kRows / 16; k++)
        wgmma_rs<bf16, kColumns, 1>(d, weights[k], wgmma_desc(b + k * 16 * kSwizzle, kRows * kSwizzle, 8 * kSwizzle,
                                                              kSwizzle), 1);
}

// A tile of sums as the left operand of the next product: its columns become the summed index, so no lane gives
// anything to another.
template <int kColumns> PTX_FN void pack_weights(uint32_t (&to)[kColumns / 16][4], const float (&d)[kColumns / 2]) {
#pragma unroll
    for (int k = 0; k < kColumns / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) to[k][i] = pack<bf16>(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
}

// Named barriers: 0 is __syncthreads, then a turn for each warpgroup of sums, then one for its own use.
constexpr int kTurn = 1, kOwn = 4;

// Where a thread is in a ring of stages: a full barrier is waited for with `parity`, an empty one with the other.
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    template <int kStages> PTX_FN void step() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// Which warpgroup this is, as a value that the compiler knows to be the same in a warp.
PTX_FN int warpgroup(PTX_AT_ONLY) {
    int w = int(threadIdx.x / 128);
    return PTX_DO(__shfl_sync(kFullMask, w, 0), __shfl_sync(kFullMask, w, 0, 32, at));
}

// The sum and the maximum over the four lanes that share a row.
PTX_FN float quad_sum(float v PTX_AT) {
    v += PTX_DO(__shfl_xor_sync(kFullMask, v, 1), __shfl_xor_sync(kFullMask, v, 1, 32, at));
    return v + PTX_DO(__shfl_xor_sync(kFullMask, v, 2), __shfl_xor_sync(kFullMask, v, 2, 32, at));
}
PTX_FN float quad_max(float v PTX_AT) {
    v = fmaxf(v, PTX_DO(__shfl_xor_sync(kFullMask, v, 1), __shfl_xor_sync(kFullMask, v, 1, 32, at)));
    return fmaxf(v, PTX_DO(__shfl_xor_sync(kFullMask, v, 2), __shfl_xor_sync(kFullMask, v, 2, 32, at)));
}

// Rows g and g + 8 of a warpgroup's sums times `factor`, as bf16, to a tile of 64 rows at `to` in 64-column boxes and a
// last one of 16 columns (kWide of the first), swizzled as the map of the store expects.
template <int kWide, int kColumns>
PTX_FN void put_tile(uint32_t to, const float (&d)[kColumns / 2], const float (&factor)[2]) {
    int lane = int(threadIdx.x % 32), g = lane / 4, t = lane % 4, row = int(threadIdx.x % 128 / 32) * 16 + g;
#pragma unroll
    for (int j = 0; j < kColumns / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            constexpr int kInWide = 8 * kWide;
            int r = row + 8 * i;
            uint32_t at = j < kInWide ? uint32_t(j / 8 * 64 * 128 + r * 128 + ((j % 8) ^ g) * 16)
                                      : uint32_t(kWide * 64 * 128 + (j - kInWide) / 2 * 64 * 32 + r * 32 +
                                                 (((j - kInWide) % 2) ^ (g / 4)) * 16);
            st_shared_u32(to + at + 4 * t, pack<bf16>(d[4 * j + 2 * i] * factor[i], d[4 * j + 2 * i + 1] * factor[i]));
        }
}

}  // namespace ptx
