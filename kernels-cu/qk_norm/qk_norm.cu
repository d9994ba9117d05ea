// n_p = (x_p - mean_p) * rstd_p for p 0 (queries) and 1 (keys), x_p = x[b,n,p]; statistics over the D columns of a part
// y[b,n,0] = n_0 * q_gamma + q_beta;  y[b,n,1] = n_1 * k_gamma + k_beta;  y[b,n,2] = x[b,n,2]
// Backward, with g = dy_p·gamma_p: dx_p = rstd_p·(g - mean_d(g) - n_p·mean_d(g·n_p)), dx[b,n,2] = dy[b,n,2],
// dgamma_p = sum_bn dy_p·n_p, dbeta_p = sum_bn dy_p.
//
// x, y, dy, dx: [B·N, 3, D] T; q_gamma, q_beta, k_gamma, k_beta and their gradients: [D] T; mean, rstd: [B·N, 2] f32; sums
// in f32.
//
// A row is one part of a token, owned by a warp; values are copied by warps of their own. A lane holds the row's chunks
// of 8 elements lane, lane + 32 ... in registers as they lie in memory, so the row is read once: the mean, the squares
// around it (which does not cancel), then the result.
// Backward, the warps of a block walk tokens of one part and keep the two sums of their own columns in registers; they
// add them in order through shared memory, a block writes one row of partial sums of each, and a second kernel adds
// those, always in the same order (`splits` follows from the shape alone).
//
// Bound: memory. In bf16 forward 12 bytes a column of a token, backward 16 (x of the values is not read). At B=1,
// N=16384, D=1152: 226 MB and 302 MB.
//
// Requires: D a multiple of 8, up to 256·kChunks = 1280. Other D go to the `_any` kernels: a warp a row, element by
// element, read three times (the later ones from L1), columns summed by a kernel of their own.
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/ptx.cuh"
#include "../common/rows.cuh"

using namespace ptx;

constexpr int kWarps = 4, kThreads = 32 * kWarps;
// Chunks of 8 elements that a lane holds.
constexpr int kChunks = 5;
// Blocks that fit a multiprocessor by registers.
constexpr int kForwardBlocks = sizeof(T) == 2 ? 7 : 5, kBackwardBlocks = sizeof(T) == 2 ? 3 : 2;

// D a multiple of 8, up to 1280. rows = 3·B·N.
extern "C" __global__ void __launch_bounds__(kThreads, kForwardBlocks)
    qk_norm_forward(const T* x, const T* q_gamma, const T* q_beta, const T* k_gamma, const T* k_beta, T* y, float* mean,
                    float* rstd, int rows, int d, float eps) {
    const int row = blockIdx.x * kWarps + threadIdx.x / 32, part = row % 3;
    if (row >= rows) return;
    const float inverse = 1.0f / float(d);
    Packed8<T> v[kChunks];
    float sum = 0.0f, squares = 0.0f, e[8];
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        v[i] = zero_packed8<T>();
        if (8 * lane_chunk(i) < d) v[i] = load_packed8(x + size_t(row) * d + 8 * lane_chunk(i));
    }
    if (part == 2) {
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            if (8 * lane_chunk(i) >= d) continue;
            unpack(e, v[i]);
            store8(y + size_t(row) * d + 8 * lane_chunk(i), e);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        unpack(e, v[i]);
        sum += ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
    }
    const float mu = warp_sum(sum) * inverse;
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        if (8 * lane_chunk(i) >= d) continue;
        unpack(e, v[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) squares = fmaf(e[j] - mu, e[j] - mu, squares);
    }
    const float r = rsqrtf(warp_sum(squares) * inverse + eps);
    const T *gamma = part ? k_gamma : q_gamma, *beta = part ? k_beta : q_beta;
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        const int at = 8 * lane_chunk(i);
        if (at >= d) continue;
        float a[8], b[8];
        unpack(e, v[i]);
        load8_kept(a, gamma + at);
        load8_kept(b, beta + at);
#pragma unroll
        for (int j = 0; j < 8; j++) e[j] = fmaf((e[j] - mu) * r, a[j], b[j]);
        store8(y + size_t(row) * d + at, e);
    }
    const size_t at = size_t(row / 3) * 2 + part;
    if (threadIdx.x % 32 == 0) mean[at] = mu, rstd[at] = r;
}
KERNEL_EXPORT(qk_norm_forward);

