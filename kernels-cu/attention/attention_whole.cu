// The backward pass of attention for up to 256 tokens, a head a block: with p = exp(s - lse), delta_i = dy_i·y_i and
// ds_ij = p_ij * (dy_i·v_j - delta_i):  dv_j = sum_i p_ij * dy_i;  dk_j = scale * sum_i ds_ij * q_i;
// dq_i = scale * sum_j ds_ij * k_j.
//
// qkv, dqkv: [B, N, 3, H, E], y, dy: [B, N, H, E], all T, 16-bit; lse [B, H, N] f32; sums in f32. One kernel, every
// product once, no atomics, no scratch: the same bits on every run.
//
// mma.sync of sm_80. Keys and values of the head lie in shared memory; queries and dy come 32 at a time, two stages, by
// cp.async. Each of 8 warps owns 32 keys: their dk and dv are 144 registers (72 columns) for the whole walk. Scores are
// computed transposed, a key a row, so that weights and slopes are, packed, left operands as they lie in registers; the
// slopes of a stage also go to shared memory, and after a barrier each warp sums dq of 16 queries and a quarter of the
// columns over all keys.
//
// Bound: 11,520 products of m16n8k16 at N = 256, E = 72 (23,040 clocks of A100's tensor cores; two kernels need 16,128),
// and fragments of 512 bytes: 63 a warp and stage beside 144 products, and 48 beside 32 to 48 for dq: 28,400 clocks of
// shared memory. Memory: 295 KB a head.
//
// Requires: N up to 256, E a multiple of 8 up to 80. Does not handle: masks. In f32 the kernels are empty.
#include "../common/ptx.cuh"
#include "../common/mma_attention_backward.cuh"

using namespace ptx;

// kAtOnce, kSlopesAtOnce: runs of 16 queries whose scores, and whose slopes, are under way together: as many as there are
// registers.
template <int kE_, int kAtOnce_, int kSlopesAtOnce_> struct Head {
    static constexpr int kE = kE_, kAtOnce = kAtOnce_, kSlopesAtOnce = kSlopesAtOnce_, kAll = 256, kQueries = 32, kWarps = 8;
    using Keys = MmaTile<kE, kWarps, 2, kAll>;
    using Stages = MmaTile<kE, kWarps, 2, kQueries>;
    // Bytes of a key's slopes: five chunks of 16, so that fragments meet all banks.
    static constexpr int kSlopeRow = 2 * kQueries + 16;
    // Regions of shared memory: keys, values, two stages of queries and dy, slopes, log-sums in base two, delta.
    static PTX_BOTH int bytes(int i) {
        return i < 2 ? Keys::kBytes : i < 6 ? Stages::kBytes : i == 6 ? kAll * kSlopeRow : kAll * 4;
    }
    static PTX_BOTH int region(int i) {
        SmemPlan plan;
        int at = 0;
        for (int j = 0; j <= i; j++) at = plan.take(bytes(j), 128);
        return at;
    }
    static constexpr int kRegions = 9;
};

// d[i][m] = 32 rows of shared memory · kRuns runs of 16 rows of a stage. `own`: the lane's address of the first.
template <class Stages, int kRuns>
PTX_FN void multiply_transposed(float (&d)[kRuns][2][2][4], uint32_t own, const Stage<Stages>& source, int run) {
    constexpr int kDown = 16 * Stages::kPitch * 2;
#pragma unroll
    for (int i = 0; i < kRuns; i++) clear_blocks(d[i]);
    // Not all at once: fragments that are read ahead would cost the registers of the sums.
#pragma unroll 2
    for (int s = 0; s < Stages::kSteps; s++) {
        uint32_t a[2][4], b[4];
        ldmatrix_x4(a[0], own + 32 * s), ldmatrix_x4(a[1], own + 32 * s + kDown);
#pragma unroll
        for (int i = 0; i < kRuns; i++) {
            ldmatrix_x4(b, source.rows(run + 16 * i, 16 * s));
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma_m16n8k16<T>(d[i][m][0], a[m], b[0], b[1]);
                mma_m16n8k16<T>(d[i][m][1], a[m], b[2], b[3]);
            }
        }
    }
    if constexpr (Stages::kRest) {
        uint32_t a[2][2], b[2];
        ldmatrix_x2(a[0], own + 32 * Stages::kSteps), ldmatrix_x2(a[1], own + 32 * Stages::kSteps + kDown);
#pragma unroll
        for (int i = 0; i < kRuns; i++) {
            ldmatrix_x2(b, source.rest(run + 16 * i, 16 * Stages::kSteps));
#pragma unroll
            for (int m = 0; m < 2; m++) mma_m16n8k8<T>(d[i][m][0], a[m], b[0]), mma_m16n8k8<T>(d[i][m][1], a[m], b[1]);
        }
    }
}

