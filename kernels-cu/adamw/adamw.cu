// g = grad_scale*grad;  m = m + rate1*(g - m);  v = v + rate2*(g^2 - v)
// param = (1 - lr*weight_decay)*param - lr/bias1 * m/(sqrt(v)/sqrt(bias2) + eps)
// ema = ema + ema_rate*(param - ema), where there is one
//
// grad, param, m, v, ema: [L], T = f32 alone; ema may be null. `keep` is 1 - lr*weight_decay, `rate` lr/bias1, `root`
// 1/sqrt(bias2), each rounded once on the host.
//
// A thread owns four neighbours, 16-byte accesses throughout, grid-stride; the last L mod 4 go to single threads.
//
// Bound: memory, 36 bytes an element (five reads, four writes) for 16 FLOPs, one square root and one division. A thread
// has 80 bytes of loads in flight; at 5 blocks of 256 a multiprocessor (41 registers) that is 100 KB, twice what HBM3e needs at
// 1 µs. 4.8 TB/s are 0.55 elements a clock and multiprocessor, at some 60 instructions each a quarter of its issue.
//
// Requires: pointers aligned to 16 bytes. Does not handle: parameters in bf16, several tensors in one launch.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

extern "C" __global__ void __launch_bounds__(256)
    adamw_forward(const T* grad, T* param, T* m, T* v, T* ema, int l, float keep, float rate, float rate1, float rate2,
                  float eps, float root, float grad_scale, float ema_rate) {
    for_vectors<4>(l, [=]<int V>(size_t i) {
        float g[V], p[V], first[V], second[V], average[V];
        load<V>(g, grad + i), load_kept<V>(p, param + i), load_kept<V>(first, m + i), load_kept<V>(second, v + i);
        if (ema) load_kept<V>(average, ema + i);
#pragma unroll
        for (int e = 0; e < V; e++) {
            const float scaled = grad_scale * g[e];
            first[e] = fmaf(rate1, scaled - first[e], first[e]);
            second[e] = fmaf(rate2, fmaf(scaled, scaled, -second[e]), second[e]);
            p[e] = fmaf(keep, p[e], -rate * (first[e] / fmaf(sqrtf(second[e]), root, eps)));
        }
        store<V>(m + i, first), store<V>(v + i, second), store<V>(param + i, p);
        if (ema) {
#pragma unroll
            for (int e = 0; e < V; e++) average[e] = fmaf(ema_rate, p[e] - average[e], average[e]);
            store<V>(ema + i, average);
        }
    });
}
KERNEL_EXPORT(adamw_forward);
