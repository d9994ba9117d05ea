// u[b,i,j,f] = bias[f] + sum_{p,q,c} x[b, i + p - pad_h, j + q - pad_w, c] * filters[f,p,q,c], p, q < 3
// y = max(u, 0) where relu, else u; x is zero outside of the image
//
// x: [B, H, W, C], filters: [F, 3, 3, C], bias: [F] (may be null), y: [B, Oh, Ow, F], all bf16; sums in f32.
//
// The loop `halo` of common/conv_mma.cuh with the products of common/conv_wgmma.cuh: 8x16 pixels by two warpgroups, each
// with 64 of them and all filters of the tile; filters from shared memory, pixels from registers by ldmatrix.
//
// Bound: 18·B·Oh·Ow·F·C operations on the tensor cores. 64 of the depth of a 128×128 tile are 512 clocks at the full rate;
// shared memory is read for 16 KB by ldmatrix and 16 KB by each warpgroup, 384 clocks, and written for 18.5 KB, 148.
//
// Requires: Hopper, bf16, C a multiple of 8. Does not handle: other kernels and strides, which conv2d_mma.cu takes.
#include "../common/ptx.cuh"
#include "../common/conv_wgmma.cuh"

using namespace ptx;

extern "C" __global__ void __launch_bounds__(256, 2)
    conv2d_wgmma_128x128(const T* x, const T* filters, const T* bias, T* y, int h, int w, int c, int f, int oh, int ow,
                         int pad_h, int pad_w, int relu) {
    conv_halo<ConvWgmmaTile<128>, 4, false, T>(x, nullptr, filters, bias, nullptr, y, h, w, c, f, oh, ow, pad_h, pad_w,
                                               relu);
}
KERNEL_EXPORT(conv2d_wgmma_128x128);

extern "C" __global__ void __launch_bounds__(256, 2)
    conv2d_wgmma_128x64(const T* x, const T* filters, const T* bias, T* y, int h, int w, int c, int f, int oh, int ow,
                        int pad_h, int pad_w, int relu) {
    conv_halo<ConvWgmmaTile<64>, 4, false, T>(x, nullptr, filters, bias, nullptr, y, h, w, c, f, oh, ow, pad_h, pad_w,
                                              relu);
}
KERNEL_EXPORT(conv2d_wgmma_128x64);
