// The formulas of linear_attention.cu on the tensor cores, for heads of 32, 64 and 72 columns in bf16.
//
// qkv, dqkv: [B, N, 3, H, E], y, dy: [B, N, H, E], bf16; norm: [B, H, N], state, dstate: [B, H, E, E], total, dtotal:
// [B, H, E] f32; partials: [B·H, parts, E, E + 1] f32, the last column that of the totals. blockIdx.x: heads fastest, so
// that neighbours share the sectors at the ends of their 144-byte rows while those are in L2; then parts of the tokens.
//
// Blocks of four warps walk over their part of the tokens by tiles that cp.async brings in, each tensor read once.
// `state`: sums over tokens are Sᵀ = vᵀ·phi(k): two warps share the columns d, two pairs share the tokens of a tile, so
// that phi is taken once of each element, in the registers of the B operand; the pairs are added in shared memory, the
// parts by `linear_attention_add`. `forward`: 32 tokens a warp, phi(q) in the registers of the A operand. `backward_q`
// gives dq and the sums of phi(q)·dyᵀ/norm in one pass over q, dy and y; `backward_kv` gives dk and dv in one over k and v.
//
// phi(q) is rounded to bf16 before it enters the norms, too, so that the weights of a query still add up to one. What
// later sums cancel is split into two bf16: the state and its gradient against the totals, and elu's phi(k), because the
// state is as large as the root of N where values have no mean.
//
// Bound: memory, 4·N·H·E elements forward and 8 backward (of 2 bytes), 70 µs and 140 µs at B=2, N=16384, 16×72 at 4.3
// TB/s. A tile of 64 tokens takes 360 to 650 mma of 16×8×16, at most 60 % of the time that its bytes take.
//
// Requires: eps above zero. Does not handle: other widths, f32 (linear_attention.cu takes all).
#include "sums.cuh"

template <int E>
__device__ __forceinline__ void sum_states(const bf16* qkv, float* partials, int n, int h, int map, int parts) {
    using W = Width<E>;
    constexpr int kStages = 3, kTile = W::kSumTokens * W::kPitch;
    static_assert(kStages * 2 * kTile >= E * (E + 1) * 4, "the sums take the place of the tiles");
    SMEM_DYNAMIC(smem, 16);
    Regions regions = {smem, {}};
    unsigned char* ring = regions.take(kStages * 2 * kTile);
    const Part p = place_of_part<W::kSumTokens>(n, h, parts);
    const size_t stride = size_t(3) * h * E;
    const bf16* k = qkv + size_t(p.sample) * n * stride + (size_t(h) + p.head) * E;
    const uint32_t stages = smem_u32(ring);
    const int tiles = (p.end - p.first + W::kSumTokens - 1) / W::kSumTokens;
    const auto fetch = [&](int tile) {
        if (tile < tiles) {
            const uint32_t to = stages + tile % kStages * 2 * kTile;
            const int first = p.first + tile * W::kSumTokens;
            copy_rows<W::kSumTokens, E, 128>(to, k, stride, first, p.end);
            copy_rows<W::kSumTokens, E, 128>(to + kTile, k + size_t(h) * E, stride, first, p.end);
        }
        cp_async_commit();
    };
    Sums<E> sums;
    sums.clear();
    for (int tile = 0; tile < kStages - 1; tile++) fetch(tile);
    for (int tile = 0; tile < tiles; tile++) {
        cp_async_wait<kStages - 2>();
        __syncthreads();
        fetch(tile + kStages - 1);
        const uint32_t at = stages + tile % kStages * 2 * kTile;
#pragma unroll
        for (int step = 0; step < 2; step++) {
            const int row = warp_id() / 2 * 32 + step * 16;
            const int token = p.first + tile * W::kSumTokens + row + 2 * (lane_id() % 4);
            sums.template add<true>(at + row * W::kPitch, at + kTile + row * W::kPitch, map == 0, [&](uint32_t raw, int upper,
                                                                                                     float& total) {
                // Rows of zeros behind the last token have no feature.
                const float lo = token + 8 * upper < p.end ? phi(map, unpack_lo<bf16>(raw)) : 0.0f;
                const float hi = token + 8 * upper + 1 < p.end ? phi(map, unpack_hi<bf16>(raw)) : 0.0f;
                total += lo + hi;
                return split(lo, hi);
            });
        }
    }
    cp_async_wait<0>();
    sums.store(reinterpret_cast<float*>(ring), partials + p.partial(parts, part_of_block(h, parts)) * E * (E + 1));
}

