// keys(i) = {j : |i - j| <= W, 0 <= j < N};  s[b,h,i,j] = scale * sum_e q[b,i,h,e] * k[b,j,h,e]
// lse[b,h,i] = log sum_{j in keys(i)} exp(s[b,h,i,j]);  y[b,i,h,e] = sum_{j in keys(i)} exp(s - lse) * v[b,j,h,e]
//
// qkv, dqkv: [B, N, 3, H, E], y, dy: [B, N, H, E], all T; lse, delta: [B, H, N] f32; sums in f32. Gradients as in
// `attention.cu`.
//
// `common/softmax_attention.cuh` (CUDA cores) and `common/mma_attention.cuh` (tensor cores) say who owns what. A tile of 64 queries meets
// the keys from its first less W to its last plus W, in tiles of 32; pairs beyond W get no weight. Backward the same from
// the keys' side, because the window is symmetric.
//
// Bound: memory where W is small, 4·N·H·E elements moved forward for 4·N·H·E·(2W + 1) operations. This version computes
// (64 + 2W)/(2W + 1) times that, seven times at W = 4 and twice at W = 32, on CUDA cores: arithmetic bounds it.
//
// Requires: nothing beyond the contract: any N, E and W. A value that is not a number reaches the queries whose tile
// meets it. Does not handle: windows that wrap, strides.
#include "../common/ptx.cuh"
#include "../common/mma_attention_backward.cuh"
#include "ring.cuh"

using namespace ptx;

// The window of W tokens to each side; W is at most N.
struct Window {
    int limit, w;
    __device__ __forceinline__ Span keys(int first, int end) const { return {max(0, first - w), min(limit, end + w)}; }
    __device__ __forceinline__ Span queries(int first, int end) const { return keys(first, end); }
    __device__ __forceinline__ int query(int i) const { return i; }
    __device__ __forceinline__ int key(int j) const { return j; }
    __device__ __forceinline__ bool sees(int i, int j) const { return unsigned(j - i + w) <= 2 * unsigned(w); }
    __device__ __forceinline__ Cover cover(int i, int i_end, int j, int j_end) const {
        if (i - (j_end - 1) > w || j - (i_end - 1) > w) return Cover::None;
        return i_end - 1 - j <= w && j_end - 1 - i <= w ? Cover::All : Cover::Some;
    }
};

