// block = (offset + i)/4; words (a, b, c, d) = Philox4x32-10(counter = (block, stream), key = seed + row)
// z[row,i] = number (offset + i) mod 4 of: sqrt(-2 ln u(a))·(cos, sin)(2 pi u(b)), the same of c and d
//
// z: [B, L], T = f32 alone. The bits are those of `rng.rs`, which states every operation: each is one f32 operation rounded
// by itself, so products and sums here are __fmul_rn and __fadd_rn, which are never contracted.
//
// A thread owns one block of four numbers of a row; its stores are one of 16 bytes where offset and row length are
// multiples of 4, else up to four of 4 bytes.
//
// Bound: arithmetic, some 150 operations for 4 bytes written: on H100 about as long as the stores take, below 10 µs a
// million numbers. A latent of 131,072 numbers is bound by the launch.
//
// Requires: nothing; the index wraps at 2^64 as in the definition. Does not handle: other distributions.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

struct Words {
    uint32_t a, b, c, d;
};

__device__ __forceinline__ Words philox_words(uint64_t block, uint64_t stream, uint64_t seed) {
    Words w = {uint32_t(block), uint32_t(block >> 32), uint32_t(stream), uint32_t(stream >> 32)};
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t x = uint64_t(0xD2511F53u) * w.a, y = uint64_t(0xCD9E8D57u) * w.c;
        w = {uint32_t(y >> 32) ^ w.b ^ key0, uint32_t(y), uint32_t(x >> 32) ^ w.d ^ key1, uint32_t(x)};
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return w;
}

__device__ __forceinline__ float times(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ float plus(float x, float y) { return __fadd_rn(x, y); }

// Natural logarithm of a normal number in (0, 1).
__device__ __forceinline__ float ln_unit(float u) {
    const uint32_t shifted = __float_as_uint(u) - 0x3F3504F3u;
    const int exponent = int(shifted) >> 23;
    const float m = __uint_as_float((shifted & 0x007FFFFFu) + 0x3F3504F3u);
    const float s = __fdiv_rn(plus(m, -1.0f), plus(m, 1.0f)), z = times(s, s);
    float series = plus(times(z, 1.0f / 9.0f), 1.0f / 7.0f);
    series = plus(times(series, z), 0.2f);
    series = times(plus(times(series, z), 1.0f / 3.0f), z);
    const float twice = plus(s, s);
    return plus(times(float(exponent), 0.69314718056f), plus(twice, times(twice, series)));
}

// Cosine and sine of 2 pi q / 2^24.
__device__ __forceinline__ float2 cos_sin_turn(uint32_t q) {
    const uint32_t quarter = (q + (1u << 21)) >> 22;
    const int rest = int(q) - int(quarter << 22);
    const float x = times(float(rest), 6.28318530718f / 16777216.0f), z = times(x, x);
    float s = plus(times(z, 1.0f / 362880.0f), -(1.0f / 5040.0f));
    s = plus(times(s, z), 1.0f / 120.0f);
    s = times(plus(times(s, z), -(1.0f / 6.0f)), z);
    const float sin = plus(x, times(x, s));
    float c = plus(times(z, -1.0f / 3628800.0f), 1.0f / 40320.0f);
    c = plus(times(c, z), -(1.0f / 720.0f));
    c = times(plus(times(c, z), 1.0f / 24.0f), z);
    const float cos = plus(1.0f, times(plus(c, -0.5f), z));
    const bool odd = quarter & 1;
    const uint32_t first = __float_as_uint(odd ? sin : cos), second = __float_as_uint(odd ? cos : sin);
    return make_float2(__uint_as_float(first ^ ((quarter + 1) & 2) << 30), __uint_as_float(second ^ (quarter & 2) << 30));
}

__device__ __forceinline__ float2 box_muller(uint32_t a, uint32_t b) {
    const float u = times(float(2 * (a >> 9) + 1), 1.0f / 16777216.0f);
    const float radius = __fsqrt_rn(times(-2.0f, ln_unit(u)));
    const float2 turn = cos_sin_turn(2 * (b >> 9) + 1);
    return make_float2(times(radius, turn.x), times(radius, turn.y));
}

extern "C" __global__ void __launch_bounds__(128)
    philox_forward(T* z, uint64_t b, uint64_t l, uint64_t seed, uint64_t stream, uint64_t offset) {
    const uint64_t skipped = offset % 4, blocks = (l + skipped + 3) / 4;
    for (uint64_t row = blockIdx.y; row < b; row += gridDim.y) {
        T* line = z + row * l;
        for (uint64_t i = grid_thread(); i < blocks; i += grid_threads()) {
            // Blocks wrap at 2^62, because their numbers do at 2^64.
            const Words w = philox_words((offset / 4 + i) & (~uint64_t(0) >> 2), stream, seed + row);
            const float2 first = box_muller(w.a, w.b), second = box_muller(w.c, w.d);
            const float v[4] = {first.x, first.y, second.x, second.y};
            const uint64_t start = 4 * i - skipped;
            if (skipped == 0 && l % 4 == 0) {
                store<4>(line + start, v);
                continue;
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                // The numbers before the first wrap to indices far above l.
                if (start + e < l) line[start + e] = v[e];
            }
        }
    }
}
KERNEL_EXPORT(philox_forward);
