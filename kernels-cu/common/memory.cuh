// Loads and stores of 2 to 16 bytes a thread, cp.async, and the accesses that order memory between threads.
//
// A plain `p[i]` is as good to the compiler; these wrappers choose the cache hint, and the emulator counts their
// sectors and bank conflicts and checks their alignment.
#pragma once
#include "base.cuh"

namespace ptx {

// ---- global memory ----

// Read-only for the whole kernel, and read once: not kept in L1.
PTX_FN uint4 ld_global_nc_v4(const void* p PTX_AT) {
    uint4 r;
    PTX_DO(asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                        : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p)),
           r = emu::ld_global<uint4>(p, at));
    return r;
}
PTX_FN uint2 ld_global_nc_v2(const void* p PTX_AT) {
    uint2 r;
    PTX_DO(asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p)),
           r = emu::ld_global<uint2>(p, at));
    return r;
}
PTX_FN uint32_t ld_global_nc_u32(const void* p PTX_AT) {
    uint32_t r;
    PTX_DO(asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(r) : "l"(p)), r = emu::ld_global<uint32_t>(p, at));
    return r;
}
PTX_FN uint16_t ld_global_nc_u16(const void* p PTX_AT) {
    uint16_t r;
    PTX_DO(asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(r) : "l"(p)), r = emu::ld_global<uint16_t>(p, at));
    return r;
}
PTX_FN void st_global_v4(void* p, uint4 v PTX_AT) {
    PTX_DO(asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                        ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"),
           emu::st_global(p, v, at));
}
PTX_FN void st_global_v2(void* p, uint2 v PTX_AT) {
    PTX_DO(asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory"),
           emu::st_global(p, v, at));
}
PTX_FN void st_global_u32(void* p, uint32_t v PTX_AT) {
    PTX_DO(asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"), emu::st_global(p, v, at));
}
PTX_FN void st_global_u16(void* p, uint16_t v PTX_AT) {
    PTX_DO(asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "h"(v) : "memory"), emu::st_global(p, v, at));
}
// Written once and not read again soon: first to leave L2.
PTX_FN void st_global_cs_v4(void* p, uint4 v PTX_AT) {
    PTX_DO(asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
                        ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"),
           emu::st_global(p, v, at));
}

// Flags between blocks. A loop over ld_acquire lets the emulator run other threads.
PTX_FN uint32_t ld_acquire(const uint32_t* p PTX_AT) {
    uint32_t r;
    PTX_DO(asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory"),
           r = emu::ld_acquire(p, at));
    return r;
}
PTX_FN void st_release(uint32_t* p, uint32_t v PTX_AT) {
    PTX_DO(asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"),
           emu::st_release(p, v, at));
}
PTX_FN void red_release_add(uint32_t* p, uint32_t v PTX_AT) {
    PTX_DO(asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"),
           emu::red_release_add(p, v, at));
}
// Not ordered with anything: sums only.
PTX_FN void red_add_f32(float* p, float v PTX_AT) {
    PTX_DO(asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory"), emu::red_add(p, v, at));
}

// ---- shared memory, by 32-bit address ----

PTX_FN uint4 ld_shared_v4(uint32_t a PTX_AT) {
    uint4 r;
    PTX_DO(asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                        : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(a) : "memory"),
           r = emu::ld_shared<uint4>(a, at));
    return r;
}
PTX_FN uint2 ld_shared_v2(uint32_t a PTX_AT) {
    uint2 r;
    PTX_DO(asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(a) : "memory"),
           r = emu::ld_shared<uint2>(a, at));
    return r;
}
PTX_FN uint32_t ld_shared_u32(uint32_t a PTX_AT) {
    uint32_t r;
    PTX_DO(asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(a) : "memory"),
           r = emu::ld_shared<uint32_t>(a, at));
    return r;
}
PTX_FN float ld_shared_f32(uint32_t a PTX_AT) {
    float r;
    PTX_DO(asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(a) : "memory"), r = emu::ld_shared<float>(a, at));
    return r;
}
PTX_FN void st_shared_v4(uint32_t a, uint4 v PTX_AT) {
    PTX_DO(asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                        ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"),
           emu::st_shared(a, v, at));
}
PTX_FN void st_shared_v2(uint32_t a, uint2 v PTX_AT) {
    PTX_DO(asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(a), "r"(v.x), "r"(v.y) : "memory"),
           emu::st_shared(a, v, at));
}
PTX_FN void st_shared_u32(uint32_t a, uint32_t v PTX_AT) {
    PTX_DO(asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(v) : "memory"), emu::st_shared(a, v, at));
}
PTX_FN void st_shared_f32(uint32_t a, float v PTX_AT) {
    PTX_DO(asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(v) : "memory"), emu::st_shared(a, v, at));
}

// ---- cp.async: global to shared memory without registers ----

// Copies `src_bytes` of Bytes and fills the rest with zeros; with 0 the source is not read.
template <int Bytes = 16> PTX_FN void cp_async(uint32_t dst, const void* src, int src_bytes = Bytes PTX_AT) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async moves 4, 8 or 16 bytes");
    if constexpr (Bytes == 16) {
        PTX_DO(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(src_bytes)
                            : "memory"),
               emu::cp_async(dst, src, Bytes, src_bytes, at));
    } else {
        PTX_DO(asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                            ::"r"(dst), "l"(src), "n"(Bytes), "r"(src_bytes) : "memory"),
               emu::cp_async(dst, src, Bytes, src_bytes, at));
    }
}
PTX_FN void cp_async_commit(PTX_AT_ONLY) {
    PTX_DO(asm volatile("cp.async.commit_group;" ::: "memory"), emu::cp_async_commit(at));
}
// Waits until at most `Pending` of this thread's groups are in flight. Other threads' copies need a barrier besides.
template <int Pending> PTX_FN void cp_async_wait(PTX_AT_ONLY) {
    PTX_DO(asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory"), emu::cp_async_wait(Pending, at));
}

}  // namespace ptx
