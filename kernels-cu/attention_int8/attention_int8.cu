// y[b,i,h,e] = sum_j p[i,j] v[b,j,h,e] / sum_j p[i,j], p[i,j] = exp(s[i,j] - max_j s[i,j])
// s[i,j] = scale * sum_e q[b,i,h,e] * (k[b,j,h,e] - mean_j k[b,j,h,e]), with q and k - mean rounded to 8 bits
//
// qkv: [B, N, 3, H, E], y: [B, N, H, E], bf16. Scratch: sums [B, H, ceil(N/64), E], means [B, H, E] f32; q8, k8
// [B, H, N, row] bytes, a row 64 (E up to 64) or 128, zeros behind E; scales [2, B, H, ceil(N/64)] f32.
//
// Taking the mean key off every key moves all scores of a query alike and changes no weight, but takes away what the
// channels of k have in common, which would use up the 8 bits. A block of 64 tokens of a head has one scale for q and one
// for k, its largest magnitude over 127; that of q carries scale·log2(e). Kernels: sums and means of the keys, rounding,
// attention. In the last a block of 4 warps has 64 queries, 16 a warp; keys and values come by cp.async in tiles of 64,
// two in turn.
// Scores are exact in s32 (m16n8k32), the weights bf16 and their products with v bf16 (m16n8k16), sums f32, with a
// running maximum.
//
// Bound: for 64 keys a warp has 8·ceil(E/32) products of 8 bits at twice the rate of bf16 and 4·ceil(E/8) of bf16: for E
// = 72 of 24 / 2 + 36 = 48 units where bf16 alone has 40 + 36 = 76, beside the same exponentials.
//
// Requires: E a multiple of 8, at most 128. Does not handle: masks, a backward pass, the log of the sum.
#include "../common/ptx.cuh"
#include "../common/mma_tile.cuh"

using namespace ptx;

constexpr int kThreads = 128, kTokens = 64;

// sums[b,h,block,e] of the keys of 64 tokens; a thread a channel, the tokens in their order.
extern "C" __global__ void __launch_bounds__(kThreads)
    attention_int8_sums(const T* qkv, float* sums, int n, int h, int e) {
    const int blocks = (n + kTokens - 1) / kTokens, pair = blockIdx.x / blocks, first = blockIdx.x % blocks * kTokens;
    const size_t step = size_t(3) * h * e;
    const T* k = qkv + (size_t(pair / h) * n + first) * step + size_t(h + pair % h) * e;
    for (int channel = threadIdx.x; channel < e; channel += kThreads) {
        float sum = 0.0f;
#pragma unroll 8
        for (int token = 0; token < min(kTokens, n - first); token++) sum += to_float(k[token * step + channel]);
        sums[size_t(blockIdx.x) * e + channel] = sum;
    }
}
KERNEL_EXPORT(attention_int8_sums);

// means[b,h,e]; a block a head.
extern "C" __global__ void __launch_bounds__(kThreads)
    attention_int8_means(const float* sums, float* means, int n, int e) {
    const int blocks = (n + kTokens - 1) / kTokens;
    for (int channel = threadIdx.x; channel < e; channel += kThreads) {
        float sum = 0.0f;
#pragma unroll 8
        for (int block = 0; block < blocks; block++) sum += sums[(size_t(blockIdx.x) * blocks + block) * e + channel];
        means[size_t(blockIdx.x) * e + channel] = sum / float(n);
    }
}
KERNEL_EXPORT(attention_int8_means);

