//! What a forward pass needs besides the latent and the text: it depends on the timestep alone, so that a trajectory
//! has all of it made before its first step.

use super::{MicroConditions, PixArt};
use crate::autograd::{Graph, Var};
use crate::error::{Error, Result};
use crate::nn::{Rows, Rule};
use crate::ops::{act, contracts};
use crate::tensor::Tensor;

/// Which channels of the prediction are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Outputs {
    /// All that the model has.
    #[default]
    All,
    /// The noise alone, for samplers that read no variance: as many channels as the latent has.
    Noise,
}

/// Timesteps as the blocks and the last layer read them, and the last projection.
#[derive(Clone, Debug)]
pub struct Moments {
    /// `[S, D]` embedded timesteps, before any activation.
    pub(super) time: Var,
    /// `[S, 6·D]` modulation that all blocks share.
    pub(super) modulation: Var,
    /// Weight and bias of the last projection, cut to the channels that are wanted; the model's own where absent.
    pub(super) last: Option<(Var, Var)>,
    /// Channels of the prediction.
    pub(super) channels: usize,
}

impl Moments {
    /// Number of timesteps.
    pub fn len(&self) -> usize {
        self.time.dim(0)
    }

    /// Whether there is no timestep.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Channels of the prediction.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// One timestep for all of `count` samples.
    pub(super) fn at(&self, g: &Graph<'_>, rows: &Rows, index: usize, count: usize) -> Result<Moments> {
        if index >= self.len() {
            return Err(Error::failure("pixart: step", "beyond the timesteps that were made")
                .is(index)
                .must(format!("below {}", self.len())));
        }
        let rows = rows.of(self.time.tensor().device(), Rule::Same(index), count)?;
        let pick = |table: &Var| g.embed(table, &rows, None, contracts::embed::Params { act: act::NONE });
        Ok(Moments { time: pick(&self.time)?, modulation: pick(&self.modulation)?, ..self.clone() })
    }
}

impl PixArt {
    /// Embeds timesteps `t [S]`, with `micro` of as many rows where the model embeds them. Every timestep is a row of
    /// its own in each product, so that its numbers are the same to the bit whichever others are made with it.
    ///
    /// # Errors
    /// When the conditions do not fit the model, or memory runs out.
    pub fn moments<'m>(
        &'m self,
        g: &Graph<'m>,
        t: &Tensor,
        micro: Option<&MicroConditions>,
        outputs: Outputs,
    ) -> Result<Moments> {
        let (c, count, device) = (&self.config, t.dim(0), t.device());
        let time = self.time(g, t, micro)?;
        let rows = self.rows.of(device, Rule::Each, count)?;
        let activated = g.embed(&time, &rows, None, contracts::embed::Params { act: act::SILU })?;
        let activated = g.reshape(&activated, &[count, 1, c.width])?;
        let modulation = self.t_block.forward(g, &self.params, &activated, act::NONE)?;
        let modulation = g.reshape(&modulation, &[count, 6 * c.width])?;
        let noise_only = outputs == Outputs::Noise && c.out_channels > c.in_channels;
        let (last, channels) = match noise_only {
            true => (Some(self.last_for_noise()?), c.in_channels),
            false => (None, c.out_channels),
        };
        Ok(Moments { time, modulation, last, channels })
    }

    /// Rows of the last projection that predict noise. Rows go by pixel of the patch and then by channel, so that of
    /// every pixel the first ones stay; each is a sum of its own, and keeps its bits.
    fn last_for_noise(&self) -> Result<(Var, Var)> {
        let (c, d) = (&self.config, self.config.width);
        let kept: Vec<usize> = (0..c.patch * c.patch)
            .flat_map(|pixel| (0..c.in_channels).map(move |channel| pixel * c.out_channels + channel))
            .collect();
        let weight = &self.params.get(self.final_linear.weight).value;
        let device = weight.device();
        let rows = |of: &Tensor, width: usize| -> Result<Tensor> {
            let shape = if width == 1 { vec![kept.len()] } else { vec![kept.len(), width] };
            if device.is_dry() {
                return device.empty_of(&shape, of.dtype());
            }
            let values = of.to_vec()?;
            let chosen: Vec<f32> =
                kept.iter().flat_map(|row| values[row * width..(row + 1) * width].iter().copied()).collect();
            Tensor::from_f32_as(device, &shape, &chosen, of.dtype())
        };
        let bias = self.final_linear.bias.map(|id| &self.params.get(id).value).ok_or_else(|| {
            Error::failure("pixart: final_layer.linear.bias", "missing tensor").must("present in a PixArt transformer")
        })?;
        Ok((Var::constant(rows(weight, d)?), Var::constant(rows(bias, 1)?)))
    }
}
