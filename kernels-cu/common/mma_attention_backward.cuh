// Softmax attention on the tensor cores by mma.sync: the backward pass of the attention family; see `mma_attention.cuh`.
//
// Two kernels, so that every sum has one owner and one order and nothing is added by atomics: dq by tiles of queries
// (and delta = dy·y on the way), then dk and dv by tiles of keys, whose scores are computed transposed, a key a row, so
// that weights and slopes are, packed, the left operands of the products with dy and q. Seven products, where kernels
// that add dq by atomics need five. Scores live for 16 columns only: the log-sums are known.
#pragma once
#include "mma_attention.cuh"

namespace ptx {

// Runs of 16 columns whose scores are under way together: what the registers of the blocks on a multiprocessor allow.
template <class Tile> constexpr int kSlopesAtOnce = Tile::kE < 64 ? 2 : 1;

// The dot products of the rows of two operands, for every thread of a row.
template <class E, int kE> PTX_FN void row_dots(float (&sum)[2], const RowFragment<kE>& a, const RowFragment<kE>& b) {
    sum[0] = sum[1] = 0.0f;
    const auto add = [&](float& to, uint32_t x, uint32_t y) {
        to = fmaf(unpack_lo<E>(x), unpack_lo<E>(y), fmaf(unpack_hi<E>(x), unpack_hi<E>(y), to));
    };
#pragma unroll
    for (int s = 0; s < kE / 16; s++) {
#pragma unroll
        for (int i = 0; i < 4; i++) add(sum[i % 2], a.step[s][i], b.step[s][i]);
    }
    if constexpr (kE % 16 != 0) add(sum[0], a.rest[0], b.rest[0]), add(sum[1], a.rest[1], b.rest[1]);
    sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
}

// ---- dq ----

template <class Tile> struct QuerySlopes {
    RowFragment<Tile::kE> q[Tile::kM], dy[Tile::kM];
    float acc[Tile::kM][Tile::kColumns][4];
    // Of rows g and g + 8: the log-sum in base two, and delta.
    float base[Tile::kM][2], fall[Tile::kM][2];
    float c;
};

// The warp's queries from row0 on; writes their delta.
template <class Tile, class E>
PTX_FN void begin(QuerySlopes<Tile>& w, Vectors<const E> q, Vectors<const E> y, Vectors<const E> dy, const float* lse,
                  float* delta, int row0, int row_end, int e, float scale) {
    w.c = scale * kLog2E;
#pragma unroll
    for (int m = 0; m < Tile::kM; m++) {
        RowFragment<Tile::kE> of_y;
        load_fragment(of_y, y, row0 + 16 * m, row_end, e);
        load_fragment(w.dy[m], dy, row0 + 16 * m, row_end, e);
        load_fragment(w.q[m], q, row0 + 16 * m, row_end, e);
        row_dots<E>(w.fall[m], of_y, w.dy[m]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = row0 + 16 * m + 8 * r + int(threadIdx.x % 32) / 4;
            w.base[m][r] = row < row_end ? lse[row] * kLog2E : 0.0f;
            if (threadIdx.x % 4 == 0 && row < row_end) delta[row] = w.fall[m][r];
        }
    }
    clear_blocks(w.acc);
}

// acc += ds of keys from `key` on times those keys.
template <bool kMasked, class Tile, class E, class Keys, class Source>
PTX_FN void dq_step(QuerySlopes<Tile>& w, const Keys& keys, const Source& k, const Source& v, int row0, int row_end,
                    int key, int key_end) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll kSlopesAtOnce<Tile>
    for (int i = 0; i < Tile::kKeys / 16; i++) {
        const int first = key + 16 * i;
        if (kMasked && cover_of(keys, row0, row_end, first, min(first + 16, key_end)) == Cover::None) continue;
        REG(float, s, [Tile::kM][2][4]);
        REG(float, dp, [Tile::kM][2][4]);
        clear_blocks(s), clear_blocks(dp);
        multiply_rows<Tile, E>(s, w.q, k, 16 * i);
        multiply_rows<Tile, E>(dp, w.dy, v, 16 * i);
#pragma unroll
        for (int m = 0; m < Tile::kM; m++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const auto query = keys.query(row0 + 16 * m + 8 * r + g);
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const int j = first + x / 2 * 8 + 2 * t + x % 2;
                    const bool seen = !kMasked || (j < key_end && keys.sees(query, keys.key(j)));
                    const float bias = seen ? bias_of(keys, query, keys.key(j)) * kLog2E : 0.0f;
                    float& score = s[m][x / 2][2 * r + x % 2];
                    const float p = ex2(fmaf(score, w.c, bias - w.base[m][r]));
                    score = seen ? p * (dp[m][x / 2][2 * r + x % 2] - w.fall[m][r]) : 0.0f;
                }
            }
        }
        multiply_columns<Tile, E>(w.acc, s, k, 16 * i);
    }
}

