// One pass over dy (and u): du = dy·gate·act'(u), and sums over rows of du (for dbias) and of dy·u (for dgate).
//
// dy, pre (= u), du: [R, F] T in segments of `length` rows (all rows, or those of a sample where there is a gate);
// gate: [segments, C, F] T or null. du, bias_sums, gate_sums may be null; the sums are f32 [segments·parts, F], of the
// products before du is rounded. A second kernel adds the pieces.
//
// A block of 8 warps owns 256 columns, 8 a lane, and a part of a segment: warp w takes rows w, w + 8, …, four at a time,
// so that a thread has 64 bytes of dy (and as many of u) in flight; the warps are added in order. How a segment is split
// follows from the shape.
//
// Bound: memory. dy read once, u read once where it is needed, du written once: 2, 4 or 6 bytes an element in bf16. With
// 2 blocks a multiprocessor 32 KB are in flight for dy alone, 64 KB with u.
//
// Requires: F a multiple of 8, no sine. Other shapes: gemm_backward_u, gemm_backward_columns.
#include "../common/ptx.cuh"
#include "../common/activation.cuh"
#include "../common/vector.cuh"

using namespace ptx;

// Warps of a block, columns of a block, rows of a thread at a time.
constexpr int kWarps = 8, kColumns = 32 * kVector, kRows = 4;

// What a thread knows of its 8 columns while it walks down the rows.
struct Columns {
    float scale[kVector], of_du[kVector], of_u[kVector];
};

// One row: dy and u as they were loaded.
__device__ __forceinline__ void take(Columns& s, float (&v)[kVector], const float (&u)[kVector], T* du, int act) {
#pragma unroll
    for (int e = 0; e < kVector; e++) {
        s.of_u[e] += v[e] * u[e];
        if (act) v[e] *= act == 1 ? gelu(u[e]).slope : silu(u[e]).slope;
        v[e] *= s.scale[e];
        s.of_du[e] += v[e];
    }
    if (du) store8(du, v);
}

// The sums of a block's warps, in order, into row `piece` of `to`.
__device__ __forceinline__ void gather(const float (&sums)[kVector], float* slab, float* to, int column, int f) {
    float* own = slab + threadIdx.x / 32 * kColumns + threadIdx.x % 32 * kVector;
#pragma unroll
    for (int e = 0; e < kVector; e++) own[e] = sums[e];
    __syncthreads();
    if (column < f) {
        float sum = slab[threadIdx.x];
#pragma unroll
        for (int w = 1; w < kWarps; w++) sum += slab[w * kColumns + threadIdx.x];
        to[column] = sum;
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(256, 2)
    gemm_backward_slopes(const T* dy, const T* pre, const T* gate, T* du, float* bias_sums, float* gate_sums, int length,
                         int parts, int f, int c, int gate_row, int act) {
    SMEM_ARRAY(float, slab, kWarps * kColumns);
    const int tiles = (f + kColumns - 1) / kColumns, warp = threadIdx.x / 32;
    const int column0 = int(blockIdx.x % tiles) * kColumns, piece = int(blockIdx.x / tiles), segment = piece / parts;
    const int each = (length + parts - 1) / parts, first = piece % parts * each, end = min(length, first + each);
    const int column = column0 + int(threadIdx.x % 32) * kVector;
    Columns sums;
#pragma unroll
    for (int e = 0; e < kVector; e++) sums.scale[e] = 1.0f, sums.of_du[e] = sums.of_u[e] = 0.0f;
    if (column < f) {
        if (gate) load8_kept(sums.scale, gate + (size_t(segment) * c + gate_row) * f + column);
        const bool wants_u = act != 0 || gate_sums != nullptr;
        const size_t start = size_t(segment) * length;
        for (int i = first + warp; i < end; i += kWarps * kRows) {
            float v[kRows][kVector], u[kRows][kVector];
#pragma unroll
            for (int r = 0; r < kRows; r++) {
                // Rows behind the end are read as the first of these and counted nowhere.
                const int row = i + r * kWarps < end ? i + r * kWarps : i;
                load8(v[r], dy + (start + row) * f + column);
                if (wants_u) load8(u[r], pre + (start + row) * f + column);
            }
#pragma unroll
            for (int r = 0; r < kRows; r++) {
                const int row = i + r * kWarps;
                if (!wants_u) {
#pragma unroll
                    for (int e = 0; e < kVector; e++) u[r][e] = 0.0f;
                }
                if (row < end) take(sums, v[r], u[r], du ? du + (start + row) * f + column : nullptr, act);
            }
        }
    }
    const size_t row = size_t(piece) * f;
    if (bias_sums) gather(sums.of_du, slab, bias_sums + row, column0 + int(threadIdx.x), f);
    if (gate_sums) gather(sums.of_u, slab, gate_sums + row, column0 + int(threadIdx.x), f);
}
KERNEL_EXPORT(gemm_backward_slopes);

// to[i] = the sum of `pieces` rows of F: a block has 32 columns, its 8 warps every eighth piece, and the warps are added
// in order.
extern "C" __global__ void __launch_bounds__(256)
    gemm_backward_bias(const float* sums, T* to, int pieces, int f) {
    SMEM_ARRAY(float, slab, 256);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = int(blockIdx.x) * 32 + lane;
    float sum = 0.0f;
    if (column < f) {
#pragma unroll 4
        for (int p = warp; p < pieces; p += kWarps) sum += sums[size_t(p) * f + column];
    }
    slab[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && column < f) {
#pragma unroll
        for (int w = 1; w < kWarps; w++) sum += slab[32 * w + lane];
        to[column] = from_float<T>(sum);
    }
}
KERNEL_EXPORT(gemm_backward_bias);
