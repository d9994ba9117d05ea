// What the tensor-core kernels of the scan share: a block's walk over the times of a segment, by stages of 64 that cp.async
// brings in, with the decays of each step of 16.
#pragma once
#include "../common/ptx.cuh"
#include "../common/fragments.cuh"

using namespace ptx;

// Where step sizes come from.
struct StepSizes {
    const bf16 *p, *dt_bias, *a_log;
    int w, dt_offset;
    // Beyond 20 softplus is the identity to f32; log1p keeps the digits of small ones.
    __device__ __forceinline__ float of(float raw) const { return fmaxf(raw, 0.0f) + log1pf(expf(-fabsf(raw))); }
};

// The 16 times of a step for a head. sums[i + 1] - sums[i] is dt of time i; what a write at j weighs when it is read at i is
// exp(rate·(sums at i - sums at j)), both after their own time forward, both before it backward.
struct Step {
    const float *dt, *sums;
    float rate;
    int back;
    __device__ __forceinline__ float at(int i) const { return sums[i + (back ? 0 : 1)]; }
    __device__ __forceinline__ float decay(float sum) const { return __expf(rate * sum); }
    __device__ __forceinline__ float all() const { return decay(sums[16]); }
    __device__ __forceinline__ float read(int i) const { return decay(at(i)); }
    __device__ __forceinline__ float write(int j) const { return decay(sums[16] - at(j)) * (back ? 1.0f : dt[j]); }
    // Weights at time i of the writes j and j + 1, from the products `pairs` [16][kPairPitch].
    __device__ __forceinline__ uint32_t pair(const float* pairs, int i, int j) const;
};

struct Walk {
    // Times of a stage; heads of a block; bytes of a row of values, of what is written and read; floats of a row of pairs,
    // and of the sums of a step.
    static constexpr int kTimes = 64, kHeads = 8, kValuePitch = odd_pitch(kHeads * 16), kRowPitch = odd_pitch(64);
    static constexpr int kPairPitch = 18, kSums = 17;
    static constexpr int kValueBytes = kTimes * kValuePitch, kRowBytes = kTimes * kRowPitch;

    int n, h, reverse, back, sample, segment, group, first, end, stages, reading, depth;
    const bf16 *from, *rows;
    int stride, row_stride;
    uint32_t tiles;
    float *dts, *sums, *products;
    float raw[2], rate;

    // `pairs`: with what is read, and the products of a step. `depth` stages are in shared memory.
    __device__ __forceinline__ Walk(Regions& regions, const bf16* values, const bf16* xbc, int n, int h, int reverse,
                                    int back, int segments, bool pairs, int depth)
        : n(n), h(h), reverse(reverse), back(back), reading(pairs), depth(depth) {
        const int groups = (h + kHeads - 1) / kHeads, block = int(blockIdx.x) / groups;
        group = int(blockIdx.x) % groups, segment = block % segments, sample = block / segments;
        const int each = (padded() / kTimes + segments - 1) / segments * kTimes;
        first = min(padded(), segment * each), end = min(padded(), first + each), stages = (end - first) / kTimes;
        row_stride = h * 16 + 128, stride = back ? h * 16 : row_stride;
        from = values + group * kHeads * 16, rows = xbc + h * 16;
        tiles = smem_u32(regions.take(depth * stage_bytes()));
        dts = reinterpret_cast<float*>(regions.take(kHeads * kTimes * 4));
        sums = reinterpret_cast<float*>(regions.take(kHeads * 4 * kSums * 4));
        products = pairs ? reinterpret_cast<float*>(regions.take(4 * 16 * kPairPitch * 4)) : nullptr;
    }
    // Walks count in whole stages: those behind the last time are zeros, and where they go back they begin there.
    __device__ __forceinline__ int padded() const { return (n + kTimes - 1) / kTimes * kTimes; }
    __device__ __forceinline__ int moment(int time) const { return back ? padded() - 1 - time : time; }
    __device__ __forceinline__ bool live(int time) const { return moment(time) < n; }
    __device__ __forceinline__ int stage_bytes() const { return kValueBytes + (reading ? 2 : 1) * kRowBytes; }
    __device__ __forceinline__ int head() const { return group * kHeads + warp_id(); }
    // The row of the tensors that is a walk's time.
    __device__ __forceinline__ int64_t token(int time) const {
        return int64_t(sample) * n + (reverse ? n - 1 - moment(time) : moment(time));
    }
    __device__ __forceinline__ int time(int stage, int row) const { return first + stage * kTimes + row; }
    __device__ __forceinline__ uint32_t buffer(int stage) const { return tiles + (depth == 1 ? 0 : stage % 2) * stage_bytes(); }
    __device__ __forceinline__ uint32_t values_at(int stage, int row) const {
        return buffer(stage) + row * kValuePitch + warp_id() * 32;
    }
    __device__ __forceinline__ uint32_t writes_at(int stage, int row) const {
        return buffer(stage) + kValueBytes + row * kRowPitch;
    }
    __device__ __forceinline__ uint32_t reads_at(int stage, int row) const { return writes_at(stage, row) + kRowBytes; }
    __device__ __forceinline__ const float* pairs(int row) const { return products + row * kPairPitch; }
    __device__ __forceinline__ Step step(int row) const {
        return {dts + warp_id() * kTimes + row, sums + (warp_id() * 4 + row / 16) * kSums, rate, back};
    }

