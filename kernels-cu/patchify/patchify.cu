// tokens[b, gh*Gw + gw, (c*P + p)*P + q] = x[b, c, gh*P + p, gw*P + q]; dx is dtokens moved back
//
// x: [B, C, Gh*P, Gw*P], tokens: [B, Gh*Gw, C*P*P], both T; within a token: channel, row, column.
//
// Bound: memory, every element read once and written once; at the sizes of latents (1 to 4 MB) the launch.
//
// Requires: pointers aligned to 16 bytes. What is written goes as one line of elements, whatever its rows, so vectors fit
// every shape; the last elements go one by one. Does not handle: strides.
#include "../common/ptx.cuh"
#include "../common/patches.cuh"

using namespace ptx;

extern "C" __global__ void __launch_bounds__(256)
    patchify_forward(const T* x, T* tokens, uint64_t count, int c, int p, int gh, int gw) {
    const Patches<true> patches{c, p, gh, gw};
    gather(x, tokens, count, [=](size_t i) { return patches.in_image(i); });
}
KERNEL_EXPORT(patchify_forward);

extern "C" __global__ void __launch_bounds__(256)
    patchify_backward(const T* dtokens, T* dx, uint64_t count, int c, int p, int gh, int gw) {
    const Patches<true> patches{c, p, gh, gw};
    gather(dtokens, dx, count, [=](size_t i) { return patches.in_tokens(i); });
}
KERNEL_EXPORT(patchify_backward);
