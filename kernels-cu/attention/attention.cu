// s[b,h,i,j] = scale * sum_e q[b,i,h,e] * k[b,j,h,e];  lse[b,h,i] = log sum_j exp(s[b,h,i,j])
// y[b,i,h,e] = sum_j exp(s - lse) * v[b,j,h,e]
// ds = p*(dy·v - delta), delta = dy·y;  dq_i = scale*sum_j ds_ij*k_j, dk_j = scale*sum_i ds_ij*q_i, dv_j = sum_i p_ij*dy_i
//
// qkv, dqkv: [B, N, 3, H, E], y, dy: [B, N, H, E], all T; lse, delta: [B, H, N] f32; sums in f32.
//
// Version 1, CUDA cores, the first rung (tensor cores are the next): `common/softmax_attention.cuh` says who owns what.
// Forward: online softmax. Backward: delta, then dq by tiles of queries and dk, dv by tiles of keys, so that every sum
// has one owner and one order (seven products instead of five).
//
// Bound: arithmetic, 4·B·H·N²·E operations forward and 14 backward. The CUDA cores of H100 do 67 TFLOP/s in f32; a
// score tile reads two 16-byte words of shared memory for 16 multiply-adds a thread, which halves that.
//
// Requires: nothing beyond the contract: any N and E. Does not handle: masks, strides.
#include "../common/ptx.cuh"
#include "../common/softmax_attention.cuh"

using namespace ptx;

// Every query sees every key.
struct AllKeys {
    int limit, n;
    __device__ __forceinline__ Span keys(int, int) const { return {0, limit}; }
    __device__ __forceinline__ Span queries(int, int) const { return {0, n}; }
    __device__ __forceinline__ int query(int i) const { return i; }
    __device__ __forceinline__ int key(int j) const { return j; }
    __device__ __forceinline__ bool sees(int, int) const { return true; }
};

// Part 0, 1, 2 (q, k, v) of a head of a packed tensor.
template <class E> __device__ __forceinline__ Vectors<E> part(E* packed, const Place& at, int part, int n, int h, int e) {
    return {packed + ((size_t(at.sample) * n * 3 + part) * h + at.head) * e, size_t(3) * h * e};
}
template <class E> __device__ __forceinline__ Vectors<E> plain(E* x, const Place& at, int n, int h, int e) {
    return {x + (size_t(at.sample) * n * h + at.head) * e, size_t(h) * e};
}

extern "C" __global__ void __launch_bounds__(128)
    attention_forward(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    const Place at = place_of_block(n, h);
    softmax_forward<4>(AllKeys{n, n}, part(qkv, at, 0, n, h, e), part(qkv, at, 1, n, h, e), part(qkv, at, 2, n, h, e),
                       plain(y, at, n, h, e), lse + (size_t(at.sample) * h + at.head) * n, n, at.row0,
                       int(blockIdx.y) * 128, e, scale);
}
KERNEL_EXPORT(attention_forward);

extern "C" __global__ void __launch_bounds__(128)
    attention_backward_delta(const T* y, const T* dy, float* delta, uint64_t rows, int n, int h, int e) {
    softmax_delta(y, dy, delta, rows, n, h, e);
}
KERNEL_EXPORT(attention_backward_delta);

extern "C" __global__ void __launch_bounds__(128)
    attention_backward_q(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv, int n, int h, int e,
                         float scale) {
    const Place at = place_of_block(n, h);
    const size_t row = (size_t(at.sample) * h + at.head) * n;
    softmax_dq<4>(AllKeys{n, n}, part(qkv, at, 0, n, h, e), part(qkv, at, 1, n, h, e), part(qkv, at, 2, n, h, e),
                  plain(dy, at, n, h, e), part(dqkv, at, 0, n, h, e), lse + row, delta + row, n, at.row0,
                  int(blockIdx.y) * 128, e, scale);
}
KERNEL_EXPORT(attention_backward_q);

extern "C" __global__ void __launch_bounds__(128)
    attention_backward_kv(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv, int n, int h, int e,
                          float scale) {
    const Place at = place_of_block(n, h);
    const size_t row = (size_t(at.sample) * h + at.head) * n;
    softmax_dkdv<3>(AllKeys{n, n}, part(qkv, at, 0, n, h, e), part(qkv, at, 1, n, h, e), part(qkv, at, 2, n, h, e),
                    plain(dy, at, n, h, e), part(dqkv, at, 1, n, h, e), part(dqkv, at, 2, n, h, e), lse + row,
                    delta + row, n, n, at.row0, int(blockIdx.y) * 96, e, scale);
}
KERNEL_EXPORT(attention_backward_kv);
