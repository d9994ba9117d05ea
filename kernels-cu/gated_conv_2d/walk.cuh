// Gated convolutions of 3 x 3 taps on the grid: a thread owns two neighbouring channels of two rows of the grid (one in
// f32) and walks along their columns.
//
// Under the windows of two rows lie four rows and three columns. A column is read once, four loads for two tokens where
// windows by themselves take nine each, three columns before its use, and stays in registers until the walk has passed
// it. Taps are read once a walk: they lie nine elements apart from channel to channel, so a warp's load of one touches
// as much memory as nine loads of channels. The walk goes in groups of three columns, so that the place in a window is a
// constant.
#pragma once
#include "../common/ptx.cuh"

using namespace ptx;

// Threads of a block, channels of a thread, rows of the grid that it makes, rows under their windows, taps a side.
constexpr int kThreads = 32, kPair = 2, kRows = sizeof(T) == 2 ? 2 : 1, kTaps = 3, kSpan = kRows + kTaps - 1;
// Blocks of a multiprocessor that the registers allow.
constexpr int kBlocks = 12;

// Two channels as they lie in memory.
template <int kBytes> struct WordOf;
template <> struct WordOf<2> { using type = uint32_t; };
template <> struct WordOf<4> { using type = uint2; };
template <class E> using Word = typename WordOf<sizeof(E)>::type;

__device__ __forceinline__ void read(uint32_t& w, const void* p) { w = ld_global_nc_u32(p); }
__device__ __forceinline__ void read(uint2& w, const void* p) { w = ld_global_nc_v2(p); }
__device__ __forceinline__ void clear(uint32_t& w) { w = 0; }
__device__ __forceinline__ void clear(uint2& w) { w = make_uint2(0, 0); }
template <class E> __device__ __forceinline__ void unpack(float (&r)[kPair], uint32_t w) {
    r[0] = unpack_lo<E>(w), r[1] = unpack_hi<E>(w);
}
template <class E> __device__ __forceinline__ void unpack(float (&r)[kPair], uint2 w) {
    r[0] = __uint_as_float(w.x), r[1] = __uint_as_float(w.y);
}
__device__ __forceinline__ void write(bf16* p, const float (&v)[kPair]) { st_global_u32(p, pack<bf16>(v[0], v[1])); }
__device__ __forceinline__ void write(float* p, const float (&v)[kPair]) {
    st_global_v2(p, make_uint2(__float_as_uint(v[0]), __float_as_uint(v[1])));
}

// Where a thread works. Blocks: [B][groups of rows][segments of columns][tiles of channels].
struct Strip {
    int sample, row, first, count, channel;
    __device__ __forceinline__ Strip(int gh, int gw, int c, int length, int segments) {
        const int tiles = (c + kPair * kThreads - 1) / (kPair * kThreads), bands = (gh + kRows - 1) / kRows;
        channel = kPair * (blockIdx.x % tiles * kThreads + int(threadIdx.x));
        const int segment = blockIdx.x / tiles % segments, group = blockIdx.x / tiles / segments;
        sample = group / bands, row = group % bands * kRows;
        first = segment * length, count = min(length, gw - first);
    }
};

// A column under the windows of a strip, of a tensor whose tokens lie `width` elements apart, zero outside of the grid.
template <class E> struct Column {
    Word<E> words[kSpan];

    // from: the strip's sample and channel.
    __device__ __forceinline__ void fetch(const E* from, const Strip& of, int column, int gh, int gw, int width) {
#pragma unroll
        for (int r = 0; r < kSpan; r++) {
            const int row = of.row - kTaps / 2 + r;
            const bool inside = unsigned(row) < unsigned(gh) && unsigned(column) < unsigned(gw);
            if (inside)
                read(words[r], from + (size_t(row) * gw + column) * width);
            else
                clear(words[r]);
        }
    }
};

// What is under the windows: the newest column at one of three places.
struct Under {
    float x[kSpan][kTaps][kPair];

    template <class E> __device__ __forceinline__ void put(const Column<E>& column, int u) {
#pragma unroll
        for (int r = 0; r < kSpan; r++) unpack<E>(x[r][u], column.words[r]);
    }
    // The product of two columns.
    template <class E> __device__ __forceinline__ void put(const Column<E>& a, const Column<E>& b, int u) {
#pragma unroll
        for (int r = 0; r < kSpan; r++) {
            float other[kPair];
            unpack<E>(x[r][u], a.words[r]);
            unpack<E>(other, b.words[r]);
            x[r][u][0] *= other[0], x[r][u][1] *= other[1];
        }
    }
};

