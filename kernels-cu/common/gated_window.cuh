// Gated convolutions of any window, one element a thread: for every shape that the fused kernels do not take.
//
// A window has kh x kw taps, of which lh rows and lw columns lie before the current place of a gh x gw grid; a sequence
// is a grid of one column. What is computed in between, k·v and the gradients of the filtered q, k, v and of the inner
// filter's result, goes through scratch memory in f32.
#pragma once
#include "ptx.cuh"
#include "rows.cuh"

namespace ptx {

struct Window {
    int gh, gw, kh, kw, lh, lw;
    PTX_FN int tokens() const { return gh * gw; }
    PTX_FN int taps() const { return kh * kw; }
};

// Filters of a call, null where absent: taps [3, C, kh·kw] and biases [3, C] of q, k, v, [C, kh·kw] and [C] inside.
struct WindowFilters {
    const T *short_weight, *short_bias, *inner_weight, *inner_bias;
};

// Calls f(token, tap) for the tokens of the grid under the window at `token`; `sign` -1 turns the window round.
template <class F> PTX_FN void under_window(const Window& o, int token, int sign, F f) {
    const int i = token / o.gw, j = token % o.gw;
    for (int r = 0; r < o.kh; r++) {
        const int row = i + sign * (r - o.lh);
        if (row < 0 || row >= o.gh) continue;
        for (int s = 0; s < o.kw; s++) {
            const int column = j + sign * (s - o.lw);
            if (column >= 0 && column < o.gw) f(row * o.gw + column, r * o.kw + s);
        }
    }
}

// Where a thread works: blocks of 4 tokens by 32 channels.
constexpr int kWindowThreads = 128;
struct WindowPlace {
    int sample, token, channel, sign;
    bool inside;
    PTX_FN WindowPlace(const Window& o, int b, int c, int reversed) {
        const int tiles = (c + 31) / 32, groups = (o.tokens() + 3) / 4, group = blockIdx.x / tiles;
        sample = group / groups, token = group % groups * 4 + threadIdx.x / 32;
        channel = blockIdx.x % tiles * 32 + threadIdx.x % 32;
        inside = sample < b && token < o.tokens() && channel < c;
        sign = channel + reversed < c ? 1 : -1;
    }
};

// Part 0, 1 or 2 (q, k, v) filtered, at one place; `p` at the sample and the channel.
PTX_FN float filtered(const Window& o, const WindowFilters& f, const T* p, int token, int part, int channel, int sign,
                      int c) {
    const T* from = p + size_t(part) * c;
    if (!f.short_weight) return to_float(from[size_t(token) * 3 * c]);
    const T* w = f.short_weight + (size_t(part) * c + channel) * o.taps();
    float sum = to_float(f.short_bias[size_t(part) * c + channel]);
    under_window(o, token, sign, [&](int t, int tap) {
        sum = fmaf(to_float(w[tap]), to_float(from[size_t(t) * 3 * c]), sum);
    });
    return sum;
}

// The inner filter over k·v; `kv` at the sample and the channel.
PTX_FN float inner_filtered(const Window& o, const WindowFilters& f, const float* kv, int token, int channel, int sign,
                            int c) {
    if (!f.inner_weight) return kv[size_t(token) * c];
    const T* w = f.inner_weight + size_t(channel) * o.taps();
    float sum = to_float(f.inner_bias[channel]);
    under_window(o, token, sign, [&](int t, int tap) { sum = fmaf(to_float(w[tap]), kv[size_t(t) * c], sum); });
    return sum;
}

// What goes back through a filter: the taps of `w`, or nothing in between where it is null.
PTX_FN float filtered_back(const Window& o, const T* w, const float* dy, int token, int sign, int c) {
    if (!w) return dy[size_t(token) * c];
    float sum = 0.0f;
    under_window(o, token, -sign, [&](int t, int tap) { sum = fmaf(to_float(w[tap]), dy[size_t(t) * c], sum); });
    return sum;
}

// kv: [B, N, C].
PTX_FN void window_product(const Window& o, const WindowFilters& f, const T* p, float* kv, int b, int c,
                           int reversed) {
    const WindowPlace at(o, b, c, reversed);
    if (!at.inside) return;
    const T* from = p + size_t(at.sample) * o.tokens() * 3 * c + at.channel;
    const float k = filtered(o, f, from, at.token, 1, at.channel, at.sign, c);
    const float v = filtered(o, f, from, at.token, 2, at.channel, at.sign, c);
    kv[(size_t(at.sample) * o.tokens() + at.token) * c + at.channel] = k * v;
}

PTX_FN void window_forward(const Window& o, const WindowFilters& f, const T* p, const float* kv, T* y, int b, int c,
                           int reversed) {
    const WindowPlace at(o, b, c, reversed);
    if (!at.inside) return;
    const size_t sample = size_t(at.sample) * o.tokens() * c + at.channel;
    const float q = filtered(o, f, p + 3 * (sample - at.channel) + at.channel, at.token, 0, at.channel, at.sign, c);
    const float mixed = inner_filtered(o, f, kv + sample, at.token, at.channel, at.sign, c);
    y[sample + size_t(at.token) * c] = from_float<T>(q * mixed);
}

// dc: gradient of the inner filter's result; du: [3][B, N, C], gradients of filtered q, k, v, of which this writes q's.
PTX_FN void window_backward_gate(const Window& o, const WindowFilters& f, const T* dy, const T* p, const float* kv,
                                 float* dc, float* du, int b, int c, int reversed) {
    const WindowPlace at(o, b, c, reversed);
    if (!at.inside) return;
    const size_t sample = size_t(at.sample) * o.tokens() * c + at.channel, own = sample + size_t(at.token) * c;
    const float q = filtered(o, f, p + 3 * (sample - at.channel) + at.channel, at.token, 0, at.channel, at.sign, c);
    const float g = to_float(dy[own]);
    dc[own] = g * q;
    du[own] = g * inner_filtered(o, f, kv + sample, at.token, at.channel, at.sign, c);
}

// The gradients of filtered k and v.
PTX_FN void window_backward_product(const Window& o, const WindowFilters& f, const T* p, const float* dc, float* du,
                                    int b, int c, int reversed) {
    const WindowPlace at(o, b, c, reversed);
    if (!at.inside) return;
    const size_t sample = size_t(at.sample) * o.tokens() * c + at.channel, own = sample + size_t(at.token) * c;
    const size_t all = size_t(b) * o.tokens() * c;
    const T* from = p + 3 * (sample - at.channel) + at.channel;
    const T* w = f.inner_weight ? f.inner_weight + size_t(at.channel) * o.taps() : f.inner_weight;
    const float g = filtered_back(o, w, dc + sample, at.token, at.sign, c);
    du[all + own] = g * filtered(o, f, from, at.token, 2, at.channel, at.sign, c);
    du[2 * all + own] = g * filtered(o, f, from, at.token, 1, at.channel, at.sign, c);
}

PTX_FN void window_backward_input(const Window& o, const T* short_weight, const float* du, T* dp, int b, int c,
                                  int reversed) {
    const WindowPlace at(o, b, c, reversed);
    if (!at.inside) return;
    const size_t sample = size_t(at.sample) * o.tokens() * c + at.channel, all = size_t(b) * o.tokens() * c;
    for (int part = 0; part < 3; part++) {
        const T* w = short_weight ? short_weight + (size_t(part) * c + at.channel) * o.taps() : short_weight;
        const float g = filtered_back(o, w, du + part * all + sample, at.token, at.sign, c);
        dp[3 * (sample - at.channel) + (size_t(at.token) * 3 + part) * c + at.channel] = from_float<T>(g);
    }
}

// Rows of a partial result: of each of q, k, v (where they are filtered) and the inner filter (where there is one) its
// taps, then its bias. partials: [groups][rows][C]; a thread has one row and one channel of the tokens group,
// group + groups ... of all samples.
PTX_FN void window_backward_sums(const Window& o, bool has_short, bool has_inner, const T* p, const float* kv,
                                 const float* dc, const float* du, float* partials, int b, int c, int reversed,
                                 int groups) {
    const int tiles = (c + 127) / 128, rows = (3 * has_short + has_inner) * (o.taps() + 1);
    const int channel = blockIdx.x % tiles * 128 + threadIdx.x, row = blockIdx.x / tiles % rows;
    const int group = blockIdx.x / tiles / rows;
    if (channel >= c) return;
    const int filter = row / (o.taps() + 1) + (has_short ? 0 : 3), tap = row % (o.taps() + 1), tokens = o.tokens();
    const int sign = channel + reversed < c ? 1 : -1;
    const int down = sign * (tap / o.kw - o.lh), right = sign * (tap % o.kw - o.lw);
    const float* g = filter < 3 ? du + size_t(filter) * b * tokens * c : dc;
    float sum = 0.0f;
    for (size_t at = group; at < size_t(b) * tokens; at += groups) {
        const float d = g[at * c + channel];
        if (tap == o.taps()) {
            sum += d;
            continue;
        }
        const int token = int(at % tokens), i = token / o.gw + down, j = token % o.gw + right;
        if (i < 0 || i >= o.gh || j < 0 || j >= o.gw) continue;
        const size_t from = at - token + size_t(i) * o.gw + j;
        const float x = filter < 3 ? to_float(p[(from * 3 + filter) * c + channel]) : kv[from * c + channel];
        sum = fmaf(d, x, sum);
    }
    partials[(size_t(group) * rows + row) * c + channel] = sum;
}

// Adds the partial results; gradients that are null are not wanted. A block has 32 channels of one row.
PTX_FN void window_backward_filters(int taps, bool has_short, const float* partials, T* dshort_weight, T* dshort_bias,
                                    T* dinner_weight, T* dinner_bias, int c, int rows, int groups, float* shared) {
    const int tiles = (c + 31) / 32, row = blockIdx.x / tiles, channel = blockIdx.x % tiles * 32 + threadIdx.x % 32;
    const bool inside = channel < c;
    const float sum = sum_partials(partials + size_t(row) * c + channel, groups, size_t(rows) * c, inside, shared);
    if (threadIdx.x >= 32 || !inside) return;
    const int filter = row / (taps + 1) + (has_short ? 0 : 3), tap = row % (taps + 1);
    T* weight = filter < 3 ? dshort_weight : dinner_weight;
    T* bias = filter < 3 ? dshort_bias : dinner_bias;
    const size_t of = filter < 3 ? size_t(filter) * c + channel : size_t(channel);
    if (tap < taps) {
        if (weight) weight[of * taps + tap] = from_float<T>(sum);
    } else if (bias) {
        bias[of] = from_float<T>(sum);
    }
}

}  // namespace ptx
