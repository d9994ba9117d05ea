//! The plan: a TOML file that says which operators are replaced by what, and how the result is trained.
//!
//! ```toml
//! [base]
//! model = "assets/fashion-dit/model"
//!
//! [[graft]]
//! site = "attn"                              # attn or mlp
//! layers = "every-other"                     # all, every-other, 3-of-4, deep:n, or a list: [1, 3, 5]
//! operator = { kind = "hyena_x", taps = 4 }
//!
//! [data]
//! kind = "fashion-mnist"
//! dir = "data-cache/fashion-mnist"
//! ```
//!
//! `[distill]`, `[finetune]` and `[eval]` may follow; see [`super::settings`]. Layers count from 0. A plan may hold any
//! number of grafts, so operators can be mixed in one model. What is wrong is said with file, line and column.

use super::select::Layers;
use super::settings::{DistillConfig, EvalConfig, FinetuneConfig};
use super::text::SourceText;
use crate::autograd::ParamStore;
use crate::error::{Error, Result};
use crate::io::files;
use crate::models::dit::DitConfig;
use crate::nn::operators::{self, BlockDims, OptionValue, REGISTRY, Site, Spec};
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
    grafts: Vec<Graft>,
    source: SourceText,
}

/// One `[[graft]]`: a site in some layers becomes another operator.
#[derive(Clone, Debug)]
struct Graft {
    site: Site,
    layers: Spanned<Layers>,
    operator: Spanned<Spec>,
}

/// A site of one block with the operator that it gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// Block, from 0.
    pub block: usize,
    /// Site in the block.
    pub site: Site,
    /// Operator with all its options.
    pub spec: Spec,
}

