// Convolutions on the tensor cores, as a product of windows with filters: mma.sync on bf16, operands in shared memory.
//
// A row of an operand is 64 values of the depth, 128 bytes, swizzled as mma_tile.cuh has it. Rows arrive by cp.async,
// whose zeros are those of the padding and of whatever is outside of the tensors.
//
// Two ways to have the windows in shared memory:
//   conv_windows  any kernel, stride and padding: the depth (tap, channel) is one axis, and a stage holds the 64 values
//                 of every window of the tile. A pixel is read once for each tap.
//   conv_halo     3x3, stride 1: 8x16 results and the 10x18 pixels around them, 64 channels at a time; the nine taps
//                 read the same pixels at other rows. A pixel is read 1.4 times, so that what is done to a pixel on its
//                 way (group norm and SiLU) is done 1.4 times for each tile of filters, not nine times.
#pragma once
#include "activation.cuh"
#include "memory.cuh"
#include "mma_tile.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace ptx {

constexpr int kConvDepth = 64, kConvRow = 128;

// A tile of M×N results by kWarpsM×kWarpsN warps, each of which has kRows×kColumns tiles of 16×8.
template <int M, int N, int kWarpsM, int kWarpsN> struct ConvTile {
    static constexpr int kM = M, kN = N, kThreads = 32 * kWarpsM * kWarpsN;
    static constexpr int kRows = M / kWarpsM / 16, kColumns = N / kWarpsN / 8;
    static_assert(kRows > 0 && kColumns % 2 == 0, "ldmatrix reads 16 rows of either operand");
    // The results as f32 in shared memory: eight more a row spread the rows over the banks.
    static constexpr int kPitch = N + 8, kResultBytes = M * kPitch * 4;

    static PTX_FN int first_row() { return int(threadIdx.x / 32) / kWarpsN * (M / kWarpsM); }
    static PTX_FN int first_column() { return int(threadIdx.x / 32) % kWarpsN * (N / kWarpsN); }

    static PTX_FN void clear(float (&acc)[kRows][kColumns][4]) {
#pragma unroll
        for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int j = 0; j < kColumns; j++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
        }
    }

    // After this thread's copies have arrived and before the barrier that shows them to all: nothing to do.
    static PTX_FN void hand_over() {}

    // acc += A·Bᵀ over 64 of the depth; row_of(i): the row in A of the first result row of tile i, whose others follow.
    template <class F>
    static PTX_FN void multiply(float (&acc)[kRows][kColumns][4], uint32_t a, uint32_t b, F row_of PTX_AT) {
#pragma unroll
        for (int k = 0; k < kConvDepth; k += 16) {
            uint32_t right[kColumns / 2][4];
#pragma unroll
            for (int j = 0; j < kColumns / 2; j++)
                fragment_b<kConvRow>(right[j], b, first_column() + 16 * j, k PTX_FROM);
#pragma unroll
            for (int i = 0; i < kRows; i++) {
                uint32_t left[4];
                fragment_a<kConvRow>(left, a, row_of(i), k PTX_FROM);
#pragma unroll
                for (int j = 0; j < kColumns; j++)
                    mma_m16n8k16<bf16>(acc[i][j], left, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1] PTX_FROM);
            }
        }
    }

    // Lays the results out in `tile` ([M][kPitch] f32, which the block has left), then put(row, column, v) has eight
    // columns of a row at a time.
    template <class F> static PTX_FN void results(const float (&acc)[kRows][kColumns][4], float* tile, F put) {
        const int lane = threadIdx.x % 32;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int j = 0; j < kColumns; j++) {
                float* to = tile + (first_row() + 16 * i + lane / 4) * kPitch + first_column() + 8 * j + lane % 4 * 2;
                *reinterpret_cast<float2*>(to) = make_float2(acc[i][j][0], acc[i][j][1]);
                *reinterpret_cast<float2*>(to + 8 * kPitch) = make_float2(acc[i][j][2], acc[i][j][3]);
            }
        }
        __syncthreads();
        for (int at = threadIdx.x; at < M * (N / 8); at += kThreads) {
            const int row = at / (N / 8), column = at % (N / 8) * 8;
            float v[8];
            unpack4(v, *reinterpret_cast<const uint4*>(tile + row * kPitch + column));
            unpack4(v + 4, *reinterpret_cast<const uint4*>(tile + row * kPitch + column + 4));
            put(row, column, v);
        }
    }
};

// Where results go and what is added to them: bias [F] and residual (as y) may be null.
struct ConvResult {
    const bf16 *bias, *residual;
    bf16* y;
    int f, relu;

