// keys(b) = {j : j < counts[b]}, all M without counts;  s[b,h,i,j] = scale * sum_e q[b,i,0,h,e] * k[b,j,h,e]
// lse[b,h,i] = log sum_{j in keys(b)} exp(s[b,h,i,j]);  y[b,i,h,e] = sum_{j in keys(b)} exp(s - lse) * v[b,j,h,e]
//
// q, dq: [B, N, R, H, E], kv, dkv: [B, M, 2, H, E], y, dy: [B, N, H, E], all T; counts: [B] int, may be null; lse, delta:
// [B, H, N] f32; sums in f32. Gradients as in `attention.cu`; the launcher clears dq where R > 1.
//
// Version 1, CUDA cores, the first rung: `common/softmax_attention.cuh` says who owns what. A sample's keys end at its
// count: later ones are neither read nor visited, and get zeros as their gradients. dk and dv of a sample with few keys
// come from few blocks that go through all N queries: splitting the queries is the rung after tensor cores.
//
// Bound: arithmetic, 4·B·H·N·M·E operations forward and 14 backward; see `attention.cu`.
//
// Requires: nothing beyond the contract. A count outside [0, M] is not read as one: y, lse and the gradients of its
// sample become NaN. Does not handle: masks with holes, strides.
#include "../common/ptx.cuh"
#include "../common/softmax_attention.cuh"

using namespace ptx;

// The keys that count; -1 where the count is none.
__device__ __forceinline__ int keys_of(const int* counts, int sample, int m) {
    const int count = counts ? counts[sample] : m;
    return count < 0 || count > m ? -1 : count;
}

// NaN for the vectors of the block's tokens, columns `first` to `end`.
__device__ __forceinline__ void refuse(Vectors<T> to, int tokens, int row0, int first, int end) {
    const int rows = min(tokens - row0, kRowTile), columns = end - first;
    for (int i = threadIdx.x; i < rows * columns; i += 128)
        to.at[(row0 + i / columns) * to.stride + first + i % columns] = from_float<T>(__int_as_float(0x7fc00000));
}

extern "C" __global__ void __launch_bounds__(128)
    cross_attention_forward(const T* q, const T* kv, const int* counts, T* y, float* lse, int n, int m, int r, int h,
                            int e, float scale) {
    const Place at = place_of_block(n, h);
    const int count = keys_of(counts, at.sample, m), first = int(blockIdx.y) * 128;
    const Vectors<T> to = head_part(y, at, 0, 1, n, h, e);
    float* sums = lse + (size_t(at.sample) * h + at.head) * n;
    if (count < 0) {
        refuse(to, n, at.row0, first, min(e, first + 128));
        const int row = at.row0 + int(threadIdx.x);
        if (threadIdx.x < kRowTile && row < n) sums[row] = __int_as_float(0x7fc00000);
        return;
    }
    softmax_forward<4>(AllKeys{count, n}, head_part(q, at, 0, r, n, h, e), head_part(kv, at, 0, 2, m, h, e),
                       head_part(kv, at, 1, 2, m, h, e), to, sums, n, at.row0, first, e, scale);
}
KERNEL_EXPORT(cross_attention_forward);

extern "C" __global__ void __launch_bounds__(128)
    cross_attention_backward_delta(const T* y, const T* dy, float* delta, uint64_t rows, int n, int h, int e) {
    softmax_delta(y, dy, delta, rows, n, h, e);
}
KERNEL_EXPORT(cross_attention_backward_delta);

extern "C" __global__ void __launch_bounds__(128)
    cross_attention_backward_q(const T* dy, const T* q, const T* kv, const int* counts, const float* lse,
                               const float* delta, T* dq, int n, int m, int r, int h, int e, float scale) {
    const Place at = place_of_block(n, h);
    const int count = keys_of(counts, at.sample, m), first = int(blockIdx.y) * 128;
    const Vectors<T> to = head_part(dq, at, 0, r, n, h, e);
    if (count < 0) return refuse(to, n, at.row0, first, min(e, first + 128));
    const size_t row = (size_t(at.sample) * h + at.head) * n;
    softmax_dq<4>(AllKeys{count, n}, head_part(q, at, 0, r, n, h, e), head_part(kv, at, 0, 2, m, h, e),
                  head_part(kv, at, 1, 2, m, h, e), head_part(dy, at, 0, 1, n, h, e), to, lse + row, delta + row, n,
                  at.row0, first, e, scale);
}
KERNEL_EXPORT(cross_attention_backward_q);

extern "C" __global__ void __launch_bounds__(128, 2)
    cross_attention_backward_kv(const T* dy, const T* q, const T* kv, const int* counts, const float* lse,
                                const float* delta, T* dkv, int n, int m, int r, int h, int e, float scale) {
    const Place at = place_of_block(m, h);
    const int count = keys_of(counts, at.sample, m), first = int(blockIdx.y) * 96;
    const Vectors<T> to_k = head_part(dkv, at, 0, 2, m, h, e), to_v = head_part(dkv, at, 1, 2, m, h, e);
    if (count < 0) {
        refuse(to_k, m, at.row0, first, min(e, first + 96));
        return refuse(to_v, m, at.row0, first, min(e, first + 96));
    }
    const size_t row = (size_t(at.sample) * h + at.head) * n;
    softmax_dkdv<3>(AllKeys{count, n}, head_part(q, at, 0, r, n, h, e), head_part(kv, at, 0, 2, m, h, e),
                    head_part(kv, at, 1, 2, m, h, e), head_part(dy, at, 0, 1, n, h, e), to_k, to_v, lse + row,
                    delta + row, n, m, at.row0, first, e, scale);
}
KERNEL_EXPORT(cross_attention_backward_kv);
