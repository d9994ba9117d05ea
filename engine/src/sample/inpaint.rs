//! Inpainting with a model that never learned it (arXiv 2201.09865): at every noise level the known pixels are replaced
//! by the given ones, noised to that level, and the model fills the rest.
//!
//! With more than one round per step, the image goes back up one noise level and is denoised again, so that what was
//! filled in has time to agree with what is known. The result holds the known pixels exactly.

use super::pipeline::draw;
use super::solver::Plan;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Random streams of the noise of rounds, kinds and steps.
const STREAMS: u64 = 16 << 40;

/// What is known of the images of a request.
#[derive(Clone, Debug)]
pub struct Known {
    /// `[n, C, S, S]` images in the model's range; any finite value where nothing is known.
    pub images: Tensor,
    /// `[n, C, S, S]`: not 0 where the image is known.
    pub mask: Tensor,
    /// Rounds per step, at least 1.
    pub rounds: usize,
}

/// What fresh noise is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// The sampler's own, in a repeated round.
    Solver,
    /// Noising the known pixels.
    Known,
    /// Going back up a level.
    Back,
}

/// Stream of the noise for a purpose in a round of a step.
pub(super) fn stream(step: usize, round: usize, purpose: Purpose) -> u64 {
    STREAMS + ((round as u64) << 24) + 3 * step as u64 + purpose as u64
}

/// Signal and noise of the latents that step `index` starts from; 1 and 0 after the last one.
pub(super) fn level(plan: &Plan, index: usize) -> (f32, f32) {
    plan.steps.get(index).map_or((1.0, 0.0), |s| ((1.0 / s.coefs.inv_alpha) as f32, s.coefs.sigma as f32))
}

impl Known {
    /// Rounds of step `index`: after the last one nothing is left to agree on.
    pub(super) fn rounds(&self, plan: &Plan, index: usize) -> usize {
        if index + 1 == plan.steps.len() { 1 } else { self.rounds }
    }

    /// Puts the known pixels of images `first..` into `x`, noised to a level.
    pub(super) fn impose(
        &self,
        first: usize,
        x: &mut Tensor,
        noise: &Tensor,
        (signal, sigma): (f32, f32),
    ) -> Result<()> {
        let start = first * (self.images.len() / self.images.dim(0));
        let (images, mask, noise) = (self.images.values()?, self.mask.values()?, noise.values()?);
        let known = images[start..].iter().zip(&mask[start..]);
        x.edit(|x| {
            for ((x, noise), (image, mask)) in x.iter_mut().zip(noise.iter()).zip(known) {
                if *mask != 0.0 {
                    *x = signal * image + sigma * noise;
                }
            }
        })
    }

    /// After `round` of step `index`: puts the known pixels of images `first..` back into `x` at the level that the step
    /// reached; and `again`: goes back up to the level that it started from. `noise` is written over.
    pub(super) fn hold(
        &self,
        plan: &Plan,
        (index, round, again): (usize, usize, bool),
        (first, seed): (usize, u64),
        x: &mut Tensor,
        noise: &mut Tensor,
    ) -> Result<()> {
        let reached = level(plan, index + 1);
        draw(noise, seed, stream(index, round, Purpose::Known))?;
        self.impose(first, x, noise, reached)?;
        if again {
            draw(noise, seed, stream(index, round, Purpose::Back))?;
            let (noise, start) = (noise.values()?, level(plan, index).0);
            x.edit(|x| go_back(x, &noise, reached.0, start))?;
        }
        Ok(())
    }

    /// Error unless the tensors fit `n` images of `shape`, rounds are possible and everything is finite.
    pub(super) fn check(&self, shape: [usize; 4], plan: &Plan) -> Result<()> {
        for (name, tensor) in [("image", &self.images), ("mask", &self.mask)] {
            if tensor.shape().dims() != shape {
                return Err(Error::usage(format!("inpainting: {name}"), "wrong shape")
                    .is(tensor.shape())
                    .must(format!("{shape:?}")));
            }
            if let Some(value) = tensor.values()?.iter().copied().find(|v| !v.is_finite()) {
                return Err(Error::usage(format!("inpainting: {name}"), "value is not finite")
                    .is(value)
                    .must("finite"));
            }
        }
        if self.rounds == 0 || self.rounds > 1 << 15 {
            return Err(Error::usage("--rounds", "out of range").is(self.rounds).must(format!("1 to {}", 1 << 15)));
        }
        if self.rounds > 1 && plan.needs_x0() {
            return Err(Error::usage("--rounds", "this sampler looks back over several steps")
                .is(self.rounds)
                .must("1, or with --sampler ddim or ddpm"));
        }
        Ok(())
    }
}

/// Takes `x` from the signal of one level back up to that of a noisier one.
fn go_back(x: &mut [f32], noise: &[f32], from: f32, to: f32) {
    let keep = to / from;
    let add = (1.0 - keep * keep).max(0.0).sqrt();
    x.iter_mut().zip(noise).for_each(|(x, noise)| *x = keep * *x + add * noise);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Device;
    use std::collections::BTreeSet;

    #[test]
    fn known_pixels_are_noised_to_the_level() {
        let t = |values: &[f32]| Tensor::from_f32(&Device::cpu(), &[2, 1, 1, 2], values).unwrap();
        let known = Known { images: t(&[1.0, 2.0, 3.0, 4.0]), mask: t(&[1.0, 0.0, 0.0, 1.0]), rounds: 1 };
        let flat = |values: &[f32]| Tensor::from_f32(&Device::cpu(), &[values.len()], values).unwrap();
        let mut x = flat(&[9.0; 4]);
        known.impose(0, &mut x, &flat(&[10.0; 4]), (0.5, 0.25)).unwrap();
        assert_eq!(x.f32s().unwrap(), [3.0, 9.0, 9.0, 4.5]);
        // A batch that begins with the second image.
        let mut x = flat(&[9.0; 2]);
        known.impose(1, &mut x, &flat(&[10.0; 2]), (1.0, 0.0)).unwrap();
        assert_eq!(x.f32s().unwrap(), [9.0, 4.0]);
    }

    #[test]
    fn going_back_keeps_the_variance() {
        // From signal 0.8 (noise 0.6) to 0.4: keep 1/2, add √¾; variance ¼·0.36 + ¾ = 0.84 = 1 − 0.4².
        let mut x = [2.0, 0.0];
        go_back(&mut x, &[0.0, 1.0], 0.8, 0.4);
        assert!((x[0] - 1.0).abs() < 1e-6 && (x[1] - 0.75f32.sqrt()).abs() < 1e-6, "{x:?}");
    }

    #[test]
    fn streams_never_meet() {
        let mut seen = BTreeSet::new();
        for (step, round) in (0..1000).flat_map(|s| [0, 1, 9].map(|r| (s, r))) {
            for purpose in [Purpose::Solver, Purpose::Known, Purpose::Back] {
                assert!(seen.insert(stream(step, round, purpose)));
            }
        }
        assert!(seen.first() >= Some(&STREAMS));
    }
}