    // Units of 16 bytes of a row of a stage; those beyond the last head or time are zeros.
    template <int kUnits>
    __device__ __forceinline__ void copy(uint32_t to, const bf16* rows, int rows_stride, int stage, int units) const {
        constexpr int kPitch = odd_pitch(kUnits * 8);
        for (int i = threadIdx.x; i < kTimes * kUnits; i += 256) {
            const int row = i / kUnits, unit = i % kUnits, at = time(stage, row);
            const bool there = live(at) && unit < units;
            cp_async<16>(to + row * kPitch + unit * 16, rows + (there ? token(at) * rows_stride + unit * 8 : 0),
                         there ? 16 : 0);
        }
    }
    __device__ __forceinline__ void fetch(int stage, const StepSizes& steps) {
        if (stage < stages) {
            copy<2 * kHeads>(buffer(stage), from, stride, stage, 2 * (h - group * kHeads));
            // B is written and C read, or the other way round.
            copy<8>(buffer(stage) + kValueBytes, rows + (back ? 64 : 0), row_stride, stage, 8);
            if (reading) copy<8>(buffer(stage) + kValueBytes + kRowBytes, rows + (back ? 0 : 64), row_stride, stage, 8);
            // A thread takes two heads of a time.
            const int at = time(stage, int(threadIdx.x) / 4), head = group * kHeads + int(threadIdx.x) % 4 * 2;
#pragma unroll
            for (int i = 0; i < 2; i++)
                raw[i] = live(at) && head + i < h ? to_float(steps.p[token(at) * steps.w + steps.dt_offset + head + i]) : 0.0f;
        }
        cp_async_commit();
    }
    __device__ __forceinline__ void start(const StepSizes& steps) {
        fetch(0, steps);
        rate = head() < h ? -expf(to_float(steps.a_log[head()])) : 0.0f;
    }

