//! The sampling loop: labels and seeds in, latents (or pixels) out.
//!
//! Image i of a request uses seed + i whatever the batch, so the result does not depend on batch size or threads.
//! Labelled and null halves run as one batch of 2B; without guidance there is no null half. After two warm-up steps
//! the loop allocates nothing: its tensors are made before it, operators recycle theirs through the device's pool.

use super::cfg;
use super::inpaint::{self, Known, Purpose};
use super::schedule::Schedule;
use super::solver::{NoiseScale, Plan, Sampler, Variance};
use crate::autograd::{Graph, Precision, Var};
use crate::backend::cpu::on_workers;
use crate::error::{Error, Result};
use crate::models::dit::{self, Dit, Run, Seen, Semantics};
use crate::nn::operators::Site;
use crate::ops::{contracts, philox, solver_step};
use crate::tensor::{DType, Device, MemoryPlan, Tensor};
use graft_kernels::rng::{LATENT_STREAM, image_seed, step_stream};

/// What to sample.
#[derive(Clone, Debug)]
pub struct Request {
    /// Class of every image.
    pub labels: Vec<i32>,
    /// Seed of the first image.
    pub seed: u64,
    /// Sampler.
    pub sampler: Sampler,
    /// Model evaluations per image.
    pub steps: usize,
    /// Scale of classifier-free guidance; 1 is none.
    pub guidance: f64,
    /// Leading channels that are guided; none for [`cfg::default_channels`].
    pub guided: Option<usize>,
    /// Images computed together.
    pub batch: usize,
    /// Arithmetic of the products.
    pub precision: Precision,
    /// Which implementation's details.
    pub semantics: Semantics,
    /// Starting noise `[n, C, S, S]` instead of that of the seeds.
    pub latents: Option<Tensor>,
    /// Pixels that are known; the rest is filled in.
    pub known: Option<Known>,
}

impl Request {
    /// DDIM, 20 steps, guidance 4, one image per label.
    pub fn new(labels: Vec<i32>, seed: u64) -> Request {
        Request {
            labels,
            seed,
            sampler: Sampler::Ddim { eta: 0.0 },
            steps: 20,
            guidance: 4.0,
            guided: None,
            batch: 16,
            precision: Precision::F32,
            semantics: Semantics::ORIGINAL,
            latents: None,
            known: None,
        }
    }
}

/// How far a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Images finished before the current batch.
    pub images: usize,
    /// Images in the current batch.
    pub batch: usize,
    /// Steps of the current batch that are done.
    pub step: usize,
}

/// Sees input and output of every site at every evaluation: `(block, site, input, output)`, each `[B or 2B, N, D]`.
pub type Watch<'w> = dyn FnMut(usize, Site, &Tensor, &Tensor) -> Result<()> + Send + 'w;

/// Samples all images of a request: `[n, C, S, S]`. `report` is called after every step.
///
/// # Errors
/// A usage error when a label, step count, batch, guidance or shape cannot be; a failure when memory runs out or the
/// result is not finite.
pub fn generate(model: &Dit, request: &Request, report: &mut (dyn FnMut(Progress) + Send)) -> Result<Tensor> {
    generate_watched(model, request, report, None)
}

/// [`generate`] that shows input and output of every site to `watch`.
///
/// # Errors
/// As [`generate`], and those of `watch`.
pub fn generate_watched(
    model: &Dit,
    request: &Request,
    report: &mut (dyn FnMut(Progress) + Send),
    mut watch: Option<&mut Watch<'_>>,
) -> Result<Tensor> {
    let c = &model.config;
    let plan = check(model, request)?;
    let (n, image) = (request.labels.len(), c.in_channels * c.input_size * c.input_size);
    let mut all = model.device().empty(&[n, c.in_channels, c.input_size, c.input_size])?;
    on_workers(|| -> Result<()> {
        let mut done = 0;
        for labels in request.labels.chunks(request.batch) {
            let mut batch = Batch::new(model, request, &plan, labels, done)?;
            for step in 0..plan.steps.len() {
                let rounds = request.known.as_ref().map_or(1, |known| known.rounds(&plan, step));
                for round in 0..rounds {
                    batch.step(step, round, watch.as_deref_mut())?;
                    batch.hold(step, round, round + 1 < rounds)?;
                }
                report(Progress { images: done, batch: labels.len(), step: step + 1 });
            }
            let made = batch.x.values()?;
            all.edit(|all| all[done * image..][..made.len()].copy_from_slice(&made))?;
            done += labels.len();
        }
        Ok(())
    })?;
    let bad = all.values()?.iter().copied().enumerate().find(|(_, v)| !v.is_finite());
    match bad {
        None => Ok(all),
        Some((at, value)) => Err(Error::failure("sampling", "the result is not finite")
            .is(format!("{value} in image {}", at / image.max(1)))
            .must("finite numbers")
            .fix("lower the guidance scale, or use more steps")),
    }
}

