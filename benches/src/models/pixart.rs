//! PixArt-Σ: a forward pass with the keys and values of its text made before, as all steps of a sampler share them.

use super::{ModelCase, Subject, write_inputs};
use graft_engine::autograd::{Graph, Precision, Var};
use graft_engine::backend::Device;
use graft_engine::error::Result;
use graft_engine::models::pixart::{self, Keys, PixArt, PixArtConfig, Run, SaveAs, Text};
use graft_engine::tensor::Tensor;
use graft_kernels::check::{Fill, draw_f32};
use std::collections::BTreeMap;
use std::path::Path;

/// A PixArt with its inputs.
pub struct Case {
    precision: Precision,
    model: PixArt,
    x: Tensor,
    t: Tensor,
    text: Tensor,
    keys: Keys,
}

impl Case {
    /// Draws the weights and inputs of a case. In bf16 the weights of products are stored so.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(case: ModelCase, side: usize, depth: usize, precision: Precision) -> Result<Case> {
        let device = Device::cpu();
        let mut config = PixArtConfig::sigma_xl(side)?;
        config.blocks.truncate(depth);
        let (b, channels, latent) = (case.batch, config.in_channels, config.sample_size);
        let (tokens, width) = (config.max_tokens, config.caption_channels);
        let model = PixArt::random_in(config, &device, 1, precision == Precision::Bf16)?;
        let draw = |name: &str, shape: &[usize]| {
            Tensor::from_f32(&device, shape, &draw_f32(case.name, name, shape.iter().product(), Fill::Normal))
        };
        let (x, text) = (draw("x", &[b, channels, latent, latent])?, draw("text", &[b, tokens, width])?);
        let t = Tensor::from_f32(&device, &[b], &vec![749.0; b])?;
        let keys = {
            let g = Graph::inference(precision);
            model.keys(&g, &Text::new(&g, &Var::constant(text.clone()), None)?)?
        };
        Ok(Case { precision, model, x, t, text, keys })
    }
}

impl Subject for Case {
    fn run(&mut self) -> Result<Vec<f32>> {
        let (g, x) = (Graph::inference(self.precision), Var::constant(self.x.clone()));
        self.model.forward(&g, &x, &self.t, &self.keys, None, Run::default())?.into_tensor().to_vec()
    }

    fn export(&self, folder: &Path) -> Result<()> {
        pixart::save(&self.model, &folder.join("model"), SaveAs::F32, &BTreeMap::new())?;
        write_inputs(folder, &[("x", &self.x), ("t", &self.t), ("text", &self.text)])
    }

    fn tokens(&self) -> usize {
        self.x.dim(2) * self.x.dim(3) / self.model.config.patch.pow(2)
    }
}
