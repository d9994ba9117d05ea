//! Autoencoders between pictures and latents: the KL autoencoder of latent diffusion (arXiv 2112.10752), and a small
//! decoder for previews.
//!
//! Pictures are `[B, 3, H, W]` in −1..1. Latents here are those of the network; transformers work on latents times
//! `scaling` after `shift` is taken off.

mod decoder;
mod layers;
mod load;
mod names;
mod tiny;

pub use decoder::{Decoder, is_tiny};
pub use load::{Given, describe, load};
pub use tiny::Tiny;

use super::fill::round;
use crate::autograd::{ParamStore, Precision};
use crate::error::{Error, Result};
use crate::nn::{Builder, Scheme};
use crate::ops::to_working;
use crate::tensor::{DType, Device, MemoryPlan, Tensor};
use layers::{Attention, Before, Conv, Norm, Resnet, Run, channels_first, channels_last};
use std::fmt;

/// Is shown what a layer, by its name in files, makes of a picture.
type Seen<'s> = dyn FnMut(fmt::Arguments<'_>, &Tensor) -> Result<()> + 's;

/// Sizes of an autoencoder.
#[derive(Clone, Debug, PartialEq)]
pub struct VaeConfig {
    /// Channels of every level, that of the pictures first.
    pub channels: Vec<usize>,
    /// Residual layers of a level of the encoder; the decoder has one more.
    pub layers: usize,
    /// Channels of the latents.
    pub latent: usize,
    /// Channels of the pictures.
    pub colours: usize,
    /// Groups of every norm.
    pub groups: usize,
    /// Factor between the network's latents and those of the transformer, where it is known.
    pub scaling: Option<f64>,
    /// Taken off before scaling.
    pub shift: f64,
    /// Whether a convolution of one pixel stands on the latents' side: of the encoder, and of the decoder.
    pub quant: [bool; 2],
    /// Whether there is an encoder.
    pub encodes: bool,
}

impl VaeConfig {
    /// The autoencoder of Stable Diffusion and its successors; `scaling` is 0.13025 for PixArt-Σ and SDXL, 0.18215 for
    /// PixArt-α and DiT.
    pub fn released(scaling: f64) -> VaeConfig {
        VaeConfig {
            channels: vec![128, 256, 512, 512],
            layers: 2,
            latent: 4,
            colours: 3,
            groups: 32,
            scaling: Some(scaling),
            shift: 0.0,
            quant: [true; 2],
            encodes: true,
        }
    }

    /// The network's latents of a transformer's.
    ///
    /// # Errors
    /// Where the factor between them is not known.
    pub fn unscale(&self, latents: &Tensor) -> Result<Tensor> {
        let (scaling, shift) = (self.factor_of_latents()?, self.shift as f32);
        mapped(latents, |v| v / scaling + shift)
    }

    /// A transformer's latents of the network's.
    ///
    /// # Errors
    /// As [`VaeConfig::unscale`].
    pub fn scale(&self, latents: &Tensor) -> Result<Tensor> {
        let (scaling, shift) = (self.factor_of_latents()?, self.shift as f32);
        mapped(latents, |v| (v - shift) * scaling)
    }

    fn factor_of_latents(&self) -> Result<f32> {
        self.scaling.map(|s| s as f32).ok_or_else(|| {
            Error::failure("vae: scaling_factor", "not known")
                .is("a file without config.json")
                .must("0.13025 for PixArt-Σ, 0.18215 for PixArt-α and DiT")
                .fix("give --vae-scale")
        })
    }

    /// Pixels along a side of a latent's pixel.
    pub fn factor(&self) -> usize {
        1 << (self.channels.len() - 1)
    }

