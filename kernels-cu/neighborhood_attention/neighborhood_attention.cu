// start(i, n) = clamp(i - (K - 1)/2, 0, n - K);  keys(r, c) = {(r', c') : 0 <= r' - start(r, Gh) < K, 0 <= c' - start(c, Gw) < K}
// s[b,h,i,j] = scale * sum_e q[b,i,h,e] * k[b,j,h,e];  lse[b,h,i] = log sum_{j in keys(i)} exp(s[b,h,i,j])
// y[b,i,h,e] = sum_{j in keys(i)} exp(s - lse) * v[b,j,h,e]
//
// qkv, dqkv: [B, Gh, Gw, 3, H, E], y, dy: [B, Gh, Gw, H, E], all T; lse, delta: [B, H, Gh, Gw] f32; sums in f32.
// Gradients as in `attention.cu`.
//
// `common/softmax_attention.cuh` (CUDA cores) and `common/mma_attention.cuh` (tensor cores) say who owns what. Tokens go in raster order; a
// tile of 64 queries meets all tokens of the grid rows that any of its neighbourhoods touches, in tiles of 32; pairs
// outside of a neighbourhood get no weight. Backward, a tile of keys meets the rows whose queries may reach it.
//
// Bound: memory where K is small, 4·Gh·Gw·H·E elements moved forward. This version computes up to
// (K + 64/Gw)·Gw/K^2 times the scores that count (20 at Gw = 128, K = 7) on CUDA cores: arithmetic bounds it, and tiles
// of two dimensions are the next rung.
//
// Requires: K odd and no wider than the grid. A value that is not a number reaches the queries whose tile meets it.
// Does not handle: dilation, strides.
#include "../common/ptx.cuh"
#include "../common/mma_attention_backward.cuh"

using namespace ptx;

struct Cell {
    int row, column;
};

// Squares of K×K cells, shifted inside at the borders.
struct Neighbourhood {
    int limit, gh, gw, k;
    __device__ __forceinline__ int start(int i, int n) const { return min(max(i - (k - 1) / 2, 0), n - k); }
    // Whole grid rows, from the first that the first query sees to the last that the last one does.
    __device__ __forceinline__ Span keys(int first, int end) const {
        return {start(first / gw, gh) * gw, (start((end - 1) / gw, gh) + k) * gw};
    }
    // A query sees rows at most K - 1 away from its own.
    __device__ __forceinline__ Span queries(int first, int end) const {
        return {max(0, first / gw - (k - 1)) * gw, min(gh, (end - 1) / gw + k) * gw};
    }
    // The first cell that a query sees.
    __device__ __forceinline__ Cell query(int i) const { return {start(i / gw, gh), start(i % gw, gw)}; }
    __device__ __forceinline__ Cell key(int j) const { return {j / gw, j % gw}; }
    __device__ __forceinline__ bool sees(Cell first, Cell key) const {
        const int down = key.row - first.row, right = key.column - first.column;
        return down >= 0 && down < k && right >= 0 && right < k;
    }
    // By rows of the grid; and by columns, where queries and keys lie in one row each.
    __device__ __forceinline__ Cover cover(int i, int i_end, int j, int j_end) const {
        const int row = i / gw, row_end = (i_end - 1) / gw, key_row = j / gw, key_row_end = (j_end - 1) / gw;
        if (key_row_end < start(row, gh) || key_row >= start(row_end, gh) + k) return Cover::None;
        if (row != row_end || key_row != key_row_end) return Cover::Some;
        const int first = start(i - row * gw, gw), last = start(i_end - 1 - row * gw, gw) + k;
        return j_end - key_row * gw <= first || j - key_row * gw >= last ? Cover::None : Cover::Some;
    }
};

