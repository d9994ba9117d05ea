// eps = model_output[b, 0..C];  v = model_output[b, C..2C];  means run over the C*S elements of a sample
// mse[b] = mean (noise - eps)^2;  vb[b] = mean bound / ln 2;  loss = 1/B sum_b (mse[b] + vlb_weight*vb[b])
// bound: with d = (v + 1)/2*log_range, k = (gap*(eps - noise))^2/e^log_lo: (d + e^-d - 1 + k*e^-d)/2; where `first`, the
// negative logarithm of what a Gaussian gives to the bin x0 -+ 1/255 (see `mod.rs`). eps is a constant inside it.
//
// model_output: [B, 2C, S], x0, noise: [B, C, S], coefs: [B, 4], loss: [1], mse, vb: [B], T = f32 alone; partials:
// [B, parts, 2] f32; len = C*S.
//
// Forward: `parts` blocks a sample add both terms (threads by butterflies, warps in order); the second kernel, one
// block, adds the parts of each sample in order and then the samples. `parts` follows from len alone. Backward: an
// element of eps and one of v a thread. Samples of the last denoising step (one in a thousand) compute their bound in
// f64: it is the logarithm of a difference of two distribution functions, which f32 cannot hold.
//
// Bound: memory, 12 bytes an element of a latent forward (16 where `first`) and 20 backward; at the sizes of latents
// (4 KB to 0.5 MB a sample) the launches.
//
// Requires: nothing beyond the contract. Does not handle: strides.
#include "../common/ptx.cuh"
#include "../common/elementwise.cuh"

using namespace ptx;

constexpr float kInverseLn2 = 1.44269504f;

// The coefficients of a sample, as the divergence takes them.
struct Coefs {
    float gap, log_lo, log_range, scaled_gap;
    bool first;
};

__device__ __forceinline__ Coefs coefs_of(const T* coefs, int sample) {
    const T* row = coefs + size_t(sample) * 4;
    const float gap = to_float(row[0]), log_lo = to_float(row[1]);
    return {gap, log_lo, to_float(row[2]), gap * expf(-0.5f * log_lo), to_float(row[3]) > 0.5f};
}

// A term of the bound in nats and its derivative in v.
struct Bound {
    float term, slope;
};

struct Cdf {
    double value, slope;
};

__device__ __forceinline__ Cdf normal_cdf(double u) {
    const double root = 0.79788456080286535588, t = tanh(root * (u + 0.044715 * u * u * u));
    return {0.5 * (1.0 + t), 0.5 * (1.0 - t * t) * root * (1.0 + 3.0 * 0.044715 * u * u)};
}

__device__ __forceinline__ Bound likelihood(float x0, float noise, float eps, float v, float gap, float log_lo,
                                            float log_range) {
    const double half_bin = 1.0 / 255.0, x = x0, distance = double(gap) * (double(eps) - noise);
    const double inverse = exp(-0.5 * (log_lo + 0.5 * (double(v) + 1.0) * log_range));
    const double upper = inverse * (distance + half_bin), lower = inverse * (distance - half_bin);
    const Cdf high = normal_cdf(upper), low = normal_cdf(lower);
    double p = high.value - low.value, dp = high.slope * -0.5 * upper + low.slope * 0.5 * lower;
    if (x < -0.999) p = high.value, dp = high.slope * -0.5 * upper;
    if (x > 0.999) p = 1.0 - low.value, dp = low.slope * 0.5 * lower;
    if (p < 1e-12) return {27.631021116f, 0.0f};
    return {float(-log(p)), float(-dp / p * 0.5 * log_range)};
}

__device__ __forceinline__ Bound bound(const Coefs& c, const T* x0, size_t at, float noise, float eps, float v) {
    if (c.first) return likelihood(to_float(x0[at]), noise, eps, v, c.gap, c.log_lo, c.log_range);
    const float d = 0.5f * c.log_range * (v + 1.0f), distance = c.scaled_gap * (eps - noise), decay = expm1f(-d);
    const float excess = fmaf(distance * distance, 1.0f + decay, decay);
    return {0.5f * (d + excess), -0.25f * c.log_range * excess};
}

extern "C" __global__ void __launch_bounds__(256)
    loss_diffusion_partial(const T* model_output, const T* x0, const T* noise, const T* coefs, float* partials, int len,
                           int parts) {
    SMEM_ARRAY(float, warps, 8);
    const int sample = blockIdx.x / parts, part = blockIdx.x % parts;
    const Coefs c = coefs_of(coefs, sample);
    const T* eps = model_output + size_t(sample) * 2 * len;
    float squares = 0.0f, nats = 0.0f;
    for (int i = part * 256 + int(threadIdx.x); i < len; i += parts * 256) {
        const size_t at = size_t(sample) * len + i;
        const float z = to_float(noise[at]), e = to_float(eps[i]), v = to_float(eps[size_t(len) + i]);
        squares = fmaf(z - e, z - e, squares);
        nats += bound(c, x0, at, z, e, v).term;
    }
    squares = block_sum<8>(squares, warps), nats = block_sum<8>(nats, warps);
    if (threadIdx.x == 0) partials[2 * size_t(blockIdx.x)] = squares, partials[2 * size_t(blockIdx.x) + 1] = nats;
}
KERNEL_EXPORT(loss_diffusion_partial);

extern "C" __global__ void __launch_bounds__(256)
    loss_diffusion_finish(const float* partials, T* loss, T* mse, T* vb, int b, int parts, float inverse_len,
                          float inverse_b, float vlb_weight) {
    SMEM_ARRAY(float, warps, 8);
    float total = 0.0f;
    for (int sample = threadIdx.x; sample < b; sample += 256) {
        float squares = 0.0f, nats = 0.0f;
        for (int part = 0; part < parts; part++) {
            const float* from = partials + 2 * (size_t(sample) * parts + part);
            squares += from[0], nats += from[1];
        }
        squares *= inverse_len, nats *= inverse_len * kInverseLn2;
        mse[sample] = from_float<T>(squares), vb[sample] = from_float<T>(nats);
        total += fmaf(vlb_weight, nats, squares);
    }
    total = block_sum<8>(total, warps);
    if (threadIdx.x == 0) loss[0] = from_float<T>(total * inverse_b);
}
KERNEL_EXPORT(loss_diffusion_finish);

extern "C" __global__ void __launch_bounds__(256)
    loss_diffusion_backward(const T* dloss, const T* model_output, const T* x0, const T* noise, const T* coefs,
                            T* dmodel_output, int b, int len, float inverse, float vlb_weight) {
    const float scale = to_float(dloss[0]) * inverse;
    for (size_t at = grid_thread(); at < size_t(b) * len; at += grid_threads()) {
        const int sample = int(at / len);
        const size_t eps_at = at + size_t(sample) * len, v_at = eps_at + len;
        const float z = to_float(noise[at]), e = to_float(model_output[eps_at]), v = to_float(model_output[v_at]);
        const Bound term = bound(coefs_of(coefs, sample), x0, at, z, e, v);
        dmodel_output[eps_at] = from_float<T>(scale * 2.0f * (e - z));
        dmodel_output[v_at] = from_float<T>(scale * vlb_weight * kInverseLn2 * term.slope);
    }
}
KERNEL_EXPORT(loss_diffusion_backward);