// dq of the 16 queries from `run` of a stage and of kBlocks blocks of 8 columns from `column` on, over all keys.
template <class H, int kBlocks>
PTX_FN void sum_queries(uint32_t keys, uint32_t slopes, int steps, int run, int column, Vectors<T> dq, int row, int n,
                        int e, float scale) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    REG(float, acc, [1][kBlocks][4]);
    clear_blocks(acc);
    const Stage<typename H::Keys> source{keys};
    const uint32_t left = slopes + (lane / 16 * 8 + lane % 8) * H::kSlopeRow + (run + lane / 8 % 2 * 8) * 2;
#pragma unroll 2
    for (int s = 0; s < steps; s++) {
        uint32_t a[4], b[4];
        ldmatrix_x4_trans(a, left + 16 * s * H::kSlopeRow);
#pragma unroll
        for (int j = 0; j + 1 < kBlocks; j += 2) {
            ldmatrix_x4_trans(b, source.columns(16 * s, column + 8 * j));
            mma_m16n8k16<T>(acc[0][j], a, b[0], b[1]);
            mma_m16n8k16<T>(acc[0][j + 1], a, b[2], b[3]);
        }
        if constexpr (kBlocks % 2 != 0) {
            uint32_t last[2];
            ldmatrix_x2_trans(last, source.columns(16 * s, column + 8 * (kBlocks - 1)));
            mma_m16n8k16<T>(acc[0][kBlocks - 1], a, last[0], last[1]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (row + run + 8 * r + g >= n) continue;
        T* to = dq.at + (row + run + 8 * r + g) * dq.stride + column + 2 * t;
#pragma unroll
        for (int j = 0; j < kBlocks; j++) {
            if (column + 8 * j < e)
                *reinterpret_cast<uint32_t*>(to + 8 * j) = pack<T>(acc[0][j][2 * r] * scale, acc[0][j][2 * r + 1] * scale);
        }
    }
}

// delta and the log-sums of all queries, four lanes a row. A query past the last weighs nothing.
template <class H>
PTX_FN void whole_statistics(uint32_t sums, uint32_t deltas, Vectors<const T> y, Vectors<const T> dy, const float* lse,
                             int n, int e) {
    const int t = threadIdx.x % 4;
#pragma unroll 1
    for (int row = threadIdx.x / 4; row < H::kAll; row += 8 * H::kWarps) {
        float delta = 0.0f;
        for (int column = 8 * t; column < e && row < n; column += 32) {
            float a[8], b[8];
            load8(a, y.at + row * y.stride + column);
            load8(b, dy.at + row * dy.stride + column);
#pragma unroll
            for (int i = 0; i < 8; i++) delta = fmaf(a[i], b[i], delta);
        }
        delta = quad_sum(delta);
        if (t == 0) st_shared_f32(deltas + 4 * row, delta);
        if (t == 0) st_shared_f32(sums + 4 * row, row < n ? lse[row] * kLog2E : INFINITY);
    }
}

// ds of 32 keys from `own` on and 16 queries, `run` of the stage from `first` on, out of dy·v; a copy goes to `slopes`.
template <class H>
PTX_FN void slopes_of(float (&ds)[2][2][4], const float (&p)[2][2][4], uint32_t slopes, uint32_t deltas, int first,
                      int run, int own) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int b = 0; b < 2; b++) {
        const int query = run + 8 * b + 2 * t;
        const uint2 falls = ld_shared_v2(deltas + (first + query) * 4);
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float &lo = ds[m][b][2 * r], &hi = ds[m][b][2 * r + 1];
                lo = p[m][b][2 * r] * (lo - __uint_as_float(falls.x));
                hi = p[m][b][2 * r + 1] * (hi - __uint_as_float(falls.y));
                st_shared_u32(slopes + (own + 16 * m + 8 * r + g) * H::kSlopeRow + query * 2, pack<T>(lo, hi));
            }
        }
    }
}

