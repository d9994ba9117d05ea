//! Linear attention: a feature map in place of the softmax, over all tokens in linear time.

use super::heads::{Heads, TEACHER_NAMES};
use super::{BlockDims, Kind, Operator, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::Result;
use crate::nn::{Builder, Epilogue};
use crate::ops::contracts::linear_attention;

pub(super) const KIND: Kind = Kind {
    name: "linear_attention",
    site: Site::Attn,
    summary: "attention with a feature map in place of the softmax, in linear time",
    options: &[("heads", "the model's"), ("feature_map", "elu+1")],
    build,
};

/// Feature maps by the number that the contract gives them.
const MAPS: [&str; 2] = ["elu+1", "relu"];

/// Keeps the division defined where no feature of a query meets one of a key.
const EPS: f32 = 1e-6;

#[derive(Debug)]
struct LinearAttention {
    heads: Heads,
    map: usize,
}

fn build(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let word = spec.choice("feature_map", &MAPS)?;
    let map = MAPS.iter().position(|map| *map == word).unwrap_or_default();
    Ok(Box::new(LinearAttention { heads: Heads::build(spec, dims, builder)?, map }))
}

impl Operator for LinearAttention {
    fn spec(&self) -> Spec {
        Spec::new(KIND.name).with("heads", self.heads.count as f64).with("feature_map", MAPS[self.map])
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        let settings = linear_attention::Params { map: self.map, eps: EPS, causal: false };
        self.heads.around(g, params, x, epilogue, |qkv, _| g.linear_attention(qkv, settings))
    }

    /// Two products of tokens, head width and head width, the sum of the key features and the norm.
    fn flops(&self, dims: BlockDims) -> SiteFlops {
        let (n, d) = (dims.tokens() as f64, dims.width as f64);
        let head_width = d / self.heads.count as f64;
        SiteFlops { operator: 4.0 * n * d * (head_width + 1.0), projections: self.heads.projections(dims) }
    }

    fn teacher_names(&self) -> &'static [(&'static str, &'static str)] {
        TEACHER_NAMES
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::refusal;
    use super::*;

    #[test]
    fn unknown_feature_maps() {
        let dims = BlockDims { width: 8, heads: 2, grid: [2, 2] };
        let text = refusal(&Spec::new(KIND.name).with("feature_map", "gelu"), dims);
        assert!(text.contains("elu+1, relu") && text.contains("gelu"), "{text}");
    }
}
