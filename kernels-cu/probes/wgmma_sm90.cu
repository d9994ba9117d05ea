// wgmma on images of shared memory: the tests lay tiles out as CuTe or as the headers say, the probe multiplies them.
#include "../common/ptx.cuh"

using namespace ptx;

// `a` and `b` are copied to shared memory at 0 and kB; `da` and `db` are descriptors with addresses relative to those.
// With Rs, A is instead `ra`, four words a thread. out: N / 2 floats a thread.
constexpr uint32_t kB = 32768;

struct Images {
    const uint32_t *a, *b, *ra;
    int bytes_a, bytes_b;
    uint64_t da, db;
    float* out;
};

// Both images in shared memory; gives the address that the descriptors are relative to.
__device__ uint32_t place(const Images& x) {
    SMEM_DYNAMIC(smem, 1024);
    for (int i = threadIdx.x; i < x.bytes_a / 4; i += 128) reinterpret_cast<uint32_t*>(smem)[i] = x.a[i];
    for (int i = threadIdx.x; i < x.bytes_b / 4; i += 128) reinterpret_cast<uint32_t*>(smem + kB)[i] = x.b[i];
    fence_proxy_async();
    __syncthreads();
    return smem_u32(smem);
}

template <class T, int N, int TransA, int TransB, bool Rs> __device__ void multiply(const Images& x) {
    uint32_t base = place(x);
    REG(float, d, [N / 2]);
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[i] = 0.0f;
    uint64_t db = x.db + ((base + kB) >> 4);
    wgmma_fence();
    if constexpr (Rs) {
        uint32_t a[4];
        for (int i = 0; i < 4; i++) a[i] = x.ra[threadIdx.x * 4 + i];
        wgmma_fence();
        wgmma_rs<T, N, TransB>(d, a, db, 1);
    } else {
        wgmma_ss<T, N, TransA, TransB>(d, x.da + (base >> 4), db, 1);
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < N / 2; i++) x.out[threadIdx.x * (N / 2) + i] = d[i];
}

#define PROBE(name, T, N, TransA, TransB, Rs)                                                                        \
    extern "C" __global__ void __launch_bounds__(128)                                                                \
        name(const uint32_t* a, const uint32_t* b, const uint32_t* ra, int bytes_a, int bytes_b, uint64_t da,        \
             uint64_t db, float* out) {                                                                              \
        multiply<T, N, TransA, TransB, Rs>(Images{a, b, ra, bytes_a, bytes_b, da, db, out});                         \
    }                                                                                                                \
    KERNEL_EXPORT(name);

PROBE(wgmma_ss_64_00, bf16, 64, 0, 0, false)
PROBE(wgmma_ss_64_01, bf16, 64, 0, 1, false)
PROBE(wgmma_ss_64_10, bf16, 64, 1, 0, false)
PROBE(wgmma_ss_64_11, bf16, 64, 1, 1, false)
PROBE(wgmma_rs_64_0, bf16, 64, 0, 0, true)
PROBE(wgmma_rs_64_1, bf16, 64, 0, 1, true)
PROBE(wgmma_ss_128_00, bf16, 128, 0, 0, false)
PROBE(wgmma_ss_128_01, bf16, 128, 0, 1, false)
PROBE(wgmma_ss_128_10, bf16, 128, 1, 0, false)
PROBE(wgmma_ss_128_11, bf16, 128, 1, 1, false)
PROBE(wgmma_rs_128_0, bf16, 128, 0, 0, true)
PROBE(wgmma_rs_128_1, bf16, 128, 0, 1, true)
PROBE(wgmma_ss_f16, f16, 72, 0, 1, false)
PROBE(wgmma_rs_f16, f16, 72, 0, 1, true)
PROBE(wgmma_ss_e4m3, e4m3, 72, 0, 0, false)
PROBE(wgmma_rs_e4m3, e4m3, 72, 0, 0, true)

// Every width, K-major tiles without swizzle. out: n / 2 floats a thread.
template <int N> __device__ void width(const Images& x, int n) {
    if (n == N) multiply<bf16, N, 0, 0, false>(x);
    if constexpr (N > 8) width<N - 8>(x, n);
}
extern "C" __global__ void __launch_bounds__(128)
    wgmma_width(const uint32_t* a, const uint32_t* b, int bytes_a, int bytes_b, uint64_t da, uint64_t db, float* out,
                int n) {
    width<256>(Images{a, b, nullptr, bytes_a, bytes_b, da, db, out}, n);
}
KERNEL_EXPORT(wgmma_width);

// The last products of a warpgroup into one accumulator, three groups in flight. The images hold four tiles each.
extern "C" __global__ void __launch_bounds__(128)
    wgmma_chain(const uint32_t* a, const uint32_t* b, int bytes_a, int bytes_b, uint64_t da, uint64_t db, float* out) {
    uint32_t base = place(Images{a, b, nullptr, bytes_a, bytes_b, da, db, out});
    REG(float, d, [36]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
        wgmma_ss<bf16, 72>(d, da + ((base + uint32_t(k) * (uint32_t(bytes_a) / 4)) >> 4),
                           db + ((base + kB + uint32_t(k) * (uint32_t(bytes_b) / 4)) >> 4), k != 0);
        wgmma_commit();
    }
    wgmma_wait<2>();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 36; i++) out[threadIdx.x * 36 + i] = d[i];
}
KERNEL_EXPORT(wgmma_chain);