impl fmt::Display for Assignment {
    /// `blocks.3.attn`: the name below which the operator's parameters stand.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blocks.{}.{}", self.block, self.site)
    }
}

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
    operator: Spanned<OperatorText>,
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
            grafts,
            source,
        })
    }

    /// The plan as it was written.
    pub fn text(&self) -> &str {
        &self.source.text
    }

    /// Every site that changes, in the order of the model, for a base of these sizes.
    ///
    /// # Errors
    /// A layer that the base does not have, a site that two grafts claim, or an operator that cannot take the base's
    /// sizes.
    pub fn resolve(&self, base: &DitConfig) -> Result<Vec<Assignment>> {
        let mut sites: BTreeMap<(usize, Site), Assignment> = BTreeMap::new();
        for graft in &self.grafts {
            let spec = complete(graft.operator.get_ref(), graft.site, base.block_dims())
                .map_err(|e| e.context(self.source.place(&graft.operator.span())))?;
            let chosen = graft.layers.get_ref().select(base.depth(), &self.source, graft.layers.span())?;
            for (block, span) in chosen {
                let assignment = Assignment { block, site: graft.site, spec: spec.clone() };
                if let Some(first) = sites.insert((block, graft.site), assignment) {
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

    /// What makes two runs of this plan on the same base the same: everything but places, the frequency of checkpoints
    /// and how the result is compared.
    pub fn identity(&self) -> String {
        let mut distill = self.distill.clone();
        let mut finetune = self.finetune.clone();
        (distill.checkpoint_every, finetune.checkpoint_every) = (1, 1);
        let layers = |graft: &Graft| match graft.layers.get_ref() {
            Layers::Pattern(name) => serde_json::json!(name),
            Layers::List(list) => serde_json::json!(list.iter().map(|l| *l.get_ref()).collect::<Vec<_>>()),
        };
        let grafts: Vec<_> =
            self.grafts.iter().map(|g| serde_json::json!([g.site, layers(g), g.operator.get_ref()])).collect();
        serde_json::json!({ "data": self.data.kind, "distill": distill, "finetune": finetune, "grafts": grafts })
            .to_string()
    }
}

/// A section's settings (the published ones where it is absent), checked.
fn section<T: Default>(source: &SourceText, given: Option<Spanned<T>>, check: fn(&T) -> Result<()>) -> Result<T> {
    let Some(given) = given else { return Ok(T::default()) };
    check(given.get_ref()).map_err(|e| e.context(source.place(&given.span())))?;
    Ok(given.into_inner())
}

fn read_graft(source: &SourceText, graft: GraftText) -> Result<Graft> {
    let site = match graft.site.get_ref().as_str() {
        "attn" => Site::Attn,
        "mlp" => Site::Mlp,
        "block-pair" => {
            return Err(source
                .error(&graft.site.span(), "this version cannot graft pairs of blocks")
                .must("\"attn\" or \"mlp\"")
                .fix("replace operators inside the blocks instead"));
        }
        _ => return Err(source.error(&graft.site.span(), "no such site").must("\"attn\" or \"mlp\"")),
    };
    Ok(Graft { site, layers: graft.layers, operator: read_operator(source, site, graft.operator)? })
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

/// The specification with every option filled in; building the operator once shows whether it can be.
fn complete(spec: &Spec, site: Site, dims: BlockDims) -> Result<Spec> {
    let (mut scratch, device) = (ParamStore::default(), Device::cpu());
    let operator = operators::build(spec, site, dims, &mut Builder::new(&mut scratch, &device, 0, Scheme::Torch))?;
    Ok(operator.spec())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A plan for tests: `grafts` is the text of its `[[graft]]` tables and of what follows.
    pub fn plan(grafts: &str) -> Result<Plan> {
        let text = format!("[base]\nmodel = \"none\"\n[data]\nkind = \"mnist\"\ndir = \"none\"\n{grafts}");
        Plan::parse("plan.toml", text)
    }

    fn graft(site: &str, layers: &str, operator: &str) -> String {
        format!("[[graft]]\nsite = {site}\nlayers = {layers}\noperator = {operator}\n")
    }

    fn message(grafts: &str) -> String {
        let resolved = plan(grafts).and_then(|p| p.resolve(&DitConfig::plain(4, 8, 2)));
        resolved.unwrap_err().to_string()
    }

    #[test]
    fn grafts_may_be_mixed_and_come_in_the_order_of_the_model() {
        let text = graft("\"mlp\"", "[2]", "{ kind = \"mlp\", ratio = 3 }")
            + &graft("\"attn\"", "\"every-other\"", "{ kind = \"hyena_x\" }");
        let found = plan(&text).unwrap().resolve(&DitConfig::plain(4, 8, 2)).unwrap();
        let names: Vec<String> = found.iter().map(|a| format!("{a} {}", a.spec)).collect();
        assert_eq!(
            names,
            [
                "blocks.1.attn hyena_x(direction=causal, taps=4)",
                "blocks.2.mlp mlp(ratio=3)",
                "blocks.3.attn hyena_x(direction=causal, taps=4)"
            ]
        );
    }

    #[test]
    fn errors_say_where_and_what() {
        let good = "{ kind = \"hyena_x\" }";
        let rows = [
            (graft("\"ffn\"", "\"all\"", good), "plan.toml:7:8: no such site; is \"ffn\"; must be \"attn\" or \"mlp\""),
            (graft("\"block-pair\"", "\"all\"", good), "plan.toml:7:8: this version cannot graft pairs of blocks"),
            (graft("\"attn\"", "\"some\"", good), "plan.toml:8:10: unknown layer pattern; is \"some\""),
            (graft("\"attn\"", "[1, 4]", good), "plan.toml:8:14: layer out of range; is 4; must be 0 to 3"),
            (graft("\"attn\"", "[1, 1]", good), "layer listed twice"),
            (
                graft("\"attn\"", "\"all\"", "{ kind = \"hyena_z\" }"),
                "plan.toml:9:21: unknown operator; is \"hyena_z\"; must be for site attn: one of mha, hyena_se, hyena_x",
            ),
            (
                graft("\"mlp\"", "\"all\"", good),
                "plan.toml:9:21: operator hyena_x does not fit site mlp; is \"hyena_x\"; must be one of mlp",
            ),
            (
                graft("\"attn\"", "\"all\"", "{ kind = \"hyena_x\", tap = 3 }"),
                "plan.toml:9:32: operator hyena_x has no such option; is tap; must be one of taps, direction",
            ),
            (
                graft("\"attn\"", "\"all\"", "{ kind = \"hyena_x\", taps = \"3\" }"),
                "plan.toml:9:12: hyena_x: taps: not a number; is 3",
            ),
            (
                graft("\"attn\"", "\"all\"", "{ kind = \"hyena_x\", taps = [3] }"),
                "plan.toml:9:39: not an option's value; is [3]; must be a number or a word",
            ),
            (
                graft("\"attn\"", "\"all\"", "{ kind = \"hyena_x\", taps = 0 }"),
                "plan.toml:9:12: hyena_x: taps: not a positive whole number; is 0",
            ),
            (graft("\"attn\"", "\"all\"", "{ taps = 3 }"), "plan.toml:9:12: the operator has no kind"),
            (
                graft("\"attn\"", "\"all\"", "{ kind = \"mha\", heads = 3 }"),
                "plan.toml:9:12: mha: heads: does not divide the width",
            ),
            (
                graft("\"attn\"", "\"all\"", good) + &graft("\"attn\"", "[2]", good),
                "plan.toml:12:11: two grafts claim attn of layer 2",
            ),
            (graft("\"attn\"", "3", good), "plan.toml:8:10: invalid type"),
            (String::new(), "the plan grafts nothing"),
            (
                graft("\"attn\"", "\"all\"", good) + "[distill]\nstep = 3\n",
                "plan.toml:11:1: unknown field `step`; must be one of `steps`",
            ),
            (
                graft("\"attn\"", "\"all\"", good) + "[finetune]\nbatch = 0\n",
                "plan.toml:10:1: finetune: batch: nothing to do",
            ),
            (
                graft("\"attn\"", "\"all\"", good) + "[distill]\noptimizer = { rate = 3 }\n",
                "plan.toml:11:13: unknown field `rate`",
            ),
        ];
        for (text, expected) in rows {
            let found = message(&text);
            assert!(found.contains(expected), "{found}\n  should hold: {expected}");
        }
    }

    #[test]
    fn identity_leaves_out_what_does_not_change_the_result() {
        let of =
            |rest: &str| plan(&(graft("\"attn\"", "\"all\"", "{ kind = \"hyena_x\" }") + rest)).unwrap().identity();
        assert_eq!(
            of("[distill]\nsteps = 9\n"),
            of("[eval]\nsamples = 5\n[distill]\nsteps = 9\ncheckpoint_every = 2\n")
        );
        assert_ne!(of("[distill]\nsteps = 9\n"), of("[distill]\nsteps = 8\n"));
    }
}