/// Plans the memory of a request before it runs, by running two of its steps on a device that only counts.
///
/// # Errors
/// As [`generate`].
pub fn plan_memory(model: &Dit, request: &Request) -> Result<MemoryPlan> {
    let device = model.device().dry_twin();
    let mut twin = Dit::unset(model.config.clone(), &device)?;
    if model.params.iter().any(|(_, p)| p.value.dtype() == DType::BF16) {
        dit::to_bf16(&mut twin)?;
    }
    device.trim();
    device.reset_peak();
    let mut plan = MemoryPlan::default();
    plan.add("weights", device.held());
    let before = device.held();
    generate(&twin, &Request { steps: request.steps.min(2), ..request.clone() }, &mut |_| {})?;
    plan.add_work("working", &device, before);
    Ok(plan)
}

fn check(model: &Dit, request: &Request) -> Result<Plan> {
    let c = &model.config;
    if request.labels.is_empty() {
        return Err(Error::usage("labels", "no images").is(0).must("at least 1"));
    }
    if let Some(label) = request.labels.iter().find(|&&l| l < 0 || l as usize >= c.classes) {
        return Err(Error::usage("class", "class out of range")
            .is(label)
            .must(format!("0 to {}", c.classes.saturating_sub(1))));
    }
    if request.batch == 0 {
        return Err(Error::usage("--batch", "no images in a batch").is(0).must("at least 1"));
    }
    if !request.guidance.is_finite() {
        return Err(Error::usage("--guidance-scale", "not a number").is(request.guidance).must("finite; 1 is none"));
    }
    if let Some(channels) = request.guided
        && (channels == 0 || channels > c.in_channels)
    {
        return Err(Error::usage("--cfg-channels", "out of range")
            .is(channels)
            .must(format!("1 to {}, or all", c.in_channels)));
    }
    let want = [request.labels.len(), c.in_channels, c.input_size, c.input_size];
    if let Some(latents) = &request.latents
        && latents.shape().dims() != want
    {
        return Err(Error::usage("--latents", "wrong shape").is(latents.shape()).must(format!("{want:?}")));
    }
    let variance = if c.learn_sigma { Variance::Learned } else { Variance::FixedSmall };
    let plan = request.sampler.plan(&Schedule::default(), request.steps, variance)?;
    if let Some(known) = &request.known {
        known.check(want, &plan)?;
    }
    Ok(plan)
}

/// Images that run together, with every tensor the loop writes to.
struct Batch<'a> {
    model: &'a Dit,
    plan: &'a Plan,
    request: &'a Request,
    graph: Graph<'a>,
    /// Seed of the first image of the batch.
    seed: u64,
    /// Number of the first image of the batch.
    first: usize,
    /// `[B, C, S·S]` current latents.
    x: Tensor,
    /// `[B, C, S·S]` clean estimate of the step before.
    x0: Option<Tensor>,
    /// `[B, C, S·S]` fresh noise, where the plan uses any or pixels are known.
    noise: Option<Tensor>,
    /// Images that the model sees.
    rows: usize,
    /// Timesteps of every step, `[B or 2B]` each.
    times: Vec<Tensor>,
    /// `[B or 2B]` labels, then null labels.
    labels: Tensor,
    /// Numbers of the images that the two halves have, where there are two: of both together, of the first and of the
    /// second.
    halves: Option<[Tensor; 3]>,
}

impl<'a> Batch<'a> {
    fn new(model: &'a Dit, request: &'a Request, plan: &'a Plan, labels: &[i32], first: usize) -> Result<Self> {
        let c = &model.config;
        let device = model.device();
        let (b, side) = (labels.len(), c.input_size);
        let flat = [b, c.in_channels, side * side];
        let seed = image_seed(request.seed, first as u64);
        let mut x = device.empty(&flat)?;
        match &request.latents {
            Some(given) => {
                let start = first * flat[1] * flat[2];
                let len = x.len();
                let given = given.values()?;
                x.edit(|x| x.copy_from_slice(&given[start..start + len]))?;
            }
            None => draw(&mut x, seed, LATENT_STREAM)?,
        }
        if let Some(known) = &request.known {
            let noise = x.copy()?;
            known.impose(first, &mut x, &noise, inpaint::level(plan, 0))?;
        }
        let guided = request.guidance != 1.0;
        let rows = if guided { 2 * b } else { b };
        let mut given: Vec<i32> = labels.to_vec();
        given.resize(rows, c.classes as i32);
        let times = plan.steps.iter().map(|s| fill(device, rows, s.timestep as f32)).collect::<Result<_>>()?;
        let numbers = |of: &dyn Fn(usize) -> usize, len: usize| {
            Tensor::from_i32(device, &[len], &(0..len).map(|i| of(i) as i32).collect::<Vec<_>>())
        };
        Ok(Batch {
            model,
            plan,
            request,
            graph: Graph::inference(request.precision),
            seed,
            first,
            x,
            x0: None,
            noise: if plan.needs_noise() || request.known.is_some() { Some(device.empty(&flat)?) } else { None },
            rows,
            times,
            labels: Tensor::from_i32(device, &[rows], &given)?,
            halves: match guided {
                true => Some([numbers(&|i| i % b, 2 * b)?, numbers(&|i| i, b)?, numbers(&|i| b + i, b)?]),
                false => None,
            },
        })
    }

