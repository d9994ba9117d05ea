//! Stage 1 of restructuring: two blocks in parallel learn to give what they gave in sequence.
//!
//! A pair is one regression unit (arXiv 2506.05340, §6). Its student owns both blocks, which start as they are in the
//! base, and the merge, which starts as the plain sum of what the blocks add. Operators that the same plan grafts
//! inside the blocks belong to the pair's student: they start afresh and learn through the pair's loss, so that each
//! parameter is trained by one student alone.

use super::assemble::grafted_config;
use super::plan::Assignment;
use super::settings::DistillConfig;
use super::student::{Net, Student};
use crate::autograd::{Graph, ParamId, ParamStore, Var};
use crate::error::{Error, Result};
use crate::models::dit::{Dit, DitConfig, Pair, Run};
use crate::nn::operators::Site;
use crate::nn::{Builder, Scheme};
use crate::tensor::Tensor;

/// A pair of blocks as its student runs it.
pub(super) struct PairNet {
    pair: Pair,
    condition: Option<Tensor>,
}

impl PairNet {
    /// The condition `[B, 1, D]` of the batch that comes next: blocks are modulated by it.
    pub fn condition(&mut self, condition: &Tensor) {
        self.condition = Some(condition.clone());
    }

    /// What the pair adds to its input.
    ///
    /// # Errors
    /// When the condition is not that of this batch.
    pub fn forward(&self, g: &Graph<'_>, params: &ParamStore, input: &Var) -> Result<Var> {
        let condition = self.condition.clone().ok_or_else(|| {
            Error::failure("pair of blocks", "no condition to modulate with").must("shown before the batch")
        })?;
        let run = (Run::default().semantics, false);
        self.pair.forward(g, params, input, &Var::constant(condition), run, None)
    }
}

/// The students of a plan: one for each pair, and one for each operator outside the pairs.
///
/// # Errors
/// An operator or a pair that does not fit the teacher, or too little memory.
pub(super) fn students(teacher: &Dit, assignments: &[Assignment], config: &DistillConfig) -> Result<Vec<Student>> {
    let after = grafted_config(&teacher.config, assignments)?;
    let alone = |a: &&Assignment| {
        let holds = |pair: &Assignment| pair.site == Site::BlockPair && pair.blocks().contains(&a.block);
        a.site == Site::BlockPair || !assignments.iter().any(holds)
    };
    let student = |a: &Assignment| match a.site {
        Site::BlockPair => pair_student(teacher, &after, a, assignments, config),
        _ => Student::new(a.clone(), teacher.config.block_dims(), &teacher.params, teacher.device(), config),
    };
    assignments.iter().filter(alone).map(student).collect()
}

fn pair_student(
    teacher: &Dit,
    after: &DitConfig,
    own: &Assignment,
    assignments: &[Assignment],
    config: &DistillConfig,
) -> Result<Student> {
    let mut params = ParamStore::default();
    let mut builder = Builder::new(&mut params, teacher.device(), config.seed, Scheme::Torch);
    let specs = [*own.blocks().start(), *own.blocks().end()].map(|block| &after.blocks[block]);
    let pair = Pair::build(own.block, specs, after.block_dims(), &mut builder)?;
    let fresh = |name: &str| assignments.iter().any(|a| a.site != Site::BlockPair && a.owns(name));
    let kept: Vec<(ParamId, ParamId)> = params
        .iter()
        .filter(|(_, p)| !fresh(&p.name))
        .filter_map(|(id, p)| Some((id, teacher.params.find(&p.name)?)))
        .collect();
    for (id, found) in kept {
        params.set(id, teacher.params.get(found).value.clone())?;
    }
    Student::assemble(own.clone(), params, Net::Pair(Box::new(PairNet { pair, condition: None })), config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graft::plan::tests::plan;
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
        let merge = value("pairs.1.merge.weight");
        assert_eq!(
            (merge.iter().filter(|v| **v == 1.0).count(), merge.iter().filter(|v| **v != 0.0).count()),
            (16, 16)
        );
        assert_eq!((merge[0], merge[8], merge[16 + 1], merge[16 + 9]), (1.0, 1.0, 1.0, 1.0));
    }
}
