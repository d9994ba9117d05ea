// out = sum_i x_i^2, in f64, rounded once
//
// x: [L], out: [1], T = f32 alone; partials: [blocks, 2] f32, one f64 a block as its f32 and what that lacks.
//
// A thread squares and adds in f64, grid-stride; a block adds its threads by butterflies and then its warps in order;
// the second kernel, one block, adds the blocks in order. The number of blocks follows from L alone, so the order of
// every sum does, and the result is the same on every device.
//
// Bound: memory, 4 bytes an element. H100 does half as many f64 as f32 operations: 1.2e12 elements a second at 4.8 TB/s
// need 2.4 of its 34 TFLOP/s. 32 bytes of loads in flight a thread, 8 blocks of 256 a multiprocessor: 64 KB.
//
// Requires: x aligned to 16 bytes. Does not handle: strides.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

// The sum over a block of 256 threads, for thread 0.
__device__ __forceinline__ double block_total(double v, double* partials) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(kFullMask, v, o);
    if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = v;
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) sum += partials[i];
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(256) sum_squares_partial(const T* x, float* partials, uint64_t l) {
    SMEM_ARRAY(double, warps, 8);
    double sum = 0.0;
    for_vectors<8>(l, [&]<int V>(size_t i) {
        float v[V];
        load<V>(v, x + i);
#pragma unroll
        for (int e = 0; e < V; e++) sum = fma(double(v[e]), double(v[e]), sum);
    });
    sum = block_total(sum, warps);
    if (threadIdx.x == 0) {
        const float high = float(sum);
        partials[2 * blockIdx.x] = high, partials[2 * blockIdx.x + 1] = float(sum - high);
    }
}
KERNEL_EXPORT(sum_squares_partial);

extern "C" __global__ void __launch_bounds__(256) sum_squares_finish(const float* partials, T* out, int blocks) {
    SMEM_ARRAY(double, warps, 8);
    double sum = 0.0;
    for (int i = threadIdx.x; i < blocks; i += 256) sum += double(partials[2 * i]) + partials[2 * i + 1];
    sum = block_total(sum, warps);
    if (threadIdx.x == 0) out[0] = from_float<T>(float(sum));
}
KERNEL_EXPORT(sum_squares_finish);
