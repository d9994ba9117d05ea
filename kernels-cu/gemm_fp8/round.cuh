// Rows rounded to e4m3, each with its own scale: a warp a row.
#pragma once
#include "../common/ptx.cuh"

namespace fp8 {

using namespace ptx;

constexpr float kLargest = 448.0f;

// A pair as e4m3, |v| ≤ 448, to nearest even, by integers: for cards without the conversion.
PTX_FN uint32_t code(float v) {
    const float size = fabsf(v);
    const uint32_t sign = __float_as_uint(v) >> 24 & 0x80;
    // Below 2^-6 numbers are multiples of 2^-9: adding 2^14 leaves just those bits, rounded.
    if (size < 0.015625f) return sign | (__float_as_uint(size + 16384.0f) & 15);
    const uint32_t bits = __float_as_uint(size);
    const uint32_t rounded = bits + 0x7ffff + (bits >> 20 & 1);
    return sign | min((rounded >> 20) - (120u << 3), 0x7eu);
}
struct ByIntegers {
    static PTX_FN uint32_t pair(float lo, float hi) { return code(lo) | code(hi) << 8; }
};

// x: [rows, k]; to: [rows, stride], a multiple of 16, zeros from k on; scales: [rows].
template <class Convert>
PTX_FN void round_rows(const T* x, uint8_t* to, float* scales, int rows, int k, int stride) {
    const int row = int(blockIdx.x) * int(blockDim.x / 32) + int(threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const T* from = x + size_t(row) * k;
    const bool vectors = vector_rows(k);
    auto read = [&](float(&v)[8], int at) {
        if (vectors) {
            load8_kept(v, from + at);
        } else {
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = at + e < k ? to_float(from[at + e]) : 0.0f;
        }
    };
    float largest = 0.0f, v[8];
    for (int at = 8 * lane; at < k; at += 256) {
        read(v, at);
#pragma unroll
        for (int e = 0; e < 8; e++) largest = fmaxf(largest, fabsf(v[e]));
    }
    largest = warp_max(largest);
    const float scale = largest > 0.0f ? largest / kLargest : 1.0f;
    if (lane == 0) scales[row] = scale;
    for (int at = 8 * lane; at < stride; at += 256) {
        uint2 packed = make_uint2(0, 0);
        if (at < k) {
            read(v, at);
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = v[e] / scale;
            packed.x = Convert::pair(v[0], v[1]) | Convert::pair(v[2], v[3]) << 16;
            packed.y = Convert::pair(v[4], v[5]) | Convert::pair(v[6], v[7]) << 16;
        }
        st_global_v2(to + size_t(row) * stride + at, packed);
    }
}

}  // namespace fp8
