//! The sampling loop of a model that reads text: features and seeds in, latents out.
//!
//! Image i of a request uses seed + i whatever the batch. Keys and values of the texts are made once for all steps, and
//! so is what follows from the timesteps; where no step reads the variance, it is not computed.
//! The prompted and the null half run one after the other, so that a null text of one token costs no attention; guidance
//! and the solver are one operator in f32.

use super::inpaint::{self, Known, Purpose};
use super::pipeline::{Progress, draw, fill};
use super::schedule::Schedule;
use super::solver::{NoiseScale, Plan, Prediction, Sampler, Variance};
use crate::autograd::{Graph, Precision, Var};
use crate::backend::cpu::on_workers;
use crate::error::{Error, Result};
use crate::models::pixart::{Keys, MicroConditions, Moments, Outputs, PixArt, PixArtConfig, Run, Semantics, Text};
use crate::ops::solver_step;
use crate::tensor::{Device, MemoryPlan, Tensor};
use graft_kernels::rng::{LATENT_STREAM, image_seed, step_stream};

/// What to sample.
#[derive(Clone, Debug)]
pub struct Request {
    /// Features `[L, C]` of the prompt of every image.
    pub prompts: Vec<Tensor>,
    /// Features of what every image is guided away from; not read without guidance.
    pub nulls: Vec<Tensor>,
    /// Height and width of the latents.
    pub size: [usize; 2],
    /// Seed of the first image.
    pub seed: u64,
    /// Sampler.
    pub sampler: Sampler,
    /// Noise schedule of the model.
    pub schedule: Schedule,
    /// What the model predicts.
    pub prediction: Prediction,
    /// Model evaluations per image and half.
    pub steps: usize,
    /// Scale of classifier-free guidance; 1 is none.
    pub guidance: f64,
    /// Leading channels that are guided; all where not given.
    pub guided: Option<usize>,
    /// Images computed together.
    pub batch: usize,
    /// Arithmetic of the products.
    pub precision: Precision,
    /// Which implementation's details.
    pub semantics: Semantics,
    /// Starting noise `[n, C, h, w]` instead of that of the seeds.
    pub latents: Option<Tensor>,
    /// Latents `[n, C, h, w]` of pictures to begin with, and the share of the steps that change them, 0 to 1.
    pub start: Option<(Tensor, f64)>,
    /// Latents that are known; the rest is filled in.
    pub known: Option<Known>,
    /// Pixels along a side of a latent's pixel, for models that are told the size of the picture.
    pub factor: usize,
}

impl Request {
    /// DPM-Solver++ with 20 steps and guidance 4.5, an image for every prompt.
    pub fn new(prompts: Vec<Tensor>, nulls: Vec<Tensor>, size: [usize; 2], seed: u64) -> Request {
        Request {
            prompts,
            nulls,
            size,
            seed,
            sampler: Sampler::DpmPlusPlus { end: super::dpm::DpmEndPoint::Zero },
            schedule: Schedule::default(),
            prediction: Prediction::Noise,
            steps: 20,
            guidance: 4.5,
            guided: None,
            batch: 1,
            precision: Precision::F32,
            semantics: Semantics::Original,
            latents: None,
            start: None,
            known: None,
            factor: 8,
        }
    }

    fn is_guided(&self) -> bool {
        self.guidance != 1.0
    }
}

/// Sees the clean estimate `[B, C, h·w]` after a step.
pub type Watch<'w> = dyn FnMut(Progress, &Tensor) -> Result<()> + Send + 'w;

