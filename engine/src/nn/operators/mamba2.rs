//! Mamba-2: a state-space scan over the tokens in raster order, one way or both (arXiv 2405.21060; 2506.05340, table 3).
//!
//! One way it is the module of mamba-ssm to the parameter names. Both ways it is what vision Mamba (arXiv 2401.09417)
//! made of such a block: projections, gate and norm are shared, the second direction has its own convolution, step
//! bias, decay and skip, named with a `b` as there, and the results are added before the gate.

use super::{BlockDims, Kind, Operator, Shapes, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamId, ParamStore, Var};
use crate::error::{Error, Result};
use crate::nn::{Builder, Epilogue, Init, Linear};
use crate::ops::{act, contracts};

pub(super) const KIND: Kind = Kind {
    name: "mamba2",
    site: Site::Attn,
    summary: "gated state-space scan, causal or in both directions",
    options: &[("state", "64"), ("taps", "4"), ("expand", "2"), ("head_width", "16"), ("direction", "causal")],
    build,
};

/// Added to the mean square in the norm.
const EPS: f32 = 1e-5;

/// `y = out_proj(norm(scan(conv(x, B, C), dt)·silu(z)))`, `(z, x, B, C, dt) = in_proj(input)`.
#[derive(Debug)]
struct Mamba2 {
    sizes: Sizes,
    in_proj: Linear,
    directions: Vec<Direction>,
    norm: ParamId,
    out_proj: Linear,
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    expand: usize,
    /// Expanded width, heads · head width.
    inner: usize,
    heads: usize,
    head_width: usize,
    state: usize,
    taps: usize,
}

impl Sizes {
    /// Columns that are convolved: x, B and C.
    fn convolved(&self) -> usize {
        self.inner + 2 * self.state
    }

    /// Columns of the input projection: z, x, B, C, dt.
    fn packed(&self) -> usize {
        self.inner + self.convolved() + self.heads
    }
}

/// What each direction has of its own.
#[derive(Clone, Copy, Debug)]
struct Direction {
    conv: ParamId,
    conv_bias: ParamId,
    dt_bias: ParamId,
    a_log: ParamId,
    skip: ParamId,
}

fn build(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let (expand, head_width) = (spec.whole("expand", 2)?, spec.whole("head_width", 16)?);
    let inner = expand * dims.width;
    if !inner.is_multiple_of(head_width) {
        return Err(Error::usage("mamba2: head_width", "does not divide the expanded width")
            .is(head_width)
            .must(format!("a divisor of {inner}")));
    }
    let (state, taps) = (spec.whole("state", 64)?, spec.whole("taps", 4)?);
    let sizes = Sizes { expand, inner, heads: inner / head_width, head_width, state, taps };
    let in_proj = builder.linear_without_bias("in_proj", dims.width, sizes.packed())?;
    let names = [("conv1d", "dt_bias", "A_log", "D"), ("conv1d_b", "dt_bias_b", "A_b_log", "D_b")];
    let ways = if spec.choice("direction", &["causal", "bidirectional"])? == "causal" { 1 } else { 2 };
    let directions = names[..ways].iter().map(|(conv, dt_bias, a_log, skip)| {
        let (channels, heads) = (sizes.convolved(), [sizes.heads]);
        let mut filter = builder.below(conv);
        let (conv, conv_bias) = (
            filter.param("weight", &[channels, 1, taps], Init::torch(taps))?,
            filter.param("bias", &[channels], Init::torch(taps))?,
        );
        Ok(Direction {
            conv,
            conv_bias,
            dt_bias: builder.param(dt_bias, &heads, Init::InverseSoftplus(1e-3, 1e-1))?,
            a_log: builder.param(a_log, &heads, Init::LogOfUniform(1.0, 16.0))?,
            skip: builder.param(skip, &heads, Init::Ones)?,
        })
    });
    let directions = directions.collect::<Result<_>>()?;
    let norm = builder.below("norm").param("weight", &[inner], Init::Ones)?;
    let out_proj = builder.linear_without_bias("out_proj", inner, dims.width)?;
    Ok(Box::new(Mamba2 { sizes, in_proj, directions, norm, out_proj }))
}

impl Operator for Mamba2 {
    fn spec(&self) -> Spec {
        let Sizes { expand, head_width, state, taps, .. } = self.sizes;
        Spec::new(KIND.name)
            .with("state", state as f64)
            .with("taps", taps as f64)
            .with("expand", expand as f64)
            .with("head_width", head_width as f64)
            .with("direction", if self.directions.len() == 1 { "causal" } else { "bidirectional" })
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        let Sizes { inner, head_width, state, taps, .. } = self.sizes;
        let p = self.in_proj.forward(g, params, x, act::NONE)?;
        let mut mixed: Option<Var> = None;
        for (direction, reverse) in self.directions.iter().zip([false, true]) {
            let filter = g.reshape(&g.param(params, direction.conv), &[self.sizes.convolved(), taps])?;
            let settings = contracts::conv_silu::Params { offset: inner, reverse };
            let xbc = g.conv_silu(&p, &filter, &g.param(params, direction.conv_bias), settings)?;
            let [dt_bias, a_log, skip] =
                [direction.dt_bias, direction.a_log, direction.skip].map(|id| g.param(params, id));
            let settings = contracts::mamba2::Params { dt_offset: inner + self.sizes.convolved(), reverse };
            let scanned = g.mamba2(&xbc, &p, &dt_bias, &a_log, &skip, mixed.as_ref(), head_width, state, settings)?;
            mixed = Some(scanned);
        }
        let mixed = mixed.ok_or_else(|| Error::failure("mamba2", "no direction"))?;
        let settings = contracts::rms_norm::Params { gate_offset: 0, eps: EPS };
        let y = g.rms_norm(&mixed, Some(&p), &g.param(params, self.norm), settings)?;
        self.out_proj.project(g, params, &y, epilogue)
    }

