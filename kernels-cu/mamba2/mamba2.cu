// dt[b,t,h] = softplus(p[b,t,dt_offset + h] + dt_bias[h]);  a = exp(-exp(a_log[h])*dt)
// S_t[e,k] = a*S_{t-1}[e,k] + dt*x[e]*Bt[k];  y[b,t,h,e] = sum_k S_t[e,k]*Ct[k] + skip[h]*x[e] + residual
// Backward: D_t is the gradient of the state, from the last time to the first, and follows by the chain rule.
//
// xbc, dxbc: [B, N, H·E + 2K], p, dp: [B, N, W], dt_bias, a_log, skip: [H], residual, y, dy: [B, N, H·E], all T; dt: [B, H,
// N], states, dstates: [B, H, chunks, E, K], decays: [B, H, chunks], partials: [B·chunks, H, 3] f32; sums in f32.
//
// Version 1, CUDA cores, the first rung. By chunks of 64 times (`scan.cuh`): what each chunk adds to the state, a scan
// over the chunks (a thread an element of the state), then results from the state before the chunk and the pairs within
// it, as tile products by blocks of 128 threads. Backward the same the other way: `dstates` holds the gradient of the
// state after each chunk. dB and dC are sums over heads: a block goes through the heads of a chunk in order, so that
// nothing is added by atomics; sums over times go by chunks, which a last kernel adds in order.
//
// Bound: arithmetic, 2·(2K + 64) operations a value of x forward; and 8·E·K bytes a chunk and head of states, written and
// read twice, at E=16, K=64 as much as 128 bytes a value: chunks that stay on one multiprocessor are the next rung.
//
// Requires: nothing beyond the contract: any N, E, K. Does not handle: strides, groups of B and C.
#include "../common/elementwise.cuh"
#include "scan.cuh"

#define CHUNK_TILES                                                                                          \
    SMEM_ARRAY(float4, a_tile, Pairs::kSizeA);                                                               \
    SMEM_ARRAY(float4, b_tile, Pairs::kSizeB);                                                               \
    SMEM_ARRAY(float, step_sizes, kChunk);                                                                   \
    SMEM_ARRAY(double, step_sums, kChunk);                                                                   \
    float *a = reinterpret_cast<float*>(a_tile), *b = reinterpret_cast<float*>(b_tile)

// Beyond 20 softplus is the identity to f32; log1p keeps the digits of small ones.
__device__ __forceinline__ float softplus(float v) { return fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v))); }
__device__ __forceinline__ float rate_of(const T* a_log, int head) { return -expf(to_float(a_log[head])); }

extern "C" __global__ void __launch_bounds__(256)
    mamba2_steps(const T* p, const T* dt_bias, float* dt, int b, int n, int w, int h, int dt_offset, int reverse) {
    const Call call = {n, h, 0, 0, reverse};
    for (size_t i = grid_thread(); i < size_t(b) * n * h; i += grid_threads()) {
        const int head = int(i % h), time = int(i / h % n), sample = int(i / h / n);
        const float raw = to_float(p[call.row(sample, time) * w + dt_offset + head]) + to_float(dt_bias[head]);
        dt[(size_t(sample) * h + head) * n + time] = softplus(raw);
    }
}
KERNEL_EXPORT(mamba2_steps);

// What each chunk adds to the state, and its whole decay.
extern "C" __global__ void __launch_bounds__(128, 4)
    mamba2_states(const T* xbc, const T* a_log, const float* dt, float* states, float* decays, int n, int h, int e, int k,
                  int reverse) {
    CHUNK_TILES;
    const Chunk at = chunk_of_block({n, h, e, k, reverse});
    const Steps s = {step_sizes, step_sums, rate_of(a_log, at.head)};
    load_steps(s, dt, at);
    if (threadIdx.x == 0 && blockIdx.y == 0) decays[at.index()] = s.cum(kChunk - 1);
    outer(
        states + at.index() * e * k, a, b, at, [&](int j, int row) { return s.end(j) * s.dt[j] * at.x(xbc, j, row); },
        [&](int j, int column) { return at.b(xbc, j, column); });
}
KERNEL_EXPORT(mamba2_states);

