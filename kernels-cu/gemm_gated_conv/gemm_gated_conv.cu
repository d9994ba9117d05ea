// p[r,part,c] = sum_d x[r,d] * w[part*C + c, d] + bias;  u = short_bias + sum_j short_weight[j] * p[t - lead + j];
// y[r,c] = u_q * u_k * u_v: the in-projection of Hyena-X with all that follows it.
//
// x [R = B·N, D], w [3·C, D], bias [3·C] (may be null), short_weight [3, C, K], short_bias [3, C], y [R, C], p [R, 3, C]
// (may be null); the last `reversed` channels run against token order. For T = bf16 (the ways' `elements`; compiled for
// f32 as every source, and not called then). Sums in f32; p is rounded to bf16 before the convolution, as it is where it
// goes through memory; each result rounded once.
//
// mma.sync m16n8k16: a block owns 128 rows of p and q, k and v of 32 or 64 channels (96 or 192 columns), 64×48 a warp, in
// the loop of gemm (common/linear_mma.cuh); three groups of rows of w lie side by side as its second operand. The ring's
// memory then holds the tile of p (gates.cuh), of which 128 - (K - 1) tokens are results: the others are computed by the
// neighbouring tiles, too, 2.4 % more products for four taps.
//
// Bound: 6·R·D·C operations, 312 TFLOP/s on an A100. A step of 128×96×32 is 192 MMAs of a warp, 8 clocks each on a quarter
// of the multiprocessor: 384 clocks; it copies 14 KB, 37 bytes of L2 a clock (128×192: 20 KB in 768 clocks, 27). What the
// fusing saves is p, written and read: 12 bytes a row and channel, beside 4 that remain.
//
// Requires: D a multiple of 8 (rows begin at 16 bytes); C and `reversed` even (a thread has two channels of one
// direction); `tokens` at least 1. Does not handle: the split of the depth; few tiles are better apart.
#include "../common/cluster.cuh"
#include "../common/linear_mma.cuh"
#include "gates.cuh"

using namespace linear;

template <int kChannels>
PTX_FN void project(const T* x, const T* w, int d, const Gates& g) {
    // Its loop is mma_m16n8k16<bf16>.
    using Product = Mma<kGateRows, 3 * kChannels, false, false, kChannels / 16, kChannels == 32 ? 3 : 4>;
    using Results = GateTile<kChannels, Product::kThreads>;
    static_assert(Product::kBytes >= Results::kBytes, "the ring's memory holds the tile afterwards");
    SMEM_DYNAMIC(smem, 128);
    smem_guard(smem, Product::kBytes);
    wait_for_previous();
    const uint32_t base = smem_u32(smem);
    const Tile tile = tile_of(int(blockIdx.x), (g.rows + g.tokens - 1) / g.tokens, (g.c + kChannels - 1) / kChannels);
    const int channel = tile.column * kChannels;
    const Gates::Span span = g.span(tile.row, channel, kChannels);
    REG(float, acc, [Product::kBlocksM][Product::kBlocksN][4]);
    Product::products(acc, base, (d + kMmaDepth - 1) / kMmaDepth, [&](uint32_t stage, int step) {
        const int k = step * kMmaDepth;
        tile_copy<kGateRows, Product::kRowA, Product::kThreads>(stage, x + size_t(span.base) * d + k, d,
                                                                g.rows - span.base, d - k);
#pragma unroll
        for (int part = 0; part < 3; part++)
            tile_copy<kChannels, Product::kRowB, Product::kThreads>(
                stage + Product::kTileA + part * kChannels * Product::kRowB,
                w + (size_t(part) * g.c + channel) * d + k, d, g.c - channel, d - k);
    });
#pragma unroll
    for (int i = 0; i < Product::kBlocksM; i++) {
#pragma unroll
        for (int j = 0; j < Product::kBlocksN; j++)
            Results::put(base, g, channel, Product::own_row() + 16 * i, Product::own_column() + 8 * j, acc[i][j]);
    }
    __syncthreads();
    Results::results(base, g, span, channel, int(threadIdx.x));
}

extern "C" __global__ void __launch_bounds__(128, 3)
    gemm_gated_conv_mma_128x96(const T* x, const T* w, const T* bias, const T* short_weight, const T* short_bias, T* y,
                               T* p, int rows, int n, int d, int c, int taps, int lead, int reversed, int tokens) {
    project<32>(x, w, d, {bias, short_weight, short_bias, y, p, rows, n, c, taps, lead, reversed, tokens});
}
KERNEL_EXPORT(gemm_gated_conv_mma_128x96);

extern "C" __global__ void __launch_bounds__(256, 1)
    gemm_gated_conv_mma_128x192(const T* x, const T* w, const T* bias, const T* short_weight, const T* short_bias, T* y,
                                T* p, int rows, int n, int d, int c, int taps, int lead, int reversed, int tokens) {
    project<64>(x, w, d, {bias, short_weight, short_bias, y, p, rows, n, c, taps, lead, reversed, tokens});
}
KERNEL_EXPORT(gemm_gated_conv_mma_128x192);
