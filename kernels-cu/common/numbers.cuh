// Conversions between f32 and the narrow types, and the approximate functions of the special function unit.
#pragma once
#include "base.cuh"

namespace ptx {

// ---- one value ----

PTX_FN float to_float(float v) { return v; }
PTX_FN float to_float(bf16 v) {
    float r;
    PTX_DO(r = __uint_as_float(uint32_t(v.bits) << 16), r = emu::from_bf16(v.bits));
    return r;
}
PTX_FN float to_float(f16 v) {
    float r;
    PTX_DO(asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits)), r = emu::from_f16(v.bits));
    return r;
}

// Rounded to nearest even.
template <class T> PTX_FN T from_float(float v) {
    static_assert(same<T, float> || same<T, bf16> || same<T, f16>, "no conversion to this type");
    if constexpr (same<T, float>) {
        return v;
    } else if constexpr (same<T, bf16>) {
        bf16 r;
        PTX_DO(asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v)), r.bits = emu::to_bf16(v));
        return r;
    } else {
        f16 r;
        PTX_DO(asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v)), r.bits = emu::to_f16(v));
        return r;
    }
}

// ---- two values in a register: `lo` is the one at the lower address ----

template <class T> PTX_FN uint32_t pack(float lo, float hi) {
    static_assert(same<T, bf16> || same<T, f16>, "pack takes a 16-bit type");
    uint32_t r;
    if constexpr (same<T, bf16>) {
        PTX_DO(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)),
               r = emu::to_bf16(lo) | uint32_t(emu::to_bf16(hi)) << 16);
    } else {
        PTX_DO(asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)),
               r = emu::to_f16(lo) | uint32_t(emu::to_f16(hi)) << 16);
    }
    return r;
}
template <class T> PTX_FN float unpack_lo(uint32_t v) { return to_float(T{uint16_t(v)}); }
template <class T> PTX_FN float unpack_hi(uint32_t v) { return to_float(T{uint16_t(v >> 16)}); }

#if PTX_SM90
// Two e4m3 values, saturated to ±448.
PTX_FN uint16_t pack_e4m3(float lo, float hi) {
    uint16_t r;
    PTX_DO(asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo)),
           r = uint16_t(emu::to_e4m3(lo) | emu::to_e4m3(hi) << 8));
    return r;
}
#endif

// ---- approximations: relative error about 2^-22 for ex2 and lg2, 2^-23 for rcp and rsqrt, 2^-11 for tanh ----

PTX_FN float ex2(float x) {
    float r;
    PTX_DO(asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)), r = exp2f(x));
    return r;
}
PTX_FN float lg2(float x) {
    float r;
    PTX_DO(asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)), r = log2f(x));
    return r;
}
PTX_FN float rcp_approx(float x) {
    float r;
    PTX_DO(asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)), r = 1.0f / x);
    return r;
}
PTX_FN float rsqrt_approx(float x) {
    float r;
    PTX_DO(asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)), r = 1.0f / sqrtf(x));
    return r;
}
PTX_FN float tanh_approx(float x) {
    float r;
    PTX_DO(asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(x)), r = tanhf(x));
    return r;
}

}  // namespace ptx
