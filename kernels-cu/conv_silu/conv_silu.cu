// u[b,t,c] = bias[c] + sum_j weight[c,j] * p[b, t - (K - 1) + j, offset + c], p zero outside the tokens
// y = u·sigmoid(u);  reverse: the same from the last token to the first, p[b, t + (K - 1) - j, offset + c].
// Backward, with du = dy·silu'(u): dp[s] = sum_j w[j]·du[s + K - 1 - j] in the columns read, zero in the others;
// dweight[j] = sum du·p of the tap, dbias = sum du.
//
// p, dp: [B, N, W] T; y, dy: [B, N, C] T; weight, bias and their gradients: [C, K], [C] T; sums in f32.
//
// Time is the token, or with `reverse` the token from the end. A thread owns 16 bytes of channels of a segment of tokens
// and walks it in groups of K steps: the last K values of p (and of du) lie in rings of registers whose places are
// constants, and the next group is loaded before this one is used. p is read once but for K - 1 (backward 2·(K - 1))
// tokens before a segment. Backward, sums stay in registers; a second kernel adds the segments' partial results in order
// (`segments` follows from the shape alone).
//
// Bound: memory, 4 bytes an element of y forward in bf16, backward 4 and the whole row of dp. A warp has K·512 bytes of
// loads in flight forward and K·1 KB backward: at K=4 and 16 and 8 warps 32 KB a multiprocessor.
//
// Requires of the walks: K 3 or 4; C, W and offset multiples of the 16 bytes. Others go to the `_any` kernels, an element
// a thread, du through scratch memory in f32.
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/ptx.cuh"
#include "../common/rows.cuh"

using namespace ptx;

constexpr int kThreads = 32, kAnyThreads = 128;
// Channels of a thread: 16 bytes.
constexpr int V = 16 / int(sizeof(T));

// What a thread walks over; rows are those of tensors [B·N, ..].
struct Segment {
    int row_0, way, group, channel, first, count;
    __device__ __forceinline__ Segment(int n, int c, int reverse, int length, int segments) {
        const int tiles = (c / V + kThreads - 1) / kThreads;
        group = blockIdx.x / tiles, channel = V * (blockIdx.x % tiles * kThreads + int(threadIdx.x));
        first = group % segments * length, count = min(length, n - first);
        way = reverse ? -1 : 1, row_0 = group / segments * n + (reverse ? n - 1 : 0);
    }
    __device__ __forceinline__ size_t row(int time) const { return size_t(row_0 + way * time); }
};

template <int K>
__device__ __forceinline__ void load_filter(float (&w)[K][V], float (&b)[V], const T* weight, const T* bias, int channel) {
#pragma unroll
    for (int e = 0; e < V; e++) {
        b[e] = to_float(bias[channel + e]);
#pragma unroll
        for (int j = 0; j < K; j++) w[j][e] = to_float(weight[size_t(channel + e) * K + j]);
    }
}

// 16 bytes of a time, zeros outside [0, n).
__device__ __forceinline__ uint4 take(const T* from, const Segment& of, int width, int time, bool wanted, int n) {
    if (!wanted || unsigned(time) >= unsigned(n)) return make_uint4(0, 0, 0, 0);
    return ld_global_nc_v4(from + of.row(time) * width);
}
template <class E> __device__ __forceinline__ void spread(float (&r)[16 / sizeof(E)], uint4 v) {
    if constexpr (sizeof(E) == 2)
        unpack8<E>(r, v);
    else
        unpack4(r, v);
}

