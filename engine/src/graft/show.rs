//! A plan with every default filled in, as TOML that reads back to the same plan.

use super::plan::{Assignment, Plan};
use super::select::Layers;
use super::settings::{DistillConfig, EvalConfig, FinetuneConfig, Loss, SelectConfig, Start};
use super::synthesize::SynthesizeConfig;
use crate::error::{Error, Result};
use crate::nn::operators::{OptionValue, REGISTRY, Site, Spec};
use crate::train::config::DataConfig;
use serde::Serialize;
use std::path::Path;

/// Everything of a plan but its grafts.
#[derive(Serialize)]
struct Sections<'p> {
    data: &'p DataConfig,
    distill: &'p DistillConfig,
    finetune: &'p FinetuneConfig,
    eval: &'p EvalConfig,
    select: &'p SelectConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    synthesize: &'p Option<SynthesizeConfig>,
}

/// A graft to be written: layers and operator as they stand in the file.
struct Written {
    site: Site,
    layers: String,
    spec: Spec,
    start: Start,
    loss: Loss,
}

impl Plan {
    /// The plan as TOML with every default filled in; what only the base model can say is left out, with a remark.
    ///
    /// # Errors
    /// A number that TOML cannot hold.
    pub fn completed(&self) -> Result<String> {
        let grafts = self.grafts.iter().map(|g| {
            let layers = match g.layers.get_ref() {
                Layers::Pattern(name) => quoted(name),
                Layers::List(list) => format!("{:?}", list.iter().map(|l| *l.get_ref()).collect::<Vec<_>>()),
            };
            let spec = g.operator.get_ref().with_defaults();
            let loss = g.loss.unwrap_or_else(|| self.distill.loss.of(g.site));
            Written { site: g.site, layers, spec, start: *g.start.get_ref(), loss }
        });
        self.write(grafts)
    }

    /// This plan with other grafts, those of `assignments`, and the settings as they are.
    ///
    /// # Errors
    /// As [`Plan::completed`].
    pub fn with_grafts(&self, assignments: &[Assignment]) -> Result<Plan> {
        let mut groups: Vec<(&Assignment, Vec<usize>)> = Vec::new();
        for a in assignments {
            let alike = |b: &Assignment| Assignment { block: a.block, ..b.clone() } == *a;
            match groups.iter_mut().find(|(first, _)| alike(first)) {
                Some((_, blocks)) => blocks.push(a.block),
                None => groups.push((a, vec![a.block])),
            }
        }
        let grafts = groups.into_iter().map(|(a, blocks)| Written {
            site: a.site,
            layers: format!("{blocks:?}"),
            spec: a.spec.clone(),
            start: a.start,
            loss: a.loss.unwrap_or_else(|| self.distill.loss.of(a.site)),
        });
        Plan::parse(self.name(), self.write(grafts)?)
    }

    fn write(&self, grafts: impl Iterator<Item = Written>) -> Result<String> {
        let refuse = |e: &dyn std::fmt::Display| Error::failure(self.name(), e.to_string());
        let mut text = format!("[base]\nmodel = {}\n", path(&self.base).map_err(|e| refuse(&e))?);
        for g in grafts {
            text += &format!("\n[[graft]]\nsite = \"{}\"\nlayers = {}\n", g.site, g.layers);
            // A pair has no operator to choose, and starts as its blocks.
            if g.site != Site::BlockPair {
                text += &format!("operator = {}{}\n", operator(&g.spec), remarks(&g.spec));
                text += &format!("start = {}\n", word(&g.start)?);
            }
            text += &format!("loss = {}\n", word(&g.loss)?);
        }
        let sections = Sections {
            data: &self.data,
            distill: &self.distill,
            finetune: &self.finetune,
            eval: &self.eval,
            select: &self.select,
            synthesize: &self.synthesize,
        };
        Ok(text + "\n" + &toml::to_string(&sections).map_err(|e| refuse(&e))?)
    }
}