    /// One evaluation of the model and the update that follows; `round` counts repetitions of a step.
    fn step(&mut self, index: usize, round: usize, watch: Option<&mut Watch<'_>>) -> Result<()> {
        let c = &self.model.config;
        let coefs = &self.plan.steps[index].coefs;
        let run = Run { semantics: self.request.semantics, checkpoint: false };
        let input = match &self.halves {
            None => self.x.clone(),
            Some([both, ..]) => cfg::pick(&self.x, both)?,
        };
        let input = Var::constant(input.into_shape(&[self.rows, c.in_channels, c.input_size, c.input_size])?);
        let (times, labels) = (&self.times[index], &self.labels);
        let out = match watch {
            None => self.model.forward(&self.graph, &input, times, labels, run)?,
            Some(watch) => {
                let mut observer =
                    |seen: &Seen<'_>| watch(seen.block, seen.site, seen.input.tensor(), seen.output.tensor());
                self.model.forward_observed(&self.graph, &input, times, labels, run, Some(&mut observer))?
            }
        };
        let out = out.into_tensor();
        let out = out.into_shape(&[self.rows, c.out_channels(), c.input_size * c.input_size])?;
        drop(input);
        let (cond, null) = match &self.halves {
            None => (out, None),
            Some([_, first, second]) => (cfg::pick(&out, first)?, Some(cfg::pick(&out, second)?)),
        };
        let noise = match &mut self.noise {
            Some(noise) if coefs.noise != NoiseScale::None => {
                let repeated = || inpaint::stream(index, round, Purpose::Solver);
                draw(noise, self.seed, if round == 0 { step_stream(index as u64) } else { repeated() })?;
                Some(&*noise)
            }
            _ => None,
        };
        let guided = self.request.guided.unwrap_or_else(|| cfg::default_channels(c));
        let params = coefs.params(self.request.guidance, guided);
        let previous = self.x0.as_ref().filter(|_| coefs.c1 != 0.0);
        let next = solver_step(&self.x, &cond, null.as_ref(), noise, previous, params)?;
        (self.x, self.x0) = (next.x_next, Some(next.x0));
        Ok(())
    }

    /// Puts the known pixels back after a step, at the level that it reached; and `again`: goes back up to the level
    /// that it started from.
    fn hold(&mut self, index: usize, round: usize, again: bool) -> Result<()> {
        let (Some(known), Some(noise)) = (&self.request.known, &mut self.noise) else { return Ok(()) };
        known.hold(self.plan, (index, round, again), (self.first, self.seed), &mut self.x, noise)
    }
}

/// Standard normal numbers of one stream for every image of a batch `[B, C, S·S]`, each from its own seed.
pub(super) fn draw(target: &mut Tensor, seed: u64, stream: u64) -> Result<()> {
    let (images, shape) = (target.dim(0), target.shape());
    // The operator's rows have the seeds of `image_seed`.
    let params = contracts::philox::Params { seed, stream, offset: 0 };
    let drawn = philox(target.device(), images, target.len() / images.max(1), params)?;
    *target = drawn.into_shape(shape.dims())?;
    Ok(())
}

pub(super) fn fill(device: &Device, rows: usize, value: f32) -> Result<Tensor> {
    let mut t = device.empty(&[rows])?;
    t.edit(|t| t.fill(value))?;
    Ok(t)
}

