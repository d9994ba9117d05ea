// One tile or one block of every instruction that Hopper adds: see probes.cu. The probes of wgmma are beside.
#include "../common/ptx.cuh"

using namespace ptx;

__device__ void dump(const unsigned char* smem, void* out, int bytes) {
    for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x)
        static_cast<uint32_t*>(out)[i] = reinterpret_cast<const uint32_t*>(smem)[i];
}

// 32 threads. in: 4 words a lane. out: 8 + 16 + 32 + 16 + 32 rows of 8 halves: x1, x2, x4, x2.trans, x4.trans.
extern "C" __global__ void probe_stmatrix(const uint32_t* in, uint8_t* out) {
    SMEM_DYNAMIC(smem, 16);
    uint32_t base = smem_u32(smem), lane = threadIdx.x;
    uint32_t one[1] = {in[lane * 4]}, two[2] = {in[lane * 4], in[lane * 4 + 1]};
    uint32_t four[4] = {in[lane * 4], in[lane * 4 + 1], in[lane * 4 + 2], in[lane * 4 + 3]};
    stmatrix_x1(base + lane % 8 * 16, one);
    stmatrix_x2(base + 128 + lane % 16 * 16, two);
    stmatrix_x4(base + 384 + lane * 16, four);
    stmatrix_x2_trans(base + 896 + lane % 16 * 16, two);
    stmatrix_x4_trans(base + 1152 + lane * 16, four);
    __syncwarp();
    dump(smem, out, 1664);
}
KERNEL_EXPORT(probe_stmatrix);

