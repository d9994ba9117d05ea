// c[b,r,s,p,d] = bias[d] + sum_{i,j<K} weight[d,i,j] * x[b, K*r + i, K*s + j, first + p, d], p 0 (keys) and 1 (values)
// y = (c - mean_d(c)) * rstd * gamma[d] + beta[d], rstd = 1/sqrt(var_d(c) + eps).
// Backward, with n = (c - mean)·rstd, g = dy·gamma: dc = rstd·(g - mean_d(g) - n·mean_d(g·n)); dx = dc·weight at what
// was read and zero elsewhere; dweight = sum dc·x, dbias = sum dc, dgamma = sum dy·n, dbeta = sum dy over all vectors.
//
// x, dx: [B, Gh, Gw, R, D] T; weight: [D, K, K] T; bias, gamma, beta: [D] T; y, dy: [B, Gh/K, Gw/K, 2, D] T; mean, rstd:
// [B, Gh/K, Gw/K, 2] f32; sums in f32. A vector is one (b, r, s, p); they are numbered in the order of y.
//
// A warp owns a vector: its c lies in registers (five chunks of 8 channels a lane) between the sums and the result, so x
// is read once. Backward the same, dc and n go to scratch memory in f32, and dx leaves at once; a second kernel, whose
// threads own 8 channels and walk vectors, sums over them with the taps' x read again. Its blocks write partial results,
// which a third kernel adds in order (`splits` follows from the shape alone).
//
// Bound: memory. In bf16 forward 4·K² + 4 bytes a channel of a square (both vectors); the taps of the weight are 2·K²
// bytes a channel that L1 keeps. At K=2 a warp has 4 rows of 512 bytes in flight a chunk.
//
// Requires of the warp's registers: K 2, D a multiple of 8, up to 1280. Others go to the `_any` kernels: the convolution
// is computed in each of three passes over a vector, element by element.
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/ptx.cuh"
#include "../common/rows.cuh"

using namespace ptx;

constexpr int kWarps = 4, kThreads = 32 * kWarps, kChunks = 5, kTaps = 4;

// Where things lie.
struct Grid {
    int gh, gw, r, d, k, first;
    // The token under tap 0 of a vector, and its part.
    __device__ __forceinline__ size_t origin(int vector) const {
        const int part = vector % 2, square = vector / 2, across = gw / k, down = gh / k;
        const int column = square % across, row = square / across % down, sample = square / across / down;
        return (((size_t(sample) * gh + row * k) * gw + column * k) * r + first + part) * d;
    }
    __device__ __forceinline__ size_t tap(int i, int j) const { return (size_t(i) * gw + j) * r * d; }
};

// The taps of 8 channels: w[channel][tap].
__device__ __forceinline__ void load_taps(float (&w)[8][kTaps], const T* weight, int channel) {
#pragma unroll
    for (int i = 0; i < kTaps; i++) {
        float v[8];
        load8_kept(v, weight + size_t(channel) * kTaps + 8 * i);
#pragma unroll
        for (int e = 0; e < 8; e++) w[(8 * i + e) / kTaps][(8 * i + e) % kTaps] = v[e];
    }
}

// c of 8 channels at K=2; `x` at the vector's origin and the channel.
__device__ __forceinline__ void convolve(float (&c)[8], float (&v)[kTaps][8], const T* x, const T* weight, const T* bias,
                                         const Grid& o, int channel) {
    float w[8][kTaps];
#pragma unroll
    for (int t = 0; t < kTaps; t++) load8(v[t], x + o.tap(t / 2, t % 2));
    load_taps(w, weight, channel);
    load8_kept(c, bias + channel);
#pragma unroll
    for (int e = 0; e < 8; e++)
#pragma unroll
        for (int t = 0; t < kTaps; t++) c[e] = fmaf(w[e][t], v[t][e], c[e]);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    kv_compress_forward(const T* x, const T* weight, const T* bias, const T* gamma, const T* beta, T* y, float* mean,
                        float* rstd, int vectors, int gh, int gw, int r, int d, int first, float eps) {
    const int vector = blockIdx.x * kWarps + threadIdx.x / 32;
    if (vector >= vectors) return;
    const Grid o = {gh, gw, r, d, 2, first};
    const T* from = x + o.origin(vector);
    float c[kChunks][8], v[kTaps][8], sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        const int at = 8 * lane_chunk(i);
        if (at >= d) continue;
        convolve(c[i], v, from + at, weight, bias, o, at);
#pragma unroll
        for (int e = 0; e < 8; e++) sum += c[i][e];
    }
    const float mu = warp_sum(sum) / float(d);
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        if (8 * lane_chunk(i) >= d) continue;
#pragma unroll
        for (int e = 0; e < 8; e++) squares = fmaf(c[i][e] - mu, c[i][e] - mu, squares);
    }
    const float s = rsqrtf(warp_sum(squares) / float(d) + eps);
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        const int at = 8 * lane_chunk(i);
        if (at >= d) continue;
        float scale[8], shift[8];
        load8_kept(scale, gamma + at);
        load8_kept(shift, beta + at);
