// The formulas of linear_attention.cu where query i meets keys j <= i alone, by chunks of at most 64 tokens.
//
// With P the sums over the tokens before a chunk, [E, E + 1], whose last column is that of the totals, vx_j = (v_j, 1),
// gx_i = (g_i, fall_i), and all sums over tokens of the chunk:
//   (y_i·norm_i, norm_i - eps) = phi(q_i)·P + sum_{j<=i} (phi(q_i)·phi(k_j)) * vx_j
//   dphi(q_i) = P·gx_i + sum_{j<=i} (gx_i·vx_j) * phi(k_j)
// and with S the same sums of phi(q_i)·gx_iᵀ over the tokens behind the chunk:
//   dphi(k_j) = S·vx_j + sum_{i>=j} (gx_i·vx_j) * phi(q_i);  dv_j = Sᵀ·phi(k_j) + sum_{i>=j} (phi(q_i)·phi(k_j)) * g_i
//
// qkv, dqkv: [B, N, 3, H, E], y, dy: [B, N, H, E], all T; norm, delta: [B, H, N], state: [B, H, E, E], total: [B, H, E]
// f32; before, behind, sums: [B·H, chunks, E, E + 1] f32. Sums of a chunk come from the kernels of linear_attention.cu;
// `prefix` turns them into P or S, a thread an element. Then a block of 128 threads owns a chunk of a head, all columns,
// with the chunk's products of tokens in shared memory.
//
// Bound: memory; beside q, k, v and y the sums of chunks, 4·E·(E + 1) bytes for 64 tokens, go through memory four times:
// 1.3 times the rest in bf16 at E = 72. Operations: 4·N·H·E·(E + 64), on CUDA cores.
//
// Requires: eps above zero. Does not handle: chunks that no block owns (there is one for every chunk).
#include "../common/elementwise.cuh"
#include "../common/tile.cuh"
#include "features.cuh"
#include "parts.cuh"

using Block = Tile<64, 32, 16>;
constexpr int kChunk = 64, kPitch = kChunk + 1;

// The sums of each head's chunks become those of the chunks before (or, in reverse, behind); the whole to state and total
// where they are asked for.
extern "C" __global__ void __launch_bounds__(256)
    linear_attention_prefix(float* sums, float* state, float* total, uint64_t heads, int e, int chunks, int reverse) {
    const size_t each = size_t(e) * (e + 1);
    for (size_t i = grid_thread(); i < heads * each; i += grid_threads()) {
        const size_t head = i / each, at = i % each, row = head * e + at / (e + 1);
        const int column = int(at % (e + 1));
        float sum = 0.0f;
        for (int c = 0; c < chunks; c++) {
            float& own = sums[(head * chunks + (reverse ? chunks - 1 - c : c)) * each + at];
            const float next = sum + own;
            own = sum, sum = next;
        }
        if (state && column < e) state[row * e + column] = sum;
        if (total && column == e) total[row] = sum;
    }
}
KERNEL_EXPORT(linear_attention_prefix);

// Shared memory for the operands of a product.
struct Operands {
    float *a, *b;
};

// acc of 64 rows and the 32 columns from `column` on += left(row, k)·right(column, k), k < depth.
template <bool kAlongA, bool kAlongB, class L, class R>
__device__ __forceinline__ void add_product(float (&acc)[Block::kRows][Block::kColumns], const Operands& of, int column,
                                            int depth, L left, R right) {
    tile_product<Block, kAlongA, kAlongB>(acc, of.a, of.b, 0, depth, left,
                                          [&](int j, int k) { return right(column + j, k); });
}

template <class F>
__device__ __forceinline__ void for_each(const float (&acc)[Block::kRows][Block::kColumns], int column, F f) {
#pragma unroll
    for (int i = 0; i < Block::kRows; i++) {
#pragma unroll
        for (int j = 0; j < Block::kColumns; j++) f(Block::row(i), column + Block::column(j), acc[i][j]);
    }
}

