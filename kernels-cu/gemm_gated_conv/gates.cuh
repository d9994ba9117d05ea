// From the sums of a tile of the projection to gated results: bias, the short convolution along the tokens, both gates.
//
// A tile has 128 rows of the projection and q, k and v of the same kChannels channels. It is laid into shared memory
// as bf16, the very numbers that memory would hold: row r in words of two channels, q, k, v side by side, four words
// longer so that the eight rows of a fragment meet no bank twice. `tokens` of its rows are results; the others are what
// the taps reach before and behind them, computed by the neighbouring tiles, too.
//
// A thread owns two channels and takes runs of tokens: filters of 3 and 4 taps stay in its registers, and so does the
// window of a run; runs that an image ends in, and other filters, ask for each tap whether its token is there.
#pragma once
#include "../common/linear.cuh"

namespace linear {

constexpr int kGateRows = 128;

struct Gates {
    const T *bias, *short_weight, *short_bias;
    T *y, *p;
    int rows, n, c, taps, lead, reversed, tokens;

    // The results [first, end) of a tile, and the row of the projection that is its first.
    struct Span {
        int first, end, base;
    };

    PTX_FN bool backward(int channel) const { return channel >= c - reversed; }
    // Taps before the current token, as the tokens are numbered.
    PTX_FN int before(int channel) const { return backward(channel) ? taps - 1 - lead : lead; }