// In place: what each chunk adds becomes the state before it, or with `back` the gradient of the state after it.
extern "C" __global__ void __launch_bounds__(128)
    mamba2_scan(float* states, const float* decays, uint64_t count, int chunks, int each, int back) {
    for (size_t i = grid_thread(); i < count; i += grid_threads()) {
        const size_t head = i / each, start = head * chunks;
        float state = 0.0f;
        for (int c = 0; c < chunks; c++) {
            const size_t chunk = start + (back ? chunks - 1 - c : c), at = chunk * each + i % each;
            const float added = states[at];
            states[at] = state;
            state = fmaf(decays[chunk], state, added);
        }
    }
}
KERNEL_EXPORT(mamba2_scan);

// Columns 32·blockIdx.y and on of a head.
extern "C" __global__ void __launch_bounds__(128, 4)
    mamba2_forward(const T* xbc, const T* a_log, const T* skip, const T* residual, const float* dt, const float* states,
                   T* y, int n, int h, int e, int k, int reverse) {
    CHUNK_TILES;
    SMEM_ARRAY(float4, weight_tile, kSizeWeights);
    SMEM_ARRAY(float4, value_tile, kSizeValues);
    float *weights = reinterpret_cast<float*>(weight_tile), *values = reinterpret_cast<float*>(value_tile);
    const Chunk at = chunk_of_block({n, h, e, k, reverse});
    const Steps s = {step_sizes, step_sums, rate_of(a_log, at.head)};
    const float* state = states + at.index() * e * k;
    const int column0 = int(blockIdx.y) * 32;
    load_steps(s, dt, at);
    REG(float, acc, [4][4]);
    Pairs::clear(acc);
    for (int first = 0; first < at.live; first += 32) {
        float g[4][4];
        Pairs::clear(g);
        tile_product<Pairs, true, true>(
            g, a, b, 0, k, [&](int i, int d) { return at.c(xbc, i, d); },
            [&](int j, int d) { return at.b(xbc, first + j, d); });
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int to = Pairs::row(i), from = first + Pairs::column(j);
                g[i][j] = from <= to ? g[i][j] * s.decay(from, to) * s.dt[from] : 0.0f;
            }
        }
        put_weights(weights, g);
        weigh_times(acc, weights, values, first,
                    [&](int j, int c) { return column0 + c < e ? at.x(xbc, j, column0 + c) : 0.0f; });
    }
    tile_product<Pairs, true, true>(
        acc, a, b, 0, k, [&](int i, int d) { return s.cum(i) * at.c(xbc, i, d); },
        [&](int j, int d) { return column0 + j < e ? state[size_t(column0 + j) * k + d] : 0.0f; });
    const float direct = to_float(skip[at.head]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int time = Pairs::row(i), column = column0 + Pairs::column(j);
            if (time >= at.live || column >= e) continue;
            const size_t to = at.out(time, column);
            const float v = fmaf(direct, at.x(xbc, time, column), acc[i][j]);
            y[to] = from_float<T>(residual ? v + to_float(residual[to]) : v);
        }
    }
}
KERNEL_EXPORT(mamba2_forward);

// What each chunk adds to the gradient of the state before it.
extern "C" __global__ void __launch_bounds__(128, 4)
    mamba2_backward_states(const T* dy, const T* xbc, const T* a_log, const float* dt, float* dstates, int n, int h,
                           int e, int k, int reverse) {
    CHUNK_TILES;
    const Chunk at = chunk_of_block({n, h, e, k, reverse});
    const Steps s = {step_sizes, step_sums, rate_of(a_log, at.head)};
    load_steps(s, dt, at);
    outer(
        dstates + at.index() * e * k, a, b, at, [&](int i, int row) { return s.cum(i) * at.y(dy, i, row); },
        [&](int i, int column) { return at.c(xbc, i, column); });
}
KERNEL_EXPORT(mamba2_backward_states);

