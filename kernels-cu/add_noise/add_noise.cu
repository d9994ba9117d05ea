// x_t[b,l] = coefs[b,0] * x0[b,l] + coefs[b,1] * noise[b,l]
//
// x0, noise, x_t: [B, L], coefs: [B, 2], T = f32 alone.
//
// A thread owns eight neighbours of a sample (one in the `_any` kernel), grid-stride.
//
// Bound: memory, 12 bytes an element for 3 FLOPs. 64 bytes of loads in flight a thread.
//
// Requires: the first kernel L a multiple of 8. Does not handle: strides.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

template <int V>
__device__ __forceinline__ void mix(const T* x0, const T* noise, const T* coefs, T* x_t, int b, int l) {
    const int chunks = l / V;
    for (size_t i = grid_thread(); i < size_t(b) * chunks; i += grid_threads()) {
        const size_t sample = i / chunks;
        const float signal = to_float(coefs[2 * sample]), sigma = to_float(coefs[2 * sample + 1]);
        float x[V], z[V];
        load<V>(x, x0 + i * V), load<V>(z, noise + i * V);
#pragma unroll
        for (int e = 0; e < V; e++) x[e] = fmaf(signal, x[e], sigma * z[e]);
        store<V>(x_t + i * V, x);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    add_noise_forward(const T* x0, const T* noise, const T* coefs, T* x_t, int b, int l) {
    mix<8>(x0, noise, coefs, x_t, b, l);
}
KERNEL_EXPORT(add_noise_forward);

extern "C" __global__ void __launch_bounds__(256)
    add_noise_forward_any(const T* x0, const T* noise, const T* coefs, T* x_t, int b, int l) {
    mix<1>(x0, noise, coefs, x_t, b, l);
}
KERNEL_EXPORT(add_noise_forward_any);
