// One tile or one warp of every instruction that sm_80 has, in terms of plain arrays.
//
// A probe takes what it needs from `in` and writes all it got to `out`; the tests compute the same in plain loops, and
// a GPU runs the same probes to say whether the emulator is right. Every probe is one block unless it says otherwise.
#include "../common/ptx.cuh"

using namespace ptx;

// in: 32 words. out: 16 words a lane: shuffles of width 32 and 8, votes, matches, reductions.
extern "C" __global__ void probe_warp(const uint32_t* in, uint32_t* out) {
    int lane = threadIdx.x;
    uint32_t v = in[lane], *o = out + lane * 16;
    o[0] = __shfl_sync(kFullMask, v, 5);
    o[1] = __shfl_up_sync(kFullMask, v, 3);
    o[2] = __shfl_down_sync(kFullMask, v, 7);
    o[3] = __shfl_xor_sync(kFullMask, v, 9);
    o[4] = __shfl_sync(kFullMask, v, 5, 8);
    o[5] = __shfl_up_sync(kFullMask, v, 3, 8);
    o[6] = __shfl_down_sync(kFullMask, v, 7, 8);
    o[7] = __shfl_xor_sync(kFullMask, v, 9, 8);
    o[8] = __ballot_sync(kFullMask, v & 1);
    o[9] = uint32_t(__any_sync(kFullMask, v == in[3]));
    o[10] = uint32_t(__all_sync(kFullMask, v < 1000));
    o[11] = __match_any_sync(kFullMask, v % 4);
    o[12] = __reduce_add_sync(kFullMask, v);
    o[13] = uint32_t(__reduce_min_sync(kFullMask, int(v) - 500));
    o[14] = __reduce_max_sync(kFullMask, v);
    o[15] = 0;
    if (lane % 2) o[15] = __shfl_xor_sync(0xaaaaaaaau, v, 2);
}
KERNEL_EXPORT(probe_warp);

// in: 32 rows of 8 halves. out: per lane x1, x2, x4, x1.trans, x2.trans, x4.trans (14 words), movmatrix of the first.
extern "C" __global__ void probe_ldmatrix(const uint16_t* in, uint32_t* out) {
    SMEM_ARRAY(uint4, tile, 32);
    int lane = threadIdx.x;
    tile[lane] = reinterpret_cast<const uint4*>(in)[lane];
    __syncwarp();
    uint32_t row = smem_u32(tile) + lane * 16, *o = out + lane * 15;
    REG(uint32_t, a, [1]);
    REG(uint32_t, b, [2]);
    REG(uint32_t, c, [4]);
    ldmatrix_x1(a, row);
    ldmatrix_x2(b, row);
    ldmatrix_x4(c, row);
    o[0] = a[0], o[1] = b[0], o[2] = b[1], o[3] = c[0], o[4] = c[1], o[5] = c[2], o[6] = c[3];
    uint32_t first = a[0];
    ldmatrix_x1_trans(a, row);
    ldmatrix_x2_trans(b, row);
    ldmatrix_x4_trans(c, row);
    o[7] = a[0], o[8] = b[0], o[9] = b[1], o[10] = c[0], o[11] = c[1], o[12] = c[2], o[13] = c[3];
    o[14] = movmatrix_trans(first);
}
KERNEL_EXPORT(probe_ldmatrix);

