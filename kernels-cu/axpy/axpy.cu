// y[l] = y[l] + alpha * x[l]
//
// x, y: [L] of T; the sum in f32, rounded once.
//
// A thread owns vectors of eight elements, grid-stride; the last L mod 8 elements go to single threads.
//
// Bound: memory, 3 elements moved (two reads, one write) for one multiply-add. 32 (bf16) or 64 (f32) bytes of loads in
// flight a thread at 8 blocks of 256 a multiprocessor: 64 KB or more, above the 40 KB that HBM3e needs.
//
// Requires: pointers aligned to 16 bytes. Does not handle: strides, x overlapping y.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

extern "C" __global__ void __launch_bounds__(256) axpy_forward(const T* x, T* y, int l, float alpha) {
    for_vectors<8>(l, [=]<int V>(size_t i) {
        float a[V], b[V];
        load<V>(a, x + i), load_kept<V>(b, y + i);
#pragma unroll
        for (int e = 0; e < V; e++) b[e] = fmaf(alpha, a[e], b[e]);
        store<V>(y + i, b);
    });
}
KERNEL_EXPORT(axpy_forward);
