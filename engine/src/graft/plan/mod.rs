//! The plan: a TOML file that says which operators are replaced by what, and how the result is trained.
//!
//! ```toml
//! [base]
//! model = "assets/fashion-dit/model"
//!
//! [[graft]]
//! site = "attn"                              # attn, mlp or block-pair
//! layers = "every-other"                     # a pattern of `select`, or a list: [1, 3, 5]
//! operator = { kind = "hyena_x", taps = 4 }
//! start = "teacher"                          # random (the default) or teacher
//! loss = "l1"                                # l1, l2 or huber; the stage's by site where not given
//!
//! [data]
//! kind = "fashion-mnist"
//! dir = "data-cache/fashion-mnist"
//! ```
//!
//! A graft of site `block-pair` has no operator: its layers count pairs, and the blocks 2j and 2j + 1 of a pair get the
//! same input and run in parallel. `[distill]`, `[finetune]`, `[eval]`, `[select]` and `[synthesize]` may follow; see
//! [`super::settings`]. Layers count from 0. A plan may hold any
//! number of grafts, so operators can be mixed in one model. What is wrong is said with file, line and column.

use super::select::{Layers, Measured};
use super::settings::{DistillConfig, EvalConfig, FinetuneConfig, Loss, SelectConfig, Start};
use super::synthesize::SynthesizeConfig;
use super::text::SourceText;
use crate::autograd::ParamStore;
use crate::error::{Error, Result};
use crate::io::files;
use crate::models::sites::SiteConfig;
use crate::nn::operators::{self, BlockDims, Operator, OptionValue, REGISTRY, Site, Spec};
use crate::nn::{Builder, Scheme};
use crate::tensor::Device;
use crate::train::config::DataConfig;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use toml::Spanned;

/// A plan that has been read and checked as far as it can be without the base model.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Folder or file of the base model.
    pub base: PathBuf,
    /// Images for both stages.
    pub data: DataConfig,
    /// Stage 1.
    pub distill: DistillConfig,
    /// Stage 2.
    pub finetune: FinetuneConfig,
    /// Comparison of the models before and after.
    pub eval: EvalConfig,
    /// How layers are measured that the base model decides.
    pub select: SelectConfig,
    /// How the data is made, where the base makes its own.
    pub synthesize: Option<SynthesizeConfig>,
    pub(super) grafts: Vec<Graft>,
    source: SourceText,
}

/// One `[[graft]]`: a site in some layers becomes another operator.
#[derive(Clone, Debug)]
pub(super) struct Graft {
    pub site: Site,
    pub layers: Spanned<Layers>,
    /// The pattern in `layers`, where the base model's behaviour decides.
    pub measured: Option<Measured>,
    /// What it decided.
    pub chosen: Option<Vec<usize>>,
    pub operator: Spanned<Spec>,
    pub start: Spanned<Start>,
    pub loss: Option<Loss>,
}

/// A site of one block with the operator that it gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// Block, from 0; of site `block-pair` the number of the pair.
    pub block: usize,
    /// Site in the block.
    pub site: Site,
    /// Operator with all its options.
    pub spec: Spec,
    /// Where it starts.
    pub start: Start,
    /// Loss of stage 1, where it is not the stage's.
    pub loss: Option<Loss>,
}

impl Assignment {
    /// An operator that starts at its own initialisation and takes the stage's loss.
    pub fn new(block: usize, site: Site, spec: Spec) -> Assignment {
        Assignment { block, site, spec, start: Start::Random, loss: None }
    }
}

impl Assignment {
    /// The blocks whose parameters belong to the site, wholly or in part.
    pub fn blocks(&self) -> std::ops::RangeInclusive<usize> {
        match self.site {
            Site::BlockPair => 2 * self.block..=2 * self.block + 1,
            _ => self.block..=self.block,
        }
    }

    /// Whether a parameter of the whole model belongs to the site.
    pub fn owns(&self, name: &str) -> bool {
        let below = |prefix: &str| name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('.'));
        let in_blocks = || self.blocks().any(|block| below(&format!("blocks.{block}")));
        below(&self.to_string()) || self.site == Site::BlockPair && in_blocks()
    }
}

