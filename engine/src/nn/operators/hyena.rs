//! Hyena operators with short filters: two gates around depthwise convolutions of the tokens, in raster order
//! (arXiv 2506.05340, table 3) or on their grid.
//!
//! One operator in three forms, which differ by the filters they have; the published ones run causally with four taps.

use super::{BlockDims, Kind, Operator, Shapes, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamId, ParamStore, Precision, Var};
use crate::error::{Error, Result};
use crate::nn::{Builder, Epilogue, Init, Linear};
use crate::ops::act;
use crate::ops::contracts::{gated_conv, gated_conv_2d, gemm_gated_conv};

const LINE_OPTIONS: &[(&str, &str)] = &[("taps", "4"), ("direction", "causal")];

pub(super) const SE: Kind = Kind {
    name: "hyena_se",
    site: Site::Attn,
    summary: "q·conv(k·v) after a short depthwise convolution of q, k and v",
    options: LINE_OPTIONS,
    build: |spec, dims, builder| line(spec, ["hyena_se", "se"], dims, builder),
};

pub(super) const X: Kind = Kind {
    name: "hyena_x",
    site: Site::Attn,
    summary: "q·(k·v) after a short depthwise convolution of q, k and v",
    options: LINE_OPTIONS,
    build: |spec, dims, builder| line(spec, ["hyena_x", "x"], dims, builder),
};

pub(super) const Y: Kind = Kind {
    name: "hyena_y",
    site: Site::Attn,
    summary: "q·conv(k·v) without a convolution of q, k and v",
    options: LINE_OPTIONS,
    build: |spec, dims, builder| line(spec, ["hyena_y", "y"], dims, builder),
};

pub(super) const GRID: Kind = Kind {
    name: "hyena_2d",
    site: Site::Attn,
    summary: "Hyena-X, -Y or -SE with centred convolutions on the grid of tokens",
    options: &[("variant", "x"), ("taps", "3")],
    build: grid,
};

/// Words of the option `direction`, the published one first.
pub(super) const DIRECTIONS: &[&str] = &["causal", "centred", "bidirectional"];

/// Taps before the current token, and channels that run against token order: half of them where it is bidirectional,
/// so that it costs what a causal operator costs.
pub(super) fn lead_and_reversed(direction: &str, taps: usize, channels: usize) -> (usize, usize) {
    match direction {
        "centred" => ((taps - 1) / 2, 0),
        "bidirectional" => (taps - 1, channels / 2),
        _ => (taps - 1, 0),
    }
}

/// Own names and those of attention, for the operators with the projections of attention.
pub(super) const PROJECTIONS: &[(&str, &str)] = &[
    ("in_proj.weight", "qkv.weight"),
    ("in_proj.bias", "qkv.bias"),
    ("out_proj.weight", "proj.weight"),
    ("out_proj.bias", "proj.bias"),
];