    // Makes a stage ready, and starts the next.
    __device__ __forceinline__ void next(int stage, const StepSizes& steps) {
        __syncthreads();
        const int row = int(threadIdx.x) / 4, of = int(threadIdx.x) % 4 * 2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int head = group * kHeads + of + i;
            const bool there = live(time(stage, row)) && head < h;
            dts[(of + i) * kTimes + row] = there ? steps.of(raw[i] + to_float(steps.dt_bias[head])) : 0.0f;
        }
        fetch(stage + 1, steps);
        cp_async_wait<1>();
        __syncthreads();
        if (reading && warp_id() < 4) multiply(stage, warp_id());
        if (warp_id() == 4) {
            float sum = 0.0f, *to = sums + lane_id() * kSums;
            const float* dt = dts + lane_id() / 4 * kTimes + lane_id() % 4 * 16;
            to[0] = 0.0f;
#pragma unroll
            for (int i = 0; i < 16; i++) sum += dt[i], to[i + 1] = sum;
        }
        __syncthreads();
    }
    // What is read times what is written, for the 16 times of a step.
    __device__ __forceinline__ void multiply(int stage, int step) const {
        const uint32_t rows = reads_at(stage, 16 * step), columns = writes_at(stage, 16 * step);
        REG(float, acc, [2][4]);
#pragma unroll
        for (int i = 0; i < 8; i++) acc[i / 4][i % 4] = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32_t a[4], b[4];
            load_a<kRowPitch>(a, rows + k * 32), load_b_pair_rows<kRowPitch>(b, columns + k * 32);
            mma_m16n8k16<bf16>(acc[0], a, b[0], b[1]), mma_m16n8k16<bf16>(acc[1], a, b[2], b[3]);
        }
        float* to = products + (16 * step + lane_id() / 4) * kPairPitch + 2 * (lane_id() % 4);
#pragma unroll
        for (int i = 0; i < 8; i++) to[i / 2 % 2 * 8 * kPairPitch + i / 4 * 8 + i % 2] = acc[i / 4][i % 4];
    }
    // The results in the place of the values, to rows `to_stride` apart.
    __device__ __forceinline__ void store(int stage, bf16* to, int to_stride) const {
        constexpr int kUnits = 2 * kHeads;
        for (int i = threadIdx.x; i < kTimes * kUnits; i += 256) {
            const int row = i / kUnits, unit = i % kUnits, at = time(stage, row);
            if (live(at) && unit < 2 * (h - group * kHeads))
                st_global_v4(to + token(at) * to_stride + group * kHeads * 16 + unit * 8,
                             ld_shared_v4(buffer(stage) + row * kValuePitch + unit * 16));
        }
    }
};

__device__ __forceinline__ uint32_t Step::pair(const float* pairs, int i, int j) const {
    const float2 product = *reinterpret_cast<const float2*>(pairs + i * Walk::kPairPitch + j);
    const float lo = j <= i ? product.x * decay(at(i) - at(j)) * (back ? 1.0f : dt[j]) : 0.0f;
    const float hi = j + 1 <= i ? product.y * decay(at(i) - at(j + 1)) * (back ? 1.0f : dt[j + 1]) : 0.0f;
    return pack<bf16>(lo, hi);
}

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
    template <class F> __device__ __forceinline__ Values(uint32_t tile, F weight) {
        load_a_trans<Walk::kValuePitch>(raw, tile);
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const int at = 2 * (lane_id() % 4) + 8 * upper;
            const float lo = weight(at), hi = weight(at + 1);
#pragma unroll
            for (int r = 2 * upper; r < 2 * upper + 2; r++)
                weighed[r] = pack<bf16>(unpack_lo<bf16>(raw[r]) * lo, unpack_hi<bf16>(raw[r]) * hi);
        }
    }
};

// acc += rows·stateᵀ of a step: rows [16][64] in shared memory, the result by the columns of the head.
__device__ __forceinline__ void read_state(float (&acc)[2][4], uint32_t rows, const State& state) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t a[4];
        load_a<Walk::kRowPitch>(a, rows + k * 32);
        const float(&x)[4] = state[2 * k], (&z)[4] = state[2 * k + 1];
        mma_m16n8k16<bf16>(acc[0], a, pack<bf16>(x[0], x[1]), pack<bf16>(z[0], z[1]));
        mma_m16n8k16<bf16>(acc[1], a, pack<bf16>(x[2], x[3]), pack<bf16>(z[2], z[3]));
    }
}

// The state [16][64] of a head in memory; zeros where there is none.
__device__ __forceinline__ void load_state(State& state, const float* from) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = lane_id() / 4 + r / 2 * 8, column = j * 8 + 2 * (lane_id() % 4) + r % 2;
            state[j][r] = from ? from[row * 64 + column] : 0.0f;
        }
    }
}

__device__ __forceinline__ void clear(float (&state)[8][4]) {
#pragma unroll
    for (int i = 0; i < 32; i++) state[i / 4][i % 4] = 0.0f;
}
