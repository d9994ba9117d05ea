// y[b,n,d] = (x[b,n,d] - mean[b,n]) * rstd[b,n] * (1 + modulation[b,scale,d]) + modulation[b,shift,d]
// mean[b,n] = 1/D sum_d x;  rstd[b,n] = 1/sqrt(1/D sum_d (x - mean)^2 + eps)
// Backward, with h = (x - mean)·rstd and g = dy·(1 + scale): dx = rstd·(g - mean_d(g) - h·mean_d(g·h)),
// dmodulation[b,shift] = sum_n dy, dmodulation[b,scale] = sum_n dy·h, its other rows zero.
//
// x, dy, y, dx: [B, N, D] T; modulation, dmodulation: [B, C, D] T; mean, rstd: [B, N] f32; sums in f32.
//
// A warp owns a row, a block of 4 warps 4 rows. A lane holds the row's chunks of 8 elements lane, lane + 32 ... in
// registers as they lie in memory, so the row is read once: statistics by two butterfly sums (mean first, then the
// squares around it, which does not cancel), then the result from the same registers.
// Backward, a warp walks tokens of one sample: its lanes keep the two sums of their own columns in registers. The warps
// of a block add theirs in order through shared memory, a block writes one row of partial sums of each, and a second
// kernel adds the rows of a sample, always in the same order (`splits` follows from the shape alone).
//
// Bound: memory. Forward 4 bytes an element in bf16: at B=2, N=16384, D=1152 that is 151 MB; a multiprocessor holds 28
// warps of 72 registers, 64 KB of loads, where half of 4.3 TB/s needs 16 KB at 1 µs of latency. Backward 6 bytes an
// element, 226 MB: 12 warps of 168 registers hold 55 KB of loads; two thirds of 4.3 TB/s need 22 KB.
//
// Requires: D a multiple of 8, up to 256·kChunks = 1280. Other D go to the `_any` kernels, which read a row two or
// three times, element by element (the later ones come from L1), and sum columns in a kernel of their own.
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/ptx.cuh"
#include "../common/rows.cuh"

using namespace ptx;

constexpr int kWarps = 4, kThreads = 32 * kWarps;
// Chunks of 8 elements that a lane holds.
constexpr int kChunks = 5;
// Blocks that fit a multiprocessor by registers.
constexpr int kForwardBlocks = sizeof(T) == 2 ? 7 : 5, kBackwardBlocks = sizeof(T) == 2 ? 3 : 2;

// D a multiple of 8, up to 1280.
extern "C" __global__ void __launch_bounds__(kThreads, kForwardBlocks)
    ln_modulate_forward(const T* x, const T* modulation, T* y, float* mean, float* rstd, int rows, int n, int c, int d,
                        int shift, int scale, float eps) {
    const int row = blockIdx.x * kWarps + threadIdx.x / 32, chunks = d / 8;
    if (row >= rows) return;
    const float inverse = 1.0f / float(d);
    Packed8<T> v[kChunks];
    float sum = 0.0f, squares = 0.0f, e[8];
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        v[i] = zero_packed8<T>();
        if (lane_chunk(i) < chunks) v[i] = load_packed8(x + size_t(row) * d + 8 * lane_chunk(i));
    }
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        unpack(e, v[i]);
        sum += ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
    }
    const float mu = warp_sum(sum) * inverse;
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        if (lane_chunk(i) >= chunks) continue;
        unpack(e, v[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) squares = fmaf(e[j] - mu, e[j] - mu, squares);
    }
    const float r = rsqrtf(warp_sum(squares) * inverse + eps);
    const T* table = modulation + size_t(row / n) * c * d;
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        const int at = 8 * lane_chunk(i);
        if (at >= d) continue;
        float a[8], b[8];
        unpack(e, v[i]);
        load8_kept(a, table + size_t(scale) * d + at);
        load8_kept(b, table + size_t(shift) * d + at);
