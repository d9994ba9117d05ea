// The fused gated convolutions: a thread owns two neighbouring channels of a segment of a sample's tokens and walks them.
//
// Time is the token, or for reversed channels the token counted from the end, which turns their filter into the same
// formula. At a step the thread takes the k and v of its time, and the q (and dy) of as many tokens before as the stages
// in between delay them, so that nothing waits in a queue. Every stage looks K values back: these lie in rings of
// K registers, and the walk goes in groups of K steps, so that the place in every ring is a constant.
//
// What is read goes through a ring in shared memory that is the thread's own (cp.async, no barrier): kAhead groups are in
// flight and take no registers. Tokens outside [0, N) are filled with zeros.
#pragma once
#include "../common/ptx.cuh"

using namespace ptx;

constexpr int kThreads = 32;
// Bytes of the two channels of a thread.
constexpr int kPair = 2 * int(sizeof(T));
// Blocks of the backward kernel with both filters of four taps that fit a multiprocessor by registers.
constexpr int kBackwardBlocks = sizeof(T) == 2 ? 11 : 8;
// Groups in flight.
template <int K> constexpr int kGroupsAhead = K == 3 ? 4 : K == 4 ? 3 : 2;

template <class E> __device__ __forceinline__ void load_pair(float (&r)[2], uint32_t a) {
    if constexpr (sizeof(E) == 2) {
        const uint32_t w = ld_shared_u32(a);
        r[0] = unpack_lo<E>(w), r[1] = unpack_hi<E>(w);
    } else {
        const uint2 w = ld_shared_v2(a);
        r[0] = __uint_as_float(w.x), r[1] = __uint_as_float(w.y);
    }
}
template <class E> __device__ __forceinline__ void store_pair(E* p, const float (&v)[2]) {
    if constexpr (sizeof(E) == 2)
        st_global_u32(p, pack<E>(v[0], v[1]));
    else
        st_global_v2(p, make_uint2(__float_as_uint(v[0]), __float_as_uint(v[1])));
}

// What a thread walks over.
struct Segment {
    // Row of time 0 in tensors of B·N rows, and the way to that of time 1.
    int row_0, way;
    int group, channel, first, count;
    __device__ __forceinline__ Segment(int n, int c, int reversed, int length, int segments) {
        const int tiles = (c + 2 * kThreads - 1) / (2 * kThreads);
        group = blockIdx.x / tiles, channel = 2 * (blockIdx.x % tiles * kThreads + int(threadIdx.x));
        first = group % segments * length, count = min(length, n - first);
        const bool back = channel >= c - reversed;
        way = back ? -1 : 1, row_0 = group / segments * n + (back ? n - 1 : 0);
    }
    // The element of the thread's first channel at a time, in rows of `width`.
    __device__ __forceinline__ int64_t at(int time, int width) const {
        return int64_t(row_0 + way * time) * width + channel;
    }
};

// Copies the pair of time `time` of a stream into the ring, zeros outside [0, n).
__device__ __forceinline__ void fetch(uint32_t to, const T* from, const Segment& of, int width, int time, bool wanted,
                                      int n) {
    const bool inside = wanted && unsigned(time) < unsigned(n);
    cp_async<kPair>(to, from + (inside ? of.at(time, width) : 0), inside ? kPair : 0);
}

template <int K>
__device__ __forceinline__ void load_filter(float (&w)[K][2], float (&b)[2], const T* weight, const T* bias, size_t row) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
        b[e] = to_float(bias[row + e]);
#pragma unroll
        for (int j = 0; j < K; j++) w[j][e] = to_float(weight[(row + e) * K + j]);
    }
}

// The filter over the last K values of a ring whose newest is at u.
template <int K>
__device__ __forceinline__ void filter(float (&r)[2], const float (&w)[K][2], const float (&b)[2],
                                       const float (&ring)[K][2], int u) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
        r[e] = b[e];
#pragma unroll
        for (int j = 0; j < K; j++) r[e] = fmaf(w[j][e], ring[(u + 1 + j) % K][e], r[e]);
    }
}

