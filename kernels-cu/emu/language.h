// CUDA C++ for a host compiler: qualifiers, vector types, built-in variables, warp and math intrinsics, atomics.
#pragma once
#include <math.h>

#include "api.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#define threadIdx (emu::cur->thread)
#define blockIdx (emu::cur->block)
#define blockDim (emu::cur->block_dim)
#define gridDim (emu::cur->grid_dim)
constexpr int warpSize = 32;

#define EMU_AT emu::At at = emu::At::current()

// ---- barriers and fences ----
inline void __syncthreads(EMU_AT) { emu::barrier(0, -1, true, at); }
inline int __syncthreads_count(int p, EMU_AT) { return emu::barrier_count(p != 0, at); }
inline int __syncthreads_or(int p, EMU_AT) { return emu::barrier_count(p != 0, at) != 0; }
inline int __syncthreads_and(int p, EMU_AT) { return emu::barrier_count(p == 0, at) == 0; }
inline void __syncwarp(uint32_t mask = ~0u, EMU_AT) { emu::syncwarp(mask, at); }
// An order of this thread's own accesses; nothing to do where threads of a block share a processor.
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned, EMU_AT) { emu::spin(at); }

// ---- warps ----
namespace emu {
template <class T> uint64_t to_raw(T v) {
    static_assert(sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
    uint64_t raw = 0;
    memcpy(&raw, &v, sizeof v);
    return raw;
}
template <class T> T shuffle_as(Shuffle kind, uint32_t mask, T v, int operand, int width, At at) {
    uint64_t raw = shuffle(kind, mask, to_raw(v), operand, width, at);
    memcpy(&v, &raw, sizeof v);
    return v;
}
}  // namespace emu
template <class T> T __shfl_sync(uint32_t m, T v, int lane, int width = 32, EMU_AT) {
    return emu::shuffle_as(emu::Shuffle::Index, m, v, lane, width, at);
}
template <class T> T __shfl_up_sync(uint32_t m, T v, int delta, int width = 32, EMU_AT) {
    return emu::shuffle_as(emu::Shuffle::Up, m, v, delta, width, at);
}
template <class T> T __shfl_down_sync(uint32_t m, T v, int delta, int width = 32, EMU_AT) {
    return emu::shuffle_as(emu::Shuffle::Down, m, v, delta, width, at);
}
template <class T> T __shfl_xor_sync(uint32_t m, T v, int bits, int width = 32, EMU_AT) {
    return emu::shuffle_as(emu::Shuffle::Xor, m, v, bits, width, at);
}
inline uint32_t __ballot_sync(uint32_t m, int p, EMU_AT) { return emu::ballot(m, p != 0, at); }
inline int __any_sync(uint32_t m, int p, EMU_AT) { return emu::ballot(m, p != 0, at) != 0; }
inline int __all_sync(uint32_t m, int p, EMU_AT) { return emu::ballot(m, p == 0, at) == 0; }
template <class T> uint32_t __match_any_sync(uint32_t m, T v, EMU_AT) {
    return emu::match_any(m, emu::to_raw(v), at);
}
inline uint32_t __activemask() { return emu::active_mask(); }
template <class T> T __reduce_add_sync(uint32_t m, T v, EMU_AT) {
    return T(emu::reduce(emu::Reduce::Add, std::is_signed_v<T>, m, uint32_t(v), at));
}
template <class T> T __reduce_min_sync(uint32_t m, T v, EMU_AT) {
    return T(emu::reduce(emu::Reduce::Min, std::is_signed_v<T>, m, uint32_t(v), at));
}
template <class T> T __reduce_max_sync(uint32_t m, T v, EMU_AT) {
    return T(emu::reduce(emu::Reduce::Max, std::is_signed_v<T>, m, uint32_t(v), at));
}
inline uint32_t __reduce_and_sync(uint32_t m, uint32_t v, EMU_AT) {
    return emu::reduce(emu::Reduce::And, false, m, v, at);
}
inline uint32_t __reduce_or_sync(uint32_t m, uint32_t v, EMU_AT) {
    return emu::reduce(emu::Reduce::Or, false, m, v, at);
}
inline uint32_t __reduce_xor_sync(uint32_t m, uint32_t v, EMU_AT) {
    return emu::reduce(emu::Reduce::Xor, false, m, v, at);
}

// ---- atomics: ordered more strongly than on the GPU, where they are relaxed ----
template <class T> T atomicAdd(T* p, T v) {
    emu::yield_point();
    if constexpr (std::is_floating_point_v<T>)
        return emu::atomic_float_add(p, v);
    else
        return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
template <class T> T atomicExch(T* p, T v) {
    emu::yield_point();
    T old;
    __atomic_exchange(p, &v, &old, __ATOMIC_ACQ_REL);
    return old;
}
template <class T> T atomicCAS(T* p, T seen, T next) {
    emu::yield_point();
    __atomic_compare_exchange(p, &seen, &next, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    return seen;
}
template <class T, class F> T emu_atomic_update(T* p, F next_of) {
    emu::yield_point();
    T seen = __atomic_load_n(p, __ATOMIC_RELAXED), next;
    do next = next_of(seen);
    while (!__atomic_compare_exchange_n(p, &seen, next, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
    return seen;
}
template <class T> T atomicMax(T* p, T v) {
    return emu_atomic_update(p, [v](T seen) { return seen > v ? seen : v; });
}
template <class T> T atomicMin(T* p, T v) {
    return emu_atomic_update(p, [v](T seen) { return seen < v ? seen : v; });
}
template <class T> T atomicOr(T* p, T v) {
    emu::yield_point();
    return __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL);
}
// Wraps to 0 after `last`: a counter that resets itself.
inline unsigned atomicInc(unsigned* p, unsigned last) {
    return emu_atomic_update(p, [last](unsigned seen) { return seen >= last ? 0 : seen + 1; });
}

// ---- arithmetic ----
template <class T> T __ldg(const T* p) { return *p; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
// Rounded by themselves: the empty assembly keeps the host compiler from contracting them with what follows.
inline float __fmul_rn(float x, float y) {
    float r = x * y;
    asm("" : "+x"(r));
    return r;
}
inline float __fadd_rn(float x, float y) {
    float r = x + y;
    asm("" : "+x"(r));
    return r;
}
inline float __fsub_rn(float x, float y) { return __fadd_rn(x, -y); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline uint32_t __float_as_uint(float v) { return emu::bits_of_float(v); }
inline float __uint_as_float(uint32_t v) { return emu::float_of_bits(v); }
inline int __float_as_int(float v) { return int(emu::bits_of_float(v)); }
inline float __int_as_float(int v) { return emu::float_of_bits(uint32_t(v)); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(uint32_t v) { return __builtin_ffs(int(v)); }
inline int __clz(uint32_t v) { return v ? __builtin_clz(v) : 32; }
inline uint32_t __umulhi(uint32_t x, uint32_t y) { return uint32_t(uint64_t(x) * y >> 32); }
inline uint32_t __funnelshift_l(uint32_t lo, uint32_t hi, uint32_t shift) {
    return uint32_t((uint64_t(hi) << 32 | lo) << (shift & 31) >> 32);
}
inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
inline unsigned min(unsigned x, unsigned y) { return x < y ? x : y; }
inline unsigned max(unsigned x, unsigned y) { return x > y ? x : y; }
inline long min(long x, long y) { return x < y ? x : y; }
inline long max(long x, long y) { return x > y ? x : y; }
