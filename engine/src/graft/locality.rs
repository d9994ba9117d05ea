//! Locality of attention: how much of it stays near the diagonal (arXiv 2506.05340, §3.4).
//!
//! ```text
//! L_k = (1/N) Σ_ij A_ij · 1[|i − j| ≤ k]
//! ```
//! for the attention matrix A `[N, N]` of a layer over tokens in raster order, averaged over the heads, the evaluations
//! of a sampling run (all timesteps, the labelled and the null half) and the images. What is kept is the mass at each
//! distance |i − j|, of which every L_k is a sum: one measurement serves any k.

use super::assemble;
use crate::autograd::{Graph, Var};
use crate::error::{Error, Result};
use crate::io::json;
use crate::models::dit::Dit;
use crate::nn::Linear;
use crate::nn::operators::Site;
use crate::ops::act;
use crate::sample::pipeline::{Request, generate_watched};
use crate::sample::solver::Sampler;
use crate::tensor::Tensor;
use graft_kernels::simd;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Name of the file that keeps a measurement, beside a model or in a run folder.
pub const FILE: &str = "locality.json";

/// Images sampled together.
const BATCH: usize = 16;
/// Queries and keys of a tile of scores: what the registers hold.
const ROWS: usize = 4;
const COLUMNS: usize = 32;

/// The sampling from whose activations a locality is measured. Image i is of class i modulo the number of classes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Protocol {
    /// Images.
    pub samples: usize,
    /// DDIM steps of each.
    pub steps: usize,
    /// Classifier-free guidance scale; 1 is none.
    pub guidance: f64,
    /// Seed of the first image's noise.
    pub seed: u64,
}

impl Protocol {
    /// As published.
    pub const PUBLISHED: Protocol = Protocol { samples: 250, steps: 50, guidance: 1.5, seed: 0 };
}

/// Attention mass by distance of every layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Locality {
    /// Digest of the model's parameters.
    pub model: String,
    /// What was sampled.
    pub protocol: Protocol,
    /// Classes of the images, in turn.
    pub classes: Vec<i32>,
    /// Tokens N.
    pub tokens: usize,
    /// Mass at the distances 0 to N − 1, which sum to 1, of each layer; none where its operator is not attention.
    pub layers: Vec<Option<Vec<f64>>>,
}

impl Locality {
    /// L_k of every layer; none where its operator is not attention.
    pub fn band(&self, k: usize) -> Vec<Option<f64>> {
        let sum = |mass: &Vec<f64>| mass.iter().take(k.saturating_add(1)).sum();
        self.layers.iter().map(|mass| mass.as_ref().map(sum)).collect()
    }

    /// The measurement that a file keeps, where it is of this model under this protocol.
    ///
    /// # Errors
    /// A file that is there but is no measurement.
    pub fn read(path: &Path, model: &str, protocol: Protocol, classes: &[i32]) -> Result<Option<Locality>> {
        if !path.exists() {
            return Ok(None);
        }
        let mut found: Locality = serde_json::from_value(json::read(path)?).map_err(|e| {
            Error::failure(path.display().to_string(), format!("not a measurement of locality: {e}"))
                .fix("remove the file; it is measured anew then")
        })?;
        found.layers.iter_mut().flatten().flatten().for_each(|m| *m = rounded(*m));
        let fits = found.model == model && found.protocol == protocol && found.classes == classes;
        Ok(fits.then_some(found))
    }

    /// Keeps the measurement in a file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let value = serde_json::to_value(self).map_err(|e| Error::failure("locality", e.to_string()))?;
        json::write(path, &value)
    }
}