template <class Tile, class E, class Keys, class Source>
PTX_FN void dq_tile(QuerySlopes<Tile>& w, const Keys& keys, const Source& k, const Source& v, int row0, int row_end,
                    int key, int key_end) {
    const int end = min(key + Tile::kKeys, key_end);
    const Cover cover = cover_of(keys, row0, row_end, key, end);
    if (cover == Cover::None) return;
    if (cover == Cover::All && end == key + Tile::kKeys)
        dq_step<false, Tile, E>(w, keys, k, v, row0, row_end, key, end);
    else
        dq_step<true, Tile, E>(w, keys, k, v, row0, row_end, key, end);
}

// dq and delta of queries row0 .. row0 + kRows: dq_i = scale·sum_j ds_ij·k_j. Shared memory: four regions of kBytes.
template <class Tile, class E, class Keys>
PTX_FN void mma_dq(const Keys& keys, Vectors<const E> q, Vectors<const E> k, Vectors<const E> v, Vectors<const E> y,
                   Vectors<const E> dy, Vectors<E> dq, const float* lse, float* delta, int n, int row0, int e,
                   float scale) {
    if constexpr (sizeof(E) == 2) {
        guard_stages<Tile>(4);
        const int row_end = min(n, row0 + Tile::kRows), warp = threadIdx.x / 32;
        const int my_row = row0 + warp * Tile::kWarpRows, my_end = min(row_end, my_row + Tile::kWarpRows);
        const Span span = keys.keys(row0, row_end);
        wait_for_previous();
        if (span.first < span.end) {
            fetch_rows<Tile>(stage_of<Tile>(0), k, span.first, span.end, e);
            fetch_rows<Tile>(stage_of<Tile>(1), v, span.first, span.end, e);
        }
        cp_async_commit();
        QuerySlopes<Tile> w;
        begin<Tile>(w, q, y, dy, lse, delta, my_row, my_end, e, scale);
        int stage = 0;
        for (int key = span.first; key < span.end; key += Tile::kKeys, stage ^= 2) {
            cp_async_wait<0>();
            __syncthreads();
            const int next = key + Tile::kKeys;
            if (next < span.end) {
                fetch_rows<Tile>(stage_of<Tile>(2 - stage), k, next, span.end, e);
                fetch_rows<Tile>(stage_of<Tile>(3 - stage), v, next, span.end, e);
            }
            cp_async_commit();
            const Stage<Tile> ks{stage_of<Tile>(stage)}, vs{stage_of<Tile>(stage + 1)};
            dq_tile<Tile, E>(w, keys, ks, vs, my_row, my_end, key, span.end);
        }
        start_next();
        cp_async_wait<0>();
        __syncthreads();
        float factor[Tile::kM][2];
#pragma unroll
        for (int m = 0; m < Tile::kM; m++) factor[m][0] = factor[m][1] = scale;
        put_blocks<Tile>(w.acc, factor, own_rows<Tile>(0), dq, my_row, my_end, my_end, e);
    }
}

// ---- dk and dv ----

// The widest heads leave no registers for their keys and values: those are read from shared memory for each product.
template <class Tile> constexpr bool kSharedRows = Tile::kE > 96;

// d[0][b] += 16 rows of shared memory · rows row + 8b .. of the stage, two blocks of eight. `left`: the lane's address.
template <class Tile, class E, class Source>
PTX_FN void multiply_shared(float (&d)[1][2][4], uint32_t left, const Source& source, int row) {
    static_assert(!Tile::kRest, "steps of 16 columns");
    // Not all at once: loads that run ahead would cost the registers of the sums.
#pragma unroll 2
    for (int s = 0; s < Tile::kSteps; s++) {
        uint32_t a[4], r[4];
        ldmatrix_x4(a, left + 32 * s);
        ldmatrix_x4(r, source.rows(row, 16 * s));
        mma_m16n8k16<E>(d[0][0], a, r[0], r[1]);
        mma_m16n8k16<E>(d[0][1], a, r[2], r[3]);
    }
}

template <class Tile> struct KeySlopes {
    RowFragment<Tile::kE> k[1], v[1];
    // The lane's addresses of keys and values in shared memory, where they are there.
    uint32_t k_at, v_at;
    float dk[1][Tile::kColumns][4], dv[1][Tile::kColumns][4];
    float c;
};