    // Eight filters from `column` of one pixel. Vectors where every row of y is aligned.
    PTX_FN void put(size_t pixel, int column, float (&v)[8]) const {
        const size_t first = pixel * f + column;
        const bool whole = vector_rows(f);
        float more[8];
        if (bias && whole) {
            load8_kept(more, bias + column);
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += more[i];
        } else if (bias) {
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += column + i < f ? to_float(bias[column + i]) : 0.0f;
        }
        // A NaN stays one.
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = relu && v[i] < 0.0f ? 0.0f : v[i];
        if (residual && whole) {
            load8(more, residual + first);
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += more[i];
        } else if (residual) {
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += column + i < f ? to_float(residual[first + i]) : 0.0f;
        }
        if (whole) {
            store8(y + first, v);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (column + i < f) y[first + i] = from_float<bf16>(v[i]);
        }
    }
};

// ---- any kernel ----

// Stages of both operands, and for every window its first row and column and the offset of its corner.
template <class Tile, int kStages> struct ConvWindowsPlan {
    static constexpr int kStage = (Tile::kM + Tile::kN) * kConvRow, kRing = kStages * kStage;
    static constexpr int kRingBytes = kRing > Tile::kResultBytes ? kRing : Tile::kResultBytes;
    SmemPlan plan;
    int ring = plan.take(kRingBytes, 128);
    int corners = plan.take(Tile::kM * 8, 16);
    int offsets = plan.take(Tile::kM * 8, 16);
};

template <class Tile, int kStages, class E>
PTX_FN void conv_windows(const E* x, const E* filters, const E* bias, E* y, int b, int h, int w, int c, int f, int kh,
                         int kw, int oh, int ow, int stride, int pad_h, int pad_w, int relu) {
    if constexpr (same<E, bf16>) {
        constexpr ConvWindowsPlan<Tile, kStages> plan;
        constexpr int kTurn = Tile::kThreads / 8;
        SMEM_DYNAMIC(smem, 128);
        smem_guard(smem, plan.ring + plan.kRingBytes);
        smem_guard(smem, plan.corners + Tile::kM * 8);
        smem_guard(smem, plan.offsets + Tile::kM * 8);
        const uint32_t ring = smem_u32(smem + plan.ring);
        int2* corners = reinterpret_cast<int2*>(smem + plan.corners);
        int64_t* offsets = reinterpret_cast<int64_t*>(smem + plan.offsets);
        const int tiles = (f + Tile::kN - 1) / Tile::kN, depth = kh * kw * c;
        const size_t rows = size_t(b) * oh * ow, row0 = size_t(blockIdx.x / tiles) * Tile::kM;
        const int column0 = int(blockIdx.x % tiles) * Tile::kN;
        for (int i = threadIdx.x; i < Tile::kM; i += Tile::kThreads) {
            const size_t row = row0 + i;
            const int image = int(row / (size_t(oh) * ow));
            const int top = int(row / ow % oh) * stride - pad_h, left = int(row % ow) * stride - pad_w;
            // Far above every image where there is no such row.
            corners[i] = make_int2(row < rows ? top : -(1 << 30), left);
            offsets[i] = ((int64_t(image) * h + top) * w + left) * c;
        }
        __syncthreads();
        // This thread's chunk of every row, and the tap and the channel that it is.
        const int turn = threadIdx.x / 8, chunk = threadIdx.x % 8;
        int k = 8 * chunk, channel = k, p = 0, q = 0;
        const auto wrap = [&] {
            while (channel >= c) {
                channel -= c;
                if (++q == kw) q = 0, p++;
            }
        };
        wrap();
        const auto load = [&](int stage) {
            const uint32_t a = ring + stage * plan.kStage, of = a + Tile::kM * kConvRow;
            const int64_t shift = (int64_t(p) * w + q) * c + channel;
#pragma unroll
            for (int i = turn; i < Tile::kM; i += kTurn) {
                const int2 corner = corners[i];
                const int row = corner.x + p, column = corner.y + q;
                const bool inside = k < depth && uint32_t(row) < uint32_t(h) && uint32_t(column) < uint32_t(w);
                cp_async(a + tile_at<kConvRow>(i, chunk), x + (inside ? offsets[i] + shift : 0), inside ? 16 : 0);
            }
#pragma unroll
            for (int i = turn; i < Tile::kN; i += kTurn) {
                const bool inside = k < depth && column0 + i < f;
                const size_t from = size_t(column0 + i) * depth + k;
                cp_async(of + tile_at<kConvRow>(i, chunk), filters + (inside ? from : 0), inside ? 16 : 0);
            }
            k += kConvDepth, channel += kConvDepth;
            wrap();
        };
        REG(float, acc, [Tile::kRows][Tile::kColumns][4]);
        Tile::clear(acc);
        const int steps = (depth + kConvDepth - 1) / kConvDepth;
#pragma unroll
        for (int step = 0; step < kStages - 1; step++) {
            if (step < steps) load(step);
            cp_async_commit();
        }
        int at = 0, next = kStages - 1;
        for (int step = 0; step < steps; step++) {
            cp_async_wait<kStages - 2>();
            __syncthreads();
            if (step + kStages - 1 < steps) load(next);
            cp_async_commit();
            const uint32_t a = ring + at * plan.kStage;
            Tile::multiply(acc, a, a + Tile::kM * kConvRow, [](int i) { return Tile::first_row() + 16 * i; });
            at = at + 1 == kStages ? 0 : at + 1, next = next + 1 == kStages ? 0 : next + 1;
        }
        cp_async_wait<0>();
        const ConvResult result = {bias, nullptr, y, f, relu};
        Tile::results(acc, reinterpret_cast<float*>(smem + plan.ring), [&](int row, int column, float (&v)[8]) {
            if (row0 + row < rows && column0 + column < f) result.put(row0 + row, column0 + column, v);
        });
    }
}

