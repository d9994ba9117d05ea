//! Classifier-free guidance (arXiv 2207.12598): eps = eps_null + s·(eps_cond − eps_null) on the leading channels.
//!
//! The original DiT guides three channels of the prediction, whatever their number; its published samples come from
//! there. The sampling loop fuses this with the solver update; [`forward`] is the network with guidance by itself.

use crate::autograd::{Graph, Var};
use crate::error::{Error, Result};
use crate::models::dit::{Dit, DitConfig, Run};
use crate::ops::{act, contracts, embed};
use crate::tensor::Tensor;

/// Output channels that the original implementation guides.
const ORIGINAL_CHANNELS: usize = 3;

/// Channels that are guided where nothing else is said: the first three, or all where there are fewer.
pub fn default_channels(config: &DitConfig) -> usize {
    config.in_channels.min(ORIGINAL_CHANNELS)
}

/// Guided forward pass over a doubled batch, as the original's `forward_with_cfg`.
///
/// `x [2B, C, S, S]`, of which the first half is used twice; `t [2B]`; `y [2B]` with the labels first, then the null
/// labels. Returns `[2B, out_channels, S, S]`: the leading `channels` are guided and equal in both halves, the rest
/// are those of each half.
///
/// # Errors
/// An odd batch, or as [`Dit::forward`].
pub fn forward(
    model: &Dit,
    g: &Graph<'_>,
    x: &Tensor,
    t: &Tensor,
    y: &Tensor,
    run: Run,
    scale: f64,
    channels: usize,
) -> Result<Tensor> {
    let batch = x.dim(0);
    if !batch.is_multiple_of(2) {
        return Err(Error::failure("guidance: x", "odd batch").is(batch).must("labelled and null halves of one size"));
    }
    let mut doubled = x.copy()?;
    let first = x.values()?[..x.len() / 2].to_vec();
    doubled.edit(|both| both.chunks_exact_mut(first.len().max(1)).for_each(|half| half.copy_from_slice(&first)))?;
    // A graph of its own: the caller's may outlive the model.
    let inference = Graph::inference(g.precision());
    let mut out = model.forward(&inference, &Var::constant(doubled), t, y, run)?.into_tensor();
    combine(&mut out, scale, channels)?;
    Ok(out)
}

/// Guides the leading `channels` of a prediction `[2B, C, H, W]` whose second half is the null one; both halves get the
/// result.
///
/// # Errors
/// When another tensor shares the storage.
pub fn combine(out: &mut Tensor, scale: f64, channels: usize) -> Result<()> {
    let plane = out.dim(2) * out.dim(3);
    let (per_image, guided) = (out.dim(1) * plane, channels.min(out.dim(1)) * plane);
    let half = out.len() / 2;
    let scale = scale as f32;
    out.edit(|out| {
        let (cond, null) = out.split_at_mut(half);
        for (cond, null) in cond.chunks_mut(per_image).zip(null.chunks_mut(per_image)) {
            for (c, n) in cond[..guided].iter_mut().zip(&mut null[..guided]) {
                *c = *n + scale * (*c - *n);
                *n = *c;
            }
        }
    })
}

/// Images `[I, C, L]` of `x [B, C, L]` by their numbers `index [I]`, copied where they are.
pub(super) fn pick(x: &Tensor, index: &Tensor) -> Result<Tensor> {
    let (b, c, l) = (x.dim(0), x.dim(1), x.dim(2));
    let picked = embed(&x.reshape(&[b, c * l])?, index, None, contracts::embed::Params { act: act::NONE })?;
    picked.y.into_shape(&[index.len(), c, l])
}

/// Puts the first half of a batch in the place of the second, too.
pub(crate) fn repeat_first_half(batch: &mut Tensor) -> Result<()> {
    let half = batch.len() / 2;
    batch.edit(|values| {
        let (first, second) = values.split_at_mut(half);
        second.copy_from_slice(first);
    })
}
