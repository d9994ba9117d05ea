//! DiT: the class-conditional diffusion transformer with adaLN-zero (arXiv 2212.09748).
//!
//! Layer numbering, token order and formulas are those of the original implementation; `Semantics` states the two
//! places where the diffusers implementation differs.

mod block;
mod config;
mod convert;
mod infer;
mod load;
mod names;
mod save;
mod sites;

pub use super::sites::{Observer, Seen};
pub use block::Pair;
pub use config::{BlockSpec, DitConfig};
pub use convert::{Conversion, convert};
pub use infer::Assumed;
pub use load::{assumptions, describe, load, to_bf16, weight_files};
pub use names::Layout;
pub use save::{SaveAs, save};

use crate::autograd::{Graph, ParamId, ParamStore, Var};
use crate::error::{Error, Result};
use crate::models::positions;
use crate::nn::operators::{Operator, Site};
use crate::nn::{Builder, Init, Linear, Scheme};
use crate::ops::{act, contracts, sinusoid};
use crate::tensor::{Device, Tensor};
use block::{Block, Unit};

/// Width of the timestep sinusoid.
pub(crate) const FREQUENCIES: usize = 256;

/// Details in which implementations of the same model differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Semantics {
    /// Timestep frequencies are exp(−ln 10⁴ · i / this).
    pub frequency_denominator: f32,
    /// Epsilon of the LayerNorm before the MLP.
    pub mlp_norm_eps: f32,
}

impl Semantics {
    /// The original implementation, in which the published weights were trained.
    pub const ORIGINAL: Semantics = Semantics { frequency_denominator: 128.0, mlp_norm_eps: EPS };

    /// The diffusers implementation, for parity with it; `norm_eps` is that of its `config.json`.
    pub fn diffusers(norm_eps: f32) -> Semantics {
        Semantics { frequency_denominator: 127.0, mlp_norm_eps: norm_eps }
    }
}

const EPS: f32 = 1e-6;

/// How a forward pass runs.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Which implementation's details.
    pub semantics: Semantics,
    /// Keep only the inputs of each block and compute the rest again in the backward pass.
    pub checkpoint: bool,
}

impl Default for Run {
    fn default() -> Self {
        Run { semantics: Semantics::ORIGINAL, checkpoint: false }
    }
}

/// A diffusion transformer with its parameters.
#[derive(Debug)]
pub struct Dit {
    /// Sizes and operators.
    pub config: DitConfig,
    /// All parameters, named as in the original checkpoint.
    pub params: ParamStore,
    x_embedder: Linear,
    pos_embed: ParamId,
    t_embedder: [Linear; 2],
    labels: ParamId,
    units: Vec<Unit>,
    final_modulation: Linear,
    final_linear: Linear,
}

impl Dit {
    /// A new model, initialised as the original is (adaLN and final layers zero, so that each block starts as the
    /// identity), from a seed.
    ///
    /// # Errors
    /// A configuration that cannot be, or too little memory.
    pub fn new(config: DitConfig, device: &Device, seed: u64) -> Result<Dit> {
        Dit::build(config, device, seed, Scheme::Xavier)
    }

    /// A model whose parameters are about to be set: their values are unspecified, and on a dry device they take no
    /// memory.
    ///
    /// # Errors
    /// A configuration that cannot be.
    pub fn unset(config: DitConfig, device: &Device) -> Result<Dit> {
        Dit::build(config, device, 0, Scheme::Unset)
    }

    fn build(config: DitConfig, device: &Device, seed: u64, scheme: Scheme) -> Result<Dit> {
        config.check()?;
        let d = config.width;
        let dims = config.block_dims();
        let mut params = ParamStore::default();
        let mut b = Builder::new(&mut params, device, seed, scheme);
        let patch_values = config.in_channels * config.patch * config.patch;
        let pos_embed = b.frozen("pos_embed", &[1, dims.tokens(), d], &position_table(config.grid(), d))?;
        let patch_shape = [d, config.in_channels, config.patch, config.patch];
        let x_embedder = b.linear_from("x_embedder.proj", &patch_shape, Init::xavier(patch_values, d), Init::Zeros)?;
        let mut t = b.below("t_embedder");
        let t_embedder = [
            t.linear_from("mlp.0", &[d, FREQUENCIES], Init::Normal(0.02), Init::Zeros)?,
            t.linear_from("mlp.2", &[d, d], Init::Normal(0.02), Init::Zeros)?,
        ];
        let labels = b.param("y_embedder.embedding_table.weight", &[config.classes + 1, d], Init::Normal(0.02))?;
        let (mut units, mut index) = (Vec::with_capacity(config.serial_depth()), 0);
        while let Some(spec) = config.blocks.get(index) {
            if config.pairs.contains(&(index / 2)) {
                let specs = [spec, &config.blocks[index + 1]];
                units.push(Unit::Pair(Pair::build(index / 2, specs, dims, &mut b)?));
                index += 2;
            } else {
                units.push(Unit::Single(Block::build(index, spec, dims, &mut b)?));
                index += 1;
            }
        }
        let mut last = b.below("final_layer");
        let outputs = config.patch * config.patch * config.out_channels();
        let final_linear = last.linear_from("linear", &[outputs, d], Init::Zeros, Init::Zeros)?;
        let final_modulation = last.linear_from("adaLN_modulation.1", &[2 * d, d], Init::Zeros, Init::Zeros)?;
        Ok(Dit { config, params, x_embedder, pos_embed, t_embedder, labels, units, final_modulation, final_linear })
    }

