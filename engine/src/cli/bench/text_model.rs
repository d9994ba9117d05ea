//! What is measured of PixArt-Σ besides plain forward passes: the pair of guidance as sampling runs it, and pictures.

use super::PATIENCE_MODEL;
use super::model::paced;
use crate::autograd::{Graph, Precision, Var};
use crate::backend::Device;
use crate::error::Result;
use crate::models::pixart::{self, Keys, PixArt, Text};
use crate::models::vae::{Vae, VaeConfig};
use crate::sample::text::{self, Request};
use crate::tensor::Tensor;

/// Scale of the latents of the published autoencoder.
const SCALING: f64 = 0.13025;

/// Features `[tokens, C]` of a text.
fn features(model: &PixArt, tokens: usize) -> Result<Tensor> {
    let shape = [tokens, model.config.caption_channels];
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i * 7 % 61) as f32 / 30.0 - 1.0).collect();
    Tensor::from_f32(model.device(), &shape, &values)
}

/// Milliseconds of a forward pass for a prompt of `tokens` and one for a null text of one token, one after the other:
/// the second pays no cross-attention.
pub fn guided_pair(model: &PixArt, precision: Precision, tokens: usize, samples: usize) -> Result<Vec<f64>> {
    let (c, device, g) = (&model.config, model.device().clone(), Graph::inference(precision));
    let keys = |tokens: usize| -> Result<Keys> {
        let found = features(model, tokens)?.reshape(&[1, tokens, c.caption_channels])?;
        let text = Text { constant: tokens == 1, ..Text::new(&g, &Var::constant(found), None)? };
        model.keys(&g, &text)
    };
    let shape = [1, c.in_channels, c.sample_size, c.sample_size];
    let x = Var::constant(Tensor::from_f32(&device, &shape, &vec![0.5; shape.iter().product()])?);
    let t = Tensor::from_f32(&device, &[1], &[500.0])?;
    let halves = [keys(tokens)?, keys(1)?];
    let pass = |half| model.forward(&g, &x, &t, half, None, pixart::Run::default()).map(drop);
    device.time(samples, PATIENCE_MODEL, &mut || halves.iter().try_for_each(pass))
}

/// Milliseconds of `batch` pictures: all steps with guidance, and the published autoencoder's decoder.
pub fn pictures(
    model: &PixArt,
    precision: Precision,
    [tokens, steps, batch]: [usize; 3],
    samples: usize,
) -> Result<Vec<f64>> {
    let device: Device = model.device().clone();
    let texts = |tokens: usize| (0..batch).map(|_| features(model, tokens)).collect::<Result<Vec<_>>>();
    let request = Request::new(texts(tokens)?, texts(1)?, [model.config.sample_size; 2], 0);
    let request = Request { steps, batch, precision, ..request };
    let vae = Vae::new(VaeConfig::released(SCALING), &device, 1)?;
    let mut all = || {
        let latents = text::generate(model, &request, &mut |_, _| Ok(()))?;
        vae.decode(&vae.config.unscale(&latents)?, precision, &mut |_, _| {}).map(drop)
    };
    paced(&device, samples, &mut all)
}
