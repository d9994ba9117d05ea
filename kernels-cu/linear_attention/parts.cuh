// Which part of which head's tokens a block of the CUDA cores has.
#pragma once
#include "../common/softmax_attention.cuh"

using namespace ptx;

// blockIdx.x is a part of a head of a sample.
struct Part {
    Place at;
    size_t head;
    int first, end;
};
__device__ __forceinline__ Part part_of_block(int n, int h, int parts) {
    const int head = int(blockIdx.x) / parts, part = int(blockIdx.x) % parts, each = (n + parts - 1) / parts;
    return {{head / h, head % h, 0}, size_t(head), min(n, part * each), min(n, part * each + each)};
}
