// Products of matrices on the CUDA cores by a block of 128 threads: tiles of both operands in shared memory as f32,
// blocks of the result in registers.
//
// A tile of M×N: thread t owns rows 4·(t/8) + 64·i and columns 4·(t%8) + 32·j in runs of four, so every operand of a step
// is read 16 bytes at a time and neighbours read the same address (a broadcast) or neighbouring ones.
#pragma once
#include "base.cuh"
#include "numbers.cuh"

namespace ptx {

constexpr int kTileThreads = 128;

// A in shared memory is [kDepth][M + 4], B is [kDepth][N + 4]: the padding spreads a transposing fill over the banks.
template <int M, int N, int kDepth> struct Tile {
    static_assert(M % 64 == 0 && N % 32 == 0, "16 x 8 threads with runs of four");
    static constexpr int kM = M, kN = N, kK = kDepth, kRows = M / 16, kColumns = N / 8;
    // In float4, as SMEM_ARRAY wants them for 16-byte accesses.
    static constexpr int kSizeA = kDepth * (M + 4) / 4, kSizeB = kDepth * (N + 4) / 4;

    static PTX_FN int row(int i) { return 4 * int(threadIdx.x / 8) + 64 * (i / 4) + i % 4; }
    static PTX_FN int column(int j) { return 4 * int(threadIdx.x % 8) + 32 * (j / 4) + j % 4; }

    static PTX_FN void clear(float (&acc)[kRows][kColumns]) {
#pragma unroll
        for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int j = 0; j < kColumns; j++) acc[i][j] = 0.0f;
        }
    }

    // acc += A·B of what lies in shared memory.
    static PTX_FN void multiply(float (&acc)[kRows][kColumns], const float* a, const float* b) {
        const float* my_a = a + 4 * (threadIdx.x / 8);
        const float* my_b = b + 4 * (threadIdx.x % 8);
#pragma unroll 4
        for (int k = 0; k < kDepth; k++) {
            float x[kRows], y[kColumns];
#pragma unroll
            for (int i = 0; i < kRows; i += 4) {
                const float4 v = *reinterpret_cast<const float4*>(my_a + k * (M + 4) + 16 * i);
                x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
            }
#pragma unroll
            for (int j = 0; j < kColumns; j += 4) {
                const float4 v = *reinterpret_cast<const float4*>(my_b + k * (N + 4) + 8 * j);
                y[j] = v.x, y[j + 1] = v.y, y[j + 2] = v.z, y[j + 3] = v.w;
            }
#pragma unroll
            for (int i = 0; i < kRows; i++) {
#pragma unroll
                for (int j = 0; j < kColumns; j++) acc[i][j] = fmaf(x[i], y[j], acc[i][j]);
            }
        }
    }
};

// Fills to[k][kSpan + 4] with get(i, k), i < kSpan, k < kDepth. kAlongDepth: neighbouring threads take neighbouring k, for
// operands that lie so in memory; else neighbouring i.
template <int kSpan, int kDepth, bool kAlongDepth, class F> PTX_FN void tile_fill(float* to, F get) {
    for (int at = threadIdx.x; at < kSpan * kDepth; at += kTileThreads) {
        const int i = kAlongDepth ? at / kDepth : at % kSpan, k = kAlongDepth ? at % kDepth : at / kSpan;
        to[k * (kSpan + 4) + i] = get(i, k);
    }
}

// acc += A·B over the depth [from, to), a chunk at a time; get_a(row, k) and get_b(column, k) read the operands, give 0
// outside of them, and are not asked for k outside of the range. Every thread of the block takes part.
template <class Shape, bool kAlongA, bool kAlongB, class A, class B>
PTX_FN void tile_product(float (&acc)[Shape::kRows][Shape::kColumns], float* a, float* b, int from, int to, A get_a,
                         B get_b) {
    for (int start = from; start < to; start += Shape::kK) {
        __syncthreads();
        tile_fill<Shape::kM, Shape::kK, kAlongA>(a, [&](int i, int k) { return start + k < to ? get_a(i, start + k) : 0.0f; });
        tile_fill<Shape::kN, Shape::kK, kAlongB>(b, [&](int i, int k) { return start + k < to ? get_b(i, start + k) : 0.0f; });
        __syncthreads();
        Shape::multiply(acc, a, b);
    }
}

}  // namespace ptx
