// keys(b) = {j : j < counts[b]}, all M without counts;  s[b,h,i,j] = scale * sum_e q[b,i,0,h,e] * k[b,j,h,e]
// lse[b,h,i] = log sum_{j in keys(b)} exp(s[b,h,i,j]);  y[b,i,h,e] = sum_{j in keys(b)} exp(s - lse) * v[b,j,h,e]
//
// q, dq: [B, N, R, H, E], kv, dkv: [B, M, 2, H, E], y, dy: [B, N, H, E], all T; counts: [B] int, may be null; lse, delta:
// [B, H, N] f32; sums in f32. Gradients as in `attention.cu`; the launcher clears dq where R > 1.
//
// `common/softmax_attention.cuh` (CUDA cores) and `common/mma_attention.cuh` (tensor cores) say who owns what. A
// sample's keys end at its
// count: later ones are neither read nor visited, and get zeros as their gradients. dk and dv of a sample with few keys
// come from few blocks that go through all N queries: splitting the queries is the next rung.
//
// Bound: arithmetic, 4·B·H·N·M·E operations forward and 14 backward; see `attention.cu`.
//
// Requires: nothing beyond the contract. A count outside [0, M] is not read as one: y, lse and the gradients of its
// sample become NaN. Does not handle: masks with holes, strides.
#include "../common/ptx.cuh"
#include "../common/mma_attention_backward.cuh"

using namespace ptx;

// The keys that count; -1 where the count is none.
__device__ __forceinline__ int keys_of(const int* counts, int sample, int m) {
    const int count = counts ? counts[sample] : m;
    return count < 0 || count > m ? -1 : count;
}

// NaN for the vectors of the block's tokens, columns `first` to `end`.
__device__ __forceinline__ void refuse(Vectors<T> to, int tokens, int row0, int first, int end) {
    const int rows = min(tokens - row0, kRowTile), columns = end - first;
    for (int i = threadIdx.x; i < rows * columns; i += 128)
        to.at[(row0 + i / columns) * to.stride + first + i % columns] = from_float<T>(__int_as_float(0x7fc00000));
}

extern "C" __global__ void __launch_bounds__(128)
    cross_attention_forward(const T* q, const T* kv, const int* counts, T* y, float* lse, int n, int m, int r, int h,
                            int e, float scale) {
    const Place at = place_of_block(n, h);
    const int count = keys_of(counts, at.sample, m), first = int(blockIdx.y) * 128;
    const Vectors<T> to = head_part(y, at, 0, 1, n, h, e);
    float* sums = lse + (size_t(at.sample) * h + at.head) * n;
    if (count < 0) {
        refuse(to, n, at.row0, first, min(e, first + 128));
        const int row = at.row0 + int(threadIdx.x);
        if (threadIdx.x < kRowTile && row < n) sums[row] = __int_as_float(0x7fc00000);
        return;
    }
    softmax_forward<4>(AllKeys{count, n}, head_part(q, at, 0, r, n, h, e), head_part(kv, at, 0, 2, m, h, e),
                       head_part(kv, at, 1, 2, m, h, e), to, sums, n, at.row0, first, e, scale);
}
KERNEL_EXPORT(cross_attention_forward);

extern "C" __global__ void __launch_bounds__(128)
    cross_attention_backward_delta(const T* y, const T* dy, float* delta, uint64_t rows, int n, int h, int e) {
    softmax_delta(y, dy, delta, rows, n, h, e);
}
KERNEL_EXPORT(cross_attention_backward_delta);

extern "C" __global__ void __launch_bounds__(128)
    cross_attention_backward_q(const T* dy, const T* q, const T* kv, const int* counts, const float* lse,
                               const float* delta, T* dq, int n, int m, int r, int h, int e, float scale) {
    const Place at = place_of_block(n, h);
    const int count = keys_of(counts, at.sample, m), first = int(blockIdx.y) * 128;
    const Vectors<T> to = head_part(dq, at, 0, r, n, h, e);
    if (count < 0) return refuse(to, n, at.row0, first, min(e, first + 128));
    const size_t row = (size_t(at.sample) * h + at.head) * n;
    softmax_dq<4>(AllKeys{count, n}, head_part(q, at, 0, r, n, h, e), head_part(kv, at, 0, 2, m, h, e),
                  head_part(kv, at, 1, 2, m, h, e), head_part(dy, at, 0, 1, n, h, e), to, lse + row, delta + row, n,
                  at.row0, first, e, scale);
}
KERNEL_EXPORT(cross_attention_backward_q);