    fn check(&self) -> Result<()> {
        let wrong = |what: &str, is: String, must: &str| {
            Err(Error::failure(format!("vae: {what}"), "impossible size").is(is).must(must))
        };
        if self.channels.is_empty() || self.channels.len() > 8 || self.layers == 0 || self.layers > 64 {
            return wrong(
                "levels",
                format!("{:?}, {} layers", self.channels, self.layers),
                "1 to 8 levels, 1 to 64 layers",
            );
        }
        if self.groups == 0 || self.channels.iter().any(|c| *c == 0 || !c.is_multiple_of(self.groups)) {
            return wrong(
                "norm_num_groups",
                format!("{} for {:?} channels", self.groups, self.channels),
                "a divisor of all channels",
            );
        }
        if self.scaling.is_some_and(|s| !(s.is_finite() && s > 0.0)) || !self.shift.is_finite() {
            return wrong(
                "scaling_factor",
                format!("{:?}", self.scaling.unwrap_or(self.shift)),
                "a positive number: 0.13025 for PixArt-Σ, 0.18215 for PixArt-α and DiT",
            );
        }
        Ok(())
    }
}

fn mapped(x: &Tensor, f: impl Fn(f32) -> f32) -> Result<Tensor> {
    let mut out = x.copy()?;
    if !out.device().is_dry() {
        out.edit(|values| values.iter_mut().for_each(|v| *v = f(*v)))?;
    }
    Ok(out)
}

/// Plans the memory of decoding `n` latents of a size (height, width) on `on`, by doing it on a device that only counts.
///
/// # Errors
/// Sizes that cannot be.
pub fn plan_memory(
    config: &VaeConfig,
    on: &Device,
    [h, w]: [usize; 2],
    n: usize,
    precision: Precision,
) -> Result<MemoryPlan> {
    let device = on.dry_twin();
    let vae = Vae::new(config.clone(), &device, 0)?;
    let latents = device.empty(&[n, config.latent, h, w])?;
    device.trim();
    device.reset_peak();
    let mut plan = MemoryPlan::default();
    plan.add("weights", device.held());
    let before = device.held();
    vae.decode(&latents, precision, &mut |_, _| {})?;
    // The pool is emptied after every level.
    plan.add("working", device.memory().peak.saturating_sub(before));
    Ok(plan)
}

/// The middle of either half.
#[derive(Debug)]
struct Middle {
    resnets: [Resnet; 2],
    attention: Option<Attention>,
}

impl Middle {
    fn build(b: &mut Builder<'_>, channels: usize, attends: bool) -> Result<Middle> {
        let mut b = b.below("mid_block");
        let attention = attends.then(|| Attention::build(&mut b, "attentions.0", channels)).transpose()?;
        let mut resnet = |i: usize| Resnet::build(&mut b, &format!("resnets.{i}"), channels, channels);
        Ok(Middle { resnets: [resnet(0)?, resnet(1)?], attention })
    }

    fn forward(&self, run: Run<'_>, x: Tensor) -> Result<Tensor> {
        let x = self.resnets[0].forward(run, x)?;
        let x = match &self.attention {
            Some(attention) => attention.forward(run, &x)?,
            None => x,
        };
        self.resnets[1].forward(run, x)
    }
}

/// A half of the network: levels of residual layers, each with a convolution that changes the size or without.
#[derive(Debug)]
struct Half {
    first: Conv,
    middle: Middle,
    levels: Vec<(Vec<Resnet>, Option<Conv>)>,
    norm: Norm,
    last: Conv,
    quant: Option<Conv>,
}

/// A KL autoencoder.
#[derive(Debug)]
pub struct Vae {
    /// Sizes.
    pub config: VaeConfig,
    /// All parameters, named as in diffusers; filters are `[F, Kh, Kw, C]`.
    pub params: ParamStore,
    encoder: Option<Half>,
    decoder: Half,
    /// Largest strip in values; the usual one where not set.
    strip: Option<usize>,
}

