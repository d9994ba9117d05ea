// s[b,h,i,j] = scale * sum_e q[b,i,h,e] * k[b,j,h,e];  lse[b,h,i] = log sum_j exp(s[b,h,i,j])
// y[b,i,h,e] = sum_j exp(s - lse) * v[b,j,h,e]
// ds = p*(dy·v - delta), delta = dy·y;  dq_i = scale*sum_j ds_ij*k_j, dk_j = scale*sum_i ds_ij*q_i, dv_j = sum_i p_ij*dy_i
//
// qkv, dqkv: [B, N, 3, H, E], y, dy: [B, N, H, E], all T; lse, delta: [B, H, N] f32; sums in f32.
//
// CUDA cores, for f32 and widths that `attention_mma.cu` does not take: `common/softmax_attention.cuh` says who owns what.
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

extern "C" __global__ void __launch_bounds__(128)
    attention_forward(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    packed_forward(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
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
    packed_dq(AllKeys{n, n}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_q);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_backward_kv(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv, int n, int h, int e,
                     float scale) {
    packed_dkdv(AllKeys{n, n}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_kv);
