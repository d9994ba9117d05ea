//! Synthetic pairs: a base model draws the data of its own graft, as the published PixArt-Σ graft was trained.
//!
//! Texts are encoded first, so that encoder and transformer need not be in memory together. Shards are written one by
//! one and appear whole: a call that was killed, or ran out of disk, leaves what it has finished, and the next one
//! makes what is missing. Latent i starts from seed + i, whatever shard or batch it is in.

mod settings;

pub use settings::SynthesizeConfig;

use crate::autograd::Precision;
use crate::error::{Error, Result};
use crate::io::atomic::{RunLock, ensure_writable_dir, remove_leftovers};
use crate::io::system;
use crate::models::pixart::{PixArt, Semantics};
use crate::sample::schedule::Schedule;
use crate::sample::solver::{Prediction, Sampler};
use crate::sample::text::{self, Request};
use crate::tensor::{Device, Tensor};
use crate::train::pairs::{self, ABOUT, About, Half, ShardTexts};
use graft_kernels::rng::image_seed;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// How latents are drawn.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// Sampler.
    pub sampler: Sampler,
    /// Noise schedule of the model.
    pub schedule: Schedule,
    /// What the model predicts.
    pub prediction: Prediction,
    /// Model evaluations per latent and half.
    pub steps: usize,
    /// Scale of classifier-free guidance.
    pub guidance: f64,
    /// Latents computed together.
    pub batch: usize,
    /// Arithmetic of the products.
    pub precision: Precision,
    /// Which implementation's details.
    pub semantics: Semantics,
}

/// What is being made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress {
    /// Shards of text features: done, and to be made.
    Texts(usize, usize),
    /// Sampling steps of latents: done, and to be made.
    Latents(u64, u64),
    /// A shard of latents is written.
    Shard(usize),
}

/// Receives progress; breaking stops after the shard at hand.
pub type Report<'r> = dyn FnMut(Progress) -> ControlFlow<()> + Send + 'r;

/// Encodes prompts: features `[L, C]` of each, and of the null text.
pub type Encode<'e> = dyn FnMut(&[String]) -> Result<(Vec<Tensor>, Tensor)> + 'e;

/// A folder of pairs in the making, held by this process.
#[derive(Debug)]
pub struct Synthesis {
    folder: PathBuf,
    about: About,
    _lock: RunLock,
}

impl Synthesis {
    /// Begins a folder, or goes on with it.
    ///
    /// # Errors
    /// A folder that cannot be written, that another process uses, or that holds other pairs; too little free space
    /// for the latents.
    pub fn begin(folder: &Path, about: About) -> Result<Synthesis> {
        ensure_writable_dir(folder)?;
        let lock = RunLock::acquire(folder)?;
        remove_leftovers(folder)?;
        match About::read(folder)? {
            None => about.write(folder)?,
            Some(found) if found == about => {}
            Some(found) => {
                let (field, is, must) = differing(&found, &about);
                return Err(Error::usage(
                    folder.join(ABOUT).display().to_string(),
                    format!("holds other pairs ({field})"),
                )
                .is(is)
                .must(must)
                .fix("use another folder, or the settings that these pairs were begun with"));
            }
        }
        let made = Synthesis { folder: folder.to_path_buf(), about, _lock: lock };
        let missing = (0..made.about.shards()).filter(|shard| !Half::Latents.path(folder, *shard).is_file());
        let pairs: usize = missing.map(|shard| made.about.range(shard).len()).sum();
        made.check_space(pairs, system::free_space(folder)?)?;
        Ok(made)
    }

    fn check_space(&self, pairs: usize, free: Option<u64>) -> Result<()> {
        let element = if self.about.dtype == "bf16" { 2 } else { 4 };
        let needed = (pairs * self.about.latent.iter().product::<usize>() * element) as u64;
        let Some(free) = free.filter(|free| *free < needed) else { return Ok(()) };
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        Err(Error::failure(self.folder.display().to_string(), "the disk is too small for the latents")
            .is(format!("{:.1} MiB free", mib(free)))
            .must(format!("{:.1} MiB for {pairs} of them, and more for the texts", mib(needed)))
            .fix("free disk space or choose another disk; what is there stays, and the same command goes on"))
    }