template <int K>
__device__ __forceinline__ void walk_forward(const T* p, const T* weight, const T* bias, T* y, int n, int width, int c,
                                             int offset, int reverse, int length, int segments) {
    const Segment of(n, c, reverse, length, segments);
    if (of.channel >= c) return;
    const T* from = p + offset + of.channel;
    const int end = of.first + of.count;
    uint4 next[K];
    int time = of.first - (K - 1);
#pragma unroll
    for (int u = 0; u < K; u++) next[u] = take(from, of, width, time + u, time + u < end, n);
    float w[K][V], b[V], x[K][V];
    load_filter<K>(w, b, weight, bias, of.channel);
#pragma unroll
    for (int j = 0; j < K; j++)
#pragma unroll
        for (int e = 0; e < V; e++) x[j][e] = 0.0f;
    for (; time < end; time += K) {
        uint4 now[K];
#pragma unroll
        for (int u = 0; u < K; u++) now[u] = next[u];
#pragma unroll
        for (int u = 0; u < K; u++) next[u] = take(from, of, width, time + K + u, time + K + u < end, n);
#pragma unroll
        for (int u = 0; u < K; u++) {
            float r[V];
            spread<T>(x[u], now[u]);
#pragma unroll
            for (int e = 0; e < V; e++) {
                r[e] = b[e];
#pragma unroll
                for (int j = 0; j < K; j++) r[e] = fmaf(w[j][e], x[(u + 1 + j) % K][e], r[e]);
                r[e] = silu(r[e]).value;
            }
            if (time + u >= of.first && time + u < end) store(y + of.row(time + u) * c + of.channel, r);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 16)
    conv_silu_3_forward(const T* p, const T* weight, const T* bias, T* y, int n, int width, int c, int offset,
                        int reverse, int length, int segments) {
    walk_forward<3>(p, weight, bias, y, n, width, c, offset, reverse, length, segments);
}
KERNEL_EXPORT(conv_silu_3_forward);

extern "C" __global__ void __launch_bounds__(kThreads, 16)
    conv_silu_4_forward(const T* p, const T* weight, const T* bias, T* y, int n, int width, int c, int offset,
                        int reverse, int length, int segments) {
    walk_forward<4>(p, weight, bias, y, n, width, c, offset, reverse, length, segments);
}
KERNEL_EXPORT(conv_silu_4_forward);

// partials: [groups][K + 1][C], taps then bias.
template <int K>
__device__ __forceinline__ void walk_backward(const T* dy, const T* p, const T* weight, const T* bias, T* dp,
                                              float* partials, int n, int width, int c, int offset, int reverse,
                                              int length, int segments) {
    const Segment of(n, c, reverse, length, segments);
    if (of.channel >= c) return;
    const T *from = p + offset + of.channel, *dy_from = dy + of.channel;
    // At the step of time t, du of t and dp of t - (K - 1) are made.
    const int own = of.first + K - 1, end = own + of.count;
    uint4 next[K], dy_next[K];
    int time = own - 2 * (K - 1);
#pragma unroll
    for (int u = 0; u < K; u++) {
        next[u] = take(from, of, width, time + u, time + u < end, n);
        dy_next[u] = take(dy_from, of, c, time + u, time + u < end, n);
    }
    float w[K][V], b[V], x[K][V], du[K][V], sum_w[K][V], sum_b[V];
    load_filter<K>(w, b, weight, bias, of.channel);
#pragma unroll
    for (int e = 0; e < V; e++) {
        sum_b[e] = 0.0f;
#pragma unroll
        for (int j = 0; j < K; j++) x[j][e] = du[j][e] = sum_w[j][e] = 0.0f;
    }
    for (; time < end; time += K) {
        uint4 now[K], dy_now[K];
#pragma unroll
        for (int u = 0; u < K; u++) now[u] = next[u], dy_now[u] = dy_next[u];
#pragma unroll
        for (int u = 0; u < K; u++) {
            next[u] = take(from, of, width, time + K + u, time + K + u < end, n);
            dy_next[u] = take(dy_from, of, c, time + K + u, time + K + u < end, n);
        }
#pragma unroll
        for (int u = 0; u < K; u++) {
            const int t = time + u;
            spread<T>(x[u], now[u]);
            spread<T>(du[u], dy_now[u]);
            float r[V];
#pragma unroll
            for (int e = 0; e < V; e++) {
                r[e] = b[e];
#pragma unroll
                for (int j = 0; j < K; j++) r[e] = fmaf(w[j][e], x[(u + 1 + j) % K][e], r[e]);
                du[u][e] *= silu(r[e]).slope;
                r[e] = 0.0f;
#pragma unroll
                for (int j = 0; j < K; j++) r[e] = fmaf(w[j][e], du[(u - j + K) % K][e], r[e]);
            }
            if (t >= of.first && t < of.first + of.count) {
#pragma unroll
                for (int e = 0; e < V; e++) sum_b[e] += du[u][e];
            }
            if (t < own || t >= end) continue;
#pragma unroll
            for (int j = 0; j < K; j++)
#pragma unroll
                for (int e = 0; e < V; e++)
                    sum_w[j][e] = fmaf(x[(u + 1) % K][e], du[(u - j + K) % K][e], sum_w[j][e]);
            if (dp) store(dp + of.row(t - (K - 1)) * width + offset + of.channel, r);
        }
    }
    if (!partials) return;
#pragma unroll
    for (int j = 0; j <= K; j++)
#pragma unroll
        for (int e = 0; e < V; e++)
            partials[(size_t(of.group) * (K + 1) + j) * c + of.channel + e] = j < K ? sum_w[j < K ? j : 0][e] : sum_b[e];
}

extern "C" __global__ void __launch_bounds__(kThreads, 8)
    conv_silu_3_backward(const T* dy, const T* p, const T* weight, const T* bias, T* dp, float* partials, int n,
                         int width, int c, int offset, int reverse, int length, int segments) {
    walk_backward<3>(dy, p, weight, bias, dp, partials, n, width, c, offset, reverse, length, segments);
}
KERNEL_EXPORT(conv_silu_3_backward);

extern "C" __global__ void __launch_bounds__(kThreads, 8)
    conv_silu_4_backward(const T* dy, const T* p, const T* weight, const T* bias, T* dp, float* partials, int n,
                         int width, int c, int offset, int reverse, int length, int segments) {
    walk_backward<4>(dy, p, weight, bias, dp, partials, n, width, c, offset, reverse, length, segments);
}
KERNEL_EXPORT(conv_silu_4_backward);

// Zeros in the columns of dp that are not read; a warp a row.
extern "C" __global__ void __launch_bounds__(kAnyThreads)
    conv_silu_backward_rest(T* dp, int rows, int width, int c, int offset) {
    const int row = blockIdx.x * (kAnyThreads / 32) + threadIdx.x / 32;
    if (row < rows) zero_outside(dp + size_t(row) * width, width, offset, offset + c, threadIdx.x % 32, 32);
}
KERNEL_EXPORT(conv_silu_backward_rest);

// Element of [B·N, C], its row and its token.
struct Element {
    size_t at, row;
    int token, channel;
    bool inside;
    __device__ __forceinline__ Element(int rows, int n, int c) {
        at = grid_thread(), row = at / c, inside = row < size_t(rows);
        channel = int(at - row * c), token = int(row % n);
    }
};

// u of a token; `from` at the column and the token.
__device__ __forceinline__ float convolved(const T* from, const T* w, float bias, int token, int n, int width, int k,
                                           int reverse) {
    float sum = bias;
    for (int j = 0; j < k; j++) {
        const int away = reverse ? k - 1 - j : j - (k - 1);
        if (unsigned(token + away) < unsigned(n)) sum = fmaf(to_float(w[j]), to_float(from[int64_t(away) * width]), sum);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(kAnyThreads)
    conv_silu_any_forward(const T* p, const T* weight, const T* bias, T* y, int rows, int n, int width, int c, int k,
                          int offset, int reverse) {
    const Element e(rows, n, c);
    if (!e.inside) return;
    const T* from = p + e.row * width + offset + e.channel;
    const float b = to_float(bias[e.channel]);
    const float u = convolved(from, weight + size_t(e.channel) * k, b, e.token, n, width, k, reverse);
    y[e.at] = from_float<T>(silu(u).value);
}
KERNEL_EXPORT(conv_silu_any_forward);

// du: [B·N, C], scratch.
extern "C" __global__ void __launch_bounds__(kAnyThreads)
    conv_silu_any_backward_gate(const T* dy, const T* p, const T* weight, const T* bias, float* du, int rows, int n,
                                int width, int c, int k, int offset, int reverse) {
    const Element e(rows, n, c);
    if (!e.inside) return;
    const T* from = p + e.row * width + offset + e.channel;
    const float b = to_float(bias[e.channel]);
    const float u = convolved(from, weight + size_t(e.channel) * k, b, e.token, n, width, k, reverse);
    du[e.at] = to_float(dy[e.at]) * silu(u).slope;
}
KERNEL_EXPORT(conv_silu_any_backward_gate);

extern "C" __global__ void __launch_bounds__(kAnyThreads)
    conv_silu_any_backward_input(const float* du, const T* weight, T* dp, int rows, int n, int width, int c, int k,
                                 int offset, int reverse) {
    const Element e(rows, n, c);
    if (!e.inside) return;
    float sum = 0.0f;
    for (int j = 0; j < k; j++) {
        const int away = reverse ? j - (k - 1) : k - 1 - j;
        if (unsigned(e.token + away) < unsigned(n))
            sum = fmaf(to_float(weight[size_t(e.channel) * k + j]), (du + e.at)[int64_t(away) * c], sum);
    }
    dp[e.row * width + offset + e.channel] = from_float<T>(sum);
}
KERNEL_EXPORT(conv_silu_any_backward_input);

// partials: [groups][K + 1][C]; a thread has one tap, or the bias, of a channel for the rows group, group + groups ...
extern "C" __global__ void __launch_bounds__(kAnyThreads)
    conv_silu_any_backward_sums(const float* du, const T* p, float* partials, int rows, int n, int width, int c, int k,
                                int offset, int reverse, int groups) {
    const int tiles = (c + kAnyThreads - 1) / kAnyThreads, tap = blockIdx.x / tiles % (k + 1);
    const int channel = blockIdx.x % tiles * kAnyThreads + threadIdx.x, group = blockIdx.x / tiles / (k + 1);
    if (channel >= c) return;
    const int away = reverse ? k - 1 - tap : tap - (k - 1);
    float sum = 0.0f;
    for (int row = group; row < rows; row += groups) {
        const float g = du[size_t(row) * c + channel];
        if (tap == k)
            sum += g;
        else if (unsigned(row % n + away) < unsigned(n))
            sum = fmaf(g, to_float(p[size_t(row + away) * width + offset + channel]), sum);
    }
    partials[(size_t(group) * (k + 1) + tap) * c + channel] = sum;
}
KERNEL_EXPORT(conv_silu_any_backward_sums);

// Adds the partial results of 32 channels of one tap, or of the bias.
extern "C" __global__ void __launch_bounds__(kSumThreads)
    conv_silu_backward_filters(const float* partials, T* dweight, T* dbias, int c, int k, int groups) {
    SMEM_ARRAY(float, shared, kSumThreads);
    const int tiles = (c + 31) / 32, tap = blockIdx.x / tiles, channel = blockIdx.x % tiles * 32 + threadIdx.x % 32;
    const float* first = partials + size_t(tap) * c + channel;
    const float sum = sum_partials(first, groups, size_t(k + 1) * c, channel < c, shared);
    if (threadIdx.x >= 32 || channel >= c) return;
    if (tap < k && dweight) dweight[size_t(channel) * k + tap] = from_float<T>(sum);
    if (tap == k && dbias) dbias[channel] = from_float<T>(sum);
}
KERNEL_EXPORT(conv_silu_backward_filters);
