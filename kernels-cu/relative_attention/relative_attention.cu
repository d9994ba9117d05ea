// keys(b) = {j : j < counts[b]}, all N without counts
// s[b,h,i,j] = scale * sum_e q[b,i,h,e] * k[b,j,h,e] + bias[j - i + N - 1, h]
// lse[b,h,i] = log sum_{j in keys(b)} exp(s[b,h,i,j]);  y[b,i,h,e] = sum_{j in keys(b)} exp(s - lse) * v[b,j,h,e]
// Backward as in `attention.cu`, and dbias[t + N - 1, h] = sum_b sum_{j - i = t} ds[b,h,i,j].
//
// qkv, dqkv: [B, N, 3, H, E], y, dy: [B, N, H, E], bias, dbias: [2N - 1, H], all T; counts: [B] int, may be null; lse,
// delta: [B, H, N] f32; sums in f32.
//
// `common/softmax_attention.cuh` (CUDA cores) and `common/mma_attention.cuh` (tensor cores) say who owns what; this adds the bias of a pair.
// dbias: a block goes through the keys of its 64 queries as for dq and computes ds again. In a tile of 64×32 pairs thread
// t < 95 adds the pairs of distance t - 63; from a tile to the next, sums move 32 threads down, so each distance stays in
// a register until its last tile has passed and then becomes one partial sum in memory. A second kernel adds those of all
// samples and tiles of queries, in their order: one thread for each distance and head.
//
// Bound: arithmetic, 4·B·H·N²·E operations forward, 14 backward, 18 with dbias; see `attention.cu`. The partial sums are
// B·H·ceil(N/64)·(N + 96) floats: 0.5 MB at N=300, H=64.
//
// Requires: nothing beyond the contract: any N and E. A count below 1 is 1, one above N is N, as the contract says.
// Does not handle: masks with holes, strides.
#include "../common/ptx.cuh"
#include "../common/mma_attention_backward.cuh"

using namespace ptx;

// The first `limit` keys, with the bias of their distance; `same` is the head's bias of distance 0.
struct Distances {
    int limit, n, h;
    const T* same;
    __device__ __forceinline__ Span keys(int, int) const { return {0, limit}; }
    __device__ __forceinline__ Span queries(int, int) const { return {0, n}; }
    // Rows behind the last query stand for it, so that their distances lie in the table.
    __device__ __forceinline__ int query(int i) const { return min(i, n - 1); }
    __device__ __forceinline__ int key(int j) const { return j; }
    __device__ __forceinline__ bool sees(int, int) const { return true; }
    __device__ __forceinline__ float bias(int i, int j) const { return to_float(same[int64_t(j - i) * h]); }
};

__device__ __forceinline__ Distances distances(const T* bias, const int* counts, int n, int h, const Place& at) {
    return {counts ? min(max(counts[at.sample], 1), n) : n, n, h, bias + size_t(n - 1) * h + at.head};
}

