//! Scores in the feature space of the Inception network: FID, sFID, KID, precision and recall, Inception Score.
//!
//! The reference is a set of real pictures, or statistics that others have computed: then only the Fréchet distances
//! can be told.

use crate::autograd::{Graph, Precision, Var};
use crate::error::{Error, Result};
use crate::eval::Features;
use crate::eval::distances::{NEIGHBOURS, distances};
use crate::eval::frechet::{Moments, frechet_distance};
use crate::eval::inception::{FEATURES, SPATIAL, Seen};
use crate::eval::inception_score::inception_score;
use crate::eval::kid::Subsets;
use crate::eval::score::mean_sd;
use crate::io::npz::Npz;
use crate::io::safetensors::TensorFile;
use crate::ops::contracts;
use crate::tensor::{Device, Tensor};
use serde::Serialize;
use std::path::Path;

/// Fewer samples than this make a Fréchet distance mostly bias: compare kernel distances instead.
pub const ENOUGH: usize = 10_000;
/// Subsets of the kernel distance, each of at most this many images of either set.
const KID_SUBSETS: usize = 100;
const KID_SIZE: usize = 1000;
/// Samples of a part of the Inception Score, where they divide evenly.
const SCORE_PART: usize = 5000;
/// Rows of one product with the logits layer.
const ROWS: usize = 4096;

/// Quality of a set of pictures; what could not be told is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StandardScore {
    /// Pictures scored.
    pub n: usize,
    /// Squared Fréchet distance of the features (FID); lower is better.
    pub fid: f64,
    /// That of the spatial features.
    pub sfid: Option<f64>,
    /// Kernel distance, unbiased, so it may be negative; lower is better.
    pub kid: Option<f64>,
    /// Its standard deviation over subsets.
    pub kid_sd: Option<f64>,
    /// Fraction of the pictures inside the support of as many real ones.
    pub precision: Option<f64>,
    /// Fraction of as many real ones inside the support of the pictures.
    pub recall: Option<f64>,
    /// Inception Score, where the logits layer is there; higher is better.
    pub inception_score: Option<f64>,
}

impl StandardScore {
    /// Mean and standard deviation (denominator: one less) over at least one score.
    pub fn summary(scores: &[StandardScore]) -> (StandardScore, StandardScore) {
        let of = |metric: fn(&StandardScore) -> Option<f64>| {
            let values: Option<Vec<f64>> = scores.iter().map(metric).collect();
            values.map(|v| mean_sd(&v)).unzip()
        };
        let (fid, fid_sd) = mean_sd(&scores.iter().map(|s| s.fid).collect::<Vec<_>>());
        let (sfid, kid, kid_sd) = (of(|s| s.sfid), of(|s| s.kid), of(|s| s.kid_sd));
        let (precision, recall, inception_score) = (of(|s| s.precision), of(|s| s.recall), of(|s| s.inception_score));
        let n = scores[0].n;
        let mean = StandardScore {
            n,
            fid,
            sfid: sfid.0,
            kid: kid.0,
            kid_sd: kid_sd.0,
            precision: precision.0,
            recall: recall.0,
            inception_score: inception_score.0,
        };
        let sd = StandardScore {
            n,
            fid: fid_sd,
            sfid: sfid.1,
            kid: kid.1,
            kid_sd: kid_sd.1,
            precision: precision.1,
            recall: recall.1,
            inception_score: inception_score.1,
        };
        (mean, sd)
    }
}

/// What samples are compared with.
#[derive(Debug)]
pub struct Target {
    pool: Moments,
    spatial: Option<Moments>,
    seen: Option<Seen>,
}

impl Target {
    /// Real pictures.
    ///
    /// # Errors
    /// Fewer than two pictures, or features that are not finite.
    pub fn of_pictures(seen: Seen) -> Result<Target> {
        let pool = Moments::from_features(&seen.features("reference")?);
        let spatial = Some(Moments::from_features(&seen.spatial("reference")?));
        Ok(Target { pool, spatial, seen: Some(seen) })
    }

