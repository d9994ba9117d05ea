//! Creation of parameters.
//!
//! Each parameter draws from its own random stream, chosen by its name: the values do not depend on the order of
//! creation, so a site initialised alone equals the same site initialised inside a whole model.

use super::Linear;
use crate::autograd::{ParamId, ParamStore};
use crate::error::Result;
use crate::tensor::{Device, Tensor};
use graft_kernels::rng::Philox;

/// Distribution of a new parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// All this value.
    Constant(f32),
    /// Normal with this standard deviation.
    Normal(f32),
    /// Uniform in (−bound, bound).
    Uniform(f32),
    /// Identity matrices of this many rows, side by side.
    Eye(usize),
    /// Logarithm of a value uniform between these.
    LogOfUniform(f32, f32),
    /// What softplus turns into a value log-uniform between these.
    InverseSoftplus(f32, f32),
    /// Filters of `of` taps each, zero but for a one at tap `at`.
    Tap {
        /// Taps of a filter.
        of: usize,
        /// The tap that is one.
        at: usize,
    },
}

impl Init {
    /// Xavier/Glorot uniform: bound √(6 / (fan_in + fan_out)).
    pub fn xavier(fan_in: usize, fan_out: usize) -> Init {
        Init::Uniform((6.0 / (fan_in + fan_out) as f32).sqrt())
    }

    /// PyTorch's default for weights and biases of linear and convolution layers: bound 1/√fan_in.
    pub fn torch(fan_in: usize) -> Init {
        Init::Uniform(1.0 / (fan_in.max(1) as f32).sqrt())
    }
}

/// How linear layers start when the caller does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// PyTorch's defaults: what a grafted operator starts from.
    Torch,
    /// Xavier-uniform weights and zero biases: what the blocks of a new DiT start from.
    Xavier,
    /// Values unspecified: a model whose weights are about to be read or set.
    Unset,
}

/// Adds parameters to a store under a name prefix.
pub struct Builder<'a> {
    store: &'a mut ParamStore,
    device: &'a Device,
    seed: u64,
    scheme: Scheme,
    prefix: String,
}

impl<'a> Builder<'a> {
    /// A builder for `store`; parameters live on `device` and draw from `seed`.
    pub fn new(store: &'a mut ParamStore, device: &'a Device, seed: u64, scheme: Scheme) -> Self {
        Builder { store, device, seed, scheme, prefix: String::new() }
    }

    /// Where the parameters live.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// The same builder below `name.`: `attn` turns `qkv.weight` into `attn.qkv.weight`.
    pub fn below(&mut self, name: &str) -> Builder<'_> {
        let prefix = format!("{}{name}.", self.prefix);
        Builder { store: self.store, device: self.device, seed: self.seed, scheme: self.scheme, prefix }
    }

    /// A trainable parameter.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn param(&mut self, name: &str, shape: &[usize], init: Init) -> Result<ParamId> {
        let full = format!("{}{name}", self.prefix);
        let mut value = self.device.empty(shape)?;
        if self.scheme != Scheme::Unset && !self.device.is_dry() {
            value.edit(|value| fill(value, init, Philox::new(self.seed, stream_of(&full))))?;
        }
        Ok(self.store.add(full, value, true))
    }

    /// A frozen parameter with given values.
    ///
    /// # Errors
    /// When memory runs out or the shape does not fit.
    pub fn frozen(&mut self, name: &str, shape: &[usize], values: &[f32]) -> Result<ParamId> {
        let value = Tensor::from_f32(self.device, shape, values)?;
        Ok(self.store.add(format!("{}{name}", self.prefix), value, false))
    }

    /// A linear layer `name.weight [out, in]`, `name.bias [out]`, started by the builder's scheme.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn linear(&mut self, name: &str, inputs: usize, outputs: usize) -> Result<Linear> {
        let (weight, bias) = match self.scheme {
            Scheme::Torch => (Init::torch(inputs), Init::torch(inputs)),
            Scheme::Unset => (Init::Zeros, Init::Zeros),
            Scheme::Xavier => (Init::xavier(inputs, outputs), Init::Zeros),
        };
        self.linear_from(name, &[outputs, inputs], weight, bias)
    }

    /// A linear layer without a bias, started as PyTorch starts its own.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn linear_without_bias(&mut self, name: &str, inputs: usize, outputs: usize) -> Result<Linear> {
        Ok(Linear { weight: self.below(name).weight(&[outputs, inputs], Init::torch(inputs))?, bias: None })
    }

    /// The weight of a linear layer; only as a matrix can it carry an adapter.
    fn weight(&mut self, shape: &[usize], init: Init) -> Result<ParamId> {
        let id = self.param("weight", shape, init)?;
        self.store.get_mut(id).linear = shape.len() == 2;
        Ok(id)
    }

    /// A linear layer with a weight of the given shape (outputs first) and stated initialisations.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn linear_from(&mut self, name: &str, shape: &[usize], weight: Init, bias: Init) -> Result<Linear> {
        let mut layer = self.below(name);
        let weight = layer.weight(shape, weight)?;
        Ok(Linear { weight, bias: Some(layer.param("bias", &shape[..1], bias)?) })
    }
}

