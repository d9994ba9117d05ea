// Small kernels with planted faults. `fault` 0 is the correct kernel; every other number breaks one thing, and the test
// says which build must see it and how.
#include "../../kernels-cu/common/ptx.cuh"

using namespace ptx;

// ---- sums of rows: one block of 128 threads a row; out[row] = sum of x, twice ----

extern "C" __global__ void fault_rows(const float* x, float* out, int n, int fault) {
    SMEM_ARRAY(float, part, 4);
    SMEM_ARRAY(float, line, 128);
    int t = threadIdx.x, warp = t / 32, lane = t % 32;
    const float* row = x + size_t(blockIdx.x) * n;
    if (fault == 8 && t == 77) return;
    float total = 0;
    for (int pass = 0; pass < 2; pass++) {
        float s = 0;
        for (int i = t; i < n + (fault == 6 && blockIdx.x == gridDim.x - 1); i += 128) s += row[i];
        line[t] = s;
        if (fault != 10) __syncwarp();
        s = line[t ^ 1];  // the neighbour's, to the same sum
        __syncwarp();
        s = warp_sum(s);
        if (lane == 0) part[warp] = s;
        if (fault != 1) __syncthreads();
        total += part[0] + part[1] + part[2] + part[3];
        if (fault != 2) __syncthreads();
    }
    if (fault == 3 && t < 64) __syncthreads();
    if (fault == 4 && t % 2) total += __shfl_sync(kFullMask, total, 1);
    if (fault == 5 && t == 0) part[4] = 1;
    if (fault == 7 && t == 0) out[blockIdx.x + 1] = 5;
    if (fault == 9 && lane == 3) total += __shfl_sync(0x7, total, 0);
    if (fault == 11 && lane < 16) total += __shfl_sync(0xffff, total, 20);
    if (fault == 12) total += __uint_as_float(ld_shared_v4(smem_u32(line) + 4).x);
    if (fault == 13) {
        if (lane < 16)
            bar_sync(1, 128);
        else
            bar_sync(1, 128);
    }
    if (fault == 14) {
        if (warp < 1)
            bar_sync(1, 64);
        else
            bar_sync(1, 128);
    }
    if (t == 0) out[blockIdx.x] = total;
}
KERNEL_EXPORT(fault_rows);

// ---- a double-buffered sum by cp.async and mma: out[16][8] = sum over tiles of a[16][16]·b[8][16]ᵀ; count += 1 ----

struct Pipeline {
    int a[2], b[2], bytes;
    PTX_BOTH static Pipeline plan() {
        SmemPlan p;
        Pipeline r{};
        for (int i = 0; i < 2; i++) r.a[i] = p.take(512), r.b[i] = p.take(256);
        r.bytes = p.bytes();
        return r;
    }
    PTX_BOTH int stage(int i) const { return a[0] + i * (a[1] - a[0]); }
    PTX_BOTH int second(int i) const { return b[0] + i * (b[1] - b[0]); }
};

extern "C" __global__ void fault_pipeline(const uint16_t* a, const uint16_t* b, float* out, uint32_t* count, int tiles,
                                          int fault) {
    constexpr Pipeline plan = Pipeline::plan();
    SMEM_DYNAMIC(smem, 16);
    for (int i = 0; i < 2; i++) smem_guard(smem, plan.a[i] + 512), smem_guard(smem, plan.b[i] + 256);
    uint32_t base = smem_u32(smem);
    int t = threadIdx.x, lane = t % 32;
    // 64 threads: rows of 16 halves are two chunks of 16 bytes; warp 0 loads A, warp 1 loads B.
    auto load = [&](int tile, int stage) {
        if (t < 32)
            cp_async(base + plan.stage(stage) + lane * 16 + (fault == 6 && lane == 5 ? 8 : 0),
                     a + tile * 256 + lane * 8);
        else if (lane < 16 + (fault == 8))
            cp_async(base + plan.second(stage) + lane * 16, b + tile * 128 + lane % 16 * 8);
        cp_async_commit();
    };
    REG(float, d, [4]);
    if (fault != 5)
        for (int i = 0; i < 4; i++) d[i] = 0;
    load(0, 0);
    for (int i = 0; i < tiles; i++) {
        if (i + 1 < tiles)
            load(i + 1, fault == 3 ? i % 2 : (i + 1) % 2);
        else
            cp_async_commit();
        if (fault == 2)
            cp_async_wait<2>();
        else
            cp_async_wait<1>();
        if (fault != 1) __syncthreads();
        REG(uint32_t, fa, [4]);
        REG(uint32_t, fb, [2]);
        ldmatrix_x4(fa, base + plan.stage(i % 2) + lane % 16 * 32 + lane / 16 * 16);
        ldmatrix_x2(fb, base + plan.second(i % 2) + lane % 8 * 32 + lane / 8 % 2 * 16);
        if (t < 32) mma_m16n8k16<bf16>(d, fa, fb[0], fb[1]);
        __syncthreads();
    }
    if (fault == 2) cp_async_wait<0>();
    if (fault == 4) cp_async(base, a);
    int g = lane / 4, c = lane % 4 * 2;
    float* o = out + blockIdx.x * 128;
    if (t < 32)
        for (int i = 0; i < 4; i++) o[(g + i / 2 * 8) * 8 + c + i % 2] = d[i];
    if (t == 0) {
        if (fault == 7)
            *count += 1;
        else
            atomicAdd(count, 1u);
    }
}
KERNEL_EXPORT(fault_pipeline);

// ---- C[64][64] = A[64][K]·B[64][K]ᵀ: a producer warp with TMA, a warpgroup with wgmma, TMA store; 160 threads ----

