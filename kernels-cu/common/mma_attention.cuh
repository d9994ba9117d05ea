// Softmax attention on the tensor cores by mma.sync, for 16-bit elements and heads of up to kE columns in steps of 8:
// the forward pass of the attention family. `softmax_attention.cuh` says what an operator brings (`Keys`); besides, it may say
//     Cover cover(int query, int query_end, int key, int key_end)   which pairs of two ranges are seen; all where left out
// so that what nobody sees is skipped, by warps and in runs of 16 keys, and only what some see is masked.
//
// A warp owns 16·kM queries. Their vectors are fragments in registers, so are scores, weights and sums: the scores of 16
// keys are, packed, the left operand of the product with 16 values. Keys and values lie in shared memory, a token a row,
// rows an odd number of 16-byte chunks apart, so that the eight rows of a fragment meet all banks: 72 columns need no
// padding. A head of 72 is four steps of 16 and one of 8, exactly. Columns from the head's width on are zeros in shared
// memory and in registers: no element of a neighbour is ever read.
//
// Weights are exp2(c·s - c·m) with c = scale·log2(e) in one multiply-add. c·m is rounded once for a row and the same
// number is in the log-sum, so its error leaves the weights; a negative scale changes the sign of the queries.
#pragma once
#include "cluster.cuh"
#include "memory.cuh"
#include "softmax_attention.cuh"
#include "warp.cuh"

namespace ptx {

enum class Cover { None, Some, All };

// kWarps warps own 16·kM rows each; kKeys rows of the other side are in a stage.
template <int kE_, int kWarps_, int kM_, int kKeys_> struct MmaTile {
    static_assert(kE_ % 8 == 0 && kKeys_ % 16 == 0, "columns in steps of 8, keys in steps of 16");
    static constexpr int kE = kE_, kWarps = kWarps_, kM = kM_, kKeys = kKeys_;
    static constexpr int kThreads = 32 * kWarps, kWarpRows = 16 * kM, kRows = kWarpRows * kWarps;
    static constexpr int kSteps = kE / 16, kColumns = kE / 8;
    static constexpr bool kRest = kE % 16 != 0;
    // Elements, and bytes of the kKeys rows of a stage.
    static constexpr int kPitch = kColumns % 2 ? kE : kE + 8, kBytes = kKeys * kPitch * 2;
};

// A region of shared memory from the one before it.
PTX_BOTH int region_stride(int bytes) {
    SmemPlan plan;
    plan.take(bytes, 128);
    return plan.take(bytes, 128);
}

// The left operand: 16 rows of a head's vectors.
template <int kE> struct RowFragment {
    uint32_t step[kE / 16 ? kE / 16 : 1][4], rest[2];
};

PTX_FN float quad_sum(float v) {
    v += __shfl_xor_sync(kFullMask, v, 1);
    return v + __shfl_xor_sync(kFullMask, v, 2);
}
PTX_FN float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(kFullMask, v, 1));
    return fmaxf(v, __shfl_xor_sync(kFullMask, v, 2));
}

// Two elements of a row, zeros outside of the rows and of the head.
template <class E> PTX_FN uint32_t pair_at(Vectors<const E> from, int row, int row_end, int column, int e) {
    return row < row_end && column < e ? ld_global_nc_u32(from.at + row * from.stride + column) : 0;
}

template <int kE, class E>
PTX_FN void load_fragment(RowFragment<kE>& to, Vectors<const E> from, int row0, int row_end, int e) {
    const int row = row0 + int(threadIdx.x % 32) / 4, column = int(threadIdx.x % 4) * 2;
#pragma unroll
    for (int s = 0; s < kE / 16; s++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            to.step[s][i] = pair_at(from, row + 8 * (i % 2), row_end, 16 * s + 8 * (i / 2) + column, e);
    }
    if constexpr (kE % 16 != 0) {
#pragma unroll
        for (int i = 0; i < 2; i++) to.rest[i] = pair_at(from, row + 8 * i, row_end, kE / 16 * 16 + column, e);
    }
}

