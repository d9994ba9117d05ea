// The backward pass of mamba2_mma.cu. By steps of 16 times, with G = C·Bᵀ, V = dy·xᵀ, L the decays of pairs, S the state
// before a step and D the gradient of that after it:
// dx_j = dt_j*(sum_i L_ij G_ij dy_i + end_j D·B_j) + skip*dy_j;  Z_ij = sum of L_ij V_ij dt_j
// dC_i = sum_h (Z·B + cum_i Sᵀ·dy_i);  dB_j = sum_h (Zᵀ·C + end_j dt_j Dᵀ·x_j)
//
// xbc, dxbc: [B, N, H·16 + 128], dy: [B, N, H·16], p, dp: [B, N, W], dt_bias, a_log, skip: [H], bf16; states: [B, H,
// chunks, 16, 64], dstates the same from the last chunk to the first, shares: [groups, B, N, 128], partials: [B·chunks, H,
// 3] f32; sums in f32.
//
// A block of eight warps owns eight heads of a chunk of 64 times, a warp a head. It goes forward over the four steps for
// the state before each, kept packed as the B operand of Sᵀ·dy, then back with D in the accumulators. A pair's gradient
// reaches the step sizes by every path over a decay, counted directly so that nothing cancels: pairs from running sums
// along the rows of L·G·V·dt, reads and writes of the state as products of dC and dB with C and B while they hold nothing
// else, and the state that goes all the way as S·D. dB and dC of the eight heads are added in shared memory in order, those
// of the groups by `shares`.
//
// Bound: arithmetic and shared memory: 58 mma and 38 transpositions a step of a head; memory for x, dy, dx is 450 MB at
// N=16384, B=2, H=144, the states of chunks 1.2 GB and the shares 0.6 GB beside it.
//
// Requires: nothing beyond the contract. Does not handle: other widths, f32 (mamba2.cu takes all).
#include "../common/elementwise.cuh"
#include "walk.cuh"

// A state as the B operand of products over the head's columns: [16][64] by tiles of 8 columns.
__device__ __forceinline__ void turn(uint32_t (&to)[16], const State& state) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        to[2 * j] = movmatrix_trans(pack<bf16>(state[j][0], state[j][1]));
        to[2 * j + 1] = movmatrix_trans(pack<bf16>(state[j][2], state[j][3]));
    }
}

// The A operand of a lower triangle's transpose; its upper right tile is zero.
__device__ __forceinline__ void turn_pairs(uint32_t (&to)[4], const uint32_t (&pairs)[4]) {
    to[0] = movmatrix_trans(pairs[0]), to[1] = 0, to[2] = movmatrix_trans(pairs[1]), to[3] = movmatrix_trans(pairs[3]);
}
__device__ __forceinline__ void pack_pairs(uint32_t (&to)[4], const float (&v)[2][4]) {
    to[0] = pack<bf16>(v[0][0], v[0][1]), to[1] = pack<bf16>(v[0][2], v[0][3]), to[2] = 0;
    to[3] = pack<bf16>(v[1][2], v[1][3]);
}
// Rows g and g + 8 of an A operand by their factors.
__device__ __forceinline__ void scale_rows(uint32_t (&a)[4], float first, float second) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const float by = r % 2 ? second : first;
        a[r] = pack<bf16>(unpack_lo<bf16>(a[r]) * by, unpack_hi<bf16>(a[r]) * by);
    }
}
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(kFullMask, v, 1);
    return v + __shfl_xor_sync(kFullMask, v, 2);
}

