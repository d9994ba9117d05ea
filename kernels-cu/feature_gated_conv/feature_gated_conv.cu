// u[b,n,i] = bias[n] + sum_j weight[n,j] * p[b,n, i - (K - 1) + j], i over the 3F features, p zero before the first
// y[b,n,f] = u[b,n,f] * u[b,n,F + f] * u[b,n,2F + f]
// Backward, with du of a part dy times the other two u: dp[i] = sum_j w[j]·du[i + K - 1 - j], dweight[n,j] = sum over b
// and i of du[i]·p[i - (K - 1) + j], dbias[n] = sum du.
//
// p, dp: [B, N, 3F] T; y, dy: [B, N, F] T; weight, bias and their gradients: [N, K], [N] T; sums in f32.
//
// Forward, a thread owns 8 features of y: of each part it loads its 8 elements and the 8 before, which its neighbour
// loads, too. Taps are padded with zeros to kTaps and turned round, so that every index is a constant.
// Backward, a block owns a token position and walks the samples split, split + splits ...: du of a row lies in shared
// memory between the two halves of the work, sums of taps and bias in registers until the end. A last kernel adds the
// splits in order (`splits` follows from the shape alone).
//
// Bound: memory, 8 bytes an element of y forward and 14 backward in bf16. Forward 20 warps of 96 registers have 3 KB of
// loads each, 60 KB a multiprocessor.
//
// Requires: K up to 8, F a multiple of 8, and backward F up to 8184 (its du in shared memory). Others go to the `_any`
// kernels, an element a thread, du through scratch memory in f32.
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/ptx.cuh"
#include "../common/rows.cuh"

using namespace ptx;

constexpr int kThreads = 128, kTaps = 8, kBackwardThreads = 256;

// The taps of a token position, that of the current feature first.
struct Taps {
    float w[kTaps], bias;
    __device__ __forceinline__ Taps(const T* weight, const T* biases, int token, int k) {
#pragma unroll
        for (int m = 0; m < kTaps; m++) w[m] = m < k ? to_float(weight[size_t(token) * k + k - 1 - m]) : 0.0f;
        bias = to_float(biases[token]);
    }
};