    /// Shards that lack a half. Those that are there are checked to the last byte.
    ///
    /// # Errors
    /// A file that is damaged, or of other pairs.
    pub fn missing(&self, half: Half) -> Result<Vec<usize>> {
        let mut missing = Vec::new();
        for shard in 0..self.about.shards() {
            match half.path(&self.folder, shard).is_file() {
                true => drop(pairs::open(&self.about, &self.folder, half, shard)?),
                false => missing.push(shard),
            }
        }
        Ok(missing)
    }

    /// Encodes the texts of `shards`; returns whether `report` let it finish.
    ///
    /// # Errors
    /// Those of `encode`, features of another width, or a full disk: what is written stays.
    pub fn encode(
        &self,
        shards: &[usize],
        prompts: &[String],
        encode: &mut Encode<'_>,
        report: &mut Report<'_>,
    ) -> Result<bool> {
        for (done, shard) in shards.iter().enumerate() {
            if report(Progress::Texts(done, shards.len())).is_break() {
                return Ok(false);
            }
            let prompts = prompts.get(self.about.range(*shard)).unwrap_or_default().to_vec();
            let (features, null) = encode(&prompts)?;
            if let Some(wrong) = features.iter().chain([&null]).find(|f| f.dim(1) != self.about.features) {
                return Err(Error::failure("text encoder", "does not belong to the transformer")
                    .is(format!("features of {}", wrong.dim(1)))
                    .must(self.about.features));
            }
            pairs::write_texts(&self.about, &self.folder, *shard, &ShardTexts { prompts, features, null })?;
        }
        Ok(true)
    }

    /// Draws the latents of `shards`, whose texts are there; returns whether `report` let it finish.
    ///
    /// # Errors
    /// A value that is not finite, naming step and block, or a full disk: what is written stays.
    pub fn draw(&self, shards: &[usize], model: &PixArt, how: &Sampling, report: &mut Report<'_>) -> Result<bool> {
        let (about, steps) = (&self.about, how.steps as u64);
        let total = steps * shards.iter().map(|shard| about.range(*shard).len() as u64).sum::<u64>();
        let mut drawn = 0;
        for shard in shards {
            let range = about.range(*shard);
            let request = self.request(*shard, model.device(), how)?;
            let latents = text::generate(model, &request, &mut |p, _| {
                let done = drawn + (p.images * how.steps + p.batch * p.step) as u64;
                let _ = report(Progress::Latents(done, total));
                Ok(())
            })?;
            pairs::write_latents(about, &self.folder, *shard, &latents)?;
            drawn += steps * range.len() as u64;
            if report(Progress::Shard(*shard)).is_break() {
                return Ok(Some(shard) == shards.last());
            }
        }
        Ok(true)
    }

    fn request(&self, shard: usize, device: &Device, how: &Sampling) -> Result<Request> {
        let about = &self.about;
        let texts = pairs::read_texts(about, &self.folder, shard, device)?;
        let nulls = vec![texts.null; texts.features.len()];
        let [_, height, width] = about.latent;
        let seed = image_seed(about.seed, about.range(shard).start as u64);
        Ok(Request {
            sampler: how.sampler,
            schedule: how.schedule.clone(),
            prediction: how.prediction,
            steps: how.steps,
            guidance: how.guidance,
            batch: how.batch,
            precision: how.precision,
            semantics: how.semantics,
            factor: about.factor,
            ..Request::new(texts.features, nulls, [height, width], seed)
        })
    }
}

