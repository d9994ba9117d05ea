// short(x)[t] = bias + sum_j w[j]*x[t - lead + j], the identity without w;  q, k, v = short(p);  u = k*v
// m[t] = skip[c]*u[t] + sum_l filter[c,l]*u[t + centre - l];  y = q*m;  all zero outside [0, N)
// dm = dy*q, dq = dy*m;  du[s] = skip*dm[s] + sum_l filter[l]*dm[s - centre + l], dk = du*v, dv = du*k
// dfilter[c,l] = sum_bt u[t + centre - l]*dm[t];  dp[s] = sum_j w[j]*d[s + lead - j];  dw[j] = sum_bt d[t]*p[t - lead + j]
//
// p, dp: [B, N, 3, C], short_weight: [3, C, K], short_bias: [3, C] (both null or neither), filter: [C, L], skip: [C],
// y, dy: [B, N, C], all T; u, dm: [B, N, C], d: [B, N, 3, C], taps: [L, C] (the filter transposed) f32; sums in f32.
//
// The last `reversed` channels run against token order: everything here counts time, which is the token or, for them,
// N - 1 less the token, so that both directions are one code.
//
// Version 1, CUDA cores, in the time domain, the first rung (transforms are the next). Lanes are channels, so every access
// is coalesced; a thread owns 16 neighbours in time (or lags) of a channel and slides a window of 23 values through
// registers: 128 multiply-adds for 16 loads. Each sum has one owner and one order.
//
// Bound: this version by arithmetic, 2·B·N·L·C operations at the most (half where causal) and three times that backward,
// on 67 TFLOP/s of f32; memory would be B·N·C·16 bytes, so from N of some hundreds on transforms win.
//
// Requires: nothing beyond the contract: any shape. Does not handle: strides.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"
#include "short.cuh"

using namespace ptx;

constexpr int kRun = 16, kStep = 8;

// acc[i] += sum over x in [first, end) of g(x)·v(x + i).
template <class G, class V>
__device__ __forceinline__ void slide(float (&acc)[kRun], int first, int end, G g, V v) {
    float window[kRun + kStep - 1], factor[kStep];
#pragma unroll
    for (int j = 0; j < kRun - 1; j++) window[j] = v(first + j);
    for (int x = first; x < end; x += kStep) {
#pragma unroll
        for (int e = 0; e < kStep; e++) {
            window[kRun - 1 + e] = v(x + kRun - 1 + e);
            factor[e] = x + e < end ? g(x + e) : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < kStep; e++) {
#pragma unroll
            for (int i = 0; i < kRun; i++) acc[i] = fmaf(factor[e], window[i + e], acc[i]);
        }
#pragma unroll
        for (int j = 0; j < kRun - 1; j++) window[j] = window[j + kStep];
    }
}

// The channel and the run of a thread: blockIdx.x is channels/32 fastest, then runs four at a time, then samples.
struct Run {
    Line line;
    int sample, start;
    bool live;
};
__device__ __forceinline__ Run run_of_thread(int n, int c, int reversed, int length) {
    const int columns = (c + 31) / 32, runs = (length + 4 * kRun - 1) / (4 * kRun);
    const int channel = int(blockIdx.x % columns) * 32 + int(threadIdx.x % 32), rest = int(blockIdx.x / columns);
    const int start = (rest % runs * 4 + int(threadIdx.x / 32)) * kRun;
    return {{n, c, channel, channel + reversed >= c}, rest / runs, start, channel < c && start < length};
}

// m of 16 times from `start`: the filter over u, and the skip.
__device__ __forceinline__ void mix(float (&acc)[kRun], const float* u, const float* taps, const T* skip,
                                    const Run& run, int l, int centre) {
    const Line& line = run.line;
    const auto u_at = [&](int time) {
        return time >= 0 && time < line.n ? u[line.at(run.sample, time, 1, 0)] : 0.0f;
    };
    float turned[kRun];
#pragma unroll
    for (int i = 0; i < kRun; i++) turned[i] = 0.0f;
    // Lags that reach [0, N) from one of the times.
    const int first = max(0, run.start + centre - line.n + 1), end = min(l, run.start + kRun + centre);
    slide(
        turned, first, end, [&](int lag) { return taps[size_t(lag) * line.c + line.channel]; },
        [&](int z) { return u_at(run.start + centre + kRun - 1 - z); });
    const float direct = to_float(skip[line.channel]);
#pragma unroll
    for (int i = 0; i < kRun; i++) acc[i] = fmaf(direct, u_at(run.start + i), turned[kRun - 1 - i]);
}

