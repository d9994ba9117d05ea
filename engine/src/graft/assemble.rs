//! Base model + plan + site parameters → grafted model.

use super::plan::{Assignment, Plan};
use crate::autograd::ParamStore;
use crate::error::{Error, Result};
use crate::io::hash;
use crate::io::safetensors::TensorFile;
use crate::models::dit;
use crate::models::sites::{SiteConfig, SiteModel};
use crate::nn::operators::Site;
use crate::tensor::Device;
use std::collections::BTreeMap;
use std::path::Path;

/// Metadata key under which a grafted folder carries its plan.
pub const PLAN_KEY: &str = "graft.plan";
/// Metadata key under which it lists the layers that the base model decided, as JSON `[[site, pattern, layers], …]`.
pub const LAYERS_KEY: &str = "graft.layers";
/// Metadata key under which a grafted folder says how far its training went.
pub const STAGE_KEY: &str = "graft.stage";

/// How far a grafted model has been trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Grafted operators as they were initialised: the control.
    Random,
    /// Grafted operators distilled, nothing else changed.
    Distilled,
    /// The whole model finetuned.
    Finetuned,
}

impl Stage {
    /// Name in metadata and reports.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Random => "random",
            Stage::Distilled => "distilled",
            Stage::Finetuned => "finetuned",
        }
    }
}

/// The base's sizes with the operators and the parallel pairs of the plan.
///
/// # Errors
/// A block or pair that the base does not have.
pub fn grafted_config<C: SiteConfig>(base: &C, assignments: &[Assignment]) -> Result<C> {
    let mut config = base.clone();
    for a in assignments {
        if a.site == Site::BlockPair {
            config.add_pair(a.block)?;
            continue;
        }
        let spec = config.spec_mut(a.block, a.site);
        *spec
            .ok_or_else(|| Error::failure(a.to_string(), "no such block").must(format!("one of {}", base.depth())))? =
            a.spec.clone();
    }
    config.check()?;
    Ok(config)
}

/// The grafted model: parameters of trained sites from their own stores, all others from the base.
///
/// Values are shared with the stores until training writes to them.
///
/// # Errors
/// A parameter that neither the base nor its site's store has in the right shape.
pub fn graft<'s, M: SiteModel>(
    base: &M,
    config: M::Config,
    sites: impl IntoIterator<Item = (&'s Assignment, &'s ParamStore)>,
) -> Result<M> {
    let sites: Vec<(&Assignment, &ParamStore)> = sites.into_iter().collect();
    // Every parameter is replaced, so none needs memory of its own.
    let mut model = M::unset(config, &Device::dry())?;
    let names: Vec<_> = model.params().iter().map(|(id, p)| (id, p.name.clone())).collect();
    for (id, name) in names {
        let site = sites.iter().find(|(a, _)| a.owns(&name));
        let store = site.map_or(base.params(), |(_, store)| store);
        let found = store.find(&name).ok_or_else(|| {
            Error::failure(&name, "no value for a parameter of the grafted model")
                .must("in the base or in the store of its site")
        })?;
        model.params_mut().set(id, store.get(found).value.clone())?;
    }
    Ok(model)
}

/// Writes a grafted model as a self-describing folder in the diffusers layout, exact to the bit.
///
/// # Errors
/// When the folder cannot be written.
pub fn save<M: SiteModel>(model: &M, folder: &Path, plan: &Plan, stage: Stage) -> Result<()> {
    let mut metadata = BTreeMap::from([
        (PLAN_KEY.to_string(), plan.text().to_string()),
        (STAGE_KEY.to_string(), stage.name().to_string()),
    ]);
    let chosen = plan.chosen();
    if !chosen.is_empty() {
        metadata.insert(LAYERS_KEY.to_string(), serde_json::json!(chosen).to_string());
    }
    model.save(folder, &metadata)
}

/// Refuses a distilled model that comes from stage 1 of another plan, as its metadata says.
///
/// # Errors
/// "the model comes from another plan", or a folder that cannot be read.
pub fn check_origin(folder: &Path, plan: &Plan) -> Result<()> {
    for file in dit::weight_files(folder)? {
        let file = TensorFile::open(&file)?;
        let stated = file
            .metadata()
            .get(PLAN_KEY)
            .map(|text| Plan::parse(&format!("{}: {PLAN_KEY}", file.place()), text.clone()));
        let same =
            stated.map(|stated| Ok::<_, Error>(stated?.stage1_identity() == plan.stage1_identity())).transpose()?;
        if same != Some(true) {
            return Err(Error::usage(folder.display().to_string(), "the model comes from another plan")
                .is(if same.is_none() { "a model without a plan" } else { "other grafts or settings of stage 1" })
                .must("distilled by the plan of this run folder")
                .fix("use another --run folder, or remove this model and distil again"));
        }
    }
    Ok(())
}

/// A digest of all parameters, names and shapes: tells whether two models are the same to the bit.
///
/// # Errors
/// When the values cannot be read.
pub fn digest<M: SiteModel>(model: &M) -> Result<String> {
    let mut digests = String::new();
    for (_, p) in model.params().iter() {
        let values = p.value.to_vec()?;
        digests += &format!("{} {} {}\n", p.name, p.value.shape(), hash::sha256(bytemuck::cast_slice(&values)));
    }
    Ok(hash::sha256(digests.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::dit::{Dit, DitConfig};
    use crate::nn::operators::{self, Spec};
    use crate::nn::{Builder, Scheme};

    fn base() -> Dit {
        Dit::new(
            DitConfig { input_size: 8, in_channels: 1, classes: 3, ..DitConfig::plain(12, 8, 2) },
            &Device::cpu(),
            5,
        )
        .unwrap()
    }

    #[test]
    fn only_the_grafted_site_changes() {
        let base = base();
        let a = Assignment::new(1, Site::Attn, Spec::new("hyena_x").with("taps", 4.0));
        let mut store = ParamStore::default();
        let mut builder = Builder::new(&mut store, base.device(), 9, Scheme::Torch);
        operators::build(
            &a.spec,
            a.site,
            base.config.block_dims(),
            &mut builder.below("blocks").below("1").below("attn"),
        )
        .unwrap();
        let config = grafted_config(&base.config, std::slice::from_ref(&a)).unwrap();
        let model = graft(&base, config, [(&a, &store)]).unwrap();
        assert_eq!(model.config.blocks[1].attn.kind, "hyena_x");
        let mut own = 0;
        for (_, p) in model.params.iter() {
            // Block 11 begins with the same characters as block 1.
            let from = if p.name.starts_with("blocks.1.attn.") { &store } else { &base.params };
            own += usize::from(p.name.starts_with("blocks.1.attn."));
            assert_eq!(
                p.value.to_vec().unwrap(),
                from.get(from.find(&p.name).unwrap()).value.to_vec().unwrap(),
                "{}",
                p.name
            );
        }
        assert_eq!(own, store.len());
        assert_ne!(digest(&model).unwrap(), digest(&base).unwrap());
    }

    #[test]
    fn a_store_without_the_parameters_is_refused() {
        let a = Assignment::new(1, Site::Attn, Spec::new("hyena_x"));
        let base = base();
        let config = grafted_config(&base.config, std::slice::from_ref(&a)).unwrap();
        let error = graft(&base, config, [(&a, &ParamStore::default())]).unwrap_err().to_string();
        assert!(error.contains("blocks.1.attn.in_proj.weight: no value"), "{error}");
    }
}
