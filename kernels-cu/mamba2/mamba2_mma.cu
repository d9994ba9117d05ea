// The formulas of mamba2.cu on the tensor cores, for heads of 16 columns and a state of 64 in bf16.
//
// xbc, dxbc: [B, N, H·16 + 128], p: [B, N, W], dt_bias, a_log, skip: [H], residual, y, dy: [B, N, H·16], bf16; states: [B,
// H, segments, 16, 64], decays: [B, H, segments] f32; sums in f32.
//
// A block of eight warps owns eight heads of a segment of the times, a warp a head, and walks over it by 16 times with the
// state in the accumulators of its warp, where it is the B operand of the next product as it lies: packed to bf16, it
// gives what each time reads of the state (C·S); the 16 pairs within the step weigh x directly, C·Bᵀ of the step computed
// once for all heads; then the step's x·B is added to the state. So no decay is factored over more than 16 times, only
// pairs of one step need an exponential each, and 18 mma take 16 times of a head; chunks of 64 with their pairs take 21.
// Step sizes come from p in every pass. `states` walks over the segments but the last for what each adds to the state,
// `mamba2_scan` goes over them, `walk` gives the results: two readings of x, none of what the state was in between.
//
// With `back` both walk from the last time to the first for the gradients of x: dy is the values, C is written and B read,
// a time's own decay belongs to its write and not to its read, and the result is weighed by dt where forward the write is.
//
// Bound: memory, 2·(3·16·H + 256) bytes a time and p: 490 MB forward at N=16384, B=2, H=144, 114 µs at 4.3 TB/s; a step of
// a head is 26 mma in both passes together, 58 µs at 60 % of the rate of wgmma, and 14 exponentials a lane.
//
// Requires: nothing beyond the contract. Does not handle: other widths, f32 (mamba2.cu takes all).
#include "walk.cuh"

// One warp's 16x64 state: tiles of 8 columns.
using State = float[8][4];

// state = decay·state + valuesᵀ·rows of the step, `values` with their weights.
__device__ __forceinline__ void take_up(State& state, const uint32_t (&values)[4], uint32_t rows, float decay) {
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
        uint32_t b[4];
        load_b_pair<Walk::kRowPitch>(b, rows + pair * 32);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float(&to)[4] = state[2 * pair + j];
            to[0] *= decay, to[1] *= decay, to[2] *= decay, to[3] *= decay;
            mma_m16n8k16<bf16>(to, values, b[2 * j], b[2 * j + 1]);
        }
    }
}

// The values of a step of the head as they lie, and with the weights of their writes.
struct Values {
    uint32_t raw[4], weighed[4];
    __device__ __forceinline__ Values(uint32_t tile, const Step& s) {
        load_a_trans<Walk::kValuePitch>(raw, tile);
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const int at = 2 * (lane_id() % 4) + 8 * upper;
            const float lo = s.write(at), hi = s.write(at + 1);
#pragma unroll
            for (int r = 2 * upper; r < 2 * upper + 2; r++)
                weighed[r] = pack<bf16>(unpack_lo<bf16>(raw[r]) * lo, unpack_hi<bf16>(raw[r]) * hi);
        }
    }
};

extern "C" __global__ void __launch_bounds__(256, 2)
    mamba2_mma_states(const T* values, const T* xbc, const T* p, const T* dt_bias, const T* a_log, float* states,
                      float* decays, int n, int w, int h, int dt_offset, int reverse, int back, int segments) {
    if_bf16<T>([&](auto b) {
        SMEM_DYNAMIC(smem, 16);
        Walk walk(smem, cast(b, values), cast(b, xbc), n, h, reverse, back, segments, false);
        const StepSizes steps = {cast(b, p), cast(b, dt_bias), cast(b, a_log), w, dt_offset};
        // Nobody asks for the state after the last segment.
        if (walk.segment + 1 == segments) return;
        const size_t index = (size_t(walk.sample) * h + walk.head()) * segments + walk.segment;
        REG(float, state, [8][4]);
        clear(state);
        double passed = 0.0;
        walk.start(steps);
        for (int stage = 0; stage < walk.stages; stage++) {
            walk.next(stage, steps);
            if (walk.head() < h) {
                for (int row = 0; row < Walk::kTimes; row += 16) {
                    const Step s = walk.step(row);
                    const Values v(walk.values_at(stage, row), s);
                    take_up(state, v.weighed, walk.writes_at(stage, row), s.all());
                    passed += s.sums[16];
                }
            }
        }
        cp_async_wait<0>();
        if (walk.head() >= h) return;
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int row = lane_id() / 4 + r / 2 * 8, column = j * 8 + 2 * (lane_id() % 4) + r % 2;
                states[(index * 16 + row) * 64 + column] = state[j][r];
            }
        }
        if (lane_id() == 0) decays[index] = expf(walk.rate * float(passed));
    });
}
KERNEL_EXPORT(mamba2_mma_states);