template <int E>
__device__ __forceinline__ void read_states(const bf16* qkv, const float* state, const float* total, bf16* y, float* norm,
                                            int n, int h, int map, float eps, int parts) {
    using W = Width<E>;
    constexpr int kStages = 2, kTile = W::kRowTokens * W::kPitch;
    SMEM_DYNAMIC(smem, 16);
    Regions regions = {smem, {}};
    const uint32_t matrix = smem_u32(regions.take(2 * E * W::kPitch));
    float* totals = reinterpret_cast<float*>(regions.take(E * 4));
    const uint32_t stages = smem_u32(regions.take(kStages * kTile));
    const Part p = place_of_part<W::kRowTokens>(n, h, parts);
    const size_t stride = size_t(3) * h * E, rows = size_t(p.sample) * n;
    const bf16* q = qkv + rows * stride + size_t(p.head) * E;
    const int tiles = (p.end - p.first + W::kRowTokens - 1) / W::kRowTokens;
    const auto fetch = [&](int tile) {
        if (tile < tiles)
            copy_rows<W::kRowTokens, E, 128>(stages + tile % kStages * kTile, q, stride, p.first + tile * W::kRowTokens, p.end);
        cp_async_commit();
    };
    fetch(0);
    load_split<E>(matrix, state + p.index * E * E);
    for (int i = threadIdx.x; i < E; i += 128) totals[i] = total[p.index * E + i];
    for (int tile = 0; tile < tiles; tile++) {
        __syncthreads();
        fetch(tile + 1);
        cp_async_wait<1>();
        __syncthreads();
        const int first = p.first + tile * W::kRowTokens + warp_id() * 32;
        const uint32_t mine = stages + tile % kStages * kTile + warp_id() * 32 * W::kPitch;
        Operand<E> feature[2];
        float inverse[2][2];
#pragma unroll
        for (int m = 0; m < 2; m++) {
            float sum[2];
            feature[m].load(mine + m * 16 * W::kPitch);
            feature[m].to_features(map, totals, sum);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int token = first + m * 16 + r * 8 + lane_id() / 4;
                inverse[m][r] = 1.0f / (sum[r] + eps);
                if (lane_id() % 4 == 0 && token < p.end) norm[p.index * n + token] = sum[r] + eps;
            }
        }
        // The features are in registers: y takes the place of q.
        __syncwarp();
        product<E, true, W::kTiles>(feature, matrix, 0, W::kTiles, [&](int m, int column, const float (&acc)[4]) {
            const uint32_t at = mine + (m * 16 + lane_id() / 4) * W::kPitch + (column + 2 * (lane_id() % 4)) * 2;
            st_shared_u32(at, pack<bf16>(acc[0] * inverse[m][0], acc[1] * inverse[m][0]));
            st_shared_u32(at + 8 * W::kPitch, pack<bf16>(acc[2] * inverse[m][1], acc[3] * inverse[m][1]));
        });
        __syncwarp();
        store_rows<32, E, 32>(y + rows * h * E + size_t(p.head) * E, size_t(h) * E, mine, first, p.end, lane_id());
    }
    cp_async_wait<0>();
}