// u, and dm where dy is given.
extern "C" __global__ void __launch_bounds__(256)
    long_conv_gates(const T* p, const T* short_weight, const T* short_bias, const T* dy, float* u, float* dm, int b, int n,
                    int c, int k, int lead, int reversed) {
    for (size_t i = grid_thread(); i < size_t(b) * n * c; i += grid_threads()) {
        const int channel = int(i % c), sample = int(i / c / n), token = int(i / c % n);
        const Line line = {n, c, channel, channel + reversed >= c};
        const int time = line.token(token);
        u[i] = near(p, short_weight, short_bias, line, sample, time, 1, k, lead) *
               near(p, short_weight, short_bias, line, sample, time, 2, k, lead);
        if (dy) dm[i] = to_float(dy[i]) * near(p, short_weight, short_bias, line, sample, time, 0, k, lead);
    }
}
KERNEL_EXPORT(long_conv_gates);

extern "C" __global__ void __launch_bounds__(256) long_conv_taps(const T* filter, float* taps, int c, int l) {
    for (size_t i = grid_thread(); i < size_t(c) * l; i += grid_threads())
        taps[i] = to_float(filter[i % c * l + i / c]);
}
KERNEL_EXPORT(long_conv_taps);

extern "C" __global__ void __launch_bounds__(128, 4)
    long_conv_forward(const T* p, const T* short_weight, const T* short_bias, const float* u, const float* taps,
                      const T* skip, T* y, int n, int c, int k, int l, int lead, int centre, int reversed) {
    const Run run = run_of_thread(n, c, reversed, n);
    if (!run.live) return;
    float m[kRun];
    mix(m, u, taps, skip, run, l, centre);
#pragma unroll
    for (int i = 0; i < kRun; i++) {
        const int time = run.start + i;
        if (time >= n) continue;
        const float q = near(p, short_weight, short_bias, run.line, run.sample, time, 0, k, lead);
        y[run.line.at(run.sample, time, 1, 0)] = from_float<T>(q * m[i]);
    }
}
KERNEL_EXPORT(long_conv_forward);

// d [B, N, 3, C]: the gradients of q, k and v after their short filters.
extern "C" __global__ void __launch_bounds__(128, 3)
    long_conv_backward_gates(const T* dy, const T* p, const T* short_weight, const T* short_bias, const float* u,
                             const float* dm, const float* taps, const T* skip, float* d, int n, int c, int k, int l,
                             int lead, int centre, int reversed) {
    const Run run = run_of_thread(n, c, reversed, n);
    if (!run.live) return;
    const Line& line = run.line;
    float m[kRun], du[kRun];
    mix(m, u, taps, skip, run, l, centre);
    const float direct = to_float(skip[line.channel]);
    const auto dm_at = [&](int time) {
        return time >= 0 && time < n ? dm[line.at(run.sample, time, 1, 0)] : 0.0f;
    };
#pragma unroll
    for (int i = 0; i < kRun; i++) du[i] = direct * dm_at(run.start + i);
    const int first = max(0, centre - run.start - kRun + 1), end = min(l, n - run.start + centre);
    slide(
        du, first, end, [&](int lag) { return taps[size_t(lag) * c + line.channel]; },
        [&](int z) { return dm_at(run.start - centre + z); });
#pragma unroll
    for (int i = 0; i < kRun; i++) {
        const int time = run.start + i;
        if (time >= n) continue;
        const float g = to_float(dy[line.at(run.sample, time, 1, 0)]);
        d[line.at(run.sample, time, 3, 0)] = g * m[i];
        d[line.at(run.sample, time, 3, 1)] =
            du[i] * near(p, short_weight, short_bias, line, run.sample, time, 2, k, lead);
        d[line.at(run.sample, time, 3, 2)] =
            du[i] * near(p, short_weight, short_bias, line, run.sample, time, 1, k, lead);
    }
}
KERNEL_EXPORT(long_conv_backward_gates);