// The same from 16 rows of shared memory, an odd number of 16-byte chunks apart.
template <int kE> PTX_FN void load_rows(RowFragment<kE>& to, uint32_t rows) {
    constexpr int kPitch = kE / 8 % 2 ? kE : kE + 8;
    const uint32_t own = rows + (threadIdx.x % 16 * kPitch + threadIdx.x % 32 / 16 * 8) * 2;
#pragma unroll
    for (int s = 0; s < kE / 16; s++) ldmatrix_x4(to.step[s], own + 32 * s);
    if constexpr (kE % 16 != 0) ldmatrix_x2(to.rest, own + kE / 16 * 32);
}

// Changes the sign of every element.
template <int kE> PTX_FN void negate(RowFragment<kE>& f) {
#pragma unroll
    for (int s = 0; s < kE / 16; s++) {
#pragma unroll
        for (int i = 0; i < 4; i++) f.step[s][i] ^= 0x80008000u;
    }
    if constexpr (kE % 16 != 0) f.rest[0] ^= 0x80008000u, f.rest[1] ^= 0x80008000u;
}

// Starts the copy of vectors first .. first + kKeys into rows of a stage; zeros from `end` and from column e on.
template <class Tile, class E> PTX_FN void fetch_rows(uint32_t to, Vectors<const E> from, int first, int end, int e) {
    constexpr int kChunks = Tile::kColumns, kAll = Tile::kKeys * kChunks;
    int row = int(threadIdx.x) / kChunks, chunk = int(threadIdx.x) % kChunks;
    // Not unrolled: addresses that wait for the next stage would cost the registers of a product.
#pragma unroll 1
    for (int at = threadIdx.x; at < kAll; at += Tile::kThreads) {
        const bool there = first + row < end && 8 * chunk < e;
        cp_async(to + (row * Tile::kPitch + 8 * chunk) * 2,
                 from.at + (there ? (first + row) * from.stride + 8 * chunk : 0), there ? 16 : 0);
        row += Tile::kThreads / kChunks, chunk += Tile::kThreads % kChunks;
        if (chunk >= kChunks) chunk -= kChunks, row++;
    }
}

// Where the rows of a stage lie: row r at `at` + r rows. `rows` and `columns` give a lane's address for fragments of 16
// rows from `row` on: rows as columns of the right operand (from `column` on), and rows as its rows.
template <class Tile> struct Stage {
    uint32_t at;
    PTX_FN uint32_t rows(int row, int column) const {
        const int lane = threadIdx.x % 32;
        return at + ((lane / 16 * 8 + lane % 8) * Tile::kPitch + lane / 8 % 2 * 8) * 2 + (row * Tile::kPitch + column) * 2;
    }
    // For two fragments of 8 columns each the first 16 lanes' addresses count, here and of `rest`.
    PTX_FN uint32_t columns(int row, int column) const {
        const int lane = threadIdx.x % 32;
        return at + (lane % 16 * Tile::kPitch + lane / 16 * 8) * 2 + (row * Tile::kPitch + column) * 2;
    }
    PTX_FN uint32_t rest(int row, int column) const { return columns(row, column); }
};

// d[m][b] += left_m · rows row + 8b .. of the stage, two blocks of eight.
template <class Tile, class E, class Source>
PTX_FN void multiply_rows(float (&d)[Tile::kM][2][4], const RowFragment<Tile::kE> (&left)[Tile::kM],
                          const Source& source, int row) {
#pragma unroll
    for (int s = 0; s < Tile::kSteps; s++) {
        uint32_t r[4];
        ldmatrix_x4(r, source.rows(row, 16 * s));
#pragma unroll
        for (int m = 0; m < Tile::kM; m++) {
            mma_m16n8k16<E>(d[m][0], left[m].step[s], r[0], r[1]);
            mma_m16n8k16<E>(d[m][1], left[m].step[s], r[2], r[3]);
        }
    }
    if constexpr (Tile::kRest) {
        uint32_t r[2];
        ldmatrix_x2(r, source.rest(row, 16 * Tile::kSteps));
#pragma unroll
        for (int m = 0; m < Tile::kM; m++) {
            mma_m16n8k8<E>(d[m][0], left[m].rest, r[0]);
            mma_m16n8k8<E>(d[m][1], left[m].rest, r[1]);
        }
    }
}

