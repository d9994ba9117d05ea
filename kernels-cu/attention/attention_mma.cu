// s[b,h,i,j] = scale * sum_e q[b,i,h,e] * k[b,j,h,e];  lse[b,h,i] = log sum_j exp(s[b,h,i,j])
// y[b,i,h,e] = sum_j exp(s - lse) * v[b,j,h,e];  gradients as in `attention.cu`
//
// qkv, dqkv: [B, N, 3, H, E], y, dy: [B, N, H, E], all T, 16-bit; lse, delta: [B, H, N] f32; sums in f32.
//
// Tensor cores of sm_80: `common/mma_attention.cuh` and `common/mma_attention_backward.cuh` say who owns what. `_e72`
// in a kernel's name is the widest head that it takes: narrower ones run as zeros behind their columns. `_128x64_`: 128
// queries a block, 32 a warp up to 72 columns, so that a fragment of keys serves two products; `_64x64_`: 16 a warp.
//
// Bound: arithmetic from N of some 400 on. A warp's 32×64 tile of a head of 72: 144 products of m16n8k16 (the tensor
// cores of A100 take one each 8 clocks, 1,152), 2,048 exponentials (512 clocks), 42 KB of fragments (328 clocks of
// shared memory a block's share); at 16 rows a warp shared memory takes as long as the products.
//
// Requires: E in steps of 8 up to 128. Does not handle: masks, strides. In f32 the kernels are empty.
#include "../common/ptx.cuh"
#include "../common/mma_attention_backward.cuh"

using namespace ptx;

template <int kE> using Tall = MmaTile<kE, kE <= 72 ? 4 : 8, kE <= 72 ? 2 : 1, 64>;
template <int kE> using Small = MmaTile<kE, 4, 1, 64>;
template <int kE> using Whole = MmaTile<kE, 4, 1, 128>;

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_128x64_e64(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Tall<64>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_128x64_e64);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_128x64_e72(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Tall<72>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_128x64_e72);

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_forward_128x64_e80(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Tall<80>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_128x64_e80);

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_forward_128x64_e96(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Tall<96>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_128x64_e96);

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_forward_128x64_e128(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Tall<128>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_128x64_e128);

extern "C" __global__ void __launch_bounds__(128, 4)
    attention_forward_64x64_e32(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Small<32>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 3)
    attention_forward_64x64_e64(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Small<64>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    attention_forward_64x64_e72(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Small<72>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_64x64_e96(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Small<96>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_64x64_e96);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_64x64_e128(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Small<128>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_64x64_e128);

// Up to 256 tokens: all keys and values of a head in shared memory, scores in two steps of 128 (all 256 of a row, and the
// sums, are some registers more than there are). A block takes `segment` queries, a multiple of its rows.
template <int kE> PTX_FN void whole(const T* qkv, T* y, float* lse, int n, int h, int e, int segment, float scale) {
    const int segments = (n + segment - 1) / segment, block = int(blockIdx.x) / h;
    const Place at = {block / segments, int(blockIdx.x) % h, block % segments * segment};
    mma_forward_resident<256, Whole<kE>>(AllKeys{n, n}, head_part(qkv, at, 0, 3, n, h, e),
                                         head_part(qkv, at, 1, 3, n, h, e), head_part(qkv, at, 2, 3, n, h, e),
                                         head_part(y, at, 0, 1, n, h, e), lse + (size_t(at.sample) * h + at.head) * n, n,
                                         n, at.row0, at.row0 + segment, e, scale);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_whole_e64(const T* qkv, T* y, float* lse, int n, int h, int e, int segment, float scale) {
    whole<64>(qkv, y, lse, n, h, e, segment, scale);
}
KERNEL_EXPORT(attention_forward_whole_e64);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_whole_e72(const T* qkv, T* y, float* lse, int n, int h, int e, int segment, float scale) {
    whole<72>(qkv, y, lse, n, h, e, segment, scale);
}
KERNEL_EXPORT(attention_forward_whole_e72);

extern "C" __global__ void __launch_bounds__(128, 4)
    attention_backward_q_64x64_e32(const T* dy, const T* qkv, const T* y, const float* lse, float* delta, T* dqkv, int n,
                                  int h, int e, float scale) {
    mma_packed_dq<Small<32>>(AllKeys{n, n}, dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_q_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 4)
    attention_backward_kv_64x64_e32(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv, int n, int h,
                                   int e, float scale) {
    mma_packed_dkdv<Small<32>>(AllKeys{n, n}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_kv_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 3)
    attention_backward_q_64x64_e64(const T* dy, const T* qkv, const T* y, const float* lse, float* delta, T* dqkv, int n,
                                  int h, int e, float scale) {
    mma_packed_dq<Small<64>>(AllKeys{n, n}, dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_q_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    attention_backward_kv_64x64_e64(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv, int n, int h,
                                   int e, float scale) {
    mma_packed_dkdv<Small<64>>(AllKeys{n, n}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_kv_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    attention_backward_q_64x64_e72(const T* dy, const T* qkv, const T* y, const float* lse, float* delta, T* dqkv, int n,
                                  int h, int e, float scale) {
    mma_packed_dq<Small<72>>(AllKeys{n, n}, dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_q_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_backward_kv_64x64_e72(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv, int n, int h,
                                   int e, float scale) {
    mma_packed_dkdv<Small<72>>(AllKeys{n, n}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_kv_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_backward_q_64x64_e96(const T* dy, const T* qkv, const T* y, const float* lse, float* delta, T* dqkv, int n,
                                  int h, int e, float scale) {
    mma_packed_dq<Small<96>>(AllKeys{n, n}, dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_q_64x64_e96);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_backward_kv_64x64_e96(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv, int n, int h,
                                   int e, float scale) {
    mma_packed_dkdv<Small<96>>(AllKeys{n, n}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_kv_64x64_e96);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_backward_q_64x64_e128(const T* dy, const T* qkv, const T* y, const float* lse, float* delta, T* dqkv, int n,
                                  int h, int e, float scale) {
    mma_packed_dq<Small<128>>(AllKeys{n, n}, dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_q_64x64_e128);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_backward_kv_64x64_e128(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv, int n, int h,
                                   int e, float scale) {
    mma_packed_dkdv<Small<128>>(AllKeys{n, n}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_kv_64x64_e128);