impl Vae {
    /// A new autoencoder from a seed.
    ///
    /// # Errors
    /// Sizes that cannot be, or too little memory.
    pub fn new(config: VaeConfig, device: &Device, seed: u64) -> Result<Vae> {
        let mut vae = Vae::build(config, device, seed, Scheme::Torch, [true; 2])?;
        // It is only ever run, so that it is held as the device computes.
        if device.element() == DType::BF16 {
            round(&mut vae.params)?;
        }
        Ok(vae)
    }

    fn build(config: VaeConfig, device: &Device, seed: u64, scheme: Scheme, attends: [bool; 2]) -> Result<Vae> {
        config.check()?;
        let mut params = ParamStore::default();
        let mut b = Builder::new(&mut params, device, seed, scheme);
        let (c, levels) = (&config, config.channels.len());
        let widest = c.channels[levels - 1];
        let encoder = match c.encodes {
            false => None,
            true => {
                let quant = match c.quant[0] {
                    true => Some(Conv::build(&mut b, "quant_conv", [2 * c.latent, 2 * c.latent, 1])?),
                    false => None,
                };
                let mut b = b.below("encoder");
                let first = Conv::build(&mut b, "conv_in", [c.colours, c.channels[0], 3])?;
                let mut found = Vec::with_capacity(levels);
                for (i, &outputs) in c.channels.iter().enumerate() {
                    let mut level = b.below(&format!("down_blocks.{i}"));
                    let inputs = c.channels[i.saturating_sub(1)];
                    let resnets = resnets(&mut level, c.layers, inputs, outputs)?;
                    let change = match i + 1 < levels {
                        true => Some(Conv::build(&mut level, "downsamplers.0.conv", [outputs, outputs, 3])?),
                        false => None,
                    };
                    found.push((resnets, change));
                }
                let middle = Middle::build(&mut b, widest, attends[0])?;
                let norm = Norm::build(&mut b, "conv_norm_out", widest)?;
                let last = Conv::build(&mut b, "conv_out", [widest, 2 * c.latent, 3])?;
                Some(Half { first, middle, levels: found, norm, last, quant })
            }
        };
        let quant = match c.quant[1] {
            true => Some(Conv::build(&mut b, "post_quant_conv", [c.latent, c.latent, 1])?),
            false => None,
        };
        let mut b = b.below("decoder");
        let first = Conv::build(&mut b, "conv_in", [c.latent, widest, 3])?;
        let middle = Middle::build(&mut b, widest, attends[1])?;
        let mut found = Vec::with_capacity(levels);
        let mut inputs = widest;
        for (i, &outputs) in c.channels.iter().rev().enumerate() {
            let mut level = b.below(&format!("up_blocks.{i}"));
            let resnets = resnets(&mut level, c.layers + 1, inputs, outputs)?;
            let change = match i + 1 < levels {
                true => Some(Conv::build(&mut level, "upsamplers.0.conv", [outputs, outputs, 3])?),
                false => None,
            };
            found.push((resnets, change));
            inputs = outputs;
        }
        let norm = Norm::build(&mut b, "conv_norm_out", c.channels[0])?;
        let last = Conv::build(&mut b, "conv_out", [c.channels[0], c.colours, 3])?;
        let decoder = Half { first, middle, levels: found, norm, last, quant };
        Ok(Vae { config, params, encoder, decoder, strip: None })
    }

    /// Device that holds the parameters.
    pub fn device(&self) -> Device {
        self.params.iter().next().map_or_else(Device::cpu, |(_, p)| p.value.device().clone())
    }

    /// Works through pictures in strips of at most so many values instead of the usual number; the result is the same
    /// within rounding.
    pub fn set_strip(&mut self, values: usize) {
        self.strip = Some(values.max(1));
    }

