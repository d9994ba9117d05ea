//! Hyena operators: gated short convolutions over the tokens in raster order (arXiv 2506.05340, table 3).

use super::{BlockDims, Kind, Operator, Shapes, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamId, ParamStore, Var};
use crate::error::Result;
use crate::nn::{Builder, Epilogue, Init, Linear};
use crate::ops::{act, contracts::gated_conv};

pub(super) const X: Kind = Kind {
    name: "hyena_x",
    site: Site::Attn,
    summary: "q·(k·v) after a short depthwise convolution of q, k and v",
    options: &[("taps", "4")],
    build: build_x,
};

/// Hyena-X: `y = out_proj(q·(k·v))`, `(q, k, v) = conv(in_proj(x))`, causal.
#[derive(Debug)]
struct HyenaX {
    taps: usize,
    in_proj: Linear,
    out_proj: Linear,
    filter: ParamId,
    filter_bias: ParamId,
}

fn build_x(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let (d, taps) = (dims.width, spec.whole("taps", 4)?);
    let in_proj = builder.linear("in_proj", d, 3 * d)?;
    let mut short = builder.below("short_filter");
    // A depthwise filter sees one channel, so its fan-in is the number of taps.
    let filter = short.param("weight", &[3 * d, 1, taps], Init::torch(taps))?;
    let filter_bias = short.param("bias", &[3 * d], Init::torch(taps))?;
    let out_proj = builder.linear("out_proj", d, d)?;
    Ok(Box::new(HyenaX { taps, in_proj, out_proj, filter, filter_bias }))
}

impl Operator for HyenaX {
    fn spec(&self) -> Spec {
        Spec::new(X.name).with("taps", self.taps as f64)
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        let (b, n, d) = (x.dim(0), x.dim(1), x.dim(2));
        let p = self.in_proj.forward(g, params, x, act::NONE)?;
        let p = g.reshape(&p, &[b, n, 3, d])?;
        let filter = g.reshape(&g.param(params, self.filter), &[3, d, self.taps])?;
        let bias = g.reshape(&g.param(params, self.filter_bias), &[3, d])?;
        let causal = gated_conv::Params { lead: self.taps - 1 };
        let mixed = g.gated_conv(&p, Some(&filter), Some(&bias), None, None, causal)?;
        self.out_proj.project(g, params, &mixed, epilogue)
    }

    fn flops(&self, dims: BlockDims) -> SiteFlops {
        let (n, d, k) = (dims.tokens() as f64, dims.width as f64, self.taps as f64);
        SiteFlops { operator: 2.0 * n * d, projections: 8.0 * n * d * d + 6.0 * k * n * d }
    }

    fn teacher_names(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("in_proj.weight", "qkv.weight"),
            ("in_proj.bias", "qkv.bias"),
            ("out_proj.weight", "proj.weight"),
            ("out_proj.bias", "proj.bias"),
        ]
    }

    fn told_by(&self, shapes: &Shapes, _dims: BlockDims) -> Option<Spec> {
        Some(Spec::new(X.name).with("taps", *shapes.get("short_filter.weight")?.last()? as f64))
    }
}
