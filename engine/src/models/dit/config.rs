//! Sizes and operators of a DiT.

use crate::error::{Error, Result};
use crate::nn::operators::{BlockDims, Site, Spec};

/// Operators of one block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSpec {
    /// Token mixing.
    pub attn: Spec,
    /// Channel mixing.
    pub mlp: Spec,
}

/// Sizes and operators of a DiT.
#[derive(Clone, Debug, PartialEq)]
pub struct DitConfig {
    /// Width D.
    pub width: usize,
    /// Attention heads H.
    pub heads: usize,
    /// Patch side P.
    pub patch: usize,
    /// Side of the square image or latent.
    pub input_size: usize,
    /// Channels of the image or latent.
    pub in_channels: usize,
    /// Whether the model also predicts variance values.
    pub learn_sigma: bool,
    /// Classes, without the null class.
    pub classes: usize,
    /// Epsilon that the diffusers configuration states; only [`super::Semantics::diffusers`] uses it.
    pub norm_eps: f32,
    /// Operators of every block.
    pub blocks: Vec<BlockSpec>,
    /// Pairs that run in parallel, in rising order: pair j is the blocks 2j and 2j + 1.
    pub pairs: Vec<usize>,
}

/// Published sizes: name, depth, width, heads.
const SIZES: [(&str, usize, usize, usize); 4] =
    [("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16)];

impl DitConfig {
    /// A model with softmax attention and MLPs of ratio 4 in every block.
    pub fn plain(depth: usize, width: usize, heads: usize) -> DitConfig {
        DitConfig {
            width,
            heads,
            patch: 2,
            input_size: 32,
            in_channels: 4,
            learn_sigma: true,
            classes: 1000,
            norm_eps: 1e-5,
            blocks: vec![Self::plain_block(heads, 4.0); depth],
            pairs: Vec::new(),
        }
    }

    /// The block that pretrained models consist of.
    pub fn plain_block(heads: usize, mlp_ratio: f64) -> BlockSpec {
        BlockSpec { attn: Spec::new("mha").with("heads", heads as f64), mlp: Spec::new("mlp").with("ratio", mlp_ratio) }
    }

    /// A published size at 256×256: `DiT-S/2` … `DiT-XL/8`.
    ///
    /// # Errors
    /// An unknown name.
    pub fn named(name: &str) -> Result<DitConfig> {
        let unknown = || {
            Error::usage("model", "unknown size")
                .is(format!("{name:?}"))
                .must("DiT-{S,B,L,XL}/{2,4,8}, for instance DiT-XL/2")
        };
        let (size, patch) = name.strip_prefix("DiT-").and_then(|n| n.split_once('/')).ok_or_else(unknown)?;
        let (_, depth, width, heads) = SIZES.iter().find(|s| s.0 == size).copied().ok_or_else(unknown)?;
        let patch: usize = patch.parse().ok().filter(|p| [2, 4, 8].contains(p)).ok_or_else(unknown)?;
        Ok(DitConfig { patch, ..DitConfig::plain(depth, width, heads) })
    }

    /// Heads of a published width, for files that do not say.
    pub fn heads_of_width(width: usize) -> Option<usize> {
        SIZES.iter().find(|s| s.2 == width).map(|s| s.3)
    }

    /// Number of blocks.
    pub fn depth(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that run one after another, where two in parallel count as one.
    pub fn serial_depth(&self) -> usize {
        self.depth() - self.pairs.len()
    }

    /// Patches along a side.
    pub fn grid(&self) -> usize {
        self.input_size / self.patch
    }

    /// Tokens N.
    pub fn tokens(&self) -> usize {
        self.grid() * self.grid()
    }

    /// Channels of the prediction.
    pub fn out_channels(&self) -> usize {
        self.in_channels * if self.learn_sigma { 2 } else { 1 }
    }

    /// Sizes that operators are built from.
    pub fn block_dims(&self) -> BlockDims {
        BlockDims { width: self.width, heads: self.heads, grid: [self.grid(), self.grid()] }
    }

    /// Mutable specification of the operator at a site of a block.
    pub fn spec_mut(&mut self, block: usize, site: Site) -> Option<&mut Spec> {
        let block = self.blocks.get_mut(block)?;
        match site {
            Site::Attn => Some(&mut block.attn),
            Site::Mlp => Some(&mut block.mlp),
            Site::BlockPair => None,
        }
    }

    /// Checks that the sizes make a model.
    ///
    /// # Errors
    /// Names the field, its value and what it must be.
    pub fn check(&self) -> Result<()> {
        let wrong = |field: &str, is: String, must: &str| {
            Err(Error::failure(format!("dit: {field}"), "impossible size").is(is).must(must))
        };
        if self.blocks.is_empty() || self.depth() > 1000 {
            return wrong("depth", self.depth().to_string(), "1 to 1000 blocks");
        }
        if !self.pairs.is_sorted_by(|a, b| a < b) || self.pairs.last().is_some_and(|j| *j >= self.depth() / 2) {
            return wrong(
                "parallel pairs",
                format!("{:?}", self.pairs),
                &format!("rising numbers below {}, as there are {} blocks", self.depth() / 2, self.depth()),
            );
        }
        if self.width == 0 || !self.width.is_multiple_of(4) || self.width > 65_536 {
            return wrong("width", self.width.to_string(), "a multiple of 4 up to 65536");
        }
        if self.heads == 0 || !self.width.is_multiple_of(self.heads) {
            return wrong("heads", self.heads.to_string(), "a divisor of the width");
        }
        if self.patch == 0 || !self.input_size.is_multiple_of(self.patch) || self.input_size == 0 {
            return wrong(
                "patch",
                format!("{} for an input of {}", self.patch, self.input_size),
                "a divisor of the input size",
            );
        }
        if self.input_size > 4096 || self.tokens() > 1 << 20 {
            return wrong("input size", self.input_size.to_string(), "at most 4096 and 2^20 tokens");
        }
        if self.in_channels == 0 || self.in_channels > 1024 || self.classes > 1 << 24 {
            return wrong(
                "channels or classes",
                format!("{}, {}", self.in_channels, self.classes),
                "1 to 1024 channels, at most 2^24 classes",
            );
        }
        Ok(())
    }

    /// Trainable parameters of the model with softmax attention and its MLPs (a count, nothing is allocated).
    pub fn parameters(&self) -> usize {
        let d = self.width;
        let linear = |inputs: usize, outputs: usize| inputs * outputs + outputs;
        let block = |b: &BlockSpec| {
            let hidden = (d as f64 * b.mlp.number("ratio", 4.0).unwrap_or(4.0)) as usize;
            linear(d, 3 * d) + linear(d, d) + linear(d, hidden) + linear(hidden, d) + linear(d, 6 * d)
        };
        let patch_values = self.patch * self.patch;
        linear(patch_values * self.in_channels, d)
            + linear(super::FREQUENCIES, d)
            + linear(d, d)
            + (self.classes + 1) * d
            + self.blocks.iter().map(block).sum::<usize>()
            + self.pairs.len() * linear(2 * d, d)
            + linear(d, 2 * d)
            + linear(d, patch_values * self.out_channels())
    }
}