/// Samples all images of a request: `[n, C, h, w]` latents of the transformer. `watch` is called after every step.
///
/// # Errors
/// A usage error when a step count, batch, guidance or shape cannot be; a failure that names the step and the block
/// when a value is not finite, or when memory runs out.
pub fn generate(model: &PixArt, request: &Request, watch: &mut Watch<'_>) -> Result<Tensor> {
    let plan = check(model, request)?;
    let first = first_step(request, &plan);
    let [h, w] = request.size;
    let (n, image) = (request.prompts.len(), model.config.in_channels * h * w);
    let mut all = model.device().empty(&[n, model.config.in_channels, h, w])?;
    on_workers(|| -> Result<()> {
        let moments = moments(model, request, &plan)?;
        // Where looking at a value would wait for the device, only the result is looked at.
        let each = model.device().is_host();
        for done in (0..n).step_by(request.batch) {
            let x = Batch::new(model, request, (&plan, &moments), done, first)?.run(first, each, &mut *watch)?;
            if !model.device().is_dry() {
                let found = x.values()?;
                if !each && found.iter().any(|v| !v.is_finite()) {
                    // Once more, to say where that comes from.
                    let again = Batch::new(model, request, (&plan, &moments), done, first)?;
                    again.run(first, true, &mut |_, _| Ok(()))?;
                }
                all.edit(|all| all[done * image..][..found.len()].copy_from_slice(&found))?;
            }
        }
        Ok(())
    })?;
    Ok(all)
}

/// Plans the memory of a request before it runs on `on`, by running two of its steps on a device that only counts.
///
/// # Errors
/// As [`generate`].
pub fn plan_memory(config: &PixArtConfig, on: &Device, request: &Request) -> Result<MemoryPlan> {
    let device = on.dry_twin();
    let mut twin = PixArt::unset(config.clone(), &device)?;
    if request.precision == Precision::Bf16 {
        twin.round_to_bf16()?;
    }
    device.trim();
    device.reset_peak();
    let mut plan = MemoryPlan::default();
    plan.add("weights", device.held());
    let before = device.held();
    let on_dry =
        |texts: &[Tensor]| -> Result<Vec<Tensor>> { texts.iter().map(|t| device.empty(t.shape().dims())).collect() };
    let (prompts, nulls) = (on_dry(&request.prompts)?, on_dry(&request.nulls)?);
    // Two steps are as large as all of them.
    let request = Request { prompts, nulls, steps: request.steps.min(2), start: None, ..request.clone() };
    generate(&twin, &request, &mut |_, _| Ok(()))?;
    plan.add_work("working", &device, before);
    Ok(plan)
}

/// Steps that a request takes for each image.
///
/// # Errors
/// As [`generate`].
pub fn step_count(model: &PixArt, request: &Request) -> Result<usize> {
    let plan = check(model, request)?;
    Ok(plan.steps.len() - first_step(request, &plan))
}

/// The step that a picture to begin with enters at.
fn first_step(request: &Request, plan: &Plan) -> usize {
    let steps = plan.steps.len();
    request.start.as_ref().map_or(0, |(_, strength)| {
        let kept = ((steps as f64 * strength).round() as usize).clamp(1, steps);
        steps - kept
    })
}

fn check(model: &PixArt, request: &Request) -> Result<Plan> {
    let c = &model.config;
    if request.prompts.is_empty() {
        return Err(Error::usage("--prompt", "no images").must("at least one prompt"));
    }
    if request.batch == 0 {
        return Err(Error::usage("--batch", "no images at a time").is(0).must("at least 1"));
    }
    if !request.guidance.is_finite() {
        return Err(Error::usage("--guidance-scale", "not a number").is(request.guidance).must("finite; 1 is none"));
    }
    if request.is_guided() && request.nulls.len() != request.prompts.len() {
        return Err(Error::failure("guidance", "no null text for every prompt")
            .is(request.nulls.len())
            .must(request.prompts.len()));
    }
    if let Some(channels) = request.guided
        && (channels == 0 || channels > c.out_channels)
    {
        return Err(Error::usage("--cfg-channels", "out of range")
            .is(channels)
            .must(format!("1 to {}, or all", c.out_channels)));
    }
    c.grid(request.size[0], request.size[1])?;
    let want = [request.prompts.len(), c.in_channels, request.size[0], request.size[1]];
    for (name, tensor) in [("--latents", request.latents.as_ref()), ("picture", request.start.as_ref().map(|s| &s.0))] {
        if let Some(tensor) = tensor.filter(|t| t.shape().dims() != want) {
            return Err(Error::usage(name, "wrong shape").is(tensor.shape()).must(format!("{want:?}")));
        }
    }
    if let Some((_, strength)) = &request.start
        && !(*strength > 0.0 && *strength <= 1.0)
    {
        return Err(Error::usage("--strength", "out of range").is(strength).must("above 0, up to 1"));
    }
    let variance = if c.out_channels == 2 * c.in_channels { Variance::Learned } else { Variance::FixedSmall };
    let plan = request.sampler.plan(&request.schedule, request.steps, variance)?;
    if let Some(known) = &request.known {
        known.check(want, &plan)?;
    }
    Ok(plan)
}

