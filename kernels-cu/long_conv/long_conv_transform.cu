// The formulas of long_conv.cu by transforms (ring.cuh): m = u·filter and du = dm·filter reversed are products of spectra, and
// so is dfilter = u reversed·dm.
//
// p: [B, N, 3, C], filter: [C, L], skip: [C], y, dy: [B, N, C], T; u, dm, and m, du in their place: [B, C, N] f32 in order
// of time, d: [B, N, 3, C] f32, table: 2·size complex, spectra: slots·size complex a block, taps: L a block. Sums in f32.
//
// `rows` makes u (and dm) and turns them round, so that a channel lies along a row; `transform` (`transform_backward`)
// works in place on the rows of a channel, all samples by one block, with its filter's spectra; `results`
// (`backward_results`) turns back and multiplies by the gates. Times are cut into blocks of `size`, one for all up to
// 16,384: block t of m is the sum over blocks s of u of what the lags from (t - s)·size - size to (t - s)·size + size give,
// added as spectra. The skip is part of the filter's tap on the current token. A block takes channels by turns, so that its
// spectra stay in L2; nothing depends on how many blocks there are.
//
// Why f32 on the CUDA cores for both types: in bf16 each of the two or three products of a transform by matrices rounds,
// there and back, and three products of halves instead of one, as the tolerance then asks, cost the tensor cores as much
// time as shared memory costs the passes here: 2·4 readings and writings of 8 bytes for a place and transform at 16,384.
//
// Bound: shared memory and FMA, 0.3 ms forward at N=16384, C=1152, B=2 (two transforms a row and one a filter, 8,200 clocks
// each); memory is 900 MB, 0.21 ms at 4.3 TB/s, of which 0.07 ms lie under the transforms.
//
// Requires: nothing beyond the contract. Does not handle: strides.
#include "../common/elementwise.cuh"
#include "../common/fragments.cuh"
#include "ring.cuh"
#include "short.cuh"

constexpr int kEdge = 32;

// x + x·Σ (-x²)^k/((first + 1)·…) by its series, x within a quarter turn: sin for first = 1, and cos for first = 0 of x = 1.
__device__ __forceinline__ double series(double x, double square, int first) {
    double sum = x, term = x;
#pragma unroll
    for (int k = 1; k <= 11; k++) sum += term *= -square / double((2 * k - 1 + first) * (2 * k + first));
    return sum;
}

// The two halves of the table of a ring. By whole quarters of a turn, so that the angle left is exact.
extern "C" __global__ void __launch_bounds__(256) long_conv_roots(float* table, int bits) {
    const int size = 1 << bits;
    for (int i = int(grid_thread()); i < 2 * size; i += int(grid_threads())) {
        const int n = i & (size - 1), quarters = i < size ? n >> (bits - 2) : 0;
        const int rest = i < size ? 4 * (n & ((size >> 2) - 1)) : n;
        const double x = 1.57079632679489661923 * rest / size;
        const float c = float(series(1.0, x * x, 0)), s = float(series(x, x * x, 1));
        // exp(-i·x) turned back by the quarters.
        table[2 * i] = quarters % 2 ? (quarters == 1 ? -s : s) : quarters ? -c : c;
        table[2 * i + 1] = quarters % 2 ? (quarters == 1 ? -c : c) : quarters ? s : -s;
    }
}
KERNEL_EXPORT(long_conv_roots);

// A square of 32 tokens and 32 channels, 256 threads: token(i) and channel() go along memory of [B, N, C], row(i) and
// column() along that of [B, C, N].
struct Square {
    int n, c, reversed, sample, token0, channel0;
    __device__ __forceinline__ Square(int n, int c, int reversed) : n(n), c(c), reversed(reversed) {
        const int columns = (c + kEdge - 1) / kEdge, rows = (n + kEdge - 1) / kEdge, rest = int(blockIdx.x) / columns;
        channel0 = int(blockIdx.x) % columns * kEdge, token0 = rest % rows * kEdge, sample = rest / rows;
    }
    static __device__ __forceinline__ int lane() { return int(threadIdx.x) % kEdge; }
    static __device__ __forceinline__ int other(int i) { return int(threadIdx.x) / kEdge + 8 * i; }
    __device__ __forceinline__ Line line(int channel) const { return {n, c, channel, channel + reversed >= c}; }
    // f(place in the square, line, time) for its elements, neighbours in a warp next to each other in [B, N, C].
    template <class F> __device__ __forceinline__ void by_token(F f) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = token0 + other(i), channel = channel0 + lane();
            if (token < n && channel < c) f(other(i) * (kEdge + 1) + lane(), line(channel), line(channel).token(token));
        }
    }
    // The same in [B, C, N]: f(place in the square, element).
    template <class F> __device__ __forceinline__ void by_channel(F f) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = token0 + lane(), channel = channel0 + other(i);
            if (token < n && channel < c)
                f(lane() * (kEdge + 1) + other(i), (size_t(sample) * c + channel) * n + line(channel).token(token));
        }
    }
};

