// z[b,p,c] = (x[b,p,c] - mean[b,g]) * rstd[b,g] * gamma[c] + beta[c], g = c / (C/G);  y = z·sigmoid(z) where silu, else z
// mean and variance over all pixels p and the C/G channels of a group, rstd = 1/sqrt(var + eps), or both from `stats`.
// Backward, with n = (x - mean)·rstd, u = dy·act'(z), v = u·gamma: dx = rstd·(v - mean_g(v) - n·mean_g(v·n)), the means
// zero where statistics are given; dgamma = sum_bp u·n, dbeta = sum_bp u.
//
// x, y, dy, dx: [B, P, C] T, P = H·W; gamma, beta and their gradients: [C] T; stats: [B, 2, G] f32; mean, rstd:
// [B, G] f32; sums in f32.
//
// A thread owns 8 channels and walks pixels; a block is 16 by 16 threads, channels by pixels. What is summed is summed
// by channel: mean and squares around it (shifted by the thread's first value, merged in pairs: no cancellation), and u
// and u·n. A block writes a row of partial results of its channels; a second kernel merges the rows and the channels of
// a group. The order is always the same: `splits` follows from the shape alone. Then the pixels are read again.
//
// Bound: memory. In bf16 forward 6 bytes an element (x twice, y), 4 where statistics are given; backward 10 (x and dy
// twice, dx). 24 warps of up to 80 registers hold two pixels of 512 bytes each, 24 to 48 KB of loads a multiprocessor.
//
// Requires: C a multiple of 8; the `_any` kernels are the same text for single channels. C/G is free.
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/ptx.cuh"
#include "../common/rows.cuh"

using namespace ptx;

constexpr int kThreads = 256;
// Threads of a block along the channels and along the pixels; pixels that a thread loads before it uses the first.
constexpr int kColumns = 16, kTurns = kThreads / kColumns, kBatch = 2;
// Pixels of a thread where nothing is summed.
constexpr int kSteps = 4;

// Which channels and pixels a thread has. Blocks: [B][splits][tiles of channels].
template <int W> struct Place {
    int group, sample, split, own, column, turn;
    __device__ Place(int c, int splits) {
        const int tiles = (c + kColumns * W - 1) / (kColumns * W);
        group = blockIdx.x / tiles, sample = group / splits, split = group % splits;
        own = threadIdx.x % kColumns * W, column = blockIdx.x % tiles * kColumns * W + own;
        turn = threadIdx.x / kColumns;
    }
};

// How many of p pixels the threads of a turn have where the turns of all blocks take them in rotation. One division for
// all: the statistics kernel asks for each of its values, and a division for every turn would take longer than the sums.
struct Share {
    int whole, rest;
    __device__ __forceinline__ Share(int p, int splits) {
        whole = p / (splits * kTurns), rest = p - whole * splits * kTurns;
    }
    __device__ __forceinline__ int of_turn(int split, int turn) const { return whole + (split * kTurns + turn < rest); }
    __device__ __forceinline__ int of_block(int split) const {
        return whole * kTurns + min(max(rest - split * kTurns, 0), kTurns);
    }
};

// Merges mean and squares of n values into those of `count`.
__device__ __forceinline__ void merge(float count, float& mean, float& squares, float n, float mean_n, float squares_n) {
    const float apart = mean_n - mean, share = n / (count + n);
    mean = fmaf(apart, share, mean);
    squares += fmaf(apart * apart * count, share, squares_n);
}

