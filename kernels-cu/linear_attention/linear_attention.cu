// phi(x) = elu(x) + 1 (map 0) or max(x, 0) (map 1)
// state[d,e] = sum_j phi(k_j[d])*v_j[e];  total[d] = sum_j phi(k_j[d]);  norm_i = sum_d phi(q_i[d])*total[d] + eps
// y_i[e] = sum_d phi(q_i[d])*state[d,e] / norm_i
// g_i = dy_i/norm_i, fall_i = -g_i·y_i;  dstate = sum_i phi(q_i)·g_iᵀ, dtotal = sum_i phi(q_i)*fall_i
// dq_i = (state·g_i + fall_i*total)*phi'(q_i);  dk_j = (dstate·v_j + dtotal)*phi'(k_j);  dv_j = dstateᵀ·phi(k_j)
//
// qkv, dqkv: [B, N, 3, H, E], y, dy: [B, N, H, E], all T; norm, delta: [B, H, N], state: [B, H, E, E], total: [B, H, E]
// f32; sums in f32. partials: [B·H, parts, E, E + 1] f32, the last column that of total.
//
// Version 1, CUDA cores, the first rung. Sums over tokens: a block of 128 threads owns 64×32 of the state of a head over a
// part of the tokens (`common/tile.cuh`), a second kernel adds the parts in order; how many follows from the shape.
// Results by token: a block owns 64 tokens and 32 columns of a head. Norms and delta: a warp a token.
//
// Bound: memory, 4·N·H·E elements moved forward for 4·N·H·E² operations (72 a byte at E = 72 in bf16); CUDA cores and
// the second reading of q and k leave this version some three times above it.
//
// Requires: eps above zero. Does not handle: causal sums (linear_attention_causal.cu), strides.
#include "../common/elementwise.cuh"
#include "../common/softmax_attention.cuh"
#include "features.cuh"
#include "parts.cuh"

using Block = Tile<64, 32, 16>;

// Tile blockIdx.y of a [E, E + 1] sum over tokens first .. end of left_i[d]·right_i[e], into `to`.
template <class L, class R>
__device__ __forceinline__ void outer_sum(float* to, int first, int end, int e, L left, R right) {
    SMEM_ARRAY(float4, a_tile, Block::kSizeA);
    SMEM_ARRAY(float4, b_tile, Block::kSizeB);
    const int tiles = (e + 1 + Block::kN - 1) / Block::kN;
    const int row0 = int(blockIdx.y) / tiles * Block::kM, column0 = int(blockIdx.y) % tiles * Block::kN;
    REG(float, acc, [Block::kRows][Block::kColumns]);
    Block::clear(acc);
    tile_product<Block, false, false>(
        acc, reinterpret_cast<float*>(a_tile), reinterpret_cast<float*>(b_tile), first, end,
        [&](int i, int token) { return row0 + i < e ? left(token, row0 + i) : 0.0f; },
        [&](int j, int token) { return column0 + j <= e ? right(token, column0 + j) : 0.0f; });
#pragma unroll
    for (int i = 0; i < Block::kRows; i++) {
#pragma unroll
        for (int j = 0; j < Block::kColumns; j++) {
            const int row = row0 + Block::row(i), column = column0 + Block::column(j);
            if (row < e && column <= e) to[size_t(row) * (e + 1) + column] = acc[i][j];
        }
    }
}