// dx_j = dt_j*(sum_{i >= j} L_ij (C_i·B_j) dy_i + end_j dS·B_j) + skip*dy_j
extern "C" __global__ void __launch_bounds__(128, 4)
    mamba2_backward_x(const T* dy, const T* xbc, const T* a_log, const T* skip, const float* dt, const float* dstates,
                      T* dxbc, int n, int h, int e, int k, int reverse) {
    CHUNK_TILES;
    SMEM_ARRAY(float4, weight_tile, kSizeWeights);
    SMEM_ARRAY(float4, value_tile, kSizeValues);
    float *weights = reinterpret_cast<float*>(weight_tile), *values = reinterpret_cast<float*>(value_tile);
    const Chunk at = chunk_of_block({n, h, e, k, reverse});
    const Steps s = {step_sizes, step_sums, rate_of(a_log, at.head)};
    const float* dstate = dstates + at.index() * e * k;
    const int column0 = int(blockIdx.y) * 32;
    load_steps(s, dt, at);
    REG(float, acc, [4][4]);
    Pairs::clear(acc);
    for (int first = 0; first < at.live; first += 32) {
        float g[4][4];
        Pairs::clear(g);
        tile_product<Pairs, true, true>(
            g, a, b, 0, k, [&](int j, int d) { return at.b(xbc, j, d); },
            [&](int i, int d) { return at.c(xbc, first + i, d); });
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int from = Pairs::row(i), to = first + Pairs::column(j);
                g[i][j] = from <= to ? g[i][j] * s.decay(from, to) : 0.0f;
            }
        }
        put_weights(weights, g);
        weigh_times(acc, weights, values, first,
                    [&](int i, int c) { return column0 + c < e ? at.y(dy, i, column0 + c) : 0.0f; });
    }
    tile_product<Pairs, true, true>(
        acc, a, b, 0, k, [&](int j, int d) { return s.end(j) * at.b(xbc, j, d); },
        [&](int c, int d) { return column0 + c < e ? dstate[size_t(column0 + c) * k + d] : 0.0f; });
    const float direct = to_float(skip[at.head]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int time = Pairs::row(i), column = column0 + Pairs::column(j);
            if (time >= at.live || column >= e) continue;
            const float v = fmaf(direct, at.y(dy, time, column), s.dt[time] * acc[i][j]);
            dxbc[at.call.row(at.sample, at.first + time) * at.call.width() + at.head * e + column] = from_float<T>(v);
        }
    }
}
KERNEL_EXPORT(mamba2_backward_x);

