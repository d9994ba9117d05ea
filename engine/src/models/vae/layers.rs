//! Layers of an autoencoder on pictures `[B, H, W, C]`, channels last.
//!
//! A picture that would make large temporary tensors is worked through in strips of rows: each strip is normalised by
//! the statistics of the whole picture and convolved with the rows around it, so that the result is that of one piece.

use crate::autograd::{ParamId, ParamStore};
use crate::error::Result;
use crate::nn::{Builder, Init, Linear};
use crate::ops::{self, act, contracts};
use crate::tensor::Tensor;
use std::ops::Range;

/// Values of a strip: 64 MiB.
const STRIP: usize = 1 << 24;
const EPS: f32 = 1e-6;

/// How layers run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'r> {
    pub params: &'r ParamStore,
    /// Groups of channels of every norm.
    pub groups: usize,
    /// Products of values rounded to bf16.
    pub bf16: bool,
    /// Largest strip, in values of a picture.
    pub strip: usize,
}

impl<'r> Run<'r> {
    pub fn new(params: &'r ParamStore, groups: usize, bf16: bool) -> Run<'r> {
        Run { params, groups, bf16, strip: STRIP }
    }

    fn value(&self, id: ParamId) -> &'r Tensor {
        &self.params.get(id).value
    }
}

/// A square convolution with zeros around the picture.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conv {
    weight: ParamId,
    bias: Option<ParamId>,
}

/// A group norm.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm {
    gamma: ParamId,
    beta: ParamId,
}

/// What comes before a convolution.
#[derive(Clone, Copy, Debug)]
pub(super) enum Before<'n> {
    Nothing,
    /// Norm and SiLU.
    Norm(&'n Norm),
    /// Every pixel becomes four.
    Upsample,
}

impl Conv {
    /// Parameters `name.weight [F, K, K, C]` and `name.bias [F]`.
    pub fn build(b: &mut Builder<'_>, name: &str, [inputs, outputs, side]: [usize; 3]) -> Result<Conv> {
        Conv::maybe_biased(b, name, [inputs, outputs, side], true)
    }

    pub fn maybe_biased(
        b: &mut Builder<'_>,
        name: &str,
        [inputs, outputs, side]: [usize; 3],
        biased: bool,
    ) -> Result<Conv> {
        let mut b = b.below(name);
        let init = Init::torch(inputs * side * side);
        let weight = b.param("weight", &[outputs, side, side, inputs], init)?;
        Ok(Conv { weight, bias: if biased { Some(b.param("bias", &[outputs], init)?) } else { None } })
    }

    /// Side of the kernel.
    fn side(&self, run: Run<'_>) -> usize {
        run.value(self.weight).dim(1)
    }

    fn apply(
        &self,
        run: Run<'_>,
        x: &Tensor,
        above: usize,
        size: [usize; 2],
        (stride, relu): (usize, bool),
    ) -> Result<Tensor> {
        let pad_w = if stride == 1 { self.side(run) / 2 } else { 0 };
        let settings = contracts::conv2d::Params { stride, pad_h: above, pad_w, relu, bf16: run.bf16 };
        ops::conv2d(x, run.value(self.weight), self.bias.map(|id| run.value(id)), size[0], size[1], settings)
    }

    /// The convolution of a whole picture of the same size, with ReLU where asked.
    pub fn plain(&self, run: Run<'_>, x: &Tensor, relu: bool) -> Result<Tensor> {
        self.apply(run, x, self.side(run) / 2, [x.dim(1), x.dim(2)], (1, relu))
    }

    /// Half the size: every second pixel, with zeros at the right and below.
    pub fn halve(&self, run: Run<'_>, x: &Tensor) -> Result<Tensor> {
        self.apply(run, x, 0, [x.dim(1) / 2, x.dim(2) / 2], (2, false))
    }

