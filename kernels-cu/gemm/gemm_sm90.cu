// The products of the linear layer on Hopper: u = x·wᵀ with its epilogue, dx = du·w, dw = duᵀ·x; see gemm.cu for the
// tensors and gemm_mma.cu for the same on sm_80. T = bf16; sums in f32; each result rounded once.
//
// Version 3, TMA and wgmma: a block of three warpgroups stays on its multiprocessor for all tiles that are its own. The
// first loads 64 of the depth of both operands into a ring of stages (128-byte swizzle; full and empty barriers), the
// other two multiply. With 128×192 and 128×128 each takes whole tiles in turn (two wgmma of 64 rows on the same columns),
// so that the epilogue of one runs under the products of the other; with 128×256, whose sums would not fit registers
// twice, they share a tile. 24 registers for loading, 240 for multiplying. Operands whose depth is not contiguous lie
// in boxes of 64 columns and are read by wgmma across their rows (MN-major), so gradients need no transposes.
// 256×192 is 128×192 in clusters of two blocks, one below the other, each of which loads half of the common columns for
// both by multicast. Tiles that run at one time share rows in L2 (tile_of). Few tiles: the depth is split by shape, as on sm_80.
//
// Bound: 2·R·K·F operations at 989 TFLOP/s. A step of 128×192×64 is 8 wgmma of 96 clocks, 768; it reads 40 KB from L2
// (53 bytes a clock, 36 in clusters; an L2 that gives each multiprocessor less than that bounds it) and, per wgmma, 2 + 6 KB of shared memory (64 clocks at 128 bytes, under 96). 192 divides
// the widths of DiT-XL/2 and PixArt (1152, 2304, 3456, 4608) and leaves 1 to 3 % of the last wave empty at 32,768 rows.
//
// Requires: K and F multiples of 8 (strides of tensor maps are multiples of 16 bytes). Does not handle: sine.
#include "../common/linear_sm90.cuh"

using namespace linear;

template <class Product, class Out>
PTX_FN void multiply(const TensorMap* a, const TensorMap* b, const Task& task, const Out& out) {
    SMEM_DYNAMIC(smem, 1024);
    SMEM_ARRAY(uint64_t, bars, 12);
    smem_guard(smem, Product::kBytes);
    Product::run(smem, bars, a, b, task, out);
}

// Columns, stages, columns of a slab, whole tiles in turn; their loops are wgmma_ss<bf16, columns, …>.
template <bool kAcrossA, bool kAcrossB> using Wide = Warpgroups<256, 4, 32, false, kAcrossA, kAcrossB>;
using Pair = Warpgroups<192, 4, 64, true, false, false, 2>;
template <bool kAcrossA, bool kAcrossB> using Middle = Warpgroups<192, 4, 64, true, kAcrossA, kAcrossB>;
template <bool kAcrossA, bool kAcrossB> using Narrow = Warpgroups<128, 5, 64, true, kAcrossA, kAcrossB>;

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_wgmma_128x256(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const T* bias,
                      const T* pos, const T* gate, const T* residual, T* y, T* pre, float* partials, int rows, int n,
                      int k, int f, int c, int gate_row, int act, int part, int parts) {
    multiply<Wide<false, false>>(&x, &w, {rows, f, k, part, parts},
                                  Epilogue{bias, pos, gate, residual, y, pre, partials, rows, n, f, c, gate_row, act});
}
KERNEL_EXPORT(gemm_wgmma_128x256);

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_wgmma_128x192(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const T* bias,
                      const T* pos, const T* gate, const T* residual, T* y, T* pre, float* partials, int rows, int n,
                      int k, int f, int c, int gate_row, int act, int part, int parts) {
    multiply<Middle<false, false>>(&x, &w, {rows, f, k, part, parts},
                                  Epilogue{bias, pos, gate, residual, y, pre, partials, rows, n, f, c, gate_row, act});
}
KERNEL_EXPORT(gemm_wgmma_128x192);

// In clusters of 2.
extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_wgmma_256x192(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const T* bias,
                      const T* pos, const T* gate, const T* residual, T* y, T* pre, float* partials, int rows, int n,
                      int k, int f, int c, int gate_row, int act, int part, int parts) {
    multiply<Pair>(&x, &w, {rows, f, k, part, parts},
                   Epilogue{bias, pos, gate, residual, y, pre, partials, rows, n, f, c, gate_row, act});
}
KERNEL_EXPORT(gemm_wgmma_256x192);

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_wgmma_128x128(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const T* bias,
                      const T* pos, const T* gate, const T* residual, T* y, T* pre, float* partials, int rows, int n,
                      int k, int f, int c, int gate_row, int act, int part, int parts) {
    multiply<Narrow<false, false>>(&x, &w, {rows, f, k, part, parts},
                                  Epilogue{bias, pos, gate, residual, y, pre, partials, rows, n, f, c, gate_row, act});
}
KERNEL_EXPORT(gemm_wgmma_128x128);

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_wgmma_128x192_x(const __grid_constant__ TensorMap du, const __grid_constant__ TensorMap w, T* dx,
                        float* partials, int rows, int k, int f, int part, int parts) {
    multiply<Middle<false, true>>(&du, &w, {rows, k, f, part, parts}, Plain{dx, partials, rows, k});
}
KERNEL_EXPORT(gemm_wgmma_128x192_x);

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_wgmma_128x192_w(const __grid_constant__ TensorMap du, const __grid_constant__ TensorMap x, T* dw,
                        float* partials, int rows, int k, int f, int part, int parts) {
    multiply<Middle<true, true>>(&du, &x, {f, k, rows, part, parts}, Plain{dw, partials, f, k});
}
KERNEL_EXPORT(gemm_wgmma_128x192_w);

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_wgmma_128x128_x(const __grid_constant__ TensorMap du, const __grid_constant__ TensorMap w, T* dx,
                        float* partials, int rows, int k, int f, int part, int parts) {
    multiply<Narrow<false, true>>(&du, &w, {rows, k, f, part, parts}, Plain{dx, partials, rows, k});
}
KERNEL_EXPORT(gemm_wgmma_128x128_x);

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_wgmma_128x128_w(const __grid_constant__ TensorMap du, const __grid_constant__ TensorMap x, T* dw,
                        float* partials, int rows, int k, int f, int part, int parts) {
    multiply<Narrow<true, true>>(&du, &x, {f, k, rows, part, parts}, Plain{dw, partials, f, k});
}
KERNEL_EXPORT(gemm_wgmma_128x128_w);
