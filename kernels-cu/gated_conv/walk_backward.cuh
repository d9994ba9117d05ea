// Backward pass of the fused gated convolutions, in one walk: what went forward is computed again a few steps before it
// is needed.
//
// With S and I 1 where the short and the inner filters are there, at the step of time t:
//     k, v                            at t
//     filtered k and v, k·v           at t1 = t - S·after
//     inner result c, q, dy, dc, dq   at t2 = t1 - I·after
//     dk, dv (of the filtered)        at t3 = t2 - I·lead
//     dp of k and v                   at t4 = t3 - S·lead
//     dp of q                         at t5 = t2 - S·lead
// A segment owns the outputs and the products of the filters' gradients at its own times, each exactly once: those of k
// and v at t4, of q at t5, of the inner filter at t2; biases where their gradient is made (t3 and t2). Sums stay in
// registers and leave as one row of partial results for each filter's tap.
#pragma once
#include "walk.cuh"

// Taps from this filter on lie in shared memory: the rings and the sums of wide filters fill the registers.
template <int K, bool kBoth> constexpr int kTapsInShared = K > 4 ? 0 : K == 4 && kBoth ? 3 : 4;

__device__ __forceinline__ void store_floats(uint32_t a, const float (&v)[2]) {
    st_shared_v2(a, make_uint2(__float_as_uint(v[0]), __float_as_uint(v[1])));
}

