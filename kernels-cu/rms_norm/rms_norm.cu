// u[b,n,d] = x[b,n,d] * silu(gate[b,n,offset + d]), or x where gate is null
// rstd[b,n] = 1/sqrt(1/D sum_d u^2 + eps);  y[b,n,d] = u[b,n,d] * rstd[b,n] * weight[d]
// Backward, with g = dy·weight: du = rstd·(g - u·rstd²·mean_d(g·u)); dx = du·silu(z), dgate = du·x·silu'(z) in the
// gate's columns and zero outside of them, dweight = sum_bn dy·u·rstd.
//
// x, y, dy, dx: [B·N, D] T; gate, dgate: [B·N, W] T; weight, dweight: [D] T; rstd: [B·N] f32; sums in f32.
//
// A row is owned by a warp (D up to 1280, five chunks of 8 elements a lane) or by a block of 4 warps (D up to 4096,
// four chunks a thread) and stays in registers between the sum and the result, so that it is read once. Backward,
// warps or blocks walk rows and keep the sums of dweight of their own columns in registers; a block writes one row of
// partial sums, and a second kernel adds those, always in the same order (`blocks` follows from the shape alone).
//
// Bound: memory. In bf16 forward 6 bytes an element with a gate and 4 without, backward 10 and 6, besides 2·(W - D)
// bytes of zeros a row of dgate. Forward, the wide kernel has 4 KB (8 KB with a gate) of loads a block, and 7 blocks
// fit a multiprocessor.
//
// Requires: D, W and offset multiples of 8. Others, and wider rows, go to the `_any` kernels: a warp a row, element by
// element, read twice (the second time from L1), columns summed by a kernel of their own.
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/ptx.cuh"
#include "../common/rows.cuh"

using namespace ptx;

constexpr int kThreads = 128;

// The sum over the threads of a row: a warp, or the block.
template <int kRowWarps> __device__ __forceinline__ float row_sum(float v, float* shared) {
    if constexpr (kRowWarps == 1)
        return warp_sum(v);
    else
        return block_sum<kRowWarps>(v, shared);
}

template <int kRowWarps, int kChunks>
__device__ __forceinline__ void norm_rows(const T* x, const T* gate, const T* weight, T* y, float* rstd, int rows,
                                          int d, int width, int offset, float eps) {
    SMEM_ARRAY(float, shared, 4);
    constexpr int kRowThreads = 32 * kRowWarps;
    const int row = blockIdx.x * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
    const int own = 8 * (threadIdx.x % kRowThreads);
    if (row >= rows) return;
    float u[kChunks][8], z[8], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        const int at = own + 8 * kRowThreads * i;
        if (at >= d) continue;
        load8(u[i], x + size_t(row) * d + at);
        if (gate) {
            load8(z, gate + size_t(row) * width + offset + at);
#pragma unroll
            for (int j = 0; j < 8; j++) u[i][j] *= z[j] * sigmoid(z[j]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) sum = fmaf(u[i][j], u[i][j], sum);
    }
    const float r = rsqrtf(row_sum<kRowWarps>(sum, shared) / float(d) + eps);
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        const int at = own + 8 * kRowThreads * i;
        if (at >= d) continue;
        load8_kept(z, weight + at);
#pragma unroll
        for (int j = 0; j < 8; j++) z[j] *= u[i][j] * r;
        store8(y + size_t(row) * d + at, z);
    }
    if (own == 0) rstd[row] = r;
}

// D up to 1280.
extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm_forward(const T* x, const T* gate, const T* weight, T* y, float* rstd, int rows, int d, int width,
                     int offset, float eps) {
    norm_rows<1, 5>(x, gate, weight, y, rstd, rows, d, width, offset, eps);
}
KERNEL_EXPORT(rms_norm_forward);

// D up to 4096: a block a row.
extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm_forward_wide(const T* x, const T* gate, const T* weight, T* y, float* rstd, int rows, int d, int width,
                          int offset, float eps) {
    norm_rows<4, 4>(x, gate, weight, y, rstd, rows, d, width, offset, eps);
}
KERNEL_EXPORT(rms_norm_forward_wide);

