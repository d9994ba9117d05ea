// What kernels over rows and columns share: rows kept in registers as they lie in memory, sums of partial results.
#pragma once
#include "activation.cuh"
#include "elementwise.cuh"

namespace ptx {

// Eight elements as they lie in memory: half the registers of eight floats where the type is narrow.
template <class E> struct Packed8 { uint4 words[sizeof(E) / 2]; };

template <class E> PTX_FN Packed8<E> zero_packed8() {
    Packed8<E> r;
#pragma unroll
    for (int i = 0; i < int(sizeof(E) / 2); i++) r.words[i] = make_uint4(0, 0, 0, 0);
    return r;
}
// Read-only for the whole kernel; `p` aligned to 16 bytes.
template <class E> PTX_FN Packed8<E> load_packed8(const E* p PTX_AT) {
    Packed8<E> r;
    r.words[0] = ld_global_nc_v4(p PTX_FROM);
    if constexpr (sizeof(E) == 4) r.words[1] = ld_global_nc_v4(p + 4 PTX_FROM);
    return r;
}
template <class E> PTX_FN void unpack(float (&r)[8], const Packed8<E>& v) {
    if constexpr (sizeof(E) == 2) {
        unpack8<E>(r, v.words[0]);
    } else {
        unpack4(r, v.words[0]);
        unpack4(r + 4, v.words[1]);
    }
}

// Zeros in the columns of a row outside [from, to), by `threads` threads of which this is number `thread`.
template <class E> PTX_FN void zero_outside(E* row, int width, int from, int to, int thread, int threads) {
    for (int i = thread; i < width - (to - from); i += threads) row[i < from ? i : i + (to - from)] = from_float<E>(0.0f);
}

// The sum of `count` partial results that lie `stride` floats apart, always in the same order, by a block of kSumThreads
// threads: `groups` of them share the partial results of a column, which the others of its place modulo kSumThreads /
// groups own, and every one of them gets the sum. `shared` are kSumThreads floats.
constexpr int kSumGroups = 16, kSumThreads = 32 * kSumGroups;
PTX_FN float sum_partials(const float* first, int count, size_t stride, bool inside, float* shared, int groups PTX_AT) {
    const int columns = kSumThreads / groups;
    float sum = 0.0f;
    if (inside) {
#pragma unroll 8
        for (int i = threadIdx.x / columns; i < count; i += groups) sum += first[i * stride];
    }
    shared[threadIdx.x] = sum;
    PTX_DO(__syncthreads(), __syncthreads(at));
    sum = 0.0f;
    for (int g = 0; g < groups; g++) sum += shared[columns * g + threadIdx.x % columns];
    return sum;
}
// The same by all warps of the block, one column a lane.
PTX_FN float sum_partials(const float* first, int count, size_t stride, bool inside, float* shared PTX_AT) {
    return sum_partials(first, count, stride, inside, shared, kSumGroups PTX_FROM);
}

}  // namespace ptx
