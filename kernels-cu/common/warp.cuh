// Matrices that a warp holds: ldmatrix, stmatrix, movmatrix, and mma.sync; barriers of part of a block.
//
// Fragments, for lane = 4·g + t: A of m16n8k16 holds rows g and g+8 and columns 2t, 2t+1, 2t+8, 2t+9; B holds rows 2t,
// 2t+1, 2t+8, 2t+9 of column g; C and D hold rows g and g+8 of columns 2t, 2t+1.
#pragma once
#include "base.cuh"

namespace ptx {

// ---- 8x8 tiles of 16-bit elements; lane i gives the address of row i%8 of tile i/8 ----

PTX_FN void ldmatrix_x1(uint32_t (&r)[1], uint32_t row PTX_AT) {
    PTX_DO(asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory"),
           emu::ldmatrix(1, false, r, row, at));
}
PTX_FN void ldmatrix_x2(uint32_t (&r)[2], uint32_t row PTX_AT) {
    PTX_DO(asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                        : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory"),
           emu::ldmatrix(2, false, r, row, at));
}
PTX_FN void ldmatrix_x4(uint32_t (&r)[4], uint32_t row PTX_AT) {
    PTX_DO(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory"),
           emu::ldmatrix(4, false, r, row, at));
}
PTX_FN void ldmatrix_x1_trans(uint32_t (&r)[1], uint32_t row PTX_AT) {
    PTX_DO(asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                        : "=r"(r[0]) : "r"(row) : "memory"),
           emu::ldmatrix(1, true, r, row, at));
}
PTX_FN void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row PTX_AT) {
    PTX_DO(asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                        : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory"),
           emu::ldmatrix(2, true, r, row, at));
}
PTX_FN void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row PTX_AT) {
    PTX_DO(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory"),
           emu::ldmatrix(4, true, r, row, at));
}
// The transpose of a tile held by the warp.
PTX_FN uint32_t movmatrix_trans(uint32_t v PTX_AT) {
    uint32_t r;
    PTX_DO(asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v)),
           r = emu::movmatrix(v, at));
    return r;
}
#if PTX_SM90
PTX_FN void stmatrix_x1(uint32_t row, const uint32_t (&r)[1] PTX_AT) {
    PTX_DO(asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(row), "r"(r[0]) : "memory"),
           emu::stmatrix(1, false, r, row, at));
}
PTX_FN void stmatrix_x2(uint32_t row, const uint32_t (&r)[2] PTX_AT) {
    PTX_DO(asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};"
                        ::"r"(row), "r"(r[0]), "r"(r[1]) : "memory"),
           emu::stmatrix(2, false, r, row, at));
}
PTX_FN void stmatrix_x4(uint32_t row, const uint32_t (&r)[4] PTX_AT) {
    PTX_DO(asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                        ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"),
           emu::stmatrix(4, false, r, row, at));
}
PTX_FN void stmatrix_x2_trans(uint32_t row, const uint32_t (&r)[2] PTX_AT) {
    PTX_DO(asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
                        ::"r"(row), "r"(r[0]), "r"(r[1]) : "memory"),
           emu::stmatrix(2, true, r, row, at));
}
PTX_FN void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4] PTX_AT) {
    PTX_DO(asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                        ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"),
           emu::stmatrix(4, true, r, row, at));
}
#endif

// ---- d += a·b ----

#define PTX_MMA_16(shape_types)                                                                                  \
    asm volatile("mma.sync.aligned." shape_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#define PTX_MMA_8(shape_types)                                                                         \
    asm volatile("mma.sync.aligned." shape_types " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(b0))

template <class T> PTX_FN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 PTX_AT) {
    static_assert(same<T, bf16> || same<T, f16>, "m16n8k16 takes bf16 or f16");
    if constexpr (same<T, bf16>)
        PTX_DO(PTX_MMA_16("m16n8k16.row.col.f32.bf16.bf16.f32"),
               emu::mma(emu::Type::BF16, 16, d, a, b0, b1, at));
    else
        PTX_DO(PTX_MMA_16("m16n8k16.row.col.f32.f16.f16.f32"), emu::mma(emu::Type::F16, 16, d, a, b0, b1, at));
}
// The last 8 of a head width like 72: A holds rows g, g+8 and columns 2t, 2t+1.
template <class T> PTX_FN void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b0 PTX_AT) {
    static_assert(same<T, bf16> || same<T, f16>, "m16n8k8 takes bf16 or f16");
    if constexpr (same<T, bf16>)
        PTX_DO(PTX_MMA_8("m16n8k8.row.col.f32.bf16.bf16.f32"), emu::mma(emu::Type::BF16, 8, d, a, b0, 0, at));
    else
        PTX_DO(PTX_MMA_8("m16n8k8.row.col.f32.f16.f16.f32"), emu::mma(emu::Type::F16, 8, d, a, b0, 0, at));
}
// Signed bytes, summed in s32; a lane holds columns 4t to 4t+3 and 4t+16 to 4t+19.
PTX_FN void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 PTX_AT) {
    PTX_DO(asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                        "{%8, %9}, {%0, %1, %2, %3};"
                        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)),
           emu::mma_s8(d, a, b0, b1, at));
}
#if PTX_SM90
PTX_FN void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 PTX_AT) {
    PTX_DO(PTX_MMA_16("m16n8k32.row.col.f32.e4m3.e4m3.f32"), emu::mma(emu::Type::E4M3, 32, d, a, b0, b1, at));
}
#endif

// ---- named barriers: ids 1 to 15, `threads` a multiple of 32; 0 is __syncthreads ----

PTX_FN void bar_sync(int id, int threads PTX_AT) {
    PTX_DO(asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory"),
           emu::barrier(id, threads, true, at));
}
PTX_FN void bar_arrive(int id, int threads PTX_AT) {
    PTX_DO(asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory"),
           emu::barrier(id, threads, false, at));
}

}  // namespace ptx