/// What follows from the timesteps of a plan, for all of its steps.
fn moments(model: &PixArt, request: &Request, plan: &Plan) -> Result<Moments> {
    let (device, count, [h, w]) = (model.device(), plan.steps.len(), request.size);
    let times: Vec<f32> = plan.steps.iter().map(|step| step.timestep as f32).collect();
    let micro = match model.config.micro_conditions {
        false => None,
        true => {
            let pixels = [h, w].map(|side| (side * request.factor) as f32);
            let aspect = fill(device, count, h as f32 / w as f32)?;
            Some(MicroConditions { size: Tensor::from_f32(device, &[count, 2], &pixels.repeat(count))?, aspect })
        }
    };
    let outputs = if plan.needs_variance() { Outputs::All } else { Outputs::Noise };
    let graph = Graph::inference(request.precision);
    model.moments(&graph, &Tensor::from_f32(device, &[count], &times)?, micro.as_ref(), outputs)
}

/// Keys of the texts of a batch, each made on its own, so that they do not depend on the others.
fn keys<'m>(model: &'m PixArt, g: &Graph<'m>, texts: &[Tensor], constant: bool) -> Result<Keys> {
    let one = |features: &Tensor| {
        // Features may come from another device.
        let (shape, device) = ([1, features.dim(0), features.dim(1)], model.device());
        let features = Var::constant(match device.is_dry() {
            true => device.empty(&shape)?,
            false => Tensor::from_f32(device, &shape, &features.values()?)?,
        });
        model.keys(g, &Text { constant, ..Text::new(g, &features, None)? })
    };
    Keys::join(&texts.iter().map(one).collect::<Result<Vec<_>>>()?)
}

/// Images that run together.
struct Batch<'a> {
    model: &'a PixArt,
    plan: &'a Plan,
    request: &'a Request,
    graph: Graph<'a>,
    /// Number and seed of the first image, and how many there are.
    first: usize,
    seed: u64,
    count: usize,
    /// `[B, C, h·w]` current latents, and the clean estimate of the step before.
    x: Tensor,
    x0: Option<Tensor>,
    noise: Option<Tensor>,
    /// Keys of the prompts, and of what is guided away from.
    keys: Vec<Keys>,
    moments: &'a Moments,
}

