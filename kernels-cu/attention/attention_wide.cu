// s[b,h,i,j] = scale * sum_e q[b,i,h,e] * k[b,j,h,e];  lse[b,h,i] = log sum_j exp(s[b,h,i,j])
// y[b,i,h,e] = sum_j exp(s - lse) * v[b,j,h,e], for heads of up to 512 columns: the one head of an image autoencoder.
//
// qkv [B, N, 3, H, E], y [B, N, H, E], both T, 16-bit; lse [B, H, N] f32; sums in f32.
//
// mma.sync of sm_80. A head of 512 columns is too wide for a warp: the sums of 16 queries would be 256 registers. A block
// of 8 warps owns 64 queries. For the scores of kKeys keys a warp has 16 queries and half of the keys, over all columns;
// the weights go, rounded to T, through shared memory; for the sums a warp has all 64 queries and 64 columns, 128
// registers, so that every value is read once a block. Queries stay in shared memory, keys and values have one stage
// each: values come while scores are computed, the next keys while values are summed. Rows are an odd number of 16-byte
// chunks apart, so the eight rows of a fragment meet all banks.
//
// Bound: shared memory. Per 64 keys: 2,048 products of m16n8k16 (4,096 clocks of A100's tensor cores), fragments of
// queries (8 warps × 16 KB), keys (8 × 32 KB), weights (8 × 8 KB) and values (64 KB), 512 KB, 4,096 clocks; with 32 keys a
// stage queries are read twice as often, 640 KB. 64 keys take 208 KB of shared memory (Hopper), 32 take 139 KB.
//
// Requires: E a multiple of 8, up to 512; narrower heads run as zeros behind their columns. Does not handle: masks, the
// backward pass. In f32 the kernels are empty.
#include "../common/ptx.cuh"
#include "../common/mma_attention.cuh"

using namespace ptx;

template <int kKeys> struct Wide {
    static constexpr int kE = 512, kRows = 64, kWarps = 8;
    // Rows as queries lie, and as those of a stage do.
    using Queries = MmaTile<kE, kWarps, 1, kRows>;
    using Stages = MmaTile<kE, kWarps, 1, kKeys>;
    // Blocks of eight keys of a warp's scores; weights: bytes of a row of 64, which fragments meet all banks of, too.
    static constexpr int kBlocks = kKeys / 16, kWeightRow = 2 * (kKeys + 8);
    // Regions of shared memory: queries, keys, values, weights; of each row the largest score of both halves of the keys,
    // and the factor of what was summed before.
    static PTX_BOTH int bytes(int i) {
        return i == 0 ? Queries::kBytes : i < 3 ? Stages::kBytes : i == 3 ? kRows * kWeightRow : 3 * kRows * 4;
    }
    static PTX_BOTH int region(int i) {
        SmemPlan plan;
        int at = 0;
        for (int j = 0; j <= i; j++) at = plan.take(bytes(j), 128);
        return at;
    }
};

