// mbarriers (8 bytes of shared memory that count arrivals and bytes), fences between the two proxies, registers of a
// warpgroup. Hopper only.
//
// A barrier of count c completes a phase when c arrivals came and as many bytes landed as were expected. `parity` is
// the parity of the phase waited for: 0 for the first. A barrier waits for parity 1 successfully before any phase.
#pragma once
#include "base.cuh"

#if PTX_SM90
namespace ptx {

PTX_FN void mbarrier_init(uint32_t bar, uint32_t count PTX_AT) {
    PTX_DO(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory"),
           emu::mbarrier_init(bar, count, at));
}
PTX_FN void mbarrier_inval(uint32_t bar PTX_AT) {
    PTX_DO(asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(bar) : "memory"), emu::mbarrier_inval(bar, at));
}
PTX_FN void mbarrier_arrive(uint32_t bar PTX_AT) {
    PTX_DO(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"),
           emu::mbarrier_arrive(bar, 1, 0, at));
}
PTX_FN void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes PTX_AT) {
    PTX_DO(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory"),
           emu::mbarrier_arrive(bar, 1, bytes, at));
}
PTX_FN void mbarrier_expect_tx(uint32_t bar, uint32_t bytes PTX_AT) {
    PTX_DO(asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes) : "memory"),
           emu::mbarrier_arrive(bar, 0, bytes, at));
}
// Arrives at a barrier of another block of the cluster; `bar` comes from mapa.
PTX_FN void mbarrier_arrive_cluster(uint32_t bar PTX_AT) {
    PTX_DO(asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory"),
           emu::mbarrier_arrive(bar, 1, 0, at));
}
// The same without making this thread's writes visible, which costs a fence: for memory that it only read, as a stage
// whose tiles wgmma has taken.
PTX_FN void mbarrier_arrive_cluster_relaxed(uint32_t bar PTX_AT) {
    PTX_DO(asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory"),
           emu::mbarrier_arrive(bar, 1, 0, at));
}
// Arrives when this thread's cp.async of so far have landed; the arrival counts towards the barrier's count.
PTX_FN void cp_async_mbarrier_arrive(uint32_t bar PTX_AT) {
    PTX_DO(asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory"),
           emu::cp_async_arrive(bar, at));
}
PTX_FN bool mbarrier_try_wait(uint32_t bar, uint32_t parity PTX_AT) {
    uint32_t done;
    PTX_DO(asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                        : "=r"(done) : "r"(bar), "r"(parity) : "memory"),
           done = emu::mbarrier_test(bar, parity, at));
    return done != 0;
}
PTX_FN void mbarrier_wait(uint32_t bar, uint32_t parity PTX_AT) {
    PTX_DO(while (!mbarrier_try_wait(bar, parity)) {}, emu::mbarrier_wait(bar, parity, at));
}
// As mbarrier_wait, where other blocks of the cluster arrive.
PTX_FN void mbarrier_wait_cluster(uint32_t bar, uint32_t parity PTX_AT) {
    PTX_DO(
        uint32_t done; do {
            asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
                         "selp.u32 %0, 1, 0, p;}"
                         : "=r"(done) : "r"(bar), "r"(parity) : "memory");
        } while (!done),
        emu::mbarrier_wait(bar, parity, at));
}
// After mbarrier_init, before other threads, blocks or the copy engine use the barriers; a block or cluster barrier
// must follow.
PTX_FN void fence_mbarrier_init(PTX_AT_ONLY) {
    PTX_DO(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"), emu::fence_proxy(at));
}
// Makes this thread's ordinary writes to shared memory visible to TMA stores and wgmma that follow.
PTX_FN void fence_proxy_async(PTX_AT_ONLY) {
    PTX_DO(asm volatile("fence.proxy.async.shared::cta;" ::: "memory"), emu::fence_proxy(at));
}
// The same for global memory that a later bulk copy reads.
PTX_FN void fence_proxy_async_global(PTX_AT_ONLY) {
    PTX_DO(asm volatile("fence.proxy.async.global;" ::: "memory"), emu::fence_proxy(at));
}

// Registers per thread of the calling warpgroup, a multiple of 8 from 24 to 256; every warp of it calls.
template <int Registers> PTX_FN void setmaxnreg_dec(PTX_AT_ONLY) {
    PTX_DO(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers)),
           emu::set_registers(Registers, false, at));
}
template <int Registers> PTX_FN void setmaxnreg_inc(PTX_AT_ONLY) {
    PTX_DO(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers)),
           emu::set_registers(Registers, true, at));
}
// True in one lane of a converged warp.
PTX_FN bool elect_one(PTX_AT_ONLY) {
    uint32_t r;
    PTX_DO(asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(r)),
           r = emu::elect(at));
    return r != 0;
}

}  // namespace ptx
#endif