extern "C" __global__ void __launch_bounds__(256)
    long_conv_backward_p(const float* d, const T* short_weight, T* dp, int b, int n, int c, int k, int lead,
                         int reversed) {
    for (size_t i = grid_thread(); i < size_t(b) * n * 3 * c; i += grid_threads()) {
        const int channel = int(i % c), part = int(i / c % 3), sample = int(i / (3 * size_t(c)) / n);
        const Line line = {n, c, channel, channel + reversed >= c};
        const int time = line.token(int(i / (3 * size_t(c)) % n));
        float sum = short_weight ? 0.0f : d[i];
        for (int j = 0; short_weight && j < k; j++) {
            const int from = time + lead - j;
            if (from >= 0 && from < n)
                sum = fmaf(to_float(short_weight[(size_t(part) * c + channel) * k + j]),
                           d[line.at(sample, from, 3, part)], sum);
        }
        dp[i] = from_float<T>(sum);
    }
}
KERNEL_EXPORT(long_conv_backward_p);

// Sixteen lags of a channel a thread, over all samples; dskip is what the lag of the current token gets.
extern "C" __global__ void __launch_bounds__(128, 4)
    long_conv_backward_filter(const float* u, const float* dm, T* dfilter, T* dskip, int b, int n, int c, int l,
                              int centre, int reversed) {
    const Run run = run_of_thread(n, c, reversed, l);
    if (!run.live) return;
    const Line& line = run.line;
    float turned[kRun];
#pragma unroll
    for (int i = 0; i < kRun; i++) turned[i] = 0.0f;
    const int shift = centre - run.start - (kRun - 1);
    const int first = max(0, -(shift + kRun - 1)), end = min(n, n - shift);
    for (int sample = 0; sample < b; sample++) {
        slide(
            turned, first, end, [&](int time) { return dm[line.at(sample, time, 1, 0)]; },
            [&](int z) {
                const int time = shift + z;
                return time >= 0 && time < n ? u[line.at(sample, time, 1, 0)] : 0.0f;
            });
    }
#pragma unroll
    for (int i = 0; i < kRun; i++) {
        const int lag = run.start + i;
        if (lag >= l) continue;
        if (dfilter) dfilter[size_t(line.channel) * l + lag] = from_float<T>(turned[kRun - 1 - i]);
        if (dskip && lag == centre) dskip[line.channel] = from_float<T>(turned[kRun - 1 - i]);
    }
}
KERNEL_EXPORT(long_conv_backward_filter);

// Part blockIdx.y of the tokens of all samples: partials [parts, K + 1, 3·C], the last row that of the bias.
extern "C" __global__ void __launch_bounds__(128, 4)
    long_conv_backward_short(const float* d, const T* p, float* partials, int b, int n, int c, int k, int lead,
                             int reversed, int part) {
    const int width = 3 * c, item = int(blockIdx.x) * 128 + int(threadIdx.x);
    if (item >= width * (k + 1)) return;
    const int j = item / width, column = item % width, which = column / c, channel = column % c;
    const Line line = {n, c, channel, channel + reversed >= c};
    const size_t first = size_t(blockIdx.y) * part, all = size_t(b) * n, end = first + part < all ? first + part : all;
    float sum = 0.0f;
    for (size_t row = first; row < end; row++) {
        const int sample = int(row / n), time = int(row % n), from = time - lead + j;
        const float g = d[line.at(sample, time, 3, which)];
        if (j == k)
            sum += g;
        else if (from >= 0 && from < n)
            sum = fmaf(g, to_float(p[line.at(sample, from, 3, which)]), sum);
    }
    partials[size_t(blockIdx.y) * width * (k + 1) + item] = sum;
}
KERNEL_EXPORT(long_conv_backward_short);

extern "C" __global__ void __launch_bounds__(256)
    long_conv_backward_add(const float* partials, T* dshort_weight, T* dshort_bias, int c, int k, int parts) {
    const int width = 3 * c;
    for (size_t i = grid_thread(); i < size_t(width) * (k + 1); i += grid_threads()) {
        float sum = 0.0f;
        for (int p = 0; p < parts; p++) sum += partials[size_t(p) * width * (k + 1) + i];
        const int j = int(i / width), row = int(i % width);
        if (j == k) {
            if (dshort_bias) dshort_bias[row] = from_float<T>(sum);
        } else if (dshort_weight) {
            dshort_weight[size_t(row) * k + j] = from_float<T>(sum);
        }
    }
}
KERNEL_EXPORT(long_conv_backward_add);
