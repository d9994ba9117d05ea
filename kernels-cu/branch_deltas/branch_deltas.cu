// y[b,n,0,d] = first[b,n,d] - x[b,n,d];  y[b,n,1,d] = second[b,n,d] - x[b,n,d]
// dfirst = dy[:,:,0], dsecond = dy[:,:,1], dx = -(dfirst + dsecond)
//
// x, first, second and their gradients: [rows, D], y, dy: [rows, 2, D], all T, rows = B·N; f32 between. Each of dx,
// dfirst, dsecond may be null.
//
// A thread owns eight neighbours of a row (one in the `_any` kernels), grid-stride.
//
// Bound: memory, 5 elements moved per element of x, forward and backward. 48 (bf16) bytes of loads in flight a thread
// forward and 32 backward, 8 blocks of 256 a multiprocessor: 64 KB and more.
//
// Requires: the vector kernels D a multiple of 8. Does not handle: strides.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

template <int V>
__device__ __forceinline__ void deltas(const T* x, const T* first, const T* second, T* y, int rows, int d) {
    const int chunks = d / V;
    for (size_t i = grid_thread(); i < size_t(rows) * chunks; i += grid_threads()) {
        const size_t at = i * V, to = at + i / chunks * d;
        float base[V], one[V], two[V];
        load<V>(base, x + at), load<V>(one, first + at), load<V>(two, second + at);
#pragma unroll
        for (int e = 0; e < V; e++) one[e] -= base[e], two[e] -= base[e];
        store<V>(y + to, one), store<V>(y + to + d, two);
    }
}

template <int V>
__device__ __forceinline__ void gradients(const T* dy, T* dx, T* dfirst, T* dsecond, int rows, int d) {
    const int chunks = d / V;
    for (size_t i = grid_thread(); i < size_t(rows) * chunks; i += grid_threads()) {
        const size_t at = i * V, from = at + i / chunks * d;
        float one[V], two[V];
        load<V>(one, dy + from), load<V>(two, dy + from + d);
        if (dfirst) store<V>(dfirst + at, one);
        if (dsecond) store<V>(dsecond + at, two);
        if (!dx) continue;
#pragma unroll
        for (int e = 0; e < V; e++) one[e] = -(one[e] + two[e]);
        store<V>(dx + at, one);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    branch_deltas_forward(const T* x, const T* first, const T* second, T* y, int rows, int d) {
    deltas<8>(x, first, second, y, rows, d);
}
KERNEL_EXPORT(branch_deltas_forward);

extern "C" __global__ void __launch_bounds__(256)
    branch_deltas_forward_any(const T* x, const T* first, const T* second, T* y, int rows, int d) {
    deltas<1>(x, first, second, y, rows, d);
}
KERNEL_EXPORT(branch_deltas_forward_any);

extern "C" __global__ void __launch_bounds__(256)
    branch_deltas_backward(const T* dy, T* dx, T* dfirst, T* dsecond, int rows, int d) {
    gradients<8>(dy, dx, dfirst, dsecond, rows, d);
}
KERNEL_EXPORT(branch_deltas_backward);

extern "C" __global__ void __launch_bounds__(256)
    branch_deltas_backward_any(const T* dy, T* dx, T* dfirst, T* dsecond, int rows, int d) {
    gradients<1>(dy, dx, dfirst, dsecond, rows, d);
}
KERNEL_EXPORT(branch_deltas_backward_any);
