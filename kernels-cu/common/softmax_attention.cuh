// Softmax attention on the CUDA cores: the device code of the attention family. An operator brings which keys a query
// sees; the forward pass and the two kernels of the backward pass are the same for all.
//
// A block of 128 threads owns 64 queries of a head (64 keys in `softmax_dkdv`) and goes through the keys (queries) that
// any of them meets, 32 at a time. Scores come from tile products over the head's width; a thread holds 4×4 of them,
// eight neighbouring threads a row, so row maxima and sums are three shuffles. Probabilities go through shared memory to
// the second product, whose results stay in registers: up to kChunks·32 columns of the head, wider heads take a block
// for each group of columns, which computes its scores again. Nothing is added by atomics: every result has one owner, which adds in the order of the tiles.
//
// What an operator brings, `Keys`:
//     int limit;                                keys that exist: later ones are never read
//     Span keys(int first, int end)             a range that holds every key which queries first..end see
//     Span queries(int first, int end)          a range that holds every query which sees one of the keys first..end
//     Query query(int i), Key key(int j)        what `sees` needs of them
//     bool sees(Query, Key)
//     float bias(Query, Key)                    added to the scaled score of a pair that is seen; none where it is left out
#pragma once
#include "tile.cuh"
#include "vector.cuh"

namespace ptx {

struct Span {
    int first, end;
};

// Where a head's vectors lie: the address of token 0, and elements from a token to the next.
template <class E> struct Vectors {
    E* at;
    size_t stride;
};

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kRowTile = 64, kColumnTile = 32;
using Scores = Tile<kRowTile, kColumnTile, 16>;
using Weighted = Tile<kRowTile, kColumnTile, 32>;
// float4 of probabilities, and of the vectors that they weigh.
constexpr int kSizeWeights = Weighted::kSizeA, kSizeValues = Weighted::kSizeB;

// The sum or maximum over the eight threads that share rows.
PTX_FN float row_max(float v) {
#pragma unroll
    for (int o = 4; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(kFullMask, v, o));
    return v;
}
PTX_FN float row_sum(float v) {
#pragma unroll
    for (int o = 4; o; o >>= 1) v += __shfl_xor_sync(kFullMask, v, o);
    return v;
}

// exp(scale·s - base). The difference is taken before log2(e) comes in: a product of large scores would lose the digits
// that it needs.
PTX_FN float weight(float s, float scale, float base) { return ex2(fmaf(s, scale, -base) * kLog2E); }

// What the operator adds to the scaled score of a pair.
template <class Keys, class Query, class Key> PTX_FN float bias_of(const Keys& keys, Query query, Key key) {
    if constexpr (requires { keys.bias(query, key); })
        return keys.bias(query, key);
    else
        return 0.0f;
}

// s[i][j] = row_i·column_j over the head's width.
template <class E>
PTX_FN void dots(float (&s)[4][4], float* a, float* b, Vectors<const E> rows, int row0, int row_end,
                 Vectors<const E> columns, int column0, int column_end, int width) {
    Scores::clear(s);
    tile_product<Scores, true, true>(
        s, a, b, 0, width,
        [&](int i, int k) { return row0 + i < row_end ? to_float(rows.at[(row0 + i) * rows.stride + k]) : 0.0f; },
        [&](int j, int k) {
            return column0 + j < column_end ? to_float(columns.at[(column0 + j) * columns.stride + k]) : 0.0f;
        });
}

// The weights of a thread's 4×4 pairs into shared memory, [column][row].
PTX_FN void put_weights(float* to, const float (&p)[4][4]) {
#pragma unroll
    for (int j = 0; j < 4; j++)
        *reinterpret_cast<float4*>(to + Weighted::column(j) * (kRowTile + 4) + Weighted::row(0)) =
            make_float4(p[0][j], p[1][j], p[2][j], p[3][j]);
}

// acc[c] += weights · (columns first .. first + 32·kChunks of the vectors from column0 on).
template <int kChunks, class E>
PTX_FN void weigh(float (&acc)[kChunks][4][4], const float* weights, float* b, Vectors<const E> vectors, int column0,
                  int column_end, int first, int width) {
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
        const int start = first + 32 * c;
        if (start >= width) break;
        __syncthreads();
        tile_fill<kColumnTile, 32, false>(b, [&](int i, int k) {
            return column0 + k < column_end && start + i < width
                       ? to_float(vectors.at[(column0 + k) * vectors.stride + start + i])
                       : 0.0f;
        });
        __syncthreads();
        Weighted::multiply(acc[c], weights, b);
    }
}