template <int W>
__device__ __forceinline__ void moments(const T* x, float* partials, int p, int c, int splits) {
    SMEM_ARRAY(float, shared, 2 * kColumns* W);
    const Place<W> at(c, splits);
    const int first = at.split * kTurns + at.turn, step = splits * kTurns;
    const T* from = x + size_t(at.sample) * p * c + at.column;
    float shift[W], sum[W], squares[W];
    const bool inside = at.column < c;
#pragma unroll
    for (int j = 0; j < W; j++) shift[j] = sum[j] = squares[j] = 0.0f;
    if (inside && first < p) load(shift, from + size_t(first) * c);
    for (int pixel = first; inside && pixel < p; pixel += kBatch * step) {
        float v[kBatch][W];
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
            if (pixel + i * step < p) load(v[i], from + size_t(pixel + i * step) * c);
        }
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
            if (pixel + i * step >= p) continue;
#pragma unroll
            for (int j = 0; j < W; j++) {
                const float apart = v[i][j] - shift[j];
                sum[j] += apart;
                squares[j] = fmaf(apart, apart, squares[j]);
            }
        }
    }
    float* means = shared + at.own;
    const Share share(p, splits);
    int merged = 0;
    for (int turn = 0; turn < kTurns; turn++) {
        const int count = share.of_turn(at.split, turn);
        if (turn == at.turn && count > 0) {
#pragma unroll
            for (int j = 0; j < W; j++) {
                const float mean = shift[j] + sum[j] / float(count);
                const float around = squares[j] - sum[j] * (sum[j] / float(count));
                float all_mean = mean, all_squares = around;
                if (turn) {
                    all_mean = means[j], all_squares = means[kColumns * W + j];
                    merge(float(merged), all_mean, all_squares, float(count), mean, around);
                }
                means[j] = all_mean, means[kColumns * W + j] = all_squares;
            }
        }
        merged += count;
        __syncthreads();
    }
    if (at.turn != 0 || !inside) return;
    float* to = partials + size_t(at.group) * 2 * c + at.column;
#pragma unroll
    for (int j = 0; j < W; j++) to[j] = means[j], to[c + j] = means[kColumns * W + j];
}

// partials: [B·splits][2][C], mean of each channel over the pixels of a block and the sum of squares around it. Each of
// the `splits` has at least one pixel.
extern "C" __global__ void __launch_bounds__(kThreads)
    group_norm_silu_moments(const T* x, float* partials, int p, int c, int splits) {
    moments<8>(x, partials, p, c, splits);
}
KERNEL_EXPORT(group_norm_silu_moments);

extern "C" __global__ void __launch_bounds__(kThreads)
    group_norm_silu_moments_any(const T* x, float* partials, int p, int c, int splits) {
    moments<1>(x, partials, p, c, splits);
}
KERNEL_EXPORT(group_norm_silu_moments_any);

// A block of 4 warps merges what belongs to one group of one sample; or copies the given statistics.
extern "C" __global__ void __launch_bounds__(128)
    group_norm_silu_statistics(const float* partials, const float* stats, float* mean, float* rstd, int p, int c,
                               int groups, int splits, float eps) {
    SMEM_ARRAY(float, shared, 4);
    const int sample = blockIdx.x / groups, group = blockIdx.x % groups, width = c / groups;
    if (stats) {
        if (threadIdx.x == 0) {
            mean[blockIdx.x] = stats[size_t(sample) * 2 * groups + group];
            rstd[blockIdx.x] = stats[(size_t(sample) * 2 + 1) * groups + group];
        }
        return;
    }
    const float* from = partials + size_t(sample) * splits * 2 * c + group * width;
    const float total = float(p) * float(width);
    const Share share(p, splits);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < splits * width; i += 128) {
        const int split = i / width;
        sum = fmaf(float(share.of_block(split)), from[size_t(split) * 2 * c + i % width], sum);
    }
    const float mu = block_sum<4>(sum, shared) / total;
    sum = 0.0f;
    for (int i = threadIdx.x; i < splits * width; i += 128) {
        const int split = i / width;
        const float* of = from + size_t(split) * 2 * c + i % width;
        sum += fmaf(float(share.of_block(split)) * (of[0] - mu), of[0] - mu, of[c]);
    }
    const float variance = block_sum<4>(sum, shared) / total;
    if (threadIdx.x == 0) mean[blockIdx.x] = mu, rstd[blockIdx.x] = rsqrtf(variance + eps);
}
KERNEL_EXPORT(group_norm_silu_statistics);

