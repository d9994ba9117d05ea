// Walks over elements that do not depend on each other: vectors of V where they fit, single elements for the rest.
#pragma once
#include "vector.cuh"

namespace ptx {

// V elements from `p` as floats: 8 of any type, 4 of f32, or 1. Vectors need alignment to 16 bytes.
template <int V, class E> PTX_FN void load(float (&r)[V], const E* p PTX_AT) {
    static_assert(V == 8 || (V == 4 && sizeof(E) == 4) || V == 1, "no such vector");
    if constexpr (V == 8)
        load8(r, p PTX_FROM);
    else if constexpr (V == 4)
        unpack4(r, ld_global_nc_v4(p PTX_FROM));
    else
        r[0] = to_float(p[0]);
}
// The same of memory that this kernel writes, too.
template <int V, class E> PTX_FN void load_kept(float (&r)[V], const E* p) {
    if constexpr (V == 8)
        load8_kept(r, p);
    else if constexpr (V == 4)
        unpack4(r, *reinterpret_cast<const uint4*>(p));
    else
        r[0] = to_float(p[0]);
}
template <int V, class E> PTX_FN void store(E* p, const float (&v)[V] PTX_AT) {
    if constexpr (V == 8) {
        store8(p, v PTX_FROM);
    } else if constexpr (V == 4) {
        uint4 w;
        w.x = __float_as_uint(v[0]), w.y = __float_as_uint(v[1]);
        w.z = __float_as_uint(v[2]), w.w = __float_as_uint(v[3]);
        st_global_v4(p, w PTX_FROM);
    } else {
        p[0] = from_float<E>(v[0]);
    }
}

// Place of the thread in the grid, and how many threads there are.
PTX_FN size_t grid_thread() { return size_t(blockIdx.x) * blockDim.x + threadIdx.x; }
PTX_FN size_t grid_threads() { return size_t(gridDim.x) * blockDim.x; }

// Calls f<V>(i) for the vectors of `n` elements and f<1>(i) for those after the last whole vector.
template <int V, class F> PTX_FN void for_vectors(size_t n, F f) {
    const size_t vectors = n / V, thread = grid_thread();
    for (size_t i = thread; i < vectors; i += grid_threads()) f.template operator()<V>(i * V);
    if (vectors * V + thread < n) f.template operator()<1>(vectors * V + thread);
}

}  // namespace ptx