/// The first field in which two descriptions differ.
fn differing(found: &About, wanted: &About) -> (String, String, String) {
    let [found, wanted] = [found, wanted].map(|about| serde_json::json!(about));
    let fields = wanted.as_object().into_iter().flatten();
    let differ = fields.filter(|(key, value)| found[key.as_str()] != **value);
    let first = differ.map(|(key, value)| (key.clone(), found[key.as_str()].to_string(), value.to_string())).next();
    first.unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::io::files::{self, test_dir};
    use crate::models::pixart::PixArtConfig;
    use crate::train::pairs::Pairs;
    use graft_kernels::rng::Philox;

    /// A small model of pictures of 8 × 8 pixels that reads features of 12.
    pub fn model(depth: usize) -> PixArt {
        let config = PixArtConfig {
            sample_size: 8,
            interpolation: 0.125,
            in_channels: 3,
            out_channels: 3,
            caption_channels: 12,
            max_tokens: 6,
            ..PixArtConfig::plain(depth, 24, 3)
        };
        PixArt::random(config, &Device::cpu(), 4).unwrap()
    }

    /// Features of a prompt: drawn from its length and first letter, a token a word.
    pub fn encode(prompts: &[String]) -> Result<(Vec<Tensor>, Tensor)> {
        let draw = |tokens: usize, seed: u64| {
            let mut values = vec![0.0; tokens * 12];
            Philox::new(seed, 0).fill_normal(&mut values);
            Tensor::from_f32(&Device::cpu(), &[tokens, 12], &values)
        };
        let one = |text: &String| {
            let first = u64::from(text.bytes().next().unwrap_or(0));
            draw(text.split(' ').count(), 1000 * first + text.len() as u64)
        };
        Ok((prompts.iter().map(one).collect::<Result<_>>()?, draw(1, 7)?))
    }

    pub fn prompts(n: usize) -> Vec<String> {
        (0..n).map(|i| format!("{} thing{}", char::from(b'a' + (i % 26) as u8), " more".repeat(i % 3))).collect()
    }

    pub fn about(count: usize) -> About {
        About {
            transformer: "t".into(),
            prompts: "p".into(),
            count,
            shard: 3,
            latent: [3, 8, 8],
            features: 12,
            factor: 1,
            seed: 5,
            sampling: "s".into(),
            dtype: "f32".into(),
            prediction: Prediction::Noise,
        }
    }

    pub fn sampling() -> Sampling {
        Sampling {
            sampler: "ddim".parse().unwrap(),
            schedule: Schedule::default(),
            prediction: Prediction::Noise,
            steps: 2,
            guidance: 2.0,
            batch: 2,
            precision: Precision::F32,
            semantics: Semantics::Original,
        }
    }

    /// Makes what is missing; stops after so many shards of latents.
    pub fn make(folder: &Path, about: About, model: &PixArt, stop: usize) -> Result<bool> {
        let made = Synthesis::begin(folder, about)?;
        let prompts = prompts(made.about.count);
        made.encode(&made.missing(Half::Texts)?, &prompts, &mut encode, &mut |_| ControlFlow::Continue(()))?;
        let mut left = stop;
        made.draw(&made.missing(Half::Latents)?, model, &sampling(), &mut |p| {
            left -= usize::from(matches!(p, Progress::Shard(_)));
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    }

    fn bytes(folder: &Path) -> Vec<(String, Vec<u8>)> {
        let all = files::list(folder).unwrap();
        let kept = all.into_iter().filter(|p| !files::file_name(p).starts_with('.'));
        kept.map(|p| (files::file_name(&p), files::read_bytes(&p).unwrap())).collect()
    }

    #[test]
    fn a_call_that_was_stopped_goes_on_to_the_same_bytes() {
        let (dir, model) = (test_dir("synthesize"), model(2));
        assert!(make(&dir.join("whole"), about(8), &model, 99).unwrap());
        let parts = dir.join("parts");
        assert!(!make(&parts, about(8), &model, 1).unwrap());
        // What a kill leaves half-written is cleared away, and an incomplete folder is no data.
        std::fs::write(parts.join(".latents-00001.safetensors.1-0.tmp"), b"half").unwrap();
        let error = Pairs::open(&parts).unwrap_err().to_string();
        assert!(error.contains("latents-00001.safetensors: missing shard"), "{error}");
        let begun = bytes(&parts);
        assert!(make(&parts, about(8), &model, 99).unwrap());
        let all = bytes(&parts);
        assert_eq!(all, bytes(&dir.join("whole")));
        assert!(begun.iter().filter(|(name, _)| !name.starts_with('.')).all(|file| all.contains(file)));
        assert_eq!(all.len(), 7);
        let pairs = Pairs::open(&parts).unwrap();
        assert_eq!((pairs.len(), pairs.prompt(4), pairs.seed(4)), (8, "e thing more".to_string(), 9));
        assert_eq!(pairs.text(4, &Device::cpu()).unwrap().dim(0), 3);
        let [train, held_out] = pairs.split().unwrap();
        assert_eq!((train.len(), held_out.len(), held_out.prompt(0)), (7, 1, prompts(8)[7].clone()));
    }

    #[test]
    fn a_latent_depends_on_its_number_alone() {
        let (dir, model) = (test_dir("synthesize_seeds"), model(1));
        make(&dir.join("all"), about(5), &model, 99).unwrap();
        let all = pairs::open(&about(5), &dir.join("all"), Half::Latents, 1).unwrap();
        // Pair 4, alone.
        let (text, null) = encode(&prompts(5)[4..]).unwrap();
        let alone = Request {
            sampler: "ddim".parse().unwrap(),
            steps: 2,
            guidance: 2.0,
            factor: 1,
            ..Request::new(text, vec![null], [8, 8], 9)
        };
        let alone = text::generate(&model, &alone, &mut |_, _| Ok(())).unwrap();
        let found = all.get("latents").unwrap().to_f32().unwrap();
        assert_eq!(found[192..], alone.to_vec().unwrap());
    }

    #[test]
    fn what_is_wrong_is_named_and_nothing_is_lost() {
        let (dir, model) = (test_dir("synthesize_bad"), model(1));
        let folder = dir.join("pairs");
        make(&folder, about(5), &model, 99).unwrap();
        let before = bytes(&folder);
        let other = About { seed: 6, ..about(5) };
        let error = make(&folder, other, &model, 99).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("pairs.json: holds other pairs (seed); is 5; must be 6"), "{error}");
        let _held = Synthesis::begin(&folder, about(5)).unwrap();
        let error = make(&folder, about(5), &model, 99).unwrap_err().to_string();
        assert!(error.contains("run folder is in use"), "{error}");
        let error = _held.check_space(4, Some(3000)).unwrap_err().to_string();
        assert!(error.contains("the disk is too small for the latents; is 0.0 MiB free"), "{error}");
        assert!(_held.check_space(4, Some(3072)).is_ok() && _held.check_space(4, None).is_ok());
        drop(_held);
        assert_eq!(bytes(&folder), before);
        let (last, path) = (before.len() - 1, Half::Texts.path(&folder, 1));
        assert!(before[last].0.starts_with("texts-00001"));
        let mut damaged = before[last].1.clone();
        *damaged.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        for error in [make(&folder, about(5), &model, 99).unwrap_err(), Pairs::open(&folder).unwrap_err()] {
            assert!(error.to_string().contains("texts-00001.safetensors: damaged shard"), "{error}");
        }
        std::fs::write(&path, &damaged[..40]).unwrap();
        assert!(Pairs::open(&folder).unwrap_err().to_string().contains("texts-00001"));
        std::fs::remove_file(&path).unwrap();
        make(&folder, about(5), &model, 99).unwrap();
        assert_eq!(bytes(&folder), before);
        let error = Pairs::open(&dir.join("none")).unwrap_err().to_string();
        assert!(error.contains("no pairs; is no pairs.json"), "{error}");
    }

    #[test]
    fn a_latent_that_is_not_finite_is_never_written() {
        let (dir, mut model) = (test_dir("synthesize_nan"), model(1));
        let id = model.params.find("blocks.0.mlp.fc2.bias").unwrap();
        let mut value = model.params.get(id).value.copy().unwrap();
        value.f32s_mut().unwrap()[0] = f32::NAN;
        model.params.set(id, value).unwrap();
        let error = make(&dir, about(5), &model, 99).unwrap_err().to_string();
        assert!(error.starts_with("step 1 of 2, block 0: value is not finite"), "{error}");
        assert!(bytes(&dir).iter().all(|(name, _)| !name.contains("latents")));
    }
}