// A sum over the state's columns and the head's width for each time: to[i] = sum_e (left_i·state[e])*right(i, e).
template <class L, class R>
__device__ __forceinline__ void through_state(float* to, float* a, float* b, const float* state, int e, int k, L left,
                                              R right) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int column0 = 0; column0 < e; column0 += 32) {
        float acc[4][4];
        Pairs::clear(acc);
        tile_product<Pairs, true, true>(acc, a, b, 0, k, left, [&](int c, int d) {
            return column0 + c < e ? state[size_t(column0 + c) * k + d] : 0.0f;
        });
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = column0 + Pairs::column(j);
                if (column < e) sum[i] = fmaf(acc[i][j], right(Pairs::row(i), column), sum[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float total = row_sum(sum[i]);
        if (threadIdx.x % 8 == 0) to[Pairs::row(i)] = total;
    }
}

// The gradients of the step sizes, into their columns of dp, and the chunk's part of those of dt_bias, a_log and skip.
// With M_ij = L_ij (C_i·B_j)(dy_i·x_j), j <= i: the gradient of dt_j is sum_i M_ij + end_j x_j·dS·B_j, and that of ln a_t
// every path over the decay of t: pairs j < t <= i, reads of the state before the chunk at i >= t, writes at j < t to the
// state after it, and the state that goes all the way.
extern "C" __global__ void __launch_bounds__(128, 3)
    mamba2_backward_steps(const T* dy, const T* xbc, const T* p, const T* dt_bias, const T* a_log, const float* dt,
                          const float* states, const float* dstates, T* dp, float* partials, int n, int w, int h, int e,
                          int k, int dt_offset, int reverse) {
    CHUNK_TILES;
    SMEM_ARRAY(float4, pair_tile, 2 * kSizeWeights);
    SMEM_ARRAY(float, reads, kChunk);
    SMEM_ARRAY(float, writes, kChunk);
    SMEM_ARRAY(float, warps, 4);
    float* pairs = reinterpret_cast<float*>(pair_tile);
    const Chunk at = chunk_of_block({n, h, e, k, reverse});
    const Steps s = {step_sizes, step_sums, rate_of(a_log, at.head)};
    const float *state = states + at.index() * e * k, *dstate = dstates + at.index() * e * k;
    load_steps(s, dt, at);
    for (int first = 0; first < kChunk; first += 32) {
        float g[4][4], v[4][4];
        Pairs::clear(g), Pairs::clear(v);
        tile_product<Pairs, true, true>(
            g, a, b, 0, k, [&](int i, int d) { return at.c(xbc, i, d); },
            [&](int j, int d) { return at.b(xbc, first + j, d); });
        tile_product<Pairs, true, true>(
            v, a, b, 0, e, [&](int i, int d) { return at.y(dy, i, d); },
            [&](int j, int d) { return at.x(xbc, first + j, d); });
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int to = Pairs::row(i), from = first + Pairs::column(j);
                g[i][j] = from <= to ? g[i][j] * v[i][j] * s.decay(from, to) : 0.0f;
            }
        }
        put_weights(pairs + first * (kRowTile + 4), g);
    }
    through_state(
        reads, a, b, state, e, k, [&](int i, int d) { return at.c(xbc, i, d); },
        [&](int i, int c) { return at.y(dy, i, c); });
    through_state(
        writes, a, b, dstate, e, k, [&](int j, int d) { return at.b(xbc, j, d); },
        [&](int j, int c) { return at.x(xbc, j, c); });
    float whole = 0.0f, direct = 0.0f;
    for (int i = threadIdx.x; i < e * k; i += 128) whole = fmaf(state[i], dstate[i], whole);
    for (int i = threadIdx.x; i < at.live * e; i += 128)
        direct = fmaf(at.x(xbc, i / e, i % e), at.y(dy, i / e, i % e), direct);
    whole = block_sum<4>(whole, warps) * s.cum(kChunk - 1), direct = block_sum<4>(direct, warps);
    const int t = threadIdx.x;
    float of_dt = 0.0f, of_decay = whole;
    if (t < kChunk) {
        reads[t] *= s.cum(t), writes[t] *= s.end(t);
        of_dt = writes[t];
        for (int i = t; i < kChunk; i++) of_dt += pairs[t * (kRowTile + 4) + i];
    }
    __syncthreads();
    // Each pair becomes the sum of those of earlier writes to the same read.
    if (t < kChunk) {
        float sum = 0.0f;
        for (int j = 0; j < kChunk; j++) {
            float* pair = pairs + j * (kRowTile + 4) + t;
            const float own = *pair * s.dt[j];
            *pair = sum, sum += own;
        }
    }
    __syncthreads();
    float d_raw = 0.0f, d_log = 0.0f;
    if (t < at.live) {
        for (int i = t; i < kChunk; i++) of_decay += pairs[t * (kRowTile + 4) + i] + reads[i];
        for (int j = 0; j < t; j++) of_decay = fmaf(writes[j], s.dt[j], of_decay);
        const size_t column = at.call.row(at.sample, at.first + t) * w + dt_offset + at.head;
        const float raw = to_float(p[column]) + to_float(dt_bias[at.head]);
        d_raw = fmaf(of_decay, s.rate, of_dt) / (1.0f + expf(-raw));
        d_log = of_decay * s.rate * s.dt[t];
        if (dp) dp[column] = from_float<T>(d_raw);
    }
    d_raw = block_sum<4>(d_raw, warps), d_log = block_sum<4>(d_log, warps);
    if (t == 0) {
        float* to = partials + 3 * ((size_t(at.sample) * at.call.chunks() + at.chunk) * h + at.head);
        to[0] = d_raw, to[1] = d_log, to[2] = direct;
    }
}
KERNEL_EXPORT(mamba2_backward_steps);

extern "C" __global__ void __launch_bounds__(128)
    mamba2_backward_heads(const float* partials, T* ddt_bias, T* da_log, T* dskip, int h, int parts) {
    for (size_t head = grid_thread(); head < size_t(h); head += grid_threads()) {
        float sums[3] = {0.0f, 0.0f, 0.0f};
        for (int part = 0; part < parts; part++) {
            const float* from = partials + 3 * (size_t(part) * h + head);
            sums[0] += from[0], sums[1] += from[1], sums[2] += from[2];
        }
        if (ddt_bias) ddt_bias[head] = from_float<T>(sums[0]);
        if (da_log) da_log[head] = from_float<T>(sums[1]);
        if (dskip) dskip[head] = from_float<T>(sums[2]);
    }
}
KERNEL_EXPORT(mamba2_backward_heads);

