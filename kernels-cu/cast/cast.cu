// y[l] = x[l], rounded to nearest even;  dx[l] = dy[l], exactly
//
// x, dx: [L] of float; y, dy: [L] of T. With T = float both are copies.
//
// A thread owns vectors of eight elements, grid-stride; the last L mod 8 elements go to single threads.
//
// Bound: memory, 6 bytes an element in bf16 either way. 32 (from f32) or 16 (from bf16) bytes of loads in flight a thread
// at 8 blocks of 256 a multiprocessor: 64 or 32 KB; 24 registers leave room for all of them.
//
// Requires: pointers aligned to 16 bytes. Does not handle: strides, in place.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

template <class From, class To> PTX_FN void cast(const From* from, To* to, uint64_t l) {
    for_vectors<8>(l, [=]<int V>(size_t i) {
        float v[V];
        load<V>(v, from + i);
        store<V>(to + i, v);
    });
}

extern "C" __global__ void __launch_bounds__(256) cast_forward(const float* x, T* y, uint64_t l) { cast(x, y, l); }
KERNEL_EXPORT(cast_forward);

extern "C" __global__ void __launch_bounds__(256) cast_backward(const T* dy, float* dx, uint64_t l) { cast(dy, dx, l); }
KERNEL_EXPORT(cast_backward);
