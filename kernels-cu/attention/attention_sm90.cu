// s[b,h,i,j] = scale * sum_e q[b,i,h,e] * k[b,j,h,e];  lse[b,h,i] = log sum_j exp(s[b,h,i,j])
// y[b,i,h,e] = sum_j exp(s - lse) * v[b,j,h,e]
//
// q, k, v: the parts of qkv [B, N, 3, H, E] bf16, by tensor maps (column, token, part, head, sample); y: [B, N, H, E]
// bf16 by tensor maps (column, token, head, sample); lse: [B, H, N] f32. Sums in f32, weights rounded to bf16.
//
// A persistent block owns 64 queries of a head for each warpgroup of sums and goes through the keys from the last tile
// to the first, so that only the first tile it meets is masked. One thread of warpgroup 0 is the producer: TMA into
// rings of stages of keys and of values, with a full and an empty barrier each. The other warpgroups each hold a tile
// of scores (wgmma, both operands in shared memory), their exponentials as the left operand of the second product in
// registers, and the sums of values. The scores of a tile are issued before the values of the tile before are summed,
// and the softmax runs while that sum does; named barriers give the warpgroups turns at the tensor cores, so that one
// computes exponentials while another multiplies. Tiles of a head follow one another: all blocks read the same keys
// from L2. In a cluster of two, each block loads half of every tile of keys and values for both.
//
// Bound: tensor cores, B·H·N²·2·(E + E) operations, beside one exponential a score; README.md has the model.
//
// Requires: E = 64, 72 or 128 as the kernel's name says; scale > 0. Does not handle: masks.
#include "attention_sm90.cuh"

using namespace ptx;

// Width of a head; warpgroups of sums; keys of a tile; stages of the rings; bytes of a row of a box of values and how
// many columns of values are summed; blocks of a cluster.
template <int kWidth_, int kGroups_, int kKeys_, int kStages_, int kBox_, int kValues_, int kCluster_> struct Plan {
    static constexpr int kWidth = kWidth_, kGroups = kGroups_, kKeys = kKeys_, kStages = kStages_, kBox = kBox_;
    static constexpr int kValues = kValues_, kCluster = kCluster_;
    using H = Head<kWidth>;
    static constexpr int kRows = 64 * kGroups, kLoaded = kKeys / kCluster;
    static constexpr int kBoxes = (2 * kValues + kBox - 1) / kBox;
    static constexpr int kQBytes = H::bytes(64), kKBytes = H::bytes(kKeys), kVBytes = kKeys * kBoxes * kBox;
    static constexpr int kKStride = round_up(kKBytes, 1024), kVStride = round_up(kVBytes, 1024);
    static constexpr int kO = kGroups * kQBytes, kK = 2 * kO, kV = kK + kStages * kKStride;
    static constexpr int kTiles = kV + kStages * kVStride;
    // Barriers: full and empty of each warpgroup's queries, then of each stage's keys and of its values.
    static constexpr int kBarriers = 16 * kGroups + 32 * kStages, kMarks = 512 * kGroups;
    // Registers of a thread: 64 K a multiprocessor. Loads for a cluster take some more.
    static constexpr int kProducer = kGroups == 3 ? 32 : kCluster == 1 ? 24 : 40;
    static constexpr int kConsumer = kGroups == 3 ? 160 : kCluster == 1 ? 240 : 232;
    static_assert(kCluster == 1 || kLoaded % 8 == 0, "the part of a tile that a block loads is whole swizzle atoms");

    uint32_t tiles, bars, marks;
    int rank;
    PTX_FN uint32_t q(int group) const { return tiles + group * kQBytes; }
    PTX_FN uint32_t o(int group) const { return tiles + kO + group * kQBytes; }
    PTX_FN uint32_t k(int stage) const { return tiles + kK + stage * kKStride; }
    PTX_FN uint32_t v(int stage) const { return tiles + kV + stage * kVStride; }
    PTX_FN uint32_t q_full(int group) const { return bars + 16 * group; }
    PTX_FN uint32_t q_empty(int group) const { return bars + 16 * group + 8; }
    PTX_FN uint32_t k_full(int stage) const { return bars + 16 * kGroups + 32 * stage; }
    PTX_FN uint32_t k_empty(int stage) const { return k_full(stage) + 8; }
    PTX_FN uint32_t v_full(int stage) const { return k_full(stage) + 16; }
    PTX_FN uint32_t v_empty(int stage) const { return k_full(stage) + 24; }
};

