// p[b,h,i,j] = exp(scale * q_i·k_j - lse_i);  ds_ij = p_ij * (dy_i·v_j - delta_i)
// dq_i = scale * sum_j ds_ij * k_j;  dk_j = scale * sum_i ds_ij * q_i;  dv_j = sum_i p_ij * dy_i
//
// q, k, v: the parts of qkv [B, N, 3, H, E] bf16, dqkv the same, by tensor maps (column, token, part, head, sample);
// dy: [B, N, H, E] bf16 by a tensor map (column, token, head, sample); lse, delta = dy·y: [B, H, N] f32. Sums in f32;
// p and ds are rounded to bf16 before they weigh.
//
// Two kernels, each result with one owner, which adds in the order of the tiles: no atomics, the same bits every time.
// `attention_backward_q_*`: a block owns 128 queries, 64 for each of two warpgroups, and goes through the keys.
// `attention_backward_kv_*`: a block owns 128 keys and goes through the queries; scores are taken transposed, so that
// p and ds are where the left operand of the sums for dv and dk must be, in registers. Both: one producer thread, TMA
// into a ring of stages; for keys, the second warp of the producer brings lse and delta of a stage's queries, as +inf
// and 0 past the last, where p is then 0. All tiles are boxes of 16 columns: K-major for scores, MN-major for sums.
//
// Bound: tensor cores, seven products of 2·B·H·N²·E operations where one kernel with dq added by atomics has five, and
// two exponentials a score; README.md has the model.
//
// Requires: E = 64 or 72 as the kernel's name says; scale > 0. Does not handle: masks.
#include "attention_sm90.cuh"

using namespace ptx;

constexpr int kGroups = 2, kRows = 64 * kGroups;

// Width of a head; rows of the other side that come at a time; stages; whether rows bring lse and delta.
template <int kWidth_, int kLoaded_, int kStages_, bool kStatistics> struct Plan {
    static constexpr int kWidth = kWidth_, kLoaded = kLoaded_, kStages = kStages_;
    using H = Narrow<kWidth>;
    static constexpr int kOwnBytes = H::bytes(64), kBytes = H::bytes(kLoaded);
    // What a warpgroup owns: two tiles to read, then one or two to write.
    static constexpr int kResults = kStatistics ? 2 : 1;
    static constexpr int kFirst = kGroups * (2 + kResults) * kOwnBytes, kTiles = kFirst + kStages * 2 * kBytes;
    // lse and delta of each stage's queries, or a mark for each thread of the sums (wgmma_wait_after).
    static constexpr int kFloats = kStatistics ? kStages * 8 * kLoaded : 512 * kGroups;
    static constexpr int kBarriers = 16 + 16 * kStages;

    uint32_t tiles, floats, bars;
    PTX_FN uint32_t own(int group, int which) const { return tiles + (2 * group + which) * kOwnBytes; }
    PTX_FN uint32_t result(int group, int which) const {
        return tiles + (2 * kGroups + kResults * group + which) * kOwnBytes;
    }
    PTX_FN uint32_t loaded(int stage, int which) const { return tiles + kFirst + (2 * stage + which) * kBytes; }
    PTX_FN uint32_t statistics(int stage) const { return floats + stage * 8 * kLoaded; }
    PTX_FN uint32_t own_full() const { return bars; }
    PTX_FN uint32_t own_empty() const { return bars + 8; }
    PTX_FN uint32_t full(int stage) const { return bars + 16 + 16 * stage; }
    PTX_FN uint32_t empty(int stage) const { return full(stage) + 8; }
};

// Rows that a block owns: unit `index` of all heads, in the order of heads.
struct Where {
    int row0, head, sample;
};
PTX_FN Where place(int index, int n, int h) {
    int of_head = (n + kRows - 1) / kRows, head = index / of_head;
    return {index % of_head * kRows, head % h, head / h};
}
PTX_FN int units_of(int n, int h, int samples) { return (n + kRows - 1) / kRows * h * samples; }

