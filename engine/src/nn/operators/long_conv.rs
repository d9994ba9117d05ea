//! The long Hyena operator (arXiv 2302.10866): two gates around a filter as long as the sequence, which a small
//! network of sines writes as a function of the lag.
//!
//! Filters are functions of lag over sequence length, so the operator runs at any number of tokens.

use super::hyena::{DIRECTIONS, PROJECTIONS, lead_and_reversed};
use super::{BlockDims, Kind, Operator, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamId, ParamStore, Var};
use crate::error::Result;
use crate::nn::{Builder, Epilogue, Init, Linear};
use crate::ops::act;
use crate::ops::contracts::{filter_window, gemm, long_conv};
use crate::tensor::{Device, Tensor};

pub(super) const KIND: Kind = Kind {
    name: "long_conv",
    site: Site::Attn,
    summary: "q·longconv(k·v) with implicit filters as long as the sequence, after short filters of q, k and v",
    options: &[("taps", "4"), ("direction", "causal"), ("order", "32"), ("bands", "8")],
    build,
};

/// Frequency of the sines: their arguments start ten times as large as a linear layer's, as in the original.
const FREQUENCY: f32 = 10.0;
/// What is left of the slowest and of the fastest decaying channels is a hundredth at these parts of the sequence.
const REACH: [f32; 2] = [1.5, 0.3];

/// A layer of the filter network, `[out, in, 1]` and `[out]`: the shape of a convolution weight, which is never stored
/// in bf16, because the network tells neighbouring lags apart.
#[derive(Debug)]
struct Layer {
    weight: ParamId,
    bias: Option<ParamId>,
    sizes: [usize; 2],
}

/// `y = out_proj(q·(filter ⊛ (k·v) + skip·(k·v)))`, `(q, k, v) = short(in_proj(x))`.
#[derive(Debug)]
struct LongConv {
    taps: usize,
    direction: &'static str,
    bands: usize,
    in_proj: Linear,
    out_proj: Linear,
    short: [ParamId; 2],
    layers: [Layer; 3],
    skip: ParamId,
    /// Features of the lags at the model's number of tokens.
    features: Tensor,
}

fn build(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let (taps, direction) = (spec.whole("taps", 4)?, spec.choice("direction", DIRECTIONS)?);
    let (order, bands) = (spec.whole("order", 32)?, spec.whole("bands", 8)?);
    let d = dims.width;
    let in_proj = builder.linear("in_proj", d, 3 * d)?;
    let mut short = builder.below("short_filter");
    let short = [
        short.param("weight", &[3 * d, 1, taps], Init::torch(taps))?,
        short.param("bias", &[3 * d], Init::torch(taps))?,
    ];
    let mut network = builder.below("filter");
    let mut layer = |name: &str, [inputs, outputs]: [usize; 2], bound: f32, bias: bool| {
        let (mut layer, init) = (network.below(name), Init::Uniform(bound / (inputs as f32).sqrt()));
        let weight = layer.param("weight", &[outputs, inputs, 1], init)?;
        let bias = if bias { Some(layer.param("bias", &[outputs], init)?) } else { None };
        Ok(Layer { weight, bias, sizes: [outputs, inputs] })
    };
    let layers = [
        layer("fc1", [1 + 2 * bands, order], FREQUENCY, true)?,
        layer("fc2", [order, order], FREQUENCY, true)?,
        layer("fc3", [order, d], 1.0, false)?,
    ];
    // With a skip of one the operator starts as Hyena-X and what the filters add to it.
    let skip = network.param("skip", &[d], Init::Ones)?;
    let out_proj = builder.linear("out_proj", d, d)?;
    let features = features(builder.device(), dims.tokens(), lags(direction, dims.tokens()), bands)?;
    Ok(Box::new(LongConv { taps, direction, bands, in_proj, out_proj, short, layers, skip, features }))
}

/// Lags of a filter over `n` tokens, and the place of lag zero.
fn lags(direction: &str, n: usize) -> [usize; 2] {
    if direction == "centred" { [2 * n - 1, n - 1] } else { [n, 0] }
}

