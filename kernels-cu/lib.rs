//! The operators of graft, one directory each, and what they share.
//!
//! `<op>/op.toml` is the contract, `<op>/mod.rs` the oracle (`reference`), `<op>/cpu.rs` the fast CPU path.
//! Everything here works on plain slices: this crate knows nothing of tensors, models or devices. Shapes are
//! checked by the engine's generated entry points before a call; lengths are therefore trusted here.

pub mod archive;
pub mod check;
pub mod emu;
#[rustfmt::skip]
pub mod generated;
pub mod launch;
#[rustfmt::skip]
pub mod launchers;
pub mod rng;
pub mod simd;
#[rustfmt::skip]
pub mod sources;
pub mod ways;

pub mod adamw;
pub mod add_noise;
pub mod attention;
pub mod attention_int8;
pub mod axpy;
pub mod branch_deltas;
pub mod cast;
pub mod conv2d;
pub mod conv_silu;
pub mod cross_attention;
pub mod cross_entropy;
pub mod embed;
pub mod feature_gated_conv;
pub mod filter_window;
pub mod gate_residual;
pub mod gated_conv;
pub mod gated_conv_2d;
pub mod gemm;
pub mod gemm_fp8;
pub mod gemm_gated_conv;
pub mod group_norm_silu;
pub mod kv_compress;
pub mod linear_attention;
pub mod ln_modulate;
pub mod long_conv;
pub mod loss_diffusion;
pub mod loss_regression;
pub mod mamba2;
pub mod neighborhood_attention;
pub mod norm_silu_conv2d;
pub mod patchify;
pub mod philox;
pub mod qk_norm;
pub mod relative_attention;
pub mod rms_norm;
pub mod sinusoid;
pub mod solver_step;
pub mod sum_squares;
pub mod unpatchify;
pub mod upsample;
pub mod window_attention;

/// A floating type that an oracle can run in: f32 for comparisons, f64 for finite differences.
pub trait Real: Copy + Default + 'static {
    /// To f64, exactly.
    fn f64(self) -> f64;
    /// From f64, rounded to nearest.
    fn from_f64(value: f64) -> Self;
}

impl Real for f32 {
    fn f64(self) -> f64 {
        f64::from(self)
    }
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Real for f64 {
    fn f64(self) -> f64 {
        self
    }
    fn from_f64(value: f64) -> Self {
        value
    }
}

/// The order in which an operator goes through the tokens of a sample.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// Tokens.
    pub n: usize,
    /// From the last token to the first.
    pub reverse: bool,
}

impl Order {
    /// The token at a time, and the time of a token: the same exchange.
    pub fn token(self, time: usize) -> usize {
        if self.reverse { self.n - 1 - time } else { time }
    }
}

/// A weight, stored in the working type or in bf16.
#[derive(Clone, Copy)]
pub enum Weight<'a, T> {
    /// Stored in the working type.
    Native(&'a [T]),
    /// Stored in bf16.
    Bf16(&'a [half::bf16]),
}

impl<T: Real> Weight<'_, T> {
    /// Element `i` as f64.
    pub fn at(&self, i: usize) -> f64 {
        match self {
            Weight::Native(w) => w[i].f64(),
            Weight::Bf16(w) => w[i].to_f64(),
        }
    }
}

/// Size class of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Up to 2·10⁷ multiply-adds: every backend, always.
    Tiny,
    /// The shapes of real models: benches and the GPU.
    Real,
}

/// A named shape of an operator.
#[derive(Clone, Copy, Debug)]
pub struct Case<D, P> {
    /// Name, unique in the operator.
    pub name: &'static str,
    /// Size class.
    pub tier: Tier,
    /// Dims in words, as the table of measurements names them: `B=2 N=256`.
    pub shape: &'static str,
    /// Dims.
    pub dims: D,
    /// Parameters.
    pub params: P,
    /// Optional tensors that are absent.
    pub absent: &'static [&'static str],
    /// Weights stored as bf16.
    pub bf16: &'static [&'static str],
    /// Whether finite differences can be taken.
    pub gradcheck: bool,
}

/// What the registry knows of an operator.
#[derive(Clone, Copy, Debug)]
pub struct OpInfo {
    /// Name.
    pub name: &'static str,
    /// One sentence.
    pub summary: &'static str,
    /// Whether it has a backward pass.
    pub backward: bool,
    /// Names of its cases.
    pub cases: &'static [&'static str],
    /// Bounds that replace those of f32.
    pub tolerance: Option<check::Tolerance>,
    /// Bounds that replace those of bf16.
    pub tolerance_bf16: Option<check::Tolerance>,
    /// Working types of its CUDA kernels; none where it has no kernels.
    pub elements: &'static [launch::ElementType],
    /// Ways to run its passes on a GPU; none where there is one alone.
    pub ways: &'static [ways::WayInfo],
    /// Cost of a forward call whose dims are known by name.
    pub cost: fn(&dyn Fn(&str) -> usize) -> Cost,
}

/// What one forward call costs at the least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations, 2 a multiply-add.
    pub flops: usize,
    /// Bytes that cross memory, every tensor in f32.
    pub bytes: usize,
    /// Exponentials, where they are counted.
    pub exps: usize,
}

#[cfg(test)]
mod tests {
    /// The oracle's backward passes are the derivatives of its forward passes.
    #[test]
    fn gradients_match_finite_differences() {
        let rows = super::generated::gradchecks();
        assert!(!rows.is_empty());
        for (op, case, row) in rows {
            assert!(
                row.error <= 1e-6,
                "{op}/{case}: d{}: analytic {} numeric {}",
                row.input,
                row.analytic,
                row.numeric
            );
        }
    }
}
