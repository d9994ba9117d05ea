//! `graft eval`: scores of samples against real images, denoising loss and inpainting on held-out ones, captions.

mod captions;
mod inpaint;
mod loss;
mod real;
mod score;
mod source;

use super::Dtype;
use crate::error::{Error, Result};
use crate::eval::samples::{Shard, first_seed};
use crate::sample::pipeline::Request;
use crate::sample::solver::Sampler;
use std::path::PathBuf;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Model folder or checkpoint; or samples: a folder of PNGs, or an .npz with `arr_0`.
    model: PathBuf,
    /// Real images: fashion-mnist, mnist or cifar10, also as NAME=DIR; a folder of a data set or of PNGs; an .npz with
    /// `mu` and `sigma`, or with images `arr_0`. Of a data set, training images are the reference and test images the
    /// real ones that samples are held to.
    #[arg(long = "ref", value_name = "DATA", default_value = "assets/fashion-mnist")]
    reference: String,
    /// Feature space: the small classifier of grey images of 28 x 28, or the Inception network (FID).
    #[arg(long, value_enum, default_value_t = Space::Classifier)]
    features: Space,
    /// The small classifier.
    #[arg(long, value_name = "DIR", default_value = "assets/fashion-classifier")]
    classifier: PathBuf,
    /// The archive of the Inception network; that of GRAFT_INCEPTION or data-cache where not given.
    #[arg(long, value_name = "FILE")]
    network: Option<PathBuf>,
    /// Last layer of the Inception network, `weight [classes, 2048]` and perhaps `bias`: adds the Inception Score.
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
    /// Folder that remembers what the Inception network saw, so that no picture is read twice.
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Samples, and real images beside them: 500 of a model, all of a folder; 1000 for --loss, 100 for --inpaint.
    #[arg(long)]
    n: Option<usize>,
    /// Reference images of a data set or folder, from the first; all where not given.
    #[arg(long, value_name = "N")]
    ref_n: Option<usize>,
    /// Sampler: ddim, ddpm or dpm++.
    #[arg(long, default_value = "ddim")]
    sampler: String,
    /// Model evaluations per sample.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Scale of classifier-free guidance; 1 is none.
    #[arg(long, default_value_t = 1.5)]
    guidance_scale: f64,
    /// Seed of the first sample (image i uses seed + i), of subsets and of noise.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Independent sets of samples by number, for mean and spread: 0,1,2. Set 0 is that of --seed 0.
    #[arg(long, value_name = "LIST", value_delimiter = ',', conflicts_with = "seed")]
    seeds: Vec<u64>,
    /// Samples computed together.
    #[arg(long, default_value_t = 50)]
    batch: usize,
    /// Arithmetic of products.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Folder that samples are kept in: an interrupted run goes on, and shards meet there.
    #[arg(long, value_name = "DIR")]
    samples_dir: Option<PathBuf>,
    /// Make only share i of k of the samples, i from 0; scores come once all are there.
    #[arg(long, value_name = "I/K", requires = "samples_dir")]
    shard: Option<Shard>,
    /// Denoising loss on the test images of the data set, by quarter of the timesteps.
    #[arg(long, conflicts_with = "inpaint")]
    loss: bool,
    /// Noises per image, for --loss.
    #[arg(long, default_value_t = 1)]
    repeats: usize,
    /// Fill a hole in the middle of test images, and compare with what was there.
    #[arg(long)]
    inpaint: bool,
    /// Draw the captions of the emoji in this folder, those seen in training and those held out, --n of each, and look
    /// for the real pictures nearest to them.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["loss", "inpaint", "reference", "seeds", "shard"])]
    captions: Option<PathBuf>,
    /// Rounds per step, for --inpaint: more of them let the hole agree with its surroundings.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
}

/// In which features images are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Space {
    /// Those of the small classifier.
    Classifier,
    /// Those of the Inception network.
    Inception,
}

impl Args {
    /// How to sample, labels aside.
    fn request(&self, seed: u64) -> Result<Request> {
        let sampler: Sampler = self.sampler.parse()?;
        Ok(Request {
            sampler,
            steps: self.steps,
            guidance: self.guidance_scale,
            batch: self.batch,
            precision: self.dtype.into(),
            ..Request::new(Vec::new(), seed)
        })
    }

    /// Sets of samples: their number, and the seed of the first image.
    fn sets(&self) -> Result<Vec<(u64, u64)>> {
        if self.seeds.is_empty() {
            return Ok(vec![(self.seed, self.seed)]);
        }
        for (i, set) in self.seeds.iter().enumerate() {
            if self.seeds[..i].contains(set) || *set >= 1 << 32 {
                return Err(Error::usage("--seeds", "not independent sets")
                    .is(set)
                    .must("different numbers below 2^32"));
            }
        }
        Ok(self.seeds.iter().map(|&set| (set, first_seed(set))).collect())
    }
}

/// Runs the command.
pub fn run(args: &Args, as_json: bool) -> Result<()> {
    if let Some(dir) = &args.captions {
        captions::run(args, dir, as_json)
    } else if args.loss {
        loss::run(args, as_json)
    } else if args.inpaint {
        inpaint::run(args, as_json)
    } else {
        score::run(args, as_json)
    }
}