/// Measures a model, or takes the measurement from the first of `files` that keeps it; a new one goes to the last of
/// them that can be written. `classes` are those of the images in turn, all where there are none; `report` hears how
/// many sampling steps are done and how many there are.
///
/// # Errors
/// A model without attention, a class that it does not have, or a damaged file.
pub fn measured(
    model: &Dit,
    protocol: Protocol,
    classes: &[i32],
    files: &[&Path],
    report: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Locality> {
    let digest = assemble::digest(model)?;
    let all: Vec<i32> = (0..model.config.classes as i32).collect();
    let classes = if classes.is_empty() { &all } else { classes };
    for file in files {
        if let Some(kept) = Locality::read(file, &digest, protocol, classes)? {
            return Ok(kept);
        }
    }
    let found = measure(model, protocol, classes, digest, report)?;
    // A cache that cannot be written (a model on a read-only disk) costs the next call time, nothing else.
    let _kept = files.iter().rev().any(|file| found.write(file).is_ok());
    Ok(found)
}

fn measure(
    model: &Dit,
    protocol: Protocol,
    classes: &[i32],
    digest: String,
    report: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Locality> {
    let c = &model.config;
    let heads = attention_heads(model)?;
    let labels: Vec<i32> = classes.iter().copied().cycle().take(protocol.samples).collect();
    let request = Request {
        sampler: Sampler::Ddim { eta: 0.0 },
        steps: protocol.steps,
        guidance: protocol.guidance,
        batch: BATCH,
        ..Request::new(labels, protocol.seed)
    };
    let mut mass = vec![vec![0.0; c.tokens()]; c.depth()];
    let mut matrices = vec![0u64; c.depth()];
    let mut watch = |block: usize, site: Site, input: &Tensor, _: &Tensor| -> Result<()> {
        let Some(Some(attention)) = heads.get(block).filter(|_| site == Site::Attn) else { return Ok(()) };
        matrices[block] += (input.dim(0) * attention.heads) as u64;
        attention.add_mass(model, input, &mut mass[block])
    };
    let total = (protocol.samples * protocol.steps) as u64;
    let mut steps = |p: crate::sample::pipeline::Progress| {
        report((p.images * protocol.steps + p.batch * p.step) as u64, total);
    };
    generate_watched(model, &request, &mut steps, Some(&mut watch))?;
    let mean = |(mass, count): (Vec<f64>, u64)| {
        (count > 0).then(|| mass.iter().map(|m| rounded(m / (count * c.tokens() as u64) as f64)).collect())
    };
    let layers = mass.into_iter().zip(matrices).map(mean).collect();
    Ok(Locality { model: digest, protocol, classes: classes.to_vec(), tokens: c.tokens(), layers })
}

/// To nine digits after the point, so that a number that went through a file is the same as before.
fn rounded(mass: f64) -> f64 {
    (mass * 1e9).round() / 1e9
}

/// The projection of a layer's attention to queries, keys and values.
struct Attention {
    qkv: Linear,
    heads: usize,
}

/// Of every layer, none where it holds another operator.
fn attention_heads(model: &Dit) -> Result<Vec<Option<Attention>>> {
    let found: Vec<Option<Attention>> = (0..model.config.depth())
        .map(|block| {
            let spec = model.operator(block, Site::Attn)?.spec();
            let heads = spec.number("heads", model.config.heads as f64).ok().filter(|_| spec.kind == "mha")?;
            let name = |part: &str| model.params.find(&format!("blocks.{block}.attn.qkv.{part}"));
            Some(Attention { qkv: Linear { weight: name("weight")?, bias: name("bias") }, heads: heads as usize })
        })
        .collect();
    if found.iter().all(Option::is_none) {
        return Err(Error::usage("locality", "no layer of the model holds softmax attention")
            .must("at least one, for there to be an attention matrix"));
    }
    Ok(found)
}

impl Attention {
    /// Adds the mass by distance of every attention matrix for `input [B, N, D]`.
    fn add_mass(&self, model: &Dit, input: &Tensor, mass: &mut [f64]) -> Result<()> {
        let g = Graph::inference(crate::autograd::Precision::F32);
        let qkv = self.qkv.forward(&g, &model.params, &Var::constant(input.clone()), act::NONE)?;
        let width = input.dim(2) / self.heads;
        let qkv = qkv.tensor().values()?;
        let scale = 1.0 / (width as f32).sqrt();
        let [n, h] = [input.dim(1), self.heads];
        // Matrices go to threads, their sums are added in order: the same bits whatever the number of threads.
        let each: Vec<Vec<f64>> = (0..input.dim(0) * h)
            .into_par_iter()
            .map(|i| {
                let image = &qkv[i / h * n * 3 * h * width..][..n * 3 * h * width];
                matrix_mass(image, [n, h, width], i % h, scale)
            })
            .collect();
        for matrix in each {
            mass.iter_mut().zip(matrix).for_each(|(sum, m)| *sum += m);
        }
        Ok(())
    }
}

/// Mass by distance of one head's attention matrix, summed over its rows; `qkv [N, 3, H, E]`, `dims` N, H, E.
fn matrix_mass(qkv: &[f32], [n, h, width]: [usize; 3], head: usize, scale: f32) -> Vec<f64> {
    let padded = n.next_multiple_of(COLUMNS);
    let part = |token: usize, which: usize| &qkv[((token * 3 + which) * h + head) * width..][..width];
    // Keys by feature, so that a tile of scores runs along tokens; padding stays zero and is never read back.
    let mut keys = vec![0.0f32; width * padded];
    for token in 0..n {
        for (e, value) in part(token, 1).iter().enumerate() {
            keys[e * padded + token] = *value;
        }
    }
    let mut scores = vec![0.0f32; ROWS * padded];
    let mut mass = vec![0.0f64; n];
    for first in (0..n).step_by(ROWS) {
        // Beyond the last query the last one stands in; its scores are not used.
        let queries: [&[f32]; ROWS] = std::array::from_fn(|r| part((first + r).min(n - 1), 0));
        simd::vectorised(
            #[inline(always)]
            || score_rows(queries, &keys, padded, &mut scores),
        );
        for (r, row) in scores.chunks_exact_mut(padded).enumerate().take(n - first) {
            simd::vectorised(
                #[inline(always)]
                || spread(&mut row[..n], scale, first + r, &mut mass),
            );
        }
    }
    mass
}

/// `scores[r, j] = queries[r] · keys[:, j]` in tiles of registers.
#[inline(always)]
fn score_rows(queries: [&[f32]; ROWS], keys: &[f32], padded: usize, scores: &mut [f32]) {
    for start in (0..padded).step_by(COLUMNS) {
        let mut tile = [[0.0f32; COLUMNS]; ROWS];
        for (e, row) in keys.chunks_exact(padded).enumerate() {
            let key = &row[start..start + COLUMNS];
            for (sums, query) in tile.iter_mut().zip(queries) {
                let q = query[e];
                for (sum, k) in sums.iter_mut().zip(key) {
                    *sum += q * k;
                }
            }
        }
        for (r, sums) in tile.iter().enumerate() {
            scores[r * padded + start..][..COLUMNS].copy_from_slice(sums);
        }
    }
}

/// Softmax of the scaled scores of query `i`, whose weights are added to the mass at their distances.
#[inline(always)]
fn spread(scores: &mut [f32], scale: f32, i: usize, mass: &mut [f64]) {
    let largest = scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
    for score in scores.iter_mut() {
        *score = simd::exp_decay(scale * (*score - largest));
    }
    let total = simd::sum_by(scores.len(), |j| scores[j]);
    let factor = 1.0 / f64::from(total);
    let (before, after) = scores.split_at(i);
    for (sum, weight) in mass.iter_mut().zip(after) {
        *sum += factor * f64::from(*weight);
    }
    for (sum, weight) in mass.iter_mut().skip(1).zip(before.iter().rev()) {
        *sum += factor * f64::from(*weight);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;
    use crate::models::dit::DitConfig;
    use crate::nn::operators::Spec;
    use crate::tensor::Device;
    use graft_kernels::rng::Philox;

    /// The definition: every element of every matrix, in f64.
    fn by_definition(qkv: &[f32], [n, h, width]: [usize; 3], head: usize, scale: f64) -> Vec<f64> {
        let at = |token: usize, which: usize, e: usize| f64::from(qkv[((token * 3 + which) * h + head) * width + e]);
        let mut mass = vec![0.0; n];
        for i in 0..n {
            let score = |j: usize| scale * (0..width).map(|e| at(i, 0, e) * at(j, 1, e)).sum::<f64>();
            let total: f64 = (0..n).map(|j| score(j).exp()).sum();
            (0..n).for_each(|j| mass[i.abs_diff(j)] += score(j).exp() / total);
        }
        mass
    }

    #[test]
    fn mass_by_hand() {
        // Two tokens of width 1: scores q·k of 0, ln 3 for the first query and 0, 0 for the second (scale 1).
        let qkv = [1.0, 0.0, 9.0, 0.0, 3.0f32.ln(), 9.0];
        let mass = matrix_mass(&qkv, [2, 1, 1], 0, 1.0);
        // A = [[1/4, 3/4], [1/2, 1/2]]: the diagonal holds 3/4, its neighbours 5/4.
        assert!((mass[0] - 0.75).abs() < 1e-6 && (mass[1] - 1.25).abs() < 1e-6, "{mass:?}");
    }

    #[test]
    fn mass_equals_its_definition() {
        for (n, h, width) in [(1, 1, 1), (5, 2, 3), (49, 4, 8), (67, 1, 9)] {
            let mut qkv = vec![0.0f32; n * 3 * h * width];
            Philox::new(1, n as u64).fill_normal(&mut qkv);
            for head in 0..h {
                let got = matrix_mass(&qkv, [n, h, width], head, 0.7);
                let want = by_definition(&qkv, [n, h, width], head, f64::from(0.7f32));
                let worst = got.iter().zip(&want).map(|(g, w)| (g - w).abs()).fold(0.0, f64::max);
                assert!(worst <= 1e-4, "{n} {h} {width}: {worst}");
            }
        }
    }

    fn model() -> Dit {
        let sizes = DitConfig { patch: 2, input_size: 8, in_channels: 1, classes: 3, ..DitConfig::plain(3, 16, 2) };
        let mut config = sizes;
        config.blocks[1].attn = Spec::new("hyena_x");
        Dit::new(config, &Device::cpu(), 1).unwrap()
    }

    /// Makes all scores of a layer equal: attention is uniform then, and the mass at distance d is counted by hand.
    fn flatten(model: &mut Dit, block: usize) {
        for part in ["weight", "bias"] {
            let id = model.params.find(&format!("blocks.{block}.attn.qkv.{part}")).unwrap();
            let zeros = Tensor::zeros(model.device(), model.params.get(id).value.shape().dims()).unwrap();
            model.params.set(id, zeros).unwrap();
        }
    }

    const SMALL: Protocol = Protocol { samples: 3, steps: 2, guidance: 1.5, seed: 4 };

    #[test]
    fn uniform_attention_of_a_model() {
        let mut model = model();
        flatten(&mut model, 0);
        let found = measured(&model, SMALL, &[], &[], &mut |_, _| {}).unwrap();
        // 16 tokens: 16 pairs at distance 0 and 2·(16 − d) at distance d, each of weight 1/16².
        let want = |k: usize| (16 + (1..=k).map(|d| 2 * (16 - d)).sum::<usize>()) as f64 / 256.0;
        for k in [0, 1, 4, 15, 99] {
            let got = found.band(k);
            assert!((got[0].unwrap() - want(k.min(15))).abs() < 1e-6, "k {k}: {got:?}");
            assert_eq!(got[1], None);
        }
        assert!(found.band(15).iter().flatten().all(|l| (l - 1.0).abs() < 1e-6));
        assert!((found.band(4)[2].unwrap() - want(4)).abs() > 1e-6);
    }

    #[test]
    fn a_kept_measurement_is_found_again_for_the_same_model_and_protocol_only() {
        let (mut model, path) = (model(), test_dir("locality").join(FILE));
        let mut measurements = 0;
        let mut measure = |model: &Dit, protocol: Protocol, classes: &[i32]| {
            let mut fresh = false;
            let found = measured(model, protocol, classes, &[&path], &mut |_, _| fresh = true).unwrap();
            measurements += usize::from(fresh);
            found
        };
        let first = measure(&model, SMALL, &[]);
        assert_eq!(measure(&model, SMALL, &[]), first);
        assert_ne!(measure(&model, Protocol { seed: 5, ..SMALL }, &[]), first);
        assert_eq!(measure(&model, SMALL, &[]), first);
        measure(&model, SMALL, &[2]);
        flatten(&mut model, 2);
        measure(&model, SMALL, &[2]);
        assert_eq!(measurements, 5);
        std::fs::write(&path, "{}").unwrap();
        let message = measured(&model, SMALL, &[], &[&path], &mut |_, _| {}).unwrap_err().to_string();
        assert!(message.contains("not a measurement of locality"), "{message}");
    }

    #[test]
    fn a_model_without_attention_is_refused() {
        let mut config = model().config.clone();
        config.blocks.iter_mut().for_each(|b| b.attn = Spec::new("hyena_x"));
        let model = Dit::new(config, &Device::cpu(), 1).unwrap();
        let message = measured(&model, SMALL, &[], &[], &mut |_, _| {}).unwrap_err().to_string();
        assert!(message.starts_with("locality: no layer of the model holds softmax attention"), "{message}");
    }
}
