//! Sliding-window attention: every token sees the `window` tokens before and behind it in raster order
//! (arXiv 2506.05340, table 3), under the parameter names of the published checkpoints.

use super::heads::Heads;
use super::{BlockDims, Kind, Operator, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::Result;
use crate::nn::{Builder, Epilogue};
use crate::ops::contracts::window_attention;

pub(super) const KIND: Kind = Kind {
    name: "swa",
    site: Site::Attn,
    summary: "softmax attention over a window of 2·window + 1 tokens in raster order",
    options: &[("heads", "the model's"), ("window", "4")],
    build,
};

#[derive(Debug)]
struct Swa {
    heads: Heads,
    window: usize,
}

fn build(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let window = spec.whole("window", 4)?;
    Ok(Box::new(Swa { heads: Heads::named(["Wqkv", "out_proj"], spec, dims, builder)?, window }))
}

impl Operator for Swa {
    fn spec(&self) -> Spec {
        Spec::new(KIND.name).with("heads", self.heads.count as f64).with("window", self.window as f64)
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        self.heads.around(g, params, x, epilogue, |qkv, scale| {
            g.window_attention(qkv, self.window, window_attention::Params { scale })
        })
    }

    /// As published, without regard to the windows that the ends cut; no more than all tokens.
    fn flops(&self, dims: BlockDims) -> SiteFlops {
        let keys = dims.tokens().min(2 * self.window + 1);
        SiteFlops { operator: self.heads.softmax(dims, keys), projections: self.heads.projections(dims) }
    }

    fn teacher_names(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("Wqkv.weight", "qkv.weight"),
            ("Wqkv.bias", "qkv.bias"),
            ("out_proj.weight", "proj.weight"),
            ("out_proj.bias", "proj.bias"),
        ]
    }

    fn untold(&self) -> &'static [&'static str] {
        &["window"]
    }
}
