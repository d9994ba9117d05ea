// gemm_gated_conv on Hopper; see gemm_gated_conv.cu for the formula and the tensors, gates.cuh for what follows the sums,
// common/linear_sm90.cuh for the main loop. T = bf16.
//
// TMA and wgmma: tiles of 128 rows and 192 columns, which are q, k and v of 64 channels: a stage takes three boxes of 64
// rows of w. The two multiplying warpgroups take whole tiles in turn; the 51 KB that a tile of p takes exist once, and
// are handed on from one warpgroup to the other, so that one's convolution and gates run under the other's products.
// Boxes that go over the end of q's or k's rows bring rows of the next part, over the end of w zeros: both belong to
// channels that do not exist and are not stored.
//
// Bound: 6·R·D·C operations at 989 TFLOP/s. A step is that of gemm's 128×192: 8 wgmma of 96 clocks and 40 KB of L2. Beside
// a tile of depth 1152 (13,824 clocks) stand the tile's stores (24,576 numbers, 384 clocks at 128 bytes), 33 words of
// shared memory for 8 tokens of two channels, 530 clocks, and 28 multiply-adds a token and pair, 880 clocks: hidden.
//
// Requires: D a multiple of 8; C and `reversed` even.
#include "../common/linear_sm90.cuh"
#include "gates.cuh"

using namespace linear;

// Tiles of Gates as the main loop asks for them.
struct GateWork {
    static constexpr int kParts = 3, kChannels = 64;
    static constexpr bool kWhole = true;
    // Rows of w from one part to the next.
    int columns;
    int depth;
    Gates gates;

    PTX_FN int across() const { return (gates.c + kChannels - 1) / kChannels; }
    PTX_FN int down() const { return (gates.rows + gates.tokens - 1) / gates.tokens; }
    template <int, int> PTX_FN int count() const { return down() * across(); }
    template <int, int> PTX_FN Piece piece(int index, int) const {
        const Tile tile = tile_of(index, down(), across());
        const int channel = tile.column * kChannels;
        return {gates.span(tile.row, channel, kChannels).base, channel, tile.row, 0, depth};
    }
};

struct GateResults {
    using Results = GateTile<64, 128>;
    Gates gates;

    // The sums of a warpgroup: two halves of 64 rows.
    PTX_FN void whole(uint32_t tile, const float (&acc)[2][96], const Piece& p, int me) const {
        const int warp = threadIdx.x / 32 % 4;
        // One loop over strips of 32 columns, so that a few biases at a time take registers beside the sums.
#pragma unroll 1
        for (int strip = 0; strip < 6; strip++) {
#pragma unroll
            for (int other = 0; other < 6; other++) {
                if (other != strip) continue;
#pragma unroll
                for (int j = 0; j < 4; j++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const float* from = acc[i] + 4 * (4 * other + j);
                        const float d[4] = {from[0], from[1], from[2], from[3]};
                        Results::put(tile, gates, p.column, 64 * i + 16 * warp, 8 * (4 * strip + j), d);
                    }
                }
            }
        }
        bar_sync(5 + me, 128);
        Results::results(tile, gates, gates.span(p.part, p.column, 64), p.column, int(threadIdx.x) % 128);
    }
};

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_gated_conv_wgmma_128x192(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                                  const T* bias, const T* short_weight, const T* short_bias, T* y, T* p, int rows,
                                  int n, int d, int c, int taps, int lead, int reversed, int tokens) {
    // Its loop is wgmma_ss<bf16, 192, …>.
    using Product = Warpgroups<192, 4, 64, true, false, false>;
    constexpr int kBytes = Product::kRing + GateResults::Results::kBytes;
    static_assert(kBytes <= 226 << 10, "shared memory of a block");
    SMEM_DYNAMIC(smem, 1024);
    SMEM_ARRAY(uint64_t, bars, 8);
    smem_guard(smem, kBytes);
    const Gates gates{bias, short_weight, short_bias, y, p, rows, n, c, taps, lead, reversed, tokens};
    Product::run(smem, bars, &x, &w, GateWork{c, d, gates}, GateResults{gates});
}
KERNEL_EXPORT(gemm_gated_conv_wgmma_128x192);
