//! Stage 1 of restructuring: two blocks in parallel learn to give what they gave in sequence.
//!
//! A pair is one regression unit (arXiv 2506.05340, §6). Its student owns both blocks, which start as they are in the
//! base, and the merge, which starts as the plain sum of what the blocks add. Operators that the same plan grafts
//! inside the blocks belong to the pair's student: they start as their graft says and learn through the pair's loss, so
//! that each parameter is trained by one student alone.

use super::assemble::grafted_config;
use super::plan::Assignment;
use super::settings::DistillConfig;
use super::student::{self, Net, Student};
use crate::autograd::{Graph, ParamId, ParamStore, Var};
use crate::error::{Error, Result};
use crate::models::dit::{Pair, Run};
use crate::models::sites::{SiteConfig, SiteModel};
use crate::nn::operators::Site;
use crate::nn::{Builder, Scheme};
use crate::tensor::Tensor;

/// A pair of blocks as its student runs it.
pub(super) struct PairNet {
    pair: Pair,
}

impl PairNet {
    /// What the pair adds to its input, where `condition [B, 1, D]` modulates the blocks.
    ///
    /// # Errors
    /// When there is no condition, or not that of this batch.
    pub fn forward(&self, g: &Graph<'_>, params: &ParamStore, input: &Var, condition: Option<&Tensor>) -> Result<Var> {
        let condition = condition.ok_or_else(|| {
            Error::failure("pair of blocks", "no condition to modulate with").must("that of the batch")
        })?;
        let run = (Run::default().semantics, false);
        self.pair.forward(g, params, input, &Var::constant(condition.clone()), run, None)
    }
}

/// The students of a plan: one for each pair, and one for each operator outside the pairs.
///
/// # Errors
/// An operator or a pair that does not fit the teacher, or too little memory.
pub(super) fn students<M: SiteModel>(
    teacher: &M,
    assignments: &[Assignment],
    config: &DistillConfig,
) -> Result<Vec<Student>> {
    let fresh = start(teacher, assignments, config)?;
    fresh.into_iter().map(|(own, params, net)| Student::assemble(own, params, net, config)).collect()
}

/// What [`students`] start from: their parameters, and what runs on them.
///
/// # Errors
/// As [`students`].
pub(super) fn start<M: SiteModel>(
    teacher: &M,
    assignments: &[Assignment],
    config: &DistillConfig,
) -> Result<Vec<(Assignment, ParamStore, Net)>> {
    let after = grafted_config(teacher.config(), assignments)?;
    let dims = teacher.config().dims();
    let begin = |unit: Vec<&Assignment>| {
        let own = unit[0];
        let (params, net) = match own.site {
            Site::BlockPair => begin_pair(teacher, &after, own, assignments, config)?,
            _ => student::initial(own, dims, teacher.params(), teacher.device(), config)?,
        };
        Ok((own.clone(), params, net))
    };
    units(assignments).into_iter().map(begin).collect()
}

/// What each student owns: a pair with the operators inside it, or an operator alone.
pub(super) fn units(assignments: &[Assignment]) -> Vec<Vec<&Assignment>> {
    let inside = |a: &Assignment, pair: &Assignment| {
        pair.site == Site::BlockPair && a.site != Site::BlockPair && pair.blocks().contains(&a.block)
    };
    let alone = assignments.iter().filter(|a| !assignments.iter().any(|pair| inside(a, pair)));
    let unit = |own| std::iter::once(own).chain(assignments.iter().filter(move |a| inside(a, own))).collect();
    alone.map(unit).collect()
}

fn begin_pair<M: SiteModel>(
    teacher: &M,
    after: &M::Config,
    own: &Assignment,
    assignments: &[Assignment],
    config: &DistillConfig,
) -> Result<(ParamStore, Net)> {
    let mut params = ParamStore::default();
    let mut builder = Builder::new(&mut params, teacher.device(), config.seed, Scheme::Torch);
    let pair = M::pair(after, own.block, &mut builder)?;
    let kept: Vec<(ParamId, ParamId)> =
        params.iter().filter_map(|(id, p)| Some((id, teacher.params().find(&p.name)?))).collect();
    for (id, found) in kept {
        // A grafted operator may have a parameter of the teacher's name in another shape: it is set below.
        let value = &teacher.params().get(found).value;
        if value.shape() == params.get(id).value.shape() {
            params.set(id, value.clone())?;
        }
    }
    let inside = |a: &&Assignment| a.site != Site::BlockPair && own.blocks().contains(&a.block);
    for a in assignments.iter().filter(inside) {
        // As it would start alone.
        let (alone, _) = student::initial(a, after.dims(), teacher.params(), teacher.device(), config)?;
        for (_, p) in alone.iter() {
            if let Some(id) = params.find(&p.name) {
                params.set(id, p.value.clone())?;
            }
        }
    }
    Ok((params, Net::Pair(Box::new(PairNet { pair }))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graft::plan::tests::plan;
    use crate::models::dit::{Dit, DitConfig};
    use crate::tensor::Device;

    #[test]
    fn a_pair_starts_as_its_blocks_and_takes_the_operators_inside() {
        let sizes = DitConfig { input_size: 4, in_channels: 1, classes: 3, ..DitConfig::plain(4, 8, 2) };
        let teacher = Dit::new(sizes, &Device::cpu(), 5).unwrap();
        let text = "[[graft]]\nsite = \"attn\"\nlayers = [1, 2]\noperator = { kind = \"hyena_x\" }\n\
                    [[graft]]\nsite = \"block-pair\"\nlayers = [1]\n";
        let assignments = plan(text).unwrap().resolve(&teacher.config).unwrap();
        let students = students(&teacher, &assignments, &DistillConfig::default()).unwrap();
        let names: Vec<String> = students.iter().map(|s| s.assignment.to_string()).collect();
        assert_eq!(names, ["blocks.1.attn", "pairs.1"]);
        let params = &students[1].params;
        let value = |name: &str| params.get(params.find(name).unwrap()).value.to_vec().unwrap();
        for (_, p) in params.iter().filter(|(_, p)| p.name.starts_with("blocks.3.")) {
            let theirs = teacher.params.get(teacher.params.find(&p.name).unwrap());
            assert_eq!(p.value.to_vec().unwrap(), theirs.value.to_vec().unwrap(), "{}", p.name);
        }
        let random = value("blocks.2.attn.in_proj.weight");
        assert!(random.iter().any(|v| *v != 0.0) && random.iter().all(|v| v.abs() <= 8f32.sqrt().recip()));
        let warm =
            plan(&text.replacen("}\n", "}\nstart = \"teacher\"\n", 1)).unwrap().resolve(&teacher.config).unwrap();
        let warm = &super::students(&teacher, &warm, &DistillConfig::default()).unwrap()[1].params;
        let taken = warm.get(warm.find("blocks.2.attn.in_proj.weight").unwrap()).value.to_vec().unwrap();
        let qkv = teacher.params.get(teacher.params.find("blocks.2.attn.qkv.weight").unwrap());
        assert_eq!(taken, qkv.value.to_vec().unwrap());
        let merge = value("pairs.1.merge.weight");
        assert_eq!(
            (merge.iter().filter(|v| **v == 1.0).count(), merge.iter().filter(|v| **v != 0.0).count()),
            (16, 16)
        );
        assert_eq!((merge[0], merge[8], merge[16 + 1], merge[16 + 9]), (1.0, 1.0, 1.0, 1.0));
    }
}