template <class H>
PTX_FN void whole_backward(const T* dy, const T* qkv, const T* y, const float* lse, T* dqkv, int n, int h, int e,
                           float scale) {
    if constexpr (sizeof(T) == 2) {
        using Stages = typename H::Stages;
        SMEM_DYNAMIC(smem, 128);
#pragma unroll
        for (int i = 0; i < H::kRegions; i++) smem_guard(smem, H::region(i) + H::bytes(i));
        const uint32_t base = smem_u32(smem), keys = base + H::region(0), values = base + H::region(1);
        const uint32_t slopes = base + H::region(6), sums = base + H::region(7), deltas = base + H::region(8);
        const Place at = {int(blockIdx.x) / h, int(blockIdx.x) % h, 0};
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, own = 32 * warp;
        const float c = scale * kLog2E;
        wait_for_previous();
        // From one stage to the other.
        constexpr uint32_t kTurn = H::region(4) - H::region(2);
        const auto fetch = [&](uint32_t turn, int first) {
            if (first < n) {
                fetch_rows<Stages>(base + H::region(2) + turn, head_part(qkv, at, 0, 3, n, h, e), first, n, e);
                fetch_rows<Stages>(base + H::region(3) + turn, head_part(dy, at, 0, 1, n, h, e), first, n, e);
            }
            cp_async_commit();
        };
        fetch_rows<typename H::Keys>(keys, head_part(qkv, at, 1, 3, n, h, e), 0, n, e);
        fetch_rows<typename H::Keys>(values, head_part(qkv, at, 2, 3, n, h, e), 0, n, e);
        fetch(0, 0);
        whole_statistics<H>(sums, deltas, head_part(y, at, 0, 1, n, h, e),
                            head_part(dy, at, 0, 1, n, h, e), lse + size_t(blockIdx.x) * n, n, e);
        REG(float, dk, [2][Stages::kColumns][4]);
        REG(float, dv, [2][Stages::kColumns][4]);
        clear_blocks(dk), clear_blocks(dv);
        uint32_t turn = 0;
#pragma unroll 1
        for (int first = 0; first < n; first += H::kQueries, turn = kTurn - turn) {
            // The stage is there, and nobody reads the other or the slopes any more.
            cp_async_wait<0>();
            __syncthreads();
            fetch(kTurn - turn, first + H::kQueries);
            const Stage<Stages> qs{base + H::region(2) + turn}, dys{base + H::region(3) + turn};
            // Warps whose keys are past the last have nothing to add; their slopes are not read.
            if (own < n) {
#pragma unroll 1
                for (int run = 0; run < H::kQueries; run += 16 * H::kAtOnce) {
                    REG(float, p, [H::kAtOnce][2][2][4]);
                    multiply_transposed(p, Stage<Stages>{keys}.columns(own, 0), qs, run);
#pragma unroll
                    for (int i = 0; i < H::kAtOnce; i++) {
#pragma unroll
                        for (int b = 0; b < 2; b++) {
                            const uint2 bases = ld_shared_v2(sums + (first + run + 16 * i + 8 * b + 2 * t) * 4);
#pragma unroll
                            for (int x = 0; x < 8; x++) {
                                float& one = p[i][x / 4][b][x % 4];
                                const bool there = own + 16 * (x / 4) + x % 4 / 2 * 8 + g < n;
                                one = there ? ex2(fmaf(one, c, -__uint_as_float(x % 2 ? bases.y : bases.x))) : 0.0f;
                            }
                        }
                        multiply_columns<Stages, T>(dv, p[i], dys, run + 16 * i);
                    }
#pragma unroll
                    for (int part = 0; part < H::kAtOnce; part += H::kSlopesAtOnce) {
                        REG(float, ds, [H::kSlopesAtOnce][2][2][4]);
                        multiply_transposed(ds, Stage<Stages>{values}.columns(own, 0), dys, run + 16 * part);
#pragma unroll
                        for (int i = 0; i < H::kSlopesAtOnce; i++) {
                            slopes_of<H>(ds[i], p[part + i], slopes, deltas, first, run + 16 * (part + i), own);
                            multiply_columns<Stages, T>(dk, ds[i], qs, run + 16 * (part + i));
                        }
                    }
                }
            }
            __syncthreads();
            const int steps = (n + 15) / 16, run = warp % 2 * 16, group = warp / 2;
            if (first + run >= n) continue;
            // Blocks of columns of four groups: 2 2 2 2, 3 2 2 2 or 3 3 2 2.
            constexpr int kLong = Stages::kColumns - 8;
            const int column = 16 * group + 8 * min(group, kLong);
            if (group < kLong)
                sum_queries<H, 3>(keys, slopes, steps, run, column, head_part(dqkv, at, 0, 3, n, h, e), first, n, e,
                                   scale);
            else
                sum_queries<H, 2>(keys, slopes, steps, run, column, head_part(dqkv, at, 0, 3, n, h, e), first, n, e,
                                   scale);
        }
        start_next();
        cp_async_wait<0>();
        __syncthreads();
        if (own >= n) return;
        const float one[2][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}}, factor[2][2] = {{scale, scale}, {scale, scale}};
        // Eight rows a warp, in the place of the keys.
        const uint32_t rows = keys + warp * (8 * Stages::kPitch * 2);
        put_blocks<Stages>(dv, one, rows, head_part(dqkv, at, 2, 3, n, h, e), own, n, n, e);
        put_blocks<Stages>(dk, factor, rows, head_part(dqkv, at, 1, 3, n, h, e), own, n, n, e);
    }
}

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_backward_whole_e64(const T* dy, const T* qkv, const T* y, const float* lse, T* dqkv, int n, int h, int e,
                                 float scale) {
    whole_backward<Head<64, 2, 2>>(dy, qkv, y, lse, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_whole_e64);

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_backward_whole_e72(const T* dy, const T* qkv, const T* y, const float* lse, T* dqkv, int n, int h, int e,
                                 float scale) {
    whole_backward<Head<72, 2, 1>>(dy, qkv, y, lse, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_whole_e72);

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_backward_whole_e80(const T* dy, const T* qkv, const T* y, const float* lse, T* dqkv, int n, int h, int e,
                                 float scale) {
    whole_backward<Head<80, 1, 1>>(dy, qkv, y, lse, dqkv, n, h, e, scale);
}
KERNEL_EXPORT(attention_backward_whole_e80);