template <class Tile, class E>
PTX_FN void begin(KeySlopes<Tile>& w, Vectors<const E> k, Vectors<const E> v, int row0, int row_end, int e, float scale) {
    static_assert(Tile::kM == 1, "two sums of 16 rows a warp");
    w.c = scale * kLog2E;
    if constexpr (!kSharedRows<Tile>) {
        load_fragment(w.k[0], k, row0, row_end, e);
        load_fragment(w.v[0], v, row0, row_end, e);
    }
    clear_blocks(w.dk), clear_blocks(w.dv);
}

// What queries from `query` on add to the warp's keys from row0 on. `statistics`: the log-sums of the stage's queries,
// kKeys floats, and their deltas behind.
template <bool kMasked, class Tile, class E, class Keys, class Source>
PTX_FN void dkdv_step(KeySlopes<Tile>& w, const Keys& keys, const Source& q, const Source& dy, uint32_t statistics,
                      int row0, int row_end, int query, int query_end) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll kSlopesAtOnce<Tile>
    for (int i = 0; i < Tile::kKeys / 16; i++) {
        const int first = query + 16 * i;
        if (kMasked && cover_of(keys, first, min(first + 16, query_end), row0, row_end) == Cover::None) continue;
        REG(float, s, [1][2][4]);
        REG(float, dp, [1][2][4]);
        clear_blocks(s), clear_blocks(dp);
        if constexpr (kSharedRows<Tile>) {
            multiply_shared<Tile, E>(s, w.k_at, q, 16 * i);
            multiply_shared<Tile, E>(dp, w.v_at, dy, 16 * i);
        } else {
            multiply_rows<Tile, E>(s, w.k, q, 16 * i);
            multiply_rows<Tile, E>(dp, w.v, dy, 16 * i);
        }
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const uint32_t at = statistics + (16 * i + 8 * b + 2 * t) * 4;
            const uint2 sums = ld_shared_v2(at), deltas = ld_shared_v2(at + Tile::kKeys * 4);
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const int at_query = first + 8 * b + 2 * t + x;
                const auto place = keys.query(at_query);
                const float base = __uint_as_float(x ? sums.y : sums.x) * kLog2E;
                const float fall = __uint_as_float(x ? deltas.y : deltas.x);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int key = row0 + 8 * r + g;
                    const bool seen =
                        !kMasked || (at_query < query_end && key < row_end && keys.sees(place, keys.key(key)));
                    const float bias = seen ? bias_of(keys, place, keys.key(key)) * kLog2E : 0.0f;
                    float &p = s[0][b][2 * r + x], &slope = dp[0][b][2 * r + x];
                    p = seen ? ex2(fmaf(p, w.c, bias - base)) : 0.0f;
                    slope = seen ? p * (slope - fall) : 0.0f;
                }
            }
        }
        multiply_columns<Tile, E>(w.dv, s, dy, 16 * i);
        multiply_columns<Tile, E>(w.dk, dp, q, 16 * i);
    }
}

template <class Tile, class E, class Keys, class Source>
PTX_FN void dkdv_tile(KeySlopes<Tile>& w, const Keys& keys, const Source& q, const Source& dy, uint32_t statistics,
                      int row0, int row_end, int query, int query_end) {
    const int end = min(query + Tile::kKeys, query_end);
    const Cover cover = cover_of(keys, query, end, row0, row_end);
    if (cover == Cover::None) return;
    if (cover == Cover::All && end == query + Tile::kKeys && row_end == row0 + Tile::kWarpRows)
        dkdv_step<false, Tile, E>(w, keys, q, dy, statistics, row0, row_end, query, end);
    else
        dkdv_step<true, Tile, E>(w, keys, q, dy, statistics, row0, row_end, query, end);
}

// Starts the copy of the log-sums and deltas of queries first .. first + kKeys; zeros from `end` on.
template <class Tile>
PTX_FN void fetch_statistics(uint32_t to, const float* lse, const float* delta, int first, int end) {
    static_assert(2 * Tile::kKeys <= Tile::kThreads, "a float a thread");
    const int i = threadIdx.x;
    if (i >= 2 * Tile::kKeys) return;
    const int query = first + i % Tile::kKeys;
    cp_async<4>(to + i * 4, (i < Tile::kKeys ? lse : delta) + min(query, end - 1), query < end ? 4 : 0);
}

