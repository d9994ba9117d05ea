// Windows that are narrow enough for a warp: its 16 queries meet at most kKeys keys, in one step with one softmax.
//
// A block walks over queries of a head, kRows at a time. A ring of kSize rows in shared memory holds the keys (another
// the values) that these meet and those that the next kRows add, which come by cp.async while these are computed; a
// warp's next queries come with them to 16 rows of its own, and its results leave through 16 others.
#pragma once
#include "../common/mma_attention.cuh"

namespace ptx {

// Rows of shared memory as `Stage` has them, in a ring of kSize of which row 0 is at `start`.
template <class Tile, int kSize> struct Ring {
    uint32_t at;
    int start;
    PTX_FN uint32_t row(int r) const {
        r += start;
        return at + (r >= kSize ? r - kSize : r) * (Tile::kPitch * 2);
    }
    PTX_FN uint32_t rows(int first, int column) const {
        const int lane = threadIdx.x % 32;
        return row(first + lane / 16 * 8 + lane % 8) + (lane / 8 % 2 * 8 + column) * 2;
    }
    PTX_FN uint32_t columns(int first, int column) const {
        const int lane = threadIdx.x % 32;
        return row(first + lane % 16) + (lane / 16 * 8 + column) * 2;
    }
    PTX_FN uint32_t rest(int first, int column) const { return columns(first, column); }
};

// Starts the copies of keys and values first .. end_row to their places in two rings, a vector j in row j % kSize; zeros
// from `end` on. A thread keeps its column, and goes from row to row by additions of 32 bits.
template <class Tile, int kSize, class E>
PTX_FN void fetch_ring(uint32_t to, uint32_t apart, Vectors<const E> k, Vectors<const E> v, int first, int end_row,
                       int end, int e) {
    constexpr int kStep = Tile::kThreads / Tile::kColumns;
    const int down = int(threadIdx.x) / Tile::kColumns, column = int(threadIdx.x) % Tile::kColumns * 8;
    if (down >= kStep) return;
    const E *keys = k.at + first * k.stride, *values = v.at + first * v.stride;
    const uint32_t stride = uint32_t(k.stride);
    const int live = column < e ? end - first : 0, rows = end_row - first;
    int slot = (first + down) % kSize;
    uint32_t from = down * stride + column;
#pragma unroll 1
    for (int row = down; row < rows; row += kStep, from += kStep * stride) {
        // A copy of no bytes reads nothing.
        const int bytes = row < live ? 16 : 0;
        const uint32_t place = to + (slot * Tile::kPitch + column) * 2;
        cp_async(place, keys + from, bytes);
        cp_async(place + apart, values + from, bytes);
        slot += kStep;
        if (slot >= kSize) slot -= kSize;
    }
}

// f(row, column, offset) for each of the lane's 16-byte chunks of a warp's 16 rows, `stride` elements apart.
template <class Tile, class F> PTX_FN void for_chunks(uint32_t stride, F f) {
    constexpr int kChunks = Tile::kColumns, kAll = 16 * kChunks;
    const int lane = threadIdx.x % 32;
    int row = lane / kChunks, column = lane % kChunks * 8;
#pragma unroll
    for (int at = 0; at < kAll; at += 32) {
        if (at + 32 <= kAll || lane < kAll - at) f(row, column, row * stride + column);
        row += 32 / kChunks, column += 32 % kChunks * 8;
        if (column >= 8 * kChunks) column -= 8 * kChunks, row++;
    }
}

// The softmax of a warp's queries over all keys that they see, `span`, of which row 0 of the rings is the first. kFull:
// every run of 16 has such a key.
template <bool kFull, class Tile, class E, class Keys, class Source>
PTX_FN void ring_step(Softmax<Tile>& w, const Keys& keys, const Source& k, const Source& v, int row, int row_end,
                      Span span) {
    constexpr int kRuns = Tile::kKeys / 16;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, runs = (span.end - span.first + 15) / 16;
    REG(float, s, [kRuns][1][2][4]);
#pragma unroll
    for (int i = 0; i < kRuns; i++) {
        clear_blocks(s[i]);
        if (!kFull && i >= runs) {
#pragma unroll
            for (int x = 0; x < 8; x++) s[i][0][x / 4][x % 4] = -INFINITY;
            continue;
        }
        multiply_rows<Tile, E>(s[i], w.q, k, 16 * i);
        // Most runs are seen by all 16 queries.
        const int key = span.first + 16 * i;
        if (key + 16 <= span.end && cover_of(keys, row, row_end, key, key + 16) == Cover::All) continue;
#pragma unroll
        for (int x = 0; x < 8; x++) {
            const int j = key + x / 4 * 8 + 2 * t + x % 2, query = row + x / 2 % 2 * 8 + g;
            if (!(j < span.end && keys.sees(query, j))) s[i][0][x / 4][x % 4] = -INFINITY;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kRuns; i++) {
#pragma unroll
            for (int x = 0; x < 4; x++) most = fmaxf(most, s[i][0][x / 2][2 * r + x % 2]);
        }
        most = quad_max(most) * w.c;
        // A row past the last may see no key.
        const float base = most == -INFINITY ? 0.0f : most;
#pragma unroll
        for (int i = 0; i < kRuns; i++) {
#pragma unroll
            for (int x = 0; x < 4; x++) {
                float& score = s[i][0][x / 2][2 * r + x % 2];
                score = ex2(fmaf(score, w.c, -base));
                sum += score;
            }
        }
        w.top[0][r] = most, w.sum[0][r] = sum;
    }
    clear_blocks(w.acc);
#pragma unroll
    for (int i = 0; i < kRuns; i++) {
        // What nobody sees may not have been loaded.
        if (kFull || i < runs) multiply_columns<Tile, E>(w.acc, s[i], v, 16 * i);
    }
}

// y and lse of a warp's queries, through its own 16 rows of shared memory.
template <class Tile, class E>
PTX_FN void ring_finish(const Softmax<Tile>& w, uint32_t own, Vectors<E> y, float* lse, int row0, int row_end, int e) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float total = quad_sum(w.sum[0][r]), factor = total > 0.0f ? 1.0f / total : total;
        const int row = row0 + 8 * r + g;
        if (t == 0 && row < row_end) lse[row] = (w.top[0][r] + lg2(total)) * kLn2;
        const uint32_t to = own + ((8 * r + g) * Tile::kPitch + 2 * t) * 2;
#pragma unroll
        for (int j = 0; j < Tile::kColumns; j++)
            st_shared_u32(to + 16 * j, pack<E>(w.acc[0][j][2 * r] * factor, w.acc[0][j][2 * r + 1] * factor));
    }
    __syncwarp();
    E* to = y.at + row0 * y.stride;
    for_chunks<Tile>(uint32_t(y.stride), [&](int row, int column, uint32_t at) {
        if (row0 + row < row_end && column < e)
            st_global_v4(to + at, ld_shared_v4(own + (row * Tile::kPitch + column) * 2));
    });
    __syncwarp();
}