struct Maps {
    const TensorMap *q_wide, *q_rest, *k_wide, *k_rest, *v, *y_wide, *y_rest;
};

// The queries that block `rank` of a cluster owns of unit `index`: units go through a head before the next.
struct Where {
    int row0, head, sample;
};
template <class P> PTX_FN Where place(int index, int n, int h, int rank) {
    int of_head = (n + P::kRows * P::kCluster - 1) / (P::kRows * P::kCluster), head = index / of_head;
    return {(index % of_head * P::kCluster + rank) * P::kRows, head % h, head / h};
}

// Loads the rows of a box of tile `tile` that are block `rank`'s to load, for all blocks of the cluster. Rows of the box
// are kBoxBytes long; the box of all of them lies at `to`.
template <class P, int kBoxBytes>
PTX_FN void load_box(uint32_t to, const TensorMap* map, int column, int tile, int part, Where at, int rank,
                     uint32_t full) {
    const int c[5] = {column, tile * P::kKeys + rank * P::kLoaded, part, at.head, at.sample};
    uint32_t mine = to + uint32_t(rank * P::kLoaded * kBoxBytes);
    if constexpr (P::kCluster == 1)
        tma_load<kEvictLast>(mine, map, c, full);
    else
        tma_load_multicast<kEvictLast>(mine, map, c, full, uint16_t((1 << P::kCluster) - 1));
}

template <class P> PTX_FN void load_queries(const P& s, const Maps& m, Where at, uint32_t parity) {
    using H = typename P::H;
    for (int g = 0; g < P::kGroups; g++) {
        int row = at.row0 + 64 * g;
        mbarrier_wait(s.q_empty(g), parity ^ 1);
        mbarrier_arrive_expect_tx(s.q_full(g), P::kQBytes);
#pragma unroll
        for (int c = 0; c < H::kWide; c++)
            tma_load<kEvictFirst>(s.q(g) + c * 64 * 128, m.q_wide, {64 * c, row, 0, at.head, at.sample}, s.q_full(g));
        if constexpr (H::kRest)
            tma_load<kEvictFirst>(s.q(g) + H::kWide * 64 * 128, m.q_rest, {64 * H::kWide, row, 0, at.head, at.sample},
                                  s.q_full(g));
    }
}

template <class P> PTX_FN void produce(const P& s, const Maps& m, int n, int h, int units) {
    using H = typename P::H;
    Ring ring;
    uint32_t queries = 0;
    int tiles = (n + P::kKeys - 1) / P::kKeys;
    for (int unit = int(blockIdx.x) / P::kCluster; unit < units; unit += int(gridDim.x) / P::kCluster) {
        Where at = place<P>(unit, n, h, s.rank);
        for (int j = tiles - 1; j >= 0; j--) {
            uint32_t k = s.k(ring.stage), v = s.v(ring.stage);
            uint32_t k_full = s.k_full(ring.stage), v_full = s.v_full(ring.stage);
            mbarrier_wait_cluster(s.k_empty(ring.stage), ring.parity ^ 1);
            mbarrier_arrive_expect_tx(k_full, P::kKBytes);
#pragma unroll
            for (int c = 0; c < H::kWide; c++)
                load_box<P, 128>(k + c * P::kKeys * 128, m.k_wide, 64 * c, j, 1, at, s.rank, k_full);
            if constexpr (H::kRest)
                load_box<P, 32>(k + H::kWide * P::kKeys * 128, m.k_rest, 64 * H::kWide, j, 1, at, s.rank, k_full);
            if (j == tiles - 1) load_queries(s, m, at, queries), queries ^= 1;
            mbarrier_wait_cluster(s.v_empty(ring.stage), ring.parity ^ 1);
            mbarrier_arrive_expect_tx(v_full, P::kVBytes);
#pragma unroll
            for (int c = 0; c < P::kBoxes; c++)
                load_box<P, P::kBox>(v + c * P::kKeys * P::kBox, m.v, c * P::kBox / 2, j, 2, at, s.rank, v_full);
            ring.template step<P::kStages>();
        }
    }
    start_next();
}