extern "C" __global__ void __launch_bounds__(256, 2)
    mamba2_mma_walk(const T* values, const T* xbc, const T* p, const T* dt_bias, const T* a_log, const T* skip,
                    const T* residual, const float* states, T* y, int n, int w, int h, int dt_offset, int reverse, int back,
                    int segments) {
    if_bf16<T>([&](auto b) {
        SMEM_DYNAMIC(smem, 16);
        Walk walk(smem, cast(b, values), cast(b, xbc), n, h, reverse, back, segments, true);
        const StepSizes steps = {cast(b, p), cast(b, dt_bias), cast(b, a_log), w, dt_offset};
        const int group = lane_id() / 4, t = lane_id() % 4, head = walk.head();
        REG(float, state, [8][4]);
        clear(state);
        float direct = 0.0f;
        if (head < h) direct = to_float(skip[head]);
        // Absent where there is one segment.
        if (head < h && states) {
            const float* from = states + ((size_t(walk.sample) * h + head) * segments + walk.segment) * 16 * 64;
#pragma unroll
            for (int j = 0; j < 8; j++) {
#pragma unroll
                for (int r = 0; r < 4; r++) state[j][r] = from[(group + r / 2 * 8) * 64 + j * 8 + 2 * t + r % 2];
            }
        }
        // Rows of the result: as long as those of y forward, as those of xbc backward.
        const int stride = back ? h * 16 + 128 : h * 16;
        walk.start(steps);
        for (int stage = 0; stage < walk.stages; stage++) {
            walk.next(stage, steps);
            for (int row = 0; row < Walk::kTimes && head < h; row += 16) {
                const Step s = walk.step(row);
                const uint32_t tile = walk.values_at(stage, row), reads = walk.reads_at(stage, row);
                const Values v(tile, s);
                REG(float, acc, [2][4]);
#pragma unroll
                for (int i = 0; i < 8; i++) acc[i / 4][i % 4] = 0.0f;
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    uint32_t a[4];
                    load_a<Walk::kRowPitch>(a, reads + k * 32);
                    const float(&x)[4] = state[2 * k], (&z)[4] = state[2 * k + 1];
                    mma_m16n8k16<bf16>(acc[0], a, pack<bf16>(x[0], x[1]), pack<bf16>(z[0], z[1]));
                    mma_m16n8k16<bf16>(acc[1], a, pack<bf16>(x[2], x[3]), pack<bf16>(z[2], z[3]));
                }
                const float since[2] = {s.read(group), s.read(group + 8)};
#pragma unroll
                for (int i = 0; i < 8; i++) acc[i / 4][i % 4] *= since[i / 2 % 2];
                const float* pairs = walk.pairs(row);
                const uint32_t weights[4] = {s.pair(pairs, group, 2 * t), s.pair(pairs, group + 8, 2 * t), 0,
                                             s.pair(pairs, group + 8, 2 * t + 8)};
                mma_m16n8k16<bf16>(acc[0], weights, v.raw[0], v.raw[2]);
                mma_m16n8k16<bf16>(acc[1], weights, v.raw[1], v.raw[3]);
                take_up(state, v.weighed, walk.writes_at(stage, row), s.all());
                // The values are in registers: the result takes their place.
                __syncwarp();
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int at = group + 8 * half, time = walk.time(stage, row + at);
                    const float weight = back ? s.dt[at] : 1.0f;
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const uint32_t cell = tile + at * Walk::kValuePitch + (j * 8 + 2 * t) * 2;
                        const uint32_t own = ld_shared_u32(cell);
                        float lo = fmaf(direct, unpack_lo<bf16>(own), weight * acc[j][2 * half]);
                        float hi = fmaf(direct, unpack_hi<bf16>(own), weight * acc[j][2 * half + 1]);
                        if (residual && time < walk.end) {
                            const T* more = residual + walk.token(time) * h * 16 + head * 16 + j * 8 + 2 * t;
                            lo += to_float(more[0]), hi += to_float(more[1]);
                        }
                        st_shared_u32(cell, pack<bf16>(lo, hi));
                    }
                }
            }
            __syncthreads();
            walk.store(stage, cast(b, y), stride);
        }
        cp_async_wait<0>();
    });
}
KERNEL_EXPORT(mamba2_mma_walk);