// Any D.
extern "C" __global__ void __launch_bounds__(kThreads)
    qk_norm_forward_any(const T* x, const T* q_gamma, const T* q_beta, const T* k_gamma, const T* k_beta, T* y,
                        float* mean, float* rstd, int rows, int d, float eps) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32, part = row % 3;
    if (row >= rows) return;
    const T* from = x + size_t(row) * d;
    T* to = y + size_t(row) * d;
    if (part == 2) {
        for (int i = lane; i < d; i += 32) to[i] = from[i];
        return;
    }
    float sum = 0.0f, squares = 0.0f;
    for (int i = lane; i < d; i += 32) sum += to_float(from[i]);
    const float mu = warp_sum(sum) / float(d);
    for (int i = lane; i < d; i += 32) {
        const float v = to_float(from[i]) - mu;
        squares = fmaf(v, v, squares);
    }
    const float r = rsqrtf(warp_sum(squares) / float(d) + eps);
    const T *gamma = part ? k_gamma : q_gamma, *beta = part ? k_beta : q_beta;
    for (int i = lane; i < d; i += 32)
        to[i] = from_float<T>(fmaf((to_float(from[i]) - mu) * r, to_float(gamma[i]), to_float(beta[i])));
    const size_t at = size_t(row / 3) * 2 + part;
    if (lane == 0) mean[at] = mu, rstd[at] = r;
}
KERNEL_EXPORT(qk_norm_forward_any);

// D a multiple of 8, up to 1280; `splits` blocks for each part. dx may be null, and partials: [2][splits][2][D], the sums
// of dy·n and of dy of a block.
extern "C" __global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    qk_norm_backward(const T* dy, const T* x, const T* q_gamma, const T* k_gamma, const float* mean, const float* rstd,
                     T* dx, float* partials, int tokens, int d, int splits) {
    SMEM_ARRAY(float, sums, 2 * 256 * kChunks);
    const int warp = threadIdx.x / 32, part = blockIdx.x / splits, split = blockIdx.x % splits;
    if (part == 2) {
        for (int token = split * kWarps + warp; dx && token < tokens; token += splits * kWarps) {
            const size_t first = (size_t(token) * 3 + 2) * d;
            float e[8];
            for (int at = 8 * lane_chunk(0); at < d; at += 256) {
                load8(e, dy + first + at);
                store8(dx + first + at, e);
            }
        }
        return;
    }
    const T* gamma = part ? k_gamma : q_gamma;
    const float inverse = 1.0f / float(d);
    float dgamma[kChunks][8], dbeta[kChunks][8];
#pragma unroll
    for (int i = 0; i < kChunks; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) dgamma[i][j] = dbeta[i][j] = 0.0f;
    for (int token = split * kWarps + warp; token < tokens; token += splits * kWarps) {
        const size_t first = (size_t(token) * 3 + part) * d;
        Packed8<T> v[kChunks], w[kChunks];
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            if (8 * lane_chunk(i) >= d) continue;
            v[i] = load_packed8(x + first + 8 * lane_chunk(i));
            w[i] = load_packed8(dy + first + 8 * lane_chunk(i));
        }
        const float mu = mean[size_t(token) * 2 + part], r = rstd[size_t(token) * 2 + part];
        float sum_g = 0.0f, sum_gn = 0.0f, n[8], g[8], a[8];
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            if (8 * lane_chunk(i) >= d) continue;
            unpack(n, v[i]);
            unpack(g, w[i]);
            load8_kept(a, gamma + 8 * lane_chunk(i));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                n[j] = (n[j] - mu) * r;
                dbeta[i][j] += g[j];
                dgamma[i][j] = fmaf(g[j], n[j], dgamma[i][j]);
                g[j] *= a[j];
                sum_g += g[j];
                sum_gn = fmaf(g[j], n[j], sum_gn);
            }
        }
        if (!dx) continue;
        const float mean_g = warp_sum(sum_g) * inverse, mean_gn = warp_sum(sum_gn) * inverse;
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            if (8 * lane_chunk(i) >= d) continue;
            unpack(n, v[i]);
            unpack(g, w[i]);
            load8_kept(a, gamma + 8 * lane_chunk(i));
