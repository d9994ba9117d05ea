// conv(w, bias, x)[t] = bias + sum_j w[j] * x[t - lead + j], x zero outside [0, N); the identity where w is null
// q, k, v = conv(short_weight, short_bias, p);  y[b,t,c] = q[t] * conv(inner_weight, inner_bias, k * v)[t]
// The last `reversed` channels run against token order: x[t + lead - j]. Backward: dp and the gradients of both filters.
//
// p, dp: [B, N, 3, C] T; y, dy: [B, N, C] T; short_weight: [3, C, K] T, short_bias: [3, C] T; inner_weight: [C, K] T,
// inner_bias: [C] T, and their gradients; sums in f32.
//
// Fused kernels, one for each K of 3, 4, 7 and each of SE (both filters), X (the short one), Y (the inner one): a thread
// owns two channels, 4 bytes in bf16 and so 128 a warp, of a segment of tokens, and walks it (walk.cuh). All taps of two
// channels and the K values that each stage looks back on fit its registers; with 16 bytes of channels they would not
// (SE at K=4 has 128 taps for 8 channels). p is read once but for the 2·(K - 1) tokens before a segment. Backward
// (walk_backward.cuh) computes forward again in the same walk, keeps the filters' sums in registers and leaves them as
// partial results, which a second kernel adds in a fixed order (`segments` follows from the shape alone).
//
// Bound: memory, 8 bytes an element of y forward and 14 backward in bf16: 302 and 528 MB at B=2, N=16384, C=1152, 70 and
// 123 us at 4.3 TB/s. kAhead groups of K tokens of 384 (512) bytes a warp are in flight: 4.6 KB (6 KB) a warp, 12 or more
// warps a multiprocessor, where 24 KB are needed.
//
// Requires of the fused kernels: C and `reversed` even, K 3, 4 or 7. Everything else goes to the `_any` kernels of
// common/gated_window.cuh: k*v and four gradients through scratch memory in f32, taps by loops.
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/gated_window.cuh"
#include "walk_backward.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, 20)
    gated_conv_se_3_forward(const T* p, const T* short_weight, const T* short_bias, const T* inner_weight,
                            const T* inner_bias, T* y, int n, int c, int lead, int reversed, int length, int segments) {
    walk_forward<3, true, true>(p, short_weight, short_bias, inner_weight, inner_bias, y, n, c, lead, reversed, length,
                                segments);
}
KERNEL_EXPORT(gated_conv_se_3_forward);

extern "C" __global__ void __launch_bounds__(kThreads, 20)
    gated_conv_se_4_forward(const T* p, const T* short_weight, const T* short_bias, const T* inner_weight,
                            const T* inner_bias, T* y, int n, int c, int lead, int reversed, int length, int segments) {
    walk_forward<4, true, true>(p, short_weight, short_bias, inner_weight, inner_bias, y, n, c, lead, reversed, length,
                                segments);
}
KERNEL_EXPORT(gated_conv_se_4_forward);

extern "C" __global__ void __launch_bounds__(kThreads, 12)
    gated_conv_se_7_forward(const T* p, const T* short_weight, const T* short_bias, const T* inner_weight,
                            const T* inner_bias, T* y, int n, int c, int lead, int reversed, int length, int segments) {
    walk_forward<7, true, true>(p, short_weight, short_bias, inner_weight, inner_bias, y, n, c, lead, reversed, length,
                                segments);
}
KERNEL_EXPORT(gated_conv_se_7_forward);

extern "C" __global__ void __launch_bounds__(kThreads, 20)
    gated_conv_x_3_forward(const T* p, const T* short_weight, const T* short_bias, T* y, int n, int c, int lead,
                           int reversed, int length, int segments) {
    walk_forward<3, true, false>(p, short_weight, short_bias, nullptr, nullptr, y, n, c, lead, reversed, length,
                                 segments);
}
KERNEL_EXPORT(gated_conv_x_3_forward);

extern "C" __global__ void __launch_bounds__(kThreads, 20)
    gated_conv_x_4_forward(const T* p, const T* short_weight, const T* short_bias, T* y, int n, int c, int lead,
                           int reversed, int length, int segments) {
    walk_forward<4, true, false>(p, short_weight, short_bias, nullptr, nullptr, y, n, c, lead, reversed, length,
                                 segments);
}
KERNEL_EXPORT(gated_conv_x_4_forward);

extern "C" __global__ void __launch_bounds__(kThreads, 12)
    gated_conv_x_7_forward(const T* p, const T* short_weight, const T* short_bias, T* y, int n, int c, int lead,
                           int reversed, int length, int segments) {
    walk_forward<7, true, false>(p, short_weight, short_bias, nullptr, nullptr, y, n, c, lead, reversed, length,
                                 segments);
}
KERNEL_EXPORT(gated_conv_x_7_forward);

