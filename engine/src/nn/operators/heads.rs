//! What the attention family shares: the packed projection to queries, keys and values of several heads, and the
//! projection behind.

use super::{BlockDims, Spec};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::{Error, Result};
use crate::nn::{Builder, Epilogue, Linear};
use crate::ops::act;

/// Own names of the projections, and those in `mha`.
pub(super) const TEACHER_NAMES: &[(&str, &str)] = &[
    ("qkv.weight", "qkv.weight"),
    ("qkv.bias", "qkv.bias"),
    ("proj.weight", "proj.weight"),
    ("proj.bias", "proj.bias"),
];

/// The projections around an attention of several heads.
#[derive(Debug)]
pub(super) struct Heads {
    /// Heads H.
    pub count: usize,
    qkv: Linear,
    proj: Linear,
}

impl Heads {
    /// The projections, named `qkv` and `proj`; the option `heads` must divide the width.
    pub fn build(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Heads> {
        Heads::named(["qkv", "proj"], spec, dims, builder)
    }

    /// The same under other names.
    pub fn named(names: [&str; 2], spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Heads> {
        let (d, count) = (dims.width, spec.whole("heads", dims.heads)?);
        if !d.is_multiple_of(count) {
            return Err(Error::usage(format!("{}: heads", spec.kind), "does not divide the width")
                .is(count)
                .must(format!("a divisor of {d}")));
        }
        let (qkv, proj) = (builder.linear(names[0], d, 3 * d)?, builder.linear(names[1], d, d)?);
        Ok(Heads { count, qkv, proj })
    }

    /// Projects `x [B, N, D]`, hands `[B, N, 3, H, E]` and 1/√E to `mix`, and projects what it gives, whose elements are
    /// those of `[B, N, D]`.
    pub fn around(
        &self,
        g: &Graph<'_>,
        params: &ParamStore,
        x: &Var,
        epilogue: Option<Epilogue<'_>>,
        mix: impl FnOnce(&Var, f32) -> Result<Var>,
    ) -> Result<Var> {
        let (b, n, d) = (x.dim(0), x.dim(1), x.dim(2));
        let head_width = d / self.count;
        let qkv = self.qkv.forward(g, params, x, act::NONE)?;
        let qkv = g.reshape(&qkv, &[b, n, 3, self.count, head_width])?;
        let mixed = mix(&qkv, 1.0 / (head_width as f32).sqrt())?;
        self.proj.project(g, params, &g.reshape(&mixed, &[b, n, d])?, epilogue)
    }

    /// FLOPs of the projections for one sample.
    pub fn projections(&self, dims: BlockDims) -> f64 {
        8.0 * dims.tokens() as f64 * (dims.width as f64).powi(2)
    }

    /// FLOPs of a softmax attention with `keys` keys a query for one sample: two products, and two operations a score.
    pub fn softmax(&self, dims: BlockDims, keys: usize) -> f64 {
        let (n, keys) = (dims.tokens() as f64, keys as f64);
        n * keys * (4.0 * dims.width as f64 + 2.0 * self.count as f64)
    }
}