extern "C" __global__ void __launch_bounds__(128, 2)
    cross_attention_backward_kv(const T* dy, const T* q, const T* kv, const int* counts, const float* lse,
                                const float* delta, T* dkv, int n, int m, int r, int h, int e, float scale) {
    const Place at = place_of_block(m, h);
    const int count = keys_of(counts, at.sample, m), first = int(blockIdx.y) * 96;
    const Vectors<T> to_k = head_part(dkv, at, 0, 2, m, h, e), to_v = head_part(dkv, at, 1, 2, m, h, e);
    if (count < 0) {
        refuse(to_k, m, at.row0, first, min(e, first + 96));
        return refuse(to_v, m, at.row0, first, min(e, first + 96));
    }
    const size_t row = (size_t(at.sample) * h + at.head) * n;
    softmax_dkdv<3>(AllKeys{count, n}, head_part(q, at, 0, r, n, h, e), head_part(kv, at, 0, 2, m, h, e),
                    head_part(kv, at, 1, 2, m, h, e), head_part(dy, at, 0, 1, n, h, e), to_k, to_v, lse + row,
                    delta + row, n, m, at.row0, first, e, scale);
}
KERNEL_EXPORT(cross_attention_backward_kv);

// ---- tensor cores, 16-bit elements: heads of up to the width in the name ----

// NaN for vectors first .. end of the tokens.
__device__ __forceinline__ void refuse_rows(Vectors<T> to, int first, int end, int e) {
    for (int i = threadIdx.x; i < (end - first) * e; i += blockDim.x)
        to.at[(first + i / e) * to.stride + i % e] = from_float<T>(__int_as_float(0x7fc00000));
}
__device__ __forceinline__ void refuse_sums(float* lse, int first, int end) {
    for (int i = first + int(threadIdx.x); i < end; i += blockDim.x) lse[i] = __int_as_float(0x7fc00000);
}

template <int kE> using MmaSmall = MmaTile<kE, 4, 1, 64>;

template <int kE>
PTX_FN void tiled_forward(const T* q, const T* kv, const int* counts, T* y, float* lse, int n, int m, int r, int h, int e,
                          float scale) {
    const Place at = place_of_tile<MmaSmall<kE>>(n, h);
    const int count = keys_of(counts, at.sample, m), end = min(n, at.row0 + MmaSmall<kE>::kRows);
    const Vectors<T> to = head_part(y, at, 0, 1, n, h, e);
    float* sums = lse + (size_t(at.sample) * h + at.head) * n;
    if (count < 0) return refuse_rows(to, at.row0, end, e), refuse_sums(sums, at.row0, end);
    mma_forward<MmaSmall<kE>>(AllKeys{count, n}, head_part(q, at, 0, r, n, h, e), head_part(kv, at, 0, 2, m, h, e),
                              head_part(kv, at, 1, 2, m, h, e), to, sums, n, at.row0, e, scale);
}

// All keys of a head in shared memory for `segment` queries, a multiple of the block's rows; a warp has 16 at a time.
// Heads of up to 72 columns leave registers for two blocks of six warps on a multiprocessor.
template <int kE> using Resident = MmaTile<kE, kE <= 72 ? 6 : 8, 1, 32>;
template <int kE>
PTX_FN void resident_forward(const T* q, const T* kv, const int* counts, T* y, float* lse, int n, int m, int r, int h,
                             int e, int segment, float scale) {
    const int segments = (n + segment - 1) / segment, block = int(blockIdx.x) / h;
    const Place at = {block / segments, int(blockIdx.x) % h, block % segments * segment};
    const int count = keys_of(counts, at.sample, m), end = min(n, at.row0 + segment);
    const Vectors<T> to = head_part(y, at, 0, 1, n, h, e);
    float* sums = lse + (size_t(at.sample) * h + at.head) * n;
    if (count < 0) return refuse_rows(to, at.row0, end, e), refuse_sums(sums, at.row0, end);
    mma_forward_resident<64, Resident<kE>>(AllKeys{count, n}, head_part(q, at, 0, r, n, h, e),
                                           head_part(kv, at, 0, 2, m, h, e), head_part(kv, at, 1, 2, m, h, e), to, sums,
                                           n, m, at.row0, end, e, scale);
}

