//! The time that a GPU is predicted to need for a model: a roofline, not a measurement.
//!
//! ```text
//! time of a part = max(FLOPs / (peak · share), bytes / (bandwidth · share), 2 µs)
//! ```
//! Peaks are the makers' (dense bf16, SXM boards); the shares are what well-made kernels hold. Activations and weights
//! are bf16; the least time is an assumption about kernels in a captured graph. A site has two kinds of parts: its products with weights, read off the shapes of its parameters, and its
//! core, which is the rest of its FLOPs and reads what the first product wrote and writes what the last one reads.

use crate::autograd::ParamStore;
use crate::error::{Error, Result};
use crate::models::sites::SiteConfig;
use crate::nn::operators::{self, Site, Spec};
use crate::nn::{Builder, Scheme};
use crate::tensor::Device;
use serde::Serialize;
use std::str::FromStr;

/// Bytes of a bf16 number.
const BF16: f64 = 2.0;
/// What a softmax or scan core reaches of the rate of plain products, where it is bound by arithmetic at all: scores
/// need exponentials, and head widths that are no multiple of the tensor cores' tile waste part of it.
const CORE_SHARE: f64 = 0.64;

/// Least seconds of a part: what a kernel takes to start and to drain.
const LEAST: f64 = 2e-6;

/// A GPU in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Gpu {
    /// `h100`, `a100` or `h200`.
    pub name: &'static str,
    /// Dense bf16 FLOP/s of the data sheet.
    pub peak: f64,
    /// Bytes/s of the data sheet.
    pub bandwidth: f64,
    /// Share of the peak that products hold.
    pub peak_share: f64,
    /// Share of the bandwidth that streams hold.
    pub bandwidth_share: f64,
}

/// The GPUs known: H100 SXM 80 GB, A100 SXM 80 GB, H200 SXM 141 GB.
pub const GPUS: [Gpu; 3] = [
    Gpu { name: "h100", peak: 989.4e12, bandwidth: 3.35e12, peak_share: 0.71, bandwidth_share: 0.90 },
    Gpu { name: "a100", peak: 312.0e12, bandwidth: 2.039e12, peak_share: 0.87, bandwidth_share: 0.83 },
    Gpu { name: "h200", peak: 989.4e12, bandwidth: 4.8e12, peak_share: 0.80, bandwidth_share: 0.90 },
];

impl FromStr for Gpu {
    type Err = Error;

    fn from_str(name: &str) -> Result<Gpu> {
        GPUS.iter().find(|g| g.name == name).copied().ok_or_else(|| {
            let known: Vec<&str> = GPUS.iter().map(|g| g.name).collect();
            Error::usage("--gpu", "unknown GPU").is(format!("{name:?}")).must(format!("one of {}", known.join(", ")))
        })
    }
}

impl Gpu {
    /// Seconds for a part.
    fn seconds(&self, part: Part) -> f64 {
        let arithmetic = part.flops / (self.peak * self.peak_share * part.share);
        arithmetic.max(part.bytes / (self.bandwidth * self.bandwidth_share)).max(LEAST)
    }
}

/// Work that is bound by arithmetic or by memory as a whole.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Part {
    flops: f64,
    bytes: f64,
    /// Of the rate of plain products.
    share: f64,
}

/// A product of `rows` rows with a weight `[outputs, inputs]`.
fn product(rows: f64, inputs: f64, outputs: f64) -> Part {
    let bytes = BF16 * (rows * (inputs + outputs) + inputs * outputs);
    Part { flops: 2.0 * rows * inputs * outputs, bytes, share: 1.0 }
}

/// A pass that reads and writes so many numbers and computes next to nothing.
fn stream(numbers: f64) -> Part {
    Part { flops: 0.0, bytes: BF16 * numbers, share: 1.0 }
}

/// Predicted seconds of a forward pass over a batch.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// The GPU.
    pub gpu: &'static str,
    /// Samples that go through together; an image with guidance is two.
    pub batch: usize,
    /// Token mixers by layer.
    pub attn: Vec<f64>,
    /// Channel mixers by layer.
    pub mlp: Vec<f64>,
    /// Normalisation, modulation, embeddings and the last layer.
    pub around: f64,
}

impl Prediction {
    /// Everything.
    pub fn total(&self) -> f64 {
        self.attn.iter().chain(&self.mlp).sum::<f64>() + self.around
    }
}

/// Predicts a model. Every distinct operator is looked at once.
///
/// # Errors
/// An operator that cannot take the model's sizes.
pub fn predict<C: SiteConfig>(config: &C, gpu: Gpu, batch: usize) -> Result<Prediction> {
    let mut known: Vec<(Site, Spec, f64)> = Vec::new();
    let mut site = |site: Site, spec: &Spec| -> Result<f64> {
        if let Some((.., seconds)) = known.iter().find(|(s, k, _)| *s == site && k == spec) {
            return Ok(*seconds);
        }
        let seconds = parts(config, site, spec, batch)?.into_iter().map(|p| gpu.seconds(p)).sum();
        known.push((site, spec.clone(), seconds));
        Ok(seconds)
    };
    let attn = config.blocks().iter().map(|b| site(Site::Attn, &b.attn)).collect::<Result<_>>()?;
    let mlp = config.blocks().iter().map(|b| site(Site::Mlp, &b.mlp)).collect::<Result<_>>()?;
    let around = around(config, batch).into_iter().map(|p| gpu.seconds(p)).sum();
    Ok(Prediction { gpu: gpu.name, batch, attn, mlp, around })
}

