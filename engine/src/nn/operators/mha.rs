//! Softmax multi-head attention: the operator that pretrained models come with, and the self-graft control.

use super::{BlockDims, Kind, Operator, Shapes, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::{Error, Result};
use crate::nn::{Builder, Epilogue, Linear};
use crate::ops::{act, contracts::attention};

pub(super) const KIND: Kind = Kind {
    name: "mha",
    site: Site::Attn,
    summary: "softmax attention over all tokens",
    options: &[("heads", "the model's")],
    build,
};

#[derive(Debug)]
struct Mha {
    heads: usize,
    qkv: Linear,
    proj: Linear,
}

fn build(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let heads = spec.whole("heads", dims.heads)?;
    if !dims.width.is_multiple_of(heads) {
        return Err(Error::usage("mha: heads", "does not divide the width")
            .is(heads)
            .must(format!("a divisor of {}", dims.width)));
    }
    let d = dims.width;
    Ok(Box::new(Mha { heads, qkv: builder.linear("qkv", d, 3 * d)?, proj: builder.linear("proj", d, d)? }))
}

impl Operator for Mha {
    fn spec(&self) -> Spec {
        Spec::new(KIND.name).with("heads", self.heads as f64)
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        let (b, n, d) = (x.dim(0), x.dim(1), x.dim(2));
        let head_width = d / self.heads;
        let qkv = self.qkv.forward(g, params, x, act::NONE)?;
        let qkv = g.reshape(&qkv, &[b, n, 3, self.heads, head_width])?;
        let scale = 1.0 / (head_width as f32).sqrt();
        let mixed = g.attention(&qkv, attention::Params { scale })?;
        let mixed = g.reshape(&mixed, &[b, n, d])?;
        self.proj.project(g, params, &mixed, epilogue)
    }

    fn flops(&self, dims: BlockDims) -> SiteFlops {
        let (n, d, h) = (dims.tokens() as f64, dims.width as f64, self.heads as f64);
        SiteFlops { operator: 4.0 * n * n * d + 2.0 * h * n * n, projections: 8.0 * n * d * d }
    }

    fn teacher_names(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("qkv.weight", "qkv.weight"),
            ("qkv.bias", "qkv.bias"),
            ("proj.weight", "proj.weight"),
            ("proj.bias", "proj.bias"),
        ]
    }

    fn told_by(&self, _shapes: &Shapes, _dims: BlockDims) -> Option<Spec> {
        Some(self.spec())
    }
}