    /// The convolution of what `before` makes of a picture.
    pub fn forward(&self, run: Run<'_>, x: &Tensor, before: Before<'_>) -> Result<Tensor> {
        if let (Before::Norm(norm), true) = (before, x.device().is_gpu()) {
            return self.with_norm(run, x, norm, None);
        }
        let (h, w, c) = (x.dim(1), x.dim(2), x.dim(3));
        let grows = if matches!(before, Before::Upsample) { 2 } else { 1 };
        let outputs = run.value(self.weight).dim(0);
        let row = w * c.max(outputs) * grows * grows;
        // Strips are cut and joined on the host.
        if h * row <= run.strip || x.dim(0) != 1 || x.device().is_gpu() {
            let ready = prepare(run, x, before, None)?;
            return self.plain(run, ready.as_ref().unwrap_or(x), false);
        }
        let stats = match before {
            Before::Norm(norm) => Some(norm.statistics(run, x)?),
            _ => None,
        };
        let mut out = x.device().empty(&[1, h * grows, w * grows, outputs])?;
        let reach = (self.side(run) / 2).div_ceil(grows);
        for rows in strips(h, row, run.strip) {
            // With the rows around it that its edges see.
            let seen = rows.start.saturating_sub(reach)..(rows.end + reach).min(h);
            let part = slice(x, seen.clone())?;
            let ready = prepare(run, &part, before, stats.as_ref())?;
            let ready = ready.as_ref().unwrap_or(&part);
            let (first, count) = ((rows.start - seen.start) * grows, rows.len() * grows);
            let side = self.side(run) / 2;
            // Rows of zeros only where the picture ends.
            let (ready, above) = match first {
                0 => (ready.clone(), side),
                _ => (slice(ready, first - side..ready.dim(1))?, 0),
            };
            let done = self.apply(run, &ready, above, [count, w * grows], (1, false))?;
            put(&mut out, rows.start * grows, &done)?;
        }
        Ok(out)
    }

    /// The convolution of the norm and SiLU of a whole picture, plus `residual`, in one operator. It keeps no normalised
    /// picture, so that there is nothing to work through in strips where a device has kernels for it.
    fn with_norm(&self, run: Run<'_>, x: &Tensor, norm: &Norm, residual: Option<&Tensor>) -> Result<Tensor> {
        let settings = contracts::norm_silu_conv2d::Params { eps: EPS, bf16: run.bf16 };
        let bias = self.bias.map(|id| run.value(id));
        let [gamma, beta, filters] = [norm.gamma, norm.beta, self.weight].map(|id| run.value(id));
        ops::norm_silu_conv2d(x, gamma, beta, filters, bias, residual, run.groups, settings)
    }

    /// Adds a convolution of one pixel to `target`, strip by strip.
    pub fn add_to(&self, run: Run<'_>, x: &Tensor, mut target: Tensor) -> Result<Tensor> {
        let (h, w) = (x.dim(1), x.dim(2));
        let row = w * x.dim(3).max(target.dim(3));
        if h * row <= run.strip || x.dim(0) != 1 {
            return sum(target, &self.plain(run, x, false)?);
        }
        for rows in strips(h, row, run.strip) {
            let added = self.plain(run, &slice(x, rows.clone())?, false)?;
            let both = sum(added, &slice(&target, rows.clone())?)?;
            put(&mut target, rows.start, &both)?;
        }
        Ok(target)
    }
}

impl Norm {
    /// Parameters `name.weight` and `name.bias`, `[C]` both.
    pub fn build(b: &mut Builder<'_>, name: &str, channels: usize) -> Result<Norm> {
        let mut b = b.below(name);
        Ok(Norm {
            gamma: b.param("weight", &[channels], Init::Ones)?,
            beta: b.param("bias", &[channels], Init::Zeros)?,
        })
    }

    fn apply(&self, run: Run<'_>, x: &Tensor, silu: bool, stats: Option<&Tensor>) -> Result<ops::GroupNormSiluOut> {
        let settings = contracts::group_norm_silu::Params { eps: EPS, silu };
        ops::group_norm_silu(x, run.value(self.gamma), run.value(self.beta), stats, run.groups, settings)
    }