template <int kChunks> PTX_FN void clear_chunks(float (&acc)[kChunks][4][4]) {
#pragma unroll
    for (int c = 0; c < kChunks; c++) Weighted::clear(acc[c]);
}

// A thread's results, rows times `factor`, to columns first .. of the vectors from row0 on.
template <int kChunks, class E>
PTX_FN void put_rows(const float (&acc)[kChunks][4][4], const float (&factor)[4], Vectors<E> to, int row0, int row_end,
                     int first, int width) {
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = row0 + Weighted::row(i);
            if (row >= row_end) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = first + 32 * c + Weighted::column(j);
                if (column < width) to.at[row * to.stride + column] = from_float<E>(acc[c][i][j] * factor[i]);
            }
        }
    }
}

// y of queries row0 .. row0 + 64, columns `first` and on; lse [n] with the first columns. No key: y = 0, lse = -inf.
template <int kChunks, class E, class Keys>
PTX_FN void softmax_forward(const Keys& keys, Vectors<const E> q, Vectors<const E> k, Vectors<const E> v, Vectors<E> y,
                            float* lse, int n, int row0, int first, int width, float scale) {
    SMEM_ARRAY(float4, a_tile, Scores::kSizeA);
    SMEM_ARRAY(float4, b_tile, Scores::kSizeB);
    SMEM_ARRAY(float4, weight_tile, kSizeWeights);
    SMEM_ARRAY(float4, value_tile, kSizeValues);
    float *a = reinterpret_cast<float*>(a_tile), *b = reinterpret_cast<float*>(b_tile);
    float *weights = reinterpret_cast<float*>(weight_tile), *values = reinterpret_cast<float*>(value_tile);
    const int row_end = min(n, row0 + kRowTile);
    const Span span = keys.keys(row0, row_end);
    REG(float, acc, [kChunks][4][4]);
    clear_chunks(acc);
    float top[4], sum[4];
#pragma unroll
    for (int i = 0; i < 4; i++) top[i] = -INFINITY, sum[i] = 0.0f;
    for (int column0 = span.first; column0 < span.end; column0 += kColumnTile) {
        float s[4][4];
        dots(s, a, b, q, row0, row_end, k, column0, span.end, width);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const auto query = keys.query(row0 + Scores::row(i));
            float most = top[i], bias[4];
            bool seen[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int key = column0 + Scores::column(j);
                seen[j] = key < span.end && keys.sees(query, keys.key(key));
                bias[j] = seen[j] ? bias_of(keys, query, keys.key(key)) : 0.0f;
                if (seen[j]) most = fmaxf(most, fmaf(s[i][j], scale, bias[j]));
            }
            most = row_max(most);
            // Before the first key that counts, nothing may be subtracted from minus infinity.
            const float base = most == -INFINITY ? 0.0f : most, fall = ex2((top[i] - base) * kLog2E);
            top[i] = most, sum[i] *= fall;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = seen[j] ? weight(s[i][j], scale, base - bias[j]) : 0.0f;
                sum[i] += s[i][j];
            }
#pragma unroll
            for (int c = 0; c < kChunks; c++) {
#pragma unroll
                for (int j = 0; j < 4; j++) acc[c][i][j] *= fall;
            }
        }
        put_weights(weights, s);
        weigh<kChunks>(acc, weights, values, v, column0, span.end, first, width);
    }
    float factor[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float total = row_sum(sum[i]);
        factor[i] = total > 0.0f ? 1.0f / total : total;
        const int row = row0 + Weighted::row(i);
        if (first == 0 && threadIdx.x % 8 == 0 && row < row_end) lse[row] = fmaf(lg2(total), kLn2, top[i]);
    }
    put_rows<kChunks>(acc, factor, y, row0, row_end, first, width);
}

// delta[i] = dy_i·y_i for every row, a warp each: rows = B·N·H in the order of y; delta in that of lse, [B, H, N].
template <class E>
PTX_FN void softmax_delta(const E* y, const E* dy, float* delta, size_t rows, int n, int h, int width) {
    const int lane = threadIdx.x % 32;
    for (size_t row = size_t(blockIdx.x) * 4 + threadIdx.x / 32; row < rows; row += size_t(gridDim.x) * 4) {
        float sum = 0.0f;
        for (int i = lane; i < width; i += 32) sum = fmaf(to_float(y[row * width + i]), to_float(dy[row * width + i]), sum);
        sum = warp_sum(sum);
        const size_t token = row / h;
        if (lane == 0) delta[(token / n * h + row % h) * n + token % n] = sum;
    }
}

