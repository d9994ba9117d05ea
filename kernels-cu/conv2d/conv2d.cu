// u[b,i,j,f] = bias[f] + sum_{p,q,c} x[b, i*stride + p - pad_h, j*stride + q - pad_w, c] * filters[f,p,q,c]
// y = max(u, 0) where relu, else u; x is zero outside of the image
//
// x: [B, H, W, C], filters: [F, Kh, Kw, C], bias: [F] (may be null), y: [B, Oh, Ow, F], all T; sums in f32. `round`:
// operands of products become bf16.
//
// CUDA cores, for f32 and for channels that are no multiple of 8 (conv2d_mma.cu has the others): a product of
// [B·Oh·Ow, Kh·Kw·C] with filtersᵀ whose left operand is read through the windows and never stored. A block of 128 threads
// owns 128 pixels and 64 filters, 8×8 results a thread; chunks of 16 of the depth lie in shared memory as f32, beside the
// corner of each pixel's window.
//
// Bound: 2·B·Oh·Ow·F·Kh·Kw·C operations, on CUDA cores 67 TFLOP/s in f32 on H100. A step decodes 24 places of the depth a
// thread for 1024 multiply-adds.
//
// Requires: nothing beyond the contract: any shape. Does not handle: dilation, groups, a backward pass.
#include "../common/ptx.cuh"
#include "../common/tile.cuh"

using namespace ptx;

using Big = Tile<128, 64, 16>;

__device__ __forceinline__ float operand(T v, int round) {
    const float wide = to_float(v);
    return round ? to_float(from_float<bf16>(wide)) : wide;
}

extern "C" __global__ void __launch_bounds__(128)
    conv2d_forward(const T* x, const T* filters, const T* bias, T* y, int b, int h, int w, int c, int f, int kh, int kw,
                   int oh, int ow, int stride, int pad_h, int pad_w, int relu, int round) {
    SMEM_ARRAY(float4, a_tile, Big::kSizeA);
    SMEM_ARRAY(float4, b_tile, Big::kSizeB);
    // The image, and the window's first row and column in it.
    SMEM_ARRAY(int, images, Big::kM);
    SMEM_ARRAY(int, tops, Big::kM);
    SMEM_ARRAY(int, lefts, Big::kM);
    const int tiles = (f + Big::kN - 1) / Big::kN, depth = kh * kw * c;
    const size_t row0 = size_t(blockIdx.x / tiles) * Big::kM, rows = size_t(b) * oh * ow;
    const int column0 = int(blockIdx.x % tiles) * Big::kN;
    const size_t mine = row0 + threadIdx.x;
    images[threadIdx.x] = mine < rows ? int(mine / (size_t(oh) * ow)) : -1;
    tops[threadIdx.x] = int(mine / ow % oh) * stride - pad_h;
    lefts[threadIdx.x] = int(mine % ow) * stride - pad_w;
    REG(float, acc, [Big::kRows][Big::kColumns]);
    Big::clear(acc);
    tile_product<Big, true, true>(
        acc, reinterpret_cast<float*>(a_tile), reinterpret_cast<float*>(b_tile), 0, depth,
        [&](int i, int k) {
            const int tap = k / c, row = tops[i] + tap / kw, column = lefts[i] + tap % kw, image = images[i];
            const bool inside = image >= 0 && row >= 0 && row < h && column >= 0 && column < w;
            return inside ? operand(x[((size_t(image) * h + row) * w + column) * c + k % c], round) : 0.0f;
        },
        [&](int j, int k) {
            return column0 + j < f ? operand(filters[size_t(column0 + j) * depth + k], round) : 0.0f;
        });
#pragma unroll
    for (int i = 0; i < Big::kRows; i++) {
#pragma unroll
        for (int j = 0; j < Big::kColumns; j++) {
            const size_t row = row0 + Big::row(i);
            const int column = column0 + Big::column(j);
            if (row >= rows || column >= f) continue;
            float u = acc[i][j];
            if (bias) u += to_float(bias[column]);
            // A NaN stays one.
            if (relu && u < 0.0f) u = 0.0f;
            y[row * f + column] = from_float<T>(u);
        }
    }
}
KERNEL_EXPORT(conv2d_forward);