    // Of the tile `index` with the channels [channel, channel + channels).
    PTX_FN Span span(int index, int channel, int channels) const {
        const int first = index * tokens, last = min(channel + channels, c) - 1;
        const int reach = max(before(channel), before(last));
        return {first, min(first + tokens, rows), max(first - reach, 0)};
    }
};

// Of tiles of kChannels channels, by kThreads threads.
template <int kChannels, int kThreads> struct GateTile {
    static constexpr int kPairs = kChannels / 2, kStride = 3 * kPairs + 4, kBytes = 4 * kGateRows * kStride;
    // Tokens of a run: the groups of a warp then read different banks.
    static constexpr int kGroups = kThreads / kPairs, kRun = kPairs == 32 ? 8 : 4;
    static_assert(kPairs == 32 || kPairs == 16, "a warp is one group or two");

    static PTX_FN uint32_t at(uint32_t tile, int row, int word) { return tile + uint32_t(4 * (row * kStride + word)); }

    // Block of 8 columns from `column` of the tile on, rows from `row` on, as D of m16n8k16 holds it, with its bias.
    static PTX_FN void put(uint32_t tile, const Gates& g, int channel, int row, int column, const float (&d)[4]) {
        const int lane = threadIdx.x % 32, own = column + lane % 4 * 2, part = own / kChannels;
        const int of = channel + own % kChannels;
        float lo = 0.0f, hi = 0.0f;
        if (g.bias && of < g.c) {
            const T* bias = g.bias + size_t(part) * g.c + of;
            lo = to_float(bias[0]), hi = to_float(bias[1]);
        }
        st_shared_u32(at(tile, row + lane / 4, own / 2), pack<bf16>(d[0] + lo, d[1] + hi));
        st_shared_u32(at(tile, row + lane / 4 + 8, own / 2), pack<bf16>(d[2] + lo, d[3] + hi));
    }

    // Tap j, as the tokens are numbered, of the channels `of` and `of` + 1.
    static PTX_FN float2 tap(const Gates& g, int part, int of, int j) {
        const T* w = g.short_weight + (size_t(part) * g.c + of) * g.taps + (g.backward(of) ? g.taps - 1 - j : j);
        return {to_float(w[0]), to_float(w[g.taps])};
    }

    // The results of token `row` of the tile, number `token` of its image; no tap leaves the image.
    static PTX_FN float2 any(uint32_t tile, const Gates& g, int pair, int of, int row, int token) {
        float2 product = {1.0f, 1.0f};
        const int before = g.before(of);
#pragma unroll 1
        for (int part = 0; part < 3; part++) {
            const T* bias = g.short_bias + size_t(part) * g.c + of;
            float2 sum = {to_float(bias[0]), to_float(bias[1])};
#pragma unroll 1
            for (int j = max(before - token, 0); j < min(g.taps, g.n - token + before); j++) {
                const uint32_t word = ld_shared_u32(at(tile, row - before + j, part * kPairs + pair));
                const float2 w = tap(g, part, of, j);
                sum.x = fmaf(w.x, unpack_lo<bf16>(word), sum.x);
                sum.y = fmaf(w.y, unpack_hi<bf16>(word), sum.y);
            }
            product.x *= sum.x, product.y *= sum.y;
        }
        return product;
    }

    // The tile's results, and its rows of p where they are asked for. kTaps: the filter's, or 0 for any.
    template <int kTaps>
    static PTX_FN void walk(uint32_t tile, const Gates& g, const Gates::Span& s, int channel, int thread) {
        const int pair = thread % kPairs, of = channel + 2 * pair;
        if (of >= g.c) return;
        constexpr int kHeld = kTaps ? kTaps : 1;
        REG(float2, w, [3][kHeld]);
        REG(float2, bias, [3]);
        if constexpr (kTaps > 0) {
#pragma unroll
            for (int part = 0; part < 3; part++) {
                const T* from = g.short_bias + size_t(part) * g.c + of;
                bias[part] = {to_float(from[0]), to_float(from[1])};
#pragma unroll
                for (int j = 0; j < kTaps; j++) w[part][j] = tap(g, part, of, j);
            }
        }
        const int before = g.before(of), behind = g.taps - 1 - before;
#pragma unroll 1
        for (int first = s.first + thread / kPairs * kRun; first < s.end; first += kGroups * kRun) {
            const int count = min(kRun, s.end - first), token = first % g.n, row = first - s.base;
            T* y = g.y + size_t(first) * g.c + of;
            if (kTaps > 0 && count == kRun && token >= before && token + kRun + behind <= g.n) {
                REG(float2, product, [kRun]);
#pragma unroll
                for (int part = 0; part < 3; part++) {
                    REG(uint32_t, window, [kRun + kHeld - 1]);
#pragma unroll
                    for (int i = 0; i < kRun + kHeld - 1; i++)
                        window[i] = ld_shared_u32(at(tile, row - before + i, part * kPairs + pair));
#pragma unroll
                    for (int i = 0; i < kRun; i++) {
                        float2 sum = bias[part];
#pragma unroll
                        for (int j = 0; j < kHeld; j++) {
                            sum.x = fmaf(w[part][j].x, unpack_lo<bf16>(window[i + j]), sum.x);
                            sum.y = fmaf(w[part][j].y, unpack_hi<bf16>(window[i + j]), sum.y);
                        }
                        if (part == 0)
                            product[i] = sum;
                        else
                            product[i].x *= sum.x, product[i].y *= sum.y;
                    }
                }
#pragma unroll
                for (int i = 0; i < kRun; i++) store2(y + size_t(i) * g.c, pack<bf16>(product[i].x, product[i].y));
            } else {
#pragma unroll 1
                for (int i = 0; i < count; i++) {
                    const float2 v = any(tile, g, pair, of, row + i, (first + i) % g.n);
                    store2(y + size_t(i) * g.c, pack<bf16>(v.x, v.y));
                }
            }
            if (!g.p) continue;
#pragma unroll 1
            for (int i = 0; i < 3 * count; i++) {
                const int part = i % 3;
                store2(g.p + (size_t(first + i / 3) * 3 + part) * g.c + of,
                       ld_shared_u32(at(tile, row + i / 3, part * kPairs + pair)));
            }
        }
    }

    static PTX_FN void store2(T* to, uint32_t two) { *reinterpret_cast<uint32_t*>(to) = two; }

    static PTX_FN void results(uint32_t tile, const Gates& g, const Gates::Span& s, int channel, int thread) {
        if (g.taps == 4)
            walk<4>(tile, g, s, channel, thread);
        else if (g.taps == 3)
            walk<3>(tile, g, s, channel, thread);
        else
            walk<0>(tile, g, s, channel, thread);
    }
};

}  // namespace linear