// x times SiLU of the gate.
__device__ __forceinline__ float gated(const T* x, const T* gate, int i) {
    const float v = to_float(x[i]), z = gate ? to_float(gate[i]) : 0.0f;
    return gate ? v * z * sigmoid(z) : v;
}

// Any D.
extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm_forward_any(const T* x, const T* gate, const T* weight, T* y, float* rstd, int rows, int d, int width,
                         int offset, float eps) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    x += size_t(row) * d;
    if (gate) gate += size_t(row) * width + offset;
    float sum = 0.0f;
    for (int i = lane; i < d; i += 32) sum = fmaf(gated(x, gate, i), gated(x, gate, i), sum);
    const float r = rsqrtf(warp_sum(sum) / float(d) + eps);
    for (int i = lane; i < d; i += 32)
        y[size_t(row) * d + i] = from_float<T>(gated(x, gate, i) * r * to_float(weight[i]));
    if (lane == 0) rstd[row] = r;
}
KERNEL_EXPORT(rms_norm_forward_any);

template <int kRowWarps, int kChunks>
__device__ __forceinline__ void norm_rows_backward(const T* dy, const T* x, const T* gate, const T* weight,
                                                   const float* rstd, T* dx, T* dgate, float* partials, int rows,
                                                   int d, int width, int offset) {
    constexpr int kRowThreads = 32 * kRowWarps, kRows = kThreads / kRowThreads;
    SMEM_ARRAY(float, shared, kRows == 1 ? 4 : 8 * kRowThreads * kChunks);
    const int thread = threadIdx.x % kRowThreads, own = 8 * thread, turn_of = threadIdx.x / kRowThreads;
    float dweight[kChunks][8];
#pragma unroll
    for (int i = 0; i < kChunks; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) dweight[i][j] = 0.0f;
    for (int row = blockIdx.x * kRows + turn_of; row < rows; row += gridDim.x * kRows) {
        const size_t first = size_t(row) * d, gates = size_t(row) * width + offset;
        Packed8<T> v[kChunks], w[kChunks], s[kChunks];
        float a[8], u[8], g[8], z[8], sum = 0.0f;
        const float r = rstd[row];
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            const int at = own + 8 * kRowThreads * i;
            if (at >= d) continue;
            v[i] = load_packed8(x + first + at);
            w[i] = load_packed8(dy + first + at);
            if (gate) s[i] = load_packed8(gate + gates + at);
        }
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            const int at = own + 8 * kRowThreads * i;
            if (at >= d) continue;
            unpack(u, v[i]);
            unpack(g, w[i]);
            load8_kept(a, weight + at);
            if (gate) {
                unpack(z, s[i]);
#pragma unroll
                for (int j = 0; j < 8; j++) u[j] *= z[j] * sigmoid(z[j]);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                dweight[i][j] = fmaf(g[j] * r, u[j], dweight[i][j]);
                sum = fmaf(g[j] * a[j], u[j], sum);
            }
        }
        const float mean = row_sum<kRowWarps>(sum, shared) / float(d) * r * r;
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            const int at = own + 8 * kRowThreads * i;
            if (at >= d) continue;
            unpack(u, v[i]);
            unpack(g, w[i]);
            load8_kept(a, weight + at);
            if (gate) {
                unpack(z, s[i]);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float p = sigmoid(z[j]), du = r * (g[j] * a[j] - u[j] * z[j] * p * mean);
                    g[j] = du * z[j] * p;
                    z[j] = du * u[j] * p * (1.0f + z[j] * (1.0f - p));
                }
                if (dgate) store8(dgate + gates + at, z);
            } else {
#pragma unroll
                for (int j = 0; j < 8; j++) g[j] = r * (g[j] * a[j] - u[j] * mean);
            }
            if (dx) store8(dx + first + at, g);
        }
        if (dgate) zero_outside(dgate + size_t(row) * width, width, offset, offset + d, thread, kRowThreads);
    }
    if (!partials) return;
    float* to = partials + size_t(blockIdx.x) * d;
    for (int turn = 0; turn < kRows; turn++) {
        if (turn == turn_of) {
#pragma unroll
            for (int i = 0; i < kChunks; i++) {
                const int at = own + 8 * kRowThreads * i;
                if (at >= d) continue;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float sum = dweight[i][j] + (turn ? shared[at + j] : 0.0f);
                    (turn + 1 < kRows ? shared : to)[at + j] = sum;
                }
            }
        }
        __syncthreads();
    }
}