extern "C" __global__ void __launch_bounds__(160)
    fault_gemm(const __grid_constant__ TensorMap ma, const __grid_constant__ TensorMap mb,
               const __grid_constant__ TensorMap mc, int steps, int fault) {
    constexpr uint32_t kTile = 8192, kStage = 2 * kTile;
    SMEM_DYNAMIC(smem, 1024);
    SMEM_ARRAY(uint64_t, bars, 4);
    uint32_t base = smem_u32(smem), full = smem_u32(bars), empty = full + 16;
    int t = threadIdx.x, warp = t / 32, lane = t % 32;
    if (t == 0) {
        for (int s = 0; s < 2; s++) {
            if (fault != 13) mbarrier_init(full + 8 * s, 1);
            mbarrier_init(empty + 8 * s, fault == 14 ? 2 : 4);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (warp == 4) {
        if (elect_one()) {
            for (int i = 0; i < steps; i++) {
                int s = i % 2, parity = i / 2 % 2;
                if (fault != 9) mbarrier_wait(empty + 8 * s, parity ^ (fault == 4 ? 0 : 1));
                mbarrier_arrive_expect_tx(full + 8 * s, fault == 2 ? kTile : fault == 3 ? kStage + 16 : kStage);
                tma_load(base + s * kStage + (fault == 16 ? 64 : 0), &ma, {i * 64, 0}, full + 8 * s);
                tma_load(base + s * kStage + kTile, &mb, {i * 64, 0}, full + 8 * s);
            }
        }
        if (fault == 19) setmaxnreg_inc<256>();
        return;
    }
    REG(float, d, [32]);
    for (int i = 0; i < 32; i++) d[i] = 0;
    for (int i = 0; i < steps; i++) {
        int s = i % 2;
        if (fault != 1) mbarrier_wait(full + 8 * s, i / 2 % 2);
        if (fault != 5) wgmma_fence();
        int swizzle = fault == 6 ? 64 : 128;
        for (int k = 0; k < 4; k++) {
            uint32_t at = base + s * kStage + k * 32 + (fault == 15 ? 128 : 0) + (fault == 17 ? 8 * kStage : 0);
            wgmma_ss<bf16, 64>(d, wgmma_desc(at, 16, 1024, swizzle), wgmma_desc(at + kTile, 16, 1024, swizzle), 1);
        }
        wgmma_commit();
        if (fault == 12 && i + 1 == steps) d[3] += 1;
        if (fault == 12 && i + 1 == steps) d[3] -= 1;
        if (fault != 11 || i + 1 < steps) wgmma_wait<0>();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(empty + 8 * s);
    }
    // The tile of C takes the place of stage 0, which nobody reads any more once all four warps are here.
    bar_sync(1, 128);
    int g = lane / 4, q = lane % 4 * 2;
    uint32_t* tile = reinterpret_cast<uint32_t*>(smem);
    for (int j = 0; j < 8; j++) {
        int row = warp * 16 + g;
        tile[(row * 64 + j * 8 + q) / 2] = pack<bf16>(d[j * 4], d[j * 4 + 1]);
        tile[((row + 8) * 64 + j * 8 + q) / 2] = pack<bf16>(d[j * 4 + 2], d[j * 4 + 3]);
    }
    if (fault != 7) fence_proxy_async();
    if (fault == 18)
        bar_sync(2, 160);
    else if (fault != 8)
        bar_sync(2, 128);
    if (t == 0) {
        tma_store(&mc, {0, 0}, base);
        bulk_commit();
        if (fault != 10) bulk_wait<0>();
    }
}
KERNEL_EXPORT(fault_gemm);

// ---- a cluster of 2: each block adds its neighbour's words to its own; 32 threads ----

extern "C" __global__ void fault_cluster(const float* x, float* out, int fault) {
    SMEM_ARRAY(float, mine, 32);
    SMEM_ARRAY(uint64_t, bar, 1);
    uint32_t base = smem_u32(mine), b = smem_u32(bar), rank = cluster_rank(), lane = threadIdx.x;
    if (lane == 0) {
        mbarrier_init(b, 1);
        fence_mbarrier_init();
    }
    cluster_sync();
    mine[lane] = x[blockIdx.x * 32 + lane];
    if (fault != 1) cluster_sync();
    float other = ld_cluster_f32(mapa(base + lane * 4, fault == 2 ? rank + 1 : rank ^ 1));
    out[blockIdx.x * 32 + lane] = mine[lane] + other;
    if (fault == 3) {
        if (lane == 0) mbarrier_arrive_cluster(mapa(b, 0));
        mbarrier_wait_cluster(b, 0);
    } else {
        if (lane == 0) mbarrier_arrive_cluster(mapa(b, rank ^ 1));
        mbarrier_wait_cluster(b, 0);
    }
    if (fault == 4 && rank == 0 && lane == 0) bulk_load_multicast(base, x, 128, b, uint16_t(5));
    if (fault == 5 && rank == 0) return;
    if (fault == 5) {
        for (int i = 0; i < 200; i++) __nanosleep(100);
        out[0] += ld_cluster_f32(mapa(base, 0));
        return;
    }
    cluster_sync();
}
KERNEL_EXPORT(fault_cluster);

// ---- two grids, the second dependent: out = middle + 1 ----

extern "C" __global__ void fault_first(const float* x, float* middle) {
    griddep_launch_dependents();
    middle[blockIdx.x * 32 + threadIdx.x] = x[blockIdx.x * 32 + threadIdx.x] * 2;
}
KERNEL_EXPORT(fault_first);
extern "C" __global__ void fault_second(const float* middle, float* out, int fault) {
    if (fault != 1) griddep_wait();
    out[blockIdx.x * 32 + threadIdx.x] = middle[blockIdx.x * 32 + threadIdx.x] + 1;
}
KERNEL_EXPORT(fault_second);
