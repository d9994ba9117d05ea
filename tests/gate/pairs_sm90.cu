// Wrappers of kernels-cu/common beside those of CUTLASS, in kernels that differ in nothing else: their machine code must
// be the same. `ours_x` and `theirs_x` are compared by the test.
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>

#include "../../kernels-cu/common/ptx.cuh"

using Barrier = cutlass::arch::ClusterTransactionBarrier;

// Both kernels of a pair: the same parameters and text around one statement.
#define PAIR(name, parameters, before, ours, theirs, after)                  \
    extern "C" __global__ void ours_##name parameters { before; ours; after; } \
    extern "C" __global__ void theirs_##name parameters { before; theirs; after; }

// An array filled from memory, without commas, which a macro argument cannot have.
#define FILLED(T, name, n, from) T name[n]; for (int k = 0; k < n; k++) name[k] = (from)[k]

#define SHARED                          \
    SMEM_DYNAMIC(smem, 1024);           \
    uint32_t at = ptx::smem_u32(smem) + threadIdx.x * 16; \
    cute::uint128_t* tile = reinterpret_cast<cute::uint128_t*>(smem) + threadIdx.x; \
    uint64_t* bar = reinterpret_cast<uint64_t*>(smem); \
    uint32_t bar_at = ptx::smem_u32(smem); \
    (void)at, (void)tile, (void)bar, (void)bar_at

PAIR(ldmatrix, (uint32_t * o), SHARED; uint32_t r[4], ptx::ldmatrix_x4(r, at),
     cute::SM75_U32x4_LDSM_N::copy(*tile, r[0], r[1], r[2], r[3]),
     o[threadIdx.x] = r[0] + r[1] + r[2] + r[3])
PAIR(ldmatrix_trans, (uint32_t * o), SHARED; uint32_t r[4], ptx::ldmatrix_x4_trans(r, at),
     cute::SM75_U16x8_LDSM_T::copy(*tile, r[0], r[1], r[2], r[3]),
     o[threadIdx.x] = r[0] + r[1] + r[2] + r[3])
PAIR(stmatrix, (const uint32_t* i), SHARED; FILLED(uint32_t, r, 4, i), ptx::stmatrix_x4(at, r),
     cute::SM90_U32x4_STSM_N::copy(r[0], r[1], r[2], r[3], *tile), )
PAIR(mma_bf16, (float* o, const uint32_t* i),
     FILLED(float, d, 4, o);
     FILLED(uint32_t, a, 4, i); uint32_t b0 = i[4]; uint32_t b1 = i[5],
     ptx::mma_m16n8k16<ptx::bf16>(d, a, b0, b1),
     cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, d[0], d[1],
                                               d[2], d[3]),
     o[threadIdx.x] = d[0] + d[1] + d[2] + d[3])
PAIR(mma_bf16_k8, (float* o, const uint32_t* i),
     FILLED(float, d, 4, o); FILLED(uint32_t, a, 2, i); uint32_t b0 = i[4],
     ptx::mma_m16n8k8<ptx::bf16>(d, a, b0),
     cute::SM80_16x8x8_F32BF16BF16F32_TN::fma(d[0], d[1], d[2], d[3], a[0], a[1], b0, d[0], d[1], d[2], d[3]),
     o[threadIdx.x] = d[0] + d[1] + d[2] + d[3])
PAIR(mma_s8, (int32_t* o, const uint32_t* i),
     FILLED(int32_t, d, 4, o); FILLED(uint32_t, a, 4, i);
     uint32_t b0 = i[4]; uint32_t b1 = i[5], ptx::mma_m16n8k32_s8(d, a, b0, b1),
     cute::SM80_16x8x32_S32S8S8S32_TN::fma((uint32_t&)d[0], (uint32_t&)d[1], (uint32_t&)d[2], (uint32_t&)d[3], a[0],
                                           a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]),
     o[threadIdx.x] = d[0] + d[1] + d[2] + d[3])
PAIR(cp_async_groups, (const uint4* i), SHARED, ptx::cp_async(at, i); ptx::cp_async_commit(); ptx::cp_async_wait<1>(),
     asm volatile("cp.async.cg.shared.global [%0], [%1], 16, 16;" ::"r"(at), "l"(i) : "memory");
     cute::cp_async_fence(); cute::cp_async_wait<1>(), )

PAIR(mbarrier_init, (int n), SHARED, ptx::mbarrier_init(bar_at, n), Barrier::init(bar, n), )
PAIR(mbarrier_arrive, (int n), SHARED, ptx::mbarrier_arrive(bar_at), Barrier::arrive(bar), )
PAIR(mbarrier_expect, (int n), SHARED, ptx::mbarrier_arrive_expect_tx(bar_at, n), Barrier::arrive_and_expect_tx(bar, n), )
PAIR(fences, (int* o), SHARED, ptx::fence_mbarrier_init(); ptx::fence_proxy_async(),
     cutlass::arch::fence_barrier_init(); cutlass::arch::fence_view_async_shared(), *o = 1)
PAIR(named_barriers, (int n), , ptx::bar_sync(1, n); ptx::bar_arrive(2, n),
     asm volatile("bar.sync %0, %1;" ::"r"(1), "r"(n) : "memory");
     asm volatile("bar.arrive %0, %1;" ::"r"(2), "r"(n) : "memory"), )
