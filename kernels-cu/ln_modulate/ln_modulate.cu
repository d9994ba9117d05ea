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
// Backward, a warp walks tokens of one sample: its lanes keep the two sums of their own columns in registers, and
// cp.async brings the next row while the present one, which is read twice, lies in shared memory. The warps of a block
// leave their sums where their rows were, the block adds them in order and writes one row of partial sums of each, and a
// second kernel adds the rows of a sample, always in the same order (`splits` and `groups` follow from the shape alone).
//
// Bound: memory. Forward 4 bytes an element in bf16: at B=2, N=16384, D=1152 that is 151 MB; a multiprocessor holds 28
// warps of 72 registers, 64 KB of loads, where half of 4.2 TB/s needs 16 KB at 1 us of latency. Backward 6 bytes an
// element, 226 MB: 16 warps of 118 registers, each with a row of 4.6 KB on the way all the time: 74 KB, where two thirds
// of 4.2 TB/s need 22 KB; 166 KB of shared memory.
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
constexpr int kForwardBlocks = sizeof(T) == 2 ? 7 : 5, kBackwardBlocks = 4;
// Rows of a warp that are in shared memory or on the way there.
constexpr int kSlots = 2;

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

// Four elements of a row in shared memory.
template <class E> __device__ __forceinline__ void load_piece(float (&r)[4], uint32_t a) {
    if constexpr (sizeof(E) == 2) {
        const uint2 w = ld_shared_v2(a);
        r[0] = unpack_lo<E>(w.x), r[1] = unpack_hi<E>(w.x), r[2] = unpack_lo<E>(w.y), r[3] = unpack_hi<E>(w.y);
    } else {
        unpack4(r, ld_shared_v4(a));
    }
}
template <class E> __device__ __forceinline__ void store_piece(E* p, const float (&v)[4]) {
    if constexpr (sizeof(E) == 2)
        st_global_v2(p, make_uint2(pack<E>(v[0], v[1]), pack<E>(v[2], v[3])));
    else
        store<4>(p, v);
}
__device__ __forceinline__ void store_floats(uint32_t a, const float (&v)[4]) {
    st_shared_v4(a, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])));
}

// D a multiple of 8, up to 128·kPieces: lane l holds the pieces of 4 elements l, l + 32 ... of a row. In shared memory rows
// are filled with zeros to whole turns of the warp, so that only copies and stores ask where a row ends.
template <int kPieces>
__device__ __forceinline__ void walk_rows(const T* dy, const T* x, const T* modulation, const float* mean,
                                          const float* rstd, T* dx, float* partials, int n, int c, int d, int scale,
                                          int splits) {
    constexpr int kSize = int(sizeof(T));
    SMEM_DYNAMIC(smem, 16);
    SmemPlan plan;
    auto region = [&](int bytes) {
        const int start = plan.take(bytes);
        smem_guard(smem, start + bytes);
        return smem_u32(smem) + start;
    };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sample = blockIdx.x / splits;
    const int width = (d + 127) / 128 * 128, row_bytes = width * kSize, warp_bytes = kSlots * 2 * row_bytes;
    const uint32_t all_factors = region(4 * width), all_rows = region(kWarps * warp_bytes);
    // From here on, places of the lane's first piece.
    const uint32_t factors = all_factors + 16 * lane, ring = all_rows + warp * warp_bytes + 4 * kSize * lane;
    const int left = d - 4 * lane, step = splits * kWarps;
    int token = blockIdx.x % splits * kWarps + warp;
    const size_t row_0 = size_t(sample) * n;
    // A lane copies the pieces that it reads, so that it alone waits for them.
    auto fetch = [&](int of, uint32_t to) {
        if (of < n) {
            const T *from_x = x + (row_0 + of) * d + 4 * lane, *from_dy = dy + (row_0 + of) * d + 4 * lane;
#pragma unroll
            for (int i = 0; i < kPieces; i++) {
                if (left <= 128 * i) continue;
                cp_async<4 * kSize>(to + 128 * kSize * i, from_x + 128 * i);
                cp_async<4 * kSize>(to + 128 * kSize * i + row_bytes, from_dy + 128 * i);
            }
        }
        cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < kSlots; i++) fetch(token + i * step, ring + i * 2 * row_bytes);
    float mu = 0.0f, r = 0.0f;
    if (token < n) mu = mean[row_0 + token], r = rstd[row_0 + token];
    const T* factor = modulation + (size_t(sample) * c + scale) * d;
    for (int at = threadIdx.x; at < width; at += kThreads)
        st_shared_f32(all_factors + 4 * at, at < d ? 1.0f + to_float(factor[at]) : 0.0f);
    if (left <= width - 128 && d < width) {
        for (int i = 0; i < 2 * kSlots; i++) {
            const uint32_t to = ring + i * row_bytes + (width - 128) * kSize;
            st_shared_v2(to, make_uint2(0, 0));
            if constexpr (kSize == 4) st_shared_v2(to + 8, make_uint2(0, 0));
        }
    }
    __syncthreads();

    const float inverse = 1.0f / float(d);
    float dshift[kPieces][4], dscale[kPieces][4];
#pragma unroll
    for (int i = 0; i < kPieces; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) dshift[i][j] = dscale[i][j] = 0.0f;
    uint32_t slot = ring;
    for (; token < n; token += step) {
        float next_mu = 0.0f, next_r = 0.0f;
        if (token + step < n) next_mu = mean[row_0 + token + step], next_r = rstd[row_0 + token + step];
        cp_async_wait<kSlots - 1>();
        float sum_g = 0.0f, sum_gh = 0.0f, h[4], g[4], a[4];
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            if (128 * i >= d) break;
            load_piece<T>(h, slot + 128 * kSize * i);
            load_piece<T>(g, slot + 128 * kSize * i + row_bytes);
            load_piece<float>(a, factors + 512 * i);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                h[j] = (h[j] - mu) * r;
                dshift[i][j] += g[j];
                dscale[i][j] = fmaf(g[j], h[j], dscale[i][j]);
                g[j] *= a[j];
                sum_gh = fmaf(g[j], h[j], sum_gh);
            }
            sum_g += (g[0] + g[1]) + (g[2] + g[3]);
        }
        if (dx) {
            const float mean_g = warp_sum(sum_g) * inverse, mean_gh = warp_sum(sum_gh) * inverse;
            const float constant = -r * mean_g, slope = -r * r * mean_gh;
            T* to = dx + (row_0 + token) * d + 4 * lane;
#pragma unroll
            for (int i = 0; i < kPieces; i++) {
                if (128 * i >= d) break;
                load_piece<T>(h, slot + 128 * kSize * i);
                load_piece<T>(g, slot + 128 * kSize * i + row_bytes);
                load_piece<float>(a, factors + 512 * i);
#pragma unroll
                for (int j = 0; j < 4; j++) g[j] = fmaf(g[j] * a[j], r, fmaf(h[j] - mu, slope, constant));
                if (left > 128 * i) store_piece<T>(to + 128 * i, g);
            }
        }
        fetch(token + kSlots * step, slot);
        slot = slot == ring ? ring + 2 * row_bytes : ring;
        mu = next_mu, r = next_r;
    }
    start_next();
    if (!partials) return;
    // A warp's sums take the place of its rows; the block adds those of its warps in order.
    __syncwarp();
    const uint32_t sums = all_rows + warp * warp_bytes + 16 * lane;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
        if (128 * i >= d) break;
        store_floats(sums + 512 * i, dshift[i]);
        store_floats(sums + 512 * i + 4 * width, dscale[i]);
    }
    __syncthreads();
    for (int at = 4 * threadIdx.x; at < 2 * width; at += 4 * kThreads) {
        const int part = at >= width, column = at - part * width;
        if (column >= d) continue;
        float sum[4];
        load_piece<float>(sum, all_rows + 4 * at);
#pragma unroll
        for (int w = 1; w < kWarps; w++) {
            float more[4];
            load_piece<float>(more, all_rows + w * warp_bytes + 4 * at);
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] += more[j];
        }
        store_piece<float>(partials + (size_t(blockIdx.x) * 2 + part) * d + column, sum);
    }
}

