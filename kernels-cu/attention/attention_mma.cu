// s[b,h,i,j] = scale * sum_e q[b,i,h,e] * k[b,j,h,e];  lse[b,h,i] = log sum_j exp(s[b,h,i,j])
// y[b,i,h,e] = sum_j exp(s - lse) * v[b,j,h,e];  gradients as in `attention.cu`
//
// qkv, dqkv: [B, N, 3, H, E], y, dy: [B, N, H, E], all T, 16-bit; lse, delta: [B, H, N] f32; sums in f32.
//
// Tensor cores of sm_80: `common/mma_attention.cuh` and `common/mma_attention_backward.cuh` say who owns what. The number
// in a kernel's name is the widest head that it takes: narrower ones run as zeros behind their columns. `_128x64_`: 128
// queries a block, 32 a warp up to 80 columns, so that a fragment of keys serves two products; `_64x64_`: 16 a warp.
//
// Bound: arithmetic from N of some 400 on. A warp's 32×64 tile of a head of 72: 144 products of m16n8k16 (the tensor
// cores of A100 take one each 8 clocks, 1,152), 2,048 exponentials (512 clocks), 42 KB of fragments (328 clocks of
// shared memory a block's share); at 16 rows a warp shared memory takes as long as the products.
//
// Requires: E in steps of 8 up to 128. Does not handle: masks, strides. In f32 the kernels are empty.
#include "../common/ptx.cuh"
#include "../common/mma_attention.cuh"

using namespace ptx;

template <int kE> using Tall = MmaTile<kE, kE <= 80 ? 4 : 8, kE <= 80 ? 2 : 1, 64>;
template <int kE> using Small = MmaTile<kE, 4, 1, 64>;

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_128x64_64(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Tall<64>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_128x64_64);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_128x64_72(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Tall<72>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_128x64_72);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_128x64_80(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Tall<80>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_128x64_80);

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_forward_128x64_96(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Tall<96>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_128x64_96);

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_forward_128x64_128(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Tall<128>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_128x64_128);

extern "C" __global__ void __launch_bounds__(128, 4)
    attention_forward_64x64_32(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Small<32>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_64x64_32);

extern "C" __global__ void __launch_bounds__(128, 3)
    attention_forward_64x64_64(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Small<64>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_64x64_64);

extern "C" __global__ void __launch_bounds__(128, 3)
    attention_forward_64x64_72(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Small<72>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_64x64_72);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_64x64_96(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Small<96>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_64x64_96);

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_64x64_128(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<Small<128>>(AllKeys{n, n}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_64x64_128);
