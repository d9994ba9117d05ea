//! Softmax multi-head attention: the operator that pretrained models come with, and the self-graft control.

use super::heads::{Heads, TEACHER_NAMES};
use super::{BlockDims, Kind, Operator, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::Result;
use crate::nn::{Builder, Epilogue};
use crate::ops::contracts::attention;

pub(super) const KIND: Kind = Kind {
    name: "mha",
    site: Site::Attn,
    summary: "softmax attention over all tokens",
    options: &[("heads", "the model's")],
    build,
};

#[derive(Debug)]
struct Mha {
    heads: Heads,
}

fn build(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    Ok(Box::new(Mha { heads: Heads::build(spec, dims, builder)? }))
}

impl Operator for Mha {
    fn spec(&self) -> Spec {
        Spec::new(KIND.name).with("heads", self.heads.count as f64)
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        self.heads.around(g, params, x, epilogue, |qkv, scale| g.attention(qkv, attention::Params { scale }))
    }

    fn flops(&self, dims: BlockDims) -> SiteFlops {
        SiteFlops { operator: self.heads.softmax(dims, dims.tokens()), projections: self.heads.projections(dims) }
    }

    fn teacher_names(&self) -> &'static [(&'static str, &'static str)] {
        TEACHER_NAMES
    }
}
