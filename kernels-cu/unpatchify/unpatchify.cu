// x[b, c, gh*P + p, gw*P + q] = tokens[b, gh*Gw + gw, (p*P + q)*C + c]; dtokens is dx moved back
//
// x: [B, C, Gh*P, Gw*P], tokens: [B, Gh*Gw, P*P*C], both T; within a token: row, column, channel.
//
// Bound: memory, every element read once and written once; at the sizes of latents (1 to 4 MB) the launch.
//
// Requires: pointers aligned to 16 bytes. What is written goes as one line of elements, whatever its rows, so vectors fit
// every shape; the last elements go one by one. Does not handle: strides.
#include "../common/ptx.cuh"
#include "../common/patches.cuh"

using namespace ptx;

extern "C" __global__ void __launch_bounds__(256)
    unpatchify_forward(const T* tokens, T* x, uint64_t count, int c, int p, int gh, int gw) {
    const Patches<false> patches{c, p, gh, gw};
    gather(tokens, x, count, [=](size_t i) { return patches.in_tokens(i); });
}
KERNEL_EXPORT(unpatchify_forward);

extern "C" __global__ void __launch_bounds__(256)
    unpatchify_backward(const T* dx, T* dtokens, uint64_t count, int c, int p, int gh, int gw) {
    const Patches<false> patches{c, p, gh, gw};
    gather(dx, dtokens, count, [=](size_t i) { return patches.in_image(i); });
}
KERNEL_EXPORT(unpatchify_backward);