// u of 8 features from i on of a row; `at` are theirs and the 8 before.
__device__ __forceinline__ void filtered(float (&u)[8], float (&at)[16], const Taps& taps, const T* row, int i) {
    float half[8];
#pragma unroll
    for (int e = 0; e < 8; e++) half[e] = 0.0f;
    if (i > 0) load8_kept(half, row + i - 8);
#pragma unroll
    for (int e = 0; e < 8; e++) at[e] = half[e];
    load8_kept(half, row + i);
#pragma unroll
    for (int e = 0; e < 8; e++) at[8 + e] = half[e];
#pragma unroll
    for (int e = 0; e < 8; e++) {
        u[e] = taps.bias;
#pragma unroll
        for (int m = 0; m < kTaps; m++) u[e] = fmaf(taps.w[m], at[8 + e - m], u[e]);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    feature_gated_conv_forward(const T* p, const T* weight, const T* bias, T* y, int rows, int n, int f, int k) {
    const int chunks = f / 8;
    const size_t thread = grid_thread(), row = thread / chunks;
    if (row >= size_t(rows)) return;
    const int i = 8 * int(thread - row * chunks);
    const Taps taps(weight, bias, int(row % n), k);
    float at[16], u[8], product[8];
#pragma unroll
    for (int part = 0; part < 3; part++) {
        filtered(u, at, taps, p + row * 3 * f, part * f + i);
#pragma unroll
        for (int e = 0; e < 8; e++) product[e] = part ? product[e] * u[e] : u[e];
    }
    store8(y + row * f + i, product);
}
KERNEL_EXPORT(feature_gated_conv_forward);

// partials: [splits][N][kTaps + 1], or null; dp may be null.
extern "C" __global__ void __launch_bounds__(kBackwardThreads)
    feature_gated_conv_backward(const T* dy, const T* p, const T* weight, const T* bias, T* dp, float* partials, int b,
                                int n, int f, int k, int splits) {
    SMEM_DYNAMIC(smem, 16);
    SMEM_ARRAY(float, shared, kBackwardThreads / 32);
    float* du = reinterpret_cast<float*>(smem);
    const int token = blockIdx.x % n, split = blockIdx.x / n;
    const Taps taps(weight, bias, token, k);
    float sum[kTaps + 1];
#pragma unroll
    for (int m = 0; m <= kTaps; m++) sum[m] = 0.0f;
    if (threadIdx.x < 8) du[3 * f + threadIdx.x] = 0.0f;
    for (int sample = split; sample < b; sample += splits) {
        const size_t row = size_t(sample) * n + token;
        for (int i = 8 * threadIdx.x; i < f; i += 8 * kBackwardThreads) {
            float at[3][16], u[3][8], g[8];
#pragma unroll
            for (int part = 0; part < 3; part++) filtered(u[part], at[part], taps, p + row * 3 * f, part * f + i);
            load8(g, dy + row * f + i);
#pragma unroll
            for (int part = 0; part < 3; part++)
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    const float d = g[e] * u[(part + 1) % 3][e] * u[(part + 2) % 3][e];
                    du[part * f + i + e] = d;
                    sum[kTaps] += d;
#pragma unroll
                    for (int m = 0; m < kTaps; m++) sum[m] = fmaf(d, at[part][8 + e - m], sum[m]);
                }
        }
        __syncthreads();
        for (int i = 8 * threadIdx.x; dp && i < 3 * f; i += 8 * kBackwardThreads) {
            float at[16], r[8];
#pragma unroll
            for (int e = 0; e < 16; e++) at[e] = du[i + e];
#pragma unroll
            for (int e = 0; e < 8; e++) {
                r[e] = 0.0f;
#pragma unroll
                for (int m = 0; m < kTaps; m++) r[e] = fmaf(taps.w[m], at[e + m], r[e]);
            }
            store8(dp + row * 3 * f + i, r);
        }
        __syncthreads();
    }
    if (!partials) return;
#pragma unroll
    for (int m = 0; m <= kTaps; m++) {
        const float all = block_sum<kBackwardThreads / 32>(sum[m], shared);
        if (threadIdx.x == 0) partials[size_t(blockIdx.x) * (kTaps + 1) + m] = all;
    }
}
KERNEL_EXPORT(feature_gated_conv_backward);

// Adds the splits; a thread has one tap, or the bias, of a token position.
extern "C" __global__ void __launch_bounds__(kThreads)
    feature_gated_conv_backward_filters(const float* partials, T* dweight, T* dbias, int n, int k, int splits) {
    const int at = blockIdx.x * kThreads + threadIdx.x, token = at / (k + 1), tap = at % (k + 1);
    if (token >= n) return;
    const float* from = partials + size_t(token) * (kTaps + 1) + (tap < k ? k - 1 - tap : kTaps);
    float sum = 0.0f;
    for (int split = 0; split < splits; split++) sum += from[size_t(split) * n * (kTaps + 1)];
    if (tap < k && dweight) dweight[size_t(token) * k + tap] = from_float<T>(sum);
    if (tap == k && dbias) dbias[token] = from_float<T>(sum);
}
KERNEL_EXPORT(feature_gated_conv_backward_filters);

// ---- any K and F ----

__device__ __forceinline__ float filtered_any(const T* row, const T* w, float bias, int i, int k) {
    float sum = bias;
    for (int j = 0; j < k; j++) {
        const int from = i - (k - 1) + j;
        if (from >= 0) sum = fmaf(to_float(w[j]), to_float(row[from]), sum);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    feature_gated_conv_any_forward(const T* p, const T* weight, const T* bias, T* y, int rows, int n, int f, int k) {
    const size_t at = grid_thread(), row = at / f;
    if (row >= size_t(rows)) return;
    const int i = int(at - row * f), token = int(row % n);
    float product = 1.0f;
    for (int part = 0; part < 3; part++)
        product *= filtered_any(p + row * 3 * f, weight + size_t(token) * k, to_float(bias[token]), part * f + i, k);
    y[at] = from_float<T>(product);
}
KERNEL_EXPORT(feature_gated_conv_any_forward);

// du: [B·N, 3F], scratch.
extern "C" __global__ void __launch_bounds__(kThreads)
    feature_gated_conv_any_backward_gate(const T* dy, const T* p, const T* weight, const T* bias, float* du, int rows,
                                         int n, int f, int k) {
    const size_t at = grid_thread(), row = at / f;
    if (row >= size_t(rows)) return;
    const int i = int(at - row * f), token = int(row % n);
    float u[3];
#pragma unroll
    for (int part = 0; part < 3; part++)
        u[part] = filtered_any(p + row * 3 * f, weight + size_t(token) * k, to_float(bias[token]), part * f + i, k);
    const float g = to_float(dy[at]);
    float* to = du + row * 3 * f + i;
    to[0] = g * u[1] * u[2], to[f] = g * u[0] * u[2], to[2 * f] = g * u[0] * u[1];
}
KERNEL_EXPORT(feature_gated_conv_any_backward_gate);

extern "C" __global__ void __launch_bounds__(kThreads)
    feature_gated_conv_any_backward_input(const float* du, const T* weight, T* dp, int rows, int n, int f, int k) {
    const size_t at = grid_thread(), row = at / (3 * f);
    if (row >= size_t(rows)) return;
    const int i = int(at - row * 3 * f), token = int(row % n);
    float sum = 0.0f;
    for (int j = 0; j < k; j++) {
        const int to = i + k - 1 - j;
        if (to < 3 * f) sum = fmaf(to_float(weight[size_t(token) * k + j]), du[row * 3 * f + to], sum);
    }
    dp[at] = from_float<T>(sum);
}
KERNEL_EXPORT(feature_gated_conv_any_backward_input);

// A block has one tap, or the bias, of a token position, over all samples and features.
extern "C" __global__ void __launch_bounds__(kThreads)
    feature_gated_conv_any_backward_sums(const float* du, const T* p, T* dweight, T* dbias, int b, int n, int f,
                                         int k) {
    SMEM_ARRAY(float, shared, kThreads / 32);
    const int token = blockIdx.x / (k + 1), tap = blockIdx.x % (k + 1);
    float sum = 0.0f;
    for (int sample = 0; sample < b; sample++) {
        const size_t row = (size_t(sample) * n + token) * 3 * f;
        for (int i = threadIdx.x; i < 3 * f; i += kThreads) {
            const int from = i - (k - 1) + tap;
            if (tap == k)
                sum += du[row + i];
            else if (from >= 0)
                sum = fmaf(du[row + i], to_float(p[row + from]), sum);
        }
    }
    sum = block_sum<kThreads / 32>(sum, shared);
    if (threadIdx.x != 0) return;
    if (tap < k && dweight) dweight[size_t(token) * k + tap] = from_float<T>(sum);
    if (tap == k && dbias) dbias[token] = from_float<T>(sum);
}
KERNEL_EXPORT(feature_gated_conv_any_backward_sums);