    fn flops(&self, dims: BlockDims) -> SiteFlops {
        let (n, d, s) = (dims.tokens() as f64, dims.width as f64, &self.sizes);
        let (inner, ways) = (s.inner as f64, self.directions.len() as f64);
        // As published, a scan costs 2·N·(E·D)·state; the convolution counts to the projections, as those of Hyena do.
        let convolutions = ways * 2.0 * n * (s.taps * s.convolved()) as f64;
        SiteFlops {
            operator: ways * 2.0 * n * inner * s.state as f64,
            projections: 2.0 * n * d * (s.packed() as f64 + inner) + convolutions,
        }
    }

    fn told_by(&self, shapes: &Shapes, dims: BlockDims) -> Option<Spec> {
        let inner = *shapes.get("norm.weight")?.first()?;
        let heads = *shapes.get("A_log")?.first()?;
        let [columns, _, taps] = *shapes.get("conv1d.weight")?.as_slice() else { return None };
        let expand = inner as f64 / dims.width as f64;
        Some(
            self.spec()
                .with("state", columns.checked_sub(inner)? as f64 / 2.0)
                .with("taps", taps as f64)
                .with("expand", expand)
                .with("head_width", inner as f64 / heads.max(1) as f64),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::Precision;
    use crate::nn::Scheme;
    use crate::nn::operators;
    use crate::tensor::{Device, Tensor};

    const DIMS: BlockDims = BlockDims { width: 8, heads: 2, grid: [3, 3] };

    fn operator(direction: &str, store: &mut ParamStore) -> Box<dyn Operator> {
        let spec = Spec::new("mamba2").with("state", 4.0).with("head_width", 4.0).with("direction", direction);
        let device = Device::cpu();
        operators::build(&spec, Site::Attn, DIMS, &mut Builder::new(store, &device, 3, Scheme::Torch)).unwrap()
    }

    fn tokens() -> Vec<f32> {
        (0..72).map(|i| ((i * 37 % 19) as f32 - 9.0) / 9.0).collect()
    }

    fn run(operator: &dyn Operator, params: &ParamStore, values: &[f32]) -> Vec<f32> {
        let device = params.iter().next().unwrap().1.value.device();
        let x = Tensor::from_f32(device, &[1, 9, 8], values).unwrap();
        let g = Graph::inference(Precision::F32);
        operator.forward(&g, params, &Var::constant(x), None).unwrap().tensor().to_vec().unwrap()
    }

    /// Rows of eight values, from the last to the first.
    fn reversed(values: &[f32]) -> Vec<f32> {
        values.chunks(8).rev().flatten().copied().collect()
    }

    #[test]
    fn one_way_sees_no_later_token_and_both_ways_see_all() {
        for (direction, sees) in [("causal", false), ("bidirectional", true)] {
            let mut params = ParamStore::default();
            let operator = operator(direction, &mut params);
            let (x, mut later) = (tokens(), tokens());
            later[40..].iter_mut().for_each(|v| *v += 1.0);
            let (before, after) = (run(&*operator, &params, &x), run(&*operator, &params, &later));
            assert_eq!(before[..40] != after[..40], sees, "{direction}");
            assert_ne!(before[40..], after[40..]);
        }
    }

    #[test]
    fn with_equal_directions_reversed_tokens_give_the_reversed_result() {
        let mut params = ParamStore::default();
        let operator = operator("bidirectional", &mut params);
        for (own, other) in [
            ("conv1d_b.weight", "conv1d.weight"),
            ("conv1d_b.bias", "conv1d.bias"),
            ("dt_bias_b", "dt_bias"),
            ("A_b_log", "A_log"),
            ("D_b", "D"),
        ] {
            let value = params.get(params.find(other).unwrap()).value.clone();
            params.set(params.find(own).unwrap(), value).unwrap();
        }
        let straight = run(&*operator, &params, &tokens());
        let turned = reversed(&run(&*operator, &params, &reversed(&tokens())));
        let error = straight.iter().zip(&turned).fold(0.0f32, |e, (a, b)| e.max((a - b).abs()));
        assert!(error < 1e-6, "{error}");
    }

    #[test]
    fn the_second_direction_costs_a_scan_and_no_projection() {
        let [one, both] = ["causal", "bidirectional"].map(|d| operator(d, &mut ParamStore::default()).flops(DIMS));
        assert_eq!(both.operator, 2.0 * one.operator);
        assert_eq!(both.projections - one.projections, 2.0 * 9.0 * 4.0 * 24.0);
    }

    #[test]
    fn a_head_width_that_does_not_divide_is_refused() {
        let (mut params, device) = (ParamStore::default(), Device::cpu());
        let mut builder = Builder::new(&mut params, &device, 0, Scheme::Torch);
        let spec = Spec::new("mamba2").with("head_width", 5.0);
        let error = operators::build(&spec, Site::Attn, DIMS, &mut builder).unwrap_err().to_string();
        assert!(error.contains("mamba2: head_width") && error.contains("a divisor of 16"), "{error}");
    }
}
