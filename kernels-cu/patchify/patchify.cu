// tokens[b, gh*Gw + gw, (c*P + p)*P + q] = x[b, c, gh*P + p, gw*P + q]; dx is dtokens moved back
//
// x: [B, C, Gh*P, Gw*P], tokens: [B, Gh*Gw, C*P*P], both T; within a token: channel, row, column.
//
// A permutation, so both passes gather: a thread owns eight neighbours of what is written, stores 16 (bf16) or 32 (f32)
// bytes, and loads its eight elements one by one. The P neighbours of a patch row lie together on both sides, and the
// warps that read the other parts of a sector run beside this one, so L1 and L2 make whole sectors of the loads.
//
// Bound: memory, every element read once and written once; at the sizes of latents (1 to 4 MB) the launch.
//
// Requires: pointers aligned to 16 bytes. What is written goes as one line of elements, whatever its rows, so vectors fit
// every shape; the last elements go one by one. Does not handle: strides.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

// Where element `i` of the tokens lies in the image.
__device__ __forceinline__ size_t in_image(size_t i, int c, int p, int gh, int gw) {
    const int row = c * p * p, e = int(i % row);
    const size_t token = i / row;
    const int px = e % p, py = e / p % p, channel = e / (p * p);
    const int cell = int(token % (size_t(gh) * gw)), y = cell / gw * p + py, x = cell % gw * p + px;
    return ((token / (size_t(gh) * gw) * c + channel) * (size_t(gh) * p) + y) * (size_t(gw) * p) + x;
}

// Where element `i` of the image lies in the tokens.
__device__ __forceinline__ size_t in_tokens(size_t i, int c, int p, int gh, int gw) {
    const int width = gw * p, x = int(i % width);
    const size_t row = i / width, plane = row / (size_t(gh) * p);
    const int y = int(row % (size_t(gh) * p)), channel = int(plane % c);
    const size_t token = (plane / c * gh + y / p) * gw + x / p;
    return ((token * c + channel) * p + y % p) * p + x % p;
}

extern "C" __global__ void __launch_bounds__(256)
    patchify_forward(const T* x, T* tokens, uint64_t count, int c, int p, int gh, int gw) {
    for_vectors<8>(count, [=]<int V>(size_t i) {
        float v[V];
#pragma unroll
        for (int e = 0; e < V; e++) v[e] = to_float(x[in_image(i + e, c, p, gh, gw)]);
        store<V>(tokens + i, v);
    });
}
KERNEL_EXPORT(patchify_forward);

extern "C" __global__ void __launch_bounds__(256)
    patchify_backward(const T* dtokens, T* dx, uint64_t count, int c, int p, int gh, int gw) {
    for_vectors<8>(count, [=]<int V>(size_t i) {
        float v[V];
#pragma unroll
        for (int e = 0; e < V; e++) v[e] = to_float(dtokens[in_tokens(i + e, c, p, gh, gw)]);
        store<V>(dx + i, v);
    });
}
KERNEL_EXPORT(patchify_backward);