fn fill(out: &mut [f32], init: Init, mut rng: Philox) {
    match init {
        Init::Zeros => out.fill(0.0),
        Init::Ones => out.fill(1.0),
        Init::Constant(value) => out.fill(value),
        Init::Normal(std) => {
            rng.fill_normal(out);
            out.iter_mut().for_each(|v| *v *= std);
        }
        Init::Eye(rows) => {
            let columns = out.len() / rows.max(1);
            out.iter_mut().enumerate().for_each(|(i, v)| *v = f32::from(u8::from(i % columns % rows == i / columns)));
        }
        Init::Tap { of, at } => out.iter_mut().enumerate().for_each(|(i, v)| *v = f32::from(i % of == at)),
        Init::Uniform(bound) => out.iter_mut().for_each(|v| *v = bound * (2.0 * rng.uniform() - 1.0)),
        Init::LogOfUniform(low, high) => out.iter_mut().for_each(|v| *v = (low + (high - low) * rng.uniform()).ln()),
        Init::InverseSoftplus(low, high) => out.iter_mut().for_each(|v| {
            let value = (low.ln() + (high / low).ln() * rng.uniform()).exp();
            // ln(e^v − 1), without cancellation for small v.
            *v = value + (-(-value).exp_m1()).ln();
        }),
    }
}

/// FNV-1a of the name, in the upper half of the stream space so that it meets no sampler stream.
fn stream_of(name: &str) -> u64 {
    let hash =
        name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3));
    hash | 1 << 63
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_depend_on_name_and_seed_only() {
        let device = Device::cpu();
        let draw = |seed: u64, names: &[&str]| -> Vec<Vec<f32>> {
            let mut store = ParamStore::default();
            let mut builder = Builder::new(&mut store, &device, seed, Scheme::Torch);
            let ids: Vec<ParamId> = names.iter().map(|n| builder.param(n, &[4], Init::Normal(1.0)).unwrap()).collect();
            ids.iter().map(|&id| store.get(id).value.to_vec().unwrap()).collect()
        };
        let (ab, ba, other) = (draw(1, &["a", "b"]), draw(1, &["b", "a"]), draw(2, &["a", "b"]));
        assert_eq!((&ab[0], &ab[1]), (&ba[1], &ba[0]));
        assert_ne!(ab[0], ab[1]);
        assert_ne!(ab[0], other[0]);
    }

    #[test]
    fn step_sizes_and_rates_fill_their_intervals() {
        let draw = |init: Init| {
            let mut values = vec![0.0f32; 20_000];
            fill(&mut values, init, Philox::new(3, 6));
            values.into_iter().map(f64::from).collect::<Vec<f64>>()
        };
        let rates: Vec<f64> = draw(Init::LogOfUniform(1.0, 16.0)).into_iter().map(f64::exp).collect();
        let steps = draw(Init::InverseSoftplus(1e-3, 1e-1)).into_iter().map(|v| v.exp().ln_1p());
        let logs: Vec<f64> = steps.map(|v| v.log10()).collect();
        for (values, low, high) in [(rates, 1.0, 16.0), (logs, -3.0, -1.0)] {
            let (min, max) = values.iter().fold((f64::MAX, f64::MIN), |(l, h), &v| (l.min(v), h.max(v)));
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let near = |found: f64, want: f64| (found - want).abs() < 0.01 * (high - low);
            assert!(near(min, low) && near(max, high) && near(mean, (low + high) / 2.0), "{min} {max} {mean}");
        }
    }

    #[test]
    fn uniform_fills_its_interval() {
        let mut values = vec![0.0f32; 20_000];
        fill(&mut values, Init::xavier(2, 4), Philox::new(3, 5));
        let (low, high) = values.iter().fold((f32::MAX, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
        assert!((-1.0..-0.99).contains(&low) && (0.99..1.0).contains(&high));
    }
}