// acc[m] += weights_m · rows row .. row + 16 of the stage; `weights` are blocks of eight columns each.
template <class Tile, class E, class Source>
PTX_FN void multiply_columns(float (&acc)[Tile::kM][Tile::kColumns][4], const float (&weights)[Tile::kM][2][4],
                             const Source& source, int row) {
    uint32_t a[Tile::kM][4];
#pragma unroll
    for (int m = 0; m < Tile::kM; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[m][i] = pack<E>(weights[m][i / 2][i % 2 * 2], weights[m][i / 2][i % 2 * 2 + 1]);
    }
#pragma unroll
    for (int j = 0; j + 1 < Tile::kColumns; j += 2) {
        uint32_t r[4];
        ldmatrix_x4_trans(r, source.columns(row, 8 * j));
#pragma unroll
        for (int m = 0; m < Tile::kM; m++) {
            mma_m16n8k16<E>(acc[m][j], a[m], r[0], r[1]);
            mma_m16n8k16<E>(acc[m][j + 1], a[m], r[2], r[3]);
        }
    }
    if constexpr (Tile::kRest) {
        uint32_t r[2];
        ldmatrix_x2_trans(r, source.columns(row, 8 * (Tile::kColumns - 1)));
#pragma unroll
        for (int m = 0; m < Tile::kM; m++) mma_m16n8k16<E>(acc[m][Tile::kColumns - 1], a[m], r[0], r[1]);
    }
}

template <int kM, int kBlocks> PTX_FN void clear_blocks(float (&d)[kM][kBlocks][4]) {
#pragma unroll
    for (int m = 0; m < kM; m++) {
#pragma unroll
        for (int j = 0; j < kBlocks; j++) d[m][j][0] = d[m][j][1] = d[m][j][2] = d[m][j][3] = 0.0f;
    }
}

// What a policy says of a range of pairs; ranges without one see nothing.
template <class Keys> PTX_FN Cover cover_of(const Keys& keys, int query, int query_end, int key, int key_end) {
    if (query >= query_end || key >= key_end) return Cover::None;
    if constexpr (requires { keys.cover(query, query_end, key, key_end); })
        return keys.cover(query, query_end, key, key_end);
    else
        return Cover::All;
}

// 16·kM rows of accumulators times their factors to vectors row0 .. of `to`; rows from `zero` on are zeros, rows from
// `end` on are left. Through eight rows of shared memory at `stage` that are the warp's own, so that a lane writes 16
// bytes.
template <class Tile, class E>
PTX_FN void put_blocks(const float (&acc)[Tile::kM][Tile::kColumns][4], const float (&factor)[Tile::kM][2],
                       uint32_t stage, Vectors<E> to, int row0, int zero, int end, int e) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2 * Tile::kM; i++) {
        const int m = i / 2, r = i % 2, first = row0 + 8 * i;
#pragma unroll
        for (int j = 0; j < Tile::kColumns; j++) {
            const float lo = acc[m][j][2 * r] * factor[m][r], hi = acc[m][j][2 * r + 1] * factor[m][r];
            st_shared_u32(stage + (g * Tile::kPitch + 8 * j + 2 * t) * 2, first + g < zero ? pack<E>(lo, hi) : 0);
        }
        __syncwarp();
        for (int at = lane; at < 8 * Tile::kColumns; at += 32) {
            const int row = at / Tile::kColumns, column = at % Tile::kColumns * 8;
            if (first + row < end && column < e)
                st_global_v4(to.at + (first + row) * to.stride + column,
                             ld_shared_v4(stage + (row * Tile::kPitch + column) * 2));
        }
        __syncwarp();
    }
}

// ---- the forward pass of a warp ----