template <int kKeys>
PTX_FN void wide_forward(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    if constexpr (sizeof(T) == 2) {
        using W = Wide<kKeys>;
        using Stages = typename W::Stages;
        SMEM_DYNAMIC(smem, 128);
#pragma unroll
        for (int i = 0; i < 5; i++) smem_guard(smem, W::region(i) + W::bytes(i));
        const uint32_t base = smem_u32(smem), queries = base + W::region(0), keys = base + W::region(1);
        const uint32_t values = base + W::region(2), weights = base + W::region(3), tops = base + W::region(4);
        const uint32_t falls = tops + 2 * W::kRows * 4;
        const int tiles = (n + W::kRows - 1) / W::kRows, block = int(blockIdx.x) / h;
        const Place at = {block / tiles, int(blockIdx.x) % h, block % tiles * W::kRows};
        const Vectors<const T> q = head_part(qkv, at, 0, 3, n, h, e), k = head_part(qkv, at, 1, 3, n, h, e);
        const Vectors<const T> v = head_part(qkv, at, 2, 3, n, h, e);
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
        // Of the scores: the warp's queries and its half of the keys. Of the sums: its columns.
        const int rows = warp % 4 * 16, half = warp / 4, own_keys = half * (kKeys / 2), columns = warp * 64;
        // At least as much as keeps the -inf of a masked pair.
        const float c = fmaxf(fabsf(scale) * kLog2E, 1.17549435e-38f), sign = scale < 0.0f ? -1.0f : 1.0f;
        wait_for_previous();
        fetch_rows<typename W::Queries>(queries, q, at.row0, n, e);
        fetch_rows<Stages>(keys, k, 0, n, e);
        cp_async_commit();
        REG(float, acc, [4][8][4]);
        clear_blocks(acc);
        // Of rows g and g + 8 of the warp's queries: the largest score so far times c, and this thread's share of the sum.
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
        for (int key = 0; key < n; key += kKeys) {
            // The keys of this step are there; values and weights of the one before have been read.
            cp_async_wait<0>();
            __syncthreads();
            fetch_rows<Stages>(values, v, key, n, e);
            cp_async_commit();
            REG(float, s, [W::kBlocks][4]);
#pragma unroll
            for (int i = 0; i < W::kBlocks; i++) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
            const uint32_t left = Stage<typename W::Queries>{queries}.columns(rows, 0);
            const uint32_t right = Stage<Stages>{keys}.rows(own_keys, 0);
#pragma unroll 4
            for (int step = 0; step < W::kE / 16; step++) {
                uint32_t a[4], b[4];
                ldmatrix_x4(a, left + 32 * step);
#pragma unroll
                for (int i = 0; i < W::kBlocks; i += 2) {
                    ldmatrix_x4(b, right + 8 * i * (Stages::kPitch * 2) + 32 * step);
                    mma_m16n8k16<T>(s[i], a, b[0], b[1]);
                    mma_m16n8k16<T>(s[i + 1], a, b[2], b[3]);
                }
            }
            float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
            for (int i = 0; i < W::kBlocks; i++) {
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const bool there = key + own_keys + 8 * i + 2 * t + x % 2 < n;
                    s[i][x] = there ? s[i][x] * sign : -INFINITY;
                    most[x / 2] = fmaxf(most[x / 2], s[i][x]);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                most[r] = quad_max(most[r]);
                if (t == 0) st_shared_f32(tops + (half * W::kRows + rows + 8 * r + g) * 4, most[r]);
            }
            // All have read the keys, and both halves know the largest score of their rows.
            __syncthreads();
            if (key + kKeys < n) fetch_rows<Stages>(keys, k, key + kKeys, n, e);
            cp_async_commit();
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = rows + 8 * r + g;
                const float other = ld_shared_f32(tops + ((half ^ 1) * W::kRows + row) * 4);
                // A step has a key that counts, so this is no infinity.
                const float now = fmaxf(top[r], fmaxf(most[r], other) * c), fall = ex2(top[r] - now);
                top[r] = now;
                float added = 0.0f;
#pragma unroll
                for (int i = 0; i < W::kBlocks; i++) {
                    const float lo = ex2(fmaf(s[i][2 * r], c, -now)), hi = ex2(fmaf(s[i][2 * r + 1], c, -now));
                    added += lo + hi;
                    st_shared_u32(weights + row * W::kWeightRow + (own_keys + 8 * i + 2 * t) * 2, pack<T>(lo, hi));
                }
                sum[r] = fmaf(sum[r], fall, added);
                if (half == 0 && t == 0) st_shared_f32(falls + row * 4, fall);
            }
            // The values are there, the next keys may be on their way; weights and factors of all rows are there.
            cp_async_wait<1>();
            __syncthreads();
#pragma unroll
            for (int m = 0; m < 4; m++) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float fall = ld_shared_f32(falls + (16 * m + 8 * r + g) * 4);
#pragma unroll
                    for (int j = 0; j < 8; j++) acc[m][j][2 * r] *= fall, acc[m][j][2 * r + 1] *= fall;
                }
            }
#pragma unroll 1
            for (int step = 0; step < kKeys / 16; step++) {
                uint32_t a[4][4], b[4];
#pragma unroll
                for (int m = 0; m < 4; m++)
                    ldmatrix_x4(a[m], weights + (16 * m + lane % 16) * W::kWeightRow + (16 * step + lane / 16 * 8) * 2);
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    ldmatrix_x4_trans(b, Stage<Stages>{values}.columns(16 * step, columns + 8 * j));
#pragma unroll
                    for (int m = 0; m < 4; m++) {
                        mma_m16n8k16<T>(acc[m][j], a[m], b[0], b[1]);
                        mma_m16n8k16<T>(acc[m][j + 1], a[m], b[2], b[3]);
                    }
                }
            }
        }
        start_next();
        cp_async_wait<0>();
        // Both halves' sums of a row, in the place of the largest scores.
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] = quad_sum(sum[r]);
            if (t == 0) st_shared_f32(tops + (half * W::kRows + rows + 8 * r + g) * 4, sum[r]);
        }
        __syncthreads();
        if (half == 0 && t == 0) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = rows + 8 * r + g;
                const float total = sum[r] + ld_shared_f32(tops + (W::kRows + row) * 4);
                const size_t to = (size_t(at.sample) * h + at.head) * n + at.row0 + row;
                if (at.row0 + row < n) lse[to] = (top[r] + lg2(total)) * kLn2;
            }
        }
        const Vectors<T> out = head_part(y, at, 0, 1, n, h, e);
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = 16 * m + 8 * r + g;
                const float one = ld_shared_f32(tops + row * 4), two = ld_shared_f32(tops + (W::kRows + row) * 4);
                const float factor = 1.0f / (one + two);
                if (at.row0 + row >= n) continue;
                T* to = out.at + (at.row0 + row) * out.stride + columns + 2 * t;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    if (columns + 8 * j >= e) continue;
                    const uint32_t two_of = pack<T>(acc[m][j][2 * r] * factor, acc[m][j][2 * r + 1] * factor);
                    *reinterpret_cast<uint32_t*>(to + 8 * j) = two_of;
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_forward_wide_64x64(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    wide_forward<64>(qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_wide_64x64);

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_forward_wide_64x32(const T* qkv, T* y, float* lse, int n, int h, int e, float scale) {
    wide_forward<32>(qkv, y, lse, n, h, e, scale);
}
KERNEL_EXPORT(attention_forward_wide_64x32);
