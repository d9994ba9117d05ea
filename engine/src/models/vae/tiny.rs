//! The small decoder for previews (TAESD): convolutions and ReLU alone, twenty times cheaper, without fine detail.

use super::layers::{Before, Conv, Run, channels_first, channels_last, sum};
use crate::autograd::{ParamStore, Precision};
use crate::error::{Error, Result};
use crate::models::fill::{Fill, Place, fill};
use crate::models::open::{Renamed, open};
use crate::models::source::Source;
use crate::nn::{Builder, Scheme};
use crate::ops::to_working;
use crate::tensor::{DType, Device, Tensor};
use std::path::Path;

/// Prefixes of the decoder's layers in files; the original has none.
const PREFIXES: [&str; 2] = ["decoder.layers.", "decoder."];
/// Most layers that are looked for.
const MOST: usize = 256;

/// A layer in the order of the file.
#[derive(Debug)]
enum Layer {
    Conv(Conv),
    Relu,
    /// Three convolutions around a shortcut, which may be a convolution of one pixel.
    Block([Conv; 3], Option<Conv>),
    Upsample,
}

/// A small decoder.
#[derive(Debug)]
pub struct Tiny {
    /// All parameters, named by the number of their layer.
    pub params: ParamStore,
    layers: Vec<Layer>,
    latent: usize,
    factor: usize,
    /// Largest value of a latent that comes through.
    magnitude: f32,
}

impl Tiny {
    /// Loads a decoder from a diffusers folder or an original file; an encoder in it is left alone.
    ///
    /// # Errors
    /// One line that names the file, the tensor, what it is and what it must be.
    pub fn load(path: &Path, device: &Device) -> Result<Tiny> {
        let opened = open(path)?;
        let magnitude = opened.config.as_ref().and_then(|(_, c)| c.get("latent_magnitude")).and_then(|m| m.as_f64());
        let names = opened.source.names();
        let prefix = PREFIXES.iter().find(|prefix| names.iter().any(|name| name.starts_with(**prefix)));
        let source = match prefix {
            None => opened.source,
            Some(prefix) => Renamed::under(opened.source, |name| name.strip_prefix(prefix).map(str::to_string)),
        };
        let (mut params, dry) = (ParamStore::default(), Device::dry());
        let (layers, latent) = layers(source.as_ref(), &mut Builder::new(&mut params, &dry, 0, Scheme::Unset))?;
        let filters = |name: &str| name.ends_with("weight");
        let place = |name: &str| Place { parts: vec![name.to_string()], filters: filters(name) };
        let how = Fill { place: &place, ignored: &|_| false, bf16: device.element() == DType::BF16, exact: &|_| true };
        fill(&mut params, source.as_ref(), device, &how)?;
        let factor = 1 << layers.iter().filter(|layer| matches!(layer, Layer::Upsample)).count();
        Ok(Tiny { params, layers, latent, factor, magnitude: magnitude.unwrap_or(3.0) as f32 })
    }

    /// Pixels along a side of a latent's pixel.
    pub fn factor(&self) -> usize {
        self.factor
    }

    /// Pictures `[B, 3, f·h, f·w]` in −1..1 of the transformer's latents `[B, C, h, w]`.
    ///
    /// # Errors
    /// Latents of another shape, or too little memory.
    pub fn decode(&self, latents: &Tensor, precision: Precision) -> Result<Tensor> {
        if latents.shape().dims().len() != 4 || latents.dim(1) != self.latent {
            return Err(Error::failure("tiny decoder: latents", "wrong shape")
                .is(latents.shape())
                .must(format!("[B, {}, h, w]", self.latent)));
        }
        let run = Run::new(&self.params, 1, precision == Precision::Bf16);
        let mut x = channels_last(latents)?;
        map(&mut x, |v| (v / self.magnitude).tanh() * self.magnitude)?;
        let mut x = to_working(&x)?;
        let mut layers = self.layers.iter().peekable();
        while let Some(layer) = layers.next() {
            x = match layer {
                Layer::Conv(conv) => {
                    let relu = layers.next_if(|next| matches!(next, Layer::Relu)).is_some();
                    conv.plain(run, &x, relu)?
                }
                Layer::Relu => {
                    map(&mut x, |v| v.max(0.0))?;
                    x
                }
                Layer::Block([first, second, third], shortcut) => {
                    let h = second.plain(run, &first.plain(run, &x, true)?, true)?;
                    let h = third.plain(run, &h, false)?;
                    let mut h = match shortcut {
                        None => sum(h, &x)?,
                        Some(shortcut) => sum(h, &shortcut.plain(run, &x, false)?)?,
                    };
                    map(&mut h, |v| v.max(0.0))?;
                    h
                }
                Layer::Upsample => match layers.next() {
                    Some(Layer::Conv(conv)) => conv.forward(run, &x, Before::Upsample)?,
                    _ => {
                        return Err(Error::failure("tiny decoder", "no convolution after an enlargement")
                            .must("one, as in TAESD"));
                    }
                },
            };
        }
        map(&mut x, |v| 2.0 * v - 1.0)?;
        channels_first(&x)
    }
}

fn map(x: &mut Tensor, f: impl Fn(f32) -> f32) -> Result<()> {
    x.edit(|values| values.iter_mut().for_each(|v| *v = f(*v)))
}

/// The layers that a file's tensors stand for. Layers without tensors are told by the gaps between the numbers: the one
/// after the first convolution is ReLU, all others enlarge.
fn layers(source: &dyn Source, b: &mut Builder<'_>) -> Result<(Vec<Layer>, usize)> {
    let shape = |name: String| source.tensor(&name).map(|t| t.shape().to_vec());
    let sizes = |name: String| match shape(name).as_deref() {
        Some(&[outputs, inputs, side, _]) => Some([inputs, outputs, side]),
        _ => None,
    };
    let (mut layers, mut latent) = (Vec::new(), None);
    let last = (0..MOST).rev().find(|i| sizes(format!("{i}.weight")).is_some());
    let first = (0..MOST).find(|i| sizes(format!("{i}.weight")).is_some());
    let (Some(first), Some(last)) = (first, last) else {
        return Err(Error::failure(source.place(), "no small decoder")
            .is(format!("{} tensors", source.names().len()))
            .must("the numbered layers of TAESD's decoder"));
    };
    for i in first..=last {
        if let Some(size) = sizes(format!("{i}.weight")) {
            latent = latent.or(Some(size[0]));
            let biased = shape(format!("{i}.bias")).is_some();
            layers.push(Layer::Conv(Conv::maybe_biased(b, &i.to_string(), size, biased)?));
        } else if let Some(size) = sizes(format!("{i}.conv.0.weight")) {
            let mut conv = |part: usize, size: [usize; 3]| Conv::build(b, &format!("{i}.conv.{part}"), size);
            let [inputs, outputs, side] = size;
            let convs = [conv(0, size)?, conv(2, [outputs, outputs, side])?, conv(4, [outputs, outputs, side])?];
            let shortcut = match sizes(format!("{i}.skip.weight")) {
                None if inputs == outputs => None,
                None => {
                    return Err(Error::failure(format!("{}: {i}.skip.weight", source.place()), "missing tensor")
                        .must("present where the number of channels changes"));
                }
                Some(size) => Some(Conv::maybe_biased(b, &format!("{i}.skip"), size, false)?),
            };
            layers.push(Layer::Block(convs, shortcut));
        } else if i == first + 1 {
            layers.push(Layer::Relu);
        } else {
            layers.push(Layer::Upsample);
        }
    }
    Ok((layers, latent.unwrap_or(0)))
}