template <class Tile> struct Softmax {
    RowFragment<Tile::kE> q[Tile::kM];
    float acc[Tile::kM][Tile::kColumns][4];
    // Of rows g and g + 8: the largest score so far times c, and this thread's share of the sum.
    float top[Tile::kM][2], sum[Tile::kM][2];
    // |scale|·log2(e), at least as much as keeps the -inf of a masked pair.
    float c;
};

// Before the first key, with the queries in their fragments.
template <class Tile> PTX_FN void start(Softmax<Tile>& w, float scale) {
    w.c = fmaxf(fabsf(scale) * kLog2E, 1.17549435e-38f);
#pragma unroll
    for (int m = 0; m < Tile::kM; m++) {
        if (scale < 0.0f) negate(w.q[m]);
#pragma unroll
        for (int r = 0; r < 2; r++) w.top[m][r] = -INFINITY, w.sum[m][r] = 0.0f;
    }
    clear_blocks(w.acc);
}

template <class Tile, class E>
PTX_FN void begin(Softmax<Tile>& w, Vectors<const E> q, int row0, int row_end, int e, float scale) {
#pragma unroll
    for (int m = 0; m < Tile::kM; m++) load_fragment(w.q[m], q, row0 + 16 * m, row_end, e);
    start(w, scale);
}

// Scores of keys from `key` on against the warp's queries from row0 on, their weights, and the weighted values. kMasked:
// some pairs do not count; keys from key_end on do not.
template <bool kMasked, class Tile, class E, class Keys, class Source>
PTX_FN void forward_step(Softmax<Tile>& w, const Keys& keys, const Source& k, const Source& v, int row0, int row_end,
                         int key, int key_end) {
    constexpr int kGroups = Tile::kKeys / 16;
    constexpr bool kBias = requires { keys.bias(keys.query(0), keys.key(0)); };
    // A whole row has no registers for branches; what it masks is there, and finite.
    constexpr bool kSkip = kMasked && Tile::kKeys < 256;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // Scores with a bias are scaled at once.
    const float unit = kBias ? 1.0f : w.c;
    REG(float, s, [kGroups][Tile::kM][2][4]);
    uint32_t live = ~0u;
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
        clear_blocks(s[i]);
        if (kSkip && cover_of(keys, row0, row_end, key + 16 * i, min(key + 16 * i + 16, key_end)) == Cover::None) {
            live &= ~(1u << i);
#pragma unroll
            for (int m = 0; m < Tile::kM; m++) {
#pragma unroll
                for (int x = 0; x < 8; x++) s[i][m][x / 4][x % 4] = -INFINITY;
            }
            continue;
        }
        multiply_rows<Tile, E>(s[i], w.q, k, 16 * i);
    }
    if constexpr (kMasked || kBias) {
#pragma unroll
        for (int m = 0; m < Tile::kM; m++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const auto query = keys.query(row0 + 16 * m + 8 * r + g);
#pragma unroll
                for (int i = 0; i < kGroups; i++) {
                    if (kSkip && !(live >> i & 1)) continue;
#pragma unroll
                    for (int x = 0; x < 4; x++) {
                        const int j = key + 16 * i + x / 2 * 8 + 2 * t + x % 2;
                        float& score = s[i][m][x / 2][2 * r + x % 2];
                        if (kMasked && !(j < key_end && keys.sees(query, keys.key(j))))
                            score = -INFINITY;
                        else if (kBias)
                            score = fmaf(score, w.c, bias_of(keys, query, keys.key(j)) * kLog2E);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < Tile::kM; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = -INFINITY, sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kGroups; i++) {
#pragma unroll
                for (int x = 0; x < 4; x++) most = fmaxf(most, s[i][m][x / 2][2 * r + x % 2]);
            }
            most = fmaxf(w.top[m][r], quad_max(most) * unit);
            // Before the first key that counts, nothing may be subtracted from minus infinity.
            const float base = most == -INFINITY ? 0.0f : most, fall = ex2(w.top[m][r] - base);
            w.top[m][r] = most;
#pragma unroll
            for (int i = 0; i < kGroups; i++) {
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    float& score = s[i][m][x / 2][2 * r + x % 2];
                    score = ex2(fmaf(score, unit, -base));
                    sum += score;
                }
            }
            w.sum[m][r] = fmaf(w.sum[m][r], fall, sum);
#pragma unroll
            for (int j = 0; j < Tile::kColumns; j++) w.acc[m][j][2 * r] *= fall, w.acc[m][j][2 * r + 1] *= fall;
        }
    }
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
        if (kSkip && !(live >> i & 1)) continue;
        multiply_columns<Tile, E>(w.acc, s[i], v, 16 * i);
    }
}