// in: a[16][32], b[8][32] of e4m3. out: [16][8].
extern "C" __global__ void probe_mma_e4m3(const uint32_t* in, float* out) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const uint32_t *a = in, *b = in + 16 * 8;
    uint32_t f[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    float d[4] = {0, 0, 0, 0};
    mma_m16n8k32_e4m3(d, f, b[g * 8 + t], b[g * 8 + t + 4]);
    for (int i = 0; i < 4; i++) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
KERNEL_EXPORT(probe_mma_e4m3);

// 32 threads. in: 64 floats. out: a pair of e4m3 each.
extern "C" __global__ void probe_e4m3(const float* in, uint16_t* out) {
    out[threadIdx.x] = pack_e4m3(in[2 * threadIdx.x], in[2 * threadIdx.x + 1]);
}
KERNEL_EXPORT(probe_e4m3);

// 64 threads: warp 0 fills a ring of two stages, warp 1 empties it, seven rounds. out: 7 × 32 words.
extern "C" __global__ void probe_mbarrier(const uint32_t* in, uint32_t* out) {
    SMEM_ARRAY(uint64_t, bars, 4);
    SMEM_ARRAY(uint32_t, ring, 64);
    uint32_t full = smem_u32(bars), empty = full + 16;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < 2; s++) mbarrier_init(full + 8 * s, 32), mbarrier_init(empty + 8 * s, 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    for (int i = 0; i < 7; i++) {
        int s = i % 2, parity = i / 2 % 2;
        if (warp == 0) {
            mbarrier_wait(empty + 8 * s, parity ^ 1);
            ring[s * 32 + lane] = in[lane] + i;
            mbarrier_arrive(full + 8 * s);
        } else {
            while (!mbarrier_try_wait(full + 8 * s, parity)) {}
            out[i * 32 + lane] = ring[s * 32 + 31 - lane];
            __syncwarp();
            if (elect_one()) mbarrier_arrive(empty + 8 * s);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0)
        for (int s = 0; s < 4; s++) mbarrier_inval(full + 8 * s);
}
KERNEL_EXPORT(probe_mbarrier);

// 64 threads: warp 0 copies with cp.async and arrives when they land, warp 1 reads. in, out: 32 × 16 bytes.
extern "C" __global__ void probe_cp_async_arrive(const uint8_t* in, uint8_t* out) {
    SMEM_ARRAY(uint64_t, bar, 1);
    SMEM_ARRAY(uint4, tile, 32);
    int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        mbarrier_init(smem_u32(bar), 32);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        cp_async(smem_u32(tile + lane), in + lane * 16);
        cp_async_mbarrier_arrive(smem_u32(bar));
    } else {
        mbarrier_wait(smem_u32(bar), 0);
        reinterpret_cast<uint4*>(out)[lane] = tile[31 - lane];
    }
}
KERNEL_EXPORT(probe_cp_async_arrive);

// 32 threads. in: 256 floats. out: 256 floats doubled; sum: 256 floats to which the doubled ones are added.
extern "C" __global__ void probe_bulk(const float* in, float* out, float* sum) {
    SMEM_ARRAY(uint64_t, bar, 1);
    SMEM_DYNAMIC(smem, 128);
    uint32_t base = smem_u32(smem), b = smem_u32(bar);
    if (threadIdx.x == 0) {
        mbarrier_init(b, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(b, 1024);
        bulk_load(base, in, 1024, b);
    }
    __syncwarp();
    mbarrier_wait(b, 0);
    float* tile = reinterpret_cast<float*>(smem);
    for (int i = threadIdx.x; i < 256; i += 32) tile[i] *= 2.0f;
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x == 0) {
        bulk_store(out, base, 1024);
        bulk_commit();
        bulk_reduce_add_f32(sum, base, 1024);
        bulk_commit();
        bulk_wait_read<1>();
        bulk_wait<0>();
    }
}
KERNEL_EXPORT(probe_bulk);

// One box at coordinate c to shared memory, which is written out as it lies there.
template <int R> __device__ void box_load(const TensorMap* map, const int (&c)[R], int bytes, void* out) {
    SMEM_DYNAMIC(smem, 1024);
    SMEM_ARRAY(uint64_t, bar, 1);
    uint32_t b = smem_u32(bar);
    if (threadIdx.x == 0) {
        tma_prefetch_map(map);
        mbarrier_init(b, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(b, uint32_t(bytes));
        tma_load(smem_u32(smem), map, c, b);
    }
    __syncwarp();
    mbarrier_wait(b, 0);
    dump(smem, out, bytes);
}
extern "C" __global__ void probe_tma_1d(const __grid_constant__ TensorMap m, int c0, int bytes, void* out) {
    box_load(&m, {c0}, bytes, out);
}
KERNEL_EXPORT(probe_tma_1d);
extern "C" __global__ void probe_tma_2d(const __grid_constant__ TensorMap m, int c0, int c1, int bytes, void* out) {
    box_load(&m, {c0, c1}, bytes, out);
}
KERNEL_EXPORT(probe_tma_2d);
extern "C" __global__ void probe_tma_3d(const __grid_constant__ TensorMap m, int c0, int c1, int c2, int bytes,
                                        void* out) {
    box_load(&m, {c0, c1, c2}, bytes, out);
}
KERNEL_EXPORT(probe_tma_3d);
extern "C" __global__ void probe_tma_4d(const __grid_constant__ TensorMap m, int c0, int c1, int c2, int c3, int bytes,
                                        void* out) {
    box_load(&m, {c0, c1, c2, c3}, bytes, out);
}
KERNEL_EXPORT(probe_tma_4d);
extern "C" __global__ void probe_tma_5d(const __grid_constant__ TensorMap m, int c0, int c1, int c2, int c3, int c4,
                                        int bytes, void* out) {
    box_load(&m, {c0, c1, c2, c3, c4}, bytes, out);
}
KERNEL_EXPORT(probe_tma_5d);

// The bytes of `in`, as a box lies in shared memory, stored or added at coordinate c.
extern "C" __global__ void probe_tma_store(const __grid_constant__ TensorMap m, int c0, int c1, int bytes, int add,
                                           const uint32_t* in) {
    SMEM_DYNAMIC(smem, 1024);
    for (int i = threadIdx.x; i < bytes / 4; i += 32) reinterpret_cast<uint32_t*>(smem)[i] = in[i];
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x == 0) {
        if (add)
            tma_reduce_add(&m, {c0, c1}, smem_u32(smem));
        else
            tma_store(&m, {c0, c1}, smem_u32(smem));
        bulk_commit();
        bulk_wait<0>();
    }
}
KERNEL_EXPORT(probe_tma_store);

// A cluster of 4 blocks of 32. in: 1024 bytes, tensor map over them as [16][16] words. out: 512 words a block.
// Each block reads its neighbour's shared memory, gets words and bytes pushed into its own, and shares two loads.
extern "C" __global__ void probe_cluster(const __grid_constant__ TensorMap m, const uint32_t* in, uint32_t* out) {
    SMEM_DYNAMIC(smem, 1024);
    SMEM_ARRAY(uint64_t, bars, 4);
    uint32_t base = smem_u32(smem), bar = smem_u32(bars), rank = cluster_rank(), lane = threadIdx.x;
    uint32_t* mine = reinterpret_cast<uint32_t*>(smem);
    uint32_t* o = out + blockIdx.x * 512;
    uint32_t next = (rank + 1) % cluster_size(), before = (rank + cluster_size() - 1) % cluster_size();
    if (lane == 0) {
        for (int i = 0; i < 4; i++) mbarrier_init(bar + 8 * i, 1);
        fence_mbarrier_init();
    }
    mine[lane] = in[lane] + rank * 1000;
    fence_proxy_async();
    cluster_sync();
    if (lane == 0) {
        mbarrier_arrive_expect_tx(bar, 4 * 32);           // words from the block before
        mbarrier_arrive_expect_tx(bar + 8, 128);          // bytes from the block before
        mbarrier_arrive_expect_tx(bar + 16, 1024 + 256);  // two multicast loads, of block 0 and of block 3
    }
    cluster_sync();
    // 0: the next block's words by ordinary loads.
    o[lane] = __float_as_uint(ld_cluster_f32(mapa(base + lane * 4, next)));
    if (lane < 8) reinterpret_cast<uint4*>(o + 32)[lane] = ld_cluster_v4(mapa(base + lane * 16, before));
    // 64, 96: words and bytes pushed to the next block.
    st_async_u32(mapa(base + 256 + lane * 4, next), lane * 7 + rank, mapa(bar, next));
    if (lane == 0) bulk_copy_cluster(mapa(base + 512, next), base, 128, mapa(bar + 8, next));
    // 128, 384: loads that reach every block.
    if (rank == 0 && lane == 0) tma_load_multicast(base + 1024, &m, {0, 0}, bar + 16, uint16_t(0xf));
    if (rank == 3 && lane == 0) bulk_load_multicast(base + 2048, in, 256, bar + 16, uint16_t(0xf));
    mbarrier_wait(bar, 0);
    o[64 + lane] = mine[64 + lane];
    mbarrier_wait(bar + 8, 0);
    o[96 + lane] = mine[128 + lane];
    mbarrier_wait(bar + 16, 0);
    for (int i = 0; i < 8; i++) o[128 + i * 32 + lane] = mine[256 + i * 32 + lane];
    for (int i = 0; i < 2; i++) o[384 + i * 32 + lane] = mine[512 + i * 32 + lane];
    // 448: a remote store, announced by a remote arrival.
    st_cluster_f32(mapa(base + 3072 + lane * 4, before), float(lane + rank));
    __syncwarp();
    if (lane == 0) mbarrier_arrive_cluster(mapa(bar + 24, before));
    mbarrier_wait_cluster(bar + 24, 0);
    o[448 + lane] = __float_as_uint(ld_shared_f32(base + 3072 + lane * 4));
    o[480 + lane] = cluster_size() * 100 + rank;
    cluster_sync();
}
KERNEL_EXPORT(probe_cluster);

// 384 threads: one warpgroup gives registers to the other two; one lane of each warp is elected. out: 12 words.
extern "C" __global__ void __launch_bounds__(384, 1) probe_registers(uint32_t* out) {
    SMEM_ARRAY(uint32_t, elected, 12);
    int warp = threadIdx.x / 32;
    if (threadIdx.x < 12) elected[threadIdx.x] = 0;
    __syncthreads();
    if (warp < 4) {
        setmaxnreg_dec<40>();
        if (elect_one()) atomicAdd(&elected[warp], 1u);
    } else {
        setmaxnreg_inc<232>();
        if (elect_one()) atomicAdd(&elected[warp], 2u);
    }
    __syncthreads();
    if (threadIdx.x < 12) out[threadIdx.x] = elected[threadIdx.x];
}
KERNEL_EXPORT(probe_registers);

// Two grids of 4 blocks of 32, the second dependent on the first. 128 words each.
extern "C" __global__ void probe_grid_first(const uint32_t* in, uint32_t* middle) {
    uint32_t i = blockIdx.x * 32 + threadIdx.x;
    griddep_launch_dependents();
    middle[i] = in[i] * 3;
}
KERNEL_EXPORT(probe_grid_first);
extern "C" __global__ void probe_grid_second(const uint32_t* middle, uint32_t* out) {
    uint32_t i = blockIdx.x * 32 + threadIdx.x;
    griddep_wait();
    out[i] = middle[127 - i] + 1;
}
KERNEL_EXPORT(probe_grid_second);