// Loads every box of the rows from `row` on: of part `part` of the packed projection, or of dy where it is negative.
template <int kWidth, int kLoaded>
PTX_FN void load_tile(uint32_t to, const TensorMap* map, int row, int part, Where at, uint32_t full) {
#pragma unroll
    for (int c = 0; c < Narrow<kWidth>::kBoxes; c++) {
        if (part < 0)
            tma_load(to + c * kLoaded * 32, map, {16 * c, row, at.head, at.sample}, full);
        else
            tma_load<kEvictLast>(to + c * kLoaded * 32, map, {16 * c, row, part, at.head, at.sample}, full);
    }
}

// What a kernel reads, and the parts of the two tiles that a block owns and of the two that come.
struct Maps {
    const TensorMap *own[2], *loaded[2];
    int own_part[2], loaded_part[2];
};

template <class P> PTX_FN void produce(const P& s, const Maps& m, int n, int h, int samples) {
    Ring ring;
    uint32_t own = 0;
    int tiles = (n + P::kLoaded - 1) / P::kLoaded, units = units_of(n, h, samples);
    for (int unit = int(blockIdx.x); unit < units; unit += int(gridDim.x), own ^= 1) {
        Where at = place(unit, n, h);
        for (int i = 0; i < tiles; i++, ring.template step<P::kStages>()) {
            uint32_t full = s.full(ring.stage);
            mbarrier_wait(s.empty(ring.stage), ring.parity ^ 1);
            mbarrier_arrive_expect_tx(full, 2 * P::kBytes);
#pragma unroll
            for (int w = 0; w < 2; w++)
                load_tile<P::kWidth, P::kLoaded>(s.loaded(ring.stage, w), m.loaded[w], i * P::kLoaded, m.loaded_part[w],
                                                 at, full);
            if (i) continue;
            mbarrier_wait(s.own_empty(), own ^ 1);
            mbarrier_arrive_expect_tx(s.own_full(), 2 * kGroups * P::kOwnBytes);
            for (int g = 0; g < kGroups; g++)
#pragma unroll
                for (int w = 0; w < 2; w++)
                    load_tile<P::kWidth, 64>(s.own(g, w), m.own[w], at.row0 + 64 * g, m.own_part[w], at, s.own_full());
        }
    }
    start_next();
}

// Brings lse in base two and delta of every stage's queries; all lanes of a warp.
template <class P>
PTX_FN void bring_statistics(const P& s, const float* lse, const float* delta, int n, int h, int samples) {
    Ring ring;
    int tiles = (n + P::kLoaded - 1) / P::kLoaded, units = units_of(n, h, samples);
    for (int unit = int(blockIdx.x); unit < units; unit += int(gridDim.x)) {
        Where at = place(unit, n, h);
        size_t from = (size_t(at.sample) * h + at.head) * n;
        for (int i = 0; i < tiles; i++, ring.template step<P::kStages>()) {
            mbarrier_wait(s.empty(ring.stage), ring.parity ^ 1);
            for (int q = int(threadIdx.x % 32); q < P::kLoaded; q += 32) {
                int row = i * P::kLoaded + q;
                st_shared_f32(s.statistics(ring.stage) + 4 * q, row < n ? lse[from + row] * kLog2E : INFINITY);
                st_shared_f32(s.statistics(ring.stage) + 4 * (P::kLoaded + q), row < n ? delta[from + row] : 0.0f);
            }
            mbarrier_arrive(s.full(ring.stage));
        }
    }
}

PTX_FN void release_stage(uint32_t empty) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

// Stores result tile `which` of a warpgroup, which one thread of it has put in shared memory.
template <class P> PTX_FN void store_tile(const P& s, const TensorMap* map, int group, int which, int part, Where at) {
#pragma unroll
    for (int c = 0; c < P::H::kBoxes; c++)
        tma_store(map, {16 * c, at.row0 + 64 * group, part, at.head, at.sample}, s.result(group, which) + c * 64 * 32);
}