// u, and dm where dy is given, as rows in order of time.
extern "C" __global__ void __launch_bounds__(256)
    long_conv_rows(const T* p, const T* short_weight, const T* short_bias, const T* dy, float* u, float* dm, int n, int c,
                   int k, int lead, int reversed) {
    SMEM_ARRAY(float, us, kEdge*(kEdge + 1));
    SMEM_ARRAY(float, dms, kEdge*(kEdge + 1));
    const Square square(n, c, reversed);
    square.by_token([&](int place, const Line& line, int time) {
        us[place] = near(p, short_weight, short_bias, line, square.sample, time, 1, k, lead) *
                    near(p, short_weight, short_bias, line, square.sample, time, 2, k, lead);
        if (dy)
            dms[place] = to_float(dy[line.at(square.sample, time, 1, 0)]) *
                         near(p, short_weight, short_bias, line, square.sample, time, 0, k, lead);
    });
    __syncthreads();
    square.by_channel([&](int place, size_t to) {
        u[to] = us[place];
        if (dy) dm[to] = dms[place];
    });
}
KERNEL_EXPORT(long_conv_rows);

extern "C" __global__ void __launch_bounds__(256)
    long_conv_results(const T* p, const T* short_weight, const T* short_bias, const float* m, T* y, int n, int c, int k,
                      int lead, int reversed) {
    SMEM_ARRAY(float, ms, kEdge*(kEdge + 1));
    const Square square(n, c, reversed);
    square.by_channel([&](int place, size_t from) { ms[place] = m[from]; });
    __syncthreads();
    square.by_token([&](int place, const Line& line, int time) {
        const float q = near(p, short_weight, short_bias, line, square.sample, time, 0, k, lead);
        y[line.at(square.sample, time, 1, 0)] = from_float<T>(q * ms[place]);
    });
}
KERNEL_EXPORT(long_conv_results);

// d [B, N, 3, C]: the gradients of q, k and v after their short filters.
extern "C" __global__ void __launch_bounds__(256)
    long_conv_backward_results(const T* dy, const T* p, const T* short_weight, const T* short_bias, const float* m,
                               const float* du, float* d, int n, int c, int k, int lead, int reversed) {
    SMEM_ARRAY(float, ms, kEdge*(kEdge + 1));
    SMEM_ARRAY(float, dus, kEdge*(kEdge + 1));
    const Square square(n, c, reversed);
    square.by_channel([&](int place, size_t from) { ms[place] = m[from], dus[place] = du[from]; });
    __syncthreads();
    square.by_token([&](int place, const Line& line, int time) {
        const int sample = square.sample;
        d[line.at(sample, time, 3, 0)] = to_float(dy[line.at(sample, time, 1, 0)]) * ms[place];
        d[line.at(sample, time, 3, 1)] = dus[place] * near(p, short_weight, short_bias, line, sample, time, 2, k, lead);
        d[line.at(sample, time, 3, 2)] = dus[place] * near(p, short_weight, short_bias, line, sample, time, 1, k, lead);
    });
}
KERNEL_EXPORT(long_conv_backward_results);

// What a block has: its ring, the blocks of times, the distances between two of them that a lag connects, and its slots for
// spectra: of the filter by distance, of u, and backward of dm and of the filter's gradient.
struct Call {
    Ring ring;
    float2* slots;
    int n, l, centre, blocks, nearest, farthest;

