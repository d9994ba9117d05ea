//! What grafting sees of a model: blocks with sites, whatever the model reads besides the noisy picture.

use super::dit::{BlockSpec, Pair};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::{Error, Result};
use crate::nn::Builder;
use crate::nn::operators::{BlockDims, Operator, Site, Spec};
use crate::tensor::{Device, Tensor};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

/// What goes through a site in a forward pass.
///
/// Outputs of `attn` and `mlp` are those before the gate. Where blocks can run in pairs, every pair (2j, 2j + 1) is
/// shown as site `block-pair` of number j, whether it runs in sequence or in parallel: its input is the residual stream
/// before the pair, its output what the pair adds to it.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'s> {
    /// Block or pair, from 0.
    pub block: usize,
    /// Site in the block.
    pub site: Site,
    /// `[B, N, D]` what the operator sees.
    pub input: &'s Var,
    /// `[B, N, D]` what it gives.
    pub output: &'s Var,
    /// `[B, 6, D]` modulation of the block, and its row that gates this site; a pair has no gate.
    pub gate: Option<(&'s Var, usize)>,
    /// `[B, 1, D]` what blocks are modulated by, where each makes its own table of it.
    pub condition: Option<&'s Var>,
}

/// Is shown every site in order.
pub type Observer<'o> = dyn FnMut(&Seen<'_>) -> Result<()> + 'o;

/// Work of a forward pass outside the sites and the merges of pairs, for one sample.
#[derive(Clone, Debug, Default)]
pub struct Work {
    /// Products with weights: rows, inputs, outputs.
    pub products: Vec<[usize; 3]>,
    /// Passes that compute next to nothing: numbers read and written.
    pub streams: Vec<usize>,
    /// Cores of attention: FLOPs, and numbers read and written.
    pub cores: Vec<(f64, usize)>,
}

/// Sizes and operators of a model with sites.
pub trait SiteConfig: Clone + Debug {
    /// Operators of every block.
    fn blocks(&self) -> &[BlockSpec];

    /// Operators of every block, to be changed.
    fn blocks_mut(&mut self) -> &mut [BlockSpec];

    /// Sizes that operators are built from.
    fn dims(&self) -> BlockDims;

    /// Pairs of blocks that run in parallel, in rising order.
    fn pairs(&self) -> &[usize];

    /// Lets a pair run in parallel.
    ///
    /// # Errors
    /// A kind of model whose blocks cannot.
    fn add_pair(&mut self, pair: usize) -> Result<()>;

    /// Channels and side of the square pictures or latents of training.
    fn picture(&self) -> [usize; 2];

    /// Whether the model also predicts variance values.
    fn learns_variance(&self) -> bool;

    /// Checks that the sizes make a model.
    ///
    /// # Errors
    /// Names the field, its value and what it must be.
    fn check(&self) -> Result<()>;

    /// Trainable parameters outside the sites and the merges of pairs.
    ///
    /// # Errors
    /// Sizes that make no model.
    fn rest(&self) -> Result<usize>;

    /// Work outside the sites.
    fn work(&self) -> Work;

    /// Number of blocks.
    fn depth(&self) -> usize {
        self.blocks().len()
    }

    /// Blocks that run one after another, where two in parallel count as one.
    fn serial_depth(&self) -> usize {
        self.depth() - self.pairs().len()
    }

    /// Mutable specification of the operator at a site of a block.
    fn spec_mut(&mut self, block: usize, site: Site) -> Option<&mut Spec> {
        let block = self.blocks_mut().get_mut(block)?;
        match site {
            Site::Attn => Some(&mut block.attn),
            Site::Mlp => Some(&mut block.mlp),
            Site::BlockPair => None,
        }
    }
}

/// A model whose blocks have sites.
pub trait SiteModel: Debug + Sized + Sync {
    /// Its sizes and operators.
    type Config: SiteConfig;
    /// What it reads of a batch besides noisy pictures and timesteps: labels, or texts.
    type Condition;

    /// What messages and reports call it.
    const KIND: &'static str;

    /// Whether it is one part of a pipeline, whose others a grafted model shares with its base.
    const HAS_PARTS: bool;

    /// Layers with adapters where a plan names none, by the ends of their names.
    const ADAPTED: &'static [&'static str];

    /// Sizes and operators of a model folder or file, without its weights.
    ///
    /// # Errors
    /// One line that names the file, the tensor, what it is and what it must be.
    fn describe(path: &Path) -> Result<Self::Config>;

    /// Loads a model in f32.
    ///
    /// # Errors
    /// As [`SiteModel::describe`].
    fn load(path: &Path, device: &Device) -> Result<Self>;

    /// Writes the model as a folder in the diffusers layout, exact to the bit, with `metadata`.
    ///
    /// # Errors
    /// When the folder cannot be written; an older file is never left half-overwritten.
    fn save(&self, folder: &Path, metadata: &BTreeMap<String, String>) -> Result<()>;

    /// A model whose parameters are about to be set: their values are unspecified, and on a dry device they take no
    /// memory.
    ///
    /// # Errors
    /// A configuration that cannot be.
    fn unset(config: Self::Config, device: &Device) -> Result<Self>;

    /// Sizes and operators.
    fn config(&self) -> &Self::Config;

    /// All parameters, named as in the original checkpoint.
    fn params(&self) -> &ParamStore;

    /// All parameters, to be changed.
    fn params_mut(&mut self) -> &mut ParamStore;

    /// Device that holds the parameters.
    fn device(&self) -> &Device;

    /// The operator at a site.
    fn operator(&self, block: usize, site: Site) -> Option<&dyn Operator>;

    /// The diffusers tensors that hold one of its parameters, to be joined along the first axis.
    fn diffusers_parts(name: &str) -> Vec<String>;

    /// Predicts noise (and variance values where the model has them) for `x [B, C, H, W]` at `t [B]`, and shows every
    /// site to `observer`; `checkpoint` keeps only the inputs of each block for the backward pass, where nobody
    /// observes.
    ///
    /// # Errors
    /// When a shape does not fit, and those of the observer.
    fn predict<'m>(
        &'m self,
        g: &Graph<'m>,
        x: &Var,
        t: &Tensor,
        condition: &Self::Condition,
        checkpoint: bool,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Var>;

    /// Two blocks of this configuration in parallel, with new parameters.
    ///
    /// # Errors
    /// A kind of model whose blocks cannot, or an operator that cannot be built.
    fn pair(config: &Self::Config, index: usize, builder: &mut Builder<'_>) -> Result<Pair> {
        let _ = (config, builder);
        Err(no_pairs(Self::KIND, index))
    }
}

/// What is said of a pair of blocks that cannot run in parallel.
pub(super) fn no_pairs(kind: &str, pair: usize) -> Error {
    Error::usage(format!("pair {pair}"), format!("blocks of a {kind} cannot run in parallel"))
        .must("site attn or mlp")
        .fix("take the graft of site block-pair out of the plan")
}