/// Along what the filters run.
#[derive(Clone, Copy, Debug)]
enum Axis {
    /// Raster order.
    Line { direction: &'static str },
    /// Rows and columns of the grid of tokens.
    Grid { variant: &'static str, grid: [usize; 2] },
}

/// A depthwise filter: weight and bias.
type Filter = [ParamId; 2];

/// `y = out_proj(q·inner(k·v))`, `(q, k, v) = short(in_proj(x))`; an absent filter is the identity.
#[derive(Debug)]
struct Hyena {
    kind: &'static str,
    axis: Axis,
    taps: usize,
    in_proj: Linear,
    out_proj: Linear,
    short: Option<Filter>,
    inner: Option<Filter>,
}

fn line(
    spec: &Spec,
    [kind, variant]: [&'static str; 2],
    dims: BlockDims,
    builder: &mut Builder<'_>,
) -> Result<Box<dyn Operator>> {
    let (taps, direction) = (spec.whole("taps", 4)?, spec.choice("direction", DIRECTIONS)?);
    let (lead, _) = lead_and_reversed(direction, taps, dims.width);
    hyena(kind, variant, Axis::Line { direction }, &[taps], lead, dims, builder)
}

fn grid(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let (taps, variant) = (spec.whole("taps", 3)?, spec.choice("variant", &["x", "y", "se"])?);
    if taps.is_multiple_of(2) {
        return Err(Error::usage("hyena_2d: taps", "a window with no middle").is(taps).must("an odd number"));
    }
    let axis = Axis::Grid { variant, grid: dims.grid };
    hyena("hyena_2d", variant, axis, &[taps, taps], taps * taps / 2, dims, builder)
}

/// The operator with filters of the given sides; tap `middle` of the inner one is on the current token.
fn hyena(
    kind: &'static str,
    variant: &str,
    axis: Axis,
    sides: &[usize],
    middle: usize,
    dims: BlockDims,
    builder: &mut Builder<'_>,
) -> Result<Box<dyn Operator>> {
    let (d, window) = (dims.width, sides.iter().product::<usize>());
    let shape = |channels: usize| [&[channels, 1], sides].concat();
    let in_proj = builder.linear("in_proj", d, 3 * d)?;
    let short = match variant {
        "y" => None,
        _ => {
            let mut short = builder.below("short_filter");
            // A depthwise filter sees one channel, so its fan-in is the number of taps.
            let weight = short.param("weight", &shape(3 * d), Init::torch(window))?;
            Some([weight, short.param("bias", &[3 * d], Init::torch(window))?])
        }
    };
    let inner = match variant {
        "x" => None,
        _ => {
            let mut inner = builder.below("inner_filter");
            // Published: the filter between the gates starts as the identity.
            let weight = inner.param("weight", &shape(d), Init::Tap { of: window, at: middle })?;
            Some([weight, inner.param("bias", &[d], Init::Zeros)?])
        }
    };
    let out_proj = builder.linear("out_proj", d, d)?;
    Ok(Box::new(Hyena { kind, axis, taps: sides[0], in_proj, out_proj, short, inner }))
}

impl Hyena {
    /// Taps of a filter.
    fn window(&self) -> usize {
        if let Axis::Grid { .. } = self.axis { self.taps * self.taps } else { self.taps }
    }

    /// Weight and bias of a filter in the shapes of the contracts, whose weights have `sides` after the channels.
    fn filter(
        g: &Graph<'_>,
        params: &ParamStore,
        filter: Option<Filter>,
        channels: &[usize],
        sides: &[usize],
    ) -> Result<[Option<Var>; 2]> {
        let Some([weight, bias]) = filter else { return Ok([None, None]) };
        // At most three axes of each kind; inference allocates nothing.
        let (mut shape, rank) = ([0; 6], channels.len() + sides.len());
        shape.iter_mut().zip(channels.iter().chain(sides)).for_each(|(axis, size)| *axis = *size);
        let weight = g.reshape(&g.param(params, weight), &shape[..rank])?;
        Ok([Some(weight), Some(g.reshape(&g.param(params, bias), channels)?)])
    }

    /// Projection, convolution and gates as one operator, which keeps p out of memory where nothing is recorded: for
    /// Hyena-X on a line, unless an adapter adds to the projection.
    fn projected(&self, g: &Graph<'_>, params: &ParamStore, x: &Var) -> Result<Option<Var>> {
        let (Axis::Line { direction }, Some(_), None) = (self.axis, self.short, self.inner) else { return Ok(None) };
        if params.adapter(self.in_proj.weight).is_some() {
            return Ok(None);
        }
        let d = x.dim(2);
        let [Some(short), Some(short_bias)] = Self::filter(g, params, self.short, &[3, d], &[self.taps])? else {
            return Ok(None);
        };
        let weight = g.param(params, self.in_proj.weight);
        let bias = self.in_proj.bias.map(|id| g.param(params, id));
        let (lead, reversed) = lead_and_reversed(direction, self.taps, d);
        let settings = gemm_gated_conv::Params { lead, reversed, bf16: g.precision() == Precision::Bf16 };
        g.gemm_gated_conv(x, &weight, bias.as_ref(), &short, &short_bias, settings).map(Some)
    }
}

impl Operator for Hyena {
    fn spec(&self) -> Spec {
        let spec = Spec::new(self.kind).with("taps", self.taps as f64);
        match self.axis {
            Axis::Line { direction } => spec.with("direction", direction),
            Axis::Grid { variant, .. } => spec.with("variant", variant),
        }
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        let (b, n, d) = (x.dim(0), x.dim(1), x.dim(2));
        if let Some(mixed) = self.projected(g, params, x)? {
            return self.out_proj.project(g, params, &mixed, epilogue);
        }
        let p = self.in_proj.forward(g, params, x, act::NONE)?;
        let sides: &[usize] = if let Axis::Grid { .. } = self.axis { &[self.taps; 2] } else { &[self.taps] };
        let [short, short_bias] = Self::filter(g, params, self.short, &[3, d], sides)?;
        let [inner, inner_bias] = Self::filter(g, params, self.inner, &[d], sides)?;
        let filters = [short.as_ref(), short_bias.as_ref(), inner.as_ref(), inner_bias.as_ref()];
        let [short, short_bias, inner, inner_bias] = filters;
        let mixed = match self.axis {
            Axis::Line { direction } => {
                let (lead, reversed) = lead_and_reversed(direction, self.taps, d);
                let p = g.reshape(&p, &[b, n, 3, d])?;
                g.gated_conv(&p, short, short_bias, inner, inner_bias, gated_conv::Params { lead, reversed })?
            }
            Axis::Grid { grid: [rows, columns], .. } => {
                let p = g.reshape(&p, &[b, rows, columns, 3, d])?;
                let mixed = g.gated_conv_2d(&p, short, short_bias, inner, inner_bias, gated_conv_2d::Params {})?;
                g.reshape(&mixed, &[b, n, d])?
            }
        };
        self.out_proj.project(g, params, &mixed, epilogue)
    }

    fn flops(&self, dims: BlockDims) -> SiteFlops {
        let (n, d, taps) = (dims.tokens() as f64, dims.width as f64, self.window() as f64);
        // As published: the filter of q, k and v belongs to the projections.
        let short = if self.short.is_some() { 6.0 * taps * n * d } else { 0.0 };
        let inner = if self.inner.is_some() { 2.0 * taps * n * d } else { 0.0 };
        SiteFlops { operator: 2.0 * n * d + inner, projections: 8.0 * n * d * d + short }
    }

    fn teacher_names(&self) -> &'static [(&'static str, &'static str)] {
        PROJECTIONS
    }

    fn told_by(&self, shapes: &Shapes, _dims: BlockDims) -> Option<Spec> {
        let filter = shapes.get("short_filter.weight").or_else(|| shapes.get("inner_filter.weight"))?;
        Some(self.spec().with("taps", *filter.last()? as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Scheme, operators};
    use crate::tensor::{Device, Tensor};

    const DIMS: BlockDims = BlockDims { width: 6, heads: 2, grid: [3, 4] };

    fn built(spec: &Spec) -> Result<(Box<dyn Operator>, ParamStore)> {
        let (mut params, device) = (ParamStore::default(), Device::cpu());
        let mut builder = Builder::new(&mut params, &device, 1, Scheme::Torch);
        let operator = operators::build(spec, Site::Attn, DIMS, &mut builder)?;
        Ok((operator, params))
    }

    fn output(spec: &Spec, x: &[f32]) -> Vec<f32> {
        let (operator, params) = built(spec).unwrap();
        let device = params.iter().next().unwrap().1.value.device();
        let x = Tensor::from_f32(device, &[1, 12, 6], x).unwrap();
        let g = Graph::inference(crate::autograd::Precision::F32);
        operator.forward(&g, &params, &Var::constant(x), None).unwrap().tensor().to_vec().unwrap()
    }

    /// Tokens whose output changes when token 5, in row 1 and column 1, does.
    fn reached(spec: &Spec) -> Vec<usize> {
        let x: Vec<f32> = (0..72).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut moved = x.clone();
        moved[30..36].iter_mut().for_each(|v| *v += 1.0);
        let (before, after) = (output(spec, &x), output(spec, &moved));
        (0..12).filter(|t| before[t * 6..][..6] != after[t * 6..][..6]).collect()
    }

    #[test]
    fn each_form_reaches_what_its_filters_reach() {
        let line = |kind: &str, direction: &str| Spec::new(kind).with("taps", 3.0).with("direction", direction);
        assert_eq!(reached(&line("hyena_x", "causal")), [5, 6, 7]);
        assert_eq!(reached(&line("hyena_x", "centred")), [4, 5, 6]);
        assert_eq!(reached(&line("hyena_x", "bidirectional")), [3, 4, 5, 6, 7]);
        assert_eq!(reached(&Spec::new("hyena_2d")), [0, 1, 2, 4, 5, 6, 8, 9, 10]);
    }

    #[test]
    fn inner_filters_start_as_the_identity() {
        // Then the middle convolution passes k·v on: Y reaches its own token alone, whatever its direction.
        for direction in DIRECTIONS {
            assert_eq!(reached(&Spec::new("hyena_y").with("direction", *direction)), [5], "{direction}");
        }
        assert_eq!(reached(&Spec::new("hyena_2d").with("variant", "y")), [5]);
        let (_, params) = built(&Spec::new("hyena_se")).unwrap();
        let inner = params.get(params.find("inner_filter.weight").unwrap()).value.to_vec().unwrap();
        assert_eq!(inner, [0.0, 0.0, 0.0, 1.0].repeat(6));
    }

    #[test]
    fn a_specification_gives_the_same_operator_again() {
        for kind in ["hyena_se", "hyena_x", "hyena_y", "hyena_2d"] {
            let (operator, params) = built(&Spec::new(kind)).unwrap();
            let (again, same) = built(&operator.spec()).unwrap();
            assert_eq!((again.spec(), same.elements()), (operator.spec(), params.elements()), "{kind}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let message = |spec: Spec| built(&spec).unwrap_err().to_string();
        let wrong = message(Spec::new("hyena_x").with("direction", "both"));
        assert!(wrong.contains("direction") && wrong.contains("causal, centred, bidirectional"), "{wrong}");
        assert!(message(Spec::new("hyena_2d").with("taps", 4.0)).contains("odd"));
    }
}