// D up to 1280. partials: [blocks][D], or null.
extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm_backward(const T* dy, const T* x, const T* gate, const T* weight, const float* rstd, T* dx, T* dgate,
                      float* partials, int rows, int d, int width, int offset) {
    norm_rows_backward<1, 5>(dy, x, gate, weight, rstd, dx, dgate, partials, rows, d, width, offset);
}
KERNEL_EXPORT(rms_norm_backward);

// D up to 4096: a block a row.
extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm_backward_wide(const T* dy, const T* x, const T* gate, const T* weight, const float* rstd, T* dx,
                           T* dgate, float* partials, int rows, int d, int width, int offset) {
    norm_rows_backward<4, 4>(dy, x, gate, weight, rstd, dx, dgate, partials, rows, d, width, offset);
}
KERNEL_EXPORT(rms_norm_backward_wide);

// Any D: dx and dgate, either of which may be null.
extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm_backward_any(const T* dy, const T* x, const T* gate, const T* weight, const float* rstd, T* dx, T* dgate,
                          int rows, int d, int width, int offset) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    x += size_t(row) * d, dy += size_t(row) * d;
    if (gate) gate += size_t(row) * width + offset;
    float sum = 0.0f;
    for (int i = lane; i < d; i += 32) sum = fmaf(to_float(dy[i]) * to_float(weight[i]), gated(x, gate, i), sum);
    const float r = rstd[row], mean = warp_sum(sum) / float(d) * r * r;
    for (int i = lane; i < d; i += 32) {
        const float du = r * (to_float(dy[i]) * to_float(weight[i]) - gated(x, gate, i) * mean);
        const float z = gate ? to_float(gate[i]) : 0.0f, p = sigmoid(z);
        if (dx) dx[size_t(row) * d + i] = from_float<T>(gate ? du * z * p : du);
        if (dgate)
            dgate[size_t(row) * width + offset + i] =
                from_float<T>(du * to_float(x[i]) * p * (1.0f + z * (1.0f - p)));
    }
    if (dgate) zero_outside(dgate + size_t(row) * width, width, offset, offset + d, lane, 32);
}
KERNEL_EXPORT(rms_norm_backward_any);

// Any D: the partial sums alone; a thread owns a column, a block the rows split, split + splits ...
extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm_backward_columns_any(const T* dy, const T* x, const T* gate, const float* rstd, float* partials, int rows,
                                  int d, int width, int offset, int splits) {
    const int tiles = (d + kThreads - 1) / kThreads, split = blockIdx.x / tiles;
    const int column = blockIdx.x % tiles * kThreads + threadIdx.x;
    if (column >= d) return;
    float sum = 0.0f;
    for (int row = split; row < rows; row += splits) {
        const T* z = gate ? gate + size_t(row) * width + offset : gate;
        sum = fmaf(to_float(dy[size_t(row) * d + column]) * rstd[row], gated(x + size_t(row) * d, z, column), sum);
    }
    partials[size_t(split) * d + column] = sum;
}
KERNEL_EXPORT(rms_norm_backward_columns_any);

// A block adds the partial sums of 32 columns.
extern "C" __global__ void __launch_bounds__(kSumThreads)
    rms_norm_backward_weight(const float* partials, T* dweight, int d, int count) {
    SMEM_ARRAY(float, shared, kSumThreads);
    const int column = blockIdx.x * 32 + threadIdx.x % 32;
    const float sum = sum_partials(partials + column, count, d, column < d, shared);
    if (threadIdx.x < 32 && column < d) dweight[column] = from_float<T>(sum);
}
KERNEL_EXPORT(rms_norm_backward_weight);