template <int K, bool kShort, bool kInner>
__device__ __forceinline__ void walk_backward(const T* dy, const T* p, const T* short_weight, const T* short_bias,
                                              const T* inner_weight, const T* inner_bias, T* dp, float* partials, int n,
                                              int c, int lead, int reversed, int length, int segments) {
    constexpr int S = kShort, I = kInner, kAhead = kGroupsAhead<K>, kRow = kThreads * kPair;
    // With both filters, dp of k and v lags 2·(K - 1) tokens: their old values lie in the two slots before.
    constexpr int kSlots = kAhead + 1 + (kShort && kInner ? 2 : 0);
    constexpr bool kBoth = kShort && kInner;
    constexpr int kShared = kTapsInShared<K, kBoth>;
    SMEM_DYNAMIC(smem, 16);
    SmemPlan plan;
    auto region = [&](int bytes) {
        const int start = plan.take(bytes);
        smem_guard(smem, start + bytes);
        return smem_u32(smem) + start;
    };
    const uint32_t ring = region(kSlots * K * 4 * kRow) + threadIdx.x * kPair;
    const uint32_t kept = (kBoth ? region((2 * K + 8) * kThreads * 8) : 0) + threadIdx.x * 8;
    const uint32_t taps = (kShared < 4 ? region((4 - kShared) * K * kThreads * 8) : 0) + threadIdx.x * 8;
    const Segment of(n, c, reversed, length, segments);
    if (of.channel >= c) return;
    const int after = K - 1 - lead;
    // The first step that owns products of k and v, and the one after the last; `warm` steps go before.
    const int own = of.first + (S + I) * (K - 1), end = own + of.count, warm = (2 * S + I) * (K - 1) + I * lead;
    auto take = [&](int time, int slot) {
        const uint32_t to = ring + slot * (4 * K) * kRow;
        const int q_time = time - I * after, dy_time = q_time - S * after;
        if (time + K <= end && dy_time >= 0 && time + K <= n) {
            const int step = of.way * c;
            const T *row = p + of.at(time, 3 * c), *q = row - 3 * int64_t(step) * (I * after), *d = dy + of.at(dy_time, c);
#pragma unroll
            for (int u = 0; u < K; u++) {
                cp_async<kPair>(to + (4 * u) * kRow, q + 3 * u * step);
                cp_async<kPair>(to + (4 * u + 1) * kRow, row + c + 3 * u * step);
                cp_async<kPair>(to + (4 * u + 2) * kRow, row + 2 * c + 3 * u * step);
                cp_async<kPair>(to + (4 * u + 3) * kRow, d + u * step);
            }
        } else {
#pragma unroll
            for (int u = 0; u < K; u++) {
                const bool wanted = time + u < end;
                fetch(to + (4 * u) * kRow, p, of, 3 * c, q_time + u, wanted, n);
                fetch(to + (4 * u + 1) * kRow, p + c, of, 3 * c, time + u, wanted, n);
                fetch(to + (4 * u + 2) * kRow, p + 2 * c, of, 3 * c, time + u, wanted, n);
                fetch(to + (4 * u + 3) * kRow, dy, of, c, dy_time + u, wanted, n);
            }
        }
        cp_async_commit();
    };
    int time = own - warm;
    for (int group = 0; group < kAhead; group++) take(time + group * K, group);

    float w[4][K][2], b[4][2], sum_w[4][K][2], sum_b[4][2];
#pragma unroll
    for (int f = kShort ? 0 : 3; f < 3 + I; f++) {
        float loaded[K][2];
        const size_t row = f < 3 ? size_t(f) * c + of.channel : size_t(of.channel);
        load_filter<K>(loaded, b[f], f < 3 ? short_weight : inner_weight, f < 3 ? short_bias : inner_bias, row);
#pragma unroll
        for (int e = 0; e < 2; e++) sum_b[f][e] = 0.0f;
        if constexpr (kBoth) {
            store_floats(kept + (2 * K + f) * kThreads * 8, b[f]);
            store_floats(kept + (2 * K + 4 + f) * kThreads * 8, sum_b[f]);
        }
#pragma unroll
        for (int j = 0; j < K; j++) {
            sum_w[f][j][0] = sum_w[f][j][1] = 0.0f;
            if (f >= kShared)
                store_floats(taps + ((f - kShared) * K + j) * kThreads * 8, loaded[j]);
            else
                w[f][j][0] = loaded[j][0], w[f][j][1] = loaded[j][1];
        }
    }
    auto tap = [&](int f, int j) {
        if (f >= kShared) {
            const uint2 t = ld_shared_v2(taps + ((f - kShared) * K + j) * kThreads * 8);
            return make_float2(__uint_as_float(t.x), __uint_as_float(t.y));
        } else {
            return make_float2(w[f][j][0], w[f][j][1]);
        }
    };
    // Filter f over a ring whose newest value is at u, and what goes back through it.
    auto forth = [&](float(&r)[2], int f, const float(&from)[K][2], int u) {
        r[0] = b[f][0], r[1] = b[f][1];
        if constexpr (kBoth) load_pair<float>(r, kept + (2 * K + f) * kThreads * 8);
#pragma unroll
        for (int j = 0; j < K; j++) {
            const float2 t = tap(f, j);
            r[0] = fmaf(t.x, from[(u + 1 + j) % K][0], r[0]), r[1] = fmaf(t.y, from[(u + 1 + j) % K][1], r[1]);
        }
    };
    auto back = [&](float(&r)[2], int f, const float(&from)[K][2], int u) {
        r[0] = r[1] = 0.0f;
#pragma unroll
        for (int j = 0; j < K; j++) {
            const float2 t = tap(f, j);
            r[0] = fmaf(t.x, from[(u - j + K) % K][0], r[0]), r[1] = fmaf(t.y, from[(u - j + K) % K][1], r[1]);
        }
    };

    // Adds the products of an input with the gradients, newest at u, that it had a part in.
    auto products = [](float(&sum)[K][2], const float(&of)[2], const float(&ring)[K][2], int u) {
#pragma unroll
        for (int j = 0; j < K; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) sum[j][e] = fmaf(of[e], ring[(u - j + K) % K][e], sum[j][e]);
    };

    // Raw values, k·v, gradients of the inner result, gradients of the filtered q, k, v.
    float x[3][K][2], kv[K][2], dc[K][2], g[3][K][2];
#pragma unroll
    for (int j = 0; j < K; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            kv[j][e] = dc[j][e] = 0.0f;
            x[0][j][e] = x[1][j][e] = x[2][j][e] = g[0][j][e] = g[1][j][e] = g[2][j][e] = 0.0f;
        }

    auto walk = [&]<bool kMasked>(int slot) {
        const uint32_t from = ring + slot * (4 * K) * kRow;
        const int step = of.way * 3 * c;
        T* out_k = dp + of.at(time - (S + I) * (K - 1), 3 * c);
        T* out_q = out_k + int64_t(step) * (I * lead);
        // Whether the segment owns what is made `before` steps early.
        auto owns = [&](int u, int before) {
            const int at = time + u + before;
            return !kMasked || (at >= own && at < end);
        };
#pragma unroll
        for (int u = 0; u < K; u++) {
            // Filtered k and v, their product, the inner result.
            float now[2][2], then[2][2], c_at[2], g_c[2], g_q[2];
#pragma unroll
            for (int s = 1; s < 3; s++) {
                load_pair<T>(x[s][u], from + (4 * u + s) * kRow);
                now[s - 1][0] = x[s][u][0], now[s - 1][1] = x[s][u][1];
                if constexpr (kShort) forth(now[s - 1], s, x[s], u);
            }
            if (kMasked && unsigned(time + u - S * after) >= unsigned(n)) now[0][0] = now[0][1] = now[1][0] = now[1][1] = 0.0f;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                c_at[e] = now[0][e] * now[1][e];
                then[0][e] = kInner ? x[1][(u + 1) % K][e] : now[0][e];
                then[1][e] = kInner ? x[2][(u + 1) % K][e] : now[1][e];
            }
            if constexpr (kInner) {
                kv[u][0] = c_at[0], kv[u][1] = c_at[1];
                forth(c_at, 3, kv, u);
            }
            if constexpr (kBoth) {
                // Filtered k and v wait K - 1 steps in shared memory; what the first steps read is not used.
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    load_pair<float>(then[s], kept + (2 * ((u + 1) % K) + s) * kThreads * 8);
                    store_floats(kept + (2 * u + s) * kThreads * 8, now[s]);
                }
            }
            // The gate, and the way back of q.
            load_pair<T>(g_q, from + (4 * u + 3) * kRow);
            load_pair<T>(x[0][u], from + 4 * u * kRow);
            g_c[0] = x[0][u][0], g_c[1] = x[0][u][1];
            if constexpr (kShort) forth(g_c, 0, x[0], u);
#pragma unroll
            for (int e = 0; e < 2; e++) g_c[e] *= g_q[e], g_q[e] *= c_at[e];
            if (kInner && owns(u, (S + I) * lead)) {
#pragma unroll
                for (int j = 0; j < K; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        sum_w[3][j][e] = fmaf(g_c[e], kv[(u + 1 + j) % K][e], sum_w[3][j][e]);
            }
            if constexpr (kShort) {
                g[0][u][0] = g_q[0], g[0][u][1] = g_q[1];
                if (owns(u, I * lead)) products(sum_w[0], x[0][(u + 1) % K], g[0], u);
                back(g_q, 0, g[0], u);
            }
            // dp is never null; the question keeps the assembler from moving work across it and running out of registers.
            if (dp && owns(u, I * lead)) store_pair(out_q + u * step, g_q);
            // The way back of k and v.
            if constexpr (kInner) {
                dc[u][0] = g_c[0], dc[u][1] = g_c[1];
                back(g_c, 3, dc, u);
            }
#pragma unroll
            for (int s = 1; s < 3; s++) {
                float r[2] = {g_c[0] * then[2 - s][0], g_c[1] * then[2 - s][1]};
                if constexpr (kShort) {
                    g[s][u][0] = r[0], g[s][u][1] = r[1];
                    if (owns(u, 0)) {
                        float old[2] = {x[s][(u + 1) % K][0], x[s][(u + 1) % K][1]};
                        if constexpr (kInner) {
                            // 2·(K - 1) steps ago: step u + 2 of two groups before.
                            const int away = slot - (u + 2 < K ? 2 : 1), of_slot = away < 0 ? away + kSlots : away;
                            load_pair<T>(old, ring + ((of_slot * K + (u + 2) % K) * 4 + s) * kRow);
                        }
                        products(sum_w[s], old, g[s], u);
                    }
                    back(r, s, g[s], u);
                }
                if (owns(u, 0)) store_pair(out_k + s * c + u * step, r);
            }
        }
        // The gradients of this group are in the rings: those of the biases.
#pragma unroll
        for (int f = kShort ? 0 : 3; f < 3 + I; f++) {
            if constexpr (kBoth) load_pair<float>(sum_b[f], kept + (2 * K + 4 + f) * kThreads * 8);
#pragma unroll
            for (int u = 0; u < K; u++) {
                if (!owns(u, (f == 1 || f == 2 ? S : S + I) * lead)) continue;
#pragma unroll
                for (int e = 0; e < 2; e++) sum_b[f][e] += f < 3 ? g[f < 3 ? f : 0][u][e] : dc[u][e];
            }
            if constexpr (kBoth) store_floats(kept + (2 * K + 4 + f) * kThreads * 8, sum_b[f]);
        }
    };

    for (int slot = 0; time < end; time += K) {
        take(time + kAhead * K, slot + kAhead >= kSlots ? slot + kAhead - kSlots : slot + kAhead);
        cp_async_wait<kAhead>();
        if (time >= own && time + K <= end - (S + I) * lead && time + K - S * after <= n)
            walk.template operator()<false>(slot);
        else
            walk.template operator()<true>(slot);
        slot = slot + 1 == kSlots ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    if (!partials) return;
    if constexpr (kBoth) {
#pragma unroll
        for (int f = 0; f < 4; f++) load_pair<float>(sum_b[f], kept + (2 * K + 4 + f) * kThreads * 8);
    }
    constexpr int kRows = (3 * S + I) * (K + 1);
#pragma unroll
    for (int f = kShort ? 0 : 3; f < 3 + I; f++)
#pragma unroll
        for (int j = 0; j <= K; j++) {
            const int row = (f - (kShort ? 0 : 3)) * (K + 1) + j;
            float* to = partials + (size_t(of.group) * kRows + row) * c + of.channel;
            *reinterpret_cast<float2*>(to) = j < K ? make_float2(sum_w[f][j < K ? j : 0][0], sum_w[f][j < K ? j : 0][1])
                                                   : make_float2(sum_b[f][0], sum_b[f][1]);
        }
}
