// What the kernels of both passes share: chunks of 64 times of a head, their decays, and sums of outer products.
//
// Within a chunk the recurrence is y_i = sum_{j <= i} L_ij (C_i·B_j) dt_j x_j + cum_i S·C_i, with L_ij the product of the
// decays of j + 1 to i, cum_i that of the first to i, and S the state before the chunk; end_j is that of j + 1 to the
// last. Decays are exponentials of differences of sums of dt in f64, so that no digits are lost to long sums.
#pragma once
#include "../common/ptx.cuh"
#include "../common/softmax_attention.cuh"

using namespace ptx;

constexpr int kChunk = 64;
using Pairs = Tile<kChunk, 32, 16>;
using Sums = Tile<64, 32, 16>;

// Sizes of a call; times count from the last token where `reverse`.
struct Call {
    int n, h, e, k, reverse;
    __device__ __forceinline__ int chunks() const { return (n + kChunk - 1) / kChunk; }
    __device__ __forceinline__ size_t width() const { return size_t(h) * e + 2 * k; }
    __device__ __forceinline__ size_t row(int sample, int time) const {
        return size_t(sample) * n + (reverse ? n - 1 - time : time);
    }
};

// A head of a sample in a chunk.
struct Chunk {
    Call call;
    int sample, head, chunk, first, live;
    // Among all heads and chunks, for states and decays.
    __device__ __forceinline__ size_t index() const { return (size_t(sample) * call.h + head) * call.chunks() + chunk; }
    __device__ __forceinline__ float x(const T* xbc, int i, int e) const { return part(xbc, i, head * call.e + e); }
    __device__ __forceinline__ float b(const T* xbc, int i, int k) const { return part(xbc, i, call.h * call.e + k); }
    __device__ __forceinline__ float c(const T* xbc, int i, int k) const {
        return part(xbc, i, call.h * call.e + call.k + k);
    }
    __device__ __forceinline__ float part(const T* xbc, int i, int column) const {
        return i < live ? to_float(xbc[call.row(sample, first + i) * call.width() + column]) : 0.0f;
    }
    // Of y or dy, [B, N, H·E].
    __device__ __forceinline__ size_t out(int i, int e) const {
        return (call.row(sample, first + i) * call.h + head) * call.e + e;
    }
    __device__ __forceinline__ float y(const T* dy, int i, int e) const { return i < live ? to_float(dy[out(i, e)]) : 0.0f; }
};

// blockIdx.x: heads fastest, because they share rows, then chunks, then samples.
__device__ __forceinline__ Chunk chunk_of_block(const Call& call) {
    const int head = int(blockIdx.x) % call.h, rest = int(blockIdx.x) / call.h, chunks = call.chunks();
    const int first = rest % chunks * kChunk;
    return {call, rest / chunks, head, rest % chunks, first, min(kChunk, call.n - first)};
}

// The steps of a chunk in shared memory: dt, and its sums up to and with each time. Times beyond the last are zero.
struct Steps {
    float* dt;
    double* sums;
    float rate;
    // The decays of from + 1 to `to`.
    __device__ __forceinline__ float decay(int from, int to) const { return expf(rate * float(sums[to] - sums[from])); }
    __device__ __forceinline__ float cum(int i) const { return expf(rate * float(sums[i])); }
    __device__ __forceinline__ float end(int j) const { return decay(j, kChunk - 1); }
};

// dt: [B, H, N] in the order of time. Every thread of the block takes part.
__device__ __forceinline__ void load_steps(const Steps& s, const float* dt, const Chunk& at) {
    const int i = threadIdx.x;
    __syncthreads();
    if (i < kChunk) s.dt[i] = i < at.live ? dt[(size_t(at.sample) * at.call.h + at.head) * at.call.n + at.first + i] : 0.0f;
    __syncthreads();
    if (i < kChunk) {
        double sum = 0.0;
        for (int j = 0; j <= i; j++) sum += s.dt[j];
        s.sums[i] = sum;
    }
    __syncthreads();
}

// Tile blockIdx.y of [E, K]: to[e][k] = sum_i left(i, e)·right(i, k) over the times of the chunk.
template <class L, class R>
__device__ __forceinline__ void outer(float* to, float* a, float* b, const Chunk& at, L left, R right) {
    const int e = at.call.e, k = at.call.k, tiles = (k + Sums::kN - 1) / Sums::kN;
    const int row0 = int(blockIdx.y) / tiles * Sums::kM, column0 = int(blockIdx.y) % tiles * Sums::kN;
    REG(float, acc, [4][4]);
    Sums::clear(acc);
    tile_product<Sums, false, false>(
        acc, a, b, 0, at.live, [&](int i, int time) { return row0 + i < e ? left(time, row0 + i) : 0.0f; },
        [&](int j, int time) { return column0 + j < k ? right(time, column0 + j) : 0.0f; });
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = row0 + Sums::row(i), column = column0 + Sums::column(j);
            if (row < e && column < k) to[size_t(row) * k + column] = acc[i][j];
        }
    }
}

// acc += weights·values(time, column) over 32 times from `first`; weights [32][68].
template <class V>
__device__ __forceinline__ void weigh_times(float (&acc)[4][4], const float* weights, float* values, int first, V value) {
    __syncthreads();
    tile_fill<32, 32, false>(values, [&](int column, int time) { return value(first + time, column); });
    __syncthreads();
    Weighted::multiply(acc, weights, values);
}