// A warp has read a stage: it says so to every block that fills it.
template <class P> PTX_FN void release_stage(uint32_t empty) {
    uint32_t lane = threadIdx.x % 32;
    if constexpr (P::kCluster == 1) {
        if (lane == 0) mbarrier_arrive(empty);
    } else if (lane < P::kCluster) {
        mbarrier_arrive_cluster_relaxed(mapa(empty, lane));
    }
}

// Scores to their exponentials against the new maximum of each row; `fall` is what sums of before are worth now.
template <int kKeys, bool kFirst>
PTX_FN void soften(float (&s)[kKeys / 2], float (&top)[2], float (&sum)[2], float (&fall)[2], float scale2) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float most = s[2 * i];
#pragma unroll
        for (int j = 0; j < kKeys / 8; j++) most = fmaxf(most, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
        most = quad_max(most);
        if constexpr (!kFirst) most = fmaxf(most, top[i]);
        float base = most * scale2, add = 0.0f;
        fall[i] = kFirst ? 0.0f : ex2(fmaf(top[i], scale2, -base));
        top[i] = most;
#pragma unroll
        for (int j = 0; j < kKeys / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& x = s[4 * j + 2 * i + e];
                x = ex2(fmaf(x, scale2, -base));
                add += x;
            }
        sum[i] = kFirst ? add : fmaf(sum[i], fall[i], add);
    }
}

// Sums over weights to y and the log of the weights' sum to lse; `o` is this warpgroup's own memory.
template <class P>
PTX_FN void finish(const P& s, const Maps& m, Where at, int group, const float (&y)[P::kValues / 2],
                   const float (&top)[2], const float (&sum)[2], float* lse, int n, int h, float scale) {
    using H = typename P::H;
    int lane = int(threadIdx.x % 32), row = at.row0 + 64 * group + int(threadIdx.x % 128 / 32) * 16 + lane / 4;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float total = quad_sum(sum[i]);
        inverse[i] = 1.0f / total;
        if (lane % 4 == 0 && row + 8 * i < n)
            lse[(size_t(at.sample) * h + at.head) * n + row + 8 * i] = fmaf(lg2(total), kLn2, top[i] * scale);
    }
    bool first = threadIdx.x % 128 == 0;
    uint32_t o = s.o(group);
    if (first) bulk_wait_read<0>();
    bar_sync(kOwn + group, 128);
    put_tile<H::kWide, P::kValues>(o, y, inverse);
    fence_proxy_async();
    bar_sync(kOwn + group, 128);
    if (first) {
        int row0 = at.row0 + 64 * group;
#pragma unroll
        for (int c = 0; c < H::kWide; c++)
            tma_store(m.y_wide, {64 * c, row0, at.head, at.sample}, o + c * 64 * 128);
        if constexpr (H::kRest)
            tma_store(m.y_rest, {64 * H::kWide, row0, at.head, at.sample}, o + H::kWide * 64 * 128);
        bulk_commit();
    }
}