extern "C" __global__ void __launch_bounds__(128)
    neighborhood_attention_forward(const T* qkv, T* y, float* lse, int gh, int gw, int k, int h, int e, float scale) {
    packed_forward(Neighbourhood{gh * gw, gh, gw, k}, qkv, y, lse, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_forward);

extern "C" __global__ void __launch_bounds__(128)
    neighborhood_attention_backward_delta(const T* y, const T* dy, float* delta, uint64_t rows, int n, int h, int e) {
    softmax_delta(y, dy, delta, rows, n, h, e);
}
KERNEL_EXPORT(neighborhood_attention_backward_delta);

extern "C" __global__ void __launch_bounds__(128)
    neighborhood_attention_backward_q(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv, int gh, int gw, int k, int h, int e,
                    float scale) {
    packed_dq(Neighbourhood{gh * gw, gh, gw, k}, dy, qkv, lse, delta, dqkv, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_backward_q);

extern "C" __global__ void __launch_bounds__(128, 2)
    neighborhood_attention_backward_kv(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv, int gh, int gw, int k, int h, int e,
                     float scale) {
    packed_dkdv(Neighbourhood{gh * gw, gh, gw, k}, dy, qkv, lse, delta, dqkv, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_backward_kv);

// ---- tensor cores, 16-bit elements: heads of up to the width in the name ----

template <int kE> using MmaSmall = MmaTile<kE, 4, 1, 64>;

extern "C" __global__ void __launch_bounds__(128, 4)
    neighborhood_attention_forward_64x64_e32(const T* qkv, T* y, float* lse, int gh, int gw, int k, int h, int e, float scale) {
    mma_packed_forward<MmaSmall<32>>(Neighbourhood{gh * gw, gh, gw, k}, qkv, y, lse, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_forward_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 4)
    neighborhood_attention_backward_q_64x64_e32(const T* dy, const T* qkv, const T* y, const float* lse, float* delta,
        T* dqkv, int gh, int gw, int k, int h, int e, float scale) {
    mma_packed_dq<MmaSmall<32>>(Neighbourhood{gh * gw, gh, gw, k}, dy, qkv, y, lse, delta, dqkv, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_backward_q_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 4)
    neighborhood_attention_backward_kv_64x64_e32(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv,
        int gh, int gw, int k, int h, int e, float scale) {
    mma_packed_dkdv<MmaSmall<32>>(Neighbourhood{gh * gw, gh, gw, k}, dy, qkv, lse, delta, dqkv, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_backward_kv_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 3)
    neighborhood_attention_forward_64x64_e64(const T* qkv, T* y, float* lse, int gh, int gw, int k, int h, int e, float scale) {
    mma_packed_forward<MmaSmall<64>>(Neighbourhood{gh * gw, gh, gw, k}, qkv, y, lse, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_forward_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    neighborhood_attention_backward_q_64x64_e64(const T* dy, const T* qkv, const T* y, const float* lse, float* delta,
        T* dqkv, int gh, int gw, int k, int h, int e, float scale) {
    mma_packed_dq<MmaSmall<64>>(Neighbourhood{gh * gw, gh, gw, k}, dy, qkv, y, lse, delta, dqkv, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_backward_q_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    neighborhood_attention_backward_kv_64x64_e64(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv,
        int gh, int gw, int k, int h, int e, float scale) {
    mma_packed_dkdv<MmaSmall<64>>(Neighbourhood{gh * gw, gh, gw, k}, dy, qkv, lse, delta, dqkv, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_backward_kv_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    neighborhood_attention_forward_64x64_e72(const T* qkv, T* y, float* lse, int gh, int gw, int k, int h, int e, float scale) {
    mma_packed_forward<MmaSmall<72>>(Neighbourhood{gh * gw, gh, gw, k}, qkv, y, lse, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_forward_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 3)
    neighborhood_attention_backward_q_64x64_e72(const T* dy, const T* qkv, const T* y, const float* lse, float* delta,
        T* dqkv, int gh, int gw, int k, int h, int e, float scale) {
    mma_packed_dq<MmaSmall<72>>(Neighbourhood{gh * gw, gh, gw, k}, dy, qkv, y, lse, delta, dqkv, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_backward_q_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 2)
    neighborhood_attention_backward_kv_64x64_e72(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv,
        int gh, int gw, int k, int h, int e, float scale) {
    mma_packed_dkdv<MmaSmall<72>>(Neighbourhood{gh * gw, gh, gw, k}, dy, qkv, lse, delta, dqkv, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_backward_kv_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 2)
    neighborhood_attention_forward_64x64_e128(const T* qkv, T* y, float* lse, int gh, int gw, int k, int h, int e, float scale) {
    mma_packed_forward<MmaSmall<128>>(Neighbourhood{gh * gw, gh, gw, k}, qkv, y, lse, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_forward_64x64_e128);

extern "C" __global__ void __launch_bounds__(128, 2)
    neighborhood_attention_backward_q_64x64_e128(const T* dy, const T* qkv, const T* y, const float* lse, float* delta,
        T* dqkv, int gh, int gw, int k, int h, int e, float scale) {
    mma_packed_dq<MmaSmall<128>>(Neighbourhood{gh * gw, gh, gw, k}, dy, qkv, y, lse, delta, dqkv, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_backward_q_64x64_e128);

extern "C" __global__ void __launch_bounds__(128, 2)
    neighborhood_attention_backward_kv_64x64_e128(const T* dy, const T* qkv, const float* lse, const float* delta, T* dqkv,
        int gh, int gw, int k, int h, int e, float scale) {
    mma_packed_dkdv<MmaSmall<128>>(Neighbourhood{gh * gw, gh, gw, k}, dy, qkv, lse, delta, dqkv, gh * gw, h, e, scale);
}
KERNEL_EXPORT(neighborhood_attention_backward_kv_64x64_e128);