/// Parts of a site: a product for each weight of two dims, and the core.
fn parts<C: SiteConfig>(config: &C, site: Site, spec: &Spec, batch: usize) -> Result<Vec<Part>> {
    let (mut params, device, dims) = (ParamStore::default(), Device::cpu(), config.dims());
    let operator = operators::build(spec, site, dims, &mut Builder::new(&mut params, &device, 0, Scheme::Unset))?;
    let rows = (batch * dims.tokens()) as f64;
    let weights: Vec<[f64; 2]> = params
        .iter()
        .filter_map(|(_, p)| match p.value.shape().dims() {
            [outputs, inputs] => Some([*outputs as f64, *inputs as f64]),
            _ => None,
        })
        .collect();
    let mut parts: Vec<Part> = weights.iter().map(|[outputs, inputs]| product(rows, *inputs, *outputs)).collect();
    let products: f64 = parts.iter().map(|p| p.flops).sum();
    let flops = batch as f64 * operator.flops(dims).total() - products;
    // What an operator is counted with and what its products take agree to rounding where it has no core.
    if let (Some([first, _]), Some([_, last])) = (weights.first(), weights.last())
        && flops > 1e-9 * products
    {
        parts.push(Part { flops, bytes: BF16 * rows * (first + last), share: CORE_SHARE });
    }
    Ok(parts)
}

/// What stands around the sites: normalised, modulated streams (gates and residuals ride on the last products),
/// cross-attention, the merges of parallel pairs, and the ends of the model.
fn around<C: SiteConfig>(config: &C, batch: usize) -> Vec<Part> {
    let (b, dims, work) = (batch as f64, config.dims(), config.work());
    let (rows, d) = (b * dims.tokens() as f64, dims.width as f64);
    let products =
        work.products.iter().map(|[n, inputs, outputs]| product(b * *n as f64, *inputs as f64, *outputs as f64));
    let mut parts: Vec<Part> = products.collect();
    parts.extend(work.streams.iter().map(|numbers| stream(b * *numbers as f64)));
    let core = |(flops, numbers): &(f64, usize)| {
        let bytes = BF16 * b * *numbers as f64;
        Part { flops: b * flops, bytes, share: CORE_SHARE }
    };
    parts.extend(work.cores.iter().map(core));
    // Blocks of a parallel pair take as long as in sequence: what running them at once saves is not counted.
    parts.extend(config.pairs().iter().map(|_| product(rows, 2.0 * d, d)));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::dit::DitConfig;

    /// Sizes of PixArt-Σ at 2048 × 2048: 16,384 tokens of width 1152, 16 heads.
    fn sigma() -> DitConfig {
        DitConfig { input_size: 256, ..DitConfig::plain(1, 1152, 16) }
    }

    fn microseconds(site: Site, spec: Spec, gpu: &str) -> Vec<f64> {
        let gpu: Gpu = gpu.parse().unwrap();
        parts(&sigma(), site, &spec, 2).unwrap().into_iter().map(|p| 1e6 * gpu.seconds(p)).collect()
    }

    fn near(found: f64, want: f64) {
        assert!((found / want - 1.0).abs() < 0.02, "{found} against {want}");
    }

    #[test]
    fn parts_by_hand() {
        // Products at 0.80 · 989.4 TFLOP/s: 2·32768·1152·3456 FLOPs take 330 µs, a third of them 110 µs.
        let mha = microseconds(Site::Attn, Spec::new("mha"), "h200");
        near(mha[0], 329.7);
        near(mha[1], 109.9);
        // 4·B·N²·D and the softmax, 2.491 TFLOP, at 0.64 of that rate.
        near(mha[2], 2.491e12 / (0.64 * 0.80 * 989.4e12) * 1e6);
        // The convolution reads 3·D and writes D numbers of 2 bytes for each of 32768 tokens, at 0.9 · 4.8 TB/s.
        let hyena = microseconds(Site::Attn, Spec::new("hyena_x"), "h200");
        near(hyena[2], 2.0 * 4.0 * 1152.0 * 32_768.0 / 4.32e12 * 1e6);
        assert_eq!(hyena.len(), 3);
        // A perceptron is its two products alone.
        let mlp = microseconds(Site::Mlp, Spec::new("mlp"), "a100");
        assert_eq!(mlp.len(), 2);
        near(mlp[0] + mlp[1], 695.8e9 / (0.87 * 312.0e12) * 1e6);
    }

    #[test]
    fn few_rows_are_bound_by_the_weights() {
        let gpu: Gpu = "h100".parse().unwrap();
        let weight = 2.0 * 1152.0 * 6912.0;
        near(gpu.seconds(product(1.0, 1152.0, 6912.0)), weight / (0.90 * 3.35e12));
        assert_eq!(gpu.seconds(product(1.0, 16.0, 16.0)), LEAST);
    }

    #[test]
    fn a_graft_is_predicted_to_be_faster_where_tokens_are_many() {
        let base = sigma();
        let mut grafted = base.clone();
        grafted.blocks[0].attn = Spec::new("hyena_x");
        for gpu in GPUS {
            let (before, after) = (predict(&base, gpu, 2).unwrap(), predict(&grafted, gpu, 2).unwrap());
            assert!(after.total() < 0.5 * before.total(), "{before:?} {after:?}");
            assert_eq!((before.mlp, before.around), (after.mlp, after.around));
        }
    }

    #[test]
    fn an_unknown_gpu_is_named() {
        let message = "b200".parse::<Gpu>().unwrap_err().to_string();
        assert_eq!(message, "--gpu: unknown GPU; is \"b200\"; must be one of h100, a100, h200");
    }
}
