// n[b,i,j,c] = (x[b,i,j,c] - mean[b,g]) * rstd[b,g] * gamma[c] + beta[c], g = c / (C/G);  a = n·sigmoid(n)
// y[b,i,j,f] = bias[f] + sum_{p,q,c} a[b, i + p - 1, j + q - 1, c] * filters[f,p,q,c] + residual[b,i,j,f], a zero outside
//
// x: [B, H, W, C], gamma, beta: [C], filters: [F, 3, 3, C], bias: [F], residual, y: [B, H, W, F], all bf16; bias and
// residual may be null; mean, rstd: [B, G] f32, of group_norm_silu's kernels; maps: [B, C/4, 2, 4] f32; sums in f32.
//
// A small kernel makes a factor and an addend of every channel from the statistics: n = x·factor + addend. Then the loop
// `halo` of common/conv_mma.cuh: a block holds 8x16 results and the 10x18 pixels around them, 64 channels at a time; each
// thread turns the chunks that it has copied into a, rounded to bf16, in place, a chunk beside every tap of the channels
// before, so that the exponentials run under the products. Pixels outside of the image stay the zeros of cp.async. The
// activated image is never in global memory.
//
// Bound: 18·B·H·W·F·C operations on the tensor cores. Beside the products of a tile of 128 filters and 64 channels, 4,608
// clocks at the full rate of an H100, stand 23,040 operations of the special function unit, 1,440 clocks.
//
// Requires: C a multiple of 8, 3x3, bf16. Does not handle: other shapes and f32, for which launch.rs runs the norm and
// the convolution one after the other.
#include "../common/ptx.cuh"
#include "../common/conv_mma.cuh"

using namespace ptx;

// A thread a channel of an image.
extern "C" __global__ void __launch_bounds__(128)
    norm_silu_conv2d_table(const float* mean, const float* rstd, const T* gamma, const T* beta, float* maps, int b,
                           int c, int groups) {
    const int at = blockIdx.x * 128 + threadIdx.x;
    if (at >= b * c) return;
    const int channel = at % c, group = at / c * groups + channel / (c / groups);
    const float factor = rstd[group] * to_float(gamma[channel]);
    float* to = maps + size_t(at / 4) * 8 + at % 4;
    to[0] = factor;
    to[4] = fmaf(-mean[group], factor, to_float(beta[channel]));
}
KERNEL_EXPORT(norm_silu_conv2d_table);

extern "C" __global__ void __launch_bounds__(128, 2)
    norm_silu_conv2d_128x128(const T* x, const float* maps, const T* filters, const T* bias,
                             const T* residual, T* y, int h, int w, int c, int f) {
    conv_halo<ConvTile<128, 128, 2, 2>, 4, true>(x, maps, filters, bias, residual, y, h, w, c, f, h, w, 1, 1, 0);
}
KERNEL_EXPORT(norm_silu_conv2d_128x128);

extern "C" __global__ void __launch_bounds__(128, 2)
    norm_silu_conv2d_128x64(const T* x, const float* maps, const T* filters, const T* bias,
                            const T* residual, T* y, int h, int w, int c, int f) {
    conv_halo<ConvTile<128, 64, 2, 2>, 4, true>(x, maps, filters, bias, residual, y, h, w, c, f, h, w, 1, 1, 0);
}
KERNEL_EXPORT(norm_silu_conv2d_128x64);

extern "C" __global__ void __launch_bounds__(256, 2)
    norm_silu_conv2d_128x16(const T* x, const float* maps, const T* filters, const T* bias,
                            const T* residual, T* y, int h, int w, int c, int f) {
    conv_halo<ConvTile<128, 16, 8, 1>, 4, true>(x, maps, filters, bias, residual, y, h, w, c, f, h, w, 1, 1, 0);
}
KERNEL_EXPORT(norm_silu_conv2d_128x16);