    /// The norm alone.
    pub fn forward(&self, run: Run<'_>, x: &Tensor) -> Result<Tensor> {
        Ok(self.apply(run, x, false, None)?.y)
    }

    /// Means and reciprocal deviations of a whole picture, `[1, 2, G]`, from those of its strips.
    fn statistics(&self, run: Run<'_>, x: &Tensor) -> Result<Tensor> {
        let (h, row, g) = (x.dim(1), x.dim(2) * x.dim(3), run.groups);
        let (mut seen, mut mean, mut square) = (0.0f64, vec![0.0f64; g], vec![0.0f64; g]);
        for rows in strips(h, row, run.strip) {
            let found = self.apply(run, &slice(x, rows.clone())?, false, None)?;
            if x.device().is_dry() {
                return x.device().empty(&[1, 2, g]);
            }
            let count = (rows.len() * row / g) as f64;
            let (means, rstds) = (found.mean.values()?, found.rstd.values()?);
            for (group, (m, r)) in means.iter().zip(rstds.iter()).enumerate() {
                let (m, variance) = (f64::from(*m), f64::from(*r).powi(-2) - f64::from(EPS));
                let step = m - mean[group];
                square[group] += variance * count + step * step * seen * count / (seen + count);
                mean[group] += step * count / (seen + count);
            }
            seen += count;
        }
        let rstd = square.iter().map(|s| (1.0 / (s / seen + f64::from(EPS)).sqrt()) as f32);
        let values: Vec<f32> = mean.iter().map(|m| *m as f32).chain(rstd).collect();
        Tensor::from_f32(x.device(), &[1, 2, g], &values)
    }
}

/// What `before` makes of a picture or a strip; nothing where it is the picture itself.
fn prepare(run: Run<'_>, x: &Tensor, before: Before<'_>, stats: Option<&Tensor>) -> Result<Option<Tensor>> {
    Ok(match before {
        Before::Nothing => None,
        Before::Norm(norm) => Some(norm.apply(run, x, true, stats)?.y),
        Before::Upsample => Some(ops::upsample(x, contracts::upsample::Params {})?),
    })
}

/// Rows of every strip.
fn strips(height: usize, row: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let rows = (most / row.max(1)).max(1);
    (0..height).step_by(rows).map(move |first| first..(first + rows).min(height))
}

/// Rows of a single picture, copied.
fn slice(x: &Tensor, rows: Range<usize>) -> Result<Tensor> {
    let line = x.dim(2) * x.dim(3);
    let mut part = x.device().empty_of(&[1, rows.len(), x.dim(2), x.dim(3)], x.dtype())?;
    if !x.device().is_dry() {
        let values = x.values()?;
        part.edit(|part| part.copy_from_slice(&values[rows.start * line..rows.end * line]))?;
    }
    Ok(part)
}

/// Puts rows into a single picture.
fn put(target: &mut Tensor, first: usize, rows: &Tensor) -> Result<()> {
    let line = target.dim(2) * target.dim(3);
    if !target.device().is_dry() {
        let values = rows.values()?;
        target.edit(|target| target[first * line..][..values.len()].copy_from_slice(&values))?;
    }
    Ok(())
}

/// a + b, in the storage of a where nobody else has it.
pub(super) fn sum(a: Tensor, b: &Tensor) -> Result<Tensor> {
    let (shape, len) = (a.shape(), a.len());
    let mut flat = a.into_shape(&[len])?;
    ops::axpy(&b.reshape(&[len])?, &mut flat, contracts::axpy::Params { alpha: 1.0 })?;
    flat.into_shape(shape.dims())
}

/// Two convolutions with their norms, around a shortcut.
#[derive(Debug)]
pub(super) struct Resnet {
    norms: [Norm; 2],
    convs: [Conv; 2],
    shortcut: Option<Conv>,
}

