// conv(w, bias, x)[i,j] = bias + sum_rs w[r,s] * x[i - K/2 + r, j - K/2 + s], zero outside the grid; the identity where
// w is null.  q, k, v = conv(short_weight, short_bias, p);  y = q * conv(inner_weight, inner_bias, k * v)
// Backward: dp and the gradients of both filters.
//
// p, dp: [B, Gh·Gw, 3, C] T; y, dy: [B, Gh·Gw, C] T; short_weight: [3, C, K, K] T, short_bias: [3, C] T; inner_weight:
// [C, K, K] T, inner_bias: [C] T, and their gradients; sums in f32.
//
// Forward, K = 3 and C even: the walks of walk.cuh. With both filters k·v goes through scratch memory in f32 and q
// waits for a second walk: the taps of all four would not leave room for windows. With one of them a single walk is enough.
//
// Everything else and the backward pass: the kernels of common/gated_window.cuh with a square window. A thread owns an
// element, a warp 32 channels of a token. k·v, the inner result's gradient dc and those of the filtered q, k, v (du) go
// through scratch memory in f32, and every tap is a load.
//
// Bound: memory. In bf16 8 bytes an element of y with one filter; 16 with both (k and v, k·v written and read, q, y);
// from L2 twice what is read, where two rows share four.
//
// Requires: nothing beyond the contract.
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/gated_window.cuh"
#include "walk.cuh"

using namespace ptx;

__device__ __forceinline__ Window square(int gh, int gw, int k) { return {gh, gw, k, k, k / 2, k / 2}; }

// K = 3; length, segments: columns of a walk, and walks that a row takes. kv: [B, Gh·Gw, C], scratch.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    gated_conv_2d_se_3_product(const T* p, const T* short_weight, const T* short_bias, float* kv, int gh, int gw, int c,
                               int length, int segments) {
    walk_product(p, short_weight, short_bias, kv, gh, gw, c, length, segments);
}
KERNEL_EXPORT(gated_conv_2d_se_3_product);

extern "C" __global__ void __launch_bounds__(kThreads)
    gated_conv_2d_se_3_forward(const T* p, const T* short_weight, const T* short_bias, const T* inner_weight,
                               const T* inner_bias, const float* kv, T* y, int gh, int gw, int c, int length,
                               int segments) {
    walk_se(p, short_weight, short_bias, inner_weight, inner_bias, kv, y, gh, gw, c, length, segments);
}
KERNEL_EXPORT(gated_conv_2d_se_3_forward);

extern "C" __global__ void __launch_bounds__(kThreads)
    gated_conv_2d_x_3_forward(const T* p, const T* short_weight, const T* short_bias, T* y, int gh, int gw, int c,
                              int length, int segments) {
    walk_x(p, short_weight, short_bias, y, gh, gw, c, length, segments);
}
KERNEL_EXPORT(gated_conv_2d_x_3_forward);

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    gated_conv_2d_y_3_forward(const T* p, const T* inner_weight, const T* inner_bias, T* y, int gh, int gw, int c,
                              int length, int segments) {
    walk_y(p, inner_weight, inner_bias, y, gh, gw, c, length, segments);
}
KERNEL_EXPORT(gated_conv_2d_y_3_forward);

// Any window, any C. kv: [B, Gh·Gw, C], scratch.
extern "C" __global__ void __launch_bounds__(kWindowThreads)
    gated_conv_2d_product(const T* p, const T* short_weight, const T* short_bias, float* kv, int b, int gh, int gw,
                          int c, int k) {
    const WindowFilters f = {short_weight, short_bias, nullptr, nullptr};
    window_product(square(gh, gw, k), f, p, kv, b, c, 0);
}
KERNEL_EXPORT(gated_conv_2d_product);

extern "C" __global__ void __launch_bounds__(kWindowThreads)
    gated_conv_2d_forward(const T* p, const T* short_weight, const T* short_bias, const T* inner_weight,
                          const T* inner_bias, const float* kv, T* y, int b, int gh, int gw, int c, int k) {
    const WindowFilters f = {short_weight, short_bias, inner_weight, inner_bias};
    window_forward(square(gh, gw, k), f, p, kv, y, b, c, 0);
}
KERNEL_EXPORT(gated_conv_2d_forward);

extern "C" __global__ void __launch_bounds__(kWindowThreads)
    gated_conv_2d_backward_gate(const T* dy, const T* p, const T* short_weight, const T* short_bias,
                                const T* inner_weight, const T* inner_bias, const float* kv, float* dc, float* du,
                                int b, int gh, int gw, int c, int k) {
    const WindowFilters f = {short_weight, short_bias, inner_weight, inner_bias};
    window_backward_gate(square(gh, gw, k), f, dy, p, kv, dc, du, b, c, 0);
}
KERNEL_EXPORT(gated_conv_2d_backward_gate);

extern "C" __global__ void __launch_bounds__(kWindowThreads)
    gated_conv_2d_backward_product(const T* p, const T* short_weight, const T* short_bias, const T* inner_weight,
                                   const float* dc, float* du, int b, int gh, int gw, int c, int k) {
    const WindowFilters f = {short_weight, short_bias, inner_weight, nullptr};
    window_backward_product(square(gh, gw, k), f, p, dc, du, b, c, 0);
}
KERNEL_EXPORT(gated_conv_2d_backward_product);

extern "C" __global__ void __launch_bounds__(kWindowThreads)
    gated_conv_2d_backward_input(const T* short_weight, const float* du, T* dp, int b, int gh, int gw, int c, int k) {
    window_backward_input(square(gh, gw, k), short_weight, du, dp, b, c, 0);
}
KERNEL_EXPORT(gated_conv_2d_backward_input);

// has_short, has_inner: which filters there are. partials: [groups][rows][C].
extern "C" __global__ void __launch_bounds__(kWindowThreads)
    gated_conv_2d_backward_sums(const T* p, const float* kv, const float* dc, const float* du, float* partials, int b,
                                int gh, int gw, int c, int k, int has_short, int has_inner, int groups) {
    window_backward_sums(square(gh, gw, k), has_short != 0, has_inner != 0, p, kv, dc, du, partials, b, c, 0, groups);
}
KERNEL_EXPORT(gated_conv_2d_backward_sums);

extern "C" __global__ void __launch_bounds__(kSumThreads)
    gated_conv_2d_backward_filters(const float* partials, T* dshort_weight, T* dshort_bias, T* dinner_weight,
                                   T* dinner_bias, int c, int k, int has_short, int rows, int groups) {
    SMEM_ARRAY(float, shared, kSumThreads);
    window_backward_filters(k * k, has_short != 0, partials, dshort_weight, dshort_bias, dinner_weight, dinner_bias, c,
                            rows, groups, shared);
}
KERNEL_EXPORT(gated_conv_2d_backward_filters);