// s[i][j] = ds of queries from row0 on and keys from column0 on: p·(dy·v - delta), 0 for pairs that are not seen. `base`
// and `fall` are the log-sums and deltas of a thread's queries.
template <class E, class Keys>
PTX_FN void slopes_of(float (&s)[4][4], const Keys& keys, float* a, float* b, Vectors<const E> q, Vectors<const E> k,
                      Vectors<const E> v, Vectors<const E> dy, const float (&base)[4], const float (&fall)[4], int row0,
                      int row_end, int column0, int column_end, int width, float scale) {
    float dp[4][4];
    dots(s, a, b, q, row0, row_end, k, column0, column_end, width);
    dots(dp, a, b, dy, row0, row_end, v, column0, column_end, width);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const auto query = keys.query(row0 + Scores::row(i));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int key = column0 + Scores::column(j);
            const bool seen = key < column_end && keys.sees(query, keys.key(key));
            const float bias = seen ? bias_of(keys, query, keys.key(key)) : 0.0f;
            s[i][j] = seen ? weight(s[i][j], scale, base[i] - bias) * (dp[i][j] - fall[i]) : 0.0f;
        }
    }
}

// dq of queries row0 .. row0 + 64, columns `first` and on: dq_i = scale·sum_j ds_ij·k_j, ds = p·(dy·v - delta).
template <int kChunks, class E, class Keys>
PTX_FN void softmax_dq(const Keys& keys, Vectors<const E> q, Vectors<const E> k, Vectors<const E> v, Vectors<const E> dy,
                       Vectors<E> dq, const float* lse, const float* delta, int n, int row0, int first, int width,
                       float scale) {
    SMEM_ARRAY(float4, a_tile, Scores::kSizeA);
    SMEM_ARRAY(float4, b_tile, Scores::kSizeB);
    SMEM_ARRAY(float4, weight_tile, kSizeWeights);
    SMEM_ARRAY(float4, value_tile, kSizeValues);
    float *a = reinterpret_cast<float*>(a_tile), *b = reinterpret_cast<float*>(b_tile);
    float *weights = reinterpret_cast<float*>(weight_tile), *values = reinterpret_cast<float*>(value_tile);
    const int row_end = min(n, row0 + kRowTile);
    const Span span = keys.keys(row0, row_end);
    REG(float, acc, [kChunks][4][4]);
    clear_chunks(acc);
    float base[4], fall[4], factor[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = min(row0 + Scores::row(i), n - 1);
        base[i] = lse[row], fall[i] = delta[row], factor[i] = scale;
    }
    for (int column0 = span.first; column0 < span.end; column0 += kColumnTile) {
        float s[4][4];
        slopes_of(s, keys, a, b, q, k, v, dy, base, fall, row0, row_end, column0, span.end, width, scale);
        put_weights(weights, s);
        weigh<kChunks>(acc, weights, values, k, column0, span.end, first, width);
    }
    put_rows<kChunks>(acc, factor, dq, row0, row_end, first, width);
}

// dk and dv of keys row0 .. row0 + 64 of m: dv_j = sum_i p_ij·dy_i, dk_j = scale·sum_i ds_ij·q_i. Keys that do not count
// get zeros.
template <int kChunks, class E, class Keys>
PTX_FN void softmax_dkdv(const Keys& keys, Vectors<const E> q, Vectors<const E> k, Vectors<const E> v,
                         Vectors<const E> dy, Vectors<E> dk, Vectors<E> dv, const float* lse, const float* delta, int n,
                         int m, int row0, int first, int width, float scale) {
    SMEM_ARRAY(float4, a_tile, Scores::kSizeA);
    SMEM_ARRAY(float4, b_tile, Scores::kSizeB);
    SMEM_ARRAY(float4, weight_tile, kSizeWeights);
    SMEM_ARRAY(float4, slope_tile, kSizeWeights);
    SMEM_ARRAY(float4, value_tile, kSizeValues);
    float *a = reinterpret_cast<float*>(a_tile), *b = reinterpret_cast<float*>(b_tile);
    float *weights = reinterpret_cast<float*>(weight_tile), *slopes = reinterpret_cast<float*>(slope_tile);
    float* values = reinterpret_cast<float*>(value_tile);
    const int row_end = min(keys.limit, row0 + kRowTile);
    Span span = {0, 0};
    if (row0 < row_end) span = keys.queries(row0, row_end);
    REG(float, to_v, [kChunks][4][4]);
    REG(float, to_k, [kChunks][4][4]);
    clear_chunks(to_v), clear_chunks(to_k);
    for (int column0 = span.first; column0 < span.end; column0 += kColumnTile) {
        float s[4][4], dp[4][4];
        dots(s, a, b, k, row0, row_end, q, column0, span.end, width);
        dots(dp, a, b, v, row0, row_end, dy, column0, span.end, width);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int query = column0 + Scores::column(j), at = min(query, n - 1);
            const float base = lse[at], fall = delta[at];
            const auto place = keys.query(at);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = row0 + Scores::row(i);
                const bool seen = query < span.end && key < row_end && keys.sees(place, keys.key(key));
                const float bias = seen ? bias_of(keys, place, keys.key(key)) : 0.0f;
                s[i][j] = seen ? weight(s[i][j], scale, base - bias) : 0.0f;
                dp[i][j] = seen ? s[i][j] * (dp[i][j] - fall) : 0.0f;
            }
        }
        put_weights(weights, s), put_weights(slopes, dp);
        weigh<kChunks>(to_v, weights, values, dy, column0, span.end, first, width);
        weigh<kChunks>(to_k, slopes, values, q, column0, span.end, first, width);
    }
    float one[4], factor[4];