PAIR(cluster_barrier, (int* o), , ptx::cluster_arrive(); ptx::cluster_wait(), cute::cluster_arrive(); cute::cluster_wait(), *o = 1)
PAIR(cluster_rank, (uint32_t * o), , *o = ptx::cluster_rank(), *o = cute::block_rank_in_cluster(), )
PAIR(mapa, (uint32_t * o, uint32_t r), SHARED, *o = ptx::mapa(at, r), *o = cute::set_block_rank(at, r), )
PAIR(grid_wait, (int* o), , ptx::griddep_wait(); ptx::griddep_launch_dependents(),
     asm volatile("griddepcontrol.wait;" ::: "memory"); asm volatile("griddepcontrol.launch_dependents;"), *o = 1)

PAIR(tma_load, (const __grid_constant__ ptx::TensorMap m, int x, int y), SHARED,
     ptx::tma_load(bar_at + 1024, &m, {x, y}, bar_at),
     cute::SM90_TMA_LOAD_2D::copy(&m, bar, 0x1000000000000000ull, smem + 1024, x, y), )
PAIR(tma_load_3d, (const __grid_constant__ ptx::TensorMap m, int x, int y), SHARED,
     ptx::tma_load(bar_at + 1024, &m, {x, y, 3}, bar_at),
     cute::SM90_TMA_LOAD_3D::copy(&m, bar, 0x1000000000000000ull, smem + 1024, x, y, 3), )
PAIR(tma_multicast, (const __grid_constant__ ptx::TensorMap m, int x, int y), SHARED,
     ptx::tma_load_multicast(bar_at + 1024, &m, {x, y}, bar_at, uint16_t(3)),
     cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&m, bar, uint16_t(3), 0x1000000000000000ull, smem + 1024, x, y), )
PAIR(tma_store, (const __grid_constant__ ptx::TensorMap m, int x, int y), SHARED,
     ptx::tma_store(&m, {x, y}, bar_at); ptx::bulk_commit(); ptx::bulk_wait_read<0>(),
     cute::SM90_TMA_STORE_2D::copy(&m, smem, x, y); cute::tma_store_arrive(); cute::tma_store_wait<0>(), )
PAIR(tma_reduce, (const __grid_constant__ ptx::TensorMap m, int x, int y), SHARED,
     ptx::tma_reduce_add(&m, {x, y}, bar_at), cute::SM90_TMA_REDUCE_ADD_2D::copy(&m, smem, x, y), )
PAIR(bulk_load, (const float* i), SHARED, ptx::bulk_load(bar_at + 1024, i, 512, bar_at),
     cute::SM90_BULK_COPY_G2S::copy(i, bar, smem + 1024, 512), )
PAIR(bulk_store, (float* o), SHARED, ptx::bulk_store(o, bar_at, 512), cute::SM90_BULK_COPY_S2G::copy(smem, o, 512), )

#define ACCUMULATORS float d[32]; for (int k = 0; k < 32; k++) d[k] = o[k * 128 + threadIdx.x]
#define STORED for (int k = 0; k < 32; k++) o[k * 128 + threadIdx.x] = d[k]
#define ALL_32                                                                                                       \
    d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7], d[8], d[9], d[10], d[11], d[12], d[13], d[14], d[15], d[16],     \
        d[17], d[18], d[19], d[20], d[21], d[22], d[23], d[24], d[25], d[26], d[27], d[28], d[29], d[30], d[31]
using Ss = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>;
using Rs = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;
using F8 = cute::SM90::GMMA::MMA_64x64x32_F32E4M3E4M3_SS_TN<>;
PAIR(wgmma_ss, (float* o, uint64_t x, uint64_t y), ACCUMULATORS; ptx::wgmma_fence(),
     (ptx::wgmma_ss<ptx::bf16, 64, 0, 1>(d, x, y, 1)), Ss::fma(x, y, ALL_32), ptx::wgmma_commit(); ptx::wgmma_wait<0>(); STORED)
PAIR(wgmma_rs, (float* o, const uint32_t* i, uint64_t y), ACCUMULATORS;
     FILLED(uint32_t, a, 4, i + 4 * threadIdx.x); ptx::wgmma_fence(),
     (ptx::wgmma_rs<ptx::bf16, 64>(d, a, y, 1)), Rs::fma(a[0], a[1], a[2], a[3], y, ALL_32),
     ptx::wgmma_commit(); ptx::wgmma_wait<0>(); STORED)
PAIR(wgmma_e4m3, (float* o, uint64_t x, uint64_t y), ACCUMULATORS; ptx::wgmma_fence(),
     (ptx::wgmma_ss<ptx::e4m3, 64>(d, x, y, 1)), F8::fma(x, y, ALL_32), ptx::wgmma_commit(); ptx::wgmma_wait<0>(); STORED)
PAIR(wgmma_order, (float* o, uint64_t x, uint64_t y), ACCUMULATORS,
     ptx::wgmma_fence(); Ss::fma(x, y, ALL_32); ptx::wgmma_commit(); ptx::wgmma_wait<0>(),
     cute::warpgroup_arrive(); Ss::fma(x, y, ALL_32); cute::warpgroup_commit_batch(); cute::warpgroup_wait<0>(), STORED)
