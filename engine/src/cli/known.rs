//! Pictures with holes to fill in, for `graft sample --inpaint`.

use crate::error::{Error, Result};
use crate::io::png::{self, Image};
use crate::models::dit::Dit;
use crate::sample::inpaint::Known;
use crate::tensor::Tensor;
use std::path::Path;

/// Grey from which on a mask counts as white.
const WHITE: u8 = 128;

/// Reads a picture and the mask of its hole, for `n` images of a model that works on pixels.
///
/// # Errors
/// Pictures of another size than the model's, damaged ones, or a mask that leaves nothing to do.
pub fn read(image: &Path, mask: &Path, rounds: usize, model: &Dit, n: usize) -> Result<Known> {
    let c = &model.config;
    let want = [c.input_size, c.input_size];
    let load = |path: &Path, channels: Option<usize>| -> Result<Image> {
        let (picture, _) = png::read(path)?;
        let found = [picture.width(), picture.height()];
        if found != want || channels.is_some_and(|channels| channels != picture.channels()) {
            let shown = |[w, h]: [usize; 2], channels: usize| format!("{w} x {h} with {channels} channels");
            return Err(Error::usage(path.display().to_string(), "does not fit the model")
                .is(shown(found, picture.channels()))
                .must(shown(want, channels.unwrap_or(picture.channels()))));
        }
        Ok(picture)
    };
    let (picture, hole) = (load(image, Some(c.in_channels))?, load(mask, None)?);
    let area = c.input_size * c.input_size;
    let white = |pixel: usize| hole.pixels()[pixel * hole.channels()] >= WHITE;
    if !(0..area).any(white) {
        return Err(Error::usage("--mask", "nothing to fill in").is("no white pixel").must("white where the hole is"));
    }
    // Channels first, as the model sees them.
    let places = || (0..c.in_channels * area).map(|at| (at % area, at / area));
    let one: Vec<f32> = places()
        .map(|(pixel, channel)| f32::from(picture.pixels()[pixel * c.in_channels + channel]) / 127.5 - 1.0)
        .collect();
    let known: Vec<f32> = places().map(|(pixel, _)| if white(pixel) { 0.0 } else { 1.0 }).collect();
    let shape = [n, c.in_channels, c.input_size, c.input_size];
    let all = |values: &[f32]| Tensor::from_f32(model.device(), &shape, &values.repeat(n));
    Ok(Known { images: all(&one)?, mask: all(&known)?, rounds })
}
