// pre[b,d] = table[index[b],d] + addend[b,d];  y = act(pre), act 0: identity, 2: SiLU
// dpre = dy * act'(pre);  daddend = dpre;  dtable[v,d] = sum over b with index[b] = v of dpre[b,d], in the order of b
//
// table, dtable: [V, D]; addend (may be null), y, pre, dy, daddend: [B, D], all T; index: [B] int. f32 between.
//
// Forward and daddend: a thread owns eight neighbours of a row. dtable: a block of four warps owns a row of the table,
// a warp eight (or one) columns a lane at a time; it reads the indices 32 at a time, asks by a vote which of them name
// the row, and adds those samples in their order, so there are no atomics and one result.
//
// Bound: memory and launch: 4 rows of D elements a sample forward; backward writes all V·D of dtable, zeros included,
// and reads B indices for each row of it, from L2.
//
// Requires: vector kernels D a multiple of 8; the `_any` kernels take every D. An index outside [0, V) makes its rows
// of y and pre NaN and adds to no row of dtable. Does not handle: strides.
#include "../common/ptx.cuh"
#include "../common/activation.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

template <int V>
__device__ __forceinline__ void forward(const T* table, const int* index, const T* addend, T* y, T* pre, int b,
                                        int v, int d, int act) {
    const int chunks = d / V;
    for (size_t i = grid_thread(); i < size_t(b) * chunks; i += grid_threads()) {
        const int sample = int(i / chunks), row = index[sample];
        const size_t column = i % chunks * V, at = size_t(sample) * d + column;
        float sum[V], more[V];
        if (row >= 0 && row < v) {
            load<V>(sum, table + size_t(row) * d + column);
        } else {
#pragma unroll
            for (int e = 0; e < V; e++) sum[e] = __int_as_float(0x7fc00000);
        }
        if (addend) {
            load<V>(more, addend + at);
#pragma unroll
            for (int e = 0; e < V; e++) sum[e] += more[e];
        }
        store<V>(pre + at, sum);
#pragma unroll
        for (int e = 0; e < V; e++) sum[e] = activation(act, sum[e]).value;
        store<V>(y + at, sum);
    }
}

// dpre of V neighbours.
template <int V>
__device__ __forceinline__ void slopes(float (&g)[V], const T* dy, const T* pre, size_t at, int act) {
    float u[V];
    load<V>(g, dy + at);
    if (act == 0) return;
    load<V>(u, pre + at);
#pragma unroll
    for (int e = 0; e < V; e++) g[e] *= activation(act, u[e]).slope;
}

// One block of 128 threads a row of the table. All lanes of a warp take every turn, for the votes.
template <int V>
__device__ __forceinline__ void table_row(const T* dy, const int* index, const T* pre, T* dtable, int b, int d,
                                          int act) {
    const int row = blockIdx.x, lane = threadIdx.x % 32;
    for (int first = (int(threadIdx.x) - lane) * V; first < d; first += 128 * V) {
        const int column = first + lane * V;
        float sum[V], g[V];
#pragma unroll
        for (int e = 0; e < V; e++) sum[e] = 0.0f;
        for (int start = 0; start < b; start += 32) {
            const int mine = start + lane < b ? index[start + lane] : -1;
            uint32_t hits = __ballot_sync(kFullMask, mine == row);
            for (; hits; hits &= hits - 1) {
                const int sample = start + __ffs(hits) - 1;
                if (column >= d) continue;
                slopes<V>(g, dy, pre, size_t(sample) * d + column, act);
#pragma unroll
                for (int e = 0; e < V; e++) sum[e] += g[e];
            }
        }
        if (column < d) store<V>(dtable + size_t(row) * d + column, sum);
    }
}

extern "C" __global__ void __launch_bounds__(128)
    embed_forward(const T* table, const int* index, const T* addend, T* y, T* pre, int b, int v, int d, int act) {
    forward<8>(table, index, addend, y, pre, b, v, d, act);
}
KERNEL_EXPORT(embed_forward);

extern "C" __global__ void __launch_bounds__(128)
    embed_forward_any(const T* table, const int* index, const T* addend, T* y, T* pre, int b, int v, int d, int act) {
    forward<1>(table, index, addend, y, pre, b, v, d, act);
}
KERNEL_EXPORT(embed_forward_any);

extern "C" __global__ void __launch_bounds__(128)
    embed_backward_table(const T* dy, const int* index, const T* pre, T* dtable, int b, int d, int act) {
    table_row<8>(dy, index, pre, dtable, b, d, act);
}
KERNEL_EXPORT(embed_backward_table);

extern "C" __global__ void __launch_bounds__(128)
    embed_backward_table_any(const T* dy, const int* index, const T* pre, T* dtable, int b, int d, int act) {
    table_row<1>(dy, index, pre, dtable, b, d, act);
}
KERNEL_EXPORT(embed_backward_table_any);

// The rows do not matter here: every length.
extern "C" __global__ void __launch_bounds__(256)
    embed_backward_addend(const T* dy, const T* pre, T* daddend, uint64_t count, int act) {
    for_vectors<8>(count, [=]<int V>(size_t i) {
        float g[V];
        slopes<V>(g, dy, pre, i, act);
        store<V>(daddend + i, g);
    });
}
KERNEL_EXPORT(embed_backward_addend);
