// e[c] = cond[c], or for c < guided_channels with uncond: uncond[c] + guidance*(cond[c] - uncond[c])
// eps = e[0..C];  v = e[C..2C] where learned;  x0 = inv_alpha*(x - sigma*eps)
// scale = cn, or where learned and cn != 0: exp((f*log_hi + (1 - f)*log_lo)/2), f = (v + 1)/2
// x_next = cx*x + ce*eps + c0*x0 + c1*x0_prev + scale*noise
//
// x, noise, x0_prev, x_next, x0: [B, C, S]; cond, uncond: [B, Co, S]; T = f32 alone; uncond, noise, x0_prev may be null.
//
// A thread owns four neighbours of a channel (one in the `_any` kernel); nothing intermediate is stored.
//
// Bound: memory, up to 9 tensors of 4 bytes an element, 36 bytes for some 20 FLOPs; at the sizes of latents (0.1 to
// 2 MB) the launch. Up to 112 bytes of loads in flight a thread.
//
// Requires: the first kernel S a multiple of 4; Co = C or 2·C. Does not handle: strides, implicit solvers.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

struct Step {
    float guidance;
    int guided_channels;
    float inv_alpha, sigma, cx, ce, c0, c1, cn;
    int learned;
    float log_hi, log_lo;
};

// V guided outputs of the model at `at`, which lies in `channel`.
template <int V>
__device__ __forceinline__ void guided(float (&e)[V], const T* cond, const T* uncond, size_t at, int channel,
                                       const Step& p) {
    load<V>(e, cond + at);
    if (!uncond || channel >= p.guided_channels) return;
    float u[V];
    load<V>(u, uncond + at);
#pragma unroll
    for (int i = 0; i < V; i++) e[i] = fmaf(p.guidance, e[i] - u[i], u[i]);
}

template <int V>
__device__ __forceinline__ void step(const T* x, const T* cond, const T* uncond, const T* noise, const T* x0_prev,
                                     T* x_next, T* x0, int b, int c, int co, int s, const Step& p) {
    const int chunks = s / V;
    for (size_t item = grid_thread(); item < size_t(b) * c * chunks; item += grid_threads()) {
        const size_t plane = item / chunks;
        const int channel = int(plane % c), pixel = int(item % chunks) * V;
        const size_t at = plane * s + pixel, model = (plane / c * co + channel) * s + pixel;
        float now[V], eps[V], next[V], other[V];
        load<V>(now, x + at);
        guided<V>(eps, cond, uncond, model, channel, p);
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float clean = p.inv_alpha * fmaf(-p.sigma, eps[i], now[i]);
            next[i] = fmaf(p.cx, now[i], fmaf(p.ce, eps[i], p.c0 * clean));
            now[i] = clean;
        }
        store<V>(x0 + at, now);
        if (x0_prev) {
            load<V>(other, x0_prev + at);
#pragma unroll
            for (int i = 0; i < V; i++) next[i] = fmaf(p.c1, other[i], next[i]);
        }
        if (noise) {
            load<V>(other, noise + at);
            if (p.learned && p.cn != 0.0f) {
                guided<V>(eps, cond, uncond, model + size_t(c) * s, c + channel, p);
#pragma unroll
                for (int i = 0; i < V; i++) {
                    const float f = 0.5f * (eps[i] + 1.0f);
                    next[i] = fmaf(expf(0.5f * fmaf(f, p.log_hi, (1.0f - f) * p.log_lo)), other[i], next[i]);
                }
            } else {
#pragma unroll
                for (int i = 0; i < V; i++) next[i] = fmaf(p.cn, other[i], next[i]);
            }
        }
        store<V>(x_next + at, next);
    }
}

extern "C" __global__ void __launch_bounds__(128)
    solver_step_forward(const T* x, const T* cond, const T* uncond, const T* noise, const T* x0_prev, T* x_next, T* x0,
                        int b, int c, int co, int s, float guidance, int guided_channels, float inv_alpha, float sigma,
                        float cx, float ce, float c0, float c1, float cn, int learned, float log_hi, float log_lo) {
    const Step p = {guidance, guided_channels, inv_alpha, sigma, cx, ce, c0, c1, cn, learned, log_hi, log_lo};
    step<4>(x, cond, uncond, noise, x0_prev, x_next, x0, b, c, co, s, p);
}
KERNEL_EXPORT(solver_step_forward);

extern "C" __global__ void __launch_bounds__(128)
    solver_step_forward_any(const T* x, const T* cond, const T* uncond, const T* noise, const T* x0_prev, T* x_next,
                            T* x0, int b, int c, int co, int s, float guidance, int guided_channels, float inv_alpha,
                            float sigma, float cx, float ce, float c0, float c1, float cn, int learned, float log_hi,
                            float log_lo) {
    const Step p = {guidance, guided_channels, inv_alpha, sigma, cx, ce, c0, c1, cn, learned, log_hi, log_lo};
    step<1>(x, cond, uncond, noise, x0_prev, x_next, x0, b, c, co, s, p);
}
KERNEL_EXPORT(solver_step_forward_any);