impl Resnet {
    pub fn build(b: &mut Builder<'_>, name: &str, inputs: usize, outputs: usize) -> Result<Resnet> {
        let mut b = b.below(name);
        let first = (Norm::build(&mut b, "norm1", inputs)?, Conv::build(&mut b, "conv1", [inputs, outputs, 3])?);
        let second = (Norm::build(&mut b, "norm2", outputs)?, Conv::build(&mut b, "conv2", [outputs, outputs, 3])?);
        let shortcut = match inputs == outputs {
            true => None,
            false => Some(Conv::build(&mut b, "conv_shortcut", [inputs, outputs, 1])?),
        };
        Ok(Resnet { norms: [first.0, second.0], convs: [first.1, second.1], shortcut })
    }

    pub fn forward(&self, run: Run<'_>, x: Tensor) -> Result<Tensor> {
        let h = self.convs[0].forward(run, &x, Before::Norm(&self.norms[0]))?;
        if x.device().is_gpu() {
            let across = self.shortcut.as_ref().map(|shortcut| shortcut.plain(run, &x, false)).transpose()?;
            return self.convs[1].with_norm(run, &h, &self.norms[1], Some(across.as_ref().unwrap_or(&x)));
        }
        let h = self.convs[1].forward(run, &h, Before::Norm(&self.norms[1]))?;
        // What is free now may be large.
        x.device().trim();
        match &self.shortcut {
            None => sum(h, &x),
            Some(shortcut) => shortcut.add_to(run, &x, h),
        }
    }
}

/// Attention with one head over all pixels.
#[derive(Debug)]
pub(super) struct Attention {
    norm: Norm,
    qkv: Linear,
    output: Linear,
}

impl Attention {
    pub fn build(b: &mut Builder<'_>, name: &str, channels: usize) -> Result<Attention> {
        let mut b = b.below(name);
        let norm = Norm::build(&mut b, "group_norm", channels)?;
        let qkv = b.linear("to_qkv", channels, 3 * channels)?;
        Ok(Attention { norm, qkv, output: b.linear("to_out.0", channels, channels)? })
    }

    pub fn forward(&self, run: Run<'_>, x: &Tensor) -> Result<Tensor> {
        let (b, n, c) = (x.dim(0), x.dim(1) * x.dim(2), x.dim(3));
        let linear = |layer: &Linear, x: &Tensor, residual: Option<&Tensor>| {
            let settings = contracts::gemm::Params { act: act::NONE, gate_row: 0, bf16: run.bf16 };
            let bias = layer.bias.map(|id| run.value(id));
            Ok::<_, crate::error::Error>(
                ops::gemm(x, run.value(layer.weight), bias, None, None, residual, false, settings)?.y,
            )
        };
        let h = self.norm.forward(run, x)?.into_shape(&[b, n, c])?;
        let qkv = linear(&self.qkv, &h, None)?.into_shape(&[b, n, 3, 1, c])?;
        drop(h);
        let scale = 1.0 / (c as f32).sqrt();
        let y = ops::attention(&qkv, contracts::attention::Params { scale })?.y.into_shape(&[b, n, c])?;
        drop(qkv);
        linear(&self.output, &y, Some(&x.reshape(&[b, n, c])?))?.into_shape(x.shape().dims())
    }
}

/// `[B, C, H, W]` to `[B, H, W, C]`.
pub(super) fn channels_last(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    let mut out = x.device().empty(&[b, h, w, c])?;
    if !x.device().is_dry() {
        let values = x.values()?;
        out.edit(|out| turn(&values, [b, c, h * w], out))?;
    }
    Ok(out)
}

/// `[B, H, W, C]` to `[B, C, H, W]`.
pub(super) fn channels_first(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    let mut out = x.device().empty(&[b, c, h, w])?;
    if !x.device().is_dry() {
        let values = x.values()?;
        out.edit(|out| turn(&values, [b, h * w, c], out))?;
    }
    Ok(out)
}

/// `[B, M, N]` to `[B, N, M]`.
fn turn(from: &[f32], [b, m, n]: [usize; 3], to: &mut [f32]) {
    for image in 0..b {
        for i in 0..m {
            for j in 0..n {
                to[(image * n + j) * m + i] = from[(image * m + i) * n + j];
            }
        }
    }
}
