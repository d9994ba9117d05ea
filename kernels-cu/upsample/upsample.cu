// y[b,i,j,c] = x[b, i/2, j/2, c] with whole quotients.  Backward: dx[b,i,j,c] = sum of dy over the square of four.
//
// x, dx: [B, H, W, C] T; y, dy: [B, 2H, 2W, C] T; sums in f32.
//
// A thread owns 8 channels of a pixel of x (one in the `_any` kernels) and writes or reads its four pixels of y.
//
// Bound: memory, 10 bytes an element of x in bf16: 2 one way and 8 the other. 64 warps of 32 registers fit a
// multiprocessor; forward each has 512 bytes of loads, 32 KB where a fifth of 4.3 TB/s needs 7; backward 2 KB.
//
// Requires: C a multiple of 8; other C go to the `_any` kernels, the same text for single channels.
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/elementwise.cuh"
#include "../common/ptx.cuh"

using namespace ptx;

constexpr int kThreads = 256;

// Index of the first of the four pixels of y, in elements; `at` is that of the element of x.
__device__ __forceinline__ size_t square(size_t at, int w, int c) {
    const size_t pixel = at / c, row = pixel / w, column = pixel - row * w;
    return (4 * row * w + 2 * column) * c + (at - pixel * c);
}

template <int V> __device__ __forceinline__ void enlarge(const T* x, T* y, int rows, int w, int c) {
    const size_t at = grid_thread() * V;
    if (at >= size_t(rows) * w * c) return;
    float v[V];
    load(v, x + at);
    T* to = y + square(at, w, c);
    const size_t below = size_t(2) * w * c;
    store(to, v), store(to + c, v), store(to + below, v), store(to + below + c, v);
}

// rows: B·H.
extern "C" __global__ void __launch_bounds__(kThreads) upsample_forward(const T* x, T* y, int rows, int w, int c) {
    enlarge<8>(x, y, rows, w, c);
}
KERNEL_EXPORT(upsample_forward);

extern "C" __global__ void __launch_bounds__(kThreads) upsample_forward_any(const T* x, T* y, int rows, int w, int c) {
    enlarge<1>(x, y, rows, w, c);
}
KERNEL_EXPORT(upsample_forward_any);

template <int V> __device__ __forceinline__ void add_up(const T* dy, T* dx, int rows, int w, int c) {
    const size_t at = grid_thread() * V;
    if (at >= size_t(rows) * w * c) return;
    float v[4][V];
    const T* from = dy + square(at, w, c);
    const size_t below = size_t(2) * w * c;
    load(v[0], from), load(v[1], from + c), load(v[2], from + below), load(v[3], from + below + c);
#pragma unroll
    for (int j = 0; j < V; j++) v[0][j] = (v[0][j] + v[1][j]) + (v[2][j] + v[3][j]);
    store(dx + at, v[0]);
}

extern "C" __global__ void __launch_bounds__(kThreads) upsample_backward(const T* dy, T* dx, int rows, int w, int c) {
    add_up<8>(dy, dx, rows, w, c);
}
KERNEL_EXPORT(upsample_backward);

extern "C" __global__ void __launch_bounds__(kThreads)
    upsample_backward_any(const T* dy, T* dx, int rows, int w, int c) {
    add_up<1>(dy, dx, rows, w, c);
}
KERNEL_EXPORT(upsample_backward_any);