#pragma unroll
        for (int e = 0; e < 8; e++) c[i][e] = fmaf((c[i][e] - mu) * s, scale[e], shift[e]);
        store8(y + size_t(vector) * d + at, c[i]);
    }
    if (threadIdx.x % 32 == 0) mean[vector] = mu, rstd[vector] = s;
}
KERNEL_EXPORT(kv_compress_forward);

// c of one channel; `x` at the vector's origin.
__device__ __forceinline__ float convolved(const T* x, const T* weight, const T* bias, const Grid& o, int channel) {
    float c = to_float(bias[channel]);
    for (int t = 0; t < o.k * o.k; t++)
        c = fmaf(to_float(weight[size_t(channel) * o.k * o.k + t]), to_float(x[o.tap(t / o.k, t % o.k) + channel]), c);
    return c;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    kv_compress_forward_any(const T* x, const T* weight, const T* bias, const T* gamma, const T* beta, T* y,
                            float* mean, float* rstd, int vectors, int gh, int gw, int r, int d, int k, int first,
                            float eps) {
    const int lane = threadIdx.x % 32, vector = blockIdx.x * kWarps + threadIdx.x / 32;
    if (vector >= vectors) return;
    const Grid o = {gh, gw, r, d, k, first};
    const T* from = x + o.origin(vector);
    float sum = 0.0f, squares = 0.0f;
    for (int i = lane; i < d; i += 32) sum += convolved(from, weight, bias, o, i);
    const float mu = warp_sum(sum) / float(d);
    for (int i = lane; i < d; i += 32) {
        const float apart = convolved(from, weight, bias, o, i) - mu;
        squares = fmaf(apart, apart, squares);
    }
    const float s = rsqrtf(warp_sum(squares) / float(d) + eps);
    for (int i = lane; i < d; i += 32) {
        const float n = (convolved(from, weight, bias, o, i) - mu) * s;
        y[size_t(vector) * d + i] = from_float<T>(fmaf(n, to_float(gamma[i]), to_float(beta[i])));
    }
    if (lane == 0) mean[vector] = mu, rstd[vector] = s;
}
KERNEL_EXPORT(kv_compress_forward_any);

// Zeros in the vectors of dx that were not read; a warp a vector.
extern "C" __global__ void __launch_bounds__(kThreads)
    kv_compress_backward_rest(T* dx, int all, int gh, int gw, int r, int d, int k, int first) {
    const int vector = blockIdx.x * kWarps + threadIdx.x / 32;
    if (vector >= all) return;
    const int part = vector % r - first, token = vector / r, column = token % gw, row = token / gw % gh;
    if ((part == 0 || part == 1) && column < gw / k * k && row < gh / k * k) return;
    for (int i = threadIdx.x % 32; i < d; i += 32) dx[size_t(vector) * d + i] = from_float<T>(0.0f);
}
KERNEL_EXPORT(kv_compress_backward_rest);

// dc, norm (n): [vectors][D], scratch. dx may be null.
extern "C" __global__ void __launch_bounds__(kThreads)
    kv_compress_backward(const T* dy, const T* x, const T* weight, const T* bias, const T* gamma, const float* mean,
                         const float* rstd, T* dx, float* dc, float* norm, int vectors, int gh, int gw, int r, int d,
                         int first) {
    const int vector = blockIdx.x * kWarps + threadIdx.x / 32;
    if (vector >= vectors) return;
    const Grid o = {gh, gw, r, d, 2, first};
    const size_t origin = o.origin(vector);
    const float mu = mean[vector], s = rstd[vector];
    float n[kChunks][8], g[kChunks][8], v[kTaps][8], w[8][kTaps], sum = 0.0f, sum_n = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        const int at = 8 * lane_chunk(i);
        if (at >= d) continue;
        convolve(n[i], v, x + origin + at, weight, bias, o, at);
        load8(g[i], dy + size_t(vector) * d + at);
        load8_kept(v[0], gamma + at);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            n[i][e] = (n[i][e] - mu) * s;
            g[i][e] *= v[0][e];
            sum += g[i][e];
            sum_n = fmaf(g[i][e], n[i][e], sum_n);
        }
    }
    const float mean_g = warp_sum(sum) / float(d), mean_gn = warp_sum(sum_n) / float(d);
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        const int at = 8 * lane_chunk(i);
        if (at >= d) continue;
