//! Softmax attention whose queries and keys go through a LayerNorm first, over all heads at once: PixArt's option that
//! keeps scores small.

use super::heads::{Heads, TEACHER_NAMES};
use super::{BlockDims, Kind, Operator, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamId, ParamStore, Var};
use crate::error::Result;
use crate::nn::{Builder, Epilogue, Init};
use crate::ops::contracts::{attention, qk_norm};

pub(super) const KIND: Kind = Kind {
    name: "mha_qk_norm",
    site: Site::Attn,
    summary: "softmax attention over all tokens, queries and keys normalised",
    options: &[("heads", "the model's")],
    build,
};

/// Added to the variance of the LayerNorms.
const EPS: f32 = 1e-5;

#[derive(Debug)]
struct MhaQkNorm {
    heads: Heads,
    /// Scale and shift of the queries, then of the keys.
    maps: [ParamId; 4],
}

fn build(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let heads = Heads::build(spec, dims, builder)?;
    let mut norm = |name: &str| -> Result<[ParamId; 2]> {
        let mut b = builder.below(name);
        Ok([b.param("weight", &[dims.width], Init::Ones)?, b.param("bias", &[dims.width], Init::Zeros)?])
    };
    let ([q_gamma, q_beta], [k_gamma, k_beta]) = (norm("q_norm")?, norm("k_norm")?);
    Ok(Box::new(MhaQkNorm { heads, maps: [q_gamma, q_beta, k_gamma, k_beta] }))
}

impl Operator for MhaQkNorm {
    fn spec(&self) -> Spec {
        Spec::new(KIND.name).with("heads", self.heads.count as f64)
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        let (b, n, d) = (x.dim(0), x.dim(1), x.dim(2));
        let [q_gamma, q_beta, k_gamma, k_beta] = self.maps.map(|id| g.param(params, id));
        self.heads.around(g, params, x, epilogue, |qkv, scale| {
            let shape = qkv.tensor().shape();
            let rows = g.reshape(qkv, &[b, n, 3, d])?;
            let rows = g.qk_norm(&rows, &q_gamma, &q_beta, &k_gamma, &k_beta, qk_norm::Params { eps: EPS })?;
            g.attention(&g.reshape(&rows, shape.dims())?, attention::Params { scale })
        })
    }

    /// The attention, and 8 operations an element of queries and keys.
    fn flops(&self, dims: BlockDims) -> SiteFlops {
        let norms = 16.0 * dims.tokens() as f64 * dims.width as f64;
        SiteFlops {
            operator: self.heads.softmax(dims, dims.tokens()) + norms,
            projections: self.heads.projections(dims),
        }
    }

    fn teacher_names(&self) -> &'static [(&'static str, &'static str)] {
        TEACHER_NAMES
    }
}