#pragma unroll
    for (int i = 0; i < 4; i++) one[i] = 1.0f, factor[i] = scale;
    const int last = min(m, row0 + kRowTile);
    put_rows<kChunks>(to_v, one, dv, row0, last, first, width);
    put_rows<kChunks>(to_k, factor, dk, row0, last, first, width);
}

// Every query sees every key.
struct AllKeys {
    int limit, n;
    PTX_FN Span keys(int, int) const { return {0, limit}; }
    PTX_FN Span queries(int, int) const { return {0, n}; }
    PTX_FN int query(int i) const { return i; }
    PTX_FN int key(int j) const { return j; }
    PTX_FN bool sees(int, int) const { return true; }
};

// Blocks of a launch: tiles of tokens, then samples; heads next to each other, so that the sectors which two heads share
// are read at one time. blockIdx.y is the group of columns.
struct Place {
    int sample, head, row0;
};
PTX_FN Place place_of_block(int tokens, int h) {
    const int tiles = (tokens + kRowTile - 1) / kRowTile, block = int(blockIdx.x) / h;
    return {block / tiles, int(blockIdx.x) % h, block % tiles * kRowTile};
}

// Part `part` of `parts` vectors of a head beside each other in [B, n, parts, H, width].
template <class E> PTX_FN Vectors<E> head_part(E* x, const Place& at, int part, int parts, int n, int h, int width) {
    return {x + ((size_t(at.sample) * n * parts + part) * h + at.head) * width, size_t(parts) * h * width};
}

// The three kernels of an operator whose q, k and v come from one packed projection [B, N, 3, H, E].
template <class E, class Keys>
PTX_FN void packed_forward(const Keys& keys, const E* qkv, E* y, float* lse, int n, int h, int e, float scale) {
    const Place at = place_of_block(n, h);
    softmax_forward<4>(keys, head_part(qkv, at, 0, 3, n, h, e), head_part(qkv, at, 1, 3, n, h, e),
                       head_part(qkv, at, 2, 3, n, h, e), head_part(y, at, 0, 1, n, h, e),
                       lse + (size_t(at.sample) * h + at.head) * n, n, at.row0, int(blockIdx.y) * 128, e, scale);
}
template <class E, class Keys>
PTX_FN void packed_dq(const Keys& keys, const E* dy, const E* qkv, const float* lse, const float* delta, E* dqkv, int n,
                      int h, int e, float scale) {
    const Place at = place_of_block(n, h);
    const size_t row = (size_t(at.sample) * h + at.head) * n;
    softmax_dq<4>(keys, head_part(qkv, at, 0, 3, n, h, e), head_part(qkv, at, 1, 3, n, h, e),
                  head_part(qkv, at, 2, 3, n, h, e), head_part(dy, at, 0, 1, n, h, e), head_part(dqkv, at, 0, 3, n, h, e),
                  lse + row, delta + row, n, at.row0, int(blockIdx.y) * 128, e, scale);
}
template <class E, class Keys>
PTX_FN void packed_dkdv(const Keys& keys, const E* dy, const E* qkv, const float* lse, const float* delta, E* dqkv,
                        int n, int h, int e, float scale) {
    const Place at = place_of_block(n, h);
    const size_t row = (size_t(at.sample) * h + at.head) * n;
    softmax_dkdv<3>(keys, head_part(qkv, at, 0, 3, n, h, e), head_part(qkv, at, 1, 3, n, h, e),
                    head_part(qkv, at, 2, 3, n, h, e), head_part(dy, at, 0, 1, n, h, e), head_part(dqkv, at, 1, 3, n, h, e),
                    head_part(dqkv, at, 2, 3, n, h, e), lse + row, delta + row, n, n, at.row0, int(blockIdx.y) * 96, e,
                    scale);
}

}  // namespace ptx