    /// Statistics `mu [2048]`, `sigma [2048, 2048]` and, where they are there, `mu_s`, `sigma_s` of width 2023, as the
    /// evaluator of ADM stores them.
    ///
    /// # Errors
    /// Arrays that are missing or damaged, of other sizes, or that are no moments.
    pub fn of_statistics(npz: &Npz, place: &str) -> Result<Target> {
        let moments = |mean: &str, covariance: &str, dim: usize| -> Result<Moments> {
            let (m, c) = (npz.read(mean)?, npz.read(covariance)?);
            if m.shape != [dim] || c.shape != [dim, dim] {
                return Err(Error::failure(format!("{place}: {mean}, {covariance}"), "statistics of another network")
                    .is(format!("{:?} and {:?}", m.shape, c.shape))
                    .must(format!("[{dim}] and [{dim}, {dim}]")));
            }
            Moments::new(&format!("{place}: {covariance}"), m.values, c.values)
        };
        let spatial = npz.has("mu_s").then(|| moments("mu_s", "sigma_s", SPATIAL)).transpose()?;
        Ok(Target { pool: moments("mu", "sigma", FEATURES)?, spatial, seen: None })
    }

    /// Scores of samples; `seed` chooses subsets.
    ///
    /// # Errors
    /// Fewer than 5 samples or real pictures, or features that are not finite.
    pub fn score(&self, samples: &Seen, logits: Option<&LogitsLayer>, seed: u64) -> Result<StandardScore> {
        let features = samples.features("samples")?;
        let mut score = StandardScore { n: samples.len(), ..StandardScore::default() };
        if let Some(spatial) = &self.spatial {
            let own = Moments::from_features(&samples.spatial("samples")?);
            score.sfid = Some(frechet_distance(spatial, &own)?.distance);
        }
        if let Some(layer) = logits {
            score.inception_score = Some(layer.score(&features)?);
        }
        let Some(real) = &self.seen else {
            score.fid = frechet_distance(&self.pool, &Moments::from_features(&features))?.distance;
            return Ok(score);
        };
        let fewest = real.len().min(samples.len());
        if fewest < NEIGHBOURS + 2 {
            return Err(Error::usage("--n", "too few pictures")
                .is(fewest)
                .must(format!("at least {}", NEIGHBOURS + 2)));
        }
        let subsets = Subsets { count: KID_SUBSETS, size: fewest.min(KID_SIZE), seed };
        let found = distances(&real.features("reference")?, &self.pool, &features, subsets)?;
        score.fid = found.frechet;
        (score.kid, score.kid_sd) = (Some(found.kid), Some(found.kid_sd));
        (score.precision, score.recall) = (Some(found.precision), Some(found.recall));
        Ok(score)
    }
}

/// The last layer of the classifier that the network was cut from: its archive does not have it.
#[derive(Debug)]
pub struct LogitsLayer {
    /// `[classes, 2048]`.
    weight: Tensor,
    /// `[classes]`.
    bias: Option<Tensor>,
}

impl LogitsLayer {
    /// Reads `weight [classes, 2048]` and, where it is there, `bias [classes]` from a safetensors file.
    ///
    /// # Errors
    /// A damaged file, or tensors that are missing or of another shape.
    pub fn load(path: &Path, device: &Device) -> Result<LogitsLayer> {
        let file = TensorFile::open(path)?;
        let wrong = |name: &str, is: String, must: String| {
            Error::failure(format!("{}: {name}", path.display()), "not a logits layer").is(is).must(must)
        };
        let weight =
            file.get("weight").ok_or_else(|| wrong("weight", "missing".into(), format!("[classes, {FEATURES}]")))?;
        let &[classes, FEATURES] = weight.shape else {
            return Err(wrong("weight", format!("{:?}", weight.shape), format!("[classes, {FEATURES}]")));
        };
        let bias = match file.get("bias") {
            None => None,
            Some(bias) if bias.shape == [classes] => Some(Tensor::from_f32(device, &[classes], &bias.to_f32()?)?),
            Some(bias) => return Err(wrong("bias", format!("{:?}", bias.shape), format!("[{classes}]"))),
        };
        Ok(LogitsLayer { weight: Tensor::from_f32(device, weight.shape, &weight.to_f32()?)?, bias })
    }

