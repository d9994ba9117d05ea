//! Operators that can sit at a site of a block.
//!
//! A site's operator sees the modulated, normalised features `[B, N, D]` and gives `[B, N, D]` before the gate; it
//! never sees timestep or condition (arXiv 2506.05340, §3). Adding one is a file here and a line in [`REGISTRY`].

mod heads;
mod hyena;
mod kv_compress;
mod linear_attention;
mod long_conv;
mod mamba2;
mod mha;
mod mha_qk_norm;
mod mlp;
mod mlp_hyena_x;
mod neighborhood;
mod recognise;
mod swa;

pub use recognise::{Recognised, Shapes, recognisable, recognise, recognise_alone};

use super::{Builder, Epilogue};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// A place in a model that grafting can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Site {
    /// Token mixing.
    Attn,
    /// Channel mixing.
    Mlp,
    /// Two consecutive blocks (2j, 2j + 1), counted in pairs. It holds no operator: the blocks run in parallel.
    #[serde(rename = "block-pair")]
    BlockPair,
}

impl Site {
    /// Places of this kind in a model with `depth` blocks.
    pub fn count(self, depth: usize) -> usize {
        match self {
            Site::BlockPair => depth / 2,
            _ => depth,
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Site::Attn => "attn",
            Site::Mlp => "mlp",
            Site::BlockPair => "block-pair",
        })
    }
}

/// Sizes of the block around a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockDims {
    /// Width D.
    pub width: usize,
    /// Attention heads H.
    pub heads: usize,
    /// Rows and columns of tokens, Gh and Gw; tokens are numbered row by row.
    pub grid: [usize; 2],
}

impl BlockDims {
    /// Tokens N.
    pub fn tokens(&self) -> usize {
        self.grid[0] * self.grid[1]
    }
}

/// The value of an option: a number, or a word where the operator offers a choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OptionValue {
    /// `taps = 4`.
    Number(f64),
    /// `direction = "centred"`.
    Word(String),
}

impl From<f64> for OptionValue {
    fn from(value: f64) -> Self {
        OptionValue::Number(value)
    }
}

impl From<&str> for OptionValue {
    fn from(value: &str) -> Self {
        OptionValue::Word(value.to_string())
    }
}

impl fmt::Display for OptionValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OptionValue::Number(number) => write!(f, "{number}"),
            OptionValue::Word(word) => f.write_str(word),
        }
    }
}

/// Which operator, with its options: `{ kind = "hyena_x", taps = 4 }` in a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// Name in the registry.
    pub kind: String,
    /// Options by name; those not given take the operator's defaults.
    #[serde(flatten)]
    pub options: BTreeMap<String, OptionValue>,
}

impl Spec {
    /// An operator with default options.
    pub fn new(kind: &str) -> Spec {
        Spec { kind: kind.to_string(), options: BTreeMap::new() }
    }

    /// With one option set.
    pub fn with(mut self, option: &str, value: impl Into<OptionValue>) -> Spec {
        self.options.insert(option.to_string(), value.into());
        self
    }

