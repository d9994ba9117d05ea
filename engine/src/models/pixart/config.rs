//! Sizes and operators of a PixArt transformer.

use crate::error::{Error, Result};
use crate::models::dit::{BlockSpec, DitConfig};
use crate::nn::operators::BlockDims;

/// Sizes and operators of a PixArt transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct PixArtConfig {
    /// Width D.
    pub width: usize,
    /// Attention heads H.
    pub heads: usize,
    /// Patch side P.
    pub patch: usize,
    /// Side of the square latent that positions are relative to: a token's coordinate is its number times
    /// `sample_size`/P over the side of its grid over `interpolation`.
    pub sample_size: usize,
    /// How much denser than at 512 pixels positions lie; 0.5 for 256 pixels, 4 for 2048.
    pub interpolation: f64,
    /// Channels of the latent.
    pub in_channels: usize,
    /// Channels of the prediction: noise, and as many variance values where the model has them.
    pub out_channels: usize,
    /// Width of the text features.
    pub caption_channels: usize,
    /// Text tokens that the model was trained with at the most.
    pub max_tokens: usize,
    /// Whether size and aspect ratio are embedded beside the timestep (PixArt-α at 1024 pixels).
    pub micro_conditions: bool,
    /// Epsilon that the diffusers configuration states; only [`super::Semantics::Diffusers`] uses it.
    pub norm_eps: f32,
    /// Operators of every block.
    pub blocks: Vec<BlockSpec>,
}

impl PixArtConfig {
    /// A model with softmax attention and MLPs of ratio 4 in every block, and PixArt-Σ's other sizes at 512 pixels.
    pub fn plain(depth: usize, width: usize, heads: usize) -> PixArtConfig {
        PixArtConfig {
            width,
            heads,
            patch: 2,
            sample_size: 64,
            interpolation: 1.0,
            in_channels: 4,
            out_channels: 8,
            caption_channels: 4096,
            max_tokens: 300,
            micro_conditions: false,
            norm_eps: 1e-6,
            blocks: vec![DitConfig::plain_block(heads, 4.0); depth],
        }
    }

    /// PixArt-Σ-XL/2 as published for pictures of a side of 256, 512, 1024 or 2048 pixels.
    ///
    /// # Errors
    /// Another side.
    pub fn sigma_xl(side: usize) -> Result<PixArtConfig> {
        let interpolation = match side {
            256 => 0.5,
            512 | 1024 | 2048 => side as f64 / 512.0,
            _ => {
                return Err(Error::usage("model", "no published size").is(side).must("256, 512, 1024 or 2048"));
            }
        };
        Ok(PixArtConfig { sample_size: side / 8, interpolation, ..PixArtConfig::plain(28, 1152, 16) })
    }

    /// What a configuration without the field means: at least 1, growing with the size.
    pub(super) fn usual_interpolation(sample_size: usize) -> f64 {
        (sample_size / 64).max(1) as f64
    }

    /// Number of blocks.
    pub fn depth(&self) -> usize {
        self.blocks.len()
    }

    /// Patches along a side of the latent that positions are relative to.
    pub fn base(&self) -> usize {
        self.sample_size / self.patch.max(1)
    }

    /// Sizes that operators are built from, for a grid of tokens.
    pub fn block_dims(&self, grid: [usize; 2]) -> BlockDims {
        BlockDims { width: self.width, heads: self.heads, grid }
    }

    /// Checks that the sizes make a model.
    ///
    /// # Errors
    /// Names the field, its value and what it must be.
    pub fn check(&self) -> Result<()> {
        let wrong = |field: &str, is: String, must: &str| {
            Err(Error::failure(format!("pixart: {field}"), "impossible size").is(is).must(must))
        };
        if self.blocks.is_empty() || self.depth() > 1000 {
            return wrong("depth", self.depth().to_string(), "1 to 1000 blocks");
        }
        if self.width == 0 || !self.width.is_multiple_of(4) || self.width > 65_536 {
            return wrong("width", self.width.to_string(), "a multiple of 4 up to 65536");
        }
        if self.heads == 0 || !self.width.is_multiple_of(self.heads) {
            return wrong("heads", self.heads.to_string(), "a divisor of the width");
        }
        if self.patch == 0 || self.sample_size < self.patch || self.sample_size > 1 << 14 {
            return wrong("sample_size", self.sample_size.to_string(), "at least a patch and at most 16384");
        }
        if !(self.interpolation > 0.0 && self.interpolation.is_finite()) {
            return wrong("interpolation_scale", self.interpolation.to_string(), "a positive number");
        }
        if self.in_channels == 0 || self.in_channels > 1024 || self.out_channels < self.in_channels {
            return wrong(
                "channels",
                format!("{} in, {} out", self.in_channels, self.out_channels),
                "1 to 1024, and no fewer out than in",
            );
        }
        if self.micro_conditions && !self.width.is_multiple_of(3) {
            return wrong("width", self.width.to_string(), "a multiple of 3, as size and aspect ratio are embedded");
        }
        if self.caption_channels == 0 || self.max_tokens == 0 {
            return wrong("text", format!("{} channels", self.caption_channels), "at least one channel and token");
        }
        Ok(())
    }

    /// Checks a latent and returns its grid of tokens.
    ///
    /// # Errors
    /// Sides that are no multiple of the patch.
    pub fn grid(&self, height: usize, width: usize) -> Result<[usize; 2]> {
        let fits = |side: usize| side > 0 && side.is_multiple_of(self.patch);
        if !fits(height) || !fits(width) || height.max(width) > 1 << 14 {
            return Err(Error::usage("latent", "sides do not divide into patches")
                .is(format!("{height} x {width}"))
                .must(format!("multiples of {} up to 16384", self.patch))
                .fix(format!("sides of a picture must be multiples of {}", 8 * self.patch)));
        }
        Ok([height / self.patch, width / self.patch])
    }
}
