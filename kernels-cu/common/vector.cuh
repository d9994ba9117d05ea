// Eight elements at a time as floats, whatever they are in memory, and sums over a warp or a block.
#pragma once
#include "memory.cuh"
#include "numbers.cuh"

namespace ptx {

// Elements of a vector access: 16 bytes of a 16-bit type, 32 bytes of f32.
constexpr int kVector = 8;

// Whether rows of this length keep every vector aligned.
PTX_BOTH bool vector_rows(int length) { return length % kVector == 0; }

template <class E> PTX_FN void unpack8(float (&r)[8], uint4 v) {
    r[0] = unpack_lo<E>(v.x), r[1] = unpack_hi<E>(v.x), r[2] = unpack_lo<E>(v.y), r[3] = unpack_hi<E>(v.y);
    r[4] = unpack_lo<E>(v.z), r[5] = unpack_hi<E>(v.z), r[6] = unpack_lo<E>(v.w), r[7] = unpack_hi<E>(v.w);
}
PTX_FN void unpack4(float* r, uint4 v) {
    r[0] = __uint_as_float(v.x), r[1] = __uint_as_float(v.y);
    r[2] = __uint_as_float(v.z), r[3] = __uint_as_float(v.w);
}

// Read-only for the whole kernel; `p` aligned to 16 bytes.
template <class E> PTX_FN void load8(float (&r)[8], const E* p PTX_AT) {
    if constexpr (sizeof(E) == 2) {
        unpack8<E>(r, ld_global_nc_v4(p PTX_FROM));
    } else {
        unpack4(r, ld_global_nc_v4(p PTX_FROM));
        unpack4(r + 4, ld_global_nc_v4(p + 4 PTX_FROM));
    }
}
// Of memory that this kernel writes, too, or that other warps read soon: kept in L1.
template <class E> PTX_FN void load8_kept(float (&r)[8], const E* p) {
    const uint4* from = reinterpret_cast<const uint4*>(p);
    if constexpr (sizeof(E) == 2) {
        unpack8<E>(r, from[0]);
    } else {
        unpack4(r, from[0]);
        unpack4(r + 4, from[1]);
    }
}
template <class E> PTX_FN void store8(E* p, const float (&v)[8] PTX_AT) {
    uint4 w;
    if constexpr (sizeof(E) == 2) {
        w.x = pack<E>(v[0], v[1]), w.y = pack<E>(v[2], v[3]), w.z = pack<E>(v[4], v[5]), w.w = pack<E>(v[6], v[7]);
        st_global_v4(p, w PTX_FROM);
    } else {
        w.x = __float_as_uint(v[0]), w.y = __float_as_uint(v[1]);
        w.z = __float_as_uint(v[2]), w.w = __float_as_uint(v[3]);
        st_global_v4(p, w PTX_FROM);
        w.x = __float_as_uint(v[4]), w.y = __float_as_uint(v[5]);
        w.z = __float_as_uint(v[6]), w.w = __float_as_uint(v[7]);
        st_global_v4(p + 4, w PTX_FROM);
    }
}

// By butterflies: every lane holds the result, and the order of the sum is fixed.
PTX_FN float warp_sum(float v PTX_AT) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += PTX_DO(__shfl_xor_sync(kFullMask, v, o), __shfl_xor_sync(kFullMask, v, o, 32, at));
    return v;
}
PTX_FN float warp_max(float v PTX_AT) {
#pragma unroll
    for (int o = 16; o; o >>= 1)
        v = fmaxf(v, PTX_DO(__shfl_xor_sync(kFullMask, v, o), __shfl_xor_sync(kFullMask, v, o, 32, at)));
    return v;
}

// The sum over a block of kWarps warps, for every thread; `partials` are kWarps floats in shared memory, free again
// when it returns.
template <int kWarps> PTX_FN float block_sum(float v, float* partials PTX_AT) {
    v = warp_sum(v PTX_FROM);
    if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = v;
    PTX_DO(__syncthreads(), __syncthreads(at));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; i++) sum += partials[i];
    PTX_DO(__syncthreads(), __syncthreads(at));
    return sum;
}

// A chunk of a row that lies in lanes: chunk i of lane l covers elements 8·(l + 32·i) and on.
PTX_FN int lane_chunk(int i) { return int(threadIdx.x % 32) + 32 * i; }

}  // namespace ptx
