// Activations with their slopes, as floats.
#pragma once
#include "numbers.cuh"

namespace ptx {

// A function of one number and its derivative there.
struct Activation {
    float value, slope;
};

// Saturates to 0 and 1: e^-v overflows to infinity, whose reciprocal is 0.
PTX_FN float sigmoid(float v) { return rcp_approx(1.0f + ex2(-1.4426950408889634f * v)); }

PTX_FN Activation silu(float v) {
    const float s = sigmoid(v);
    return {v * s, s * (1.0f + v * (1.0f - s))};
}

// The tanh form: v·sigmoid(2z), z = sqrt(2/pi)·(v + 0.044715·v^3).
PTX_FN Activation gelu(float v) {
    const float square = v * v, twice = 1.5957691216f;
    const float s = sigmoid(twice * v * fmaf(0.044715f, square, 1.0f));
    return {v * s, s + v * s * (1.0f - s) * twice * fmaf(3.0f * 0.044715f, square, 1.0f)};
}

// Sine (value) and cosine (slope); absolute error below 2e-7 up to 1e8. The half turns come off in f64, so that no
// digits are lost and no table of pi is needed; library functions would keep one on the stack.
PTX_FN Activation sine(float v) {
    const double wide = v, k = rint(wide * 0.31830988618379067154);
    const float r = float(fma(k, -3.14159265358979323846, wide)), square = r * r;
    const float sign = float(1.0 - 2.0 * (k - 2.0 * floor(0.5 * k)));
    float s = fmaf(-1.0f / 39916800.0f, square, 1.0f / 362880.0f);
    s = fmaf(s, square, -1.0f / 5040.0f), s = fmaf(s, square, 1.0f / 120.0f), s = fmaf(s, square, -1.0f / 6.0f);
    float c = fmaf(1.0f / 479001600.0f, square, -1.0f / 3628800.0f);
    c = fmaf(c, square, 1.0f / 40320.0f), c = fmaf(c, square, -1.0f / 720.0f), c = fmaf(c, square, 1.0f / 24.0f);
    c = fmaf(c, square, -0.5f);
    return {sign * r * fmaf(s, square, 1.0f), sign * fmaf(c, square, 1.0f)};
}

// `act` of the contracts: 0 none, 1 GELU, 2 SiLU, 3 sine.
PTX_FN Activation activation(int act, float v) {
    if (act == 1) return gelu(v);
    if (act == 2) return silu(v);
    if (act == 3) return sine(v);
    return {v, 1.0f};
}

}  // namespace ptx