    /// With every option that has a default of its own, rather than the model's, filled in.
    pub fn with_defaults(&self) -> Spec {
        let mut spec = self.clone();
        let kind = REGISTRY.iter().find(|k| k.name == self.kind);
        for (option, default) in kind.into_iter().flat_map(|k| k.options) {
            // A default such as "the model's" is a remark, not a value.
            let is_word = default.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '+' | '.'));
            if is_word && !default.is_empty() && !spec.options.contains_key(*option) {
                let value = default.parse().map_or_else(|_| OptionValue::from(*default), OptionValue::Number);
                spec.options.insert((*option).to_string(), value);
            }
        }
        spec
    }

    /// An option that is a number.
    ///
    /// # Errors
    /// An option that is a word.
    pub fn number(&self, option: &str, default: f64) -> Result<f64> {
        match self.options.get(option) {
            None => Ok(default),
            Some(OptionValue::Number(v)) => Ok(*v),
            Some(word) => Err(Error::usage(format!("{}: {option}", self.kind), "not a number").is(word)),
        }
    }

    /// An option that is a positive whole number.
    fn whole(&self, option: &str, default: usize) -> Result<usize> {
        match self.number(option, default as f64)? {
            v if v >= 1.0 && v.fract() == 0.0 && v <= 1e9 => Ok(v as usize),
            v => Err(Error::usage(format!("{}: {option}", self.kind), "not a positive whole number").is(v)),
        }
    }

    /// Hidden width of a channel mixer of the given ratio.
    fn hidden(&self, width: usize, ratio: f64) -> Result<usize> {
        let hidden = (width as f64 * ratio) as usize;
        if hidden == 0 || !ratio.is_finite() || ratio > 1024.0 {
            return Err(Error::usage(format!("{}: ratio", self.kind), "gives no usable width")
                .is(ratio)
                .must("a positive ratio of at most 1024"));
        }
        Ok(hidden)
    }

    /// An option that is one of `words`; the first is the default.
    fn choice(&self, option: &str, words: &[&'static str]) -> Result<&'static str> {
        let given = match self.options.get(option) {
            None => return Ok(words[0]),
            Some(given) => given.to_string(),
        };
        words.iter().find(|word| **word == given).copied().ok_or_else(|| {
            Error::usage(format!("{}: {option}", self.kind), "unknown choice")
                .is(format!("{given:?}"))
                .must(format!("one of {}", words.join(", ")))
        })
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind)?;
        for (i, (name, value)) in self.options.iter().enumerate() {
            write!(f, "{}{name}={value}", if i == 0 { "(" } else { ", " })?;
        }
        if self.options.is_empty() { Ok(()) } else { f.write_str(")") }
    }
}

/// Floating-point operations of a site for one sample, split as the paper's tables do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SiteFlops {
    /// The operator itself.
    pub operator: f64,
    /// The projections around it ("featurizer").
    pub projections: f64,
}

impl SiteFlops {
    /// Both parts.
    pub fn total(&self) -> f64 {
        self.operator + self.projections
    }
}

/// An operator with its parameters' places in a store.
pub trait Operator: Send + Sync + fmt::Debug {
    /// Kind and all options, so that building from it gives the same operator.
    fn spec(&self) -> Spec;

    /// Forward pass over `x [B, N, D]`; `epilogue` is applied to the result where there is one.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var>;

    /// Cost for one sample.
    fn flops(&self, dims: BlockDims) -> SiteFlops;

    /// Own parameters that may start as the teacher's, as (own name, name in the site's plain operator: `mha` or
    /// `mlp`): those of the same shape and meaning. A parameter that the teacher does not have in that shape is left.
    fn teacher_names(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// The operator of this kind whose parameters may have these shapes, for checkpoints that do not name their
    /// operators; asked of one with default options. Whoever has options that change shapes reads them off here.
    fn told_by(&self, _shapes: &Shapes, _dims: BlockDims) -> Option<Spec> {
        Some(self.spec())
    }

    /// Options that the shapes of the parameters do not tell, so that the published values are taken, which are the
    /// defaults; named where published checkpoints leave them open.
    fn untold(&self) -> &'static [&'static str] {
        &[]
    }
}