extern "C" __global__ void __launch_bounds__(128)
    window_attention_forward(const T* qkv, T* y, float* lse, int n, int w, int h, int e, float scale) {
    packed_forward(Window{n, w}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_forward);

extern "C" __global__ void __launch_bounds__(128)
    window_attention_backward_delta(const T* y, const T* dy, float* delta, uint64_t rows, int n, int h, int e) {
    softmax_delta(y, dy, delta, rows, n, h, e);
}
KERNEL_EXPORT(window_attention_backward_delta);

extern "C" __global__ void __launch_bounds__(128)
    window_attention_backward_q(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv, int n, int w, int h, int e,
                    float scale) {
    packed_dq(Window{n, w}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_backward_q);

extern "C" __global__ void __launch_bounds__(128, 2)
    window_attention_backward_kv(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv, int n, int w, int h, int e,
                     float scale) {
    packed_dkdv(Window{n, w}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_backward_kv);

// ---- tensor cores, 16-bit elements: heads of up to the width in the name ----

template <int kE> using MmaSmall = MmaTile<kE, 4, 1, 64>;

extern "C" __global__ void __launch_bounds__(128, 4)
    window_attention_forward_64x64_e32(const T* qkv, T* y, float* lse, int n, int w, int h, int e, float scale) {
    mma_packed_forward<MmaSmall<32>>(Window{n, w}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_forward_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 4)
    window_attention_backward_q_64x64_e32(const T* dy, const T* qkv, const T* y, const float* lse, float* delta,
        T* dqkv, int n, int w, int h, int e, float scale) {
    mma_packed_dq<MmaSmall<32>>(Window{n, w}, dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_backward_q_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 4)
    window_attention_backward_kv_64x64_e32(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv,
        int n, int w, int h, int e, float scale) {
    mma_packed_dkdv<MmaSmall<32>>(Window{n, w}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_backward_kv_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 3)
    window_attention_forward_64x64_e64(const T* qkv, T* y, float* lse, int n, int w, int h, int e, float scale) {
    mma_packed_forward<MmaSmall<64>>(Window{n, w}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_forward_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    window_attention_backward_q_64x64_e64(const T* dy, const T* qkv, const T* y, const float* lse, float* delta,
        T* dqkv, int n, int w, int h, int e, float scale) {
    mma_packed_dq<MmaSmall<64>>(Window{n, w}, dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_backward_q_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    window_attention_backward_kv_64x64_e64(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv,
        int n, int w, int h, int e, float scale) {
    mma_packed_dkdv<MmaSmall<64>>(Window{n, w}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_backward_kv_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    window_attention_forward_64x64_e72(const T* qkv, T* y, float* lse, int n, int w, int h, int e, float scale) {
    mma_packed_forward<MmaSmall<72>>(Window{n, w}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_forward_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 3)
    window_attention_backward_q_64x64_e72(const T* dy, const T* qkv, const T* y, const float* lse, float* delta,
        T* dqkv, int n, int w, int h, int e, float scale) {
    mma_packed_dq<MmaSmall<72>>(Window{n, w}, dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_backward_q_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 2)
    window_attention_backward_kv_64x64_e72(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv,
        int n, int w, int h, int e, float scale) {
    mma_packed_dkdv<MmaSmall<72>>(Window{n, w}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_backward_kv_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 2)
    window_attention_forward_64x64_e128(const T* qkv, T* y, float* lse, int n, int w, int h, int e, float scale) {
    mma_packed_forward<MmaSmall<128>>(Window{n, w}, qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_forward_64x64_e128);

extern "C" __global__ void __launch_bounds__(128, 2)
    window_attention_backward_q_64x64_e128(const T* dy, const T* qkv, const T* y, const float* lse, float* delta,
        T* dqkv, int n, int w, int h, int e, float scale) {
    mma_packed_dq<MmaSmall<128>>(Window{n, w}, dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_backward_q_64x64_e128);

extern "C" __global__ void __launch_bounds__(128, 2)
    window_attention_backward_kv_64x64_e128(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv,
        int n, int w, int h, int e, float scale) {
    mma_packed_dkdv<MmaSmall<128>>(Window{n, w}, dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(window_attention_backward_kv_64x64_e128);

// Windows of up to 8 or 32 tokens to each side: a warp's 16 queries meet at most 32 or 80 keys. A block walks over
// `segment` queries of a head, a multiple of 64.
template <int kE, int kKeys, int kSize>
PTX_FN void ring(const T* qkv, T* y, float* lse, int n, int w, int h, int e, int segment, float scale) {
    const int segments = (n + segment - 1) / segment, block = int(blockIdx.x) / h;
    const Place at = {block / segments, int(blockIdx.x) % h, block % segments * segment};
    mma_forward_ring<MmaTile<kE, 4, 1, kKeys>, kSize>(
        Window{n, w}, head_part(qkv, at, 0, 3, n, h, e), head_part(qkv, at, 1, 3, n, h, e),
        head_part(qkv, at, 2, 3, n, h, e), head_part(y, at, 0, 1, n, h, e),
        lse + (size_t(at.sample) * h + at.head) * n, at.row0, min(n, at.row0 + segment), w, e, scale);
}

extern "C" __global__ void __launch_bounds__(128, 4)
    window_attention_forward_ring32_e32(const T* qkv, T* y, float* lse, int n, int w, int h, int e, int segment,
                                         float scale) {
    ring<32, 32, 144>(qkv, y, lse, n, w, h, e, segment, scale);
}
KERNEL_EXPORT(window_attention_forward_ring32_e32);

extern "C" __global__ void __launch_bounds__(128, 4)
    window_attention_forward_ring32_e64(const T* qkv, T* y, float* lse, int n, int w, int h, int e, int segment,
                                         float scale) {
    ring<64, 32, 144>(qkv, y, lse, n, w, h, e, segment, scale);
}
KERNEL_EXPORT(window_attention_forward_ring32_e64);

extern "C" __global__ void __launch_bounds__(128, 4)
    window_attention_forward_ring32_e72(const T* qkv, T* y, float* lse, int n, int w, int h, int e, int segment,
                                         float scale) {
    ring<72, 32, 144>(qkv, y, lse, n, w, h, e, segment, scale);
}
KERNEL_EXPORT(window_attention_forward_ring32_e72);

extern "C" __global__ void __launch_bounds__(128, 3)
    window_attention_forward_ring80_e32(const T* qkv, T* y, float* lse, int n, int w, int h, int e, int segment,
                                         float scale) {
    ring<32, 80, 192>(qkv, y, lse, n, w, h, e, segment, scale);
}
KERNEL_EXPORT(window_attention_forward_ring80_e32);

extern "C" __global__ void __launch_bounds__(128, 3)
    window_attention_forward_ring80_e64(const T* qkv, T* y, float* lse, int n, int w, int h, int e, int segment,
                                         float scale) {
    ring<64, 80, 192>(qkv, y, lse, n, w, h, e, segment, scale);
}
KERNEL_EXPORT(window_attention_forward_ring80_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    window_attention_forward_ring80_e72(const T* qkv, T* y, float* lse, int n, int w, int h, int e, int segment,
                                         float scale) {
    ring<72, 80, 192>(qkv, y, lse, n, w, h, e, segment, scale);
}
KERNEL_EXPORT(window_attention_forward_ring80_e72);
