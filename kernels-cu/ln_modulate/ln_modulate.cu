// y[b,n,d] = (x[b,n,d] - mean[b,n]) * rstd[b,n] * (1 + modulation[b,scale,d]) + modulation[b,shift,d]
// mean[b,n] = 1/D sum_d x;  rstd[b,n] = 1/sqrt(1/D sum_d (x - mean)^2 + eps)
//
// x, modulation, y: [B, N, D], [B, C, D], [B, N, D] bf16; mean, rstd: [B, N] f32; sums in f32.
//
// A warp owns a row; a block of 4 warps takes 4 rows at a time and walks the grid. A lane holds the row's 16-byte
// chunks lane, lane + 32 ... in registers, so the row is read once: statistics by two butterfly sums (mean first, then
// the squares around it, which does not cancel), then the result from the same registers.
//
// Bound: memory, 4 bytes an element (2 read, 2 written) and nothing else of size: 4·B·N·D + 4·B·D + 8·B·N bytes. At
// B=2, N=16384, D=1152 that is 151 MB. A block of 4 warps has 4 rows, 9 KB, of loads in flight, and 7 blocks fit a
// multiprocessor by registers (72 a thread): 64 KB, above the 40 KB or so that HBM3e needs at 1 µs of latency.
//
// Requires: D a multiple of 8, up to 32·8·kChunks; x, modulation, y aligned to 16 bytes. D outside of that goes to the
// second kernel, which reads a row three times, element by element (the later ones come from L1).
// Does not handle: strides; the entry point makes its arguments contiguous.
#include "../common/ptx.cuh"

using namespace ptx;

constexpr int kWarps = 4;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(kFullMask, v, o);
    return v;
}

// The two halves of a word of bf16, as floats.
__device__ __forceinline__ float2 halves(uint32_t w) { return make_float2(unpack_lo<bf16>(w), unpack_hi<bf16>(w)); }

__device__ __forceinline__ uint32_t modulate(uint32_t x, uint32_t scale, uint32_t shift, float mean, float rstd) {
    float2 v = halves(x), a = halves(scale), b = halves(shift);
    return pack<bf16>(fmaf((v.x - mean) * rstd, 1.0f + a.x, b.x), fmaf((v.y - mean) * rstd, 1.0f + a.y, b.y));
}

// kChunks: 16-byte chunks a lane, at least D / 256 rounded up.
template <int kChunks>
__device__ __forceinline__ void rows_in_registers(const bf16* x, const bf16* modulation, bf16* y, float* mean_out,
                                                  float* rstd_out, int rows, int n, int c, int d, int shift, int scale,
                                                  float eps) {
    const int lane = threadIdx.x % 32, chunks = d / 8;
    const float inverse = 1.0f / float(d);
    for (int row = blockIdx.x * kWarps + threadIdx.x / 32; row < rows; row += gridDim.x * kWarps) {
        const uint4* from = reinterpret_cast<const uint4*>(x + size_t(row) * d);
        REG(uint4, v, [kChunks]);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            v[i] = make_uint4(0, 0, 0, 0);
            if (lane + 32 * i < chunks) v[i] = ld_global_nc_v4(from + lane + 32 * i);
            float2 p = halves(v[i].x), q = halves(v[i].y), r = halves(v[i].z), s = halves(v[i].w);
            sum += ((p.x + p.y) + (q.x + q.y)) + ((r.x + r.y) + (s.x + s.y));
        }
        const float mean = warp_sum(sum) * inverse;
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            if (lane + 32 * i >= chunks) continue;
            uint32_t w[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float2 p = halves(w[e]);
                squares = fmaf(p.x - mean, p.x - mean, squares);
                squares = fmaf(p.y - mean, p.y - mean, squares);
            }
        }
        const float rstd = rsqrtf(warp_sum(squares) * inverse + eps);
        const bf16* table = modulation + size_t(row / n) * c * d;
        const uint4* to_scale = reinterpret_cast<const uint4*>(table + size_t(scale) * d);
        const uint4* to_shift = reinterpret_cast<const uint4*>(table + size_t(shift) * d);
        uint4* to = reinterpret_cast<uint4*>(y + size_t(row) * d);
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            const int at = lane + 32 * i;
            if (at >= chunks) continue;
            const uint4 a = __ldg(to_scale + at), b = __ldg(to_shift + at);
            st_global_v4(to + at, make_uint4(modulate(v[i].x, a.x, b.x, mean, rstd), modulate(v[i].y, a.y, b.y, mean, rstd),
                                             modulate(v[i].z, a.z, b.z, mean, rstd), modulate(v[i].w, a.w, b.w, mean, rstd)));
        }
        if (lane == 0) mean_out[row] = mean, rstd_out[row] = rstd;
    }
}

// D up to 1280.
extern "C" __global__ void __launch_bounds__(128, 7)
    ln_modulate_forward_bf16(const bf16* x, const bf16* modulation, bf16* y, float* mean, float* rstd, int rows, int n,
                             int c, int d, int shift, int scale, float eps) {
    rows_in_registers<5>(x, modulation, y, mean, rstd, rows, n, c, d, shift, scale, eps);
}
KERNEL_EXPORT(ln_modulate_forward_bf16);

// Any D.
extern "C" __global__ void __launch_bounds__(128)
    ln_modulate_forward_any_bf16(const bf16* x, const bf16* modulation, bf16* y, float* mean_out, float* rstd_out,
                                 int rows, int n, int c, int d, int shift, int scale, float eps) {
    const int lane = threadIdx.x % 32;
    for (int row = blockIdx.x * kWarps + threadIdx.x / 32; row < rows; row += gridDim.x * kWarps) {
        const bf16* from = x + size_t(row) * d;
        float sum = 0.0f, squares = 0.0f;
        for (int i = lane; i < d; i += 32) sum += to_float(from[i]);
        const float mean = warp_sum(sum) / float(d);
        for (int i = lane; i < d; i += 32) {
            float v = to_float(from[i]) - mean;
            squares = fmaf(v, v, squares);
        }
        const float rstd = rsqrtf(warp_sum(squares) / float(d) + eps);
        const bf16* table = modulation + size_t(row / n) * c * d;
        for (int i = lane; i < d; i += 32) {
            float a = to_float(table[size_t(scale) * d + i]), b = to_float(table[size_t(shift) * d + i]);
            y[size_t(row) * d + i] = from_float<bf16>(fmaf((to_float(from[i]) - mean) * rstd, 1.0f + a, b));
        }
        if (lane == 0) mean_out[row] = mean, rstd_out[row] = rstd;
    }
}
KERNEL_EXPORT(ln_modulate_forward_any_bf16);
