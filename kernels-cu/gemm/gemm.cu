// u[r,f] = sum_k x[r,k] * w[f,k] + bias[f] + pos[r % N, f];  y[r,f] = residual[r,f] + gate[r / N, gate_row, f] * act(u)
// du = dy * gate * act'(u);  dx = du·w;  dw = duᵀ·x;  dbias = sum_r du;  dpos[n] = sum_b du;  dgate[b] = sum_n dy * u
//
// x: [R, K], w: [F, K], bias: [F], pos: [N, F], gate: [B, C, F], residual, y, pre (= u): [R, F], all T, R = B·N; sums in
// f32, each result rounded once. bias, pos, gate, residual, pre may be null. `round`: operands of products become bf16.
//
// Version 1, CUDA cores, the first rung: a block of 128 threads owns 128×64 results, 8×8 a thread; chunks of 16 of the
// depth lie in shared memory as f32. The three products differ only in how operands are read. dw is split over rows
// where its tiles are few; partial results are added in order by a second kernel, and how many there are follows from
// the shape. du is stored (T) where an activation or a gate makes it differ from dy; sums over rows compute it again in
// f32: a block owns 32 columns and a part of the rows, four warps take every fourth row and are added in order, and a
// last kernel adds the parts.
//
// Bound: 2·R·K·F operations. On the CUDA cores of H100 67 TFLOP/s in f32 (64 multiply-adds for four 16-byte reads of
// shared memory a thread: arithmetic, not shared memory, bounds it); tensor cores do 989 in bf16, so this version is
// within a fifteenth of the card at the best, and the next rung is theirs.
//
// Requires: nothing beyond the contract: any shape. Does not handle: strides, weights of another type than T.
#include "../common/ptx.cuh"
#include "../common/activation.cuh"
#include "../common/elementwise.cuh"
#include "../common/tile.cuh"

using namespace ptx;

using Big = Tile<128, 64, 16>;

// As an operand of a product.
__device__ __forceinline__ float operand(T v, int round) {
    const float wide = to_float(v);
    return round ? to_float(from_float<bf16>(wide)) : wide;
}

extern "C" __global__ void __launch_bounds__(128)
    gemm_forward(const T* x, const T* w, const T* bias, const T* pos, const T* gate, const T* residual, T* y, T* pre,
                 int rows, int n, int k, int f, int c, int gate_row, int act, int round) {
    SMEM_ARRAY(float4, a_tile, Big::kSizeA);
    SMEM_ARRAY(float4, b_tile, Big::kSizeB);
    float *a = reinterpret_cast<float*>(a_tile), *b = reinterpret_cast<float*>(b_tile);
    const int tiles = (f + Big::kN - 1) / Big::kN;
    const int row0 = int(blockIdx.x / tiles) * Big::kM, column0 = int(blockIdx.x % tiles) * Big::kN;
    REG(float, acc, [Big::kRows][Big::kColumns]);
    Big::clear(acc);
    tile_product<Big, true, true>(
        acc, a, b, 0, k,
        [&](int i, int d) { return row0 + i < rows ? operand(x[size_t(row0 + i) * k + d], round) : 0.0f; },
        [&](int j, int d) { return column0 + j < f ? operand(w[size_t(column0 + j) * k + d], round) : 0.0f; });
#pragma unroll
    for (int i = 0; i < Big::kRows; i++) {
        const int row = row0 + Big::row(i);
        if (row >= rows) continue;
        const size_t table = gate ? (size_t(row / n) * c + gate_row) * f : 0;
#pragma unroll
        for (int j = 0; j < Big::kColumns; j++) {
            const int column = column0 + Big::column(j);
            if (column >= f) continue;
            const size_t at = size_t(row) * f + column;
            float u = acc[i][j];
            if (bias) u += to_float(bias[column]);
            if (pos) u += to_float(pos[size_t(row % n) * f + column]);
            if (pre) pre[at] = from_float<T>(u);
            u = activation(act, u).value;
            if (gate) u *= to_float(gate[table + column]);
            if (residual) u += to_float(residual[at]);
            y[at] = from_float<T>(u);
        }
    }
}
KERNEL_EXPORT(gemm_forward);

// du of one element, in f32.
__device__ __forceinline__ float slope_at(const T* dy, const T* pre, const T* gate, size_t row, int column, int n, int f,
                                          int c, int gate_row, int act) {
    float du = to_float(dy[row * f + column]);
    if (act) du *= activation(act, to_float(pre[row * f + column])).slope;
    if (gate) du *= to_float(gate[(row / n * c + gate_row) * f + column]);
    return du;
}

extern "C" __global__ void __launch_bounds__(256)
    gemm_backward_u(const T* dy, const T* pre, const T* gate, T* du, int rows, int n, int f, int c, int gate_row,
                    int act) {
    for (size_t i = grid_thread(); i < size_t(rows) * f; i += grid_threads())
        du[i] = from_float<T>(slope_at(dy, pre, gate, i / f, int(i % f), n, f, c, gate_row, act));
}
KERNEL_EXPORT(gemm_backward_u);