template <int E>
__device__ __forceinline__ void back_to_queries(const bf16* dy, const bf16* qkv, const bf16* y, const float* norm,
                                                const float* state, const float* total, bf16* dqkv, float* partials, int n,
                                                int h, int map, int parts) {
    using W = Width<E>;
    constexpr int kStages = 2, kTile = W::kSumTokens * W::kPitch;
    static_assert(kStages * 3 * kTile >= E * (E + 1) * 4, "the sums take the place of the tiles");
    SMEM_DYNAMIC(smem, 16);
    Regions regions = {smem, {}};
    const uint32_t matrix = smem_u32(regions.take(2 * E * W::kPitch));
    float* totals = reinterpret_cast<float*>(regions.take(E * 4));
    // What each token of the tile is divided by, then its dy·y.
    float* scales = reinterpret_cast<float*>(regions.take(2 * W::kSumTokens * 4));
    unsigned char* ring = regions.take(kStages * 3 * kTile);
    const uint32_t stages = smem_u32(ring);
    const Part p = place_of_part<W::kSumTokens>(n, h, parts);
    const size_t stride = size_t(3) * h * E, rows = size_t(p.sample) * n, plain = size_t(h) * E;
    const bf16* q = qkv + rows * stride + size_t(p.head) * E;
    const int tiles = (p.end - p.first + W::kSumTokens - 1) / W::kSumTokens;
    const auto fetch = [&](int tile) {
        if (tile < tiles) {
            const uint32_t to = stages + tile % kStages * 3 * kTile;
            const int first = p.first + tile * W::kSumTokens;
            copy_rows<W::kSumTokens, E, 128, 1>(to, q, stride, first, p.end);
            copy_rows<W::kSumTokens, E, 128, 1>(to + kTile, dy + rows * plain + size_t(p.head) * E, plain, first, p.end);
            copy_rows<W::kSumTokens, E, 128, 1>(to + 2 * kTile, y + rows * plain + size_t(p.head) * E, plain, first, p.end);
        }
        cp_async_commit();
    };
    fetch(0);
    load_split<E>(matrix, state + p.index * E * E);
    for (int i = threadIdx.x; i < E; i += 128) totals[i] = total[p.index * E + i];
    Sums<E> sums;
    sums.clear();
    const int group = lane_id() / 4, t = lane_id() % 4, row0 = warp_id() / 2 * 32;
    for (int tile = 0; tile < tiles; tile++) {
        __syncthreads();
        fetch(tile + 1);
        cp_async_wait<1>();
        __syncthreads();
        const int first = p.first + tile * W::kSumTokens;
        const uint32_t at = stages + tile % kStages * 3 * kTile, dys = at + kTile, ys = at + 2 * kTile;
        {
            // Two threads a token: dy·y, and what the norm divides by.
            const int token = int(threadIdx.x) / 2, part = int(threadIdx.x) % 2;
            float sum = 0.0f;
            for (int unit = part; unit < W::kTiles; unit += 2) {
                float a[8], b[8];
                unpack8<bf16>(a, ld_shared_v4(dys + token * W::kPitch + unit * 16));
                unpack8<bf16>(b, ld_shared_v4(ys + token * W::kPitch + unit * 16));
#pragma unroll
                for (int i = 0; i < 8; i++) sum = fmaf(a[i], b[i], sum);
            }
            sum += __shfl_xor_sync(kFullMask, sum, 1);
            if (part)
                scales[W::kSumTokens + token] = sum;
            else
                scales[token] = first + token < p.end ? 1.0f / norm[p.index * n + first + token] : 0.0f;
        }
        __syncthreads();
        // dq = (state·dy - delta·total)·phi'(q)/norm, in the place of y.
        const int half = warp_id() % 2;
        Operand<E> left[2];
        left[0].load(dys + row0 * W::kPitch), left[1].load(dys + (row0 + 16) * W::kPitch);
        product<E, false, W::kHalf>(left, matrix, half * W::kHalf, W::half_tiles(half), [&](int m, int column, const float (&acc)[4]) {
            const float2 sum = *reinterpret_cast<const float2*>(totals + column + 2 * t);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = row0 + m * 16 + r * 8 + group, cell = row * W::kPitch + (column + 2 * t) * 2;
                const uint32_t raw = ld_shared_u32(at + cell);
                const float inverse = scales[row], delta = scales[W::kSumTokens + row];
                const float lo = (acc[2 * r] - delta * sum.x) * inverse * phi_slope(map, unpack_lo<bf16>(raw));
                const float hi = (acc[2 * r + 1] - delta * sum.y) * inverse * phi_slope(map, unpack_hi<bf16>(raw));
                st_shared_u32(ys + cell, pack<bf16>(lo, hi));
            }
        });
#pragma unroll
        for (int step = 0; step < 2; step++) {
            const int row = row0 + step * 16;
            const float* scale = scales + row + 2 * t;
            sums.template add<false>(at + row * W::kPitch, dys + row * W::kPitch, false, [&](uint32_t raw, int upper,
                                                                                         float& fall) {
                const float* of = scale + 8 * upper;
                const uint32_t made =
                    pack<bf16>(phi(map, unpack_lo<bf16>(raw)) * of[0], phi(map, unpack_hi<bf16>(raw)) * of[1]);
                fall = fmaf(-of[W::kSumTokens], unpack_lo<bf16>(made), fall);
                fall = fmaf(-of[W::kSumTokens + 1], unpack_hi<bf16>(made), fall);
                return Split{made, 0};
            });
        }
        __syncthreads();
        store_rows<W::kSumTokens, E, 128, 1>(dqkv + rows * stride + size_t(p.head) * E, stride, ys, first, p.end, threadIdx.x);
    }
    cp_async_wait<0>();
    sums.store(reinterpret_cast<float*>(ring),
               partials + p.partial(parts, part_of_block(h, parts)) * E * (E + 1));
}

