//! Peak memory of the two stages, found by rehearsing them on a device that only counts: the same code, no arithmetic.

use super::assemble;
use super::distill::Distiller;
use super::parts::Part;
use super::plan::{Assignment, Plan};
use super::run::RunData;
use super::student::Lesson;
use crate::error::Result;
use crate::io::datasets::ImageSet;
use crate::io::system;
use crate::models::dit::{self, Dit, DitConfig};
use crate::nn::operators::Site;
use crate::tensor::{Device, MemoryPlan, Tensor};
use crate::train::batches::Batches;
use crate::train::optimizer::AdamW;
use crate::train::trainer::Trainer;

/// Updates of a rehearsal: the second still finds buffers of new sizes where the first had gradients to keep.
const UPDATES: u64 = 3;

/// Memory of each operator thread for its stack and what kernels pack their operands into.
const PER_THREAD: usize = 4 << 20;

/// What is resident where the system does not say: the program without its data.
const PROGRAM: usize = 16 << 20;

/// What this process takes besides the stages, now that the data is read and before they begin.
pub fn program(data: &RunData, device: &Device) -> usize {
    let images = [&data.train, &data.held_out].map(|set| set.pixels.len() + set.labels.len());
    let resident = system::resident().map_or(PROGRAM + images.iter().sum::<usize>(), |r| r - device.held().min(r));
    resident + rayon::current_num_threads() * PER_THREAD
}

/// Plans of stage 1 (all of it, or a part) and stage 2 in a process that takes `program` bytes besides. The layers of
/// the plan must have been chosen.
///
/// # Errors
/// A base model that cannot be described, or a plan that does not fit it.
pub fn plan(plan: &Plan, part: Option<Part>, program: usize) -> Result<[MemoryPlan; 2]> {
    let base = dit::describe(&plan.base)?;
    let assignments = plan.resolve(&base)?;
    let own = part.map_or(Ok(assignments.clone()), |part| part.choose(&assignments))?;
    Ok([distill(plan, &base, &own, program)?, finetune(plan, &base, &assignments, program)?])
}

fn distill(plan: &Plan, base: &DitConfig, assignments: &[Assignment], program: usize) -> Result<MemoryPlan> {
    let (config, device) = (&plan.distill, Device::dry());
    let teacher = Dit::unset(base.clone(), &device)?;
    let mut distiller = Distiller::homeless(&teacher, assignments, config)?;
    let sites: Vec<&AdamW> = distiller.students.iter().map(|s| &s.optimiser).collect();
    let mut found = MemoryPlan::default();
    found.add("program and data", program);
    let optimiser = sites.iter().map(|o| state(o, false)).sum();
    found.add("parameters", device.held() - optimiser);
    found.add("optimiser", optimiser);
    drop(distiller.initial_model()?);
    let before = device.memory().live;
    let images = blank(base, config.batch);
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
fn learn_from_cache(distiller: &mut Distiller<'_>, base: &DitConfig, batch: usize, device: &Device) -> Result<()> {
    let tokens = |rows: usize| device.empty(&[batch, rows, base.width]);
    for student in &mut distiller.students {
        let (input, target, gates) = (tokens(base.tokens())?, tokens(base.tokens())?, tokens(1)?);
        let gate = (student.assignment.site != Site::BlockPair).then_some((&gates, 0));
        student.learn(&Lesson { input: &input, target: &target, gate, condition: Some(&gates) }, 0.0)?;
    }
    Ok(())
}

fn finetune(plan: &Plan, base: &DitConfig, assignments: &[Assignment], program: usize) -> Result<MemoryPlan> {
    let (config, device) = (&plan.finetune, Device::dry());
    let model = Dit::unset(assemble::grafted_config(base, assignments)?, &device)?;
    let mut found = MemoryPlan::default();
    found.add("program and data", program);
    found.add("parameters", model.params.bytes());
    let mut trainer = Trainer::homeless(model, config.optimizer, config.loop_settings())?;
    found.add("optimiser", state(trainer.optimiser(), false));
    found.add("moving average", state(trainer.optimiser(), true));
    let before = device.memory().live;
    let images = blank(base, config.batch);
    let mut batches = Batches::new(&images, config.batch, config.seed)?;
    device.reset_peak();
    for _ in 0..UPDATES {
        trainer.update(&mut batches)?;
    }
    drop(trainer.averaged()?);
    found.add_work("tape and gradients", &device, before);
    Ok(found)
}

/// Bytes of the moving averages, or of the moments.
fn state(optimiser: &AdamW, average: bool) -> usize {
    let states = optimiser.slots().iter().flat_map(|slot| slot.states());
    states.filter(|(kind, _)| (*kind == "ema") == average).map(|(_, t): (_, &Tensor)| t.bytes()).sum()
}

/// As many images as a batch needs.
fn blank(base: &DitConfig, n: usize) -> ImageSet {
    let (channels, side) = (base.in_channels, base.input_size);
    let pixels = vec![0; n * channels * side * side];
    ImageSet { n, channels, height: side, width: side, pixels, labels: vec![0; n], class_names: Vec::new() }
}