    fn run(&self, precision: Precision) -> Run<'_> {
        let run = Run::new(&self.params, self.config.groups, precision == Precision::Bf16);
        Run { strip: self.strip.unwrap_or(run.strip), ..run }
    }

    /// Pictures `[B, 3, f·h, f·w]` of the network's latents `[B, C, h, w]`, one after the other. `report` is told the
    /// number of steps done and of all.
    ///
    /// # Errors
    /// Latents of another shape, too little memory, or a picture that is not finite.
    pub fn decode(
        &self,
        latents: &Tensor,
        precision: Precision,
        report: &mut (dyn FnMut(usize, usize) + Send),
    ) -> Result<Tensor> {
        let c = &self.config;
        let (b, h, w) = (latents.dim(0), latents.dim(2), latents.dim(3));
        if latents.shape().dims() != [b, c.latent, h, w] {
            return Err(Error::failure("vae: latents", "wrong shape")
                .is(latents.shape())
                .must(format!("[B, {}, h, w]", c.latent)));
        }
        let (run, half, device) = (self.run(precision), &self.decoder, latents.device().clone());
        let mut out = device.empty(&[b, c.colours, h * c.factor(), w * c.factor()])?;
        let total = b * (half.levels.len() + 2);
        for image in 0..b {
            let mut done = image * (half.levels.len() + 2);
            let mut step = || {
                done += 1;
                report(done, total);
                device.trim();
            };
            let each = c.latent * h * w;
            let latent = one(latents, image, each, [c.latent, h, w])?;
            let picture = self.picture(run, &latent, &mut step, &mut |_, _| Ok(()))?;
            if !device.is_dry() {
                let values = picture.values()?;
                if let Some(value) = values.iter().find(|v| !v.is_finite()) {
                    return Err(self.find_fault(run, &latent, *value));
                }
                out.edit(|out| out[image * values.len()..][..values.len()].copy_from_slice(&values))?;
            }
        }
        Ok(out)
    }

    /// The picture `[1, 3, f·h, f·w]` of one latent; `step` is called after each part, `seen` shown what every layer
    /// makes.
    fn picture(&self, run: Run<'_>, latent: &Tensor, step: &mut dyn FnMut(), seen: &mut Seen<'_>) -> Result<Tensor> {
        let half = &self.decoder;
        let mut x = to_working(&channels_last(latent)?)?;
        if let Some(quant) = &half.quant {
            x = quant.plain(run, &x, false)?;
        }
        x = half.first.forward(run, &x, Before::Nothing)?;
        seen(format_args!("decoder.conv_in"), &x)?;
        x = half.middle.forward(run, x)?;
        seen(format_args!("decoder.mid_block"), &x)?;
        step();
        for (level, (resnets, change)) in half.levels.iter().enumerate() {
            for (layer, resnet) in resnets.iter().enumerate() {
                x = resnet.forward(run, x)?;
                seen(format_args!("decoder.up_blocks.{level}.resnets.{layer}"), &x)?;
            }
            if let Some(change) = change {
                x = change.forward(run, &x, Before::Upsample)?;
                seen(format_args!("decoder.up_blocks.{level}.upsamplers.0"), &x)?;
            }
            step();
        }
        let x = half.last.forward(run, &x, Before::Norm(&half.norm))?;
        let picture = channels_first(&x)?;
        step();
        Ok(picture)
    }

    /// Says which layer the first value that is not finite comes from, by decoding again and looking.
    fn find_fault(&self, run: Run<'_>, latent: &Tensor, value: f32) -> Error {
        let found = finite("vae: latents", latent).and_then(|()| {
            let seen = &mut |layer: fmt::Arguments<'_>, x: &Tensor| finite(&format!("vae: {layer}"), x);
            self.picture(run, latent, &mut || {}, seen)
        });
        match found {
            Err(e) => e,
            Ok(_) => not_finite("vae: decoder.conv_out", value),
        }
    }

    /// Mean and log variance `[B, C, h, w]` of the network's latents of pictures `[B, 3, f·h, f·w]`; log variances are
    /// cut to −30..20.
    ///
    /// # Errors
    /// A picture whose sides are no multiples of the factor, or an autoencoder without an encoder.
    pub fn encode(&self, pictures: &Tensor, precision: Precision) -> Result<(Tensor, Tensor)> {
        let c = &self.config;
        let Some(half) = &self.encoder else {
            return Err(Error::failure("vae", "has no encoder").must("a whole autoencoder"));
        };
        let (b, h, w) = (pictures.dim(0), pictures.dim(2), pictures.dim(3));
        let fits = |side: usize| side > 0 && side.is_multiple_of(c.factor());
        if pictures.shape().dims() != [b, c.colours, h, w] || !fits(h) || !fits(w) {
            return Err(Error::failure("vae: picture", "wrong shape").is(pictures.shape()).must(format!(
                "[B, {}, H, W], sides multiples of {}",
                c.colours,
                c.factor()
            )));
        }
        let (run, device) = (self.run(precision), pictures.device().clone());
        let shape = [b, c.latent, h / c.factor(), w / c.factor()];
        let (mut mean, mut logvar) = (device.empty(&shape)?, device.empty(&shape)?);
        let (each, latent) = (c.colours * h * w, shape[1] * shape[2] * shape[3]);
        for image in 0..b {
            let x = one(pictures, image, each, [c.colours, h, w])?;
            let mut x = half.first.forward(run, &to_working(&channels_last(&x)?)?, Before::Nothing)?;
            for (resnets, change) in &half.levels {
                for resnet in resnets {
                    x = resnet.forward(run, x)?;
                }
                if let Some(change) = change {
                    x = change.halve(run, &x)?;
                }
                device.trim();
            }
            x = half.middle.forward(run, x)?;
            let mut x = half.last.forward(run, &x, Before::Norm(&half.norm))?;
            if let Some(quant) = &half.quant {
                x = quant.plain(run, &x, false)?;
            }
            let both = channels_first(&x)?;
            finite("vae: latents", &both)?;
            let both = both.values()?;
            let (m, v) = both.split_at(latent);
            mean.edit(|mean| mean[image * latent..][..latent].copy_from_slice(m))?;
            logvar.edit(|logvar| {
                let target = &mut logvar[image * latent..][..latent];
                target.iter_mut().zip(v).for_each(|(t, v)| *t = v.clamp(-30.0, 20.0));
            })?;
        }
        Ok((mean, logvar))
    }
}

