// The main loop of products by mma.sync: a ring of tiles filled by cp.async, fragments by ldmatrix.
#pragma once
#include "linear.cuh"

namespace linear {

constexpr int kMmaDepth = 32;

// An operand as it lies in memory: [rows, depth] with the depth contiguous or, across, [depth, rows].
struct Operand {
    const T* at;
    size_t stride;
    int rows;
};

// A block owns M×N results, its 2×kWarpsN warps M/2×N/kWarpsN each, as 16×8 fragments.
template <int M, int N, bool kAcrossA, bool kAcrossB, int kWarpsN = 2, int kStages = 4> struct Mma {
    static constexpr int kThreads = 64 * kWarpsN, kOwnM = M / 2, kOwnN = N / kWarpsN;
    static constexpr int kBlocksM = kOwnM / 16, kBlocksN = kOwnN / 8;
    // Bytes of a row of each tile, and of a tile.
    static constexpr int kRowA = 2 * (kAcrossA ? M : kMmaDepth), kRowB = 2 * (kAcrossB ? N : kMmaDepth);
    static constexpr int kTileA = 2 * M * kMmaDepth, kTileB = 2 * N * kMmaDepth, kStage = kTileA + kTileB;
    static constexpr int kSlab = kOwnN % 64 ? 32 : 64;
    static constexpr int kBytes = kStages * kStage;
    static_assert(kBytes >= 2 * kWarpsN * Slab<kSlab>::kBytes, "the ring's memory holds the epilogue's slabs afterwards");

    template <bool kAcross, int kRows, int kRowBytes>
    static PTX_FN void copy(uint32_t to, const Operand& x, int row0, int k, int end) {
        if constexpr (kAcross)
            tile_copy<kMmaDepth, kRowBytes, kThreads>(to, x.at + k * x.stride + row0, x.stride, end - k,
                                                         x.rows - row0);
        else
            tile_copy<kRows, kRowBytes, kThreads>(to, x.at + row0 * x.stride + k, x.stride, x.rows - row0, end - k);
    }

    static PTX_FN void multiply(float (&acc)[kBlocksM][kBlocksN][4], uint32_t stage) {
        const int row = own_row(), column = own_column();
#pragma unroll
        for (int k = 0; k < kMmaDepth; k += 16) {
            uint32_t a[kBlocksM][4], b[kBlocksN / 2][4];
#pragma unroll
            for (int i = 0; i < kBlocksM; i++) {
                if constexpr (kAcrossA)
                    fragment_a_across<kRowA>(a[i], stage, row + 16 * i, k);
                else
                    fragment_a<kRowA>(a[i], stage, row + 16 * i, k);
            }
#pragma unroll
            for (int j = 0; j < kBlocksN / 2; j++) {
                if constexpr (kAcrossB)
                    fragment_b_across<kRowB>(b[j], stage + kTileA, column + 16 * j, k);
                else
                    fragment_b<kRowB>(b[j], stage + kTileA, column + 16 * j, k);
            }
#pragma unroll
            for (int i = 0; i < kBlocksM; i++) {
#pragma unroll
                for (int j = 0; j < kBlocksN; j++)
                    mma_m16n8k16<bf16>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }

    // The first of the results that this warp owns.
    static PTX_FN int own_row() { return int(threadIdx.x) / 32 / kWarpsN * kOwnM; }
    static PTX_FN int own_column() { return int(threadIdx.x) / 32 % kWarpsN * kOwnN; }

    // acc = the sum over `steps` steps of the depth; copy(stage, step) starts the copies of one into the ring at `base`.
    // All warps have read the ring when it returns.
    template <class Copy>
    static PTX_FN void products(float (&acc)[kBlocksM][kBlocksN][4], uint32_t base, int steps, const Copy& copy) {
        auto fill = [&](int step) {
            if (step < steps) copy(base + uint32_t(step % kStages * kStage), step);
            // An empty group where nothing is left: the count of those in flight stays what the wait expects.
            cp_async_commit();
        };
#pragma unroll
        for (int i = 0; i < kBlocksM; i++) {
#pragma unroll
            for (int j = 0; j < kBlocksN; j++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
        }
        for (int step = 0; step < kStages - 1; step++) fill(step);
        for (int step = 0; step < steps; step++) {
            // This thread's copies of the step have landed, then everyone's; and all have read the step before, whose
            // place is filled next.
            cp_async_wait<kStages - 2>();
            __syncthreads();
            fill(step + kStages - 1);
            multiply(acc, base + uint32_t(step % kStages * kStage));
        }
        __syncthreads();
    }

    // The tile and the part of the depth that this block owns, given to `out`.
    template <class Out>
    static PTX_FN void run(unsigned char* smem, const Operand& x, const Operand& w, int depth, int part, const Out& out) {
        const uint32_t base = smem_u32(smem);
        const Tile tile = tile_of(int(blockIdx.x), (x.rows + M - 1) / M, (w.rows + N - 1) / N);
        const int row0 = tile.row * M, column0 = tile.column * N;
        const int first = int(blockIdx.y) * part, end = min(depth, first + part);
        REG(float, acc, [kBlocksM][kBlocksN][4]);
        products(acc, base, (end - first + kMmaDepth - 1) / kMmaDepth, [&](uint32_t stage, int step) {
            copy<kAcrossA, M, kRowA>(stage, x, row0, first + step * kMmaDepth, end);
            copy<kAcrossB, N, kRowB>(stage + kTileA, w, column0, first + step * kMmaDepth, end);
        });
        const uint32_t slab = base + uint32_t(threadIdx.x / 32 * Slab<kSlab>::kBytes);
        store_blocks(slab, row0 + own_row(), column0 + own_column(), acc, out);
    }

    template <class Out>
    static PTX_FN void store_blocks(uint32_t slab, int row, int column, const float (&acc)[kBlocksM][kBlocksN][4],
                                    const Out& out) {
        constexpr int kPieces = kBlocksN * 8 / kSlab, kEach = kSlab / 8;
        // One loop over all slabs of the warp, so that the epilogue's code stands once.
#pragma unroll 1
        for (int piece = 0; piece < kBlocksM * kPieces; piece++) {
            __syncwarp();
#pragma unroll
            for (int other = 0; other < kBlocksM * kPieces; other++) {
                if (other != piece) continue;
#pragma unroll
                for (int j = 0; j < kEach; j++) {
                    const float(&d)[4] = acc[other / kPieces][other % kPieces * kEach + j];
                    Slab<kSlab>::put(slab, j, d[0], d[1], d[2], d[3]);
                }
            }
            __syncwarp();
            store_slab<kSlab>(slab, row + piece / kPieces * 16, column + piece % kPieces * kSlab, int(blockIdx.y), out);
        }
    }
};

}  // namespace linear