// Results of 64 tokens and 32 columns of a head: put(token, column, sum_k left(token, k)·right(column, k)).
template <bool kAlongB, class L, class R, class P>
__device__ __forceinline__ void by_token(int row0, int n, int e, L left, R right, P put) {
    SMEM_ARRAY(float4, a_tile, Block::kSizeA);
    SMEM_ARRAY(float4, b_tile, Block::kSizeB);
    const int column0 = int(blockIdx.y) * Block::kN;
    REG(float, acc, [Block::kRows][Block::kColumns]);
    Block::clear(acc);
    tile_product<Block, true, kAlongB>(
        acc, reinterpret_cast<float*>(a_tile), reinterpret_cast<float*>(b_tile), 0, e,
        [&](int i, int k) { return row0 + i < n ? left(row0 + i, k) : 0.0f; },
        [&](int j, int k) { return column0 + j < e ? right(column0 + j, k) : 0.0f; });
#pragma unroll
    for (int i = 0; i < Block::kRows; i++) {
#pragma unroll
        for (int j = 0; j < Block::kColumns; j++) {
            const int row = row0 + Block::row(i), column = column0 + Block::column(j);
            if (row < n && column < e) put(row, column, acc[i][j]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_attention_state(const T* qkv, float* partials, int n, int h, int e, int map, int parts) {
    const Part p = part_of_block(n, h, parts);
    const Vectors<const T> k = head_part(qkv, p.at, 1, 3, n, h, e), v = head_part(qkv, p.at, 2, 3, n, h, e);
    outer_sum(
        partials + size_t(blockIdx.x) * e * (e + 1), p.first, p.end, e,
        [&](int j, int d) { return phi(map, to_float(k.at[j * k.stride + d])); },
        [&](int j, int c) { return c < e ? to_float(v.at[j * v.stride + c]) : 1.0f; });
}
KERNEL_EXPORT(linear_attention_state);

// The parts of each head in order: state [heads, E, E] and total [heads, E]. Threads of a block have neighbours of one
// head; a thread has 8 parts in flight.
extern "C" __global__ void __launch_bounds__(256)
    linear_attention_add(const float* partials, float* state, float* total, int e, int parts) {
    constexpr int kBatch = 8;
    const int blocks = int((size_t(e) * (e + 1) + 255) / 256), head = int(blockIdx.x) / blocks;
    const size_t each = size_t(e) * (e + 1), at = size_t(int(blockIdx.x) % blocks) * 256 + threadIdx.x;
    if (at >= each) return;
    const float* from = partials + size_t(head) * parts * each + at;
    float sum = 0.0f;
    for (int first = 0; first < parts; first += kBatch, from += kBatch * each) {
        REG(float, part, [kBatch]);
#pragma unroll
        for (int p = 0; p < kBatch; p++) part[p] = first + p < parts ? from[p * each] : 0.0f;
#pragma unroll
        for (int p = 0; p < kBatch; p++) sum += part[p];
    }
    const int column = int(uint32_t(at) % uint32_t(e + 1));
    const size_t row = size_t(head) * e + uint32_t(at) / uint32_t(e + 1);
    if (column < e)
        state[row * e + column] = sum;
    else
        total[row] = sum;
}
KERNEL_EXPORT(linear_attention_add);

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_attention_norm(const T* qkv, const float* total, float* norm, uint64_t rows, int n, int h, int e, int map,
                          float eps) {
    const int lane = threadIdx.x % 32;
    for (size_t row = size_t(blockIdx.x) * 4 + threadIdx.x / 32; row < rows; row += size_t(gridDim.x) * 4) {
        const size_t token = row / h, head = token / n * h + row % h;
        const T* q = qkv + (token * 3 * h + row % h) * e;
        float sum = 0.0f;
        for (int d = lane; d < e; d += 32) sum = fmaf(phi(map, to_float(q[d])), total[head * e + d], sum);
        sum = warp_sum(sum);
        if (lane == 0) norm[head * n + token % n] = sum + eps;
    }
}
KERNEL_EXPORT(linear_attention_norm);

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_attention_forward(const T* qkv, const float* state, const float* norm, T* y, int n, int h, int e, int map) {
    const Place at = place_of_block(n, h);
    const size_t head = size_t(at.sample) * h + at.head;
    const Vectors<const T> q = head_part(qkv, at, 0, 3, n, h, e);
    const Vectors<T> to = head_part(y, at, 0, 1, n, h, e);
    by_token<false>(
        at.row0, n, e, [&](int i, int d) { return phi(map, to_float(q.at[i * q.stride + d])); },
        [&](int c, int d) { return state[(head * e + d) * e + c]; },
        [&](int i, int c, float sum) { to.at[i * to.stride + c] = from_float<T>(sum / norm[head * n + i]); });
}
KERNEL_EXPORT(linear_attention_forward);

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_attention_backward_delta(const T* y, const T* dy, float* delta, uint64_t rows, int n, int h, int e) {
    softmax_delta(y, dy, delta, rows, n, h, e);
}
KERNEL_EXPORT(linear_attention_backward_delta);

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_attention_backward_state(const T* dy, const T* qkv, const float* norm, const float* delta, float* partials,
                                    int n, int h, int e, int map, int parts) {
    const Part p = part_of_block(n, h, parts);
    const Vectors<const T> q = head_part(qkv, p.at, 0, 3, n, h, e), g = head_part(dy, p.at, 0, 1, n, h, e);
    const size_t row = p.head * n;
    outer_sum(
        partials + size_t(blockIdx.x) * e * (e + 1), p.first, p.end, e,
        [&](int i, int d) { return phi(map, to_float(q.at[i * q.stride + d])); },
        [&](int i, int c) { return (c < e ? to_float(g.at[i * g.stride + c]) : -delta[row + i]) / norm[row + i]; });
}
KERNEL_EXPORT(linear_attention_backward_state);

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_attention_backward_q(const T* dy, const T* qkv, const float* norm, const float* delta, const float* state,
                                const float* total, T* dqkv, int n, int h, int e, int map) {
    const Place at = place_of_block(n, h);
    const size_t head = size_t(at.sample) * h + at.head;
    const Vectors<const T> q = head_part(qkv, at, 0, 3, n, h, e), g = head_part(dy, at, 0, 1, n, h, e);
    const Vectors<T> to = head_part(dqkv, at, 0, 3, n, h, e);
    by_token<true>(
        at.row0, n, e, [&](int i, int c) { return to_float(g.at[i * g.stride + c]); },
        [&](int d, int c) { return state[(head * e + d) * e + c]; },
        [&](int i, int d, float sum) {
            const float all = (sum - delta[head * n + i] * total[head * e + d]) / norm[head * n + i];
            to.at[i * to.stride + d] = from_float<T>(all * phi_slope(map, to_float(q.at[i * q.stride + d])));
        });
}
KERNEL_EXPORT(linear_attention_backward_q);

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_attention_backward_k(const T* qkv, const float* dstate, const float* dtotal, T* dqkv, int n, int h, int e,
                                int map) {
    const Place at = place_of_block(n, h);
    const size_t head = size_t(at.sample) * h + at.head;
    const Vectors<const T> k = head_part(qkv, at, 1, 3, n, h, e), v = head_part(qkv, at, 2, 3, n, h, e);
    const Vectors<T> to = head_part(dqkv, at, 1, 3, n, h, e);
    by_token<true>(
        at.row0, n, e, [&](int j, int c) { return to_float(v.at[j * v.stride + c]); },
        [&](int d, int c) { return dstate[(head * e + d) * e + c]; },
        [&](int j, int d, float sum) {
            const float slope = phi_slope(map, to_float(k.at[j * k.stride + d]));
            to.at[j * to.stride + d] = from_float<T>((sum + dtotal[head * e + d]) * slope);
        });
}
KERNEL_EXPORT(linear_attention_backward_k);

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_attention_backward_v(const T* qkv, const float* dstate, T* dqkv, int n, int h, int e, int map) {
    const Place at = place_of_block(n, h);
    const size_t head = size_t(at.sample) * h + at.head;
    const Vectors<const T> k = head_part(qkv, at, 1, 3, n, h, e);
    const Vectors<T> to = head_part(dqkv, at, 2, 3, n, h, e);
    by_token<false>(
        at.row0, n, e, [&](int j, int d) { return phi(map, to_float(k.at[j * k.stride + d])); },
        [&](int c, int d) { return dstate[(head * e + d) * e + c]; },
        [&](int j, int c, float sum) { to.at[j * to.stride + c] = from_float<T>(sum); });
}
KERNEL_EXPORT(linear_attention_backward_v);
