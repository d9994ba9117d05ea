// rate[c] = slow + (fast - slow) * (c mod period) / max(period - 1, 1)
// y[c,l] = x[l,c] * exp(-rate[c] * |l - centre|).  Backward: dx[l,c] = dy[c,l] * the same factor.
//
// x, dx: [L, C] T; y, dy: [C, L] T.
//
// A block turns a tile of 32 by 32 through shared memory (a column more, so that no two lanes meet in a bank): rows are
// read and written in whole lines. A thread has four elements.
//
// Bound: memory, 4 bytes an element in bf16, and small: the filters do not grow with the batch.
//
// Requires: nothing beyond the contract.
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/ptx.cuh"

using namespace ptx;

constexpr int kTile = 32, kRows = 8;

__device__ __forceinline__ float window(int lag, int channel, int centre, int period, float slow, float fast) {
    const float rate = fmaf(fast - slow, float(channel % period) / float(max(period - 1, 1)), slow);
    return expf(-rate * float(lag < centre ? centre - lag : lag - centre));
}

// to[j][i] = from[i][j] times the window, for `rows` by `columns` of `from`; lags are the rows where lags_first.
template <bool kLagsFirst>
__device__ __forceinline__ void turn(const T* from, T* to, int rows, int columns, int centre, int period, float slow,
                                     float fast) {
    SMEM_ARRAY(float, tile, kTile*(kTile + 1));
    const int tiles = (columns + kTile - 1) / kTile, x = threadIdx.x % kTile, y = threadIdx.x / kTile;
    const int row = blockIdx.x / tiles * kTile, column = blockIdx.x % tiles * kTile;
    for (int i = y; i < kTile; i += kRows) {
        if (row + i >= rows || column + x >= columns) continue;
        const int lag = kLagsFirst ? row + i : column + x, channel = kLagsFirst ? column + x : row + i;
        tile[i * (kTile + 1) + x] = to_float(from[size_t(row + i) * columns + column + x]) *
                                    window(lag, channel, centre, period, slow, fast);
    }
    __syncthreads();
    for (int i = y; i < kTile; i += kRows) {
        if (column + i >= columns || row + x >= rows) continue;
        to[size_t(column + i) * rows + row + x] = from_float<T>(tile[x * (kTile + 1) + i]);
    }
}

extern "C" __global__ void __launch_bounds__(kTile* kRows)
    filter_window_forward(const T* x, T* y, int l, int c, int centre, int period, float slow, float fast) {
    turn<true>(x, y, l, c, centre, period, slow, fast);
}
KERNEL_EXPORT(filter_window_forward);

extern "C" __global__ void __launch_bounds__(kTile* kRows)
    filter_window_backward(const T* dy, T* dx, int l, int c, int centre, int period, float slow, float fast) {
    turn<false>(dy, dx, c, l, centre, period, slow, fast);
}
KERNEL_EXPORT(filter_window_backward);
