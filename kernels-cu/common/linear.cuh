// What the tensor-core kernels of the linear layer share: which tile is whose, and what becomes of its sums.
#pragma once
#include "ptx.cuh"
#include "activation.cuh"
#include "mma_tile.cuh"

namespace linear {

using namespace ptx;

// Work is numbered along columns of a band of kBand tile rows, then band by band: tiles that run at one time share a
// few rows of both operands, which then come from L2.
constexpr int kBand = 16;

struct Tile {
    int row, column;
};

// The tile `index` of `rows`×`columns` tiles.
PTX_FN Tile tile_of(int index, int rows, int columns) {
    const int band = index / (kBand * columns), first = band * kBand, height = min(kBand, rows - first);
    const int inside = index - first * columns;
    return {first + inside % height, inside / height};
}

// Results and all that they are made of; see gemm.cu for the tensors. `partials` [parts, rows, f], where it is not
// null, takes the plain sums instead, for `finish` to add in order.
struct Epilogue {
    const T *bias, *pos, *gate, *residual;
    T *y, *pre;
    float* partials;
    int rows, n, f, c, gate_row, act;

    // Eight neighbours of a row, v = x·wᵀ.
    PTX_FN void finish(float (&v)[8], int row, int column) const {
        const size_t at = size_t(row) * f + column;
        float more[8];
        if (bias) {
            load8_kept(more, bias + column);
            add(v, more);
        }
        if (pos) {
            load8(more, pos + size_t(row % n) * f + column);
            add(v, more);
        }
        if (pre) store8(pre + at, v);
        if (act == 1) {
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = gelu(v[e]).value;
        } else if (act == 2) {
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = silu(v[e]).value;
        }
        if (gate) {
            load8_kept(more, gate + (size_t(row / n) * c + gate_row) * f + column);
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] *= more[e];
        }
        if (residual) {
            load8(more, residual + at);
            add(v, more);
        }
        store8(y + at, v);
    }

    PTX_FN void operator()(float (&v)[8], int row, int column, int part) const {
        if (row >= rows || column >= f) return;
        if (partials)
            store8(partials + (size_t(part) * rows + row) * f + column, v);
        else
            finish(v, row, column);
    }

    static PTX_FN void add(float (&v)[8], const float (&more)[8]) {
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] += more[e];
    }
};

// Sums that are the result: [rows, f], or [parts, rows, f] of partial sums.
struct Plain {
    T* y;
    float* partials;
    int rows, f;

    PTX_FN void operator()(float (&v)[8], int row, int column, int part) const {
        if (row >= rows || column >= f) return;
        if (partials)
            store8(partials + (size_t(part) * rows + row) * f + column, v);
        else
            store8(y + size_t(row) * f + column, v);
    }
};

// A warp's 16 rows of kSlab columns in shared memory, given to `out` eight neighbours at a time; `row` and `column` are
// those of the first. Not unrolled: `out` is long.
template <int kSlab, class Out> PTX_FN void store_slab(uint32_t slab, int row, int column, int part, const Out& out) {
    using S = Slab<kSlab>;
#pragma unroll 1
    for (int i = 0; i < 16 / S::kRows; i++) {
        float v[8];
        S::take(v, slab, i);
        out(v, row + S::row(i), column + S::column(), part);
    }
}

}  // namespace linear
