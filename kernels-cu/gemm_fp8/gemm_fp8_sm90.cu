// gemm_fp8 on Hopper; see gemm_fp8.cu for the formula and the tensors, common/linear_sm90.cuh for the main loop: TMA
// loads 128 of the depth of both operands, rows of 128 bytes, two warpgroups multiply tiles of 128×192 in turn by
// wgmma m64n192k32; scales, bias, activation, gate and residual follow in the epilogue.
//
// Bound: 2·R·K·F operations at 1979 TFLOP/s, twice those of bf16. A step of 128×192×128 is 8 wgmma of 96 clocks, as
// in bf16 for half the depth, and reads as many bytes.
// The sums: wgmma adds products of 8-bit floats with fewer bits than f32 (about 14 are kept on Hopper), which the
// emulator does not show.
//
// Requires: F a multiple of 8; K is padded with zeros by gemm_fp8_round_sm90.
#include "round.cuh"
#include "../common/linear_sm90.cuh"

using namespace linear;

struct ByInstruction {
    static PTX_FN uint32_t pair(float lo, float hi) { return pack_e4m3(lo, hi); }
};

extern "C" __global__ void __launch_bounds__(128)
    gemm_fp8_round_sm90(const T* x, uint8_t* to, float* scales, int rows, int k, int stride) {
    fp8::round_rows<ByInstruction>(x, to, scales, rows, k, stride);
}
KERNEL_EXPORT(gemm_fp8_round_sm90);

struct Scaled {
    Epilogue then;
    const float *x_scales, *w_scales;

    PTX_FN void operator()(float (&v)[8], int row, int column, int) const {
        if (row >= then.rows || column >= then.f) return;
        const float own = x_scales[row];
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] *= own * w_scales[column + e];
        then.finish(v, row, column);
    }
};

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_fp8_wgmma_128x192(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                           const float* x_scales, const float* w_scales, const T* bias, const T* gate,
                           const T* residual, T* y, int rows, int n, int k, int f, int c, int gate_row, int act) {
    // Its loop is wgmma_ss<e4m3, 192>. The f32 version is never launched; its epilogue would not fit the registers.
    constexpr int kWide = same<T, float> ? 128 : 192;
    using Product = Warpgroups<kWide, 4, 64, true, false, false, 1, e4m3>;
    SMEM_DYNAMIC(smem, 1024);
    SMEM_ARRAY(uint64_t, bars, 8);
    smem_guard(smem, Product::kBytes);
    Product::run(smem, bars, &x, &w, Task{rows, f, k, k, 1},
                 Scaled{{bias, nullptr, gate, residual, y, nullptr, nullptr, rows, n, f, c, gate_row, act},
                        x_scales, w_scales});
}
KERNEL_EXPORT(gemm_fp8_wgmma_128x192);