// The fragment of lane 4g + t: a[m][k] of [16][K], b[n][k] of [8][K], c[m][n] of [16][8].
template <class T, int K> __device__ void mma_16bit(const uint16_t* in, float* out) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const uint16_t *a = in, *b = in + 16 * K;
    auto two = [](const uint16_t* p) { return p[0] | uint32_t(p[1]) << 16; };
    float d[4];
    for (int i = 0; i < 4; i++) d[i] = float(i);
    uint32_t a0 = two(a + g * K + 2 * t), a1 = two(a + (g + 8) * K + 2 * t), b0 = two(b + g * K + 2 * t);
    if constexpr (K == 16) {
        uint32_t f[4] = {a0, a1, two(a + g * K + 2 * t + 8), two(a + (g + 8) * K + 2 * t + 8)};
        mma_m16n8k16<T>(d, f, b0, two(b + g * K + 2 * t + 8));
    } else {
        uint32_t f[2] = {a0, a1};
        mma_m16n8k8<T>(d, f, b0);
    }
    for (int i = 0; i < 4; i++) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i] - float(i);
}
extern "C" __global__ void probe_mma_bf16_k16(const uint16_t* in, float* out) { mma_16bit<bf16, 16>(in, out); }
KERNEL_EXPORT(probe_mma_bf16_k16);
extern "C" __global__ void probe_mma_f16_k16(const uint16_t* in, float* out) { mma_16bit<f16, 16>(in, out); }
KERNEL_EXPORT(probe_mma_f16_k16);
extern "C" __global__ void probe_mma_bf16_k8(const uint16_t* in, float* out) { mma_16bit<bf16, 8>(in, out); }
KERNEL_EXPORT(probe_mma_bf16_k8);
extern "C" __global__ void probe_mma_f16_k8(const uint16_t* in, float* out) { mma_16bit<f16, 8>(in, out); }
KERNEL_EXPORT(probe_mma_f16_k8);

// in: a[16][32], b[8][32] of signed bytes. out: [16][8] sums.
extern "C" __global__ void probe_mma_s8(const uint32_t* in, int32_t* out) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const uint32_t *a = in, *b = in + 16 * 8;  // 8 words a row
    uint32_t f[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    int32_t d[4] = {0, 0, 0, 0};
    mma_m16n8k32_s8(d, f, b[g * 8 + t], b[g * 8 + t + 4]);
    for (int i = 0; i < 4; i++) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
KERNEL_EXPORT(probe_mma_s8);

// 32 threads. in: 32 × 28 bytes. Copies of 16, 8 and 4 bytes, each cut short by lane % (size + 1), in three groups.
extern "C" __global__ void probe_cp_async(const uint8_t* in, uint8_t* out) {
    SMEM_ARRAY(uint4, wide, 32);
    SMEM_ARRAY(uint2, mid, 32);
    SMEM_ARRAY(uint32_t, narrow, 32);
    int lane = threadIdx.x;
    cp_async<16>(smem_u32(wide + lane), in + lane * 16, lane % 17);
    cp_async_commit();
    cp_async<8>(smem_u32(mid + lane), in + 512 + lane * 8, lane % 9);
    cp_async_commit();
    cp_async<4>(smem_u32(narrow + lane), in + 768 + lane * 4, lane % 5);
    cp_async_commit();
    cp_async_wait<2>();
    reinterpret_cast<uint4*>(out)[lane] = wide[lane];
    cp_async_wait<0>();
    __syncwarp();
    int other = lane ^ 1;
    reinterpret_cast<uint2*>(out + 512)[other] = mid[other];
    reinterpret_cast<uint32_t*>(out + 768)[other] = narrow[other];
}
KERNEL_EXPORT(probe_cp_async);

// 32 threads. in: 64 floats. out: a word per pair for bf16 and f16, then the sums of the halves read back.
extern "C" __global__ void probe_numbers(const float* in, uint32_t* out) {
    int i = threadIdx.x;
    float lo = in[2 * i], hi = in[2 * i + 1];
    uint32_t b = pack<bf16>(lo, hi), h = pack<f16>(lo, hi);
    out[i] = b, out[32 + i] = h;
    out[64 + i] = __float_as_uint(unpack_lo<bf16>(b)), out[96 + i] = __float_as_uint(unpack_hi<f16>(h));
    out[128 + i] = from_float<bf16>(hi).bits, out[160 + i] = from_float<f16>(lo).bits;
}
KERNEL_EXPORT(probe_numbers);

// 32 threads. in: 32 floats in (0.1, 2). out: ex2, lg2, rcp, rsqrt, tanh.
extern "C" __global__ void probe_special(const float* in, float* out) {
    int i = threadIdx.x;
    float v = in[i];
    out[i] = ex2(v), out[32 + i] = lg2(v), out[64 + i] = rcp_approx(v), out[96 + i] = rsqrt_approx(v), out[128 + i] = tanh_approx(v);
}
KERNEL_EXPORT(probe_special);

// 64 threads. in: 64 × 16 bytes. Every width of load and store, through shared memory, reversed.
extern "C" __global__ void probe_memory(const uint8_t* in, uint8_t* out) {
    SMEM_DYNAMIC(smem, 16);
    uint32_t base = smem_u32(smem);
    int i = threadIdx.x, r = 63 - i;
    st_shared_v4(base + i * 16, ld_global_nc_v4(in + i * 16));
    __syncthreads();
    st_global_v4(out + i * 16, ld_shared_v4(base + r * 16));
    __syncthreads();
    st_shared_v2(base + i * 8, ld_global_nc_v2(in + i * 8));
    __syncthreads();
    st_global_v2(out + 1024 + i * 8, ld_shared_v2(base + r * 8));
    __syncthreads();
    st_shared_u32(base + i * 4, ld_global_nc_u32(in + i * 4));
    st_shared_f32(base + 256 + i * 4, float(i));
    __syncthreads();
    st_global_u32(out + 1536 + i * 4, ld_shared_u32(base + r * 4));
    st_global_u32(out + 1792 + i * 4, __float_as_uint(ld_shared_f32(base + 256 + r * 4)));
    st_global_u16(out + 2048 + i * 2, ld_global_nc_u16(in + r * 2));
    st_global_cs_v4(out + 2176 + i * 16, ld_global_nc_v4(in + r * 16));
}
KERNEL_EXPORT(probe_memory);

// 96 threads in three warps: warp 0 fills, 1 and 2 read, by named barriers, four rounds. out: 4 × 64 words.
extern "C" __global__ void probe_barriers(const uint32_t* in, uint32_t* out) {
    SMEM_ARRAY(uint32_t, slot, 32);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int round = 0; round < 4; round++) {
        if (warp == 0) {
            if (round) bar_sync(2, 96);  // read
            slot[lane] = in[lane] + round;
            bar_arrive(1, 96);  // filled
        } else {
            bar_sync(1, 96);
            out[round * 64 + (warp - 1) * 32 + lane] = slot[31 - lane];
            if (round < 3) bar_arrive(2, 96);
        }
    }
    int odd = __syncthreads_count(lane & 1), any = __syncthreads_or(lane == 99), all = __syncthreads_and(lane < 32);
    if (threadIdx.x == 0) out[256] = odd, out[257] = any, out[258] = all;
}
KERNEL_EXPORT(probe_barriers);