// ---- 3x3, stride 1 ----

constexpr int kHaloW = 16, kHaloTaps = 9;

template <class Tile, int kStages> struct ConvHaloPlan {
    // Pixels of the tile with those around it.
    static constexpr int kPixels = (Tile::kM / kHaloW + 2) * (kHaloW + 2), kPixelBytes = kPixels * kConvRow;
    static constexpr int kStage = Tile::kN * kConvRow, kRing = 2 * kPixelBytes + kStages * kStage;
    static constexpr int kRingBytes = kRing > Tile::kResultBytes ? kRing : Tile::kResultBytes;
    // Chunks of pixels that a thread has. They are worked on some at a time, beside the taps that are left when they
    // have arrived.
    static constexpr int kTurn = Tile::kThreads / 8, kPieces = (kPixels + kTurn - 1) / kTurn;
    static constexpr int kLeft = kHaloTaps - (kStages - 1), kAtOnce = (kPieces + kLeft - 1) / kLeft;
    static_assert((kStages & (kStages - 1)) == 0, "stages are counted by masks");
    static_assert(2 * kPixelBytes % 1024 == 0 && kStage % 1024 == 0, "stages of filters begin where a swizzle does");
    SmemPlan plan;
    int ring = plan.take(kRingBytes, 1024);
};

