// Where the times of a channel lie, and the short filters.
#pragma once
#include "../common/ptx.cuh"

using namespace ptx;

// A call's sizes, and where a channel's times lie.
struct Line {
    int n, c, channel;
    bool back;
    __device__ __forceinline__ int token(int time) const { return back ? n - 1 - time : time; }
    // Element of a tensor [B, N, parts, C].
    __device__ __forceinline__ size_t at(int sample, int time, int parts, int part) const {
        return ((size_t(sample) * n + token(time)) * parts + part) * c + channel;
    }
};

// The short filter of part `part` at `time`.
__device__ __forceinline__ float near(const T* p, const T* weight, const T* bias, const Line& line, int sample, int time,
                                      int part, int k, int lead) {
    if (!weight) return to_float(p[line.at(sample, time, 3, part)]);
    const int row = part * line.c + line.channel;
    float sum = to_float(bias[row]);
    for (int j = 0; j < k; j++) {
        const int from = time - lead + j;
        if (from >= 0 && from < line.n)
            sum = fmaf(to_float(weight[size_t(row) * k + j]), to_float(p[line.at(sample, from, 3, part)]), sum);
    }
    return sum;
}