// One of the two gradients that heads share, of a step: left·state in `state`'s turned form, its product with `own` by row
// into `along`, then pairs·other, and all of it to `to` [16][128].
__device__ __forceinline__ void share(float* to, float* along, const uint32_t (&left)[4], const uint32_t (&state)[16],
                                      uint32_t own, const uint32_t (&pairs)[4], uint32_t other) {
    const int group = lane_id() / 4, t = lane_id() % 4;
    REG(float, acc, [8][4]);
    clear(acc);
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        mma_m16n8k16<bf16>(acc[2 * k], left, state[4 * k], state[4 * k + 1]);
        mma_m16n8k16<bf16>(acc[2 * k + 1], left, state[4 * k + 2], state[4 * k + 3]);
        uint32_t a[4];
        load_a<Walk::kRowPitch>(a, own + k * 32);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float(&v)[4] = acc[2 * k + r / 2];
            sum[r % 2] = fmaf(unpack_lo<bf16>(a[r]), v[r % 2 * 2], sum[r % 2]);
            sum[r % 2] = fmaf(unpack_hi<bf16>(a[r]), v[r % 2 * 2 + 1], sum[r % 2]);
        }
        uint32_t b[4];
        load_b_pair<Walk::kRowPitch>(b, other + k * 32);
        mma_m16n8k16<bf16>(acc[2 * k], pairs, b[0], b[1]);
        mma_m16n8k16<bf16>(acc[2 * k + 1], pairs, b[2], b[3]);
    }
    sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
    if (t == 0) along[group] = sum[0], along[group + 8] = sum[1];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        *reinterpret_cast<float2*>(to + group * 128 + j * 8 + 2 * t) = make_float2(acc[j][0], acc[j][1]);
        *reinterpret_cast<float2*>(to + (group + 8) * 128 + j * 8 + 2 * t) = make_float2(acc[j][2], acc[j][3]);
    }
}

// What a warp has beside its state: floats of shared memory for the pairs of a step and four rows of 16.
struct Notes {
    static constexpr int kPitch = 17, kFloats = 16 * kPitch + 48;
    float *pairs, *reads, *writes, *of_dt;
    __device__ __forceinline__ Notes(float* at)
        : pairs(at), reads(at + 16 * kPitch), writes(at + 16 * kPitch + 16), of_dt(at + 16 * kPitch + 32) {}
};

// Sums over the times for a head's parameters.
struct HeadSums {
    float raw, log, direct;
};