/// Features of every lag, `[1, L, 1 + 2·bands]`: its part of the sequence, and cosine and sine of 1, 2, … turns of it.
fn features(device: &Device, n: usize, [lags, centre]: [usize; 2], bands: usize) -> Result<Tensor> {
    let mut values = Vec::with_capacity(lags * (1 + 2 * bands));
    for lag in 0..lags {
        let part = (lag as f64 - centre as f64) / n as f64;
        let turns = (1..=bands).map(|band| (std::f64::consts::TAU * band as f64 * part).sin_cos());
        values.push(part as f32);
        values.extend(turns.flat_map(|(sin, cos)| [cos as f32, sin as f32]));
    }
    Tensor::from_f32(device, &[1, lags, 1 + 2 * bands], &values)
}

impl LongConv {
    /// The filters `[D, L]` for `n` tokens.
    fn filters(&self, g: &Graph<'_>, params: &ParamStore, n: usize, d: usize) -> Result<Var> {
        let [length, centre] = lags(self.direction, n);
        let known = self.features.dim(1) == length;
        let mut x = Var::constant(match known {
            true => self.features.clone(),
            false => features(self.features.device(), n, [length, centre], self.bands)?,
        });
        // In f32 whatever the model runs in: the filters are few and their phases large.
        g.in_f32(|| {
            for (i, layer) in self.layers.iter().enumerate() {
                let weight = g.reshape(&g.param(params, layer.weight), &layer.sizes)?;
                let bias = layer.bias.map(|bias| g.param(params, bias));
                let act = if i + 1 < self.layers.len() { act::SINE } else { act::NONE };
                let settings = gemm::Params { act, gate_row: 0, bf16: false };
                x = g.gemm(&x, &weight, bias.as_ref(), None, None, None, settings)?;
            }
            let x = g.reshape(&x, &[length, d])?;
            let rate = |reach: f32| 100f32.ln() / (reach * n as f32);
            // Either direction has channels of every decay.
            let (_, reversed) = lead_and_reversed(self.direction, self.taps, d);
            let (slow, fast) = (rate(REACH[0]), rate(REACH[1]));
            g.filter_window(&x, filter_window::Params { centre, period: d - reversed, slow, fast })
        })
    }
}

impl Operator for LongConv {
    fn spec(&self) -> Spec {
        let spec = Spec::new(KIND.name).with("taps", self.taps as f64).with("direction", self.direction);
        spec.with("order", self.layers[0].sizes[0] as f64).with("bands", self.bands as f64)
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        let (b, n, d) = (x.dim(0), x.dim(1), x.dim(2));
        let filters = self.filters(g, params, n, d)?;
        let p = g.reshape(&self.in_proj.forward(g, params, x, act::NONE)?, &[b, n, 3, d])?;
        let short = g.reshape(&g.param(params, self.short[0]), &[3, d, self.taps])?;
        let bias = g.reshape(&g.param(params, self.short[1]), &[3, d])?;
        let (lead, reversed) = lead_and_reversed(self.direction, self.taps, d);
        let [_, centre] = lags(self.direction, n);
        let settings = long_conv::Params { lead, centre, reversed };
        let mixed = g.long_conv(&p, Some(&short), Some(&bias), &filters, &g.param(params, self.skip), settings)?;
        self.out_proj.project(g, params, &mixed, epilogue)
    }

    fn flops(&self, dims: BlockDims) -> SiteFlops {
        let (n, d) = (dims.tokens() as f64, dims.width as f64);
        let [length, _] = lags(self.direction, dims.tokens());
        // Per channel a real transform of 2N places there and one back, 5/2·M·log₂ M each, and M/2 complex products.
        let circle = 2.0 * n;
        let long = d * (5.0 * circle * circle.log2() + 3.0 * circle);
        // The filters of a forward pass are counted whole, though a batch shares them.
        let network: usize = self.layers.iter().map(|layer| 2 * length * layer.sizes[0] * layer.sizes[1]).sum();
        let projections = 8.0 * n * d * d + 6.0 * self.taps as f64 * n * d;
        SiteFlops { operator: 4.0 * n * d + long + network as f64, projections }
    }