// to[i][j] = sum_k left(i, k)·right(j, k) of tokens j <= i of a chunk, else 0.
template <class L, class R>
__device__ __forceinline__ void pairs(float* to, const Operands& of, int depth, L left, R right) {
#pragma unroll 1
    for (int column = 0; column < kChunk; column += Block::kN) {
        REG(float, acc, [Block::kRows][Block::kColumns]);
        Block::clear(acc);
        add_product<true, true>(acc, of, column, depth, left, right);
        for_each(acc, column, [&](int i, int j, float v) { to[i * kPitch + j] = j <= i ? v : 0.0f; });
    }
}

extern "C" __global__ void __launch_bounds__(128, 4)
    linear_attention_causal_forward(const T* qkv, const float* before, T* y, float* norm, int n, int h, int e, int map,
                                    float eps, int chunks) {
    const Part p = part_of_block(n, h, chunks);
    const int count = p.end - p.first;
    if (count <= 0) return;
    SMEM_ARRAY(float, scores, kChunk * kPitch);
    SMEM_ARRAY(float, norms, kChunk);
    SMEM_ARRAY(float4, a_tile, Block::kSizeA);
    SMEM_ARRAY(float4, b_tile, Block::kSizeB);
    const Operands of{reinterpret_cast<float*>(a_tile), reinterpret_cast<float*>(b_tile)};
    const Vectors<const T> q = head_part(qkv, p.at, 0, 3, n, h, e), k = head_part(qkv, p.at, 1, 3, n, h, e);
    const Vectors<const T> v = head_part(qkv, p.at, 2, 3, n, h, e);
    const Vectors<T> to = head_part(y, p.at, 0, 1, n, h, e);
    const float* sums = before + size_t(blockIdx.x) * e * (e + 1);
    const auto feature = [&](const Vectors<const T>& x, int i, int d) {
        return i < count ? phi(map, to_float(x.at[(p.first + i) * x.stride + d])) : 0.0f;
    };
    pairs(
        scores, of, e, [&](int i, int d) { return feature(q, i, d); }, [&](int j, int d) { return feature(k, j, d); });
    // The last columns first: among them are the norms.
#pragma unroll 1
    for (int column = e / Block::kN * Block::kN; column >= 0; column -= Block::kN) {
        REG(float, acc, [Block::kRows][Block::kColumns]);
        Block::clear(acc);
        add_product<true, false>(
            acc, of, column, e, [&](int i, int d) { return feature(q, i, d); },
            [&](int c, int d) { return c <= e ? sums[size_t(d) * (e + 1) + c] : 0.0f; });
        add_product<true, false>(
            acc, of, column, count, [&](int i, int j) { return scores[i * kPitch + j]; },
            [&](int c, int j) {
                return c < e ? to_float(v.at[(p.first + j) * v.stride + c]) : c == e ? 1.0f : 0.0f;
            });
        for_each(acc, column, [&](int i, int c, float sum) {
            if (c == e) norms[i] = sum + eps;
        });
        __syncthreads();
        for_each(acc, column, [&](int i, int c, float sum) {
            if (i >= count || c > e) return;
            if (c < e)
                to.at[(p.first + i) * to.stride + c] = from_float<T>(sum / norms[i]);
            else
                norm[p.head * n + p.first + i] = norms[i];
        });
    }
}
KERNEL_EXPORT(linear_attention_causal_forward);

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_attention_causal_backward(const T* dy, const T* qkv, const float* norm, const float* delta,
                                     const float* before, const float* behind, T* dqkv, int n, int h, int e, int map,
                                     int chunks) {
    const Part p = part_of_block(n, h, chunks);
    const int count = p.end - p.first;
    if (count <= 0) return;
    SMEM_ARRAY(float, scores, kChunk * kPitch);
    SMEM_ARRAY(float, slopes, kChunk * kPitch);
    SMEM_ARRAY(float4, a_tile, Block::kSizeA);
    SMEM_ARRAY(float4, b_tile, Block::kSizeB);
    const Operands of{reinterpret_cast<float*>(a_tile), reinterpret_cast<float*>(b_tile)};
    const Vectors<const T> q = head_part(qkv, p.at, 0, 3, n, h, e), k = head_part(qkv, p.at, 1, 3, n, h, e);
    const Vectors<const T> v = head_part(qkv, p.at, 2, 3, n, h, e), of_dy = head_part(dy, p.at, 0, 1, n, h, e);
    const size_t row = p.head * n + p.first;
    const float* earlier = before + size_t(blockIdx.x) * e * (e + 1);
    const float* later = behind + size_t(blockIdx.x) * e * (e + 1);
    const auto feature = [&](const Vectors<const T>& x, int i, int d) {
        return i < count && d < e ? phi(map, to_float(x.at[(p.first + i) * x.stride + d])) : 0.0f;
    };
    const auto value = [&](int j, int c) {
        return j >= count || c > e ? 0.0f : c == e ? 1.0f : to_float(v.at[(p.first + j) * v.stride + c]);
    };
    const auto gradient = [&](int i, int c) {
        if (i >= count || c > e) return 0.0f;
        return (c == e ? -delta[row + i] : to_float(of_dy.at[(p.first + i) * of_dy.stride + c])) / norm[row + i];
    };
    pairs(
        scores, of, e, [&](int i, int d) { return feature(q, i, d); }, [&](int j, int d) { return feature(k, j, d); });
    pairs(slopes, of, e + 1, gradient, value);
    const auto store = [&](int part, int i, int c, float sum) {
        const Vectors<T> to = head_part(dqkv, p.at, part, 3, n, h, e);
        if (i < count && c < e) to.at[(p.first + i) * to.stride + c] = from_float<T>(sum);
    };
    const auto slope = [&](const Vectors<const T>& x, int i, int d) {
        return i < count && d < e ? phi_slope(map, to_float(x.at[(p.first + i) * x.stride + d])) : 0.0f;
    };
#pragma unroll 1
    for (int column = 0; column < e; column += Block::kN) {
        REG(float, acc, [Block::kRows][Block::kColumns]);
        Block::clear(acc);
        add_product<true, true>(acc, of, column, e + 1, gradient,
                                [&](int d, int c) { return d < e ? earlier[size_t(d) * (e + 1) + c] : 0.0f; });
        add_product<true, false>(
            acc, of, column, count, [&](int i, int j) { return slopes[i * kPitch + j]; },
            [&](int d, int j) { return feature(k, j, d); });
        for_each(acc, column, [&](int i, int d, float sum) { store(0, i, d, sum * slope(q, i, d)); });
        Block::clear(acc);
        add_product<true, true>(acc, of, column, e + 1, value,
                                [&](int d, int c) { return d < e ? later[size_t(d) * (e + 1) + c] : 0.0f; });
        add_product<false, false>(
            acc, of, column, count, [&](int j, int i) { return slopes[i * kPitch + j]; },
            [&](int d, int i) { return feature(q, i, d); });
        for_each(acc, column, [&](int j, int d, float sum) { store(1, j, d, sum * slope(k, j, d)); });
        Block::clear(acc);
        add_product<true, false>(
            acc, of, column, e, [&](int j, int d) { return feature(k, j, d); },
            [&](int c, int d) { return c < e ? later[size_t(d) * (e + 1) + c] : 0.0f; });
        add_product<false, false>(
            acc, of, column, count, [&](int j, int i) { return scores[i * kPitch + j]; },
            [&](int c, int i) { return c < e ? gradient(i, c) : 0.0f; });
        for_each(acc, column, [&](int j, int c, float sum) { store(2, j, c, sum); });
    }
}
KERNEL_EXPORT(linear_attention_causal_backward);