impl<'a> Batch<'a> {
    fn new(
        model: &'a PixArt,
        request: &'a Request,
        (plan, moments): (&'a Plan, &'a Moments),
        first: usize,
        step: usize,
    ) -> Result<Self> {
        let (c, device, [h, w]) = (&model.config, model.device(), request.size);
        let count = request.batch.min(request.prompts.len() - first);
        let flat = [count, c.in_channels, h * w];
        let seed = image_seed(request.seed, first as u64);
        let start = first * flat[1] * flat[2];
        let mut x = device.empty(&flat)?;
        let len = x.len();
        match &request.latents {
            Some(given) => {
                let given = given.values()?;
                x.edit(|x| x.copy_from_slice(&given[start..start + len]))?;
            }
            None => draw(&mut x, seed, LATENT_STREAM)?,
        }
        if let Some((picture, _)) = &request.start {
            let (signal, sigma) = inpaint::level(plan, step);
            let picture = picture.values()?;
            let clean = &picture[start..start + len];
            x.edit(|x| x.iter_mut().zip(clean).for_each(|(x, clean)| *x = signal * clean + sigma * *x))?;
        }
        if let Some(known) = &request.known {
            let noise = x.copy()?;
            known.impose(first, &mut x, &noise, inpaint::level(plan, step))?;
        }
        let graph = Graph::inference(request.precision);
        let mut halves = vec![keys(model, &graph, &request.prompts[first..first + count], false)?];
        if request.is_guided() {
            // Decided by all images, so that the batch that an image is in changes nothing.
            let constant = request.nulls.iter().all(|null| null.dim(0) == 1);
            halves.push(keys(model, &graph, &request.nulls[first..first + count], constant)?);
        }
        let noisy = plan.needs_noise() || request.known.is_some();
        let noise = if noisy { Some(device.empty(&flat)?) } else { None };
        Ok(Batch { model, plan, request, graph, first, seed, count, x, x0: None, noise, keys: halves, moments })
    }

    /// The latents after all steps from `first` on; with `each`, every prediction is looked at.
    fn run(mut self, first: usize, each: bool, watch: &mut Watch<'_>) -> Result<Tensor> {
        for step in first..self.plan.steps.len() {
            let rounds = self.request.known.as_ref().map_or(1, |known| known.rounds(self.plan, step));
            for round in 0..rounds {
                self.step(step, round, each)?;
                self.hold(step, round, round + 1 < rounds)?;
            }
            if let Some(x0) = &self.x0 {
                watch(Progress { images: self.first, batch: self.count, step: step + 1 - first }, x0)?;
            }
        }
        Ok(self.x)
    }

    /// One evaluation of both halves and the update that follows; `round` counts repetitions of a step.
    fn step(&mut self, index: usize, round: usize, each: bool) -> Result<()> {
        let step = &self.plan.steps[index];
        let mut halves = Vec::with_capacity(2);
        for keys in &self.keys {
            halves.push(self.predict(keys, index, each)?);
        }
        let noise = match &mut self.noise {
            Some(noise) if step.coefs.noise != NoiseScale::None => {
                let repeated = || inpaint::stream(index, round, Purpose::Solver);
                draw(noise, self.seed, if round == 0 { step_stream(index as u64) } else { repeated() })?;
                Some(&*noise)
            }
            _ => None,
        };
        let channels = self.moments.channels();
        let guided = self.request.guided.map_or(channels, |guided| guided.min(channels));
        let params = step.coefs.for_prediction(self.request.prediction).params(self.request.guidance, guided);
        let previous = self.x0.as_ref().filter(|_| step.coefs.c1 != 0.0);
        // A picture that enters in the middle has no estimate before its first step.
        let params = match previous {
            None if step.coefs.c1 != 0.0 => first_order(step.coefs.c0, step.coefs.c1, params),
            _ => params,
        };
        let next = solver_step(&self.x, &halves[0], halves.get(1), noise, previous, params)?;
        (self.x, self.x0) = (next.x_next, Some(next.x0));
        Ok(())
    }

    /// The prediction of one half, `[B, Co, h·w]`.
    fn predict(&self, keys: &Keys, index: usize, look: bool) -> Result<Tensor> {
        let (c, [h, w]) = (&self.model.config, self.request.size);
        let x = Var::constant(self.x.reshape(&[self.count, c.in_channels, h, w])?);
        let run = Run { semantics: self.request.semantics, checkpoint: false };
        let at = (self.moments, index);
        let out = self.model.forward_at(&self.graph, &x, at, keys, run, None)?.into_tensor();
        if look && out.values()?.iter().any(|v| !v.is_finite()) {
            return Err(self.find_fault(&x, keys, index));
        }
        out.into_shape(&[self.count, self.moments.channels(), h * w])
    }

