//! Pictures that sampling begins with or fills in, and pictures out of tensors.

use crate::autograd::Precision;
use crate::error::{Error, Result};
use crate::io::png::{self, Image};
use crate::io::{files, hash};
use crate::models::vae::Vae;
use crate::sample::bins;
use crate::sample::inpaint::Known;
use crate::tensor::{Device, Tensor};
use std::path::Path;

/// Value from which on a mask counts as white, in −1..1.
const WHITE: f32 = 0.0;

/// What a transformer works on.
pub enum Space {
    /// Pixels themselves.
    Pixels(Device),
    /// Latents of an autoencoder.
    Latents(Box<Vae>),
}

impl Space {
    /// Pixels along a side of a latent's pixel, and channels.
    fn sizes(&self) -> (usize, usize) {
        match self {
            Space::Pixels(_) => (1, 3),
            Space::Latents(vae) => (vae.config.factor(), vae.config.latent),
        }
    }
}

/// What sampling starts from.
#[derive(Default)]
pub struct Sources {
    /// Latents of the picture to begin with, for every image.
    pub start: Option<Tensor>,
    /// Latents that are known.
    pub known: Option<Known>,
    /// Pixels `[3, H, W]` that are kept, and where.
    kept: Option<(Vec<f32>, Vec<bool>)>,
}

impl Sources {
    /// Takes the picture as known where the mask is black; a pixel of the latents is known where no white falls into it.
    ///
    /// # Errors
    /// A mask that leaves nothing to do, or a picture that cannot be encoded.
    pub fn inpaint(
        &mut self,
        space: &Space,
        picture: &[f32],
        mask: &[f32],
        (size, count, rounds): ([usize; 2], usize, usize),
        precision: Precision,
    ) -> Result<()> {
        let [h, w] = size;
        let white: Vec<bool> = mask[..h * w].iter().map(|v| *v >= WHITE).collect();
        if !white.contains(&true) {
            return Err(Error::usage("--mask", "nothing to fill in")
                .is("no white pixel")
                .must("white where the hole is"));
        }
        let images = latents(space, picture, size, count, precision)?;
        let (f, c) = space.sizes();
        let open = |i: usize, j: usize| (0..f * f).any(|p| white[(i * f + p / f) * w + j * f + p % f]);
        let cells = (0..h / f).flat_map(|i| (0..w / f).map(move |j| (i, j)));
        let one: Vec<f32> = cells.map(|(i, j)| if open(i, j) { 0.0 } else { 1.0 }).collect();
        let mask = Tensor::from_f32(images.device(), images.shape().dims(), &one.repeat(c * count))?;
        self.known = Some(Known { images, mask, rounds });
        self.kept = Some((picture.to_vec(), white.iter().map(|white| !white).collect()));
        Ok(())
    }

    /// Puts the pixels that are kept back into a picture `[3, H, W]`.
    pub fn restore(&self, values: &mut [f32]) {
        let Some((picture, kept)) = &self.kept else { return };
        for (plane, own) in values.chunks_exact_mut(kept.len()).zip(picture.chunks_exact(kept.len())) {
            plane.iter_mut().zip(own).zip(kept).filter(|(_, kept)| **kept).for_each(|((v, own), _)| *v = *own);
        }
    }
}

/// Reads a picture as `[3, H, W]` in −1..1, scaled to cover a size (height, width) and cut to it.
///
/// # Errors
/// A file that is missing or damaged.
pub fn picture(path: &Path, size: [usize; 2]) -> Result<Vec<f32>> {
    let (image, _) = png::read(path)?;
    let (h, w, channels) = (image.height(), image.width(), image.channels());
    let pixel = |plane: usize, at: usize| f32::from(image.pixels()[at * channels + plane.min(channels - 1)]);
    let planes: Vec<f32> = (0..3)
        .flat_map(|plane| (0..h * w).map(move |at| (plane, at)))
        .map(|(p, at)| pixel(p, at) / 127.5 - 1.0)
        .collect();
    Ok(if [h, w] == size { planes } else { bins::resize_and_crop(&planes, [h, w], size) })
}

/// The transformer's latents `[n, C, h, w]` of a picture, the same for all images: the mean of what the encoder gives,
/// or the picture itself.
///
/// # Errors
/// An autoencoder without an encoder or without a scale.
pub fn latents(space: &Space, picture: &[f32], [h, w]: [usize; 2], n: usize, precision: Precision) -> Result<Tensor> {
    let vae = match space {
        Space::Pixels(device) => return Tensor::from_f32(device, &[n, 3, h, w], &picture.repeat(n)),
        Space::Latents(vae) => vae,
    };
    let device = vae.device();
    let (mean, _) = vae.encode(&Tensor::from_f32(&device, &[1, 3, h, w], picture)?, precision)?;
    let one = vae.config.scale(&mean)?;
    let shape = [n, one.dim(1), one.dim(2), one.dim(3)];
    Tensor::from_f32(&device, &shape, &one.values()?.repeat(n))
}

/// A picture of values `[3, H, W]` in −1..1.
///
/// # Errors
/// Another number of values.
pub fn to_image(values: &[f32], h: usize, w: usize) -> Result<Image> {
    let plane = h * w;
    let byte = |v: f32| ((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8;
    let bytes = (0..plane).flat_map(|at| (0..3).map(move |c| (c, at))).map(|(c, at)| byte(values[c * plane + at]));
    Image::new(w, h, 3, bytes.collect())
}

/// SHA-256 of a part's weights: of its file, or of the digests of the weight files of its folder in order.
///
/// # Errors
/// When a file cannot be read.
pub fn digest(path: &Path) -> Result<String> {
    if path.is_file() {
        return hash::sha256_file(path);
    }
    let is_weight =
        |p: &Path| p.extension().is_some_and(|e| e == "safetensors" || e == "bin" || e == "pth" || e == "pt");
    let digests =
        files::list(path)?.iter().filter(|p| is_weight(p)).map(|p| hash::sha256_file(p)).collect::<Result<Vec<_>>>()?;
    Ok(match digests.as_slice() {
        [only] => only.clone(),
        many => hash::sha256(many.concat().as_bytes()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_rounded_and_kept_pixels_return() {
        let image = to_image(&[-1.0, 1.0, 0.0, 9.0, -9.0, 0.5], 1, 2).unwrap();
        assert_eq!(image.pixels(), [0, 128, 0, 255, 255, 191]);
        let sources =
            Sources { kept: Some((vec![0.1, 0.2, 0.3, 0.4, 0.5, 0.6], vec![true, false])), ..Sources::default() };
        let mut values = [9.0; 6];
        sources.restore(&mut values);
        assert_eq!(values, [0.1, 9.0, 0.3, 9.0, 0.5, 9.0]);
    }
}
