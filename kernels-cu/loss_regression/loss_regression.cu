// e = pred - target;  loss = 1/(B*N*D) sum rho(e): L1 |e|, L2 e^2, Huber e^2/2 inside delta, else delta*(|e| - delta/2)
// dpred = dloss/(B*N*D) * rho'(e), with rho'(0) = 0 for L1
//
// pred, target, dpred: B·N·D elements as one line, loss, dloss: [1], T = f32 alone; partials: [blocks] f32.
//
// Forward: a thread adds its terms, eight a step, grid-stride; a block adds threads by butterflies and warps in order;
// the second kernel, one block, adds the blocks in order. The number of blocks follows from the count of elements, so
// the order of every sum does. Backward: elementwise.
//
// Bound: memory, 8 bytes an element forward, 12 backward. 64 bytes of loads in flight a thread, 6 blocks of 256 a
// multiprocessor: 96 KB.
//
// Requires: pointers aligned to 16 bytes. Does not handle: strides, a weight per element.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

__device__ __forceinline__ float rho(int kind, float delta, float e) {
    const float size = fabsf(e);
    if (kind == 0) return size;
    if (kind == 1) return e * e;
    return size <= delta ? 0.5f * e * e : delta * (size - 0.5f * delta);
}

__device__ __forceinline__ float slope(int kind, float delta, float e) {
    if (kind == 0) return e == 0.0f ? 0.0f : copysignf(1.0f, e);
    if (kind == 1) return 2.0f * e;
    return fminf(fmaxf(e, -delta), delta);
}

extern "C" __global__ void __launch_bounds__(256)
    loss_regression_partial(const T* pred, const T* target, float* partials, uint64_t count, int kind, float delta) {
    SMEM_ARRAY(float, warps, 8);
    float sum = 0.0f;
    for_vectors<8>(count, [&]<int V>(size_t i) {
        float p[V], t[V];
        load<V>(p, pred + i), load<V>(t, target + i);
        // A step's terms first: long runs lose fewer digits.
        float step = 0.0f;
#pragma unroll
        for (int e = 0; e < V; e++) step += rho(kind, delta, p[e] - t[e]);
        sum += step;
    });
    sum = block_sum<8>(sum, warps);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}
KERNEL_EXPORT(loss_regression_partial);

extern "C" __global__ void __launch_bounds__(256)
    loss_regression_finish(const float* partials, T* loss, int blocks, float inverse) {
    SMEM_ARRAY(float, warps, 8);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < blocks; i += 256) sum += partials[i];
    sum = block_sum<8>(sum, warps);
    if (threadIdx.x == 0) loss[0] = from_float<T>(sum * inverse);
}
KERNEL_EXPORT(loss_regression_finish);

extern "C" __global__ void __launch_bounds__(256)
    loss_regression_backward(const T* dloss, const T* pred, const T* target, T* dpred, uint64_t count, int kind,
                             float delta, float inverse) {
    const float scale = to_float(dloss[0]) * inverse;
    for_vectors<8>(count, [=]<int V>(size_t i) {
        float p[V], t[V];
        load<V>(p, pred + i), load<V>(t, target + i);
#pragma unroll
        for (int e = 0; e < V; e++) {
            // A NaN stays one: the clamp of Huber would swallow it.
            const float error = p[e] - t[e];
            p[e] = error != error ? error : scale * slope(kind, delta, error);
        }
        store<V>(dpred + i, p);
    });
}
KERNEL_EXPORT(loss_regression_backward);
