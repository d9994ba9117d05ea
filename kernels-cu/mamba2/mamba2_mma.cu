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
// With `back`, `states` walks from the last time to the first for the gradient of the state (mamba2_mma_backward.cu): dy is
// the values and C is what is written, and a time's own decay belongs to its write.
//
// Bound: memory, 2·(3·16·H + 256) bytes a time and p: 490 MB forward at N=16384, B=2, H=144, 114 µs at 4.3 TB/s; a step of
// a head is 26 mma in both passes together, 58 µs at 60 % of the rate of wgmma, and 14 exponentials a lane.
//
// Requires: nothing beyond the contract. Does not handle: other widths, f32 (mamba2.cu takes all).
#include "walk.cuh"

extern "C" __global__ void __launch_bounds__(256, 2)
    mamba2_mma_states(const T* values, const T* xbc, const T* p, const T* dt_bias, const T* a_log, float* states,
                      float* decays, int n, int w, int h, int dt_offset, int reverse, int back, int segments) {
    if_bf16<T>([&](auto b) {
        SMEM_DYNAMIC(smem, 16);
        Regions regions = {smem, {}};
        Walk walk(regions, cast(b, values), cast(b, xbc), n, h, reverse, back, segments, false, 2);
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
                    const Values v(walk.values_at(stage, row), [&](int j) { return s.write(j); });
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
    mamba2_mma_walk(const T* xbc, const T* p, const T* dt_bias, const T* a_log, const T* skip, const T* residual,
                    const float* states, T* y, int n, int w, int h, int dt_offset, int reverse, int segments) {
    if_bf16<T>([&](auto b) {
        SMEM_DYNAMIC(smem, 16);
        Regions regions = {smem, {}};
        Walk walk(regions, cast(b, xbc), cast(b, xbc), n, h, reverse, 0, segments, true, 2);
        const StepSizes steps = {cast(b, p), cast(b, dt_bias), cast(b, a_log), w, dt_offset};
        const int group = lane_id() / 4, t = lane_id() % 4, head = walk.head();
        const size_t index = (size_t(walk.sample) * h + head) * segments + walk.segment;
        REG(float, state, [8][4]);
        // Absent where there is one segment.
        load_state(state, head < h && states ? states + index * 16 * 64 : nullptr);
        const float direct = head < h ? to_float(skip[head]) : 0.0f;
        walk.start(steps);
        for (int stage = 0; stage < walk.stages; stage++) {
            walk.next(stage, steps);
            for (int row = 0; row < Walk::kTimes && head < h; row += 16) {
                const Step s = walk.step(row);
                const uint32_t tile = walk.values_at(stage, row);
                const Values v(tile, [&](int j) { return s.write(j); });
                REG(float, acc, [2][4]);
#pragma unroll
                for (int i = 0; i < 8; i++) acc[i / 4][i % 4] = 0.0f;
                read_state(acc, walk.reads_at(stage, row), state);
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
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const uint32_t cell = tile + at * Walk::kValuePitch + (j * 8 + 2 * t) * 2;
                        const uint32_t own = ld_shared_u32(cell);
                        float lo = fmaf(direct, unpack_lo<bf16>(own), acc[j][2 * half]);
                        float hi = fmaf(direct, unpack_hi<bf16>(own), acc[j][2 * half + 1]);
                        if (residual && walk.live(time)) {
                            const T* more = residual + walk.token(time) * h * 16 + head * 16 + j * 8 + 2 * t;
                            lo += to_float(more[0]), hi += to_float(more[1]);
                        }
                        st_shared_u32(cell, pack<bf16>(lo, hi));
                    }
                }
            }
            __syncthreads();
            walk.store(stage, cast(b, y), h * 16);
        }
        cp_async_wait<0>();
    });
}
KERNEL_EXPORT(mamba2_mma_walk);