template <int kE>
PTX_FN void tiled_dq(const T* dy, const T* q, const T* kv, const int* counts, const T* y, const float* lse, float* delta,
                     T* dq, int n, int m, int r, int h, int e, float scale) {
    const Place at = place_of_tile<MmaSmall<kE>>(n, h);
    const int count = keys_of(counts, at.sample, m), end = min(n, at.row0 + MmaSmall<kE>::kRows);
    const Vectors<T> to = head_part(dq, at, 0, r, n, h, e);
    const size_t row = (size_t(at.sample) * h + at.head) * n;
    if (count < 0) return refuse_rows(to, at.row0, end, e);
    mma_dq<MmaSmall<kE>>(AllKeys{count, n}, head_part(q, at, 0, r, n, h, e), head_part(kv, at, 0, 2, m, h, e),
                         head_part(kv, at, 1, 2, m, h, e), head_part(y, at, 0, 1, n, h, e),
                         head_part(dy, at, 0, 1, n, h, e), to, lse + row, delta + row, n, at.row0, e, scale);
}

template <int kE>
PTX_FN void tiled_dkdv(const T* dy, const T* q, const T* kv, const int* counts, const float* lse, const float* delta,
                       T* dkv, int n, int m, int r, int h, int e, float scale) {
    const Place at = place_of_tile<MmaSmall<kE>>(m, h);
    const int count = keys_of(counts, at.sample, m), end = min(m, at.row0 + MmaSmall<kE>::kRows);
    const Vectors<T> to_k = head_part(dkv, at, 0, 2, m, h, e), to_v = head_part(dkv, at, 1, 2, m, h, e);
    const size_t row = (size_t(at.sample) * h + at.head) * n;
    if (count < 0) return refuse_rows(to_k, at.row0, end, e), refuse_rows(to_v, at.row0, end, e);
    mma_dkdv<MmaSmall<kE>>(AllKeys{count, n}, head_part(q, at, 0, r, n, h, e), head_part(kv, at, 0, 2, m, h, e),
                           head_part(kv, at, 1, 2, m, h, e), head_part(dy, at, 0, 1, n, h, e), to_k, to_v, lse + row,
                           delta + row, m, at.row0, e, scale);
}

extern "C" __global__ void __launch_bounds__(192, 2)
    cross_attention_forward_resident_e64(const T* q, const T* kv, const int* counts, T* y, float* lse, int n, int m,
                                         int r, int h, int e, int segment, float scale) {
    resident_forward<64>(q, kv, counts, y, lse, n, m, r, h, e, segment, scale);
}
KERNEL_EXPORT(cross_attention_forward_resident_e64);

extern "C" __global__ void __launch_bounds__(192, 2)
    cross_attention_forward_resident_e72(const T* q, const T* kv, const int* counts, T* y, float* lse, int n, int m,
                                         int r, int h, int e, int segment, float scale) {
    resident_forward<72>(q, kv, counts, y, lse, n, m, r, h, e, segment, scale);
}
KERNEL_EXPORT(cross_attention_forward_resident_e72);

extern "C" __global__ void __launch_bounds__(256, 1)
    cross_attention_forward_resident_e128(const T* q, const T* kv, const int* counts, T* y, float* lse, int n, int m,
                                         int r, int h, int e, int segment, float scale) {
    resident_forward<128>(q, kv, counts, y, lse, n, m, r, h, e, segment, scale);
}
KERNEL_EXPORT(cross_attention_forward_resident_e128);

extern "C" __global__ void __launch_bounds__(128, 4)
    cross_attention_forward_64x64_e32(const T* q, const T* kv, const int* counts, T* y, float* lse, int n, int m, int r,
                                      int h, int e, float scale) {
    tiled_forward<32>(q, kv, counts, y, lse, n, m, r, h, e, scale);
}
KERNEL_EXPORT(cross_attention_forward_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 4)
    cross_attention_backward_q_64x64_e32(const T* dy, const T* q, const T* kv, const int* counts, const T* y,
                                         const float* lse, float* delta, T* dq, int n, int m, int r, int h, int e,
                                         float scale) {
    tiled_dq<32>(dy, q, kv, counts, y, lse, delta, dq, n, m, r, h, e, scale);
}
KERNEL_EXPORT(cross_attention_backward_q_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 4)
    cross_attention_backward_kv_64x64_e32(const T* dy, const T* q, const T* kv, const int* counts, const float* lse,
                                          const float* delta, T* dkv, int n, int m, int r, int h, int e, float scale) {
    tiled_dkdv<32>(dy, q, kv, counts, lse, delta, dkv, n, m, r, h, e, scale);
}
KERNEL_EXPORT(cross_attention_backward_kv_64x64_e32);