/// An entry of the registry.
pub struct Kind {
    /// Name in plans.
    pub name: &'static str,
    /// Site it fits.
    pub site: Site,
    /// One sentence.
    pub summary: &'static str,
    /// Options with their defaults, as text.
    pub options: &'static [(&'static str, &'static str)],
    build: fn(&Spec, BlockDims, &mut Builder<'_>) -> Result<Box<dyn Operator>>,
}

/// Every operator. Of two with the same tensors the published one stands first: [`recognise()`] takes the first.
pub const REGISTRY: &[Kind] = &[
    mha::KIND,
    swa::KIND,
    neighborhood::KIND,
    linear_attention::KIND,
    kv_compress::KIND,
    hyena::SE,
    hyena::X,
    hyena::Y,
    hyena::GRID,
    long_conv::KIND,
    mamba2::KIND,
    mha_qk_norm::KIND,
    mlp::KIND,
    mlp_hyena_x::KIND,
];

/// Creates an operator with new parameters, named below the builder's prefix.
///
/// # Errors
/// An unknown kind, a site that it does not fit, an unknown option, or a size that it cannot take.
pub fn build(spec: &Spec, site: Site, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let names = || {
        let fitting = REGISTRY.iter().filter(|k| k.site == site).map(|k| k.name);
        fitting.collect::<Vec<_>>().join(", ")
    };
    let kind = REGISTRY.iter().find(|k| k.name == spec.kind).ok_or_else(|| {
        Error::usage("operator", "unknown operator").is(format!("{:?}", spec.kind)).must(format!("one of {}", names()))
    })?;
    if kind.site != site {
        return Err(Error::usage(format!("operator {}", kind.name), "does not fit this site")
            .is(site)
            .must(kind.site)
            .fix(format!("use one of {}", names())));
    }
    if let Some(unknown) = spec.options.keys().find(|o| kind.options.iter().all(|(name, _)| name != o)) {
        let known: Vec<&str> = kind.options.iter().map(|(name, _)| *name).collect();
        return Err(Error::usage(format!("operator {}", kind.name), "unknown option")
            .is(unknown)
            .must(if known.is_empty() { "no option".into() } else { known.join(", ") }));
    }
    (kind.build)(spec, dims, builder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Scheme;
    use crate::tensor::Device;

    /// Why an attention operator is not built.
    pub(super) fn refusal(spec: &Spec, dims: BlockDims) -> String {
        let (mut store, device) = (ParamStore::default(), Device::cpu());
        let mut builder = Builder::new(&mut store, &device, 0, Scheme::Torch);
        build(spec, Site::Attn, dims, &mut builder).unwrap_err().to_string()
    }

    fn parameters(spec: &Spec, dims: BlockDims, device: &Device) -> (ParamStore, Box<dyn Operator>) {
        let mut store = ParamStore::default();
        let operator = build(spec, Site::Attn, dims, &mut Builder::new(&mut store, device, 0, Scheme::Torch));
        (store, operator.unwrap())
    }

    /// What an operator may start from exists on both sides, in one shape.
    #[test]
    fn attention_can_start_from_its_teacher() {
        let dims = BlockDims { width: 12, heads: 3, grid: [7, 8] };
        let device = Device::cpu();
        let (teacher, _) = parameters(&Spec::new("mha"), dims, &device);
        for kind in ["mha", "swa", "neighborhood_attention", "linear_attention", "kv_compress"] {
            let (own, operator) = parameters(&Spec::new(kind), dims, &device);
            assert_eq!(operator.teacher_names().len(), 4, "{kind}");
            for (name, theirs) in operator.teacher_names() {
                let shape =
                    |store: &ParamStore, name: &str| store.get(store.find(name).unwrap()).value.shape().dims().to_vec();
                assert_eq!(shape(&own, name), shape(&teacher, theirs), "{kind}: {name}");
            }
            // Building from what it says gives the same operator.
            let (again, same) = parameters(&operator.spec(), dims, &device);
            assert_eq!((again.elements(), same.spec()), (own.elements(), operator.spec()));
            assert!(refusal(&Spec::new(kind).with("heads", 5.0), dims).contains("a divisor of 12"), "{kind}");
        }
    }

    /// An attention that sees everything is the plain one: all three give the same result from the same weights.
    #[test]
    fn wide_windows_are_full_attention() {
        let dims = BlockDims { width: 8, heads: 2, grid: [3, 3] };
        let device = Device::cpu();
        let (teacher, mha) = parameters(&Spec::new("mha"), dims, &device);
        let wave: Vec<f32> = (0..2 * 9 * 8).map(|i| (i as f32 * 0.37).sin()).collect();
        let x = Var::constant(crate::tensor::Tensor::from_f32(&device, &[2, 9, 8], &wave).unwrap());
        let g = Graph::inference(crate::autograd::Precision::F32);
        let want = mha.forward(&g, &teacher, &x, None).unwrap().tensor().to_vec().unwrap();
        let wide = [Spec::new("swa").with("window", 8.0), Spec::new("neighborhood_attention").with("kernel", 3.0)];
        for spec in wide {
            let (mut own, operator) = parameters(&spec, dims, &device);
            for (name, theirs) in operator.teacher_names() {
                let value = teacher.get(teacher.find(theirs).unwrap()).value.clone();
                own.set(own.find(name).unwrap(), value).unwrap();
            }
            assert_eq!(operator.forward(&g, &own, &x, None).unwrap().tensor().to_vec().unwrap(), want, "{spec}");
        }
    }
}
