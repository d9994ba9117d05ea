// y[b,i,j,f] = bias[f] + sum_{p,q,c} a[b, i + p - 1, j + q - 1, c] * filters[f,p,q,c] + residual[b,i,j,f], a zero outside
// a = n·sigmoid(n), n = x·factor + addend, with a factor and an addend of every image and channel
//
// x: [B, H, W, C], filters: [F, 3, 3, C], bias: [F], residual, y: [B, H, W, F], all bf16; bias and residual may be null;
// maps: [B, C/4, 2, 4] f32, of norm_silu_conv2d_table; sums in f32.
//
// As norm_silu_conv2d.cu, with the products of common/conv_wgmma.cuh: two warpgroups, each with 64 pixels and all filters
// of the tile.
//
// Bound: 18·B·H·W·F·C operations on the tensor cores, 4,608 clocks for a tile of 128 filters and 64 channels; beside them
// 1,440 of the special function unit and 4,800 of shared memory.
//
// Requires: Hopper, bf16, C a multiple of 8, 3x3. Does not handle: other shapes, which launch.rs runs in other ways.
#include "../common/ptx.cuh"
#include "../common/conv_wgmma.cuh"

using namespace ptx;

extern "C" __global__ void __launch_bounds__(256, 2)
    norm_silu_conv2d_wgmma_128x128(const T* x, const float* maps, const T* filters, const T* bias, const T* residual,
                                   T* y, int h, int w, int c, int f) {
    conv_halo<ConvWgmmaTile<128>, 4, true>(x, maps, filters, bias, residual, y, h, w, c, f, h, w, 1, 1, 0);
}
KERNEL_EXPORT(norm_silu_conv2d_wgmma_128x128);

extern "C" __global__ void __launch_bounds__(256, 2)
    norm_silu_conv2d_wgmma_128x64(const T* x, const float* maps, const T* filters, const T* bias, const T* residual,
                                  T* y, int h, int w, int c, int f) {
    conv_halo<ConvWgmmaTile<64>, 4, true>(x, maps, filters, bias, residual, y, h, w, c, f, h, w, 1, 1, 0);
}
KERNEL_EXPORT(norm_silu_conv2d_wgmma_128x64);
