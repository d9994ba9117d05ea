//! The two-layer perceptron of a transformer block, of any width.

use super::{BlockDims, Kind, Operator, Shapes, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::Result;
use crate::nn::{Builder, Epilogue, Linear};
use crate::ops::act;

pub(super) const KIND: Kind = Kind {
    name: "mlp",
    site: Site::Mlp,
    summary: "linear, GELU (tanh approximation), linear",
    options: &[("ratio", "4")],
    build,
};

#[derive(Debug)]
struct Mlp {
    ratio: f64,
    hidden: usize,
    fc1: Linear,
    fc2: Linear,
}

fn build(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let ratio = spec.number("ratio", 4.0)?;
    let (d, hidden) = (dims.width, spec.hidden(dims.width, ratio)?);
    Ok(Box::new(Mlp { ratio, hidden, fc1: builder.linear("fc1", d, hidden)?, fc2: builder.linear("fc2", hidden, d)? }))
}

impl Operator for Mlp {
    fn spec(&self) -> Spec {
        Spec::new(KIND.name).with("ratio", self.ratio)
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        let hidden = self.fc1.forward(g, params, x, act::GELU)?;
        self.fc2.project(g, params, &hidden, epilogue)
    }

    fn flops(&self, dims: BlockDims) -> SiteFlops {
        let (n, d) = (dims.tokens() as f64, dims.width as f64);
        SiteFlops { operator: 4.0 * n * d * self.hidden as f64, projections: 0.0 }
    }

    fn teacher_names(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("fc1.weight", "fc1.weight"),
            ("fc1.bias", "fc1.bias"),
            ("fc2.weight", "fc2.weight"),
            ("fc2.bias", "fc2.bias"),
        ]
    }

    fn told_by(&self, shapes: &Shapes, dims: BlockDims) -> Option<Spec> {
        let hidden = *shapes.get("fc1.weight")?.first()?;
        let ratio = hidden as f64 / dims.width as f64;
        // The quotient may be rounded down, and the width that it gives with it.
        let exact = (dims.width as f64 * ratio) as usize == hidden;
        Some(Spec::new(KIND.name).with("ratio", if exact { ratio } else { ratio.next_up() }))
    }
}