    /// Device that holds the parameters.
    pub fn device(&self) -> &Device {
        self.params.get(self.pos_embed).value.device()
    }

    /// The operator at a site.
    pub fn operator(&self, block: usize, site: Site) -> Option<&dyn Operator> {
        self.units.iter().find_map(|unit| unit.operator(block, site))
    }

    /// Predicts noise (and variance values where the model has them).
    ///
    /// `x [B, C, S, S]` noisy images or latents, `t [B]` f32 timesteps in 0..1000 (fractions allowed), `y [B]` i32
    /// labels, where `classes` is the null label. Returns `[B, out_channels, S, S]` in f32.
    ///
    /// # Errors
    /// When a shape does not fit or a label is out of range.
    pub fn forward<'m>(&'m self, g: &Graph<'m>, x: &Var, t: &Tensor, y: &Tensor, run: Run) -> Result<Var> {
        self.forward_observed(g, x, t, y, run, None)
    }

    /// [`Dit::forward`] that shows every site to `observer`.
    ///
    /// # Errors
    /// As [`Dit::forward`], and those of the observer.
    pub fn forward_observed<'m>(
        &'m self,
        g: &Graph<'m>,
        x: &Var,
        t: &Tensor,
        y: &Tensor,
        run: Run,
        mut observer: Option<&mut Observer<'_>>,
    ) -> Result<Var> {
        let c = &self.config;
        let side = c.input_size;
        if x.tensor().shape().dims() != [x.dim(0), c.in_channels, side, side] {
            return Err(Error::failure("dit: x", "wrong shape")
                .is(x.tensor().shape())
                .must(format!("[B, {}, {side}, {side}]", c.in_channels)));
        }
        let condition = self.condition(g, t, y, run.semantics)?;
        let tokens = g.patchify(x, c.patch, c.grid(), c.grid(), contracts::patchify::Params {})?;
        let pos = g.reshape(&g.param(&self.params, self.pos_embed), &[c.tokens(), c.width])?;
        let mut h = self.embed(g, &tokens, &pos)?;
        let semantics = run.semantics;
        let mut pair_input = None;
        for unit in &self.units {
            h = match &mut observer {
                Some(observer) => {
                    if unit.begins_pair() {
                        pair_input = Some(h.clone());
                    }
                    let out = unit.forward(g, &self.params, &h, &condition, semantics, Some(observer))?;
                    if let (Some(pair), Some(input)) = (unit.completes(), &pair_input) {
                        observer(&Seen {
                            block: pair,
                            site: Site::BlockPair,
                            input,
                            output: &g.sub(&out, input)?,
                            gate: None,
                            condition: Some(&condition),
                        })?;
                    }
                    out
                }
                None if run.checkpoint && g.is_recording() => g.checkpoint(&[&h, &condition], move |g, inputs| {
                    unit.forward(g, &self.params, &inputs[0], &inputs[1], semantics, None)
                })?,
                None => unit.forward(g, &self.params, &h, &condition, semantics, None)?,
            };
        }
        let modulation = modulation(g, &self.params, &self.final_modulation, &condition, 2)?;
        let h = g.ln_modulate(&h, &modulation, contracts::ln_modulate::Params { shift: 0, scale: 1, eps: EPS })?;
        let out = self.final_linear.forward(g, &self.params, &h, act::NONE)?;
        let out =
            g.unpatchify(&out, c.out_channels(), c.patch, c.grid(), c.grid(), contracts::unpatchify::Params {})?;
        g.to_f32(&out)
    }

    fn embed(&self, g: &Graph<'_>, tokens: &Var, pos: &Var) -> Result<Var> {
        // The patch convolution is a product: its weight [D, C, P, P] flattens to [D, C·P·P].
        let c = &self.config;
        let weight = g.reshape(&g.param(&self.params, self.x_embedder.weight), &[c.width, tokens.dim(2)])?;
        let bias = self.x_embedder.bias.map(|id| g.param(&self.params, id));
        // Three or sixteen values a token: rounding them to bf16 would save nothing.
        let settings = contracts::gemm::Params { act: act::NONE, gate_row: 0, bf16: false };
        g.gemm(tokens, &weight, bias.as_ref(), Some(pos), None, None, settings)
    }

    /// SiLU(timestep embedding + label embedding), `[B, 1, D]`: every use of the condition begins with this SiLU.
    pub(crate) fn condition(&self, g: &Graph<'_>, t: &Tensor, y: &Tensor, semantics: Semantics) -> Result<Var> {
        let settings = contracts::sinusoid::Params { denominator: semantics.frequency_denominator };
        let waves = sinusoid(t, FREQUENCIES, settings)?;
        let b = waves.dim(0);
        let waves = Var::constant(waves.reshape(&[b, 1, FREQUENCIES])?);
        let h = self.t_embedder[0].forward(g, &self.params, &waves, act::SILU)?;
        let h = self.t_embedder[1].forward(g, &self.params, &h, act::NONE)?;
        let h = g.reshape(&h, &[b, self.config.width])?;
        let table = g.param(&self.params, self.labels);
        let condition = g.embed(&table, y, Some(&h), contracts::embed::Params { act: act::SILU })?;
        g.reshape(&condition, &[b, 1, self.config.width])
    }
}