// Mean, rstd, gamma and beta of a thread's channels.
template <int W> struct Affine {
    float mean[W], rstd[W], gamma[W], beta[W];
    __device__ Affine(const float* means, const float* rstds, const T* gammas, const T* betas, int sample, int column,
                      int c, int groups) {
        load_kept(gamma, gammas + column);
        load_kept(beta, betas + column);
#pragma unroll
        for (int j = 0; j < W; j++) {
            const int at = sample * groups + (column + j) / (c / groups);
            mean[j] = means[at], rstd[j] = rstds[at];
        }
    }
};

template <int W>
__device__ __forceinline__ void normalise(const T* x, const T* gamma, const T* beta, const float* mean,
                                          const float* rstd, T* y, int p, int c, int groups, int blocks, int silu) {
    const Place<W> at(c, blocks);
    if (at.column >= c) return;
    const Affine<W> of(mean, rstd, gamma, beta, at.sample, at.column, c, groups);
    const size_t first = size_t(at.sample) * p * c + at.column;
    float v[kSteps][W];
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
        const int pixel = (at.split * kSteps + i) * kTurns + at.turn;
        if (pixel < p) load(v[i], x + first + size_t(pixel) * c);
    }
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
        const int pixel = (at.split * kSteps + i) * kTurns + at.turn;
        if (pixel >= p) continue;
#pragma unroll
        for (int j = 0; j < W; j++) {
            const float z = fmaf((v[i][j] - of.mean[j]) * of.rstd[j], of.gamma[j], of.beta[j]);
            v[i][j] = silu ? z * sigmoid(z) : z;
        }
        store(y + first + size_t(pixel) * c, v[i]);
    }
}

// blocks: blocks along the pixels, each of kSteps·16.
extern "C" __global__ void __launch_bounds__(kThreads)
    group_norm_silu_forward(const T* x, const T* gamma, const T* beta, const float* mean, const float* rstd, T* y,
                            int p, int c, int groups, int blocks, int silu) {
    normalise<8>(x, gamma, beta, mean, rstd, y, p, c, groups, blocks, silu);
}
KERNEL_EXPORT(group_norm_silu_forward);

extern "C" __global__ void __launch_bounds__(kThreads)
    group_norm_silu_forward_any(const T* x, const T* gamma, const T* beta, const float* mean, const float* rstd, T* y,
                                int p, int c, int groups, int blocks, int silu) {
    normalise<1>(x, gamma, beta, mean, rstd, y, p, c, groups, blocks, silu);
}
KERNEL_EXPORT(group_norm_silu_forward_any);

// From x and dy of one element: n, and u in the place of dy.
template <int W>
__device__ __forceinline__ void through_activation(float (&n)[W], float (&u)[W], const Affine<W>& of, int silu) {
#pragma unroll
    for (int j = 0; j < W; j++) {
        n[j] = (n[j] - of.mean[j]) * of.rstd[j];
        if (silu) {
            const float z = fmaf(n[j], of.gamma[j], of.beta[j]), s = sigmoid(z);
            u[j] *= s * fmaf(z, 1.0f - s, 1.0f);
        }
    }
}