// The largest of the block's values, for every thread.
__device__ __forceinline__ float block_max(float v, float* partials) {
    v = warp_max(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = v;
    __syncthreads();
    return fmaxf(fmaxf(partials[0], partials[1]), fmaxf(partials[2], partials[3]));
}

// q8, k8 and their scales; a block 64 tokens of a head.
extern "C" __global__ void __launch_bounds__(kThreads)
    attention_int8_round(const T* qkv, const float* means, uint8_t* q8, uint8_t* k8, float* scales, int n, int h, int e,
                         int row, float scale) {
    SMEM_ARRAY(float, partials, 4);
    const int blocks = (n + kTokens - 1) / kTokens, pair = blockIdx.x / blocks, first = blockIdx.x % blocks * kTokens;
    const int tokens = min(kTokens, n - first), heads = gridDim.x / blocks;
    const size_t step = size_t(3) * h * e;
    const T* q = qkv + (size_t(pair / h) * n + first) * step + size_t(pair % h) * e;
    const T* k = q + size_t(h) * e;
    const float* mean = means + size_t(pair) * e;
    float most_q = 0.0f, most_k = 0.0f;
    for (int i = threadIdx.x; i < tokens * e; i += kThreads) {
        const size_t at = i / e * step + i % e;
        most_q = fmaxf(most_q, fabsf(to_float(q[at])));
        most_k = fmaxf(most_k, fabsf(to_float(k[at]) - mean[i % e]));
    }
    most_q = block_max(most_q, partials);
    most_k = block_max(most_k, partials);
    const float to_q = most_q > 0.0f ? 127.0f / most_q : 0.0f, to_k = most_k > 0.0f ? 127.0f / most_k : 0.0f;
    if (threadIdx.x == 0) {
        scales[blockIdx.x] = most_q / 127.0f * scale * 1.4426950408889634f;
        scales[size_t(heads) * blocks + blockIdx.x] = most_k / 127.0f;
    }
    const size_t to = (size_t(pair) * n + first) * row;
    for (int i = threadIdx.x; i < tokens * row; i += kThreads) {
        const int channel = i % row;
        const size_t at = i / row * step + channel;
        const bool inside = channel < e;
        q8[to + i] = uint8_t(int(rintf(inside ? to_float(q[at]) * to_q : 0.0f)));
        k8[to + i] = uint8_t(int(rintf(inside ? (to_float(k[at]) - mean[channel]) * to_k : 0.0f)));
    }
}
KERNEL_EXPORT(attention_int8_round);

// Widths up to which a head is: columns of v, bytes of a row of q8 and k8, bytes of a row of v in shared memory.
template <int kWidth> struct Int8Plan {
    static constexpr int kRow8 = kWidth <= 64 ? 64 : 128, kRowV = kWidth <= 64 ? 128 : 256;
    static constexpr int kDepth = (kWidth + 31) / 32, kBlocks = kWidth / 8;
    static constexpr int kKeyBytes = kTokens * kRow8, kStage = kKeyBytes + kTokens * kRowV;
    static_assert(kWidth % 16 == 0, "fragments of v come in pairs of 8 columns");
    SmemPlan plan;
    int queries = plan.take(kTokens * kRow8, 128);
    int ring = plan.take(2 * kStage, 128);
};

template <int kWidth, class E>
__device__ __forceinline__ void attend(const E* qkv, const uint8_t* q8, const uint8_t* k8, const float* scales, E* y,
                                       int n, int h, int e) {
    if constexpr (same<E, bf16>) {
        using Plan = Int8Plan<kWidth>;
        constexpr Plan plan;
        SMEM_DYNAMIC(smem, 128);
        smem_guard(smem, plan.queries + kTokens * Plan::kRow8);
        smem_guard(smem, plan.ring + 2 * Plan::kStage);
        const uint32_t queries = smem_u32(smem + plan.queries), ring = smem_u32(smem + plan.ring);
        const int blocks = (n + kTokens - 1) / kTokens, pair = blockIdx.x / blocks, first = blockIdx.x % blocks * kTokens;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const size_t step = size_t(3) * h * e, row0 = size_t(pair) * n;
        const E* values = qkv + size_t(pair / h) * n * step + size_t(2 * h + pair % h) * e;
        const float* key_scales = scales + size_t(gridDim.x) + size_t(pair) * blocks;
        const auto load = [&](int tile) {
            const uint32_t keys = ring + tile % 2 * Plan::kStage;
            const int start = tile * kTokens;
            tile_copy<kTokens, Plan::kRow8, kThreads>(keys, k8 + (row0 + start) * Plan::kRow8, Plan::kRow8, n - start, Plan::kRow8);
            tile_copy<kTokens, Plan::kRowV, kThreads>(keys + Plan::kKeyBytes, values + start * step, step, n - start, e);
        };
        tile_copy<kTokens, Plan::kRow8, kThreads>(queries, q8 + (row0 + first) * Plan::kRow8, Plan::kRow8, n - first, Plan::kRow8);
        load(0);
        cp_async_commit();
        const float query_scale = scales[blockIdx.x];
        REG(uint32_t, q, [Plan::kDepth][4]);
        REG(float, out, [Plan::kBlocks][4]);
#pragma unroll
        for (int j = 0; j < Plan::kBlocks; j++) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.0f;
        // Of rows lane/4 and lane/4 + 8 of the warp; a lane's own part of the sums until the end.
        float best[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
        for (int tile = 0; tile < blocks; tile++) {
            cp_async_wait<0>();
            __syncthreads();
            if (tile + 1 < blocks) load(tile + 1);
            cp_async_commit();
            // In units of two bytes, which is what ldmatrix moves.
            if (tile == 0) {
#pragma unroll
                for (int k = 0; k < Plan::kDepth; k++) fragment_a<Plan::kRow8>(q[k], queries, 16 * warp, 16 * k);
            }
            const uint32_t keys = ring + tile % 2 * Plan::kStage, v = keys + Plan::kKeyBytes;
            const float factor = query_scale * key_scales[tile];
            float s[8][4];
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                int32_t dots[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
#pragma unroll
                for (int k = 0; k < Plan::kDepth; k++) {
                    uint32_t b[4];
                    fragment_b<Plan::kRow8>(b, keys, 8 * j, 16 * k);
                    mma_m16n8k32_s8(dots[0], q[k], b[0], b[1]);
                    mma_m16n8k32_s8(dots[1], q[k], b[2], b[3]);
                }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int key = tile * kTokens + 8 * (j + i / 4) + lane % 4 * 2 + i % 2;
                    s[j + i / 4][i % 4] = key < n ? float(dots[i / 4][i % 4]) * factor : -INFINITY;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = best[half];
#pragma unroll
                for (int j = 0; j < 8; j++) most = fmaxf(most, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
                most = fmaxf(most, __shfl_xor_sync(kFullMask, most, 1));
                most = fmaxf(most, __shfl_xor_sync(kFullMask, most, 2));
                const float keep = ex2(best[half] - most);
                best[half] = most, total[half] *= keep;
#pragma unroll
                for (int j = 0; j < Plan::kBlocks; j++) out[j][2 * half] *= keep, out[j][2 * half + 1] *= keep;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    s[j][2 * half] = ex2(s[j][2 * half] - most), s[j][2 * half + 1] = ex2(s[j][2 * half + 1] - most);
                    total[half] += s[j][2 * half] + s[j][2 * half + 1];
                }
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const uint32_t p[4] = {pack<bf16>(s[2 * k][0], s[2 * k][1]), pack<bf16>(s[2 * k][2], s[2 * k][3]),
                                       pack<bf16>(s[2 * k + 1][0], s[2 * k + 1][1]),
                                       pack<bf16>(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
                for (int j = 0; j < Plan::kBlocks; j += 2) {
                    uint32_t b[4];
                    fragment_b_across<Plan::kRowV>(b, v, 8 * j, 16 * k);
                    mma_m16n8k16<bf16>(out[j], p, b[0], b[1]);
                    mma_m16n8k16<bf16>(out[j + 1], p, b[2], b[3]);
                }
            }
        }
        cp_async_wait<0>();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = total[half];
            sum += __shfl_xor_sync(kFullMask, sum, 1);
            sum += __shfl_xor_sync(kFullMask, sum, 2);
            const int row = first + 16 * warp + lane / 4 + 8 * half;
            E* to = y + ((size_t(pair / h) * n + row) * h + pair % h) * e;
#pragma unroll
            for (int j = 0; j < Plan::kBlocks; j++) {
                const int column = 8 * j + lane % 4 * 2;
                if (row < n && column < e)
                    st_global_u32(to + column, pack<bf16>(out[j][2 * half] / sum, out[j][2 * half + 1] / sum));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    attention_int8_64(const T* qkv, const uint8_t* q8, const uint8_t* k8, const float* scales, T* y, int n, int h, int e) {
    attend<64>(qkv, q8, k8, scales, y, n, h, e);
}
KERNEL_EXPORT(attention_int8_64);

extern "C" __global__ void __launch_bounds__(kThreads)
    attention_int8_80(const T* qkv, const uint8_t* q8, const uint8_t* k8, const float* scales, T* y, int n, int h, int e) {
    attend<80>(qkv, q8, k8, scales, y, n, h, e);
}
KERNEL_EXPORT(attention_int8_80);

extern "C" __global__ void __launch_bounds__(kThreads)
    attention_int8_128(const T* qkv, const uint8_t* q8, const uint8_t* k8, const float* scales, T* y, int n, int h, int e) {
    attend<128>(qkv, q8, k8, scales, y, n, h, e);
}
KERNEL_EXPORT(attention_int8_128);
