//! The diffusion objective: noised images in, a scalar out (arXiv 2102.09672 with DiT's settings).

use super::sites::Draw;
use crate::autograd::{Graph, Var};
use crate::error::{Error, Result};
use crate::models::sites::{SiteConfig, SiteModel};
use crate::ops::{add_noise, contracts, philox};
use crate::sample::schedule::Schedule;
use crate::sample::solver::Prediction;
use crate::sample::vlb::LossCoefs;
use crate::tensor::{Device, Tensor};
use graft_kernels::rng::Philox;

/// Random streams of a training step: one for timesteps and label dropout, one for the noise.
const CHOICE_STREAMS: u64 = 2 << 40;
const NOISE_STREAMS: u64 = 3 << 40;

/// Noised inputs of a step and what the loss compares with.
pub struct Noised<C> {
    /// `[B, C, H, W]` noisy images.
    pub x_t: Tensor,
    /// `[B]` timesteps.
    pub t: Tensor,
    /// Labels or texts, some replaced by the null label or text.
    pub condition: C,
    /// `[B, C, H·W]` clean images.
    x0: Tensor,
    /// `[B, C, H·W]` what is to be predicted: the noise, or what [`Noised::towards`] makes of it.
    noise: Tensor,
    /// `[B, 4]` coefficients of the loss.
    coefs: Tensor,
}

/// Draws timesteps, dropped conditions and noise of a step for clean `images [B, C, H, W]`, all functions of its seed
/// and number; `condition` makes the condition, given which of the images drop theirs.
///
/// # Errors
/// When memory runs out, and those of `condition`.
pub fn noise_batch<C>(
    device: &Device,
    images: &Tensor,
    draw: &Draw<'_>,
    condition: impl FnOnce(&[bool]) -> Result<C>,
) -> Result<Noised<C>> {
    let shape = images.shape();
    let &[b, c, h, w] = shape.dims() else {
        return Err(Error::failure("batch", "wrong rank").is(shape).must("[B, C, H, W]"));
    };
    let &Draw { schedule, dropout, seed, step, .. } = draw;
    let mut choice = Philox::new(seed, CHOICE_STREAMS + step);
    let (mut times, mut dropped, mut weights, mut coefs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..b {
        let t = choice.below(schedule.len() as u32) as usize;
        dropped.push(f64::from(choice.uniform()) < dropout);
        times.push(t as f32);
        let row = LossCoefs::new(schedule, t)?;
        weights.extend(row.noise_row());
        coefs.extend(row.row());
    }
    let noise =
        philox(device, 1, b * c * h * w, contracts::philox::Params { seed, stream: NOISE_STREAMS + step, offset: 0 })?;
    let weights = Tensor::from_f32(device, &[b, 2], &weights)?;
    let flat = [b, c * h * w];
    let x_t = add_noise(&images.reshape(&flat)?, &noise.reshape(&flat)?, &weights, contracts::add_noise::Params {})?;
    Ok(Noised {
        x_t: x_t.into_shape(&[b, c, h, w])?,
        t: Tensor::from_f32(device, &[b], &times)?,
        condition: condition(&dropped)?,
        x0: images.reshape(&[b, c, h * w])?,
        noise: noise.into_shape(&[b, c, h * w])?,
        coefs: Tensor::from_f32(device, &[b, 4], &coefs)?,
    })
}

impl<C> Noised<C> {
    /// The same inputs for a model that predicts something else than noise.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn towards(self, prediction: Prediction, schedule: &Schedule) -> Result<Noised<C>> {
        if prediction == Prediction::Noise {
            return Ok(self);
        }
        let device = self.x_t.device().clone();
        let &[_, c, s] = self.x0.shape().dims() else { unreachable!("made by noise_batch") };
        let (noise, x0, mut coefs) = (self.noise.values()?, self.x0.values()?, self.coefs.to_vec()?);
        let mut target = Vec::with_capacity(noise.len());
        let samples = self.t.to_vec()?.into_iter().zip(coefs.chunks_mut(4));
        for ((t, row), (noise, x0)) in samples.zip(noise.chunks(c * s).zip(x0.chunks(c * s))) {
            let [signal, sigma] = LossCoefs::new(schedule, t as usize)?.noise_row();
            target.extend(noise.iter().zip(x0).map(|(noise, x0)| signal * noise - sigma * x0));
            // A mean of the posterior is off by `gap` for each unit of noise, which is `signal` of velocity.
            row[0] *= signal;
        }
        let noise = Tensor::from_f32(&device, self.noise.shape().dims(), &target)?;
        let coefs = Tensor::from_f32(&device, self.coefs.shape().dims(), &coefs)?;
        Ok(Noised { noise, coefs, ..self })
    }

    /// The diffusion loss of a prediction `[B, out_channels, H, W]`, a scalar on the graph.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn loss(&self, g: &Graph<'_>, prediction: &Var, learn_sigma: bool) -> Result<Var> {
        let &[b, c, s] = self.x0.shape().dims() else { unreachable!("made by noise_batch") };
        let constant = |t: &Tensor| Var::constant(t.clone());
        if learn_sigma {
            let out = g.reshape(prediction, &[b, 2 * c, s])?;
            let settings = contracts::loss_diffusion::Params { vlb_weight: 1.0 };
            g.loss_diffusion(&out, &constant(&self.x0), &constant(&self.noise), &constant(&self.coefs), settings)
        } else {
            let out = g.reshape(prediction, &[b, c, s])?;
            let squared = contracts::loss_regression::Params { kind: 1, delta: 1.0 };
            g.loss_regression(&out, &constant(&self.noise), squared)
        }
    }
}

/// The loss of a model on a noised batch, a scalar on the graph.
///
/// # Errors
/// When a shape does not fit.
pub fn diffusion_loss<'m, M: SiteModel>(
    g: &Graph<'m>,
    model: &'m M,
    noised: &Noised<M::Condition>,
    checkpoint: bool,
) -> Result<Var> {
    let x = Var::constant(noised.x_t.clone());
    let out = model.predict(g, &x, &noised.t, &noised.condition, checkpoint, None)?;
    noised.loss(g, &out, model.config().learns_variance())
}