/// Residual layers `resnets.0` …, of which the first changes the number of channels.
fn resnets(b: &mut Builder<'_>, count: usize, inputs: usize, outputs: usize) -> Result<Vec<Resnet>> {
    (0..count)
        .map(|i| Resnet::build(b, &format!("resnets.{i}"), if i == 0 { inputs } else { outputs }, outputs))
        .collect()
}

/// Image `index` of several, `[1, C, H, W]`.
fn one(all: &Tensor, index: usize, each: usize, [c, h, w]: [usize; 3]) -> Result<Tensor> {
    let mut x = all.device().empty(&[1, c, h, w])?;
    if !all.device().is_dry() {
        let all = all.values()?;
        x.edit(|x| x.copy_from_slice(&all[index * each..][..each]))?;
    }
    Ok(x)
}

/// Error unless every value is finite.
fn finite(what: &str, x: &Tensor) -> Result<()> {
    if x.device().is_dry() {
        return Ok(());
    }
    match x.values()?.iter().find(|v| !v.is_finite()) {
        None => Ok(()),
        Some(value) => Err(not_finite(what, *value)),
    }
}

fn not_finite(what: &str, value: f32) -> Error {
    Error::failure(what, "result is not finite")
        .is(value)
        .must("finite")
        .fix("check the weights and latents; use f32 or bf16, which 16-bit floats of 5 exponent bits do not replace")
}

#[cfg(test)]
mod tests {
    use super::*;
    use graft_kernels::rng::Philox;

