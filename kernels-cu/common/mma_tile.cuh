// Tiles of 16-bit elements in swizzled shared memory, as mma.sync wants them: filled by cp.async with zeros outside of
// the matrix, read by ldmatrix without bank conflicts.
//
// A tile is rows of `kRowBytes` (32, 64, 128 or a multiple of 128); the 16-byte chunk `c` of row `r` lies at
// tile_at(r, c), an exclusive or that TMA uses, too (32B, 64B, 128B). Eight rows at one chunk, which an 8×8 matrix is,
// then lie in eight different groups of banks. Tiles begin at a multiple of 1024 bytes where TMA or wgmma shares them,
// of 128 otherwise.
//
// Fragments are those of m16n8k16 (warp.cuh). "Along K": the depth of the product is contiguous ([rows][K]); "across
// K": rows of the tile are the depth ([K][rows]) and ldmatrix transposes.
#pragma once
#include "memory.cuh"
#include "warp.cuh"

namespace ptx {

// Offset in bytes of a chunk of 16 bytes in a tile.
template <int kRowBytes> PTX_FN uint32_t tile_at(int row, int chunk) {
    static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes % 128 == 0, "rows that the swizzle knows");
    const int turn = kRowBytes == 32 ? row >> 2 & 1 : kRowBytes == 64 ? row >> 1 & 3 : row & 7;
    return uint32_t(row * kRowBytes + ((chunk ^ turn) << 4));
}

// Starts copies of a tile of kRows rows by kThreads threads (all of those with threadIdx.x < kThreads). `from` is the
// tile's first element, `stride` the elements from one row to the next; rows from `rows` on and columns from `columns`
// on are zeros and not read. Rows of `from` start at multiples of 16 bytes. Part of the next cp.async group.
template <int kRows, int kRowBytes, int kThreads, class E>
PTX_FN void tile_copy(uint32_t to, const E* from, size_t stride, int rows, int columns PTX_AT) {
    constexpr int kChunks = kRowBytes / 16, kEach = 16 / int(sizeof(E)), kCopies = (kRows * kChunks + kThreads - 1) / kThreads;
#pragma unroll
    for (int i = 0; i < kCopies; i++) {
        const int at_chunk = int(threadIdx.x) + i * kThreads;
        const int row = at_chunk / kChunks, chunk = at_chunk % kChunks;
        if (kRows * kChunks % kThreads == 0 || row < kRows) {
            const int left = row < rows ? min(max(columns - chunk * kEach, 0), kEach) : 0;
            cp_async(to + tile_at<kRowBytes>(row, chunk), from + (left ? row * stride + chunk * kEach : 0),
                     left * int(sizeof(E)) PTX_FROM);
        }
    }
}

// ---- A of m16n8k16: rows row…row+15, depth k…k+15; `k` and, across K, `row` are multiples of 8 ----

template <int kRowBytes> PTX_FN void fragment_a(uint32_t (&a)[4], uint32_t tile, int row, int k PTX_AT) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(a, tile + tile_at<kRowBytes>(row + lane % 16, k / 8 + lane / 16) PTX_FROM);
}
template <int kRowBytes> PTX_FN void fragment_a_across(uint32_t (&a)[4], uint32_t tile, int row, int k PTX_AT) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(a, tile + tile_at<kRowBytes>(k + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2) PTX_FROM);
}

// ---- B for two neighbouring blocks of 8 columns, column…column+15: b[0], b[1] of the first, b[2], b[3] of the second --

template <int kRowBytes> PTX_FN void fragment_b(uint32_t (&b)[4], uint32_t tile, int column, int k PTX_AT) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(b, tile + tile_at<kRowBytes>(column + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2) PTX_FROM);
}
template <int kRowBytes> PTX_FN void fragment_b_across(uint32_t (&b)[4], uint32_t tile, int column, int k PTX_AT) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(b, tile + tile_at<kRowBytes>(k + lane % 16, column / 8 + lane / 16) PTX_FROM);
}

// ---- accumulators through shared memory: a warp's 16 rows of kColumns floats, to be read 8 neighbours a lane ----

template <int kColumns> struct Slab {
    static_assert(kColumns == 32 || kColumns == 64, "four or eight lanes a row");
    // Rows are 8 floats longer: the writes of a half warp and the reads of a quarter meet no bank twice.
    static constexpr int kStride = kColumns + 8, kBytes = 16 * kStride * 4;
    static constexpr int kLanes = kColumns / 8, kRows = 32 / kLanes;

    // Block `j` of 8 columns, as D of m16n8k16 holds it: rows g and g+8, columns 2t and 2t+1.
    static PTX_FN void put(uint32_t slab, int j, float d0, float d1, float d2, float d3 PTX_AT) {
        const int lane = threadIdx.x % 32;
        const uint32_t to = slab + uint32_t(4 * (lane / 4 * kStride + 8 * j + lane % 4 * 2));
        st_shared_v2(to, make_uint2(__float_as_uint(d0), __float_as_uint(d1)) PTX_FROM);
        st_shared_v2(to + 8 * kStride * 4, make_uint2(__float_as_uint(d2), __float_as_uint(d3)) PTX_FROM);
    }
    // The row and the first column that this lane takes at step i < 16 / kRows.
    static PTX_FN int row(int i) { return i * kRows + int(threadIdx.x % 32) / kLanes; }
    static PTX_FN int column() { return int(threadIdx.x % kLanes) * 8; }
    static PTX_FN void take(float (&v)[8], uint32_t slab, int i PTX_AT) {
        // Every second four lanes read their upper half first, so that a quarter warp covers all banks.
        const uint32_t odd = threadIdx.x >> 2 & 1, from = slab + uint32_t(4 * (row(i) * kStride + column()));
        const uint4 first = ld_shared_v4(from + 16 * odd PTX_FROM), second = ld_shared_v4(from + 16 * (odd ^ 1) PTX_FROM);
        const uint4 low = odd ? second : first, high = odd ? first : second;
        v[0] = __uint_as_float(low.x), v[1] = __uint_as_float(low.y);
        v[2] = __uint_as_float(low.z), v[3] = __uint_as_float(low.w);
        v[4] = __uint_as_float(high.x), v[5] = __uint_as_float(high.y);
        v[6] = __uint_as_float(high.z), v[7] = __uint_as_float(high.w);
    }
};

}  // namespace ptx