#pragma unroll
        for (int e = 0; e < 8; e++) g[i][e] = s * (g[i][e] - mean_g - n[i][e] * mean_gn);
        store8(dc + size_t(vector) * d + at, g[i]);
        store8(norm + size_t(vector) * d + at, n[i]);
        if (!dx) continue;
        load_taps(w, weight, at);
#pragma unroll
        for (int t = 0; t < kTaps; t++) {
#pragma unroll
            for (int e = 0; e < 8; e++) v[t][e] = g[i][e] * w[e][t];
            store8(dx + origin + o.tap(t / 2, t % 2) + at, v[t]);
        }
    }
}
KERNEL_EXPORT(kv_compress_backward);

extern "C" __global__ void __launch_bounds__(kThreads)
    kv_compress_backward_any(const T* dy, const T* x, const T* weight, const T* bias, const T* gamma,
                             const float* mean, const float* rstd, T* dx, float* dc, float* norm, int vectors, int gh,
                             int gw, int r, int d, int k, int first) {
    const int lane = threadIdx.x % 32, vector = blockIdx.x * kWarps + threadIdx.x / 32;
    if (vector >= vectors) return;
    const Grid o = {gh, gw, r, d, k, first};
    const size_t origin = o.origin(vector);
    const float mu = mean[vector], s = rstd[vector];
    float sum = 0.0f, sum_n = 0.0f;
    for (int i = lane; i < d; i += 32) {
        const float n = (convolved(x + origin, weight, bias, o, i) - mu) * s;
        const float g = to_float(dy[size_t(vector) * d + i]) * to_float(gamma[i]);
        sum += g;
        sum_n = fmaf(g, n, sum_n);
    }
    const float mean_g = warp_sum(sum) / float(d), mean_gn = warp_sum(sum_n) / float(d);
    for (int i = lane; i < d; i += 32) {
        const float n = (convolved(x + origin, weight, bias, o, i) - mu) * s;
        const float g = s * (to_float(dy[size_t(vector) * d + i]) * to_float(gamma[i]) - mean_g - n * mean_gn);
        dc[size_t(vector) * d + i] = g;
        norm[size_t(vector) * d + i] = n;
        for (int t = 0; dx && t < k * k; t++)
            dx[origin + o.tap(t / k, t % k) + i] = from_float<T>(g * to_float(weight[size_t(i) * k * k + t]));
    }
}
KERNEL_EXPORT(kv_compress_backward_any);

// Rows of a partial result: K·K taps, then bias, gamma, beta. partials: [splits][rows][D].
constexpr int kColumns = 16, kTurns = kThreads / kColumns, kRows = kTaps + 3;