template <int W>
__device__ __forceinline__ void channel_sums(const T* dy, const T* x, const T* gamma, const T* beta, const float* mean,
                                             const float* rstd, float* partials, int p, int c, int groups, int splits,
                                             int silu) {
    SMEM_ARRAY(float, shared, 2 * kColumns* W);
    const Place<W> at(c, splits);
    const int step = splits * kTurns;
    float sum[W], sum_n[W];
#pragma unroll
    for (int j = 0; j < W; j++) sum[j] = sum_n[j] = 0.0f;
    if (at.column < c) {
        const Affine<W> of(mean, rstd, gamma, beta, at.sample, at.column, c, groups);
        const size_t first = size_t(at.sample) * p * c + at.column;
        for (int pixel = at.split * kTurns + at.turn; pixel < p; pixel += kBatch * step) {
            float n[kBatch][W], u[kBatch][W];
#pragma unroll
            for (int i = 0; i < kBatch; i++) {
                if (pixel + i * step >= p) continue;
                load(n[i], x + first + size_t(pixel + i * step) * c);
                load(u[i], dy + first + size_t(pixel + i * step) * c);
            }
#pragma unroll
            for (int i = 0; i < kBatch; i++) {
                if (pixel + i * step >= p) continue;
                through_activation(n[i], u[i], of, silu);
#pragma unroll
                for (int j = 0; j < W; j++) sum[j] += u[i][j], sum_n[j] = fmaf(u[i][j], n[i][j], sum_n[j]);
            }
        }
    }
    float* all = shared + at.own;
    for (int turn = 0; turn < kTurns; turn++) {
        if (turn == at.turn) {
#pragma unroll
            for (int j = 0; j < W; j++) {
                all[j] = sum[j] + (turn ? all[j] : 0.0f);
                all[kColumns * W + j] = sum_n[j] + (turn ? all[kColumns * W + j] : 0.0f);
            }
        }
        __syncthreads();
    }
    if (at.turn != 0 || at.column >= c) return;
    float* to = partials + size_t(at.group) * 2 * c + at.column;
#pragma unroll
    for (int j = 0; j < W; j++) to[j] = all[j], to[c + j] = all[kColumns * W + j];
}

// partials: [B·splits][2][C], the sums of u and of u·n of the pixels of a block.
extern "C" __global__ void __launch_bounds__(kThreads)
    group_norm_silu_backward_sums(const T* dy, const T* x, const T* gamma, const T* beta, const float* mean,
                                  const float* rstd, float* partials, int p, int c, int groups, int splits, int silu) {
    channel_sums<8>(dy, x, gamma, beta, mean, rstd, partials, p, c, groups, splits, silu);
}
KERNEL_EXPORT(group_norm_silu_backward_sums);

extern "C" __global__ void __launch_bounds__(kThreads)
    group_norm_silu_backward_sums_any(const T* dy, const T* x, const T* gamma, const T* beta, const float* mean,
                                      const float* rstd, float* partials, int p, int c, int groups, int splits,
                                      int silu) {
    channel_sums<1>(dy, x, gamma, beta, mean, rstd, partials, p, c, groups, splits, silu);
}
KERNEL_EXPORT(group_norm_silu_backward_sums_any);

// sums: [B][2][C], the partial sums of a sample added.
extern "C" __global__ void __launch_bounds__(kSumThreads)
    group_norm_silu_backward_channels(const float* partials, float* sums, int c, int splits) {
    SMEM_ARRAY(float, shared, kSumThreads);
    const int tiles = (2 * c + 31) / 32, sample = blockIdx.x / tiles;
    const int column = blockIdx.x % tiles * 32 + threadIdx.x % 32;
    const float* first = partials + size_t(sample) * splits * 2 * c + column;
    const float sum = sum_partials(first, splits, size_t(2) * c, column < 2 * c, shared);
    if (threadIdx.x < 32 && column < 2 * c) sums[size_t(sample) * 2 * c + column] = sum;
}
KERNEL_EXPORT(group_norm_silu_backward_channels);

// dgamma and dbeta, either of which may be null; a thread a channel.
extern "C" __global__ void __launch_bounds__(128)
    group_norm_silu_backward_parameters(const float* sums, T* dgamma, T* dbeta, int b, int c) {
    const int column = blockIdx.x * 128 + threadIdx.x;
    if (column >= c) return;
    float sum = 0.0f, sum_n = 0.0f;
    for (int sample = 0; sample < b; sample++) {
        sum += sums[size_t(sample) * 2 * c + column];
        sum_n += sums[(size_t(sample) * 2 + 1) * c + column];
    }
    if (dgamma) dgamma[column] = from_float<T>(sum_n);
    if (dbeta) dbeta[column] = from_float<T>(sum);
}
KERNEL_EXPORT(group_norm_silu_backward_parameters);