#pragma unroll
            for (int j = 0; j < 8; j++) g[j] = r * (g[j] * a[j] - mean_g - (n[j] - mu) * r * mean_gn);
            store8(dx + first + 8 * lane_chunk(i), g);
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
                    sums[at + j] = dgamma[i][j] + (turn ? sums[at + j] : 0.0f);
                    sums[d + at + j] = dbeta[i][j] + (turn ? sums[d + at + j] : 0.0f);
                }
            }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < 2 * d; i += kThreads) partials[size_t(blockIdx.x) * 2 * d + i] = sums[i];
}
KERNEL_EXPORT(qk_norm_backward);

// Any D: dx alone. rows = 3·B·N.
extern "C" __global__ void __launch_bounds__(kThreads)
    qk_norm_backward_any(const T* dy, const T* x, const T* q_gamma, const T* k_gamma, const float* mean,
                         const float* rstd, T* dx, int rows, int d) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * kWarps + threadIdx.x / 32, part = row % 3;
    if (row >= rows) return;
    const size_t first = size_t(row) * d;
    if (part == 2) {
        for (int i = lane; i < d; i += 32) dx[first + i] = dy[first + i];
        return;
    }
    const T* gamma = part ? k_gamma : q_gamma;
    const float mu = mean[size_t(row / 3) * 2 + part], r = rstd[size_t(row / 3) * 2 + part];
    float sum_g = 0.0f, sum_gn = 0.0f;
    for (int i = lane; i < d; i += 32) {
        const float g = to_float(dy[first + i]) * to_float(gamma[i]);
        sum_g += g;
        sum_gn = fmaf(g, (to_float(x[first + i]) - mu) * r, sum_gn);
    }
    const float mean_g = warp_sum(sum_g) / float(d), mean_gn = warp_sum(sum_gn) / float(d);
    for (int i = lane; i < d; i += 32) {
        const float g = to_float(dy[first + i]) * to_float(gamma[i]), n = (to_float(x[first + i]) - mu) * r;
        dx[first + i] = from_float<T>(r * (g - mean_g - n * mean_gn));
    }
}
KERNEL_EXPORT(qk_norm_backward_any);

// Any D: the partial sums alone; a thread owns a column, a block the tokens split, split + splits ... of a part.
extern "C" __global__ void __launch_bounds__(kThreads)
    qk_norm_backward_columns_any(const T* dy, const T* x, const float* mean, const float* rstd, float* partials,
                                 int tokens, int d, int splits) {
    const int tiles = (d + kThreads - 1) / kThreads, group = blockIdx.x / tiles;
    const int part = group / splits, column = blockIdx.x % tiles * kThreads + threadIdx.x;
    if (column >= d) return;
    float dgamma = 0.0f, dbeta = 0.0f;
    for (int token = group % splits; token < tokens; token += splits) {
        const size_t at = (size_t(token) * 3 + part) * d + column, row = size_t(token) * 2 + part;
        const float g = to_float(dy[at]);
        dbeta += g;
        dgamma = fmaf(g, (to_float(x[at]) - mean[row]) * rstd[row], dgamma);
    }
    float* to = partials + size_t(group) * 2 * d + column;
    to[0] = dgamma, to[d] = dbeta;
}
KERNEL_EXPORT(qk_norm_backward_columns_any);

// A block adds the partial sums of 32 columns of one of the four gradients, which are null where nobody wants them.
extern "C" __global__ void __launch_bounds__(kSumThreads)
    qk_norm_backward_maps(const float* partials, T* dq_gamma, T* dq_beta, T* dk_gamma, T* dk_beta, int d, int splits) {
    SMEM_ARRAY(float, shared, kSumThreads);
    const int tiles = (d + 31) / 32, which = blockIdx.x / tiles, part = which / 2;
    const int column = blockIdx.x % tiles * 32 + threadIdx.x % 32;
    T* out = part ? (which % 2 ? dk_beta : dk_gamma) : (which % 2 ? dq_beta : dq_gamma);
    if (!out) return;
    const float* first = partials + (size_t(part) * splits * 2 + which % 2) * d + column;
    const float sum = sum_partials(first, splits, size_t(2) * d, column < d, shared);
    if (threadIdx.x < 32 && column < d) out[column] = from_float<T>(sum);
}
KERNEL_EXPORT(qk_norm_backward_maps);
