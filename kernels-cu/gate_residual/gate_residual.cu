// y[b,n,d] = residual[b,n,d] + modulation[b,gate,d] * branch[b,n,d]
// Backward: dbranch = modulation[b,gate]·dy; dmodulation[b,gate] = sum_n branch·dy, its other rows zero; dresidual is
// dy itself.
//
// residual, branch, y, dy, dbranch: [B, N, D] T; modulation, dmodulation: [B, C, D] T; sums in f32.
//
// Forward, a warp owns a row and walks it in chunks of 8 elements a lane. Backward, a thread owns 8 columns of one
// sample and walks tokens: the gate and the sum of its columns stay in registers; the 16 rows of threads of a block add
// theirs in order through shared memory, a block writes a row of partial sums, and a second kernel adds those of a
// sample, always in the same order (`splits` follows from the shape alone).
//
// Bound: memory, 6 bytes an element either way in bf16: 226 MB at B=2, N=16384, D=1152. Forward, 48 warps of 40 registers
// hold 48 KB of loads a multiprocessor; backward, 24 warps of 74 registers hold two tokens each, 48 KB.
//
// Requires: D a multiple of 8; the `_any` kernels are the same text for single elements.
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/ptx.cuh"
#include "../common/rows.cuh"

using namespace ptx;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
// Backward: chunks of columns by tokens that a block takes at a time.
constexpr int kColumns = 16, kTokens = kThreads / kColumns;

template <int W>
__device__ __forceinline__ void add_gated(const T* residual, const T* modulation, const T* branch, T* y, int rows,
                                          int n, int c, int d, int gate) {
    const int row = blockIdx.x * kWarps + threadIdx.x / 32;
    if (row >= rows) return;
    const T* factor = modulation + (size_t(row / n) * c + gate) * d;
    const size_t first = size_t(row) * d;
    for (int at = W * (threadIdx.x % 32); at < d; at += 32 * W) {
        float r[W], v[W], a[W];
        load(r, residual + first + at);
        load(v, branch + first + at);
        load_kept(a, factor + at);
#pragma unroll
        for (int j = 0; j < W; j++) r[j] = fmaf(a[j], v[j], r[j]);
        store(y + first + at, r);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    gate_residual_forward(const T* residual, const T* modulation, const T* branch, T* y, int rows, int n, int c, int d,
                          int gate) {
    add_gated<8>(residual, modulation, branch, y, rows, n, c, d, gate);
}
KERNEL_EXPORT(gate_residual_forward);

extern "C" __global__ void __launch_bounds__(kThreads)
    gate_residual_forward_any(const T* residual, const T* modulation, const T* branch, T* y, int rows, int n, int c,
                              int d, int gate) {
    add_gated<1>(residual, modulation, branch, y, rows, n, c, d, gate);
}
KERNEL_EXPORT(gate_residual_forward_any);

// Tokens that a thread loads before it uses the first.
constexpr int kBatch = 2;

template <int W>
__device__ __forceinline__ void gate_backward(const T* dy, const T* modulation, const T* branch, T* dbranch,
                                              float* partials, int n, int c, int d, int gate, int splits) {
    SMEM_ARRAY(float, sums, kColumns* W);
    const int tiles = (d + kColumns * W - 1) / (kColumns * W), group = blockIdx.x / tiles;
    const int sample = group / splits, split = group % splits, own = threadIdx.x % kColumns * W;
    const int column = blockIdx.x % tiles * kColumns * W + own, turn_of = threadIdx.x / kColumns;
    const bool inside = column < d;
    float a[W], sum[W];
#pragma unroll
    for (int j = 0; j < W; j++) a[j] = sum[j] = 0.0f;
    if (inside) load(a, modulation + (size_t(sample) * c + gate) * d + column);
    const int step = splits * kTokens;
    for (int token = split * kTokens + turn_of; inside && token < n; token += kBatch * step) {
        float g[kBatch][W], v[kBatch][W];
        const size_t first = (size_t(sample) * n + token) * d + column;
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
            if (token + i * step >= n) continue;
            load(g[i], dy + first + size_t(i) * step * d);
            load(v[i], branch + first + size_t(i) * step * d);
        }
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
            if (token + i * step >= n) continue;
#pragma unroll
            for (int j = 0; j < W; j++) {
                sum[j] = fmaf(g[i][j], v[i][j], sum[j]);
                g[i][j] *= a[j];
            }
            if (dbranch) store(dbranch + first + size_t(i) * step * d, g[i]);
        }
    }
    if (!partials) return;
    for (int turn = 0; turn < kTokens; turn++) {
        if (turn == turn_of) {
#pragma unroll
            for (int j = 0; j < W; j++) sums[own + j] = sum[j] + (turn ? sums[own + j] : 0.0f);
        }
        __syncthreads();
    }
    const int i = threadIdx.x, to = blockIdx.x % tiles * kColumns * W + i;
    if (i < kColumns * W && to < d) partials[size_t(group) * d + to] = sums[i];
}

// partials: [B·splits][D], the sums of branch·dy of the tokens of a block, or null.
extern "C" __global__ void __launch_bounds__(kThreads)
    gate_residual_backward(const T* dy, const T* modulation, const T* branch, T* dbranch, float* partials, int n,
                           int c, int d, int gate, int splits) {
    gate_backward<8>(dy, modulation, branch, dbranch, partials, n, c, d, gate, splits);
}
KERNEL_EXPORT(gate_residual_backward);

extern "C" __global__ void __launch_bounds__(kThreads)
    gate_residual_backward_any(const T* dy, const T* modulation, const T* branch, T* dbranch, float* partials, int n,
                               int c, int d, int gate, int splits) {
    gate_backward<1>(dy, modulation, branch, dbranch, partials, n, c, d, gate, splits);
}
KERNEL_EXPORT(gate_residual_backward_any);

// A block adds the partial sums of 32 columns of one row of dmodulation.
extern "C" __global__ void __launch_bounds__(kSumThreads)
    gate_residual_backward_table(const float* partials, T* dmodulation, int c, int d, int gate, int splits) {
    SMEM_ARRAY(float, shared, kSumThreads);
    const int tiles = (d + 31) / 32, row = blockIdx.x / tiles, sample = row / c;
    const int column = blockIdx.x % tiles * 32 + threadIdx.x % 32;
    const float* first = partials + size_t(sample) * splits * d + column;
    const float sum = sum_partials(first, splits, d, row % c == gate && column < d, shared);
    if (threadIdx.x < 32 && column < d) dmodulation[size_t(row) * d + column] = from_float<T>(sum);
}
KERNEL_EXPORT(gate_residual_backward_table);
