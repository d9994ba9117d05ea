//! Peak memory of the two stages, found by rehearsing them on a device that only counts: the same code, no arithmetic.

use super::assemble;
use super::distill::Distiller;
use super::finetune::{Finetuner, Start};
use super::parts::Part;
use super::plan::{Assignment, Plan};
use super::source::RunSource;
use super::student::Lesson;
use crate::error::Result;
use crate::io::system;
use crate::models::sites::{SiteConfig, SiteModel};
use crate::nn::operators::Site;
use crate::tensor::{Device, MemoryPlan, Tensor};
use crate::train::batches::Batches;
use crate::train::optimizer::AdamW;
use crate::train::sites::SiteLearner;

/// Updates of a rehearsal: the second still finds buffers of new sizes where the first had gradients to keep.
const UPDATES: u64 = 3;

/// Memory of each operator thread for its stack and what kernels pack their operands into.
const PER_THREAD: usize = 4 << 20;

/// What is resident where the system does not say: the program without its data.
const PROGRAM: usize = 16 << 20;

/// What this process takes besides the stages, now that the data is read and before they begin.
pub fn program<D: RunSource>(data: &D, device: &Device) -> usize {
    let images = [data.train(), data.held_out()].map(D::Model::bytes);
    let resident = system::resident().map_or(PROGRAM + images.iter().sum::<usize>(), |r| r - device.held().min(r));
    resident + rayon::current_num_threads() * PER_THREAD
}

/// Plans of stage 1 (all of it, or a part) and stage 2 in a process that takes `program` bytes besides. The layers of
/// the plan must have been chosen.
///
/// # Errors
/// A base model that cannot be described, or a plan that does not fit it.
pub fn plan<D: RunSource>(plan: &Plan, part: Option<Part>, program: usize) -> Result<[MemoryPlan; 2]> {
    let base = D::Model::describe(&plan.base)?;
    let assignments = plan.resolve(&base)?;
    let own = part.map_or(Ok(assignments.clone()), |part| part.choose(&assignments))?;
    Ok([distill::<D>(plan, &base, &own, program)?, finetune::<D>(plan, &base, &assignments, program)?])
}

type ConfigOf<D> = <<D as RunSource>::Model as SiteModel>::Config;

fn distill<D: RunSource>(
    plan: &Plan,
    base: &ConfigOf<D>,
    assignments: &[Assignment],
    program: usize,
) -> Result<MemoryPlan> {
    let (config, device) = (&plan.distill, Device::dry());
    let teacher = D::Model::unset(base.clone(), &device)?;
    let mut distiller = Distiller::homeless(&teacher, assignments, config)?;
    let sites: Vec<&AdamW> = distiller.students.iter().map(|s| &s.optimiser).collect();
    let mut found = MemoryPlan::default();
    found.add("program and data", program);
    let optimiser = sites.iter().map(|o| state(o, false)).sum();
    found.add("parameters", device.held() - optimiser);
    found.add("optimiser", optimiser);
    drop(distiller.initial_model()?);
    let before = device.memory().live;
    let images = D::Model::blank(base, config.batch);
    let mut batches = Batches::new(&images, config.batch, config.seed)?;
    device.reset_peak();
    distiller.teach(&mut batches, 0, &mut |_, _| Ok(()))?;
    let activations = device.memory().peak - before;
    found.add("activations of the teacher", activations);
    distiller.residuals(&images)?;
    for _ in 0..UPDATES {
        match &config.cache {
            None => distiller.update(&mut batches).map(drop)?,
            Some(_) => learn_from_cache(&mut distiller, base, config.batch, &device)?,
        }
    }
    found.add_work("tape and gradients", &device, before + activations);
    Ok(found)
}

/// An update that reads its lessons instead of running the teacher.
fn learn_from_cache<M: SiteLearner>(
    distiller: &mut Distiller<'_, M>,
    base: &M::Config,
    batch: usize,
    device: &Device,
) -> Result<()> {
    let dims = base.dims();
    let tokens = |rows: usize| device.empty(&[batch, rows, dims.width]);
    for student in &mut distiller.students {
        let (input, target, gates) = (tokens(dims.tokens())?, tokens(dims.tokens())?, tokens(1)?);
        let gate = (student.assignment.site != Site::BlockPair).then_some((&gates, 0));
        student.learn(&Lesson { input: &input, target: &target, gate, condition: Some(&gates) }, 0.0)?;
    }
    Ok(())
}

fn finetune<D: RunSource>(
    plan: &Plan,
    base: &ConfigOf<D>,
    assignments: &[Assignment],
    program: usize,
) -> Result<MemoryPlan> {
    let (config, device) = (&plan.finetune, Device::dry());
    let grafted = D::Model::unset(assemble::grafted_config(base, assignments)?, &device)?;
    let teacher = if config.needs_base() { Some(D::Model::unset(base.clone(), &device)?) } else { None };
    let mut finetuner = Finetuner::homeless(Start { grafted, sites: assignments, base: teacher }, config)?;
    let moments = state(finetuner.trainer_mut().optimiser(), false);
    let average = state(finetuner.trainer_mut().optimiser(), true);
    let mut found = MemoryPlan::default();
    found.add("program and data", program);
    found.add("parameters", device.held() - moments - average);
    found.add("optimiser", moments);
    found.add("moving average", average);
    let before = device.memory().live;
    let images = D::Model::blank(base, config.batch);
    let mut batches = Batches::new(&images, config.batch, config.seed)?;
    device.reset_peak();
    for _ in 0..UPDATES {
        finetuner.trainer_mut().update(&mut batches)?;
    }
    drop(finetuner.model()?);
    found.add_work("tape and gradients", &device, before);
    Ok(found)
}

/// Bytes of the moving averages, or of the moments.
fn state(optimiser: &AdamW, average: bool) -> usize {
    let states = optimiser.slots().iter().flat_map(|slot| slot.states());
    states.filter(|(kind, _)| (*kind == "ema") == average).map(|(_, t): (_, &Tensor)| t.bytes()).sum()
}