template <class P>
PTX_FN void consume(const P& s, const Maps& m, int group, float* lse, int n, int h, int units, float scale) {
    constexpr int kKeys = P::kKeys, kValues = P::kValues;
    const float scale2 = scale * kLog2E;
    const int tiles = (n + kKeys - 1) / kKeys, next = group + 1 == P::kGroups ? 0 : group + 1;
    REG(float, scores, [kKeys / 2]);
    REG(float, y, [kValues / 2]);
    REG(uint32_t, weights, [kKeys / 16][4]);
    Ring ring;
    uint32_t queries = 0;
    if (group == P::kGroups - 1) bar_arrive(kTurn, 256);
    for (int unit = int(blockIdx.x) / P::kCluster; unit < units; unit += int(gridDim.x) / P::kCluster, queries ^= 1) {
        float top[2], sum[2], fall[2];
#pragma unroll
        for (int i = 0; i < kValues / 2; i++) y[i] = 0.0f;
        mbarrier_wait(s.q_full(group), queries);
        mbarrier_wait(s.k_full(ring.stage), ring.parity);
        wgmma_fence();
        score<P::kWidth, kKeys>(scores, s.q(group), s.k(ring.stage));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(scores);
        release_stage<P>(s.k_empty(ring.stage));
        // Keys past the last weigh nothing.
        int last = n - (tiles - 1) * kKeys - int(threadIdx.x % 4) * 2;
#pragma unroll
        for (int i = 0; i < kKeys / 2; i++)
            if (i / 4 * 8 + i % 2 >= last) scores[i] = -INFINITY;
        soften<kKeys, true>(scores, top, sum, fall, scale2);
        pack_weights<kKeys>(weights, scores);
        for (int j = tiles - 1; j > 0; j--) {
            Ring before = ring;
            ring.template step<P::kStages>();
            mbarrier_wait(s.k_full(ring.stage), ring.parity);
            bar_sync(kTurn + group, 256);
            wgmma_fence();
            score<P::kWidth, kKeys>(scores, s.q(group), s.k(ring.stage));
            wgmma_commit();
            mbarrier_wait(s.v_full(before.stage), before.parity);
            wgmma_fence();
            weigh<kKeys, kValues, P::kBox>(y, weights, s.v(before.stage));
            wgmma_commit();
            bar_arrive(kTurn + next, 256);
            wgmma_wait<1>();
            wgmma_hold(scores);
            release_stage<P>(s.k_empty(ring.stage));
            soften<kKeys, false>(scores, top, sum, fall, scale2);
            wgmma_wait_after<0>(s.marks + 4 * (threadIdx.x - 128), sum[0] + sum[1]);
            wgmma_hold(y);
            release_stage<P>(s.v_empty(before.stage));
            pack_weights<kKeys>(weights, scores);
#pragma unroll
            for (int i = 0; i < kValues / 2; i++) y[i] *= fall[i / 2 % 2];
        }
        if (threadIdx.x % 32 == 0) mbarrier_arrive(s.q_empty(group));
        mbarrier_wait(s.v_full(ring.stage), ring.parity);
        wgmma_fence();
        weigh<kKeys, kValues, P::kBox>(y, weights, s.v(ring.stage));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(y);
        release_stage<P>(s.v_empty(ring.stage));
        ring.template step<P::kStages>();
        finish(s, m, place<P>(unit, n, h, s.rank), group, y, top, sum, lse, n, h, scale);
    }
    if (group == 0) bar_sync(kTurn, 256);
    if (threadIdx.x % 128 == 0) bulk_wait<0>();
}