    fn small() -> Vae {
        let config = VaeConfig { channels: vec![8, 16, 16], layers: 1, groups: 4, ..VaeConfig::released(0.5) };
        let mut vae = Vae::new(config, &Device::cpu(), 3).unwrap();
        let ids: Vec<_> = vae.params.iter().filter(|(_, p)| p.name.contains("norm")).map(|(id, _)| id).collect();
        for id in ids {
            let mut value = vae.params.get(id).value.copy().unwrap();
            let mut noise = vec![0.0; value.len()];
            Philox::new(5, id.index() as u64).fill_normal(&mut noise);
            value.f32s_mut().unwrap().iter_mut().zip(noise).for_each(|(v, n)| *v += 0.3 * n);
            vae.params.set(id, value).unwrap();
        }
        vae
    }

    /// Strips of one row, and others, give what the whole picture gives, and normalise by its statistics.
    #[test]
    fn strips_give_the_whole_picture() {
        let mut vae = small();
        let device = vae.device();
        let mut noise = vec![0.0; 4 * 7 * 5];
        Philox::new(1, 0).fill_normal(&mut noise);
        // Brighter towards the bottom, so that no strip has the statistics of all.
        noise.iter_mut().enumerate().for_each(|(i, v)| *v += (i / 5 % 7) as f32);
        let latents = Tensor::from_f32(&device, &[1, 4, 7, 5], &noise).unwrap();
        let decode = |vae: &Vae| {
            let mut steps = Vec::new();
            let out = vae.decode(&latents, Precision::F32, &mut |done, all| steps.push((done, all))).unwrap();
            assert_eq!(steps, (1..=5).map(|i| (i, 5)).collect::<Vec<_>>());
            out.to_vec().unwrap()
        };
        let whole = decode(&vae);
        let pictures = Tensor::from_f32(&device, &[1, 3, 28, 20], &whole).unwrap();
        let (mean, _) = vae.encode(&pictures, Precision::F32).unwrap();
        let scale = whole.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for strip in [1, 500, 1300] {
            vae.set_strip(strip);
            let parts = decode(&vae);
            let worst = parts.iter().zip(&whole).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst <= 2e-5 * scale, "{strip}: {worst} of {scale}");
            let (again, _) = vae.encode(&pictures, Precision::F32).unwrap();
            let worst =
                again.f32s().unwrap().iter().zip(mean.f32s().unwrap()).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst <= 2e-5, "{strip}: {worst}");
        }
    }

    /// A weight that overflows in the middle is found there, not in the picture.
    #[test]
    fn a_layer_that_is_not_finite_is_named() {
        let mut vae = small();
        let id = vae.params.find("decoder.up_blocks.1.resnets.0.conv2.bias").unwrap();
        let mut value = vae.params.get(id).value.copy().unwrap();
        value.f32s_mut().unwrap()[3] = f32::INFINITY;
        vae.params.set(id, value).unwrap();
        let message = |latent: f32| {
            let latents = Tensor::from_f32(&vae.device(), &[1, 4, 2, 2], &[latent; 16]).unwrap();
            vae.decode(&latents, Precision::F32, &mut |_, _| {}).unwrap_err().to_string()
        };
        assert!(message(0.1).starts_with("vae: decoder.up_blocks.1.resnets.0: result is not finite; is inf"));
        assert!(message(f32::NAN).starts_with("vae: latents: result is not finite; is NaN"));
    }

    #[test]
    fn the_released_sizes() {
        let vae = Vae::build(VaeConfig::released(0.13025), &Device::dry(), 0, Scheme::Unset, [true; 2]).unwrap();
        assert_eq!((vae.params.elements(), vae.config.factor()), (83_653_863, 8));
        let none = VaeConfig { scaling: Some(0.0), ..VaeConfig::released(1.0) };
        assert!(Vae::new(none, &Device::dry(), 0).unwrap_err().to_string().contains("0.13025 for PixArt-Σ"));
    }
}
