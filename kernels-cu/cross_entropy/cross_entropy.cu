// lse[b] = log sum_k exp(logits[b,k]);  loss = 1/B sum_b (lse[b] - logits[b,labels[b]])
// dlogits[b,k] = dloss/B * (exp(logits[b,k] - lse[b]) - [k = labels[b]])
//
// logits, dlogits: [B, K], labels: [B] int, loss, dloss: [1], lse: [B], T = f32 alone; terms: [B] f32.
//
// Forward: a warp owns a row: its maximum, then the sum of exponentials around it, both by butterflies (the second
// reading comes from L1), and the row's term. The second kernel, one block, adds the terms in order. Backward:
// elementwise.
//
// Bound: memory, 4·B·K bytes forward and 8·B·K backward; at B=256, K=1000 the launches.
//
// Requires: nothing beyond the contract. A label outside [0, K) makes the loss, and its row of dlogits, NaN.
// Does not handle: strides, soft labels.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

constexpr int kWarps = 4;

extern "C" __global__ void __launch_bounds__(128)
    cross_entropy_rows(const T* logits, const int* labels, float* terms, T* lse, int b, int k) {
    const int lane = threadIdx.x % 32;
    for (int row = blockIdx.x * kWarps + threadIdx.x / 32; row < b; row += gridDim.x * kWarps) {
        const T* from = logits + size_t(row) * k;
        float top = -INFINITY, sum = 0.0f;
        for (int i = lane; i < k; i += 32) top = fmaxf(top, to_float(from[i]));
        top = warp_max(top);
        for (int i = lane; i < k; i += 32) sum += expf(to_float(from[i]) - top);
        const float total = top + logf(warp_sum(sum));
        if (lane != 0) continue;
        const int label = labels[row];
        lse[row] = from_float<T>(total);
        terms[row] = label >= 0 && label < k ? total - to_float(from[label]) : __int_as_float(0x7fc00000);
    }
}
KERNEL_EXPORT(cross_entropy_rows);

extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_finish(const float* terms, T* loss, int b, float inverse) {
    SMEM_ARRAY(float, warps, 8);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < b; i += 256) sum += terms[i];
    sum = block_sum<8>(sum, warps);
    if (threadIdx.x == 0) loss[0] = from_float<T>(sum * inverse);
}
KERNEL_EXPORT(cross_entropy_finish);

extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_backward(const T* dloss, const T* logits, const int* labels, const T* lse, T* dlogits, int b, int k,
                           float inverse) {
    const float scale = to_float(dloss[0]) * inverse;
    for (size_t i = grid_thread(); i < size_t(b) * k; i += grid_threads()) {
        const int row = int(i / k), label = labels[row];
        const float target = label < 0 || label >= k ? __int_as_float(0x7fc00000) : label == int(i % k) ? 1.0f : 0.0f;
        dlogits[i] = from_float<T>(scale * (expf(to_float(logits[i]) - to_float(lse[row])) - target));
    }
}
KERNEL_EXPORT(cross_entropy_backward);