extern "C" __global__ void __launch_bounds__(128, 3)
    cross_attention_forward_64x64_e64(const T* q, const T* kv, const int* counts, T* y, float* lse, int n, int m, int r,
                                      int h, int e, float scale) {
    tiled_forward<64>(q, kv, counts, y, lse, n, m, r, h, e, scale);
}
KERNEL_EXPORT(cross_attention_forward_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    cross_attention_backward_q_64x64_e64(const T* dy, const T* q, const T* kv, const int* counts, const T* y,
                                         const float* lse, float* delta, T* dq, int n, int m, int r, int h, int e,
                                         float scale) {
    tiled_dq<64>(dy, q, kv, counts, y, lse, delta, dq, n, m, r, h, e, scale);
}
KERNEL_EXPORT(cross_attention_backward_q_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    cross_attention_backward_kv_64x64_e64(const T* dy, const T* q, const T* kv, const int* counts, const float* lse,
                                          const float* delta, T* dkv, int n, int m, int r, int h, int e, float scale) {
    tiled_dkdv<64>(dy, q, kv, counts, lse, delta, dkv, n, m, r, h, e, scale);
}
KERNEL_EXPORT(cross_attention_backward_kv_64x64_e64);

extern "C" __global__ void __launch_bounds__(128, 3)
    cross_attention_forward_64x64_e72(const T* q, const T* kv, const int* counts, T* y, float* lse, int n, int m, int r,
                                      int h, int e, float scale) {
    tiled_forward<72>(q, kv, counts, y, lse, n, m, r, h, e, scale);
}
KERNEL_EXPORT(cross_attention_forward_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 3)
    cross_attention_backward_q_64x64_e72(const T* dy, const T* q, const T* kv, const int* counts, const T* y,
                                         const float* lse, float* delta, T* dq, int n, int m, int r, int h, int e,
                                         float scale) {
    tiled_dq<72>(dy, q, kv, counts, y, lse, delta, dq, n, m, r, h, e, scale);
}
KERNEL_EXPORT(cross_attention_backward_q_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 2)
    cross_attention_backward_kv_64x64_e72(const T* dy, const T* q, const T* kv, const int* counts, const float* lse,
                                          const float* delta, T* dkv, int n, int m, int r, int h, int e, float scale) {
    tiled_dkdv<72>(dy, q, kv, counts, lse, delta, dkv, n, m, r, h, e, scale);
}
KERNEL_EXPORT(cross_attention_backward_kv_64x64_e72);

extern "C" __global__ void __launch_bounds__(128, 2)
    cross_attention_forward_64x64_e128(const T* q, const T* kv, const int* counts, T* y, float* lse, int n, int m, int r,
                                      int h, int e, float scale) {
    tiled_forward<128>(q, kv, counts, y, lse, n, m, r, h, e, scale);
}
KERNEL_EXPORT(cross_attention_forward_64x64_e128);

extern "C" __global__ void __launch_bounds__(128, 2)
    cross_attention_backward_q_64x64_e128(const T* dy, const T* q, const T* kv, const int* counts, const T* y,
                                         const float* lse, float* delta, T* dq, int n, int m, int r, int h, int e,
                                         float scale) {
    tiled_dq<128>(dy, q, kv, counts, y, lse, delta, dq, n, m, r, h, e, scale);
}
KERNEL_EXPORT(cross_attention_backward_q_64x64_e128);

extern "C" __global__ void __launch_bounds__(128, 2)
    cross_attention_backward_kv_64x64_e128(const T* dy, const T* q, const T* kv, const int* counts, const float* lse,
                                          const float* delta, T* dkv, int n, int m, int r, int h, int e, float scale) {
    tiled_dkdv<128>(dy, q, kv, counts, lse, delta, dkv, n, m, r, h, e, scale);
}
KERNEL_EXPORT(cross_attention_backward_kv_64x64_e128);