// The taps of one filter for the two channels of a thread; `weight` and `bias` at the first.
struct Filter {
    float taps[kTaps * kTaps][kPair], bias[kPair];

    __device__ __forceinline__ Filter(const T* weight, const T* at_bias) {
#pragma unroll
        for (int e = 0; e < kPair; e++) {
            bias[e] = to_float(at_bias[e]);
#pragma unroll
            for (int j = 0; j < kTaps * kTaps; j++) taps[j][e] = to_float(weight[e * kTaps * kTaps + j]);
        }
    }
    // Over the window of row `r` whose newest column is at u.
    __device__ __forceinline__ void over(float (&y)[kPair], const Under& w, int r, int u) const {
#pragma unroll
        for (int e = 0; e < kPair; e++) {
            y[e] = bias[e];
#pragma unroll
            for (int a = 0; a < kTaps; a++)
#pragma unroll
                for (int b = 0; b < kTaps; b++)
                    y[e] = fmaf(taps[a * kTaps + b][e], w.x[r + a][(u + 1 + b) % kTaps][e], y[e]);
        }
    }
};

// Walks along a strip: fetch(u, column) begins to read a column for place u, put(u) takes it into the windows, and
// emit(u, token) follows where the windows of that token of the strip are complete.
template <class Fetch, class Put, class Emit>
__device__ __forceinline__ void walk(const Strip& of, Fetch fetch, Put put, Emit emit) {
#pragma unroll
    for (int u = 0; u < kTaps; u++) fetch(u, of.first - kTaps / 2 + u);
    for (int step = 0; step < of.count + kTaps - 1; step += kTaps) {
#pragma unroll
        for (int u = 0; u < kTaps; u++) {
            put(u);
            fetch(u, of.first - kTaps / 2 + step + u + kTaps);
            const int token = step + u - (kTaps - 1);
            if (token >= 0 && token < of.count) emit(u, token);
        }
    }
}

// Writes what value(y, r) makes of the rows of a strip at one token; `to` at the strip's sample and channel.
template <class E, class Value>
__device__ __forceinline__ void write_rows(E* to, const Strip& of, int token, int gh, int gw, int c, Value value) {
#pragma unroll
    for (int r = 0; r < kRows; r++) {
        if (of.row + r >= gh) continue;
        float y[kPair];
        value(y, r);
        write(to + (size_t(of.row + r) * gw + of.first + token) * c, y);
    }
}

// kv: [B, Gh·Gw, C], the product of the filtered k and v, not rounded: what the inner filter adds may cancel.
__device__ __forceinline__ void walk_product(const T* p, const T* short_weight, const T* short_bias, float* kv, int gh,
                                             int gw, int c, int length, int segments) {
    const Strip of(gh, gw, c, length, segments);
    if (of.channel >= c) return;
    const size_t tokens = size_t(of.sample) * gh * gw;
    const T* from = p + tokens * 3 * c + c + of.channel;
    float* to = kv + tokens * c + of.channel;
    const int taps = kTaps * kTaps;
    const Filter of_k(short_weight + (size_t(c) + of.channel) * taps, short_bias + c + of.channel);
    const Filter of_v(short_weight + (size_t(2) * c + of.channel) * taps, short_bias + 2 * c + of.channel);
    Column<T> ahead[2][kTaps];
    Under k, v;
    walk(
        of,
        [&](int u, int column) {
            ahead[0][u].fetch(from, of, column, gh, gw, 3 * c);
            ahead[1][u].fetch(from + c, of, column, gh, gw, 3 * c);
        },
        [&](int u) { k.put(ahead[0][u], u), v.put(ahead[1][u], u); },
        [&](int u, int token) {
            write_rows(to, of, token, gh, gw, c, [&](float (&a)[kPair], int r) {
                float b[kPair];
                of_k.over(a, k, r, u), of_v.over(b, v, r, u);
                a[0] *= b[0], a[1] *= b[1];
            });
        });
}