template <class P>
PTX_FN void sum_queries(const P& s, const TensorMap* gradient, int group, const float* lse, const float* delta, int n,
                        int h, int samples, float scale) {
    constexpr int kKeys = P::kLoaded, kColumns = P::H::kColumns;
    const float scale2 = scale * kLog2E;
    int tiles = (n + kKeys - 1) / kKeys, units = units_of(n, h, samples);
    REG(float, p, [kKeys / 2]);
    REG(float, ds, [kKeys / 2]);
    REG(float, dq, [kColumns / 2]);
    REG(uint32_t, weights, [kKeys / 16][4]);
    Ring ring;
    uint32_t own = 0;
    for (int unit = int(blockIdx.x); unit < units; unit += int(gridDim.x), own ^= 1) {
        Where at = place(unit, n, h);
        int row = at.row0 + 64 * group + int(threadIdx.x % 128 / 32) * 16 + int(threadIdx.x % 32 / 4);
        float base[2], fall[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            size_t from = (size_t(at.sample) * h + at.head) * n + row + 8 * i;
            base[i] = row + 8 * i < n ? lse[from] * kLog2E : INFINITY;
            fall[i] = row + 8 * i < n ? delta[from] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kColumns / 2; i++) dq[i] = 0.0f;
        mbarrier_wait(s.own_full(), own);
        uint32_t before = 0;
        for (int j = 0; j < tiles; j++) {
            uint32_t k = s.loaded(ring.stage, 0), v = s.loaded(ring.stage, 1);
            mbarrier_wait(s.full(ring.stage), ring.parity);
            wgmma_fence();
            score_narrow<P::kWidth, kKeys>(p, s.own(group, 0), k);
            wgmma_commit();
            score_narrow<P::kWidth, kKeys>(ds, s.own(group, 1), v);
            wgmma_commit();
            wgmma_wait<1>();
            wgmma_hold(p);
            if (j) release_stage(before);
            if (j == tiles - 1) {
                // Keys past the last weigh nothing: theirs are zero, but the exponential of nothing may be infinite.
                int last = n - j * kKeys - int(threadIdx.x % 4) * 2;
#pragma unroll
                for (int i = 0; i < kKeys / 2; i++)
                    if (i / 4 * 8 + i % 2 >= last) p[i] = -INFINITY;
            }
#pragma unroll
            for (int i = 0; i < kKeys / 2; i++) p[i] = ex2(fmaf(p[i], scale2, -base[i / 2 % 2]));
            wgmma_wait_after<0>(s.floats + 4 * (threadIdx.x - 128), p[0] + p[kKeys / 2 - 1]);
            wgmma_hold(ds);
#pragma unroll
            for (int i = 0; i < kKeys / 2; i++) ds[i] = p[i] * (ds[i] - fall[i / 2 % 2]);
            pack_weights<kKeys>(weights, ds);
            wgmma_fence();
            weigh<kKeys, kColumns, 32>(dq, weights, k);
            wgmma_commit();
            before = s.empty(ring.stage);
            ring.template step<P::kStages>();
        }
        wgmma_wait<0>();
        wgmma_hold(dq);
        release_stage(before);
        release_stage(s.own_empty());
        bool first = threadIdx.x % 128 == 0;
        if (first) bulk_wait_read<0>();
        bar_sync(kOwn + group, 128);
        put_tile<0, kColumns>(s.result(group, 0), dq, {scale, scale});
        fence_proxy_async();
        bar_sync(kOwn + group, 128);
        if (first) store_tile(s, gradient, group, 0, 0, at), bulk_commit();
    }
    if (threadIdx.x % 128 == 0) bulk_wait<0>();
}