// K=2, D a multiple of 8: a thread owns 8 channels, a block 16 of these by 8 vectors.
extern "C" __global__ void __launch_bounds__(kThreads)
    kv_compress_backward_sums(const T* dy, const T* x, const float* dc, const float* norm, float* partials, int vectors,
                              int gh, int gw, int r, int d, int first, int splits) {
    SMEM_ARRAY(float, shared, kRows* kColumns * 8);
    const int tiles = (d + 8 * kColumns - 1) / (8 * kColumns), split = blockIdx.x / tiles;
    const int own = threadIdx.x % kColumns * 8, channel = blockIdx.x % tiles * 8 * kColumns + own;
    const int turn_of = threadIdx.x / kColumns;
    const Grid o = {gh, gw, r, d, 2, first};
    float sum[kRows][8];
#pragma unroll
    for (int q = 0; q < kRows; q++)
#pragma unroll
        for (int e = 0; e < 8; e++) sum[q][e] = 0.0f;
    for (int vector = split * kTurns + turn_of; channel < d && vector < vectors; vector += splits * kTurns) {
        const size_t at = size_t(vector) * d + channel;
        const T* from = x + o.origin(vector) + channel;
        float g[8], n[8], u[8], v[kTaps][8];
        load8(g, dc + at);
        load8(n, norm + at);
        load8(u, dy + at);
#pragma unroll
        for (int t = 0; t < kTaps; t++) load8(v[t], from + o.tap(t / 2, t % 2));
#pragma unroll
        for (int e = 0; e < 8; e++) {
#pragma unroll
            for (int t = 0; t < kTaps; t++) sum[t][e] = fmaf(g[e], v[t][e], sum[t][e]);
            sum[kTaps][e] += g[e];
            sum[kTaps + 1][e] = fmaf(u[e], n[e], sum[kTaps + 1][e]);
            sum[kTaps + 2][e] += u[e];
        }
    }
    for (int turn = 0; turn < kTurns; turn++) {
        if (turn == turn_of) {
#pragma unroll
            for (int q = 0; q < kRows; q++)
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    float* to = shared + q * 8 * kColumns + own + e;
                    *to = sum[q][e] + (turn ? *to : 0.0f);
                }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < kRows * 8 * kColumns; i += kThreads) {
        const int q = i / (8 * kColumns), to = blockIdx.x % tiles * 8 * kColumns + i % (8 * kColumns);
        if (to < d) partials[(size_t(split) * kRows + q) * d + to] = shared[i];
    }
}
KERNEL_EXPORT(kv_compress_backward_sums);

// Any K and D: a thread has one row and one channel of the vectors split, split + splits ...
extern "C" __global__ void __launch_bounds__(kThreads)
    kv_compress_backward_sums_any(const T* dy, const T* x, const float* dc, const float* norm, float* partials,
                                  int vectors, int gh, int gw, int r, int d, int k, int first, int splits) {
    const int tiles = (d + kThreads - 1) / kThreads, rows = k * k + 3, row = blockIdx.x / tiles % rows;
    const int channel = blockIdx.x % tiles * kThreads + threadIdx.x, split = blockIdx.x / tiles / rows;
    if (channel >= d) return;
    const Grid o = {gh, gw, r, d, k, first};
    float sum = 0.0f;
    for (int vector = split; vector < vectors; vector += splits) {
        const size_t at = size_t(vector) * d + channel;
        if (row < k * k)
            sum = fmaf(dc[at], to_float(x[o.origin(vector) + o.tap(row / k, row % k) + channel]), sum);
        else if (row == k * k)
            sum += dc[at];
        else
            sum = fmaf(to_float(dy[at]), row == k * k + 1 ? norm[at] : 1.0f, sum);
    }
    partials[(size_t(split) * rows + row) * d + channel] = sum;
}
KERNEL_EXPORT(kv_compress_backward_sums_any);

// Adds the partial results of 32 channels of one row; gradients that are null are not wanted.
extern "C" __global__ void __launch_bounds__(kSumThreads)
    kv_compress_backward_parameters(const float* partials, T* dweight, T* dbias, T* dgamma, T* dbeta, int d, int k,
                                    int splits) {
    SMEM_ARRAY(float, shared, kSumThreads);
    const int tiles = (d + 31) / 32, row = blockIdx.x / tiles, channel = blockIdx.x % tiles * 32 + threadIdx.x % 32;
    const float* from = partials + size_t(row) * d + channel;
    const float sum = sum_partials(from, splits, size_t(k * k + 3) * d, channel < d, shared);
    if (threadIdx.x >= 32 || channel >= d) return;
    T* vector = row == k * k ? dbias : row == k * k + 1 ? dgamma : dbeta;
    if (row < k * k) {
        if (dweight) dweight[size_t(channel) * k * k + row] = from_float<T>(sum);
    } else if (vector) {
        vector[channel] = from_float<T>(sum);
    }
}
KERNEL_EXPORT(kv_compress_backward_parameters);