// y with both filters, of the product kv.
__device__ __forceinline__ void walk_se(const T* p, const T* short_weight, const T* short_bias, const T* inner_weight,
                                        const T* inner_bias, const float* kv, T* y, int gh, int gw, int c, int length,
                                        int segments) {
    const Strip of(gh, gw, c, length, segments);
    if (of.channel >= c) return;
    const size_t tokens = size_t(of.sample) * gh * gw;
    const T* from = p + tokens * 3 * c + of.channel;
    const float* product = kv + tokens * c + of.channel;
    T* to = y + tokens * c + of.channel;
    const Filter of_q(short_weight + size_t(of.channel) * kTaps * kTaps, short_bias + of.channel);
    const Filter inner(inner_weight + size_t(of.channel) * kTaps * kTaps, inner_bias + of.channel);
    Column<T> ahead[kTaps];
    Column<float> ahead_kv[kTaps];
    Under q, under_kv;
    walk(
        of,
        [&](int u, int column) {
            ahead[u].fetch(from, of, column, gh, gw, 3 * c);
            ahead_kv[u].fetch(product, of, column, gh, gw, c);
        },
        [&](int u) { q.put(ahead[u], u), under_kv.put(ahead_kv[u], u); },
        [&](int u, int token) {
            write_rows(to, of, token, gh, gw, c, [&](float (&a)[kPair], int r) {
                float b[kPair];
                of_q.over(a, q, r, u), inner.over(b, under_kv, r, u);
                a[0] *= b[0], a[1] *= b[1];
            });
        });
}

// y with the filter of q, k and v alone.
__device__ __forceinline__ void walk_x(const T* p, const T* short_weight, const T* short_bias, T* y, int gh, int gw,
                                       int c, int length, int segments) {
    const Strip of(gh, gw, c, length, segments);
    if (of.channel >= c) return;
    const size_t tokens = size_t(of.sample) * gh * gw;
    const T* from = p + tokens * 3 * c + of.channel;
    T* to = y + tokens * c + of.channel;
    const int taps = kTaps * kTaps;
    const Filter of_q(short_weight + size_t(of.channel) * taps, short_bias + of.channel);
    const Filter of_k(short_weight + (size_t(c) + of.channel) * taps, short_bias + c + of.channel);
    const Filter of_v(short_weight + (size_t(2) * c + of.channel) * taps, short_bias + 2 * c + of.channel);
    Column<T> ahead[3][kTaps];
    Under q, k, v;
    walk(
        of,
        [&](int u, int column) {
#pragma unroll
            for (int part = 0; part < 3; part++)
                ahead[part][u].fetch(from + part * c, of, column, gh, gw, 3 * c);
        },
        [&](int u) { q.put(ahead[0][u], u), k.put(ahead[1][u], u), v.put(ahead[2][u], u); },
        [&](int u, int token) {
            write_rows(to, of, token, gh, gw, c, [&](float (&a)[kPair], int r) {
                float b[kPair], d[kPair];
                of_q.over(a, q, r, u), of_k.over(b, k, r, u), of_v.over(d, v, r, u);
                a[0] *= b[0] * d[0], a[1] *= b[1] * d[1];
            });
        });
}

// y with the inner filter alone; q is not filtered, so its place is read.
__device__ __forceinline__ void walk_y(const T* p, const T* inner_weight, const T* inner_bias, T* y, int gh, int gw,
                                       int c, int length, int segments) {
    const Strip of(gh, gw, c, length, segments);
    if (of.channel >= c) return;
    const size_t tokens = size_t(of.sample) * gh * gw;
    const T* from = p + tokens * 3 * c + of.channel;
    T* to = y + tokens * c + of.channel;
    const Filter inner(inner_weight + size_t(of.channel) * kTaps * kTaps, inner_bias + of.channel);
    Column<T> ahead[2][kTaps];
    Under kv;
    walk(
        of,
        [&](int u, int column) {
            ahead[0][u].fetch(from + c, of, column, gh, gw, 3 * c);
            ahead[1][u].fetch(from + 2 * c, of, column, gh, gw, 3 * c);
        },
        [&](int u) { kv.put(ahead[0][u], ahead[1][u], u); },
        [&](int u, int token) {
            write_rows(to, of, token, gh, gw, c, [&](float (&a)[kPair], int r) {
                Word<T> word;
                float b[kPair];
                read(word, from + (size_t(of.row + r) * gw + of.first + token) * 3 * c);
                unpack<T>(a, word);
                inner.over(b, kv, r, u);
                a[0] *= b[0], a[1] *= b[1];
            });
        });
}
