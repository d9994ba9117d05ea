// u[r,f] = sx[r] * sw[f] * sum_k qx[r,k] * qw[f,k] + bias[f];  y = residual + gate[r / N, gate_row] * act(u)
// qx[r,k] = e4m3(x[r,k] / sx[r]), sx[r] = max_k |x[r,k]| / 448 (1 for a row of zeros); w the same.
//
// x: [R, K], w: [F, K], bias: [F], gate: [B, C, F], residual, y: [R, F], all T, R = B·N. Rounded operands are bytes
// [rows, stride], stride the next multiple of 16, with f32 scales [rows]. bias, gate and residual may be null.
//
// gemm_fp8_round: a warp owns a row and reads it twice, the second time from L1 or L2: the largest magnitude, then the
// numbers. Bound: 2 bytes in and 1 out an element of bf16: 26 µs for 32,768 rows of 1152 at 4.3 TB/s.
// gemm_fp8_forward: the products on the CUDA cores, for any shape and card, as gemm_forward of gemm.cu: a block owns
// 128×64 results, both operands in shared memory as f32. Products of e4m3 are exact in f32.
//
// Requires: nothing beyond the contract. Does not handle: gradients.
#include "round.cuh"
#include "../common/activation.cuh"
#include "../common/tile.cuh"

using namespace ptx;

extern "C" __global__ void __launch_bounds__(128)
    gemm_fp8_round(const T* x, uint8_t* to, float* scales, int rows, int k, int stride) {
    fp8::round_rows<fp8::ByIntegers>(x, to, scales, rows, k, stride);
}
KERNEL_EXPORT(gemm_fp8_round);

// The number that a byte stands for.
__device__ __forceinline__ float number(uint32_t byte) {
    const uint32_t exponent = byte >> 3 & 15, mantissa = byte & 7;
    const float size = exponent ? __uint_as_float((exponent + 120) << 23 | mantissa << 20) : float(mantissa) * 0.001953125f;
    return byte & 0x80 ? -size : size;
}

using Big = Tile<128, 64, 16>;

extern "C" __global__ void __launch_bounds__(128)
    gemm_fp8_forward(const uint8_t* x, const uint8_t* w, const float* x_scales, const float* w_scales, const T* bias,
                     const T* gate, const T* residual, T* y, int rows, int n, int k, int stride, int f, int c,
                     int gate_row, int act) {
    SMEM_ARRAY(float4, a_tile, Big::kSizeA);
    SMEM_ARRAY(float4, b_tile, Big::kSizeB);
    float *a = reinterpret_cast<float*>(a_tile), *b = reinterpret_cast<float*>(b_tile);
    const int tiles = (f + Big::kN - 1) / Big::kN;
    const int row0 = int(blockIdx.x / tiles) * Big::kM, column0 = int(blockIdx.x % tiles) * Big::kN;
    REG(float, acc, [Big::kRows][Big::kColumns]);
    Big::clear(acc);
    tile_product<Big, true, true>(
        acc, a, b, 0, k,
        [&](int i, int d) { return row0 + i < rows ? number(x[size_t(row0 + i) * stride + d]) : 0.0f; },
        [&](int j, int d) { return column0 + j < f ? number(w[size_t(column0 + j) * stride + d]) : 0.0f; });
#pragma unroll
    for (int i = 0; i < Big::kRows; i++) {
        const int row = row0 + Big::row(i);
        if (row >= rows) continue;
        const float scale = x_scales[row];
        const size_t table = gate ? (size_t(row / n) * c + gate_row) * f : 0;
#pragma unroll
        for (int j = 0; j < Big::kColumns; j++) {
            const int column = column0 + Big::column(j);
            if (column >= f) continue;
            const size_t at = size_t(row) * f + column;
            float u = acc[i][j] * (scale * w_scales[column]);
            if (bias) u += to_float(bias[column]);
            u = act == 1 ? gelu(u).value : act == 2 ? silu(u).value : u;
            if (gate) u *= to_float(gate[table + column]);
            if (residual) u += to_float(residual[at]);
            y[at] = from_float<T>(u);
        }
    }
}
KERNEL_EXPORT(gemm_fp8_forward);
