// The narrow number formats on the host: bf16, f16 and e4m3, rounded to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

namespace emu {

enum class Type : uint8_t { BF16, F16, E4M3 };

inline float float_of_bits(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
inline uint32_t bits_of_float(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}

inline float from_bf16(uint16_t h) { return float_of_bits(uint32_t(h) << 16); }
inline uint16_t to_bf16(float v) {
    uint32_t bits = bits_of_float(v);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // the GPU's canonical NaN
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    float v = float(mantissa) * 0x1p-24f;  // subnormal
    return sign ? -v : v;
}
inline uint16_t to_f16(float v) {
    uint32_t bits = bits_of_float(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
    if (magnitude < 0x38800000) {                                 // below 2^-14: a multiple of 2^-24
        float scaled = float_of_bits(magnitude) * 0x1p24f;
        uint32_t whole = uint32_t(scaled);
        float rest = scaled - float(whole);
        whole += rest > 0.5f || (rest == 0.5f && (whole & 1));
        return uint16_t(sign | whole);
    }
    return uint16_t(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1)) - 0x38000000) >> 13);
}

// 4 bits of exponent (bias 7), 3 of mantissa, no infinity; 0x7f is NaN, 448 the largest.
inline float from_e4m3(uint8_t b) {
    uint32_t exponent = b >> 3 & 15, mantissa = b & 7;
    float v = (b & 0x7f) == 0x7f ? float_of_bits(0x7fffffff)
              : exponent         ? float_of_bits((exponent + 120) << 23 | mantissa << 20)
                                 : float(mantissa) * 0x1p-9f;
    return b & 0x80 ? -v : v;
}
inline uint8_t to_e4m3(float v) {
    uint32_t bits = bits_of_float(v), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7f;
    float a = float_of_bits(magnitude);
    if (a >= 448.0f) return uint8_t(sign | 0x7e);  // saturates
    float unit = a < 0x1p-6f ? 0x1p-9f : float_of_bits(((magnitude >> 23) - 3) << 23);
    float scaled = a / unit;
    uint32_t whole = uint32_t(scaled);
    float rest = scaled - float(whole);
    whole += rest > 0.5f || (rest == 0.5f && (whole & 1));
    float rounded = float(whole) * unit;
    if (rounded < 0x1p-6f) return uint8_t(sign | whole);
    uint32_t r = bits_of_float(rounded);
    uint32_t code = ((r >> 23) - 120) << 3 | (r >> 20 & 7);
    return uint8_t(sign | (code > 0x7e ? 0x7e : code));
}

inline float from_16(Type type, uint16_t v) { return type == Type::F16 ? from_f16(v) : from_bf16(v); }

}  // namespace emu