// The step of a warp, by what its queries see of the keys.
template <class Tile, class E, class Keys, class Source>
PTX_FN void forward_tile(Softmax<Tile>& w, const Keys& keys, const Source& k, const Source& v, int row0, int row_end,
                         int key, int key_end) {
    const int end = min(key + Tile::kKeys, key_end);
    const Cover cover = cover_of(keys, row0, row_end, key, end);
    if (cover == Cover::None) return;
    if (cover == Cover::All && end == key + Tile::kKeys)
        forward_step<false, Tile, E>(w, keys, k, v, row0, row_end, key, end);
    else
        forward_step<true, Tile, E>(w, keys, k, v, row0, row_end, key, end);
}

// y and lse of the warp's queries. No key: y = 0, lse = -inf.
template <class Tile, class E>
PTX_FN void finish(Softmax<Tile>& w, uint32_t stage, Vectors<E> y, float* lse, int row0, int row_end, int e) {
    float factor[Tile::kM][2];
#pragma unroll
    for (int m = 0; m < Tile::kM; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float total = quad_sum(w.sum[m][r]);
            factor[m][r] = total > 0.0f ? 1.0f / total : total;
            const int row = row0 + 16 * m + 8 * r + int(threadIdx.x % 32) / 4;
            if (threadIdx.x % 4 == 0 && row < row_end) lse[row] = (w.top[m][r] + lg2(total)) * kLn2;
        }
    }
    put_blocks<Tile>(w.acc, factor, stage, y, row0, row_end, row_end, e);
}

// Regions of shared memory, kBytes each: as a rule keys and values of two stages. When all is done, results go through
// the first.
template <class Tile> PTX_FN uint32_t stage_of(int i) {
    constexpr int kStride = region_stride(Tile::kBytes);
    SMEM_DYNAMIC(smem, 128);
    return smem_u32(smem) + i * kStride;
}
template <class Tile> PTX_FN uint32_t own_rows(int region) {
    static_assert(8 * Tile::kWarps <= Tile::kKeys, "eight rows of a region for each warp");
    return stage_of<Tile>(region) + threadIdx.x / 32 * (8 * Tile::kPitch * 2);
}
template <class Tile> PTX_FN void guard_stages(int regions) {
    SMEM_DYNAMIC(smem, 128);
    for (int i = 0; i < regions; i++) smem_guard(smem, i * region_stride(Tile::kBytes) + Tile::kBytes);
}

// y of queries row0 .. row0 + kRows; lse [n]. Shared memory: four regions of kBytes.
template <class Tile, class E, class Keys>
PTX_FN void mma_forward(const Keys& keys, Vectors<const E> q, Vectors<const E> k, Vectors<const E> v, Vectors<E> y,
                        float* lse, int n, int row0, int e, float scale) {
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
        Softmax<Tile> w;
        begin<Tile>(w, q, my_row, my_end, e, scale);
        int stage = 0;
        for (int key = span.first; key < span.end; key += Tile::kKeys, stage ^= 2) {
            cp_async_wait<0>();
            // All copies of this stage are there, and nobody reads the other any more.
            __syncthreads();
            const int next = key + Tile::kKeys;
            if (next < span.end) {
                fetch_rows<Tile>(stage_of<Tile>(2 - stage), k, next, span.end, e);
                fetch_rows<Tile>(stage_of<Tile>(3 - stage), v, next, span.end, e);
            }
            cp_async_commit();
            const Stage<Tile> ks{stage_of<Tile>(stage)}, vs{stage_of<Tile>(stage + 1)};
            forward_tile<Tile, E>(w, keys, ks, vs, my_row, my_end, key, span.end);
        }
        start_next();
        cp_async_wait<0>();
        __syncthreads();
        finish<Tile>(w, own_rows<Tile>(0), y, lse, my_row, my_end, e);
    }
}