    /// Says where the first value that is not finite comes from.
    fn find_fault(&self, x: &Var, keys: &Keys, index: usize) -> Error {
        let place = |place: String, value: f32| {
            Error::failure(format!("step {} of {}, {place}", index + 1, self.plan.steps.len()), "value is not finite")
                .is(value)
                .must("finite")
                .fix("check the weights; lower the guidance scale, or use --dtype f32")
        };
        let mut watch = |block: usize, h: &Tensor| {
            let first = h.values()?.iter().copied().find(|v| !v.is_finite());
            first.map_or(Ok(()), |value| Err(place(format!("block {block}"), value)))
        };
        let run = Run { semantics: self.request.semantics, checkpoint: false };
        match self.model.forward_at(&self.graph, x, (self.moments, index), keys, run, Some(&mut watch)) {
            Err(e) => e,
            Ok(_) => place("last layer".into(), f32::NAN),
        }
    }

    /// Puts the known latents back after a step, at the level that it reached; and `again`: goes back up.
    fn hold(&mut self, index: usize, round: usize, again: bool) -> Result<()> {
        let (Some(known), Some(noise)) = (&self.request.known, &mut self.noise) else { return Ok(()) };
        known.hold(self.plan, (index, round, again), (self.first, self.seed), &mut self.x, noise)
    }
}

/// The step without the estimate before: both weights go to the present one.
fn first_order(
    c0: f64,
    c1: f64,
    params: crate::ops::contracts::solver_step::Params,
) -> crate::ops::contracts::solver_step::Params {
    crate::ops::contracts::solver_step::Params { c0: (c0 + c1) as f32, c1: 0.0, ..params }
}

#[cfg(test)]
mod tests {
    use super::*;
    use graft_kernels::rng::Philox;

    fn model() -> PixArt {
        let config = PixArtConfig {
            sample_size: 8,
            caption_channels: 12,
            in_channels: 2,
            out_channels: 4,
            ..PixArtConfig::plain(2, 24, 3)
        };
        let mut model = PixArt::new(config, &Device::cpu(), 7).unwrap();
        let ids: Vec<_> = model.params.iter().map(|(id, _)| id).collect();
        for id in ids {
            let mut value = model.params.get(id).value.copy().unwrap();
            Philox::new(3, 1000 + id.index() as u64).fill_normal(value.f32s_mut().unwrap());
            value.f32s_mut().unwrap().iter_mut().for_each(|v| *v *= 0.15);
            model.params.set(id, value).unwrap();
        }
        model
    }

    fn features(tokens: usize, seed: u64) -> Tensor {
        let mut t = Device::cpu().empty(&[tokens, 12]).unwrap();
        Philox::new(seed, 0).fill_normal(t.f32s_mut().unwrap());
        t
    }

    fn request(seed: u64) -> Request {
        let prompts = vec![features(3, 1), features(1, 2), features(5, 3)];
        Request { steps: 4, ..Request::new(prompts, vec![features(1, 9); 3], [4, 8], seed) }
    }