// D a multiple of 8, up to 1152. partials: [B·splits][2][D], the sums of dy and of dy·h of a block, or null.
extern "C" __global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    ln_modulate_backward(const T* dy, const T* x, const T* modulation, const float* mean, const float* rstd, T* dx,
                         float* partials, int n, int c, int d, int scale, int splits) {
    walk_rows<9>(dy, x, modulation, mean, rstd, dx, partials, n, c, d, scale, splits);
}
KERNEL_EXPORT(ln_modulate_backward);

// The same, D up to 1280.
extern "C" __global__ void __launch_bounds__(kThreads, kBackwardBlocks - 1)
    ln_modulate_backward_1280(const T* dy, const T* x, const T* modulation, const float* mean, const float* rstd,
                              T* dx, float* partials, int n, int c, int d, int scale, int splits) {
    walk_rows<10>(dy, x, modulation, mean, rstd, dx, partials, n, c, d, scale, splits);
}
KERNEL_EXPORT(ln_modulate_backward_1280);

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

// A block adds the partial sums of kSumThreads / groups columns of a row of dmodulation that has some, and writes zeros to
// half of the rows that have none.
extern "C" __global__ void __launch_bounds__(kSumThreads)
    ln_modulate_backward_table(const float* partials, T* dmodulation, int c, int d, int shift, int scale, int splits,
                               int groups) {
    SMEM_ARRAY(float, shared, kSumThreads);
    wait_for_previous();
    const int columns = kSumThreads / groups, tiles = (d + columns - 1) / columns;
    const int part = blockIdx.x / tiles % 2, sample = blockIdx.x / tiles / 2;
    const int column = blockIdx.x % tiles * columns + int(threadIdx.x) % columns;
    const float* first = partials + (size_t(sample) * splits * 2 + part) * d + column;
    const float sum = sum_partials(first, splits, size_t(2) * d, column < d, shared, groups);
    if (int(threadIdx.x) >= columns || column >= d) return;
    T* to = dmodulation + size_t(sample) * c * d + column;
    to[size_t(part ? scale : shift) * d] = from_float<T>(sum);
    for (int row = part; row < c; row += 2)
        if (row != shift && row != scale) to[size_t(row) * d] = from_float<T>(0.0f);
}
KERNEL_EXPORT(ln_modulate_backward_table);