template <int E>
__device__ __forceinline__ void back_to_keys(const bf16* qkv, const float* dstate, const float* dtotal, bf16* dqkv, int n,
                                             int h, int map, int parts) {
    using W = Width<E>;
    constexpr int kStages = 2, kTile = W::kRowTokens * W::kPitch;
    SMEM_DYNAMIC(smem, 16);
    Regions regions = {smem, {}};
    const uint32_t matrix = smem_u32(regions.take(2 * E * W::kPitch));
    float* totals = reinterpret_cast<float*>(regions.take(E * 4));
    const uint32_t stages = smem_u32(regions.take(kStages * 2 * kTile));
    const Part p = place_of_part<W::kRowTokens>(n, h, parts);
    const size_t stride = size_t(3) * h * E, of_head = size_t(p.sample) * n * stride + (size_t(h) + p.head) * E;
    const size_t to_v = size_t(h) * E;
    const int tiles = (p.end - p.first + W::kRowTokens - 1) / W::kRowTokens;
    const auto fetch = [&](int tile) {
        if (tile < tiles) {
            const uint32_t to = stages + tile % kStages * 2 * kTile;
            const int first = p.first + tile * W::kRowTokens;
            copy_rows<W::kRowTokens, E, 128>(to, qkv + of_head, stride, first, p.end);
            copy_rows<W::kRowTokens, E, 128>(to + kTile, qkv + of_head + to_v, stride, first, p.end);
        }
        cp_async_commit();
    };
    fetch(0);
    load_split<E>(matrix, dstate + p.index * E * E);
    for (int i = threadIdx.x; i < E; i += 128) totals[i] = dtotal[p.index * E + i];
    const int group = lane_id() / 4, t = lane_id() % 4;
    for (int tile = 0; tile < tiles; tile++) {
        __syncthreads();
        fetch(tile + 1);
        cp_async_wait<1>();
        __syncthreads();
        const int first = p.first + tile * W::kRowTokens + warp_id() * 32;
        const uint32_t ks = stages + tile % kStages * 2 * kTile + warp_id() * 32 * W::kPitch, vs = ks + kTile;
        Operand<E> left[2];
        left[0].load(vs), left[1].load(vs + 16 * W::kPitch);
        // v is in registers: dk takes its place, and dv that of k.
        __syncwarp();
        product<E, false, W::kTiles>(left, matrix, 0, W::kTiles, [&](int m, int column, const float (&acc)[4]) {
            const float2 sum = *reinterpret_cast<const float2*>(totals + column + 2 * t);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int cell = (m * 16 + r * 8 + group) * W::kPitch + (column + 2 * t) * 2;
                const uint32_t raw = ld_shared_u32(ks + cell);
                st_shared_u32(vs + cell, pack<bf16>((acc[2 * r] + sum.x) * phi_slope(map, unpack_lo<bf16>(raw)),
                                                    (acc[2 * r + 1] + sum.y) * phi_slope(map, unpack_hi<bf16>(raw))));
            }
        });
#pragma unroll
        for (int m = 0; m < 2; m++) {
            float unused[2];
            left[m].load(ks + m * 16 * W::kPitch);
            left[m].to_features(map, totals, unused);
        }
        __syncwarp();
        product<E, true, W::kTiles>(left, matrix, 0, W::kTiles, [&](int m, int column, const float (&acc)[4]) {
            const uint32_t cell = ks + (m * 16 + group) * W::kPitch + (column + 2 * t) * 2;
            st_shared_u32(cell, pack<bf16>(acc[0], acc[1]));
            st_shared_u32(cell + 8 * W::kPitch, pack<bf16>(acc[2], acc[3]));
        });
        __syncwarp();
        store_rows<32, E, 32>(dqkv + of_head, stride, vs, first, p.end, lane_id());
        store_rows<32, E, 32>(dqkv + of_head + to_v, stride, ks, first, p.end, lane_id());
    }
    cp_async_wait<0>();
}

extern "C" __global__ void __launch_bounds__(128, 3)
    linear_attention_mma_state_32(const T* qkv, float* partials, int n, int h, int map, int parts) {
    if_bf16<T>([&](auto b) { sum_states<32>(cast(b, qkv), partials, n, h, map, parts); });
}
KERNEL_EXPORT(linear_attention_mma_state_32);

extern "C" __global__ void __launch_bounds__(128, 3)
    linear_attention_mma_state_64(const T* qkv, float* partials, int n, int h, int map, int parts) {
    if_bf16<T>([&](auto b) { sum_states<64>(cast(b, qkv), partials, n, h, map, parts); });
}
KERNEL_EXPORT(linear_attention_mma_state_64);