/// Pixels of a model that works on pixels in −1..1: `[n, C, H, W]` to bytes `[n, H, W, C]` by 127.5·x + 128, cut to
/// 0..255.
///
/// # Errors
/// When the values cannot be read.
pub fn to_pixels(images: &Tensor) -> Result<Vec<u8>> {
    let (c, plane) = (images.dim(1), images.dim(2) * images.dim(3));
    let mut bytes = Vec::with_capacity(images.len());
    for image in images.values()?.chunks((c * plane).max(1)) {
        for pixel in 0..plane {
            bytes
                .extend((0..c).map(|channel| (127.5 * image[channel * plane + pixel] + 128.0).clamp(0.0, 255.0) as u8));
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::dit::DitConfig;
    use graft_kernels::rng::Philox;

    /// A model whose every parameter is random, so that nothing is the identity.
    fn model() -> Dit {
        let config = DitConfig { patch: 2, input_size: 8, in_channels: 1, classes: 3, ..DitConfig::plain(2, 32, 4) };
        let mut model = Dit::new(config, &Device::cpu(), 7).unwrap();
        let ids: Vec<_> = model.params.iter().map(|(id, _)| id).collect();
        for id in ids {
            let mut value = model.params.get(id).value.copy().unwrap();
            Philox::new(3, 1000 + id.index() as u64).fill_normal(value.f32s_mut().unwrap());
            value.f32s_mut().unwrap().iter_mut().for_each(|v| *v *= 0.1);
            model.params.set(id, value).unwrap();
        }
        model
    }

    fn run(model: &Dit, request: &Request) -> Vec<u32> {
        generate(model, request, &mut |_| {}).unwrap().f32s().unwrap().iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn the_batch_size_changes_no_bit() {
        let model = model();
        for sampler in ["ddim", "ddpm", "dpm++"] {
            let request = |batch| Request {
                sampler: sampler.parse().unwrap(),
                steps: 4,
                batch,
                ..Request::new(vec![0, 1, 2, 1, 0], 11)
            };
            let one = run(&model, &request(1));
            for batch in [2, 3, 5, 64] {
                assert_eq!(one, run(&model, &request(batch)), "{sampler}, batch {batch}");
            }
        }
    }

    #[test]
    fn image_i_uses_seed_plus_i() {
        let model = model();
        let both = run(&model, &Request { steps: 3, ..Request::new(vec![2, 1], 5) });
        let second = run(&model, &Request { steps: 3, ..Request::new(vec![1], 6) });
        assert_eq!(both[64..], second);
    }

    #[test]
    fn guidance_one_is_the_model_alone() {
        let model = model();
        let request = |guidance| Request { guidance, steps: 3, ..Request::new(vec![1, 2], 5) };
        let alone = generate(&model, &request(1.0), &mut |_| {}).unwrap();
        // The limit of the guided path from both sides.
        for guidance in [1.0 - 1e-7, 1.0 + 1e-6] {
            let near = generate(&model, &request(guidance), &mut |_| {}).unwrap();
            for (a, b) in alone.f32s().unwrap().iter().zip(near.f32s().unwrap()) {
                assert!((a - b).abs() < 1e-3, "{a} {b}");
            }
        }
        assert_ne!(run(&model, &request(1.0)), run(&model, &request(3.0)));
    }

    #[test]
    fn given_latents_replace_the_noise() {
        let model = model();
        let mut latents = model.device().empty(&[2, 1, 64]).unwrap();
        draw(&mut latents, 9, LATENT_STREAM).unwrap();
        let latents = latents.into_shape(&[2, 1, 8, 8]).unwrap();
        let base = Request { steps: 3, ..Request::new(vec![0, 2], 9) };
        let given = Request { latents: Some(latents), seed: 1234, ..base.clone() };
        assert_eq!(run(&model, &base), run(&model, &given));
    }

    #[test]
    fn impossible_requests_are_named() {
        let model = model();
        let base = Request::new(vec![0], 0);
        let refuse = |request: Request, word: &str| {
            let e = generate(&model, &request, &mut |_| {}).unwrap_err();
            assert_eq!(e.exit_code(), 2);
            assert!(e.to_string().contains(word), "{e}");
        };
        refuse(Request { labels: vec![0, 3], ..base.clone() }, "class out of range; is 3; must be 0 to 2");
        refuse(Request { labels: vec![], ..base.clone() }, "no images");
        refuse(Request { steps: 0, ..base.clone() }, "wrong number of steps; is 0");
        refuse(Request { batch: 0, ..base.clone() }, "--batch");
        refuse(Request { guidance: f64::NAN, ..base.clone() }, "--guidance-scale");
        refuse(Request { guided: Some(2), ..base.clone() }, "--cfg-channels");
        let latents = Tensor::zeros(&Device::cpu(), &[1, 1, 4, 4]).unwrap();
        refuse(
            Request { latents: Some(latents), ..base },
            "--latents: wrong shape; is [1, 1, 4, 4]; must be [1, 1, 8, 8]",
        );
    }

    #[test]
    fn pixels_are_interleaved_and_cut() {
        let t = Tensor::from_f32(&Device::cpu(), &[1, 2, 1, 3], &[-1.0, 0.0, 1.0, -9.0, 0.5, 9.0]).unwrap();
        assert_eq!(to_pixels(&t).unwrap(), [0, 0, 128, 191, 255, 255]);
    }
}