// means: [B·G][2], the means of v and of v·n; a warp a group.
extern "C" __global__ void __launch_bounds__(128)
    group_norm_silu_backward_means(const float* sums, const T* gamma, float* means, int total, int p, int c,
                                   int groups) {
    const int at = blockIdx.x * 4 + threadIdx.x / 32, width = c / groups;
    if (at >= total) return;
    const float* from = sums + size_t(at / groups) * 2 * c;
    float sum = 0.0f, sum_n = 0.0f;
    for (int i = threadIdx.x % 32; i < width; i += 32) {
        const int column = at % groups * width + i;
        sum = fmaf(to_float(gamma[column]), from[column], sum);
        sum_n = fmaf(to_float(gamma[column]), from[c + column], sum_n);
    }
    const float count = float(p) * float(width);
    sum = warp_sum(sum) / count, sum_n = warp_sum(sum_n) / count;
    if (threadIdx.x % 32 == 0) means[2 * at] = sum, means[2 * at + 1] = sum_n;
}
KERNEL_EXPORT(group_norm_silu_backward_means);

template <int W>
__device__ __forceinline__ void normalise_backward(const T* dy, const T* x, const T* gamma, const T* beta,
                                                   const float* mean, const float* rstd, const float* means, T* dx,
                                                   int p, int c, int groups, int blocks, int silu) {
    const Place<W> at(c, blocks);
    if (at.column >= c) return;
    const Affine<W> of(mean, rstd, gamma, beta, at.sample, at.column, c, groups);
    float mean_v[W], mean_vn[W];
#pragma unroll
    for (int j = 0; j < W; j++) {
        const int group = at.sample * groups + (at.column + j) / (c / groups);
        mean_v[j] = means ? means[2 * group] : 0.0f, mean_vn[j] = means ? means[2 * group + 1] : 0.0f;
    }
    const size_t first = size_t(at.sample) * p * c + at.column;
#pragma unroll
    for (int half = 0; half < kSteps; half += kBatch) {
        float n[kBatch][W], u[kBatch][W];
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
            const int pixel = (at.split * kSteps + half + i) * kTurns + at.turn;
            if (pixel >= p) continue;
            load(n[i], x + first + size_t(pixel) * c);
            load(u[i], dy + first + size_t(pixel) * c);
        }
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
            const int pixel = (at.split * kSteps + half + i) * kTurns + at.turn;
            if (pixel >= p) continue;
            through_activation(n[i], u[i], of, silu);
#pragma unroll
            for (int j = 0; j < W; j++)
                u[i][j] = of.rstd[j] * (u[i][j] * of.gamma[j] - mean_v[j] - n[i][j] * mean_vn[j]);
            store(dx + first + size_t(pixel) * c, u[i]);
        }
    }
}

// means: null where statistics are given.
extern "C" __global__ void __launch_bounds__(kThreads)
    group_norm_silu_backward(const T* dy, const T* x, const T* gamma, const T* beta, const float* mean,
                             const float* rstd, const float* means, T* dx, int p, int c, int groups, int blocks,
                             int silu) {
    normalise_backward<8>(dy, x, gamma, beta, mean, rstd, means, dx, p, c, groups, blocks, silu);
}
KERNEL_EXPORT(group_norm_silu_backward);

extern "C" __global__ void __launch_bounds__(kThreads)
    group_norm_silu_backward_any(const T* dy, const T* x, const T* gamma, const T* beta, const float* mean,
                                 const float* rstd, const float* means, T* dx, int p, int c, int groups, int blocks,
                                 int silu) {
    normalise_backward<1>(dy, x, gamma, beta, mean, rstd, means, dx, p, c, groups, blocks, silu);
}
KERNEL_EXPORT(group_norm_silu_backward_any);