// 8 blocks of 64. out[0]: sum of 1, out[1]: largest index, out[2]: times that the counter of 3 wrapped, out[3..4]: float
// sums, out[5]: how many saw an earlier value of zero exchanged.
extern "C" __global__ void probe_atomics(uint32_t* out) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(out, 1u);
    atomicMax(out + 1, i);
    if (atomicInc(out + 6, 3u) == 3u) atomicAdd(out + 2, 1u);
    atomicAdd(reinterpret_cast<float*>(out + 3), 0.5f);
    red_add_f32(reinterpret_cast<float*>(out + 4), 0.25f);
    if (atomicCAS(out + 7, 0u, i + 1) == 0u) atomicAdd(out + 5, 1u);
}
KERNEL_EXPORT(probe_atomics);

// 4 resident blocks of 32 that pass a token in order; in: 32 words. out: a word a lane, each block's turn added.
extern "C" __global__ void probe_flags(const uint32_t* in, uint32_t* out, uint32_t* flag) {
    uint32_t turn = blockIdx.x;
    int lane = threadIdx.x;
    if (lane == 0)
        while (ld_acquire(flag) != turn) {}
    __syncwarp();
    out[lane] = turn == 0 ? in[lane] : out[lane] * 3 + turn;
    __syncwarp();
    if (lane == 0) {
        if (turn % 2)
            st_release(flag, turn + 1);
        else
            red_release_add(flag, 1);
    }
}
KERNEL_EXPORT(probe_flags);