template <class P>
PTX_FN void sum_keys(const P& s, const TensorMap* gradient, int group, int n, int h, int samples, float scale) {
    constexpr int kQueries = P::kLoaded, kColumns = P::H::kColumns;
    const float scale2 = scale * kLog2E;
    int tiles = (n + kQueries - 1) / kQueries, units = units_of(n, h, samples);
    REG(float, p, [kQueries / 2]);
    REG(float, ds, [kQueries / 2]);
    REG(float, dk, [kColumns / 2]);
    REG(float, dv, [kColumns / 2]);
    REG(uint32_t, for_v, [kQueries / 16][4]);
    REG(uint32_t, for_k, [kQueries / 16][4]);
    // The values that the block owns come from registers where there are enough: shared memory is nearly as busy as the
    // tensor cores.
    constexpr bool kHeld = kQueries <= 64;
    REG(uint32_t, v, [P::H::kBoxes][4]);
    Ring ring;
    uint32_t own = 0;
    for (int unit = int(blockIdx.x); unit < units; unit += int(gridDim.x), own ^= 1) {
        Where at = place(unit, n, h);
#pragma unroll
        for (int i = 0; i < kColumns / 2; i++) dk[i] = dv[i] = 0.0f;
        mbarrier_wait(s.own_full(), own);
        if constexpr (kHeld) load_narrow<P::kWidth>(v, s.own(group, 1));
        uint32_t before = 0;
        for (int i = 0; i < tiles; i++) {
            uint32_t q = s.loaded(ring.stage, 0), dy = s.loaded(ring.stage, 1);
            uint32_t of_pair = s.statistics(ring.stage) + threadIdx.x % 4 * 8;
            mbarrier_wait(s.full(ring.stage), ring.parity);
            wgmma_fence();
            score_narrow<P::kWidth, kQueries>(p, s.own(group, 0), q);
            wgmma_commit();
            if constexpr (kHeld)
                score_narrow<P::kWidth, kQueries>(ds, v, dy);
            else
                score_narrow<P::kWidth, kQueries>(ds, s.own(group, 1), dy);
            wgmma_commit();
            wgmma_wait<1>();
            wgmma_hold(p);
            if (i) release_stage(before);
#pragma unroll
            for (int j = 0; j < kQueries / 8; j++) {
                uint2 base = ld_shared_v2(of_pair + 32 * j);
                p[4 * j] = ex2(fmaf(p[4 * j], scale2, -__uint_as_float(base.x)));
                p[4 * j + 1] = ex2(fmaf(p[4 * j + 1], scale2, -__uint_as_float(base.y)));
                p[4 * j + 2] = ex2(fmaf(p[4 * j + 2], scale2, -__uint_as_float(base.x)));
                p[4 * j + 3] = ex2(fmaf(p[4 * j + 3], scale2, -__uint_as_float(base.y)));
            }
            pack_weights<kQueries>(for_v, p);
            wgmma_fence();
            weigh<kQueries, kColumns, 32>(dv, for_v, dy);
            wgmma_commit();
            wgmma_wait<1>();
            wgmma_hold(ds);
#pragma unroll
            for (int j = 0; j < kQueries / 8; j++) {
                uint2 fall = ld_shared_v2(of_pair + 4 * kQueries + 32 * j);
                ds[4 * j] = p[4 * j] * (ds[4 * j] - __uint_as_float(fall.x));
                ds[4 * j + 1] = p[4 * j + 1] * (ds[4 * j + 1] - __uint_as_float(fall.y));
                ds[4 * j + 2] = p[4 * j + 2] * (ds[4 * j + 2] - __uint_as_float(fall.x));
                ds[4 * j + 3] = p[4 * j + 3] * (ds[4 * j + 3] - __uint_as_float(fall.y));
            }
            pack_weights<kQueries>(for_k, ds);
            wgmma_fence();
            weigh<kQueries, kColumns, 32>(dk, for_k, q);
            wgmma_commit();
            before = s.empty(ring.stage);
            ring.template step<P::kStages>();
        }
        wgmma_wait<0>();
        wgmma_hold(dk), wgmma_hold(dv);
        release_stage(before);
        release_stage(s.own_empty());
        bool first = threadIdx.x % 128 == 0;
        if (first) bulk_wait_read<0>();
        bar_sync(kOwn + group, 128);
        put_tile<0, kColumns>(s.result(group, 0), dk, {scale, scale});
        put_tile<0, kColumns>(s.result(group, 1), dv, {1.0f, 1.0f});
        fence_proxy_async();
        bar_sync(kOwn + group, 128);
        if (first) {
            store_tile(s, gradient, group, 0, 1, at), store_tile(s, gradient, group, 1, 2, at);
            bulk_commit();
        }
    }
    if (threadIdx.x % 128 == 0) bulk_wait<0>();
}