    __device__ __forceinline__ Call(unsigned char* smem, const float* table, float* spectra, int bits, int n, int l,
                                    int centre, int slots_each)
        : n(n), l(l), centre(centre) {
        const int size = 1 << bits;
        Regions regions = {smem, {}};
        float2* data = reinterpret_cast<float2*>(regions.take((size + size / 16) * 8));
        const float2* roots = reinterpret_cast<const float2*>(table);
        ring = {data, roots, roots + size, bits};
        slots = reinterpret_cast<float2*>(spectra) + size_t(blockIdx.x) * slots_each * size;
        blocks = (n + size - 1) >> bits;
        const int before = max(-centre, 1 - n), after = min(l - 1 - centre, n - 1);
        nearest = max(-((-before + size - 1) >> bits), 1 - blocks);
        farthest = min((after + size - 1) >> bits, blocks - 1);
    }
    __device__ __forceinline__ int distances() const { return farthest - nearest + 1; }
    __device__ __forceinline__ Spectrum slot(int i) const {
        return {slots + (size_t(i) << ring.bits), ring.size() >> 4};
    }
    __device__ __forceinline__ Spectrum filter(int distance) const { return slot(distance - nearest); }
    __device__ __forceinline__ Spectrum values(int block) const { return slot(distances() + block); }
    __device__ __forceinline__ Spectrum gradients(int block) const { return slot(distances() + blocks + block); }
    __device__ __forceinline__ Spectrum taps(int distance) const {
        return slot(distances() + 2 * blocks + distance - nearest);
    }
    __device__ __forceinline__ bool connected(int distance) const { return distance >= nearest && distance <= farthest; }

    __device__ __forceinline__ void keep(const Spectrum& to) const {
        ring.spectrum(true, false, [&](const float2(&v)[16], int j) {
#pragma unroll
            for (int i = 0; i < 16; i++) to(i, j) = v[i];
        });
    }
    // The spectra of the filter of a channel, its skip included.
    __device__ __forceinline__ void load_filter(const T* taps, float direct) const {
        const auto tap = [&](int lag) {
            const int i = lag + centre;
            return (i >= 0 && i < l ? to_float(taps[i]) : 0.0f) + (lag == 0 ? direct : 0.0f);
        };
        for (int distance = nearest; distance <= farthest; distance++) {
            const int first = distance * ring.size();
            ring.load([&](int i) { return make_float2(tap(first + i), i ? tap(first + i - ring.size()) : 0.0f); });
            ring.there();
            keep(filter(distance));
        }
    }
    // The spectrum of a block of a row in the ring, up to its last pass.
    __device__ __forceinline__ void load_row(const float* row, int block) const {
        const int first = block << ring.bits;
        ring.load([&](int i) { return make_float2(first + i < n ? row[first + i] : 0.0f, 0.0f); });
        ring.there();
    }
    __device__ __forceinline__ void store_row(float* row, int block) const {
        const int first = block << ring.bits;
        ring.back();
        ring.store([&](int i, float value, float) {
            if (first + i < n) row[first + i] = value;
        });
    }
    // v += a·b, or conj(a)·b.
    template <bool kConjugate>
    static __device__ __forceinline__ void add(float2 (&v)[16], const Spectrum& a, const Spectrum& b, int j) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float2 x = times(kConjugate ? conjugate(a(i, j)) : a(i, j), b(i, j));
            v[i].x += x.x, v[i].y += x.y;
        }
    }
    // Rows of m from the spectra of u.
    __device__ __forceinline__ void mix(float* row) const {
        for (int to = 0; to < blocks; to++) {
            ring.spectrum(false, true, [&](float2(&v)[16], int j) {
                for (int from = 0; from < blocks; from++)
                    if (connected(to - from)) add<false>(v, filter(to - from), values(from), j);
            });
            store_row(row, to);
        }
    }
};

