// Fragments of mma.sync from matrices of 16-bit elements in shared memory, and tiles that come there by cp.async.
//
// A row of a tile takes `kPitch` bytes, an odd number of 16-byte units, so that the eight rows of a matrix that ldmatrix
// reads lie in different banks without a swizzle. The lane maps of the fragments are in warp.cuh.
#pragma once
#include "base.cuh"
#include "memory.cuh"
#include "numbers.cuh"
#include "warp.cuh"

namespace ptx {

PTX_FN int lane_id() { return int(threadIdx.x) % 32; }
PTX_FN int warp_id() { return int(threadIdx.x) / 32; }

// Bytes from a row of `columns` 16-bit elements to the next.
PTX_BOTH int odd_pitch(int columns) { return ((columns + 7) / 8 | 1) * 16; }

// A of 16x16 from [row][k].
template <int kPitch> PTX_FN void load_a(uint32_t (&a)[4], uint32_t tile PTX_AT) {
    ldmatrix_x4(a, tile + lane_id() % 16 * kPitch + lane_id() / 16 * 16 PTX_FROM);
}
// A of 16x8 from [row][k].
template <int kPitch> PTX_FN void load_a_8(uint32_t (&a)[2], uint32_t tile PTX_AT) {
    ldmatrix_x2(a, tile + lane_id() % 16 * kPitch PTX_FROM);
}
// A of 16x16 from [k][row]; where only the first eight rows exist, they stand for the others, too.
template <int kPitch> PTX_FN void load_a_trans(uint32_t (&a)[4], uint32_t tile, bool all_rows = true PTX_AT) {
    const int k = lane_id() % 8 + lane_id() / 16 * 8, unit = all_rows ? lane_id() / 8 % 2 : 0;
    ldmatrix_x4_trans(a, tile + k * kPitch + unit * 16 PTX_FROM);
}

// B of 16x8 for two neighbouring tiles of columns from [k][column]: b[0], b[1] of the first, b[2], b[3] of the second.
template <int kPitch> PTX_FN void load_b_pair(uint32_t (&b)[4], uint32_t tile PTX_AT) {
    ldmatrix_x4_trans(b, tile + lane_id() % 16 * kPitch + lane_id() / 16 * 16 PTX_FROM);
}
// B of 16x8 from [k][column].
template <int kPitch> PTX_FN void load_b(uint32_t (&b)[2], uint32_t tile PTX_AT) {
    ldmatrix_x2_trans(b, tile + lane_id() % 16 * kPitch PTX_FROM);
}
// B of 8x8 for two tiles of columns from [k][column], and for one.
template <int kPitch> PTX_FN void load_b_pair_8(uint32_t (&b)[2], uint32_t tile PTX_AT) {
    ldmatrix_x2_trans(b, tile + lane_id() % 8 * kPitch + lane_id() / 8 % 2 * 16 PTX_FROM);
}
template <int kPitch> PTX_FN void load_b_8(uint32_t (&b)[1], uint32_t tile PTX_AT) {
    ldmatrix_x1_trans(b, tile + lane_id() % 8 * kPitch PTX_FROM);
}
// The same from [column][k].
template <int kPitch> PTX_FN void load_b_pair_rows(uint32_t (&b)[4], uint32_t tile PTX_AT) {
    ldmatrix_x4(b, tile + (lane_id() % 8 + lane_id() / 16 * 8) * kPitch + lane_id() / 8 % 2 * 16 PTX_FROM);
}
template <int kPitch> PTX_FN void load_b_rows(uint32_t (&b)[2], uint32_t tile PTX_AT) {
    ldmatrix_x2(b, tile + lane_id() % 8 * kPitch + lane_id() / 8 % 2 * 16 PTX_FROM);
}
template <int kPitch> PTX_FN void load_b_pair_rows_8(uint32_t (&b)[2], uint32_t tile PTX_AT) {
    ldmatrix_x2(b, tile + lane_id() % 16 * kPitch PTX_FROM);
}
template <int kPitch> PTX_FN void load_b_rows_8(uint32_t (&b)[1], uint32_t tile PTX_AT) {
    ldmatrix_x1(b, tile + lane_id() % 8 * kPitch PTX_FROM);
}

// Two f32 as the sum of two pairs of bf16: some 16 bits of each.
struct Split {
    uint32_t high, low;
};
PTX_FN Split split(float x, float y) {
    const uint32_t high = pack<bf16>(x, y);
    return {high, pack<bf16>(x - unpack_lo<bf16>(high), y - unpack_hi<bf16>(high))};
}

// f(row, unit, offset) for each 16-byte unit of kRows rows of kColumns elements, `stride` elements apart in memory, by
// kThreads threads of which this is `thread`: from unit to unit by additions of 32 bits. Rows are so short that their
// offsets have 32 bits. kAtOnce: units whose addresses are made together, for kernels that have the registers.
template <int kRows, int kColumns, int kThreads, int kAtOnce, class F>
PTX_FN void for_units(uint32_t stride, int thread, F f) {
    constexpr int kUnits = kColumns / 8, kAll = kRows * kUnits;
    int row = thread / kUnits, unit = thread % kUnits;
    uint32_t at = row * stride + unit * 8;
#pragma unroll kAtOnce
    for (int i = 0; i < kAll; i += kThreads) {
        if (i + kThreads <= kAll || thread < kAll - i) f(row, unit, at);
        row += kThreads / kUnits, unit += kThreads % kUnits, at += kThreads / kUnits * stride + kThreads % kUnits * 8;
        if (kThreads % kUnits != 0 && unit >= kUnits) unit -= kUnits, row++, at += stride - kUnits * 8;
    }
}

// Starts the copy of kColumns elements from each of the rows first .. first + kRows of `from`, `stride` elements apart, by
// kThreads threads; rows from `end` on are zeros. Rows in memory are aligned to 16 bytes.
template <int kRows, int kColumns, int kThreads, int kAtOnce = 16>
PTX_FN void copy_rows(uint32_t to, const bf16* from, int64_t stride, int first, int end PTX_AT) {
    const bf16* rows = from + first * stride;
    for_units<kRows, kColumns, kThreads, kAtOnce>(uint32_t(stride), threadIdx.x, [&](int row, int unit, uint32_t offset) {
        // A copy of no bytes reads nothing.
        cp_async<16>(to + row * odd_pitch(kColumns) + unit * 16, rows + offset, first + row < end ? 16 : 0 PTX_FROM);
    });
}

// Rows that lie in shared memory at `from`, those before `end`, to memory by kThreads threads, of which this is `thread`.
template <int kRows, int kColumns, int kThreads, int kAtOnce = 16>
PTX_FN void store_rows(bf16* to, int64_t stride, uint32_t from, int first, int end, int thread PTX_AT) {
    bf16* rows = to + first * stride;
    for_units<kRows, kColumns, kThreads, kAtOnce>(uint32_t(stride), thread, [&](int row, int unit, uint32_t offset) {
        if (first + row < end)
            st_global_v4(rows + offset, ld_shared_v4(from + row * odd_pitch(kColumns) + unit * 16 PTX_FROM) PTX_FROM);
    });
}

// Regions of the block's dynamic shared memory, one after the other, as `Shape::shared` counts them.
struct Regions {
    unsigned char* smem;
    SmemPlan plan;
    PTX_FN unsigned char* take(int bytes) {
        const int start = plan.take(bytes);
        smem_guard(smem, start + bytes);
        return smem + start;
    }
};

// Calls f(bf16()) where the source is compiled for bf16: a kernel of the tensor cores is empty for f32. Inside f, `cast`
// makes a T* what it is then.
template <class To, class E> PTX_FN const To* cast(To, const E* p) { return reinterpret_cast<const To*>(p); }
template <class To, class E> PTX_FN To* cast(To, E* p) { return reinterpret_cast<To*>(p); }
template <class E, class F> PTX_FN void if_bf16(F f) {
    if constexpr (same<E, bf16>) f(bf16());
}

}  // namespace ptx
