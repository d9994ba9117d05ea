//! The decoder of Stable Diffusion's autoencoder.

use super::{ModelCase, Subject, write_inputs};
use graft_engine::autograd::Precision;
use graft_engine::backend::Device;
use graft_engine::error::{Error, Result};
use graft_engine::io::atomic;
use graft_engine::io::safetensors::{self, TensorRecord};
use graft_engine::models::vae::{Vae, VaeConfig};
use graft_engine::tensor::Tensor;
use graft_kernels::check::{Fill, draw_f32};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

/// A decoder with its latents.
pub struct Case {
    precision: Precision,
    vae: Vae,
    latents: Tensor,
}

impl Case {
    /// Draws the weights and latents of a case.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(case: ModelCase, side: usize, precision: Precision) -> Result<Case> {
        let device = Device::cpu();
        let config = VaeConfig { encodes: false, quant: [false, true], ..VaeConfig::released(0.18215) };
        let shape = [case.batch, config.latent, side, side];
        let values = draw_f32(case.name, "latents", shape.iter().product(), Fill::Normal);
        Ok(Case { precision, vae: Vae::new(config, &device, 1)?, latents: Tensor::from_f32(&device, &shape, &values)? })
    }
}

impl Subject for Case {
    fn run(&mut self) -> Result<Vec<f32>> {
        self.vae.decode(&self.latents, self.precision, &mut |_, _| {})?.to_vec()
    }

    fn export(&self, folder: &Path) -> Result<()> {
        let model = folder.join("model");
        std::fs::create_dir_all(&model).map_err(|e| Error::io(&model, "make the folder", &e))?;
        let mut records = Vec::new();
        for (_, param) in self.vae.params.iter() {
            let (values, shape) = (param.value.to_vec()?, param.value.shape());
            match *shape.dims() {
                // Filters are channels last here and channels second in files.
                [f, h, w, c] => {
                    records.push(TensorRecord::f32(&param.name, &[f, c, h, w], turned(&values, [f, h, w, c])))
                }
                ref dims => records.extend(parts(&param.name, dims, &values)),
            }
        }
        safetensors::write(&model.join("diffusion_pytorch_model.safetensors"), records, &BTreeMap::new())?;
        let c = &self.vae.config;
        let config = json!({
            "_class_name": "AutoencoderKL", "latent_channels": c.latent, "block_out_channels": c.channels,
            "layers_per_block": c.layers, "out_channels": c.colours, "norm_num_groups": c.groups,
        });
        atomic::write_bytes(&model.join("config.json"), config.to_string().as_bytes())?;
        write_inputs(folder, &[("x", &self.latents)])
    }

    fn tokens(&self) -> usize {
        self.latents.dim(2) * self.latents.dim(3)
    }
}

/// `[F, H, W, C]` as `[F, C, H, W]`.
fn turned(values: &[f32], [f, h, w, c]: [usize; 4]) -> Vec<f32> {
    let at = |i: usize| {
        let (pixel, channel, filter) = (i % (h * w), i / (h * w) % c, i / (h * w * c));
        values[(filter * h * w + pixel) * c + channel]
    };
    (0..f * h * w * c).map(at).collect()
}

/// A tensor under its names in files, which keep queries, keys and values apart.
fn parts(name: &str, dims: &[usize], values: &[f32]) -> Vec<TensorRecord<'static>> {
    let Some((layer, end)) = name.split_once(".to_qkv.") else {
        return vec![TensorRecord::f32(name, dims, values.to_vec())];
    };
    let mut dims = dims.to_vec();
    dims[0] /= 3;
    let third =
        |(part, values): (&str, &[f32])| TensorRecord::f32(format!("{layer}.to_{part}.{end}"), &dims, values.to_vec());
    ["q", "k", "v"].into_iter().zip(values.chunks(values.len() / 3)).map(third).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_turned() {
        // Two channels of two pixels: pixel by pixel becomes channel by channel.
        assert_eq!(turned(&[1.0, 10.0, 2.0, 20.0], [1, 1, 2, 2]), [1.0, 2.0, 10.0, 20.0]);
    }

    #[test]
    fn packed_projections_are_split() {
        let found = parts("a.to_qkv.bias", &[6], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let names: Vec<&str> = found.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["a.to_q.bias", "a.to_k.bias", "a.to_v.bias"]);
    }
}