#pragma unroll
        for (int j = 0; j < 8; j++) e[j] = fmaf((e[j] - mu) * r, 1.0f + a[j], b[j]);
        store8(y + size_t(row) * d + at, e);
    }
    if (threadIdx.x % 32 == 0) mean[row] = mu, rstd[row] = r;
}
KERNEL_EXPORT(ln_modulate_forward);

// Any D.
extern "C" __global__ void __launch_bounds__(kThreads)
    ln_modulate_forward_any(const T* x, const T* modulation, T* y, float* mean, float* rstd, int rows, int n, int c,
                            int d, int shift, int scale, float eps) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32;
    if (row >= rows) return;
    const T* from = x + size_t(row) * d;
    float sum = 0.0f, squares = 0.0f;
    for (int i = lane; i < d; i += 32) sum += to_float(from[i]);
    const float mu = warp_sum(sum) / float(d);
    for (int i = lane; i < d; i += 32) {
        const float v = to_float(from[i]) - mu;
        squares = fmaf(v, v, squares);
    }
    const float r = rsqrtf(warp_sum(squares) / float(d) + eps);
    const T* table = modulation + size_t(row / n) * c * d;
    for (int i = lane; i < d; i += 32) {
        const float a = to_float(table[size_t(scale) * d + i]), b = to_float(table[size_t(shift) * d + i]);
        y[size_t(row) * d + i] = from_float<T>(fmaf((to_float(from[i]) - mu) * r, 1.0f + a, b));
    }
    if (lane == 0) mean[row] = mu, rstd[row] = r;
}
KERNEL_EXPORT(ln_modulate_forward_any);

// D a multiple of 8, up to 1280. partials: [B·splits][2][D], the sums of dy and of dy·h of a block, or null.
extern "C" __global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    ln_modulate_backward(const T* dy, const T* x, const T* modulation, const float* mean, const float* rstd, T* dx,
                         float* partials, int n, int c, int d, int scale, int splits) {
    SMEM_ARRAY(float, sums, 2 * 256 * kChunks);
    const int warp = threadIdx.x / 32, sample = blockIdx.x / splits, split = blockIdx.x % splits;
    const T* factor = modulation + (size_t(sample) * c + scale) * d;
    const float inverse = 1.0f / float(d);
    float dshift[kChunks][8], dscale[kChunks][8];
#pragma unroll
    for (int i = 0; i < kChunks; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) dshift[i][j] = dscale[i][j] = 0.0f;
    for (int token = split * kWarps + warp; token < n; token += splits * kWarps) {
        const size_t row = size_t(sample) * n + token;
        Packed8<T> v[kChunks], w[kChunks];
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            if (8 * lane_chunk(i) >= d) continue;
            v[i] = load_packed8(x + row * d + 8 * lane_chunk(i));
            w[i] = load_packed8(dy + row * d + 8 * lane_chunk(i));
        }
        const float mu = mean[row], r = rstd[row];
        float sum_g = 0.0f, sum_gh = 0.0f, h[8], g[8], a[8];
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            if (8 * lane_chunk(i) >= d) continue;
            unpack(h, v[i]);
            unpack(g, w[i]);
            load8_kept(a, factor + 8 * lane_chunk(i));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                h[j] = (h[j] - mu) * r;
                dshift[i][j] += g[j];
                dscale[i][j] = fmaf(g[j], h[j], dscale[i][j]);
                g[j] = fmaf(g[j], a[j], g[j]);
                sum_g += g[j];
                sum_gh = fmaf(g[j], h[j], sum_gh);
            }
        }
        if (!dx) continue;
        const float mean_g = warp_sum(sum_g) * inverse, mean_gh = warp_sum(sum_gh) * inverse;
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            if (8 * lane_chunk(i) >= d) continue;
            unpack(h, v[i]);
            unpack(g, w[i]);
            load8_kept(a, factor + 8 * lane_chunk(i));