// dk and dv of keys row0 .. row0 + kRows of m: dv_j = sum_i p_ij·dy_i, dk_j = scale·sum_i ds_ij·q_i. Keys that do not
// count get zeros. Shared memory: four regions of kBytes.
template <class Tile, class E, class Keys>
PTX_FN void mma_dkdv(const Keys& keys, Vectors<const E> q, Vectors<const E> k, Vectors<const E> v, Vectors<const E> dy,
                     Vectors<E> dk, Vectors<E> dv, const float* lse, const float* delta, int m, int row0, int e,
                     float scale) {
    if constexpr (sizeof(E) == 2) {
        SMEM_ARRAY(float4, statistics, Tile::kKeys);
        SMEM_ARRAY(float4, key_rows, kSharedRows<Tile> ? Tile::kBytes / 16 : 1);
        SMEM_ARRAY(float4, value_rows, kSharedRows<Tile> ? Tile::kBytes / 16 : 1);
        guard_stages<Tile>(4);
        static_assert(Tile::kRows == Tile::kKeys, "keys of a block fit where a stage does");
        const int row_end = min(keys.limit, row0 + Tile::kRows), warp = threadIdx.x / 32;
        const int my_row = row0 + warp * Tile::kWarpRows, my_end = min(row_end, my_row + Tile::kWarpRows);
        const uint32_t stats = smem_u32(statistics);
        Span span = {0, 0};
        if (row0 < row_end) span = keys.queries(row0, row_end);
        const auto fetch = [&](int stage, int first) {
            if (first < span.end) {
                fetch_rows<Tile>(stage_of<Tile>(stage), q, first, span.end, e);
                fetch_rows<Tile>(stage_of<Tile>(stage + 1), dy, first, span.end, e);
                fetch_statistics<Tile>(stats + stage * Tile::kKeys * 4, lse, delta, first, span.end);
            }
            cp_async_commit();
        };
        wait_for_previous();
        KeySlopes<Tile> w;
        if constexpr (kSharedRows<Tile>) {
            fetch_rows<Tile>(smem_u32(key_rows), k, row0, row_end, e);
            fetch_rows<Tile>(smem_u32(value_rows), v, row0, row_end, e);
            w.k_at = Stage<Tile>{smem_u32(key_rows)}.columns(warp * 16, 0);
            w.v_at = Stage<Tile>{smem_u32(value_rows)}.columns(warp * 16, 0);
        }
        fetch(0, span.first);
        begin<Tile>(w, k, v, my_row, my_end, e, scale);
        int stage = 0;
        for (int query = span.first; query < span.end; query += Tile::kKeys, stage ^= 2) {
            cp_async_wait<0>();
            __syncthreads();
            fetch(2 - stage, query + Tile::kKeys);
            const Stage<Tile> qs{stage_of<Tile>(stage)}, dys{stage_of<Tile>(stage + 1)};
            dkdv_tile<Tile, E>(w, keys, qs, dys, stats + stage * Tile::kKeys * 4, my_row, my_end, query, span.end);
        }
        start_next();
        cp_async_wait<0>();
        __syncthreads();
        const int last = min(m, my_row + Tile::kWarpRows);
        const float one[1][2] = {{1.0f, 1.0f}}, factor[1][2] = {{scale, scale}};
        put_blocks<Tile>(w.dv, one, own_rows<Tile>(0), dv, my_row, my_end, last, e);
        put_blocks<Tile>(w.dk, factor, own_rows<Tile>(0), dk, my_row, my_end, last, e);
    }
}

// The two kernels of an operator whose q, k and v come from one packed projection [B, N, 3, H, E].
template <class Tile, class E, class Keys>
PTX_FN void mma_packed_dq(const Keys& keys, const E* dy, const E* qkv, const E* y, const float* lse, float* delta,
                          E* dqkv, int n, int h, int e, float scale) {
    const Place at = place_of_tile<Tile>(n, h);
    const size_t row = (size_t(at.sample) * h + at.head) * n;
    mma_dq<Tile>(keys, head_part(qkv, at, 0, 3, n, h, e), head_part(qkv, at, 1, 3, n, h, e),
                 head_part(qkv, at, 2, 3, n, h, e), head_part(y, at, 0, 1, n, h, e), head_part(dy, at, 0, 1, n, h, e),
                 head_part(dqkv, at, 0, 3, n, h, e), lse + row, delta + row, n, at.row0, e, scale);
}
template <class Tile, class E, class Keys>
PTX_FN void mma_packed_dkdv(const Keys& keys, const E* dy, const E* qkv, const float* lse, const float* delta, E* dqkv,
                            int n, int h, int e, float scale) {
    const Place at = place_of_tile<Tile>(n, h);
    const size_t row = (size_t(at.sample) * h + at.head) * n;
    mma_dkdv<Tile>(keys, head_part(qkv, at, 0, 3, n, h, e), head_part(qkv, at, 1, 3, n, h, e),
                   head_part(qkv, at, 2, 3, n, h, e), head_part(dy, at, 0, 1, n, h, e),
                   head_part(dqkv, at, 1, 3, n, h, e), head_part(dqkv, at, 2, 3, n, h, e), lse + row, delta + row, n,
                   at.row0, e, scale);
}

}  // namespace ptx