// Columns 32·blockIdx.y and on of dB and dC of a chunk, over the heads in order: with Z_ij = sum_h L_ij dt_j (dy_i·x_j),
// dC_i = sum_j Z_ij B_j + sum_h cum_i Sᵀ·dy_i, dB_j = sum_i Z_ij C_i + sum_h end_j dt_j dSᵀ·x_j.
extern "C" __global__ void __launch_bounds__(128, 3)
    mamba2_backward_bc(const T* dy, const T* xbc, const T* a_log, const float* dt, const float* states,
                       const float* dstates, T* dxbc, int n, int h, int e, int k, int reverse) {
    CHUNK_TILES;
    SMEM_ARRAY(float4, pair_tile, 2 * kSizeWeights);
    SMEM_ARRAY(float4, value_tile, kSizeValues);
    float *pairs = reinterpret_cast<float*>(pair_tile), *values = reinterpret_cast<float*>(value_tile);
    const Call call = {n, h, e, k, reverse};
    const int column0 = int(blockIdx.y) * 32, chunks = call.chunks(), first = int(blockIdx.x) % chunks * kChunk;
    Chunk at = {call, int(blockIdx.x) / chunks, 0, int(blockIdx.x) % chunks, first, min(kChunk, n - first)};
    REG(float, z, [2][4][4]);
    REG(float, to_b, [4][4]);
    REG(float, to_c, [4][4]);
    Pairs::clear(z[0]), Pairs::clear(z[1]), Pairs::clear(to_b), Pairs::clear(to_c);
    for (; at.head < h; at.head++) {
        const Steps s = {step_sizes, step_sums, rate_of(a_log, at.head)};
        const float *state = states + at.index() * e * k, *dstate = dstates + at.index() * e * k;
        load_steps(s, dt, at);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float v[4][4];
            Pairs::clear(v);
            tile_product<Pairs, true, true>(
                v, a, b, 0, e, [&](int i, int d) { return at.y(dy, i, d); },
                [&](int j, int d) { return at.x(xbc, 32 * half + j, d); });
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int to = Pairs::row(i), from = 32 * half + Pairs::column(j);
                    if (from <= to) z[half][i][j] = fmaf(v[i][j] * s.dt[from], s.decay(from, to), z[half][i][j]);
                }
            }
        }
        tile_product<Pairs, true, false>(
            to_c, a, b, 0, e, [&](int i, int d) { return s.cum(i) * at.y(dy, i, d); },
            [&](int c, int d) { return column0 + c < k ? state[size_t(d) * k + column0 + c] : 0.0f; });
        tile_product<Pairs, true, false>(
            to_b, a, b, 0, e, [&](int j, int d) { return s.end(j) * s.dt[j] * at.x(xbc, j, d); },
            [&](int c, int d) { return column0 + c < k ? dstate[size_t(d) * k + column0 + c] : 0.0f; });
    }
    put_weights(pairs, z[0]), put_weights(pairs + 32 * (kRowTile + 4), z[1]);
#pragma unroll
    for (int half = 0; half < 2; half++)
        weigh_times(to_c, pairs + 32 * half * (kRowTile + 4), values, 32 * half,
                    [&](int j, int c) { return column0 + c < k ? at.b(xbc, j, column0 + c) : 0.0f; });
    __syncthreads();
    // The other way round: [i][j].
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            *reinterpret_cast<float4*>(pairs + Pairs::row(i) * (kRowTile + 4) + 32 * half + Pairs::column(0)) =
                make_float4(z[half][i][0], z[half][i][1], z[half][i][2], z[half][i][3]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
        weigh_times(to_b, pairs + 32 * half * (kRowTile + 4), values, 32 * half,
                    [&](int i, int c) { return column0 + c < k ? at.c(xbc, i, column0 + c) : 0.0f; });
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int time = Pairs::row(i), column = column0 + Pairs::column(j);
            if (time >= at.live || column >= k) continue;
            T* to = dxbc + call.row(at.sample, first + time) * call.width() + size_t(h) * e + column;
            to[0] = from_float<T>(to_b[i][j]), to[k] = from_float<T>(to_c[i][j]);
        }
    }
}
KERNEL_EXPORT(mamba2_backward_bc);