/// The modulation table `[B, rows, D]` that a layer makes of the condition.
fn modulation(g: &Graph<'_>, params: &ParamStore, layer: &Linear, condition: &Var, rows: usize) -> Result<Var> {
    let m = layer.forward(g, params, condition, act::NONE)?;
    g.reshape(&m, &[condition.dim(0), rows, condition.dim(2)])
}

/// Positions `[N, D]` of a square grid.
fn position_table(grid: usize, width: usize) -> Vec<f32> {
    let side: Vec<f64> = (0..grid).map(|i| i as f64).collect();
    positions::table(&side, &side, width)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_table_of_xl() {
        let table = position_table(16, 1152);
        let row = &table[(5 * 16 + 3) * 1152..][..1152];
        let want = [(0, 0.141_120_01), (1, 0.233_830_75), (288, -0.989_992_5), (576, -0.958_924_3), (864, 0.283_662_2)];
        for (i, value) in want {
            assert!((row[i] - value).abs() < 1e-6, "element {i}: {} against {value}", row[i]);
        }
    }

    /// Output and every gradient of the recorded case agree within its tolerances.
    #[test]
    fn recorded_gradients() {
        let root =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/dit_original/forward_and_gradients");
        let device = Device::cpu();
        let model = load(&root.join("model"), &device).unwrap();
        let inputs = crate::io::safetensors::TensorFile::open(&root.join("inputs.safetensors")).unwrap();
        let expected = crate::io::safetensors::TensorFile::open(&root.join("expected.safetensors")).unwrap();
        let read = |name: &str| {
            let view = inputs.get(name).unwrap();
            Tensor::from_f32(&device, view.shape, &view.to_f32().unwrap()).unwrap()
        };
        let labels: Vec<i32> = inputs.get("y").unwrap().to_i64().unwrap().iter().map(|&v| v as i32).collect();
        let y = Tensor::from_i32(&device, &[labels.len()], &labels).unwrap();
        for checkpoint in [false, true] {
            let g = Graph::training(crate::autograd::Precision::F32);
            let x = g.leaf(read("x"));
            let out = model.forward(&g, &x, &read("t"), &y, Run { checkpoint, ..Run::default() }).unwrap();
            let close = |name: &str, got: &[f32]| {
                let want = expected.get(name).unwrap().to_f32().unwrap();
                let (mut error, mut norm) = (0.0f64, 0.0f64);
                got.iter().zip(&want).for_each(|(g, w)| {
                    error += f64::from(g - w).powi(2);
                    norm += f64::from(*w).powi(2);
                });
                let bound = 1.6e-5 * norm.sqrt().max(0.0015);
                assert!(got.len() == want.len() && error.sqrt() <= bound, "{name}: {} against {bound}", error.sqrt());
            };
            close("output", &out.tensor().to_vec().unwrap());
            let shape = out.tensor().shape();
            let flat = [shape.dims()[0], 1, shape.len() / shape.dims()[0]];
            let out = g.reshape(&out, &flat).unwrap();
            let target = Var::constant(read("target").reshape(&flat).unwrap());
            let squared = contracts::loss_regression::Params { kind: 1, delta: 1.0 };
            let loss = g.loss_regression(&out, &target, squared).unwrap();
            let mut grads = g.backward(&loss).unwrap();
            close("grad.x", &grads.take(&x).unwrap().to_vec().unwrap());
            for (id, param) in model.params.iter().filter(|(_, p)| p.trainable) {
                close(&format!("grad.{}", param.name), &grads.param(&model.params, id).unwrap().to_vec().unwrap());
            }
        }
    }

    #[test]
    fn xl_has_the_published_number_of_parameters() {
        let config = DitConfig::named("DiT-XL/2").unwrap();
        assert_eq!(config.parameters(), 674_834_720);
    }
}
