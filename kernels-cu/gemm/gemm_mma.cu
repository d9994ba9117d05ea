// u[r,f] = sum_k x[r,k] * w[f,k] + bias[f] + pos[r % N, f];  y[r,f] = residual[r,f] + gate[r / N, gate_row, f] * act(u)
// dx = du·w;  dw = duᵀ·x, on the tensor cores; everything else of the backward pass is in gemm.cu.
//
// Tensors as in gemm.cu, for T = bf16 (the ways' `elements`; compiled for f32 as every source, and not called then). act
// is 0, 1 (GELU) or 2 (SiLU). Products of bf16, sums in f32, each result rounded once.
//
// Version 2, mma.sync m16n8k16 of sm_80: a block of 4 warps owns 128×128 or 128×64 results, 64×64 or 64×32 a warp. Tiles
// of 32 of the depth lie in a ring of 4 stages in shared memory, filled by cp.async three steps ahead, swizzled so that
// neither the copies nor ldmatrix meet a bank twice; operands whose depth is not contiguous are transposed by ldmatrix,
// so the three products are one loop. Blocks are numbered so that those which run together share rows of both operands
// in L2. Sums go through the ring's memory to 16-byte accesses of y, pre, residual and positions (common/linear.cuh).
// Where the tiles are fewer than the card's places, the depth is split by shape into parts (blockIdx.y): plain sums go
// to `partials` and a second kernel adds them in order and finishes: the bits follow from the shape alone.
//
// Bound: 2·R·K·F operations, 312 TFLOP/s on an A100. A step of 128×128×32 is 256 MMAs of a warp, 8 clocks each on a
// quarter of the multiprocessor: 512 clocks; ldmatrix reads 32 KB, 256 clocks, and the copies write 16 KB, 128 clocks.
//
// Requires: K and F multiples of 8 (rows begin at 16 bytes). Does not handle: sine.
#include "../common/linear_mma.cuh"
#include "../common/elementwise.cuh"

using namespace linear;

// The loop of a block, mma_m16n8k16<bf16> of fragments in common/linear_mma.cuh.
template <class Product, class Out>
PTX_FN void multiply(const Operand& a, const Operand& b, int depth, int part, const Out& out) {
    SMEM_DYNAMIC(smem, 128);
    smem_guard(smem, Product::kBytes);
    wait_for_previous();
    Product::run(smem, a, b, depth, part, out);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    gemm_mma_128x128(const T* x, const T* w, const T* bias, const T* pos, const T* gate, const T* residual, T* y, T* pre,
                     float* partials, int rows, int n, int k, int f, int c, int gate_row, int act, int part) {
    multiply<Mma<128, 128, false, false>>({x, size_t(k), rows}, {w, size_t(k), f}, k, part,
                                        Epilogue{bias, pos, gate, residual, y, pre, partials, rows, n, f, c, gate_row, act});
}
KERNEL_EXPORT(gemm_mma_128x128);

extern "C" __global__ void __launch_bounds__(128, 3)
    gemm_mma_128x64(const T* x, const T* w, const T* bias, const T* pos, const T* gate, const T* residual, T* y, T* pre,
                    float* partials, int rows, int n, int k, int f, int c, int gate_row, int act, int part) {
    multiply<Mma<128, 64, false, false>>({x, size_t(k), rows}, {w, size_t(k), f}, k, part,
                                        Epilogue{bias, pos, gate, residual, y, pre, partials, rows, n, f, c, gate_row, act});
}
KERNEL_EXPORT(gemm_mma_128x64);

// y from the parts of the sums, added in order; 8 neighbours a thread.
extern "C" __global__ void __launch_bounds__(256)
    gemm_finish(const float* partials, const T* bias, const T* pos, const T* gate, const T* residual, T* y, T* pre,
                int rows, int n, int f, int c, int gate_row, int act, int parts) {
    const Epilogue out{bias, pos, gate, residual, y, pre, nullptr, rows, n, f, c, gate_row, act};
    const int chunks = f / 8;
    for (size_t i = grid_thread(); i < size_t(rows) * chunks; i += grid_threads()) {
        const int row = int(i / chunks), column = int(i % chunks) * 8;
        float sum[8], more[8];
        load8(sum, partials + size_t(row) * f + column);
        for (int p = 1; p < parts; p++) {
            load8(more, partials + (size_t(p) * rows + row) * f + column);
            Epilogue::add(sum, more);
        }
        out.finish(sum, row, column);
    }
}
KERNEL_EXPORT(gemm_finish);

// ---- backward: dx = du·w, whose depth is F; dw = duᵀ·x, whose depth is the rows ----

extern "C" __global__ void __launch_bounds__(128, 2)
    gemm_mma_128x128_x(const T* du, const T* w, T* dx, float* partials, int rows, int k, int f, int part) {
    multiply<Mma<128, 128, false, true>>({du, size_t(f), rows}, {w, size_t(k), k}, f, part,
                                       Plain{dx, partials, rows, k});
}
KERNEL_EXPORT(gemm_mma_128x128_x);

extern "C" __global__ void __launch_bounds__(128, 3)
    gemm_mma_128x64_x(const T* du, const T* w, T* dx, float* partials, int rows, int k, int f, int part) {
    multiply<Mma<128, 64, false, true>>({du, size_t(f), rows}, {w, size_t(k), k}, f, part,
                                       Plain{dx, partials, rows, k});
}
KERNEL_EXPORT(gemm_mma_128x64_x);

extern "C" __global__ void __launch_bounds__(128, 2)
    gemm_mma_128x128_w(const T* du, const T* x, T* dw, float* partials, int rows, int k, int f, int part) {
    multiply<Mma<128, 128, true, true>>({du, size_t(f), f}, {x, size_t(k), k}, rows, part, Plain{dw, partials, f, k});
}
KERNEL_EXPORT(gemm_mma_128x128_w);

extern "C" __global__ void __launch_bounds__(128, 3)
    gemm_mma_128x64_w(const T* du, const T* x, T* dw, float* partials, int rows, int k, int f, int part) {
    multiply<Mma<128, 64, true, true>>({du, size_t(f), f}, {x, size_t(k), k}, rows, part, Plain{dw, partials, f, k});
}
KERNEL_EXPORT(gemm_mma_128x64_w);