// The same with all keys in shared memory, for queries `first` .. `last`: a warp takes kWarpRows of them at a time and
// meets no other until the end. Shared memory: regions of kStage keys and values in turns
// for all m keys, and one of eight rows a warp.
template <int kStage, class Tile, class E, class Keys>
PTX_FN void mma_forward_resident(const Keys& keys, Vectors<const E> q, Vectors<const E> k, Vectors<const E> v,
                                 Vectors<E> y, float* lse, int n, int m, int first, int last, int e, float scale) {
    if constexpr (sizeof(E) == 2) {
        using Region = MmaTile<Tile::kE, Tile::kWarps, Tile::kM, kStage>;
        static_assert(kStage % Tile::kKeys == 0, "whole steps in a region");
        const int regions = (m + kStage - 1) / kStage * 2, own = regions * region_stride(Region::kBytes);
        constexpr int kOwn = 8 * Tile::kPitch * 2;
        guard_stages<Region>(regions);
        SMEM_DYNAMIC(smem, 128);
        smem_guard(smem, own + Tile::kWarps * kOwn);
        wait_for_previous();
        for (int key = 0, region = 0; key < keys.limit; key += kStage, region += 2) {
            fetch_rows<Region>(stage_of<Region>(region), k, key, keys.limit, e);
            fetch_rows<Region>(stage_of<Region>(region + 1), v, key, keys.limit, e);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        // Half of the registers of a stride, which is a token's heads.
        q.stride = uint32_t(q.stride), y.stride = uint32_t(y.stride);
        last = min(n, last);
#pragma unroll 1
        for (int row = first + int(threadIdx.x) / 32 * Tile::kWarpRows; row < last; row += Tile::kRows) {
            const int row_end = min(last, row + Tile::kWarpRows);
            Softmax<Tile> w;
            begin<Tile>(w, q, row, row_end, e, scale);
#pragma unroll 1
            for (int key = 0; key < keys.limit; key += Tile::kKeys) {
                const uint32_t at = stage_of<Region>(key / kStage * 2) + key % kStage * (Tile::kPitch * 2);
                const Stage<Tile> ks{at}, vs{at + region_stride(Region::kBytes)};
                forward_tile<Tile, E>(w, keys, ks, vs, row, row_end, key, keys.limit);
            }
            finish<Tile>(w, smem_u32(smem) + own + threadIdx.x / 32 * kOwn, y, lse, row, row_end, e);
        }
        start_next();
    }
}

// Which block works where: tiles of kRows tokens, then samples; heads next to each other, so that the sectors which two
// heads share are read at one time.
template <class Tile> PTX_FN Place place_of_tile(int tokens, int h) {
    const int tiles = (tokens + Tile::kRows - 1) / Tile::kRows, block = int(blockIdx.x) / h;
    return {block / tiles, int(blockIdx.x) % h, block % tiles * Tile::kRows};
}

// The forward pass of an operator whose q, k and v come from one packed projection [B, N, 3, H, E].
template <class Tile, class E, class Keys>
PTX_FN void mma_packed_forward(const Keys& keys, const E* qkv, E* y, float* lse, int n, int h, int e, float scale) {
    const Place at = place_of_tile<Tile>(n, h);
    mma_forward<Tile>(keys, head_part(qkv, at, 0, 3, n, h, e), head_part(qkv, at, 1, 3, n, h, e),
                      head_part(qkv, at, 2, 3, n, h, e), head_part(y, at, 0, 1, n, h, e),
                      lse + (size_t(at.sample) * h + at.head) * n, n, at.row0, e, scale);
}

}  // namespace ptx