extern "C" __global__ void __launch_bounds__(kThreads, 20)
    gated_conv_y_3_forward(const T* p, const T* inner_weight, const T* inner_bias, T* y, int n, int c, int lead,
                           int reversed, int length, int segments) {
    walk_forward<3, false, true>(p, nullptr, nullptr, inner_weight, inner_bias, y, n, c, lead, reversed, length,
                                 segments);
}
KERNEL_EXPORT(gated_conv_y_3_forward);

extern "C" __global__ void __launch_bounds__(kThreads, 20)
    gated_conv_y_4_forward(const T* p, const T* inner_weight, const T* inner_bias, T* y, int n, int c, int lead,
                           int reversed, int length, int segments) {
    walk_forward<4, false, true>(p, nullptr, nullptr, inner_weight, inner_bias, y, n, c, lead, reversed, length,
                                 segments);
}
KERNEL_EXPORT(gated_conv_y_4_forward);

extern "C" __global__ void __launch_bounds__(kThreads, 12)
    gated_conv_y_7_forward(const T* p, const T* inner_weight, const T* inner_bias, T* y, int n, int c, int lead,
                           int reversed, int length, int segments) {
    walk_forward<7, false, true>(p, nullptr, nullptr, inner_weight, inner_bias, y, n, c, lead, reversed, length,
                                 segments);
}
KERNEL_EXPORT(gated_conv_y_7_forward);

extern "C" __global__ void __launch_bounds__(kThreads, 11)
    gated_conv_se_3_backward(const T* dy, const T* p, const T* short_weight, const T* short_bias, const T* inner_weight,
                             const T* inner_bias, T* dp, float* partials, int n, int c, int lead, int reversed,
                             int length, int segments) {
    walk_backward<3, true, true>(dy, p, short_weight, short_bias, inner_weight, inner_bias, dp, partials, n, c, lead,
                                 reversed, length, segments);
}
KERNEL_EXPORT(gated_conv_se_3_backward);

extern "C" __global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    gated_conv_se_4_backward(const T* dy, const T* p, const T* short_weight, const T* short_bias, const T* inner_weight,
                             const T* inner_bias, T* dp, float* partials, int n, int c, int lead, int reversed,
                             int length, int segments) {
    walk_backward<4, true, true>(dy, p, short_weight, short_bias, inner_weight, inner_bias, dp, partials, n, c, lead,
                                 reversed, length, segments);
}
KERNEL_EXPORT(gated_conv_se_4_backward);

extern "C" __global__ void __launch_bounds__(kThreads, 8)
    gated_conv_se_7_backward(const T* dy, const T* p, const T* short_weight, const T* short_bias, const T* inner_weight,
                             const T* inner_bias, T* dp, float* partials, int n, int c, int lead, int reversed,
                             int length, int segments) {
    walk_backward<7, true, true>(dy, p, short_weight, short_bias, inner_weight, inner_bias, dp, partials, n, c, lead,
                                 reversed, length, segments);
}
KERNEL_EXPORT(gated_conv_se_7_backward);

extern "C" __global__ void __launch_bounds__(kThreads, 11)
    gated_conv_x_3_backward(const T* dy, const T* p, const T* short_weight, const T* short_bias, T* dp, float* partials,
                            int n, int c, int lead, int reversed, int length, int segments) {
    walk_backward<3, true, false>(dy, p, short_weight, short_bias, nullptr, nullptr, dp, partials, n, c, lead, reversed,
                                  length, segments);
}
KERNEL_EXPORT(gated_conv_x_3_backward);

extern "C" __global__ void __launch_bounds__(kThreads, 11)
    gated_conv_x_4_backward(const T* dy, const T* p, const T* short_weight, const T* short_bias, T* dp, float* partials,
                            int n, int c, int lead, int reversed, int length, int segments) {
    walk_backward<4, true, false>(dy, p, short_weight, short_bias, nullptr, nullptr, dp, partials, n, c, lead, reversed,
                                  length, segments);
}
KERNEL_EXPORT(gated_conv_x_4_backward);

extern "C" __global__ void __launch_bounds__(kThreads, 8)
    gated_conv_x_7_backward(const T* dy, const T* p, const T* short_weight, const T* short_bias, T* dp, float* partials,
                            int n, int c, int lead, int reversed, int length, int segments) {
    walk_backward<7, true, false>(dy, p, short_weight, short_bias, nullptr, nullptr, dp, partials, n, c, lead, reversed,
                                  length, segments);
}
KERNEL_EXPORT(gated_conv_x_7_backward);

extern "C" __global__ void __launch_bounds__(kThreads, 11)
    gated_conv_y_3_backward(const T* dy, const T* p, const T* inner_weight, const T* inner_bias, T* dp, float* partials,
                            int n, int c, int lead, int reversed, int length, int segments) {
    walk_backward<3, false, true>(dy, p, nullptr, nullptr, inner_weight, inner_bias, dp, partials, n, c, lead, reversed,
                                  length, segments);
}
KERNEL_EXPORT(gated_conv_y_3_backward);