extern "C" __global__ void __launch_bounds__(128, 3)
    linear_attention_mma_state_72(const T* qkv, float* partials, int n, int h, int map, int parts) {
    if_bf16<T>([&](auto b) { sum_states<72>(cast(b, qkv), partials, n, h, map, parts); });
}
KERNEL_EXPORT(linear_attention_mma_state_72);

extern "C" __global__ void __launch_bounds__(128, 3)
    linear_attention_mma_forward_32(const T* qkv, const float* state, const float* total, T* y, float* norm, int n, int
                                    h, int map, float eps, int parts) {
    if_bf16<T>([&](auto b) { read_states<32>(cast(b, qkv), state, total, cast(b, y), norm, n, h, map, eps, parts); });
}
KERNEL_EXPORT(linear_attention_mma_forward_32);

extern "C" __global__ void __launch_bounds__(128, 3)
    linear_attention_mma_forward_64(const T* qkv, const float* state, const float* total, T* y, float* norm, int n, int
                                    h, int map, float eps, int parts) {
    if_bf16<T>([&](auto b) { read_states<64>(cast(b, qkv), state, total, cast(b, y), norm, n, h, map, eps, parts); });
}
KERNEL_EXPORT(linear_attention_mma_forward_64);

extern "C" __global__ void __launch_bounds__(128, 3)
    linear_attention_mma_forward_72(const T* qkv, const float* state, const float* total, T* y, float* norm, int n, int
                                    h, int map, float eps, int parts) {
    if_bf16<T>([&](auto b) { read_states<72>(cast(b, qkv), state, total, cast(b, y), norm, n, h, map, eps, parts); });
}
KERNEL_EXPORT(linear_attention_mma_forward_72);

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_attention_mma_backward_q_32(const T* dy, const T* qkv, const T* y, const float* norm, const float* state,
                                       const float* total, T* dqkv, float* partials, int n, int h, int map, int parts) {
    if_bf16<T>([&](auto b) {
        back_to_queries<32>(cast(b, dy), cast(b, qkv), cast(b, y), norm, state, total, cast(b, dqkv), partials, n, h,
                            map, parts);
    });
}
KERNEL_EXPORT(linear_attention_mma_backward_q_32);

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_attention_mma_backward_q_64(const T* dy, const T* qkv, const T* y, const float* norm, const float* state,
                                       const float* total, T* dqkv, float* partials, int n, int h, int map, int parts) {
    if_bf16<T>([&](auto b) {
        back_to_queries<64>(cast(b, dy), cast(b, qkv), cast(b, y), norm, state, total, cast(b, dqkv), partials, n, h,
                            map, parts);
    });
}
KERNEL_EXPORT(linear_attention_mma_backward_q_64);

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_attention_mma_backward_q_72(const T* dy, const T* qkv, const T* y, const float* norm, const float* state,
                                       const float* total, T* dqkv, float* partials, int n, int h, int map, int parts) {
    if_bf16<T>([&](auto b) {
        back_to_queries<72>(cast(b, dy), cast(b, qkv), cast(b, y), norm, state, total, cast(b, dqkv), partials, n, h,
                            map, parts);
    });
}
KERNEL_EXPORT(linear_attention_mma_backward_q_72);

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_attention_mma_backward_kv_32(const T* qkv, const float* dstate, const float* dtotal, T* dqkv, int n, int h,
                                        int map, int parts) {
    if_bf16<T>([&](auto b) { back_to_keys<32>(cast(b, qkv), dstate, dtotal, cast(b, dqkv), n, h, map, parts); });
}
KERNEL_EXPORT(linear_attention_mma_backward_kv_32);

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_attention_mma_backward_kv_64(const T* qkv, const float* dstate, const float* dtotal, T* dqkv, int n, int h,
                                        int map, int parts) {
    if_bf16<T>([&](auto b) { back_to_keys<64>(cast(b, qkv), dstate, dtotal, cast(b, dqkv), n, h, map, parts); });
}
KERNEL_EXPORT(linear_attention_mma_backward_kv_64);

extern "C" __global__ void __launch_bounds__(128, 2)
    linear_attention_mma_backward_kv_72(const T* qkv, const float* dstate, const float* dtotal, T* dqkv, int n, int h,
                                        int map, int parts) {
    if_bf16<T>([&](auto b) { back_to_keys<72>(cast(b, qkv), dstate, dtotal, cast(b, dqkv), n, h, map, parts); });
}
KERNEL_EXPORT(linear_attention_mma_backward_kv_72);
