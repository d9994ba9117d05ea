// Transforms in shared memory on the CUDA cores, in f32: real sequences of up to 2m places as m complex numbers.
//
// A sequence c is kept as c[n] - i·c[n + m], turned by exp(-iπn/2m) before a transform of length m and back after it: a
// product of spectra is then the product of polynomials with x^2m = -1, so places that run over come back with their
// sign changed, and the conjugate of a spectrum is that of the sequence with its places negated. No step parts the
// spectra of two real sequences, and a filter's spectrum is a factor for every place alone.
//
// Radix 2 to 16 first, then 16: the spectrum stays in the order in which the passes leave it, which is that in which the
// way back takes it. The last pass there, what is done with the spectrum and the first pass back go through registers;
// the element k of butterfly j is the same thread's in every call, which is why spectra in memory need no barrier.
#pragma once
#include "../common/ptx.cuh"

using namespace ptx;

__device__ __forceinline__ float2 times(float2 a, float2 b) {
    return make_float2(fmaf(a.x, b.x, -a.y * b.y), fmaf(a.x, b.y, a.y * b.x));
}
__device__ __forceinline__ float2 conjugate(float2 a) { return make_float2(a.x, -a.y); }

// exp(-iπk/8), k < 8.
__device__ __forceinline__ float2 sixteenth(int k) {
    constexpr float c1 = 0.92387953251128674f, c2 = 0.70710678118654752f, c3 = 0.38268343236508977f;
    switch (k) {
        case 0: return make_float2(1.0f, 0.0f);
        case 1: return make_float2(c1, -c3);
        case 2: return make_float2(c2, -c2);
        case 3: return make_float2(c3, -c1);
        case 4: return make_float2(0.0f, -1.0f);
        case 5: return make_float2(-c3, -c1);
        case 6: return make_float2(-c2, -c2);
        default: return make_float2(-c1, -c3);
    }
}

// The place of output k of `butterfly`, bits reversed.
template <int kBits> __device__ __forceinline__ constexpr int place(int k) {
    int r = 0;
    for (int b = 0; b < kBits; b++) r |= (k >> b & 1) << (kBits - 1 - b);
    return r;
}

// The transform of 2^kBits values; output k lies at place<kBits>(k). kBack: the one back takes its input there and gives its
// output in order, not divided by the length.
template <int kBits, bool kBack> __device__ __forceinline__ void butterfly(float2 (&v)[1 << kBits]) {
#pragma unroll
    for (int step = 0; step < kBits; step++) {
        const int half = kBack ? 1 << step : 1 << (kBits - 1 - step);
#pragma unroll
        for (int i = 0; i < 1 << (kBits - 1); i++) {
            const int k = i % half, at = i / half * 2 * half + k;
            const float2 turn = sixteenth(k * (8 / half));
            float2 a = v[at], b = v[at + half];
            if (kBack && k) b = 4 * k == 2 * half ? make_float2(-b.y, b.x) : times(b, conjugate(turn));
            const float2 sum = make_float2(a.x + b.x, a.y + b.y), difference = make_float2(a.x - b.x, a.y - b.y);
            v[at] = sum;
            if (kBack || !k)
                v[at + half] = difference;
            else
                v[at + half] = 4 * k == 2 * half ? make_float2(difference.y, -difference.x) : times(difference, turn);
        }
    }
}

struct Ring {
    float2* data;
    // exp(-2πin/m) and exp(-iπn/2m), n < m.
    const float2 *roots, *turns;
    int bits;

    __device__ __forceinline__ int size() const { return 1 << bits; }
    // Butterflies of 16 in order of neighbours: one more place every 16 spreads them over the banks.
    static __device__ __forceinline__ int pad(int i) { return i + (i >> 4); }

    // Fills the ring with get(n) = (c[n], -c[n + m]).
    template <class F> __device__ __forceinline__ void load(F get) const {
        __syncthreads();
        for (int n = threadIdx.x; n < size(); n += blockDim.x) data[pad(n)] = times(get(n), turns[n]);
        __syncthreads();
    }
    // put(n, c[n], -c[n + m]).
    template <class F> __device__ __forceinline__ void store(F put) const {
        const float scale = 1.0f / float(size());
        for (int n = threadIdx.x; n < size(); n += blockDim.x) {
            const float2 v = times(data[pad(n)], conjugate(turns[n]));
            put(n, v.x * scale, v.y * scale);
        }
        __syncthreads();
    }

    // A pass over blocks of 2^length places by butterflies of 2^kBits.
    template <int kBits, bool kBack> __device__ __forceinline__ void pass(int length) const {
        const int gap = length - kBits;
        for (int j = threadIdx.x; j < size() >> kBits; j += blockDim.x) {
            const int at = j & ((1 << gap) - 1), base = (j >> gap << length) + at;
            const float2 root = roots[at << (bits - length)];
            float2 v[1 << kBits];
            float2 turn = make_float2(1.0f, 0.0f);
            if (kBack) {
#pragma unroll
                for (int k = 0; k < 1 << kBits; k++) {
                    v[place<kBits>(k)] = times(data[pad(base + (k << gap))], conjugate(turn));
                    turn = times(turn, root);
                }
                butterfly<kBits, true>(v);
#pragma unroll
                for (int k = 0; k < 1 << kBits; k++) data[pad(base + (k << gap))] = v[k];
            } else {
#pragma unroll
                for (int k = 0; k < 1 << kBits; k++) v[k] = data[pad(base + (k << gap))];
                butterfly<kBits, false>(v);
#pragma unroll
                for (int k = 0; k < 1 << kBits; k++) {
                    data[pad(base + (k << gap))] = times(v[place<kBits>(k)], turn);
                    turn = times(turn, root);
                }
            }
        }
        __syncthreads();
    }
    template <bool kBack> __device__ __forceinline__ void first_pass() const {
        switch (bits % 4) {
            case 1: return pass<1, kBack>(bits);
            case 2: return pass<2, kBack>(bits);
            case 3: return pass<3, kBack>(bits);
            default: return;
        }
    }
    __device__ __forceinline__ void there() const {
        first_pass<false>();
        for (int length = bits / 4 * 4; length > 4; length -= 4) pass<4, false>(length);
    }
    __device__ __forceinline__ void back() const {
        for (int length = 8; length <= bits / 4 * 4; length += 4) pass<4, true>(length);
        first_pass<true>();
    }
    // The last pass there where `in`, with(v, j) for the 16 values of each butterfly, the first one back where `out`. Value k
    // of the spectrum lies at v[place<4>(k)].
    template <class F> __device__ __forceinline__ void spectrum(bool in, bool out, F with) const {
        for (int j = threadIdx.x; j < size() >> 4; j += blockDim.x) {
            float2 v[16];
#pragma unroll
            for (int k = 0; k < 16; k++) v[k] = in ? data[pad(16 * j + k)] : make_float2(0.0f, 0.0f);
            if (in) butterfly<4, false>(v);
            with(v, j);
            if (!out) continue;
            butterfly<4, true>(v);
#pragma unroll
            for (int k = 0; k < 16; k++) data[pad(16 * j + k)] = v[k];
        }
        __syncthreads();
    }
};

// A spectrum in memory: value i of butterfly j, in the order of registers.
struct Spectrum {
    float2* at;
    int butterflies;
    __device__ __forceinline__ float2& operator()(int i, int j) const { return at[size_t(i) * butterflies + j]; }
};
