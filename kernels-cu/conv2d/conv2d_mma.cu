// u[b,i,j,f] = bias[f] + sum_{p,q,c} x[b, i*stride + p - pad_h, j*stride + q - pad_w, c] * filters[f,p,q,c]
// y = max(u, 0) where relu, else u; x is zero outside of the image
//
// x: [B, H, W, C], filters: [F, Kh, Kw, C], bias: [F] (may be null), y: [B, Oh, Ow, F], all bf16; sums in f32.
//
// Tensor cores, mma.sync m16n8k16; the two loops are in common/conv_mma.cuh. `windows`: a product of
// [B·Oh·Ow, Kh·Kw·C] with filtersᵀ, both operands by cp.async through a ring of stages of 64 of the depth, the left one
// gathered through the windows. `halo`: 3x3 with stride 1, where a block holds 8x16 results and the pixels around them,
// 64 channels at a time, and the nine taps read the same pixels. The number behind a name is rows and columns of a tile.
//
// Bound: 2·B·Oh·Ow·F·Kh·Kw·C operations on the tensor cores. 64 of the depth of a 128×128 tile are 512 mma, 1,048,576
// multiply-adds: 512 clocks at the full rate of an H100, about 800 as mma.sync is known to run there. Beside them lie 64
// KB of ldmatrix (a warp has 64×64 results), 512 clocks of shared memory, and 32 KB from L2 (`halo`: 16 KB for the
// filters and 2.5 KB for a ninth of the pixels), 256 (144) clocks of shared memory.
//
// Requires: C a multiple of 8, bf16; `halo` 3x3 and stride 1. Does not handle: f32 and other C, which conv2d.cu takes.
#include "../common/ptx.cuh"
#include "../common/conv_mma.cuh"

using namespace ptx;

extern "C" __global__ void __launch_bounds__(128, 2)
    conv2d_windows_128x128(const T* x, const T* filters, const T* bias, T* y, int b, int h, int w, int c, int f, int kh,
                           int kw, int oh, int ow, int stride, int pad_h, int pad_w, int relu) {
    conv_windows<ConvTile<128, 128, 2, 2>, 3>(x, filters, bias, y, b, h, w, c, f, kh, kw, oh, ow, stride,
                                                    pad_h, pad_w, relu);
}
KERNEL_EXPORT(conv2d_windows_128x128);

extern "C" __global__ void __launch_bounds__(128, 3)
    conv2d_windows_64x64(const T* x, const T* filters, const T* bias, T* y, int b, int h, int w, int c, int f, int kh,
                         int kw, int oh, int ow, int stride, int pad_h, int pad_w, int relu) {
    conv_windows<ConvTile<64, 64, 2, 2>, 4>(x, filters, bias, y, b, h, w, c, f, kh, kw, oh, ow, stride,
                                                    pad_h, pad_w, relu);
}
KERNEL_EXPORT(conv2d_windows_64x64);

extern "C" __global__ void __launch_bounds__(256, 2)
    conv2d_windows_128x16(const T* x, const T* filters, const T* bias, T* y, int b, int h, int w, int c, int f, int kh,
                          int kw, int oh, int ow, int stride, int pad_h, int pad_w, int relu) {
    conv_windows<ConvTile<128, 16, 8, 1>, 4>(x, filters, bias, y, b, h, w, c, f, kh, kw, oh, ow, stride,
                                                    pad_h, pad_w, relu);
}
KERNEL_EXPORT(conv2d_windows_128x16);

extern "C" __global__ void __launch_bounds__(128, 2)
    conv2d_halo_128x128(const T* x, const T* filters, const T* bias, T* y, int h, int w, int c, int f, int oh, int ow,
                        int pad_h, int pad_w, int relu) {
    conv_halo<ConvTile<128, 128, 2, 2>, 4, false, T>(x, nullptr, filters, bias, nullptr, y, h, w, c, f, oh,
                                                        ow, pad_h, pad_w, relu);
}
KERNEL_EXPORT(conv2d_halo_128x128);

extern "C" __global__ void __launch_bounds__(128, 2)
    conv2d_halo_128x64(const T* x, const T* filters, const T* bias, T* y, int h, int w, int c, int f, int oh, int ow,
                       int pad_h, int pad_w, int relu) {
    conv_halo<ConvTile<128, 64, 2, 2>, 4, false, T>(x, nullptr, filters, bias, nullptr, y, h, w, c, f, oh,
                                                        ow, pad_h, pad_w, relu);
}
KERNEL_EXPORT(conv2d_halo_128x64);