    fn teacher_names(&self) -> &'static [(&'static str, &'static str)] {
        PROJECTIONS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::Precision;
    use crate::nn::{Scheme, operators};

    const DIMS: BlockDims = BlockDims { width: 6, heads: 2, grid: [3, 4] };

    fn built(direction: &str) -> (Box<dyn Operator>, ParamStore) {
        let (mut params, device) = (ParamStore::default(), Device::cpu());
        let mut builder = Builder::new(&mut params, &device, 1, Scheme::Torch);
        let spec = Spec::new("long_conv").with("direction", direction);
        (operators::build(&spec, Site::Attn, DIMS, &mut builder).unwrap(), params)
    }

    fn input(params: &ParamStore, n: usize) -> Tensor {
        let x: Vec<f32> = (0..n * 6).map(|i| (i as f32 * 0.7).sin()).collect();
        Tensor::from_f32(params.iter().next().unwrap().1.value.device(), &[1, n, 6], &x).unwrap()
    }

    /// Tokens whose output changes when token 5 does.
    fn reached(direction: &str) -> Vec<usize> {
        let (operator, params) = built(direction);
        let run = |x: Tensor| {
            let g = Graph::inference(Precision::F32);
            operator.forward(&g, &params, &Var::constant(x), None).unwrap().tensor().to_vec().unwrap()
        };
        let mut moved = input(&params, 12);
        moved.f32s_mut().unwrap()[30..36].iter_mut().for_each(|v| *v += 1.0);
        let (before, after) = (run(input(&params, 12)), run(moved));
        (0..12).filter(|t| before[t * 6..][..6] != after[t * 6..][..6]).collect()
    }

    #[test]
    fn every_direction_reaches_its_part_of_the_sequence() {
        assert_eq!(reached("causal"), (5..12).collect::<Vec<_>>());
        assert_eq!(reached("centred"), (0..12).collect::<Vec<_>>());
        assert_eq!(reached("bidirectional"), (0..12).collect::<Vec<_>>());
    }

    #[test]
    fn runs_at_another_number_of_tokens() {
        let (operator, params) = built("centred");
        let g = Graph::inference(Precision::F32);
        let y = operator.forward(&g, &params, &Var::constant(input(&params, 20)), None).unwrap();
        assert_eq!(y.tensor().shape().dims(), [1, 20, 6]);
    }

    /// The gradient of every parameter is that of the differences, through network, window, filter and gates.
    #[test]
    fn gradients_are_those_of_the_differences() {
        let (operator, mut params) = built("bidirectional");
        let cotangent: Vec<f32> = (0..72).map(|i| (i as f32 * 1.3).cos()).collect();
        let loss = |params: &ParamStore| {
            let g = Graph::inference(Precision::F32);
            let y = operator.forward(&g, params, &Var::constant(input(params, 12)), None).unwrap();
            y.tensor().to_vec().unwrap().iter().zip(&cotangent).map(|(y, c)| f64::from(y * c)).sum::<f64>()
        };
        let g = Graph::training(Precision::F32);
        let y = operator.forward(&g, &params, &Var::constant(input(&params, 12)), None).unwrap();
        let cotangent_tensor = Tensor::from_f32(y.tensor().device(), &[1, 12, 6], &cotangent).unwrap();
        let grads = g.backward_from(&y, cotangent_tensor).unwrap();
        let ids: Vec<ParamId> = params.iter().map(|(id, _)| id).collect();
        for id in ids {
            let (value, grad) = (params.get(id).value.clone(), grads.param(&params, id).unwrap().to_vec().unwrap());
            let mut at = |i: usize, step: f32| {
                let mut moved = value.to_vec().unwrap();
                moved[i] += step;
                let moved = Tensor::from_f32(value.device(), value.shape().dims(), &moved).unwrap();
                params.set(id, moved).unwrap();
                loss(&params)
            };
            let i = grad.len() / 2;
            let difference = (at(i, 1e-2) - at(i, -1e-2)) / 2e-2;
            at(i, 0.0);
            let error = (difference - f64::from(grad[i])).abs();
            assert!(error < 2e-2 * (1.0 + difference.abs()), "{id:?}: {difference} {}", grad[i]);
        }
    }
}