template <int K, bool kShort, bool kInner>
__device__ __forceinline__ void walk_forward(const T* p, const T* short_weight, const T* short_bias,
                                             const T* inner_weight, const T* inner_bias, T* y, int n, int c, int lead,
                                             int reversed, int length, int segments) {
    constexpr int kAhead = kGroupsAhead<K>, kSlots = kAhead + 1, kRow = kThreads * kPair, kWarm = (kShort + kInner) * (K - 1);
    SMEM_DYNAMIC(smem, 16);
    const Segment of(n, c, reversed, length, segments);
    if (of.channel >= c) return;
    const uint32_t ring = smem_u32(smem) + threadIdx.x * kPair;
    const int after = K - 1 - lead, delay = kInner ? after : 0, late = (kShort + kInner) * after;
    // Steps are told by the time of k and v; that of y is `late` before it.
    const int own = of.first + late, end = own + of.count;
    auto take = [&](int time, int slot) {
        const uint32_t to = ring + slot * (3 * K) * kRow;
        if (time + K <= end && time - delay >= 0 && time + K <= n) {
            const T *q = p + of.at(time - delay, 3 * c), *k = p + c + of.at(time, 3 * c);
            const int step = of.way * 3 * c;
#pragma unroll
            for (int u = 0; u < K; u++) {
                cp_async<kPair>(to + (3 * u) * kRow, q + u * step);
                cp_async<kPair>(to + (3 * u + 1) * kRow, k + u * step);
                cp_async<kPair>(to + (3 * u + 2) * kRow, k + c + u * step);
            }
        } else {
#pragma unroll
            for (int u = 0; u < K; u++) {
                const bool wanted = time + u < end;
                fetch(to + (3 * u) * kRow, p, of, 3 * c, time + u - delay, wanted, n);
                fetch(to + (3 * u + 1) * kRow, p + c, of, 3 * c, time + u, wanted, n);
                fetch(to + (3 * u + 2) * kRow, p + 2 * c, of, 3 * c, time + u, wanted, n);
            }
        }
        cp_async_commit();
    };
    int time = own - kWarm;
    for (int group = 0; group < kAhead; group++) take(time + group * K, group);

    float w[4][K][2], b[4][2];
    if constexpr (kShort) {
#pragma unroll
        for (int i = 0; i < 3; i++) load_filter<K>(w[i], b[i], short_weight, short_bias, size_t(i) * c + of.channel);
    }
    if constexpr (kInner) load_filter<K>(w[3], b[3], inner_weight, inner_bias, of.channel);
    float x[3][K][2], kv[K][2];
#pragma unroll
    for (int j = 0; j < K; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) x[0][j][e] = x[1][j][e] = x[2][j][e] = kv[j][e] = 0.0f;

    for (int slot = 0; time < end; time += K) {
        take(time + kAhead * K, slot == 0 ? kSlots - 1 : slot - 1);
        cp_async_wait<kAhead>();
        const uint32_t from = ring + slot * (3 * K) * kRow;
        const int step = of.way * c;
        T* out = y + of.at(time - late, c);
#pragma unroll
        for (int u = 0; u < K; u++) {
            float f[3][2], mixed[2];
#pragma unroll
            for (int s = 0; s < 3; s++) {
                load_pair<T>(x[s][u], from + (3 * u + s) * kRow);
                if constexpr (kShort)
                    filter<K>(f[s], w[s], b[s], x[s], u);
                else
                    f[s][0] = x[s][u][0], f[s][1] = x[s][u][1];
            }
            mixed[0] = f[1][0] * f[2][0], mixed[1] = f[1][1] * f[2][1];
            if constexpr (kInner) {
                const bool inside = unsigned(time + u - (kShort ? after : 0)) < unsigned(n);
                kv[u][0] = inside ? mixed[0] : 0.0f, kv[u][1] = inside ? mixed[1] : 0.0f;
                filter<K>(mixed, w[3], b[3], kv, u);
            }
            mixed[0] *= f[0][0], mixed[1] *= f[0][1];
            if (time + u >= own && time + u < end) store_pair(out + u * step, mixed);
        }
        slot = slot + 1 == kSlots ? 0 : slot + 1;
    }
    cp_async_wait<0>();
}