// One role for each warpgroup; kStatistics: the block owns keys, otherwise queries.
template <class P, bool kStatistics>
PTX_FN void backward(const Maps& m, const TensorMap* gradient, const float* lse, const float* delta, int n, int h,
                     int samples, float scale) {
    SmemPlan plan;
    SMEM_DYNAMIC(smem, 1024);
    int tiles = plan.take(P::kTiles, 1024), floats = plan.take(P::kFloats);
    int bars = plan.take(P::kBarriers);
    smem_guard(smem, tiles + P::kTiles), smem_guard(smem, floats + P::kFloats), smem_guard(smem, bars + P::kBarriers);
    uint32_t base = smem_u32(smem);
    P s{base + tiles, base + floats, base + bars};
    int group = warpgroup();
    if (threadIdx.x == 0) {
        mbarrier_init(s.own_full(), 1), mbarrier_init(s.own_empty(), 4 * kGroups);
        for (int i = 0; i < P::kStages; i++)
            mbarrier_init(s.full(i), kStatistics ? 33 : 1), mbarrier_init(s.empty(i), 4 * kGroups);
        fence_mbarrier_init();
    }
    __syncthreads();
    wait_for_previous();
    if (group == 0) {
        setmaxnreg_dec<40>();
        int warp = int(threadIdx.x / 32);
        if (warp == 0 && elect_one()) produce(s, m, n, h, samples);
        if (kStatistics && warp == 1) bring_statistics(s, lse, delta, n, h, samples);
    } else {
        setmaxnreg_inc<232>();
        if constexpr (kStatistics)
            sum_keys(s, gradient, group - 1, n, h, samples, scale);
        else
            sum_queries(s, gradient, group - 1, lse, delta, n, h, samples, scale);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_backward_q_72(
    const __grid_constant__ TensorMap own, const __grid_constant__ TensorMap own_dy,
    const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap gradient, const float* lse,
    const float* delta, int n, int h, int samples, float scale) {
    const Maps maps{{&own, &own_dy}, {&keys, &keys}, {0, -1}, {1, 2}};
    backward<Plan<72, 128, 2, false>, false>(maps, &gradient, lse, delta, n, h, samples, scale);
}
KERNEL_EXPORT(attention_backward_q_72);

extern "C" __global__ void __launch_bounds__(384, 1) attention_backward_q_64(
    const __grid_constant__ TensorMap own, const __grid_constant__ TensorMap own_dy,
    const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap gradient, const float* lse,
    const float* delta, int n, int h, int samples, float scale) {
    const Maps maps{{&own, &own_dy}, {&keys, &keys}, {0, -1}, {1, 2}};
    backward<Plan<64, 128, 2, false>, false>(maps, &gradient, lse, delta, n, h, samples, scale);
}
KERNEL_EXPORT(attention_backward_q_64);

extern "C" __global__ void __launch_bounds__(384, 1) attention_backward_kv_72(
    const __grid_constant__ TensorMap own, const __grid_constant__ TensorMap queries,
    const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap gradient, const float* lse,
    const float* delta, int n, int h, int samples, float scale) {
    const Maps maps{{&own, &own}, {&queries, &dy}, {1, 2}, {0, -1}};
    backward<Plan<72, 64, 3, true>, true>(maps, &gradient, lse, delta, n, h, samples, scale);
}
KERNEL_EXPORT(attention_backward_kv_72);

extern "C" __global__ void __launch_bounds__(384, 1) attention_backward_kv_72_wide(
    const __grid_constant__ TensorMap own, const __grid_constant__ TensorMap queries,
    const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap gradient, const float* lse,
    const float* delta, int n, int h, int samples, float scale) {
    const Maps maps{{&own, &own}, {&queries, &dy}, {1, 2}, {0, -1}};
    backward<Plan<72, 80, 3, true>, true>(maps, &gradient, lse, delta, n, h, samples, scale);
}
KERNEL_EXPORT(attention_backward_kv_72_wide);

extern "C" __global__ void __launch_bounds__(384, 1) attention_backward_kv_64(
    const __grid_constant__ TensorMap own, const __grid_constant__ TensorMap queries,
    const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap gradient, const float* lse,
    const float* delta, int n, int h, int samples, float scale) {
    const Maps maps{{&own, &own}, {&queries, &dy}, {1, 2}, {0, -1}};
    backward<Plan<64, 64, 3, true>, true>(maps, &gradient, lse, delta, n, h, samples, scale);
}
KERNEL_EXPORT(attention_backward_kv_64);