// Windows of `w` keys to each side for queries first .. last. Shared memory: keys, values, 16 queries and 16 results a
// warp. Rows in memory are so short that kSize of them have offsets of 32 bits.
template <class Tile, int kSize, class E, class Keys>
PTX_FN void mma_forward_ring(const Keys& keys, Vectors<const E> q, Vectors<const E> k, Vectors<const E> v, Vectors<E> y,
                             float* lse, int first, int last, int w, int e, float scale) {
    if constexpr (sizeof(E) == 2) {
        constexpr int kBytes = kSize * Tile::kPitch * 2, kStride = region_stride(kBytes);
        constexpr int kOwn = 16 * Tile::kPitch * 2, kOwnStride = region_stride(Tile::kWarps * kOwn);
        static_assert(Tile::kM == 1 && kSize >= Tile::kRows - 16 + Tile::kKeys + Tile::kRows, "keys of two steps");
        SMEM_DYNAMIC(smem, 128);
        smem_guard(smem, kBytes), smem_guard(smem, kStride + kBytes);
        smem_guard(smem, 2 * kStride + Tile::kWarps * kOwn);
        smem_guard(smem, 2 * kStride + kOwnStride + Tile::kWarps * kOwn);
        const uint32_t ks = smem_u32(smem), vs = ks + kStride;
        const uint32_t qs = vs + kStride + threadIdx.x / 32 * kOwn, ys = qs + kOwnStride;
        const int warp_row = threadIdx.x / 32 * 16;
        // Keys of a step, in runs of 16 from the first that its first query sees.
        const int need = (16 + 2 * w + 15) / 16 * 16;
        int there = first + Tile::kRows - 16 - w + need;
        const auto fetch = [&](int row0, int from, int to) {
            fetch_ring<Tile, kSize>(ks, kStride, k, v, from, to, keys.limit, e);
            const E* mine = q.at + row0 * q.stride;
            for_chunks<Tile>(uint32_t(q.stride), [&](int row, int column, uint32_t at) {
                const int bytes = row0 + row < last && column < e ? 16 : 0;
                cp_async(qs + (row * Tile::kPitch + column) * 2, mine + at, bytes);
            });
            cp_async_commit();
        };
        fetch(first + warp_row, max(0, first - w), there);
        for (int row0 = first; row0 < last; row0 += Tile::kRows) {
            const int row = row0 + warp_row, row_end = min(last, row + 16);
            Softmax<Tile> state;
            cp_async_wait<0>();
            __syncthreads();
            load_rows(state.q[0], qs);
            // Every lane has the queries before the next ones come.
            __syncwarp();
            if (row0 + Tile::kRows < last) fetch(row + Tile::kRows, there, there + Tile::kRows);
            there += Tile::kRows;
            if (row >= row_end) continue;
            start(state, scale);
            const Span span = keys.keys(row, row_end);
            const Ring<Tile, kSize> kr{ks, span.first % kSize}, vr{vs, span.first % kSize};
            if (span.end - span.first > Tile::kKeys - 16)
                ring_step<true, Tile, E>(state, keys, kr, vr, row, row_end, span);
            else
                ring_step<false, Tile, E>(state, keys, kr, vr, row, row_end, span);
            ring_finish<Tile>(state, ys, y, lse, row, row_end, e);
        }
        cp_async_wait<0>();
    }
}

}  // namespace ptx