extern "C" __global__ void __launch_bounds__(512, 1)
    long_conv_transform(const T* filter, const T* skip, const float* table, float* spectra, float* u, int b, int n, int c,
                        int l, int centre, int bits, int slots) {
    SMEM_DYNAMIC(smem, 16);
    const Call call(smem, table, spectra, bits, n, l, centre, slots);
    for (int channel = blockIdx.x; channel < c; channel += gridDim.x) {
        call.load_filter(filter + size_t(channel) * l, to_float(skip[channel]));
        for (int sample = 0; sample < b; sample++) {
            float* row = u + (size_t(sample) * c + channel) * n;
            if (call.blocks == 1) {
                // The spectrum of u need not leave the registers.
                call.load_row(row, 0);
                call.ring.spectrum(true, true, [&](float2(&v)[16], int j) {
                    const Spectrum by = call.filter(0);
#pragma unroll
                    for (int i = 0; i < 16; i++) v[i] = times(v[i], by(i, j));
                });
                call.store_row(row, 0);
                continue;
            }
            for (int block = 0; block < call.blocks; block++) {
                call.load_row(row, block);
                call.keep(call.values(block));
            }
            call.mix(row);
        }
    }
}
KERNEL_EXPORT(long_conv_transform);

// u becomes m, dm becomes du; the filter's gradient is added up over the samples as spectra.
extern "C" __global__ void __launch_bounds__(512, 1)
    long_conv_transform_backward(const T* filter, const T* skip, const float* table, float* spectra, float* u, float* dm,
                                 float* taps, T* dfilter, T* dskip, int b, int n, int c, int l, int centre, int bits,
                                 int slots) {
    SMEM_DYNAMIC(smem, 16);
    const Call call(smem, table, spectra, bits, n, l, centre, slots);
    const Ring& ring = call.ring;
    float* sums = taps + size_t(blockIdx.x) * l;
    for (int channel = blockIdx.x; channel < c; channel += gridDim.x) {
        call.load_filter(filter + size_t(channel) * l, to_float(skip[channel]));
        for (int sample = 0; sample < b; sample++) {
            const size_t row = (size_t(sample) * c + channel) * n;
            for (int block = 0; block < call.blocks; block++) {
                call.load_row(u + row, block);
                call.keep(call.values(block));
            }
            for (int block = 0; block < call.blocks; block++) {
                call.load_row(dm + row, block);
                call.keep(call.gradients(block));
            }
            call.mix(u + row);
            for (int to = 0; to < call.blocks; to++) {
                ring.spectrum(false, true, [&](float2(&v)[16], int j) {
                    for (int from = 0; from < call.blocks; from++)
                        if (call.connected(from - to)) Call::add<true>(v, call.filter(from - to), call.gradients(from), j);
                });
                call.store_row(dm + row, to);
            }
            for (int distance = call.nearest; distance <= call.farthest; distance++) {
                const Spectrum sum = call.taps(distance);
                const int last = min(call.blocks, call.blocks + distance);
                for (int j = threadIdx.x; j < sum.butterflies; j += blockDim.x) {
#pragma unroll 4
                    for (int i = 0; i < 16; i++) {
                        float2 v = sample ? sum(i, j) : make_float2(0.0f, 0.0f);
                        for (int to = max(0, distance); to < last; to++) {
                            const float2 x = times(conjugate(call.values(to - distance)(i, j)), call.gradients(to)(i, j));
                            v.x += x.x, v.y += x.y;
                        }
                        sum(i, j) = v;
                    }
                }
            }
        }
        for (int i = threadIdx.x; i < l; i += blockDim.x) sums[i] = 0.0f;
        for (int distance = call.nearest; distance <= call.farthest && b > 0; distance++) {
            const Spectrum sum = call.taps(distance);
            ring.spectrum(false, true, [&](float2(&v)[16], int j) {
#pragma unroll
                for (int i = 0; i < 16; i++) v[i] = sum(i, j);
            });
            ring.back();
            // Each lag is in the rings of two distances; lags that connect no two tokens stay zero.
            const auto give = [&](int lag, float value) {
                const int i = lag + centre;
                if (i >= 0 && i < l && lag > -n && lag < n) sums[i] += value;
            };
            ring.store([&](int i, float ahead, float behind) {
                give(distance * ring.size() + i, ahead);
                if (i) give(distance * ring.size() + i - ring.size(), behind);
            });
        }
        __syncthreads();
        for (int i = threadIdx.x; i < l; i += blockDim.x) {
            if (dfilter) dfilter[size_t(channel) * l + i] = from_float<T>(sums[i]);
            if (dskip && i == centre) dskip[channel] = from_float<T>(sums[i]);
        }
        __syncthreads();
    }
}
KERNEL_EXPORT(long_conv_transform_backward);
