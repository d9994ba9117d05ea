// Where the elements of patches lie: in an image [B, C, Gh*P, Gw*P] and in its tokens [B, Gh*Gw, C*P*P]. Within a token
// comes channel, row, column (kChannelsFirst) or row, column, channel.
//
// A permutation, so both directions gather: a thread owns eight neighbours of what is written, stores 16 (bf16) or 32
// (f32) bytes, and loads its eight elements one by one. The P neighbours of a patch row lie together on both sides, and
// the warps that read the other parts of a sector run beside this one, so L1 and L2 make whole sectors of the loads.
#pragma once
#include "elementwise.cuh"

namespace ptx {

template <bool kChannelsFirst> struct Patches {
    int c, p, gh, gw;

    // Where element `i` of the tokens lies in the image.
    PTX_FN size_t in_image(size_t i) const {
        const int row = c * p * p, e = int(i % row);
        const size_t token = i / row;
        const int cell = int(token % (size_t(gh) * gw));
        const int channel = kChannelsFirst ? e / (p * p) : e % c, within = kChannelsFirst ? e % (p * p) : e / c;
        const int y = cell / gw * p + within / p, x = cell % gw * p + within % p;
        return ((token / (size_t(gh) * gw) * c + channel) * (size_t(gh) * p) + y) * (size_t(gw) * p) + x;
    }

    // Where element `i` of the image lies in the tokens.
    PTX_FN size_t in_tokens(size_t i) const {
        const int width = gw * p, x = int(i % width);
        const size_t row = i / width, plane = row / (size_t(gh) * p);
        const int y = int(row % (size_t(gh) * p)), channel = int(plane % c);
        const size_t token = (plane / c * gh + y / p) * gw + x / p;
        const int within = y % p * p + x % p;
        return token * (size_t(c) * p * p) + (kChannelsFirst ? channel * p * p + within : within * c + channel);
    }
};

// to[i] = from[place(i)] for every i below `count`.
template <class F> PTX_FN void gather(const T* from, T* to, uint64_t count, F place) {
    for_vectors<8>(count, [=]<int V>(size_t i) {
        float v[V];
#pragma unroll
        for (int e = 0; e < V; e++) v[e] = to_float(from[place(i + e)]);
        store<V>(to + i, v);
    });
}

}  // namespace ptx
