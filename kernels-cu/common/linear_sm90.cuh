// The main loop of products on Hopper: one warpgroup loads by TMA, two multiply by wgmma, blocks stay for all tiles.
#pragma once
#include "linear.cuh"

namespace linear {

constexpr int kWgmmaRows = 128;
// Bytes of a box of 64 rows of 128 bytes, and of 8 such rows, which the swizzle repeats after.
constexpr uint32_t kBox = 8192, kAtom = 1024;

// Which results of which part of the depth: work is numbered tile by tile, parts of the depth outermost.
struct Piece {
    int row, column, part, first, end;
};

// What a launch computes: [rows, columns] results over the depth, in parts of it.
struct Task {
    // Boxes that the second operand of a stage lies in, `columns` rows apart; and whether the epilogue wants whole tiles.
    static constexpr int kParts = 1;
    static constexpr bool kWhole = false;
    int rows, columns, depth, part, parts;

    // Tiles of kHeight×kWide, each as often as there are parts.
    template <int kHeight, int kWide> PTX_FN int count() const {
        return ((rows + kHeight - 1) / kHeight) * ((columns + kWide - 1) / kWide) * parts;
    }
    // The piece `index` of a cluster, of which the block `rank` has 128 rows.
    template <int kHeight, int kWide> PTX_FN Piece piece(int index, int rank) const {
        const int down = (rows + kHeight - 1) / kHeight, across = (columns + kWide - 1) / kWide;
        const int which = index / (down * across), first = which * part;
        const Tile tile = tile_of(index % (down * across), down, across);
        return {tile.row * kHeight + rank * kWgmmaRows, tile.column * kWide, which, first, min(depth, first + part)};
    }
};

// A place in the ring of stages, and the parity of its round.
template <int kStages> struct Place {
    int stage = 0, parity = 0;

    PTX_FN void advance(int steps) {
        const int at = stage + steps;
        stage = at % kStages;
        parity ^= at / kStages & 1;
    }
    PTX_FN void next() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// Tiles of 128×kWide. kTurns: the two multiplying warpgroups take whole tiles in turn, so that one's epilogue runs under
// the other's products; else they share each tile, 64 rows each. Operands as in linear_mma.cuh: [rows, depth] or, across,
// [depth, rows]. kSlab: columns of the epilogue's pieces. kCluster: 2 where blocks work in pairs on two tiles, one below
// the other: each loads half of their common columns for both. E: bf16, or e4m3, which lies along the depth alone.
template <int kWide, int kStages, int kSlab, bool kTurns, bool kAcrossA, bool kAcrossB, int kCluster = 1, class E = bf16>
struct Warpgroups {
    // Elements of a row of 128 bytes.
    static constexpr int kDepth = 128 / int(sizeof(E));
    static constexpr int kBlocks = kTurns ? 2 : 1, kPieces = kWide / kSlab;
    static constexpr int kTileA = 128 * kWgmmaRows, kTileB = 128 * kWide;
    static constexpr int kStage = kTileA + kTileB, kRing = kStages * kStage;
    static constexpr int kBytes = kRing + 8 * Slab<kSlab>::kBytes;
    static_assert(kBytes <= 226 << 10, "shared memory of a block, less the kibibyte that the barriers take");

    // Rows of the tiles of a cluster.
    static constexpr int kHeight = kCluster * kWgmmaRows;
    static_assert(kCluster == 1 || !kAcrossB, "halves of boxes across the depth are not cut");

    static PTX_FN int rank() { return kCluster == 1 ? 0 : int(cluster_rank()); }
    template <class Work> static PTX_FN int work(const Work& task) { return task.template count<kHeight, kWide>(); }
    template <class Work> static PTX_FN Piece piece(const Work& task, int index) {
        return task.template piece<kHeight, kWide>(index, rank());
    }

    // `bars`: 2·kStages barriers; the first half says that a stage is full, the second that it is empty.
    template <class Work, class Out>
    static PTX_FN void run(unsigned char* smem, uint64_t* bars, const TensorMap* a, const TensorMap* b, const Work& task,
                           const Out& out) {
        const uint32_t base = smem_u32(smem), full = smem_u32(bars), empty = full + 8 * kStages;
        if (threadIdx.x == 0) {
            tma_prefetch_map(a), tma_prefetch_map(b);
            for (int s = 0; s < kStages; s++) {
                mbarrier_init(full + 8 * s, 1);
                // Each warp that multiplies what lies there.
                mbarrier_init(empty + 8 * s, kCluster * (kTurns ? 4 : 8));
            }
            fence_mbarrier_init();
        }
        if constexpr (kCluster == 1)
            __syncthreads();
        else
            cluster_sync();
        wait_for_previous();
        // The same in all lanes, known to be so: addresses then lie in uniform registers.
        const int group = __shfl_sync(kFullMask, int(threadIdx.x) / 128, 0);
        if (group == 0) {
            setmaxnreg_dec<24>();
            if (threadIdx.x == 0) load(base, full, empty, a, b, task);
        } else {
            setmaxnreg_inc<240>();
            multiply(base, full, empty, group - 1, task, out);
        }
        if constexpr (kCluster > 1) {
            // Neither block ends while the other may still write or arrive in it.
            __syncwarp();
            cluster_sync();
        }
    }

    // A warp has read a stage; every block that fills it is told.
    static PTX_FN void release(uint32_t bar) {
        const int lane = threadIdx.x % 32;
        if constexpr (kCluster == 1) {
            if (lane == 0) mbarrier_arrive(bar);
        } else {
            if (lane < kCluster) mbarrier_arrive_cluster(mapa(bar, uint32_t(lane)));
        }
    }

    template <class Work>
    static PTX_FN void load(uint32_t base, uint32_t full, uint32_t empty, const TensorMap* a, const TensorMap* b,
                            const Work& task) {
        Place<kStages> place;
        for (int index = blockIdx.x / kCluster, all = work(task); index < all; index += gridDim.x / kCluster) {
            const Piece p = piece(task, index);
            for (int k = p.first; k < p.end; k += kDepth, place.next()) {
                const uint32_t to = base + uint32_t(place.stage * kStage), bar = full + 8 * place.stage;
                if constexpr (kCluster == 1)
                    mbarrier_wait(empty + 8 * place.stage, place.parity ^ 1);
                else
                    mbarrier_wait_cluster(empty + 8 * place.stage, place.parity ^ 1);
                mbarrier_arrive_expect_tx(bar, kStage);
                if constexpr (kAcrossA) {
#pragma unroll
                    for (int i = 0; i < kWgmmaRows / 64; i++) tma_load(to + i * kBox, a, {p.row + 64 * i, k}, bar);
                } else {
                    tma_load(to, a, {k, p.row}, bar);
                }
                if constexpr (kAcrossB) {
#pragma unroll
                    for (int i = 0; i < kWide / 64; i++)
                        tma_load(to + kTileA + i * kBox, b, {p.column + 64 * i, k}, bar);
                } else if constexpr (kCluster == 1) {
#pragma unroll
                    for (int i = 0; i < Work::kParts; i++)
                        tma_load(to + kTileA + i * (kTileB / Work::kParts), b, {k, p.column + i * task.columns}, bar);
                } else {
                    // Bytes may come to the other block's barrier before that expects them: its phase ends with both.
                    constexpr int kHalf = kWide / kCluster;
                    tma_load_multicast(to + kTileA + rank() * kHalf * 128, b, {k, p.column + rank() * kHalf}, bar,
                                       uint16_t(3));
                }
            }
        }
        start_next();
    }

    // A tile of 64 rows or kWide columns at `at`, from a quarter of its depth on. Along the depth a step is 32 bytes of
    // every row; across it, 16 rows.
    template <bool kAcross> static PTX_FN uint64_t operand(uint32_t at, int step) {
        return kAcross ? wgmma_desc(at + step * 2 * kAtom, kBox, kAtom, 128) : wgmma_desc(at + step * 32, 16, kAtom, 128);
    }

    template <class Work, class Out>
    static PTX_FN void multiply(uint32_t base, uint32_t full, uint32_t empty, int me, const Work& task, const Out& out) {
        REG(float, acc, [kBlocks][kWide / 2]);
        Place<kStages> place;
        int turn = 0;
        // Named barrier 1 + m lets warpgroup m begin a tile: the other has waited for all that lies in the ring before
        // it. Without, this one could run a round ahead, where the parity of a stage says nothing.
        if (kTurns && me == 1) bar_arrive(1, 256);
        // Named barrier 3 + m lets warpgroup m use the one place that whole tiles go through.
        if (Work::kWhole && me == 1) bar_arrive(3, 256);
        for (int index = blockIdx.x / kCluster, all = work(task); index < all;
             index += gridDim.x / kCluster, turn ^= 1) {
            const Piece p = piece(task, index);
            const int steps = (p.end - p.first + kDepth - 1) / kDepth;
            if (kTurns && turn != me) {
                place.advance(steps);
                continue;
            }
            if constexpr (kTurns) bar_sync(1 + me, 256);
            if constexpr (Work::kWhole) {
                // Nothing is kept from the last tile, so its epilogue may use the registers of the sums.
#pragma unroll
                for (int i = 0; i < kBlocks; i++) {
#pragma unroll
                    for (int j = 0; j < kWide / 2; j++) acc[i][j] = 0.0f;
                }
            }
            int before = 0;
            for (int step = 0; step < steps; step++) {
                const uint32_t from = base + uint32_t(place.stage * kStage);
                mbarrier_wait(full + 8 * place.stage, place.parity);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; k++) {
#pragma unroll
                    for (int i = 0; i < kBlocks; i++)
                        wgmma_ss<E, kWide, kAcrossA, kAcrossB>(
                            acc[i], operand<kAcrossA>(from + (kTurns ? i : me) * kBox, k),
                            operand<kAcrossB>(from + kTileA, k), k ? 1 : step != 0);
                }
                wgmma_commit();
                // The step before has been multiplied: its stage may be filled again.
                wgmma_wait<1>();
                if (step) release(empty + 8 * before);
                before = place.stage;
                place.next();
            }
            // Nobody waits after the last tile.
            if (kTurns && index + int(gridDim.x) / kCluster < all) bar_arrive(2 - me, 256);
            wgmma_wait<0>();
            release(empty + 8 * before);
            if constexpr (Work::kWhole) {
                bar_sync(3 + me, 256);
                out.whole(base + kRing, acc, p, me);
                if (index + int(gridDim.x) / kCluster < all) bar_arrive(4 - me, 256);
            } else {
                const int warp = threadIdx.x / 32 % 4;
                const uint32_t slab = base + uint32_t(kRing + (4 * me + warp) * Slab<kSlab>::kBytes);
                const int row = p.row + (kTurns ? 0 : 64 * me) + 16 * warp;
                // One loop over all pieces, so that the epilogue's code stands once.
#pragma unroll 1
                for (int at = 0; at < kBlocks * kPieces; at++) {
                    __syncwarp();
#pragma unroll
                    for (int other = 0; other < kBlocks * kPieces; other++) {
                        if (other != at) continue;
#pragma unroll
                        for (int j = 0; j < kSlab / 8; j++) {
                            const float* d = acc[other / kPieces] + other % kPieces * (kSlab / 2) + 4 * j;
                            Slab<kSlab>::put(slab, j, d[0], d[1], d[2], d[3]);
                        }
                    }
                    __syncwarp();
                    store_slab<kSlab>(slab, row + at / kPieces * 64, p.column + at % kPieces * kSlab, p.part, out);
                }
            }
        }
    }
};

}  // namespace linear