    fn run(model: &PixArt, request: &Request) -> Vec<u32> {
        let out = generate(model, request, &mut |_, _| Ok(())).unwrap();
        out.f32s().unwrap().iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn batches_change_no_bit_and_images_have_seeds() {
        let model = model();
        for sampler in ["ddim", "ddpm", "dpm++"] {
            let with = |batch| Request { sampler: sampler.parse().unwrap(), batch, ..request(11) };
            let one = run(&model, &with(1));
            assert_eq!(one, run(&model, &with(2)), "{sampler}");
            assert_eq!(one, run(&model, &with(3)), "{sampler}");
        }
        let all = run(&model, &request(11));
        let last = Request { prompts: vec![features(5, 3)], nulls: vec![features(1, 9)], ..request(13) };
        assert_eq!(all[128..], run(&model, &last));
    }

    /// A null text of one token, once by what attention to it always gives and once by attention.
    #[test]
    fn one_token_is_a_constant() {
        let model = model();
        let short = generate(&model, &request(5), &mut |_, _| Ok(())).unwrap();
        // Twice the same token: attention gives the same value without the shortcut.
        let mut twice = request(5);
        let token = features(1, 9).to_vec().unwrap();
        let pair = Tensor::from_f32(&Device::cpu(), &[2, 12], &[token.clone(), token].concat()).unwrap();
        twice.nulls = vec![pair; 3];
        let long = generate(&model, &twice, &mut |_, _| Ok(())).unwrap();
        for (a, b) in short.f32s().unwrap().iter().zip(long.f32s().unwrap()) {
            assert!((a - b).abs() <= 1e-4 * b.abs().max(1.0), "{a} {b}");
        }
        assert_ne!(run(&model, &request(5)), run(&model, &Request { guidance: 1.0, ..request(5) }));
    }

    #[test]
    fn pictures_to_begin_with_shorten_the_way() {
        let model = model();
        let picture = Tensor::from_f32(&Device::cpu(), &[3, 2, 4, 8], &[0.5; 192]).unwrap();
        let from = |strength| Request { start: Some((picture.clone(), strength)), ..request(4) };
        assert_eq!(step_count(&model, &from(0.5)).unwrap(), 2);
        assert_eq!(step_count(&model, &from(1.0)).unwrap(), 4);
        let mut seen = Vec::new();
        generate(&model, &from(0.25), &mut |p, _| {
            seen.push((p.images, p.step));
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, [(0, 1), (1, 1), (2, 1)]);
        assert!(step_count(&model, &from(0.0)).unwrap_err().to_string().contains("--strength"));
    }

    #[test]
    fn what_is_known_stays() {
        let model = model();
        let mut picture = vec![0.0; 192];
        Philox::new(8, 0).fill_normal(&mut picture);
        let mask: Vec<f32> = (0..192).map(|i| (i % 2) as f32).collect();
        let tensor = |v: &[f32]| Tensor::from_f32(&Device::cpu(), &[3, 2, 4, 8], v).unwrap();
        let known = Known { images: tensor(&picture), mask: tensor(&mask), rounds: 1 };
        let out = generate(&model, &Request { known: Some(known), ..request(4) }, &mut |_, _| Ok(())).unwrap();
        let out = out.f32s().unwrap();
        assert!((0..192).filter(|i| i % 2 == 1).all(|i| out[i] == picture[i]));
        assert!((0..192).filter(|i| i % 2 == 0).any(|i| out[i] != picture[i]));
    }

    #[test]
    fn a_value_that_is_not_finite_is_traced() {
        let mut model = model();
        let id = model.params.find("blocks.1.mlp.fc2.bias").unwrap();
        let mut value = model.params.get(id).value.copy().unwrap();
        value.f32s_mut().unwrap()[0] = f32::NAN;
        model.params.set(id, value).unwrap();
        let error = generate(&model, &request(4), &mut |_, _| Ok(())).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().starts_with("step 1 of 4, block 1: value is not finite; is NaN"), "{error}");
    }

    #[test]
    fn impossible_requests_are_named() {
        let model = model();
        let refuse = |request: Request, word: &str| {
            let e = generate(&model, &request, &mut |_, _| Ok(())).unwrap_err().to_string();
            assert!(e.contains(word), "{e}");
        };
        refuse(Request { size: [3, 8], ..request(0) }, "sides of a picture must be multiples of 16");
        refuse(Request { steps: 0, ..request(0) }, "wrong number of steps");
        refuse(Request { batch: 0, ..request(0) }, "--batch");
        refuse(Request { guidance: f64::NAN, ..request(0) }, "--guidance-scale");
        refuse(Request { nulls: vec![], ..request(0) }, "no null text");
        let wide = Tensor::zeros(&Device::cpu(), &[2, 5]).unwrap();
        refuse(Request { prompts: vec![wide; 3], ..request(0) }, "must be [B, T, 12]");
    }
}