extern "C" __global__ void __launch_bounds__(256, 1)
    mamba2_mma_backward(const T* dy, const T* xbc, const T* p, const T* dt_bias, const T* a_log, const T* skip,
                        const float* states, const float* dstates, T* dxbc, T* dp, float* shares, float* partials, int b,
                        int n, int w, int h, int dt_offset, int reverse, int chunks) {
    if_bf16<T>([&](auto type) {
        SMEM_DYNAMIC(smem, 16);
        Regions regions = {smem, {}};
        Walk walk(regions, cast(type, xbc), cast(type, xbc), n, h, reverse, 0, chunks, true, 1);
        const uint32_t dys = smem_u32(regions.take(Walk::kValueBytes));
        float* slots = reinterpret_cast<float*>(regions.take(Walk::kHeads * 16 * 128 * 4));
        const Notes notes(reinterpret_cast<float*>(regions.take(Walk::kHeads * Notes::kFloats * 4)) +
                          warp_id() * Notes::kFloats);
        const StepSizes steps = {cast(type, p), cast(type, dt_bias), cast(type, a_log), w, dt_offset};
        const int group = lane_id() / 4, t = lane_id() % 4, head = walk.head();
        const int heads = min(Walk::kHeads, h - walk.group * Walk::kHeads);
        const size_t of_head = (size_t(walk.sample) * h + head) * chunks;
        const bool live = head < h;
        walk.copy<2 * Walk::kHeads>(dys, cast(type, dy) + walk.group * Walk::kHeads * 16, h * 16, 0, 2 * heads);
        walk.start(steps);
        REG(float, state, [8][4]);
        load_state(state, live && chunks > 1 ? states + (of_head + walk.segment) * 16 * 64 : nullptr);
        walk.next(0, steps);
        REG(uint32_t, before, [4][16]);
#pragma unroll
        for (int step = 0; step < 4; step++) {
            turn(before[step], state);
            if (step == 3) break;
            const Step s = walk.step(16 * step);
            const Values v(walk.values_at(0, 16 * step), [&](int j) { return s.write(j); });
            take_up(state, v.weighed, walk.writes_at(0, 16 * step), s.all());
        }
        load_state(state, live && chunks > 1 ? dstates + (of_head + chunks - 1 - walk.segment) * 16 * 64 : nullptr);
        HeadSums sums = {0.0f, 0.0f, 0.0f};
        const float direct = live ? to_float(skip[head]) : 0.0f;
#pragma unroll
        for (int step = 3; step >= 0; step--) {
            const int row = 16 * step;
            if (live) {
                const Step s = walk.step(row);
                const uint32_t xs = walk.values_at(0, row), gs = dys + row * Walk::kValuePitch + warp_id() * 32;
                const uint32_t bs = walk.writes_at(0, row), cs = walk.reads_at(0, row);
                const float* products = walk.pairs(row);
                // Pairs: V first, then what they weigh.
                uint32_t g[4], x[4], weights[4], weighed[4], turned[4];
                REG(float, v, [2][4]);
                REG(float, m, [2][4]);
                REG(float, z, [2][4]);
                load_a<Walk::kValuePitch>(g, gs), load_b_pair_rows<Walk::kValuePitch>(x, xs);
#pragma unroll
                for (int i = 0; i < 8; i++) v[i / 4][i % 4] = 0.0f;
                mma_m16n8k16<bf16>(v[0], g, x[0], x[1]), mma_m16n8k16<bf16>(v[1], g, x[2], x[3]);
#pragma unroll
                for (int r = 0; r < 8; r++) {
                    const int i = group + r / 2 % 2 * 8, j = r / 4 * 8 + 2 * t + r % 2;
                    const float value = v[r / 4][r % 4], decay = j <= i ? s.decay(s.at(i) - s.at(j)) : 0.0f;
                    m[r / 4][r % 4] = products[i * Walk::kPairPitch + j] * decay;
                    z[r / 4][r % 4] = value * decay * s.dt[j];
                    notes.pairs[i * Notes::kPitch + j] = m[r / 4][r % 4] * value * s.dt[j];
                    sums.direct += i == j ? value : 0.0f;
                }
                pack_pairs(weights, m), pack_pairs(weighed, z);
                // dx, and the gradient of dt by way of the writes.
                REG(float, acc, [2][4]);
#pragma unroll
                for (int i = 0; i < 8; i++) acc[i / 4][i % 4] = 0.0f;
                read_state(acc, bs, state);
                const float end[2] = {s.decay(s.sums[16] - s.at(group)), s.decay(s.sums[16] - s.at(group + 8))};
#pragma unroll
                for (int i = 0; i < 8; i++) acc[i / 4][i % 4] *= end[i / 2 % 2];
                uint32_t by[4];
                turn_pairs(turned, weights), load_b_pair<Walk::kValuePitch>(by, gs);
                mma_m16n8k16<bf16>(acc[0], turned, by[0], by[1]), mma_m16n8k16<bf16>(acc[1], turned, by[2], by[3]);
                // The two gradients that the heads share.
                float* slot = slots + warp_id() * 16 * 128;
                uint32_t after[16];
                turn(after, state);
                float whole = 0.0f;
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    whole = fmaf(unpack_lo<bf16>(before[step][i]), unpack_lo<bf16>(after[i]), whole);
                    whole = fmaf(unpack_hi<bf16>(before[step][i]), unpack_hi<bf16>(after[i]), whole);
                }
                whole = warp_sum(whole) * s.all();
                scale_rows(g, s.read(group), s.read(group + 8));
                share(slot + 64, notes.reads, g, before[step], cs, weighed, bs);
                load_a<Walk::kValuePitch>(x, xs);
                scale_rows(x, end[0] * s.dt[group], end[1] * s.dt[group + 8]);
                turn_pairs(turned, weighed);
                share(slot, notes.writes, x, after, bs, turned, cs);
                const Values back(gs, [&](int i) { return s.read(i); });
                take_up(state, back.weighed, cs, s.all());
                __syncwarp();
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int at = group + 8 * half;
                    float sum = 0.0f;
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const int cell = at * Walk::kValuePitch + (j * 8 + 2 * t) * 2;
                        const uint32_t own = ld_shared_u32(xs + cell), from = ld_shared_u32(gs + cell);
                        const float lo = acc[j][2 * half], hi = acc[j][2 * half + 1];
                        sum = fmaf(unpack_lo<bf16>(own), lo, fmaf(unpack_hi<bf16>(own), hi, sum));
                        st_shared_u32(xs + cell, pack<bf16>(fmaf(direct, unpack_lo<bf16>(from), s.dt[at] * lo),
                                                            fmaf(direct, unpack_hi<bf16>(from), s.dt[at] * hi)));
                    }
                    sum = quad_sum(sum);
                    if (t == 0) notes.of_dt[at] = sum;
                }
                // Each pair becomes the sum of those of earlier writes to the same read.
                if (lane_id() < 16) {
                    float sum = 0.0f;
                    for (int j = 0; j < 16; j++) {
                        float* pair = notes.pairs + lane_id() * Notes::kPitch + j;
                        const float own = *pair;
                        *pair = sum, sum += own;
                    }
                }
                __syncwarp();
                const int i = lane_id(), time = walk.time(0, row + i);
                if (i < 16 && walk.live(time)) {
                    float of_decay = whole;
                    for (int to = i; to < 16; to++) of_decay += notes.pairs[to * Notes::kPitch + i] + notes.reads[to];
                    for (int from = 0; from < i; from++) of_decay += notes.writes[from];
                    // The slope of softplus is 1 - exp(-softplus).
                    const float raw = fmaf(of_decay, walk.rate, notes.of_dt[i]) * -expm1f(-s.dt[i]);
                    sums.raw += raw, sums.log += of_decay * walk.rate * s.dt[i];
                    if (dp) dp[walk.token(time) * w + dt_offset + head] = from_float<T>(raw);
                }
                __syncwarp();
            }
            __syncthreads();
            for (int i = threadIdx.x; i < 16 * 128; i += 256) {
                float sum = 0.0f;
                for (int of = 0; of < heads; of++) sum += slots[of * 16 * 128 + i];
                const int time = walk.time(0, row + i / 128);
                if (walk.live(time)) shares[(size_t(walk.group) * b * n + walk.token(time)) * 128 + i % 128] = sum;
            }
            __syncthreads();
        }
        if (dxbc) walk.store(0, cast(type, dxbc), walk.row_stride);
        cp_async_wait<0>();
        sums.raw = warp_sum(sums.raw), sums.log = warp_sum(sums.log), sums.direct = warp_sum(sums.direct);
        if (live && lane_id() == 0) {
            float* to = partials + 3 * ((size_t(walk.sample) * chunks + walk.segment) * h + head);
            to[0] = sums.raw, to[1] = sums.log, to[2] = sums.direct;
        }
    });
}
KERNEL_EXPORT(mamba2_mma_backward);

// The columns of B and C of dxbc: the shares of the groups of heads in order.
extern "C" __global__ void __launch_bounds__(256)
    mamba2_mma_shares(const float* shares, T* dxbc, uint64_t rows, int h, int groups) {
    for (size_t i = grid_thread(); i < rows * 128; i += grid_threads()) {
        float sum = 0.0f;
        for (int g = 0; g < groups; g++) sum += shares[size_t(g) * rows * 128 + i];
        dxbc[i / 128 * (size_t(h) * 16 + 128) + size_t(h) * 16 + i % 128] = from_float<T>(sum);
    }
}
KERNEL_EXPORT(mamba2_mma_shares);
