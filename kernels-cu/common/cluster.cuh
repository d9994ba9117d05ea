// Blocks of a cluster, their shared memory, and dependent launches. Hopper only.
#pragma once
#include "base.cuh"

#if PTX_SM90
namespace ptx {

PTX_FN uint32_t cluster_rank() {
    uint32_t r;
    PTX_DO(asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)), r = emu::cur->cluster_rank);
    return r;
}
PTX_FN uint32_t cluster_size() {
    uint32_t r;
    PTX_DO(asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)), r = emu::cur->cluster_size);
    return r;
}
// The barrier of all threads of the cluster, in two halves: releases what was written, acquires what the others wrote.
PTX_FN void cluster_arrive(PTX_AT_ONLY) {
    PTX_DO(asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"), emu::cluster_arrive(at));
}
PTX_FN void cluster_wait(PTX_AT_ONLY) {
    PTX_DO(asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"), emu::cluster_wait(at));
}
PTX_FN void cluster_sync(PTX_AT_ONLY) {
    PTX_DO(cluster_arrive(); cluster_wait(), emu::cluster_arrive(at); emu::cluster_wait(at));
}
// The address, for every block of the cluster, that `a` has in block `rank`.
PTX_FN uint32_t mapa(uint32_t a, uint32_t rank PTX_AT) {
    uint32_t r;
    PTX_DO(asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(rank)), r = emu::mapa(a, rank, at));
    return r;
}
PTX_FN uint4 ld_cluster_v4(uint32_t a PTX_AT) {
    uint4 r;
    PTX_DO(asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                        : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(a) : "memory"),
           r = emu::ld_shared<uint4>(a, at));
    return r;
}
PTX_FN float ld_cluster_f32(uint32_t a PTX_AT) {
    float r;
    PTX_DO(asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(r) : "r"(a) : "memory"),
           r = emu::ld_shared<float>(a, at));
    return r;
}
PTX_FN void st_cluster_f32(uint32_t a, float v PTX_AT) {
    PTX_DO(asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(a), "f"(v) : "memory"), emu::st_shared(a, v, at));
}
// A store into another block that counts 4 bytes at that block's mbarrier when it lands.
PTX_FN void st_async_u32(uint32_t a, uint32_t v, uint32_t bar PTX_AT) {
    PTX_DO(asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
                        ::"r"(a), "r"(v), "r"(bar) : "memory"),
           emu::st_async(a, v, bar, at));
}

// Programmatic dependent launch: this grid's results may be waited for from here on by the next one.
PTX_FN void griddep_launch_dependents(PTX_AT_ONLY) {
    PTX_DO(asm volatile("griddepcontrol.launch_dependents;" ::: "memory"), emu::grid_launch_dependents(at));
}
// Waits until the grid before has ended and its writes are visible. Without it they may be missing.
PTX_FN void griddep_wait(PTX_AT_ONLY) {
    PTX_DO(asm volatile("griddepcontrol.wait;" ::: "memory"), emu::grid_wait(at));
}

}  // namespace ptx
#endif

namespace ptx {

// For kernels of every architecture that are launched as dependent: from here on the results of the launch before may be
// read, and its memory written. Nothing where the architecture has no dependent launches.
PTX_FN void wait_for_previous(PTX_AT_ONLY) {
#if PTX_SM90
    griddep_wait(PTX_FROM_ONLY);
#endif
}
// Lets a dependent launch start; what this block writes later is seen by it all the same, after its wait.
PTX_FN void start_next(PTX_AT_ONLY) {
#if PTX_SM90
    griddep_launch_dependents(PTX_FROM_ONLY);
#endif
}

}  // namespace ptx