    /// Inception Score of features: over parts of 5000 where they divide evenly, else over all.
    fn score(&self, features: &Features) -> Result<f64> {
        let g = Graph::inference(Precision::F32);
        let classes = self.weight.dim(0);
        let mut logits = Vec::with_capacity(features.len() * classes);
        for rows in features.data().chunks(ROWS * FEATURES) {
            let x = Tensor::from_f32(self.weight.device(), &[1, rows.len() / FEATURES, FEATURES], rows)?;
            let params = contracts::gemm::Params { act: 0, gate_row: 0, bf16: false };
            let [x, w] = [&x, &self.weight].map(|t| Var::constant(t.clone()));
            let bias = self.bias.clone().map(Var::constant);
            let out = g.gemm(&x, &w, bias.as_ref(), None, None, None, params)?;
            logits.extend_from_slice(out.tensor().f32s()?);
        }
        let logits = Features::new("logits", &logits, classes)?;
        let splits = if logits.len().is_multiple_of(SCORE_PART) { logits.len() / SCORE_PART } else { 1 };
        Ok(inception_score(&logits, splits)?.mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;
    use crate::io::safetensors::{TensorRecord, write};
    use graft_kernels::rng::Philox;
    use std::collections::BTreeMap;

    fn seen(n: usize, seed: u64, shift: f32) -> Seen {
        let mut seen = Seen { pool: vec![0.0; n * FEATURES], spatial: vec![0.0; n * SPATIAL] };
        for (stream, values) in [&mut seen.pool, &mut seen.spatial].into_iter().enumerate() {
            Philox::new(seed, stream as u64).fill_normal(values);
            values.iter_mut().for_each(|v| *v = 0.3 * *v + shift);
        }
        seen
    }

    #[test]
    fn a_shift_is_seen_and_statistics_tell_the_fréchet_distances_alone() {
        let real = seen(12, 1, 0.0);
        let target = Target::of_pictures(real.clone()).unwrap();
        let same = target.score(&real, None, 0).unwrap();
        assert!(same.fid < 1e-6 && same.sfid.unwrap() < 1e-6 && same.precision == Some(1.0), "{same:?}");
        let near = target.score(&seen(12, 2, 0.0), None, 0).unwrap();
        let far = target.score(&seen(12, 2, 0.5), None, 0).unwrap();
        // Means differ by a half in every dimension.
        let apart = far.fid - near.fid;
        assert!((apart / (0.25 * FEATURES as f64) - 1.0).abs() < 0.2, "{near:?} {far:?}");
        assert!(far.kid > near.kid && far.sfid > near.sfid && far.inception_score.is_none());
        let bare = Target { seen: None, ..target };
        let told = bare.score(&seen(12, 2, 0.5), None, 0).unwrap();
        assert!((told.fid - far.fid).abs() < 1e-9 * far.fid && told.sfid == far.sfid && told.kid.is_none());
        assert!(Target::of_pictures(real.part(0..4)).unwrap().score(&real, None, 0).is_err());
        let (mean, sd) = StandardScore::summary(&[near, far]);
        assert!((mean.fid - (near.fid + far.fid) / 2.0).abs() < 1e-9 && sd.sfid.unwrap() > 0.0);
        assert_eq!(mean.inception_score, None);
    }

    #[test]
    fn logits_of_certain_classes_score_their_number() {
        let (dir, device) = (test_dir("logits"), Device::cpu());
        let path = dir.join("logits.safetensors");
        let mut weight = vec![0.0; 3 * FEATURES];
        (0..3).for_each(|class| weight[class * FEATURES + class] = 100.0);
        let save = |records: Vec<TensorRecord>| write(&path, records, &BTreeMap::new()).unwrap();
        save(vec![TensorRecord::f32("weight", &[3, FEATURES], &weight)]);
        let mut data = vec![0.0; 6 * FEATURES];
        (0..6).for_each(|i| data[i * FEATURES + i % 3] = 1.0);
        let features = Features::new("f", &data, FEATURES).unwrap();
        let score = LogitsLayer::load(&path, &device).unwrap().score(&features).unwrap();
        assert!((score - 3.0).abs() < 1e-9, "{score}");
        // A bias that decides everything leaves one class.
        let bias = TensorRecord::f32("bias", &[3], &[1000.0, 0.0, 0.0]);
        save(vec![TensorRecord::f32("weight", &[3, FEATURES], &weight), bias]);
        let score = LogitsLayer::load(&path, &device).unwrap().score(&features).unwrap();
        assert!((score - 1.0).abs() < 1e-9, "{score}");
        save(vec![TensorRecord::f32("weight", &[3, 4], &weight[..12])]);
        assert!(
            LogitsLayer::load(&path, &device).unwrap_err().to_string().contains("is [3, 4]; must be [classes, 2048]")
        );
        save(vec![]);
        assert!(LogitsLayer::load(&path, &device).unwrap_err().to_string().contains("weight: not a logits layer"));
    }
}
