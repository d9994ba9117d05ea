//! MLP Hyena-X: two gates in place of the activation, after a filter along the features (arXiv 2506.05340, table 3).
//!
//! As published, every token has a filter of its own that runs over the features of q, k and v as if they were one
//! sequence. The operator is therefore tied to the number of tokens it was made for.

use super::{BlockDims, Kind, Operator, Shapes, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamId, ParamStore, Var};
use crate::error::{Error, Result};
use crate::nn::{Builder, Epilogue, Init, Linear};
use crate::ops::{act, contracts::feature_gated_conv};

pub(super) const KIND: Kind = Kind {
    name: "mlp_hyena_x",
    site: Site::Mlp,
    summary: "q·(k·v) of three projections after each token's own filter along the features; fixed number of tokens",
    options: &[("ratio", "2"), ("taps", "4")],
    build,
};

#[derive(Debug)]
struct MlpHyenaX {
    ratio: f64,
    hidden: usize,
    tokens: usize,
    taps: usize,
    in_proj: Linear,
    out_proj: Linear,
    filter: ParamId,
    filter_bias: ParamId,
}

fn build(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let (ratio, taps) = (spec.number("ratio", 2.0)?, spec.whole("taps", 4)?);
    let (d, hidden, tokens) = (dims.width, spec.hidden(dims.width, ratio)?, dims.tokens());
    let in_proj = builder.linear("in_proj", d, 3 * hidden)?;
    let mut short = builder.below("short_filter");
    let filter = short.param("weight", &[tokens, 1, taps], Init::torch(taps))?;
    let filter_bias = short.param("bias", &[tokens], Init::torch(taps))?;
    let out_proj = builder.linear("out_proj", hidden, d)?;
    Ok(Box::new(MlpHyenaX { ratio, hidden, tokens, taps, in_proj, out_proj, filter, filter_bias }))
}

impl Operator for MlpHyenaX {
    fn spec(&self) -> Spec {
        Spec::new(KIND.name).with("ratio", self.ratio).with("taps", self.taps as f64)
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        let (b, n) = (x.dim(0), x.dim(1));
        if n != self.tokens {
            return Err(Error::usage("mlp_hyena_x: tokens", "the operator has one filter per token of another size")
                .is(n)
                .must(self.tokens)
                .fix("run the model at the size it was grafted at, or graft it with another operator"));
        }
        let p = self.in_proj.forward(g, params, x, act::NONE)?;
        let p = g.reshape(&p, &[b, n, 3, self.hidden])?;
        let filter = g.reshape(&g.param(params, self.filter), &[n, self.taps])?;
        let bias = g.param(params, self.filter_bias);
        let mixed = g.feature_gated_conv(&p, &filter, &bias, feature_gated_conv::Params {})?;
        self.out_proj.project(g, params, &mixed, epilogue)
    }

    fn flops(&self, dims: BlockDims) -> SiteFlops {
        let (n, d, f) = (dims.tokens() as f64, dims.width as f64, self.hidden as f64);
        // As the published table counts: projections and gates. The filter, 6·K·N·F more, is not in its +0.02 %.
        SiteFlops { operator: 8.0 * n * d * f + 2.0 * n * f, projections: 0.0 }
    }

    fn told_by(&self, shapes: &Shapes, dims: BlockDims) -> Option<Spec> {
        let hidden = *shapes.get("out_proj.weight")?.get(1)?;
        let taps = *shapes.get("short_filter.weight")?.last()?;
        Some(Spec::new(KIND.name).with("ratio", hidden as f64 / dims.width as f64).with("taps", taps as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Scheme, operators};
    use crate::tensor::{Device, Tensor};

    #[test]
    fn another_number_of_tokens_is_refused() {
        let (mut params, device) = (ParamStore::default(), Device::cpu());
        let dims = BlockDims { width: 4, heads: 2, grid: [2, 3] };
        let mut builder = Builder::new(&mut params, &device, 0, Scheme::Torch);
        let operator = operators::build(&Spec::new("mlp_hyena_x"), Site::Mlp, dims, &mut builder).unwrap();
        let g = Graph::inference(crate::autograd::Precision::F32);
        let run =
            |n: usize| operator.forward(&g, &params, &Var::constant(Tensor::zeros(&device, &[1, n, 4]).unwrap()), None);
        assert_eq!(run(6).unwrap().tensor().shape().dims(), [1, 6, 4]);
        let message = run(8).unwrap_err().to_string();
        assert!(message.contains("is 8; must be 6") && message.contains("size it was grafted at"), "{message}");
    }
}
