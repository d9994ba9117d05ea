// wgmma: 64 rows of a warpgroup times a tile of shared memory, asynchronously. Hopper only.
//
// D[64, N] += A[64, K]·B[K, N] with K = 16 (bf16, f16) or 32 (e4m3), N = 8, 16 … 256, f32 sums. Warp w of the
// warpgroup owns rows 16w to 16w+15; lane 4g + t holds, in d[4j + 2h + e], row g + 8h and column 8j + 2t + e. A in
// registers has the fragment of mma.m16n8k16. Tiles in shared memory are described by 64 bits (wgmma_desc).
//
// Order: wgmma_fence, any number of wgmma, wgmma_commit, wgmma_wait; registers in flight may not be touched.
#pragma once
#include "base.cuh"
#include "wgmma_operands.cuh"

// The descriptor of a tile. `swizzle` is 0, 32, 64 or 128 bytes.
// K-major: rows of `swizzle` bytes, 8 of them an atom; `stride` bytes from one atom of rows to the next; with no
// swizzle, `lead` bytes from one 16-byte column to the next.
// MN-major: atoms of `swizzle` bytes along M or N times 8 along K; `lead` bytes from one atom to the next along M or
// N, `stride` along K; with no swizzle `stride` is along M or N and `lead` along K.
PTX_BOTH uint64_t wgmma_desc(uint32_t address, uint32_t lead, uint32_t stride, int swizzle) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(lead >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           uint64_t(swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0) << 62;
}

#if PTX_SM90
namespace ptx {

// Before the first wgmma, and after registers that it uses were written.
PTX_FN void wgmma_fence(PTX_AT_ONLY) {
    PTX_DO(asm volatile("wgmma.fence.sync.aligned;" ::: "memory"), emu::wgmma_fence(at));
}
PTX_FN void wgmma_commit(PTX_AT_ONLY) {
    PTX_DO(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"), emu::wgmma_commit(at));
}
// Until at most `Pending` groups are in flight.
template <int Pending> PTX_FN void wgmma_wait(PTX_AT_ONLY) {
    PTX_DO(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory"), emu::wgmma_wait(Pending, at));
}
// After a wait: to the compiler, which does not know that wgmma is asynchronous, the registers are written here. Without
// it a use of them may move up across the wait.
template <int N> PTX_FN void wgmma_hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) PTX_DO(asm volatile("" : "+f"(d[i])::"memory"), (void)d[i]);
}

// The wait, not before `value` is computed, which is stored at `mark`, four bytes of this thread's own: arithmetic moves
// freely across a wait, and what was meant to run beside wgmma would come after it; a store to shared memory stays.
template <int Pending> PTX_FN void wgmma_wait_after(uint32_t mark, float value PTX_AT) {
    PTX_DO(asm volatile("st.shared.f32 [%0], %1; wgmma.wait_group.sync.aligned %2;" ::"r"(mark), "f"(value), "n"(Pending)
                        : "memory"),
           emu::st_shared(mark, value, at), emu::wgmma_wait(Pending, at));
}

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

// One instance per width; `T` is bf16, f16 or e4m3.
template <int N> struct Wgmma;

#define PTX_WGMMA_SS(n, shape, types, regs, outs, a, b, p, tail, ...)                                          \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #p ", 0; wgmma.mma_async.sync.aligned.m64n" #n shape types   \
                 " {" regs "}, %" #a ", %" #b ", p, 1, 1" tail ";}"                                             \
                 : outs : "l"(da), "l"(db), "r"(accumulate) __VA_ARGS__)
#define PTX_WGMMA_RS(n, shape, types, regs, outs, a0, a1, a2, a3, b, p, tail, ...)                             \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #p ", 0; wgmma.mma_async.sync.aligned.m64n" #n shape types   \
                 " {" regs "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1" tail ";}"            \
                 : outs : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(db), "r"(accumulate) __VA_ARGS__)

#define PTX_WGMMA(n, half, o0, o1, o2, o3, o4, o5, o6)                                                           \
    template <> struct Wgmma<n> {                                                                                \
        template <class T, int TransA, int TransB>                                                                \
        PTX_FN static void ss(float (&d)[half], uint64_t da, uint64_t db, int accumulate) {                       \
            if constexpr (same<T, bf16>)                                                                          \
                PTX_WGMMA_SS(n, "k16", ".f32.bf16.bf16", PTX_REGS_##half, PTX_OUTS_##half, o0, o1, o2,            \
                             ", %" #o3 ", %" #o4, , "n"(TransA), "n"(TransB));                                    \
            else if constexpr (same<T, f16>)                                                                      \
                PTX_WGMMA_SS(n, "k16", ".f32.f16.f16", PTX_REGS_##half, PTX_OUTS_##half, o0, o1, o2,              \
                             ", %" #o3 ", %" #o4, , "n"(TransA), "n"(TransB));                                    \
            else                                                                                                  \
                PTX_WGMMA_SS(n, "k32", ".f32.e4m3.e4m3", PTX_REGS_##half, PTX_OUTS_##half, o0, o1, o2, "");       \
        }                                                                                                         \
        template <class T, int TransB>                                                                            \
        PTX_FN static void rs(float (&d)[half], const uint32_t (&a)[4], uint64_t db, int accumulate) {            \
            if constexpr (same<T, bf16>)                                                                          \
                PTX_WGMMA_RS(n, "k16", ".f32.bf16.bf16", PTX_REGS_##half, PTX_OUTS_##half, o0, o1, o2, o3, o4,    \
                             o5, ", %" #o6, , "n"(TransB));                                                       \
            else if constexpr (same<T, f16>)                                                                      \
                PTX_WGMMA_RS(n, "k16", ".f32.f16.f16", PTX_REGS_##half, PTX_OUTS_##half, o0, o1, o2, o3, o4, o5,  \
                             ", %" #o6, , "n"(TransB));                                                           \
            else                                                                                                  \
                PTX_WGMMA_RS(n, "k32", ".f32.e4m3.e4m3", PTX_REGS_##half, PTX_OUTS_##half, o0, o1, o2, o3, o4,    \
                             o5, "");                                                                             \
        }                                                                                                         \
    };
PTX_EVERY_WGMMA(PTX_WGMMA)

#endif

// Both operands in shared memory. TransA, TransB: 1 where the tile is MN-major. accumulate 0 starts from zero.
template <class T, int N, int TransA = 0, int TransB = 0>
PTX_FN void wgmma_ss(float (&d)[N / 2], uint64_t da, uint64_t db, int accumulate PTX_AT) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma is 8 to 256 columns wide");
    static_assert(!same<T, e4m3> || (!TransA && !TransB), "8-bit operands are K-major");
    PTX_DO((Wgmma<N>::template ss<T, TransA, TransB>(d, da, db, accumulate)),
           emu::wgmma(emu::type_of<T>, N, d, nullptr, da, db, TransA, TransB, accumulate, at));
}
// A in registers.
template <class T, int N, int TransB = 0>
PTX_FN void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t db, int accumulate PTX_AT) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma is 8 to 256 columns wide");
    static_assert(!same<T, e4m3> || !TransB, "8-bit operands are K-major");
    PTX_DO((Wgmma<N>::template rs<T, TransB>(d, a, db, accumulate)),
           emu::wgmma(emu::type_of<T>, N, d, a, 0, db, 0, TransB, accumulate, at));
}

}  // namespace ptx
#endif