extern "C" __global__ void __launch_bounds__(128)
    gemm_backward_x(const T* du, const T* w, T* dx, int rows, int k, int f, int round) {
    SMEM_ARRAY(float4, a_tile, Big::kSizeA);
    SMEM_ARRAY(float4, b_tile, Big::kSizeB);
    float *a = reinterpret_cast<float*>(a_tile), *b = reinterpret_cast<float*>(b_tile);
    const int tiles = (k + Big::kN - 1) / Big::kN;
    const int row0 = int(blockIdx.x / tiles) * Big::kM, column0 = int(blockIdx.x % tiles) * Big::kN;
    REG(float, acc, [Big::kRows][Big::kColumns]);
    Big::clear(acc);
    tile_product<Big, true, false>(
        acc, a, b, 0, f,
        [&](int i, int d) { return row0 + i < rows ? operand(du[size_t(row0 + i) * f + d], round) : 0.0f; },
        [&](int j, int d) { return column0 + j < k ? operand(w[size_t(d) * k + column0 + j], round) : 0.0f; });
#pragma unroll
    for (int i = 0; i < Big::kRows; i++) {
#pragma unroll
        for (int j = 0; j < Big::kColumns; j++) {
            const int row = row0 + Big::row(i), column = column0 + Big::column(j);
            if (row < rows && column < k) dx[size_t(row) * k + column] = from_float<T>(acc[i][j]);
        }
    }
}
KERNEL_EXPORT(gemm_backward_x);

// Part blockIdx.y of the rows; into `partials` [parts, F, K] where there are several.
extern "C" __global__ void __launch_bounds__(128)
    gemm_backward_w(const T* du, const T* x, T* dw, float* partials, int rows, int k, int f, int part, int round) {
    SMEM_ARRAY(float4, a_tile, Big::kSizeA);
    SMEM_ARRAY(float4, b_tile, Big::kSizeB);
    float *a = reinterpret_cast<float*>(a_tile), *b = reinterpret_cast<float*>(b_tile);
    const int tiles = (k + Big::kN - 1) / Big::kN;
    const int row0 = int(blockIdx.x / tiles) * Big::kM, column0 = int(blockIdx.x % tiles) * Big::kN;
    const int first = int(blockIdx.y) * part, end = min(rows, first + part);
    REG(float, acc, [Big::kRows][Big::kColumns]);
    Big::clear(acc);
    tile_product<Big, false, false>(
        acc, a, b, first, end,
        [&](int i, int d) { return row0 + i < f ? operand(du[size_t(d) * f + row0 + i], round) : 0.0f; },
        [&](int j, int d) { return column0 + j < k ? operand(x[size_t(d) * k + column0 + j], round) : 0.0f; });
#pragma unroll
    for (int i = 0; i < Big::kRows; i++) {
#pragma unroll
        for (int j = 0; j < Big::kColumns; j++) {
            const int row = row0 + Big::row(i), column = column0 + Big::column(j);
            if (row >= f || column >= k) continue;
            const size_t at = size_t(row) * k + column;
            if (partials)
                partials[size_t(blockIdx.y) * f * k + at] = acc[i][j];
            else
                dw[at] = from_float<T>(acc[i][j]);
        }
    }
}
KERNEL_EXPORT(gemm_backward_w);

// to[i] = sum of the parts, in order: of dw, and of dbias.
extern "C" __global__ void __launch_bounds__(256)
    gemm_backward_add(const float* partials, T* to, uint64_t count, int parts) {
    for (size_t i = grid_thread(); i < count; i += grid_threads()) {
        float sum = 0.0f;
        for (int p = 0; p < parts; p++) sum += partials[size_t(p) * count + i];
        to[i] = from_float<T>(sum);
    }
}
KERNEL_EXPORT(gemm_backward_add);

// Sums over the rows of a segment (all rows, or those of a sample), in `parts` parts: of du, or of dy·u where `of_u`.
// partials: [segments, parts, F].
extern "C" __global__ void __launch_bounds__(128)
    gemm_backward_columns(const T* dy, const T* pre, const T* gate, float* partials, int length, int parts, int n, int f,
                          int c, int gate_row, int act, int of_u) {
    SMEM_ARRAY(float, warps, 128);
    const int tiles = (f + 31) / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = int(blockIdx.x % tiles) * 32 + lane, piece = int(blockIdx.x / tiles);
    const int each = (length + parts - 1) / parts, first = piece % parts * each, end = min(length, first + each);
    const size_t segment = size_t(piece / parts) * length;
    float sum = 0.0f;
    if (column < f) {
        for (int i = first + warp; i < end; i += 4) {
            const size_t row = segment + i;
            sum += of_u ? to_float(dy[row * f + column]) * to_float(pre[row * f + column])
                        : slope_at(dy, pre, gate, row, column, n, f, c, gate_row, act);
        }
    }
    warps[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && column < f)
        partials[size_t(piece) * f + column] = ((warps[lane] + warps[32 + lane]) + warps[64 + lane]) + warps[96 + lane];
}
KERNEL_EXPORT(gemm_backward_columns);

// The table's gradient: the parts of each sample in row gate_row, zeros elsewhere.
extern "C" __global__ void __launch_bounds__(256)
    gemm_backward_gate(const float* partials, T* dgate, int b, int c, int f, int gate_row, int parts) {
    for (size_t i = grid_thread(); i < size_t(b) * c * f; i += grid_threads()) {
        const size_t row = i / f, sample = row / c;
        float sum = 0.0f;
        if (int(row % c) == gate_row) {
            for (int p = 0; p < parts; p++) sum += partials[(sample * parts + p) * f + i % f];
        }
        dgate[i] = from_float<T>(sum);
    }
}
KERNEL_EXPORT(gemm_backward_gate);

extern "C" __global__ void __launch_bounds__(256)
    gemm_backward_pos(const T* dy, const T* pre, const T* gate, T* dpos, int b, int n, int f, int c, int gate_row,
                      int act) {
    for (size_t i = grid_thread(); i < size_t(n) * f; i += grid_threads()) {
        float sum = 0.0f;
        for (int sample = 0; sample < b; sample++)
            sum += slope_at(dy, pre, gate, size_t(sample) * n + i / f, int(i % f), n, f, c, gate_row, act);
        dpos[i] = from_float<T>(sum);
    }
}
KERNEL_EXPORT(gemm_backward_pos);