extern "C" __global__ void __launch_bounds__(kThreads, 11)
    gated_conv_y_4_backward(const T* dy, const T* p, const T* inner_weight, const T* inner_bias, T* dp, float* partials,
                            int n, int c, int lead, int reversed, int length, int segments) {
    walk_backward<4, false, true>(dy, p, nullptr, nullptr, inner_weight, inner_bias, dp, partials, n, c, lead, reversed,
                                  length, segments);
}
KERNEL_EXPORT(gated_conv_y_4_backward);

extern "C" __global__ void __launch_bounds__(kThreads, 8)
    gated_conv_y_7_backward(const T* dy, const T* p, const T* inner_weight, const T* inner_bias, T* dp, float* partials,
                            int n, int c, int lead, int reversed, int length, int segments) {
    walk_backward<7, false, true>(dy, p, nullptr, nullptr, inner_weight, inner_bias, dp, partials, n, c, lead, reversed,
                                  length, segments);
}
KERNEL_EXPORT(gated_conv_y_7_backward);

// Any K, any C, any channels reversed. kv: [B, N, C], scratch.
extern "C" __global__ void __launch_bounds__(kWindowThreads)
    gated_conv_any_product(const T* p, const T* short_weight, const T* short_bias, float* kv, int b, int n, int c,
                           int taps, int lead, int reversed) {
    const WindowFilters f = {short_weight, short_bias, nullptr, nullptr};
    window_product({n, 1, taps, 1, lead, 0}, f, p, kv, b, c, reversed);
}
KERNEL_EXPORT(gated_conv_any_product);

extern "C" __global__ void __launch_bounds__(kWindowThreads)
    gated_conv_any_forward(const T* p, const T* short_weight, const T* short_bias, const T* inner_weight,
                           const T* inner_bias, const float* kv, T* y, int b, int n, int c, int taps, int lead,
                           int reversed) {
    const WindowFilters f = {short_weight, short_bias, inner_weight, inner_bias};
    window_forward({n, 1, taps, 1, lead, 0}, f, p, kv, y, b, c, reversed);
}
KERNEL_EXPORT(gated_conv_any_forward);

extern "C" __global__ void __launch_bounds__(kWindowThreads)
    gated_conv_any_backward_gate(const T* dy, const T* p, const T* short_weight, const T* short_bias,
                                 const T* inner_weight, const T* inner_bias, const float* kv, float* dc, float* du,
                                 int b, int n, int c, int taps, int lead, int reversed) {
    const WindowFilters f = {short_weight, short_bias, inner_weight, inner_bias};
    window_backward_gate({n, 1, taps, 1, lead, 0}, f, dy, p, kv, dc, du, b, c, reversed);
}
KERNEL_EXPORT(gated_conv_any_backward_gate);

extern "C" __global__ void __launch_bounds__(kWindowThreads)
    gated_conv_any_backward_product(const T* p, const T* short_weight, const T* short_bias, const T* inner_weight,
                                    const float* dc, float* du, int b, int n, int c, int taps, int lead,
                                    int reversed) {
    const WindowFilters f = {short_weight, short_bias, inner_weight, nullptr};
    window_backward_product({n, 1, taps, 1, lead, 0}, f, p, dc, du, b, c, reversed);
}
KERNEL_EXPORT(gated_conv_any_backward_product);

extern "C" __global__ void __launch_bounds__(kWindowThreads)
    gated_conv_any_backward_input(const T* short_weight, const float* du, T* dp, int b, int n, int c, int taps,
                                  int lead, int reversed) {
    window_backward_input({n, 1, taps, 1, lead, 0}, short_weight, du, dp, b, c, reversed);
}
KERNEL_EXPORT(gated_conv_any_backward_input);

// has_short, has_inner: which filters there are.
extern "C" __global__ void __launch_bounds__(kWindowThreads)
    gated_conv_any_backward_sums(const T* p, const float* kv, const float* dc, const float* du, float* partials, int b,
                                 int n, int c, int taps, int lead, int reversed, int has_short, int has_inner,
                                 int groups) {
    window_backward_sums({n, 1, taps, 1, lead, 0}, has_short != 0, has_inner != 0, p, kv, dc, du, partials, b, c,
                         reversed, groups);
}
KERNEL_EXPORT(gated_conv_any_backward_sums);

// partials: [groups][rows][C], of the fused kernels or of the ones above.
extern "C" __global__ void __launch_bounds__(kSumThreads)
    gated_conv_backward_filters(const float* partials, T* dshort_weight, T* dshort_bias, T* dinner_weight,
                                T* dinner_bias, int c, int taps, int has_short, int rows, int groups) {
    SMEM_ARRAY(float, shared, kSumThreads);
    window_backward_filters(taps, has_short != 0, partials, dshort_weight, dshort_bias, dinner_weight, dinner_bias, c,
                            rows, groups, shared);
}
KERNEL_EXPORT(gated_conv_backward_filters);
