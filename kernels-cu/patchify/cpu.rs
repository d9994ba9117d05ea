//! CPU path: strided copies, image rows read or written whole. `unpatchify` is the same copy with other strides.

use crate::generated::patchify::{Backward, Dims, Forward};
use rayon::prelude::*;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    Layout::conv_order(a.dims).to_tokens(a.x, a.tokens);
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    if let Some(dx) = a.dx {
        Layout::conv_order(a.dims).to_image(a.dtokens, dx);
    }
}

/// Elements that one thread moves at a time at the least: about 20 µs.
const GRAIN: usize = 1 << 14;

/// An image `[b, c, gh·p, gw·p]`, its tokens `[b, gh·gw, c·p·p]`, and the place of (channel, row, column) in a token.
pub(crate) struct Layout {
    pub c: usize,
    pub p: usize,
    pub gh: usize,
    pub gw: usize,
    /// Stride of the channel in a token.
    pub channel: usize,
    /// Stride of the patch row in a token.
    pub row: usize,
    /// Stride of the patch column in a token.
    pub column: usize,
}

impl Layout {
    fn conv_order(dims: Dims) -> Self {
        let Dims { c, p, gh, gw, .. } = dims;
        Layout { c, p, gh, gw, channel: p * p, row: p, column: 1 }
    }

    /// Cuts `image` into `tokens`, one row of patches at a time.
    pub(crate) fn to_tokens(&self, image: &[f32], tokens: &mut [f32]) {
        let Layout { c, p, gh, gw, .. } = *self;
        let (width, token) = (gw * p, c * p * p);
        let band = (gw * token).max(1);
        tokens.par_chunks_mut(band).enumerate().with_min_len(GRAIN.div_ceil(band)).for_each(|(i, tokens)| {
            let (sample, gy) = (i / gh, i % gh);
            for channel in 0..c {
                for y in 0..p {
                    let source = &image[((sample * c + channel) * gh * p + gy * p + y) * width..][..width];
                    let first = channel * self.channel + y * self.row;
                    for (token, pixels) in tokens.chunks_exact_mut(token).zip(source.chunks_exact(p)) {
                        for (slot, pixel) in token[first..].iter_mut().step_by(self.column).zip(pixels) {
                            *slot = *pixel;
                        }
                    }
                }
            }
        });
    }

    /// Lays `tokens` out as `image`, one channel of a sample at a time.
    pub(crate) fn to_image(&self, tokens: &[f32], image: &mut [f32]) {
        let Layout { c, p, gh, gw, .. } = *self;
        let (width, token) = (gw * p, c * p * p);
        let plane = (gh * p * width).max(1);
        image.par_chunks_mut(plane).enumerate().with_min_len(GRAIN.div_ceil(plane)).for_each(|(i, image)| {
            let (sample, channel) = (i / c, i % c);
            for (line, pixels) in image.chunks_exact_mut(width).enumerate() {
                let (gy, y) = (line / p, line % p);
                let tokens = &tokens[(sample * gh + gy) * gw * token..][..gw * token];
                let first = channel * self.channel + y * self.row;
                for (token, pixels) in tokens.chunks_exact(token).zip(pixels.chunks_exact_mut(p)) {
                    for (slot, pixel) in token[first..].iter().step_by(self.column).zip(pixels) {
                        *pixel = *slot;
                    }
                }
            }
        });
    }
}