impl fmt::Display for Assignment {
    /// `blocks.3.attn` or `pairs.1`: the name below which the site's own parameters stand.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.site {
            Site::BlockPair => write!(f, "pairs.{}", self.block),
            site => write!(f, "blocks.{}.{site}", self.block),
        }
    }
}

/// What stands for the operator of a pair of blocks.
const PARALLEL: &str = "parallel";

type OperatorText = BTreeMap<Spanned<String>, Spanned<toml::Value>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanText {
    base: BaseText,
    #[serde(default)]
    graft: Vec<GraftText>,
    data: DataConfig,
    distill: Option<Spanned<DistillConfig>>,
    finetune: Option<Spanned<FinetuneConfig>>,
    eval: Option<Spanned<EvalConfig>>,
    select: Option<Spanned<SelectConfig>>,
    synthesize: Option<Spanned<SynthesizeConfig>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BaseText {
    model: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GraftText {
    site: Spanned<String>,
    layers: Spanned<Layers>,
    operator: Option<Spanned<OperatorText>>,
    start: Option<Spanned<Start>>,
    loss: Option<Loss>,
}

impl Plan {
    /// Reads a plan file.
    ///
    /// # Errors
    /// File, line and column, what is wrong, and what it must be.
    pub fn read(path: &Path) -> Result<Plan> {
        Plan::parse(&path.display().to_string(), files::read_text(path)?)
    }

    /// Reads a plan's text; `name` stands for the file in messages.
    ///
    /// # Errors
    /// As [`Plan::read`].
    pub fn parse(name: &str, text: String) -> Result<Plan> {
        let source = SourceText { name: name.to_string(), text };
        let raw: PlanText = toml::from_str(&source.text).map_err(|e| source.refuse(&e))?;
        if raw.graft.is_empty() {
            return Err(Error::usage(name, "the plan grafts nothing")
                .must("at least one [[graft]] with site, layers and operator"));
        }
        let grafts = raw.graft.into_iter().map(|graft| read_graft(&source, graft)).collect::<Result<_>>()?;
        Ok(Plan {
            base: raw.base.model,
            data: raw.data,
            distill: section(&source, raw.distill, DistillConfig::check)?,
            finetune: section(&source, raw.finetune, FinetuneConfig::check)?,
            eval: section(&source, raw.eval, EvalConfig::check)?,
            select: section(&source, raw.select, SelectConfig::check)?,
            synthesize: raw.synthesize.map(|given| checked(&source, given, SynthesizeConfig::check)).transpose()?,
            grafts,
            source,
        })
    }

    /// The file, as messages call it.
    pub(super) fn name(&self) -> &str {
        &self.source.name
    }

    /// The plan as it was written.
    pub fn text(&self) -> &str {
        &self.source.text
    }

    /// Whether some layers are decided by what the base model does, and are not yet.
    pub fn needs_choice(&self) -> bool {
        self.grafts.iter().any(|g| g.measured.is_some() && g.chosen.is_none())
    }

    /// Every site that changes, in the order of the model, for a base of these sizes.
    ///
    /// # Errors
    /// A layer that the base does not have, a site that two grafts claim, an operator that cannot take the base's
    /// sizes or has nothing to take from the teacher, or layers that the base model has yet to decide.
    pub fn resolve<C: SiteConfig>(&self, base: &C) -> Result<Vec<Assignment>> {
        let mut sites: BTreeMap<(usize, Site), Assignment> = BTreeMap::new();
        for graft in &self.grafts {
            let (start, span) = (*graft.start.get_ref(), graft.start.span());
            let spec = match graft.site {
                Site::BlockPair => graft.operator.get_ref().clone(),
                _ => {
                    let operator = operator(graft.operator.get_ref(), graft.site, base.dims())
                        .map_err(|e| e.context(self.source.place(&graft.operator.span())))?;
                    if start == Start::Teacher && operator.teacher_names().is_empty() {
                        let kind = &graft.operator.get_ref().kind;
                        return Err(self
                            .source
                            .error(&span, format!("operator {kind} has no parameter that the teacher has too"))
                            .must("\"random\" for this operator"));
                    }
                    operator.spec()
                }
            };
            for (block, span) in self.layers(graft, graft.site.count(base.depth()))? {
                if graft.site == Site::BlockPair {
                    if base.pairs().contains(&block) {
                        let problem = format!("pair {block} of the base runs in parallel already");
                        return Err(self.source.error(&span, problem).must("a pair that runs in sequence"));
                    }
                    base.clone().add_pair(block).map_err(|e| e.context(self.source.place(&span)))?;
                }
                let assignment = Assignment { block, site: graft.site, spec: spec.clone(), start, loss: graft.loss };
                if let Some(first) = sites.insert((*assignment.blocks().end(), graft.site), assignment) {
                    let problem = format!("two grafts claim {} of layer {block}", graft.site);
                    return Err(self
                        .source
                        .error(&span, problem)
                        .must(format!("one graft a site, it already gets {}", first.spec))
                        .fix("take the layer out of one of them"));
                }
            }
        }
        Ok(sites.into_values().collect())
    }

    /// Layers of a graft with the part of the plan that names them.
    pub(super) fn layers(&self, graft: &Graft, depth: usize) -> Result<Vec<super::select::Chosen>> {
        let span = graft.layers.span();
        match (&graft.chosen, graft.measured) {
            (Some(chosen), _) => Ok(chosen.iter().map(|layer| (*layer, span.clone())).collect()),
            (None, Some(_)) => Err(self
                .source
                .error(&span, "these layers are decided by what the base model does, which was not measured")
                .must("a choice made with the base model at hand")
                .fix("`graft plan check` measures and says the list; `graft run` and `graft distill` do so by themselves")),
            (None, None) => {
                let word = if graft.site == Site::BlockPair { "pairs of blocks" } else { "blocks" };
                graft.layers.get_ref().select(word, depth, &self.source, span)
            }
        }
    }

    /// A usage error at the layers of a graft.
    pub(super) fn layers_error(&self, graft: &Graft, problem: impl Into<String>) -> Error {
        self.source.error(&graft.layers.span(), problem)
    }

    /// What makes two results of stage 1 on the same base the same: as [`Plan::identity`], stage 2 left out.
    pub fn stage1_identity(&self) -> String {
        let plan = Plan { finetune: FinetuneConfig::default(), ..self.clone() };
        plan.identity()
    }

    /// What makes two runs of this plan on the same base the same: everything but places, the frequency of checkpoints
    /// and how the result is compared. A default counts the same whether it is written or left out.
    pub fn identity(&self) -> String {
        let mut distill = self.distill.clone();
        let mut finetune = self.finetune.clone();
        (distill.checkpoint_every, finetune.checkpoint_every, distill.held_out_every) = (1, 1, 0);
        finetune.lora.iter_mut().for_each(|lora| lora.keep_adapters = false);
        // Whether activations are kept matters, where they are does not.
        distill.cache = distill.cache.map(|_| PathBuf::new());
        let layers = |graft: &Graft| match graft.layers.get_ref() {
            Layers::Pattern(name) => serde_json::json!(name),
            Layers::List(list) => serde_json::json!(list.iter().map(|l| *l.get_ref()).collect::<Vec<_>>()),
        };
        let graft = |g: &Graft| {
            let mut parts =
                vec![serde_json::json!(g.site), layers(g), serde_json::json!(g.operator.get_ref().with_defaults())];
            if *g.start.get_ref() != Start::Random {
                parts.push(serde_json::json!({ "start": g.start.get_ref() }));
            }
            if let Some(loss) = g.loss.filter(|l| *l != self.distill.loss.of(g.site)) {
                parts.push(serde_json::json!({ "loss": loss }));
            }
            serde_json::Value::Array(parts)
        };
        let grafts: Vec<_> = self.grafts.iter().map(graft).collect();
        let mut identity =
            serde_json::json!({ "data": self.data.kind, "distill": distill, "finetune": finetune, "grafts": grafts });
        if self.grafts.iter().any(|g| g.measured.is_some()) {
            identity["select"] = serde_json::json!(self.select);
        }
        identity.to_string()
    }
}

/// A section's settings (the published ones where it is absent), checked.
fn section<T: Default>(source: &SourceText, given: Option<Spanned<T>>, check: fn(&T) -> Result<()>) -> Result<T> {
    given.map_or_else(|| Ok(T::default()), |given| checked(source, given, check))
}

/// A section's settings that are there, checked.
fn checked<T>(source: &SourceText, given: Spanned<T>, check: fn(&T) -> Result<()>) -> Result<T> {
    check(given.get_ref()).map_err(|e| e.context(source.place(&given.span())))?;
    Ok(given.into_inner())
}

fn read_graft(source: &SourceText, graft: GraftText) -> Result<Graft> {
    let site = match graft.site.get_ref().as_str() {
        "attn" => Site::Attn,
        "mlp" => Site::Mlp,
        "block-pair" => Site::BlockPair,
        _ => {
            let must = "\"attn\", \"mlp\" or \"block-pair\"";
            return Err(source.error(&graft.site.span(), "no such site").must(must));
        }
    };
    let operator = match (site, graft.operator) {
        (Site::BlockPair, None) => Spanned::new(graft.site.span(), Spec::new(PARALLEL)),
        (Site::BlockPair, Some(given)) => {
            return Err(source
                .error(&given.span(), "a pair of blocks takes no operator")
                .must("absent")
                .fix("operators inside the blocks are grafts of their own, in the same plan"));
        }
        (_, Some(operator)) => read_operator(source, site, operator)?,
        (_, None) => {
            return Err(source.error(&graft.site.span(), "the graft has no operator").must("operator = { kind = … }"));
        }
    };
    let measured = graft.layers.get_ref().measured(source, &graft.layers.span())?;
    if site == Site::BlockPair {
        if measured.is_some() {
            return Err(source
                .error(&graft.layers.span(), "pairs of blocks are not chosen by what the base model does")
                .must("a list of pairs, or a pattern such as \"all\""));
        }
        if let Some(start) = &graft.start {
            return Err(source.error(&start.span(), "a pair of blocks starts as its blocks are").must("absent"));
        }
    }
    let start = graft.start.unwrap_or_else(|| Spanned::new(0..0, Start::Random));
    Ok(Graft { site, layers: graft.layers, measured, chosen: None, operator, start, loss: graft.loss })
}

/// Checks kind and options against the registry while their places in the file are still known.
fn read_operator(source: &SourceText, site: Site, operator: Spanned<OperatorText>) -> Result<Spanned<Spec>> {
    let span = operator.span();
    let fitting: Vec<&str> = REGISTRY.iter().filter(|k| k.site == site).map(|k| k.name).collect();
    let fitting = fitting.join(", ");
    let mut fields = operator.into_inner();
    let Some(kind) = fields.remove("kind") else {
        return Err(source.error(&span, "the operator has no kind").must(format!("kind = one of {fitting}")));
    };
    let kind_at = kind.span();
    let unknown = || source.error(&kind_at, "unknown operator").must(format!("for site {site}: one of {fitting}"));
    let name = kind.get_ref().as_str().ok_or_else(unknown)?;
    let known = REGISTRY.iter().find(|k| k.name == name).ok_or_else(unknown)?;
    if known.site != site {
        return Err(source
            .error(&kind_at, format!("operator {name} does not fit site {site}"))
            .must(format!("one of {fitting}"))
            .fix(format!("use it at site {}", known.site)));
    }
    let mut spec = Spec::new(name);
    for (option, value) in fields {
        if !known.options.iter().any(|(o, _)| o == option.get_ref()) {
            let options: Vec<&str> = known.options.iter().map(|(o, _)| *o).collect();
            return Err(source.error(&option.span(), format!("operator {name} has no such option")).must(
                match options.join(", ") {
                    none if none.is_empty() => "no option".to_string(),
                    some => format!("one of {some}"),
                },
            ));
        }
        let given = option_value(value.get_ref());
        let given =
            given.ok_or_else(|| source.error(&value.span(), "not an option's value").must("a number or a word"))?;
        spec = spec.with(option.get_ref(), given);
    }
    Ok(Spanned::new(span, spec))
}

fn option_value(value: &toml::Value) -> Option<OptionValue> {
    let number = value.as_float().or_else(|| value.as_integer().map(|i| i as f64));
    number.map(OptionValue::Number).or_else(|| value.as_str().map(OptionValue::from))
}

/// The operator of a site; building it once shows whether it can be.
pub(super) fn operator(spec: &Spec, site: Site, dims: BlockDims) -> Result<Box<dyn Operator>> {
    let (mut scratch, device) = (ParamStore::default(), Device::dry());
    operators::build(spec, site, dims, &mut Builder::new(&mut scratch, &device, 0, Scheme::Unset))
}

#[cfg(test)]
pub(super) mod tests;