template <class P> PTX_FN void attend(const Maps& m, float* lse, int n, int h, int samples, float scale) {
    SmemPlan plan;
    SMEM_DYNAMIC(smem, 1024);
    int tiles = plan.take(P::kTiles, 1024), bars = plan.take(P::kBarriers), marks = plan.take(P::kMarks);
    smem_guard(smem, tiles + P::kTiles), smem_guard(smem, bars + P::kBarriers), smem_guard(smem, marks + P::kMarks);
    uint32_t base = smem_u32(smem);
    P s{base + tiles, base + bars, base + marks, P::kCluster == 1 ? 0 : int(cluster_rank())};
    int units = (n + P::kRows * P::kCluster - 1) / (P::kRows * P::kCluster) * h * samples;
    int group = warpgroup();
    if (threadIdx.x == 0) {
        for (int g = 0; g < P::kGroups; g++) mbarrier_init(s.q_full(g), 1), mbarrier_init(s.q_empty(g), 4);
        for (int i = 0; i < P::kStages; i++) {
            constexpr int kWarps = 4 * P::kGroups * P::kCluster;
            mbarrier_init(s.k_full(i), 1), mbarrier_init(s.k_empty(i), kWarps);
            mbarrier_init(s.v_full(i), 1), mbarrier_init(s.v_empty(i), kWarps);
        }
        fence_mbarrier_init();
    }
    if constexpr (P::kCluster == 1)
        __syncthreads();
    else
        cluster_sync();
    wait_for_previous();
    if (group == 0) {
        setmaxnreg_dec<P::kProducer>();
        if (threadIdx.x < 32 && elect_one()) produce(s, m, n, h, units);
    } else {
        setmaxnreg_inc<P::kConsumer>();
        consume(s, m, group - 1, lse, n, h, units, scale);
    }
    // A block may not go while another still loads into its memory or arrives at its barriers.
    if constexpr (P::kCluster > 1) {
        __syncwarp();
        cluster_sync();
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_72_128x192(
    const __grid_constant__ TensorMap q_wide, const __grid_constant__ TensorMap q_rest,
    const __grid_constant__ TensorMap k_wide, const __grid_constant__ TensorMap k_rest,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap y_wide,
    const __grid_constant__ TensorMap y_rest, float* lse, int n, int h, int samples, float scale) {
    const Maps maps{&q_wide, &q_rest, &k_wide, &k_rest, &v, &y_wide, &y_rest};
    attend<Plan<72, 2, 192, 2, 32, 80, 1>>(maps, lse, n, h, samples, scale);
}
KERNEL_EXPORT(attention_forward_72_128x192);

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_72_128x192_exact(
    const __grid_constant__ TensorMap q_wide, const __grid_constant__ TensorMap q_rest,
    const __grid_constant__ TensorMap k_wide, const __grid_constant__ TensorMap k_rest,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap y_wide,
    const __grid_constant__ TensorMap y_rest, float* lse, int n, int h, int samples, float scale) {
    const Maps maps{&q_wide, &q_rest, &k_wide, &k_rest, &v, &y_wide, &y_rest};
    attend<Plan<72, 2, 192, 2, 32, 72, 1>>(maps, lse, n, h, samples, scale);
}
KERNEL_EXPORT(attention_forward_72_128x192_exact);

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_72_128x192_wide(
    const __grid_constant__ TensorMap q_wide, const __grid_constant__ TensorMap q_rest,
    const __grid_constant__ TensorMap k_wide, const __grid_constant__ TensorMap k_rest,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap y_wide,
    const __grid_constant__ TensorMap y_rest, float* lse, int n, int h, int samples, float scale) {
    const Maps maps{&q_wide, &q_rest, &k_wide, &k_rest, &v, &y_wide, &y_rest};
    attend<Plan<72, 2, 192, 2, 128, 80, 1>>(maps, lse, n, h, samples, scale);
}
KERNEL_EXPORT(attention_forward_72_128x192_wide);

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_72_128x192_cluster2(
    const __grid_constant__ TensorMap q_wide, const __grid_constant__ TensorMap q_rest,
    const __grid_constant__ TensorMap k_wide, const __grid_constant__ TensorMap k_rest,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap y_wide,
    const __grid_constant__ TensorMap y_rest, float* lse, int n, int h, int samples, float scale) {
    const Maps maps{&q_wide, &q_rest, &k_wide, &k_rest, &v, &y_wide, &y_rest};
    attend<Plan<72, 2, 192, 2, 32, 80, 2>>(maps, lse, n, h, samples, scale);
}
KERNEL_EXPORT(attention_forward_72_128x192_cluster2);

extern "C" __global__ void __launch_bounds__(512, 1) attention_forward_72_192x112(
    const __grid_constant__ TensorMap q_wide, const __grid_constant__ TensorMap q_rest,
    const __grid_constant__ TensorMap k_wide, const __grid_constant__ TensorMap k_rest,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap y_wide,
    const __grid_constant__ TensorMap y_rest, float* lse, int n, int h, int samples, float scale) {
    const Maps maps{&q_wide, &q_rest, &k_wide, &k_rest, &v, &y_wide, &y_rest};
    attend<Plan<72, 3, 112, 3, 32, 80, 1>>(maps, lse, n, h, samples, scale);
}
KERNEL_EXPORT(attention_forward_72_192x112);

extern "C" __global__ void __launch_bounds__(512, 1) attention_forward_72_192x112_exact(
    const __grid_constant__ TensorMap q_wide, const __grid_constant__ TensorMap q_rest,
    const __grid_constant__ TensorMap k_wide, const __grid_constant__ TensorMap k_rest,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap y_wide,
    const __grid_constant__ TensorMap y_rest, float* lse, int n, int h, int samples, float scale) {
    const Maps maps{&q_wide, &q_rest, &k_wide, &k_rest, &v, &y_wide, &y_rest};
    attend<Plan<72, 3, 112, 3, 32, 72, 1>>(maps, lse, n, h, samples, scale);
}
KERNEL_EXPORT(attention_forward_72_192x112_exact);

extern "C" __global__ void __launch_bounds__(512, 1) attention_forward_72_192x128(
    const __grid_constant__ TensorMap q_wide, const __grid_constant__ TensorMap q_rest,
    const __grid_constant__ TensorMap k_wide, const __grid_constant__ TensorMap k_rest,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap y_wide,
    const __grid_constant__ TensorMap y_rest, float* lse, int n, int h, int samples, float scale) {
    const Maps maps{&q_wide, &q_rest, &k_wide, &k_rest, &v, &y_wide, &y_rest};
    attend<Plan<72, 3, 128, 2, 32, 72, 1>>(maps, lse, n, h, samples, scale);
}
KERNEL_EXPORT(attention_forward_72_192x128);

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_72_128x128(
    const __grid_constant__ TensorMap q_wide, const __grid_constant__ TensorMap q_rest,
    const __grid_constant__ TensorMap k_wide, const __grid_constant__ TensorMap k_rest,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap y_wide,
    const __grid_constant__ TensorMap y_rest, float* lse, int n, int h, int samples, float scale) {
    const Maps maps{&q_wide, &q_rest, &k_wide, &k_rest, &v, &y_wide, &y_rest};
    attend<Plan<72, 2, 128, 3, 32, 80, 1>>(maps, lse, n, h, samples, scale);
}
KERNEL_EXPORT(attention_forward_72_128x128);

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_64_128x128(
    const __grid_constant__ TensorMap q_wide, const __grid_constant__ TensorMap q_rest,
    const __grid_constant__ TensorMap k_wide, const __grid_constant__ TensorMap k_rest,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap y_wide,
    const __grid_constant__ TensorMap y_rest, float* lse, int n, int h, int samples, float scale) {
    const Maps maps{&q_wide, &q_rest, &k_wide, &k_rest, &v, &y_wide, &y_rest};
    attend<Plan<64, 2, 128, 3, 128, 64, 1>>(maps, lse, n, h, samples, scale);
}
KERNEL_EXPORT(attention_forward_64_128x128);

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_128_128x128(
    const __grid_constant__ TensorMap q_wide, const __grid_constant__ TensorMap q_rest,
    const __grid_constant__ TensorMap k_wide, const __grid_constant__ TensorMap k_rest,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap y_wide,
    const __grid_constant__ TensorMap y_rest, float* lse, int n, int h, int samples, float scale) {
    const Maps maps{&q_wide, &q_rest, &k_wide, &k_rest, &v, &y_wide, &y_rest};
    attend<Plan<128, 2, 128, 2, 128, 128, 1>>(maps, lse, n, h, samples, scale);
}
KERNEL_EXPORT(attention_forward_128_128x128);