extern "C" __global__ void __launch_bounds__(128)
    relative_attention_forward(const T* qkv, const T* bias, const int* counts, T* y, float* lse, int n, int h, int e,
                               float scale) {
    packed_forward(distances(bias, counts, n, h, place_of_block(n, h)), qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_forward);

extern "C" __global__ void __launch_bounds__(128)
    relative_attention_backward_delta(const T* y, const T* dy, float* delta, uint64_t rows, int n, int h, int e) {
    softmax_delta(y, dy, delta, rows, n, h, e);
}
KERNEL_EXPORT(relative_attention_backward_delta);

extern "C" __global__ void __launch_bounds__(128)
    relative_attention_backward_q(const T* dy, const T* qkv, const T* bias, const int* counts, const float* lse,
                                  const float* delta, T* dqkv, int n, int h, int e, float scale) {
    packed_dq(distances(bias, counts, n, h, place_of_block(n, h)), dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_backward_q);

extern "C" __global__ void __launch_bounds__(128, 2)
    relative_attention_backward_kv(const T* dy, const T* qkv, const T* bias, const int* counts, const float* lse,
                                   const float* delta, T* dqkv, int n, int h, int e, float scale) {
    packed_dkdv(distances(bias, counts, n, h, place_of_block(n, h)), dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_backward_kv);

// partials: [B·tiles·H][slots] in the order of the blocks; slot p of the tile from row0 on is the distance p - 63 - row0.
extern "C" __global__ void __launch_bounds__(128, 3)
    relative_attention_backward_distances(const T* dy, const T* qkv, const T* bias, const int* counts, const float* lse,
                                          const float* delta, float* partials, int n, int h, int e, int slots,
                                          float scale) {
    SMEM_ARRAY(float4, a_tile, Scores::kSizeA);
    SMEM_ARRAY(float4, b_tile, Scores::kSizeB);
    SMEM_ARRAY(float4, slope_tile, kSizeWeights);
    SMEM_ARRAY(float, carried, 128);
    float *a = reinterpret_cast<float*>(a_tile), *b = reinterpret_cast<float*>(b_tile);
    float* slopes = reinterpret_cast<float*>(slope_tile);
    const Distances keys = distances(bias, counts, n, h, place_of_block(n, h));
    const Place at = place_of_block(n, h);
    const Vectors<const T> q = head_part(qkv, at, 0, 3, n, h, e), k = head_part(qkv, at, 1, 3, n, h, e);
    const Vectors<const T> v = head_part(qkv, at, 2, 3, n, h, e), slope = head_part(dy, at, 0, 1, n, h, e);
    const int row_end = min(n, at.row0 + kRowTile), rows = row_end - at.row0, thread = threadIdx.x;
    const size_t first = (size_t(at.sample) * h + at.head) * n;
    float base[4], fall[4], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = keys.query(at.row0 + Scores::row(i));
        base[i] = lse[first + row], fall[i] = delta[first + row];
    }
    float* to = partials + size_t(blockIdx.x) * slots;
    int column0 = 0;
    for (; column0 < keys.limit; column0 += kColumnTile) {
        float s[4][4];
        slopes_of(s, keys, a, b, q, k, v, slope, base, fall, at.row0, row_end, column0, keys.limit, e, scale);
        put_weights(slopes, s);
        __syncthreads();
        // Pairs of distance thread - 63 inside the tile: key j, query j - (thread - 63).
        for (int j = 0; j < kColumnTile; j++) {
            const int row = j - thread + kRowTile - 1;
            if (row >= 0 && row < rows) sum += slopes[j * (kRowTile + 4) + row];
        }
        if (thread < kColumnTile) to[column0 + thread] = sum;
        carried[threadIdx.x] = sum;
        __syncthreads();
        sum = thread < 96 ? carried[thread + kColumnTile] : 0.0f;
    }
    for (int slot = column0 + thread; slot < slots; slot += 128) to[slot] = slot - column0 < 64 ? sum : 0.0f;
}
KERNEL_EXPORT(relative_attention_backward_distances);

extern "C" __global__ void __launch_bounds__(128)
    relative_attention_backward_bias(const float* partials, T* dbias, int samples, int n, int h, int slots) {
    const int tiles = (n + kRowTile - 1) / kRowTile, blocks = (2 * n - 1 + 127) / 128;
    const int at = blockIdx.x % blocks * 128 + threadIdx.x, head = blockIdx.x / blocks;
    if (at >= 2 * n - 1) return;
    float sum = 0.0f;
    for (int i = 0; i < samples * tiles; i++) {
        // Distance at - (n - 1), of queries from row0 on.
        const int slot = at - (n - 1) + i % tiles * kRowTile + kRowTile - 1;
        if (slot >= 0 && slot < slots) sum += partials[(size_t(i) * h + head) * slots + slot];
    }
    dbias[size_t(at) * h + head] = from_float<T>(sum);
}
KERNEL_EXPORT(relative_attention_backward_bias);

// ---- tensor cores, 16-bit elements: heads of up to the width in the name ----

template <int kE> using MmaSmall = MmaTile<kE, 4, 1, 64>;

extern "C" __global__ void __launch_bounds__(128, 4)
    relative_attention_forward_64x64_e32(const T* qkv, const T* bias, const int* counts, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<MmaSmall<32>>(distances(bias, counts, n, h, place_of_tile<MmaSmall<32>>(n, h)), qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_forward_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 4)
    relative_attention_backward_q_64x64_e32(const T* dy, const T* qkv, const T* bias, const int* counts, const T* y, const float* lse, float* delta,
        T* dqkv, int n, int h, int e, float scale) {
    mma_packed_dq<MmaSmall<32>>(distances(bias, counts, n, h, place_of_tile<MmaSmall<32>>(n, h)), dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_backward_q_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 3)
    relative_attention_backward_kv_64x64_e32(const T* dy, const T* qkv, const T* bias, const int* counts, const float* lse, const float* delta, T* dqkv,
        int n, int h, int e, float scale) {
    mma_packed_dkdv<MmaSmall<32>>(distances(bias, counts, n, h, place_of_tile<MmaSmall<32>>(n, h)), dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_backward_kv_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 3)
    relative_attention_forward_64x64_e64(const T* qkv, const T* bias, const int* counts, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<MmaSmall<64>>(distances(bias, counts, n, h, place_of_tile<MmaSmall<64>>(n, h)), qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_forward_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    relative_attention_backward_q_64x64_e64(const T* dy, const T* qkv, const T* bias, const int* counts, const T* y, const float* lse, float* delta,
        T* dqkv, int n, int h, int e, float scale) {
    mma_packed_dq<MmaSmall<64>>(distances(bias, counts, n, h, place_of_tile<MmaSmall<64>>(n, h)), dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_backward_q_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 2)
    relative_attention_backward_kv_64x64_e64(const T* dy, const T* qkv, const T* bias, const int* counts, const float* lse, const float* delta, T* dqkv,
        int n, int h, int e, float scale) {
    mma_packed_dkdv<MmaSmall<64>>(distances(bias, counts, n, h, place_of_tile<MmaSmall<64>>(n, h)), dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_backward_kv_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 2)
    relative_attention_forward_64x64_e72(const T* qkv, const T* bias, const int* counts, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<MmaSmall<72>>(distances(bias, counts, n, h, place_of_tile<MmaSmall<72>>(n, h)), qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_forward_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 3)
    relative_attention_backward_q_64x64_e72(const T* dy, const T* qkv, const T* bias, const int* counts, const T* y, const float* lse, float* delta,
        T* dqkv, int n, int h, int e, float scale) {
    mma_packed_dq<MmaSmall<72>>(distances(bias, counts, n, h, place_of_tile<MmaSmall<72>>(n, h)), dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_backward_q_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 2)
    relative_attention_backward_kv_64x64_e72(const T* dy, const T* qkv, const T* bias, const int* counts, const float* lse, const float* delta, T* dqkv,
        int n, int h, int e, float scale) {
    mma_packed_dkdv<MmaSmall<72>>(distances(bias, counts, n, h, place_of_tile<MmaSmall<72>>(n, h)), dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_backward_kv_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 2)
    relative_attention_forward_64x64_e128(const T* qkv, const T* bias, const int* counts, T* y, float* lse, int n, int h, int e, float scale) {
    mma_packed_forward<MmaSmall<128>>(distances(bias, counts, n, h, place_of_tile<MmaSmall<128>>(n, h)), qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_forward_64x64_e128);

extern "C" __global__ void __launch_bounds__(128, 2)
    relative_attention_backward_q_64x64_e128(const T* dy, const T* qkv, const T* bias, const int* counts, const T* y, const float* lse, float* delta,
        T* dqkv, int n, int h, int e, float scale) {
    mma_packed_dq<MmaSmall<128>>(distances(bias, counts, n, h, place_of_tile<MmaSmall<128>>(n, h)), dy, qkv, y, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_backward_q_64x64_e128);

extern "C" __global__ void __launch_bounds__(128, 2)
    relative_attention_backward_kv_64x64_e128(const T* dy, const T* qkv, const T* bias, const int* counts, const float* lse, const float* delta, T* dqkv,
        int n, int h, int e, float scale) {
    mma_packed_dkdv<MmaSmall<128>>(distances(bias, counts, n, h, place_of_tile<MmaSmall<128>>(n, h)), dy, qkv, lse, delta, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(relative_attention_backward_kv_64x64_e128);