// maps: [B][C/4][2][4], factor and addend of a channel, as of a norm: where kNorm pixels become silu(x·factor + addend),
// and zero outside of the image all the same. filters: [F, 3, 3, C]. Blocks: [B][rows of tiles][tiles of a row][tiles of
// filters]. One image and the filters, these counted up to a whole tile, have fewer than 2^31 numbers.
template <class Tile, int kStages, bool kNorm, class E>
PTX_FN void conv_halo(const E* x, const float* maps, const E* filters, const E* bias,
                      const E* residual, E* y, int h, int w, int c, int f, int oh, int ow, int pad_h, int pad_w,
                      int relu) {
    if constexpr (same<E, bf16>) {
        using Plan = ConvHaloPlan<Tile, kStages>;
        constexpr Plan plan;
        SMEM_DYNAMIC(smem, 1024);
        smem_guard(smem, plan.ring + plan.kRingBytes);
        const uint32_t pixels = smem_u32(smem + plan.ring), stages = pixels + 2 * plan.kPixelBytes;
        constexpr int kHeight = Tile::kM / kHaloW;
        const int tiles = (f + Tile::kN - 1) / Tile::kN, across = (ow + kHaloW - 1) / kHaloW;
        const int down = (oh + kHeight - 1) / kHeight;
        const int column0 = int(blockIdx.x % tiles) * Tile::kN, place = blockIdx.x / tiles;
        const int image = place / (across * down);
        const int row0 = place / across % down * kHeight, left0 = place % across * kHaloW;
        const int turn = threadIdx.x / 8, chunk = threadIdx.x % 8, chunks = (c + kConvDepth - 1) / kConvDepth;
        const E* picture = x + size_t(image) * h * w * c;
        // Whether piece i of this thread is a pixel of the image, and which.
        const auto pixel_of = [&](int i, int& pixel) {
            const int at = turn + i * plan.kTurn;
            const int row = row0 + at / (kHaloW + 2) - pad_h, column = left0 + at % (kHaloW + 2) - pad_w;
            pixel = row * w + column;
            return at < plan.kPixels && uint32_t(row) < uint32_t(h) && uint32_t(column) < uint32_t(w);
        };
        const auto load_pixels = [&](int part) {
            const uint32_t to = pixels + part % 2 * plan.kPixelBytes;
            const int channel = part * kConvDepth + 8 * chunk;
#pragma unroll 1
            for (int i = 0; i < plan.kPieces; i++) {
                int pixel;
                const bool inside = pixel_of(i, pixel) && channel < c;
                const int at = turn + i * plan.kTurn;
                const E* from = picture + (inside ? pixel * c + channel : 0);
                if (at < plan.kPixels) cp_async(to + tile_at<kConvRow>(at, chunk), from, inside ? 16 : 0);
            }
        };
        // Piece i of this thread, in place: it copied it itself.
        const auto activate = [&](int part, int i) {
            int pixel;
            const int channel = part * kConvDepth + 8 * chunk;
            if (!pixel_of(i, pixel) || channel >= c) return;
            const uint32_t to = pixels + part % 2 * plan.kPixelBytes;
            const uint32_t at = to + tile_at<kConvRow>(turn + i * plan.kTurn, chunk);
            const int of = image * c + channel;
            // Four at a time: registers.
#pragma unroll 1
            for (int half = 0; half < 2; half++) {
                const uint2 pair = ld_shared_v2(at + 8 * half);
                const float4* map = reinterpret_cast<const float4*>(maps) + of / 2 + 2 * half;
                const float4 factor = map[0], addend = map[1];
                const float a0 = fmaf(unpack_lo<bf16>(pair.x), factor.x, addend.x);
                const float a1 = fmaf(unpack_hi<bf16>(pair.x), factor.y, addend.y);
                const float a2 = fmaf(unpack_lo<bf16>(pair.y), factor.z, addend.z);
                const float a3 = fmaf(unpack_hi<bf16>(pair.y), factor.w, addend.w);
                const uint2 done = make_uint2(pack<bf16>(a0 * sigmoid(a0), a1 * sigmoid(a1)),
                                              pack<bf16>(a2 * sigmoid(a2), a3 * sigmoid(a3)));
                st_shared_v2(at + 8 * half, done);
            }
        };
        const auto load_filters = [&](int part, int tap, int stage) {
            const int channel = part * kConvDepth + 8 * chunk;
            int from = ((column0 + turn) * kHaloTaps + tap) * c + channel;
#pragma unroll
            for (int i = turn; i < Tile::kN; i += plan.kTurn) {
                const bool inside = channel < c && column0 + i < f;
                const uint32_t to = stages + stage * plan.kStage + tile_at<kConvRow>(i, chunk);
                cp_async(to, filters + (inside ? from : 0), inside ? 16 : 0);
                from += plan.kTurn * kHaloTaps * c;
            }
        };
        REG(float, acc, [Tile::kRows][Tile::kColumns][4]);
        Tile::clear(acc);
        load_pixels(0);
#pragma unroll
        for (int tap = 0; tap < kStages - 1; tap++) {
            load_filters(0, tap, tap);
            cp_async_commit();
        }
        int step = 0;
#pragma unroll 1
        for (int part = 0; part < chunks; part++) {
#pragma unroll 1
            for (int tap = 0; tap < kHaloTaps; tap++, step++) {
                cp_async_wait<kStages - 2>();
                Tile::hand_over();
                if (kNorm && part == 0 && tap == 0) {
#pragma unroll 1
                    for (int i = 0; i < plan.kPieces; i++) activate(0, i);
                }
                __syncthreads();
                const int later = tap + kStages - 1, more = later >= kHaloTaps;
                const int stage = (step + kStages - 1) % kStages;
                if (part + more < chunks) load_filters(part + more, later - more * kHaloTaps, stage);
                // Everyone has left the pixels before these.
                if (tap == 0 && part + 1 < chunks) load_pixels(part + 1);
                cp_async_commit();
                const int first = (Tile::first_row() / kHaloW + tap / 3) * (kHaloW + 2) + tap % 3;
                Tile::multiply(acc, pixels + part % 2 * plan.kPixelBytes, stages + step % kStages * plan.kStage,
                               [&](int i) { return first + i * (kHaloW + 2); });
                const int piece = (tap - (kStages - 1)) * plan.kAtOnce;
                if (kNorm && part + 1 < chunks && piece >= 0) {
#pragma unroll 1
                    for (int i = piece; i < min(piece + plan.kAtOnce, plan.kPieces); i++) activate(part + 1, i);
                }
            }
        }
        cp_async_wait<0>();
        const ConvResult result = {bias, residual, y, f, relu};
        Tile::results(acc, reinterpret_cast<float*>(smem + plan.ring), [&](int row, int column, float (&v)[8]) {
            const int i = row0 + row / kHaloW, j = left0 + row % kHaloW;
            const size_t pixel = (size_t(image) * oh + i) * ow + j;
            if (i < oh && j < ow && column0 + column < f) result.put(pixel, column0 + column, v);
        });
    }
}

}  // namespace ptx
