// The main loop of products by mma.sync: a ring of tiles filled by cp.async, fragments by ldmatrix, 4 warps.
#pragma once
#include "../common/linear.cuh"

namespace linear {

constexpr int kMmaThreads = 128, kMmaDepth = 32, kMmaStages = 4;

// An operand as it lies in memory: [rows, depth] with the depth contiguous or, across, [depth, rows].
struct Operand {
    const T* at;
    size_t stride;
    int rows;
};

// A block owns M×N results, its 2×2 warps M/2×N/2 each, as 16×8 fragments.
template <int M, int N, bool kAcrossA, bool kAcrossB> struct Mma {
    static constexpr int kBlocksM = M / 32, kBlocksN = N / 16;
    // Bytes of a row of each tile, and of a tile.
    static constexpr int kRowA = 2 * (kAcrossA ? M : kMmaDepth), kRowB = 2 * (kAcrossB ? N : kMmaDepth);
    static constexpr int kTileA = 2 * M * kMmaDepth, kTileB = 2 * N * kMmaDepth, kStage = kTileA + kTileB;
    static constexpr int kSlab = N / 2 < 64 ? N / 2 : 64;
    static constexpr int kBytes = kMmaStages * kStage;
    static_assert(kBytes >= 4 * Slab<kSlab>::kBytes, "the ring's memory holds the slabs of the epilogue afterwards");

    template <bool kAcross, int kRows, int kRowBytes>
    static PTX_FN void copy(uint32_t to, const Operand& x, int row0, int k, int end) {
        if constexpr (kAcross)
            tile_copy<kMmaDepth, kRowBytes, kMmaThreads>(to, x.at + k * x.stride + row0, x.stride, end - k,
                                                         x.rows - row0);
        else
            tile_copy<kRows, kRowBytes, kMmaThreads>(to, x.at + row0 * x.stride + k, x.stride, x.rows - row0, end - k);
    }

    static PTX_FN void multiply(float (&acc)[kBlocksM][kBlocksN][4], uint32_t stage) {
        const int warp = threadIdx.x / 32, row = warp / 2 * (M / 2), column = warp % 2 * (N / 2);
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

    // The tile and the part of the depth that this block owns, given to `out`.
    template <class Out>
    static PTX_FN void run(unsigned char* smem, const Operand& x, const Operand& w, int depth, int part, const Out& out) {
        const uint32_t base = smem_u32(smem);
        const Tile tile = tile_of(int(blockIdx.x), (x.rows + M - 1) / M, (w.rows + N - 1) / N);
        const int row0 = tile.row * M, column0 = tile.column * N;
        const int first = int(blockIdx.y) * part, end = min(depth, first + part);
        const int steps = (end - first + kMmaDepth - 1) / kMmaDepth;
        auto fill = [&](int step) {
            const uint32_t stage = base + uint32_t(step % kMmaStages * kStage);
            if (step < steps) {
                copy<kAcrossA, M, kRowA>(stage, x, row0, first + step * kMmaDepth, end);
                copy<kAcrossB, N, kRowB>(stage + kTileA, w, column0, first + step * kMmaDepth, end);
            }
            // An empty group where nothing is left: the count of those in flight stays what the wait expects.
            cp_async_commit();
        };
        REG(float, acc, [kBlocksM][kBlocksN][4]);
#pragma unroll
        for (int i = 0; i < kBlocksM; i++) {
#pragma unroll
            for (int j = 0; j < kBlocksN; j++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
        }
        for (int step = 0; step < kMmaStages - 1; step++) fill(step);
        for (int step = 0; step < steps; step++) {
            // This thread's copies of the step have landed, then everyone's; and all have read the step before, whose
            // place is filled next.
            cp_async_wait<kMmaStages - 2>();
            __syncthreads();
            fill(step + kMmaStages - 1);
            multiply(acc, base + uint32_t(step % kMmaStages * kStage));
        }
        __syncthreads();
        const int warp = threadIdx.x / 32;
        const uint32_t slab = base + uint32_t(warp * Slab<kSlab>::kBytes);
        store_blocks(slab, row0 + warp / 2 * (M / 2), column0 + warp % 2 * (N / 2), acc, out);
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