/// An inline table.
fn operator(spec: &Spec) -> String {
    let mut parts = vec![format!("kind = {}", quoted(&spec.kind))];
    parts.extend(spec.options.iter().map(|(name, value)| match value {
        OptionValue::Number(number) => format!("{name} = {number}"),
        OptionValue::Word(word) => format!("{name} = {}", quoted(word)),
    }));
    format!("{{ {} }}", parts.join(", "))
}

/// A comment that names the options which the base model decides.
fn remarks(spec: &Spec) -> String {
    let kind = REGISTRY.iter().find(|k| k.name == spec.kind);
    let open = kind.into_iter().flat_map(|k| k.options).filter(|(option, _)| !spec.options.contains_key(*option));
    let open: Vec<String> = open.map(|(option, default)| format!("{option}: {default}")).collect();
    if open.is_empty() { String::new() } else { format!("   # {}", open.join("; ")) }
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

fn path(path: &Path) -> std::result::Result<String, toml::ser::Error> {
    Ok(toml::Value::try_from(path)?.to_string())
}

fn word(value: &impl Serialize) -> Result<String> {
    let value = toml::Value::try_from(value).map_err(|e| Error::failure("plan", e.to_string()))?;
    Ok(value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graft::plan::tests::plan;
    use crate::models::dit::DitConfig;

    #[test]
    fn it_reads_back_to_the_same_plan() {
        let text = "[[graft]]\nsite = \"attn\"\nlayers = [3, 1]\noperator = { kind = \"hyena_x\" }\nstart = \"teacher\"\n\
                    [[graft]]\nsite = \"attn\"\nlayers = [0]\noperator = { kind = \"mha\" }\nloss = \"huber\"\n\
                    [[graft]]\nsite = \"mlp\"\nlayers = \"top-local:2\"\noperator = { kind = \"mlp\", ratio = 1.5 }\n\
                    [distill]\nseed = 7\noptimizer = { lr = 3e-3, schedule = \"cosine\" }\n\
                    [distill.loss]\nmlp = \"l1\"\nhuber_delta = 0.1\n[eval]\nclassifier = \"a \\\"b\\\"\"\n";
        let plan = plan(text).unwrap();
        let shown = plan.completed().unwrap();
        let again = Plan::parse("shown.toml", shown.clone()).unwrap();
        assert_eq!(again.identity(), plan.identity(), "{shown}");
        assert_eq!((&again.base, &again.data, &again.eval), (&plan.base, &plan.data, &plan.eval));
        assert_eq!((&again.distill, &again.finetune, again.select), (&plan.distill, &plan.finetune, plan.select));
        // Nothing is left to be filled in: shown once more it is the same text.
        assert_eq!(again.completed().unwrap(), shown);
        for part in [
            "layers = [3, 1]\noperator = { kind = \"hyena_x\", direction = \"causal\", taps = 4 }\nstart = \"teacher\"\nloss = \"l1\"\n",
            "operator = { kind = \"mha\" }   # heads: the model's\nstart = \"random\"\nloss = \"huber\"\n",
            "layers = \"top-local:2\"\noperator = { kind = \"mlp\", ratio = 1.5 }\n",
            "[distill.optimizer]\nlr = 0.003\n",
            "steps = 50000\n",
        ] {
            assert!(shown.contains(part), "{part} is not in\n{shown}");
        }
    }

    #[test]
    fn grafts_may_be_exchanged() {
        let text = "[[graft]]\nsite = \"attn\"\nlayers = \"every-other\"\noperator = { kind = \"hyena_x\" }\n";
        let (plan, base) = (plan(text).unwrap(), DitConfig::plain(4, 8, 2));
        let mut assignments = plan.resolve(&base).unwrap();
        assert_eq!(plan.with_grafts(&assignments).unwrap().resolve(&base).unwrap().len(), 2);
        assignments.iter_mut().for_each(|a| a.spec = base.blocks[a.block].attn.clone());
        let control = plan.with_grafts(&assignments).unwrap();
        let names: Vec<String> = control.resolve(&base).unwrap().iter().map(|a| format!("{a} {}", a.spec)).collect();
        assert_eq!(names, ["blocks.1.attn mha(heads=2)", "blocks.3.attn mha(heads=2)"]);
        assert_eq!(control.distill, plan.distill);
    }
}