#pragma unroll
            for (int j = 0; j < 8; j++)
                g[j] = r * (fmaf(g[j], a[j], g[j]) - mean_g - (h[j] - mu) * r * mean_gh);
            store8(dx + row * d + 8 * lane_chunk(i), g);
        }
    }
    if (!partials) return;
    for (int turn = 0; turn < kWarps; turn++) {
        if (turn == warp) {
#pragma unroll
            for (int i = 0; i < kChunks; i++) {
                const int at = 8 * lane_chunk(i);
                if (at >= d) continue;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    sums[at + j] = dshift[i][j] + (turn ? sums[at + j] : 0.0f);
                    sums[d + at + j] = dscale[i][j] + (turn ? sums[d + at + j] : 0.0f);
                }
            }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < 2 * d; i += kThreads) partials[size_t(blockIdx.x) * 2 * d + i] = sums[i];
}
KERNEL_EXPORT(ln_modulate_backward);

// Any D: dx alone.
extern "C" __global__ void __launch_bounds__(kThreads)
    ln_modulate_backward_any(const T* dy, const T* x, const T* modulation, const float* mean, const float* rstd, T* dx,
                             int rows, int n, int c, int d, int scale) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32;
    if (row >= rows) return;
    const T* factor = modulation + (size_t(row / n) * c + scale) * d;
    const size_t first = size_t(row) * d;
    const float mu = mean[row], r = rstd[row];
    float sum_g = 0.0f, sum_gh = 0.0f;
    for (int i = lane; i < d; i += 32) {
        const float g = to_float(dy[first + i]) * (1.0f + to_float(factor[i]));
        sum_g += g;
        sum_gh = fmaf(g, (to_float(x[first + i]) - mu) * r, sum_gh);
    }
    const float mean_g = warp_sum(sum_g) / float(d), mean_gh = warp_sum(sum_gh) / float(d);
    for (int i = lane; i < d; i += 32) {
        const float g = to_float(dy[first + i]) * (1.0f + to_float(factor[i]));
        const float h = (to_float(x[first + i]) - mu) * r;
        dx[first + i] = from_float<T>(r * (g - mean_g - h * mean_gh));
    }
}
KERNEL_EXPORT(ln_modulate_backward_any);

// Any D: the partial sums alone; a thread owns a column, a block the tokens split, split + splits ... of a sample.
extern "C" __global__ void __launch_bounds__(kThreads)
    ln_modulate_backward_columns_any(const T* dy, const T* x, const float* mean, const float* rstd, float* partials,
                                     int n, int d, int splits) {
    const int tiles = (d + kThreads - 1) / kThreads, group = blockIdx.x / tiles;
    const int sample = group / splits, split = group % splits, column = blockIdx.x % tiles * kThreads + threadIdx.x;
    if (column >= d) return;
    float dshift = 0.0f, dscale = 0.0f;
    for (int token = split; token < n; token += splits) {
        const size_t row = size_t(sample) * n + token;
        const float g = to_float(dy[row * d + column]);
        dshift += g;
        dscale = fmaf(g, (to_float(x[row * d + column]) - mean[row]) * rstd[row], dscale);
    }
    float* to = partials + size_t(group) * 2 * d + column;
    to[0] = dshift, to[d] = dscale;
}
KERNEL_EXPORT(ln_modulate_backward_columns_any);

// A block adds the partial sums of 32 columns of one row of dmodulation.
extern "C" __global__ void __launch_bounds__(kSumThreads)
    ln_modulate_backward_table(const float* partials, T* dmodulation, int c, int d, int shift, int scale, int splits) {
    SMEM_ARRAY(float, shared, kSumThreads);
    const int tiles = (d + 31) / 32, row = blockIdx.x / tiles, sample = row / c, part = row % c;
    const int column = blockIdx.x % tiles * 32 + threadIdx.x % 32;
    const bool summed = part == shift || part == scale;
    const float* first = partials + (size_t(sample) * splits * 2 + (part == scale)) * d + column;
    const float sum = sum_partials(first, splits, size_t(2) * d, summed && column < d, shared);
    if (threadIdx.x < 32 && column < d) dmodulation[size_t(row) * d + column] = from_float<T>(sum);
}
KERNEL_EXPORT(ln_modulate_backward_table);
