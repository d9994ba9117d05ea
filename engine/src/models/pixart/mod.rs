//! PixArt-Σ and -α: the text-conditional diffusion transformer with adaLN-single (arXiv 2403.04692, 2310.00426).
//!
//! Pictures may have any sides; a model is not bound to the size that it was trained at. Formulas are those of the
//! original implementation; [`Semantics`] states where diffusers differs.

mod block;
mod config;
mod convert;
mod load;
mod moments;
mod names;
mod save;
mod sites;
#[cfg(test)]
mod tests;
mod text;

pub use config::PixArtConfig;
pub use convert::{Converted, convert};
pub use load::{describe, is_pixart, load};
pub use moments::{Moments, Outputs};
pub use names::{Layout, diffusers_parts, from_diffusers};
pub use save::{SaveAs, save};
pub use sites::TextCondition;
pub use text::{Keys, Text};

use super::fill::{is_product, round, rounded};
use super::positions;
use crate::autograd::{Graph, ParamId, ParamStore, Precision, Var};
use crate::error::{Error, Result};
use crate::models::dit::FREQUENCIES;
use crate::models::sites::Observer;
use crate::nn::operators::{Operator, Site};
use crate::nn::{Builder, Init, Linear, Rows, Rule, Scheme};
use crate::ops::{act, contracts, sinusoid};
use crate::tensor::{Device, Tensor};
use block::{Block, Shared};
use graft_kernels::rng::Philox;
use std::sync::{Arc, Mutex, PoisonError};
use text::Key;

/// Epsilon of every norm in the original.
const EPS: f32 = 1e-6;

/// Random streams of [`PixArt::random`].
const RANDOM_STREAMS: u64 = 1 << 32;

/// Implementation whose details are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Semantics {
    /// As the model was trained.
    #[default]
    Original,
    /// As diffusers runs it: the epsilon of the norms is that of its configuration.
    Diffusers,
}

/// How a forward pass runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Run {
    /// Which implementation's details.
    pub semantics: Semantics,
    /// Keep only the inputs of each block and compute the rest again in the backward pass.
    pub checkpoint: bool,
}

/// Sees the residual stream `[B, N, D]` after a block.
pub type Watch<'w> = dyn FnMut(usize, &Tensor) -> Result<()> + 'w;

/// Who looks on while a forward pass runs.
enum Look<'l, 'w> {
    /// Nobody.
    Nobody,
    /// Sees the stream after every block.
    Blocks(&'l mut Watch<'w>),
    /// Is shown every site.
    Sites(&'l mut Observer<'w>),
}

/// Size and aspect ratio that PixArt-α at 1024 pixels is told.
#[derive(Clone, Debug)]
pub struct MicroConditions {
    /// `[B, 2]` height and width in pixels.
    pub size: Tensor,
    /// `[B]` height over width.
    pub aspect: Tensor,
}

/// The embedders of size and aspect ratio. They are frozen: no gradient goes into them.
#[derive(Debug)]
struct Micro {
    size: [Linear; 2],
    aspect: [Linear; 2],
}

/// A PixArt transformer with its parameters.
#[derive(Debug)]
pub struct PixArt {
    /// Sizes and operators.
    pub config: PixArtConfig,
    /// All parameters, named as in the original checkpoint.
    pub params: ParamStore,
    x_embedder: Linear,
    t_embedder: [Linear; 2],
    t_block: Linear,
    caption: [Linear; 2],
    micro: Option<Micro>,
    blocks: Vec<Arc<Block>>,
    final_linear: Linear,
    final_table: ParamId,
    /// Grid that the operators are built for, and positions of the grid that was used last.
    grid: [usize; 2],
    positions: Mutex<Option<([usize; 2], Tensor)>>,
    rows: Rows,
}

impl PixArt {
    /// A new model from a seed.
    ///
    /// # Errors
    /// A configuration that cannot be, or too little memory.
    pub fn new(config: PixArtConfig, device: &Device, seed: u64) -> Result<PixArt> {
        let grid = [config.base(); 2];
        PixArt::build(config, grid, device, seed, Scheme::Xavier)
    }

    /// A model whose parameters are about to be set: their values are unspecified, and on a dry device they take no
    /// memory.
    ///
    /// # Errors
    /// A configuration that cannot be.
    pub fn unset(config: PixArtConfig, device: &Device) -> Result<PixArt> {
        let grid = [config.base(); 2];
        PixArt::build(config, grid, device, 0, Scheme::Unset)
    }

    /// A model in which nothing is zero, so that every product counts: for measuring without weights.
    ///
    /// # Errors
    /// As [`PixArt::new`].
    pub fn random(config: PixArtConfig, device: &Device, seed: u64) -> Result<PixArt> {
        PixArt::random_in(config, device, seed, false)
    }

    /// As [`PixArt::random`]; `bf16` rounds the weights of products one by one, so that only one is ever there in f32.
    ///
    /// # Errors
    /// As [`PixArt::new`].
    pub fn random_in(config: PixArtConfig, device: &Device, seed: u64, bf16: bool) -> Result<PixArt> {
        let mut model = PixArt::unset(config, &Device::dry())?;
        let ids: Vec<ParamId> = model.params.iter().map(|(id, _)| id).collect();
        for id in ids {
            let param = model.params.get(id);
            let (shape, product) = (param.value.shape(), is_product(&param.name, param.value.shape().dims()));
            // Products keep the size of what goes in; the rest is small beside it.
            let inputs = shape.dims()[1..].iter().product::<usize>().max(1);
            let deviation = if product { 1.0 / (inputs as f32).sqrt() } else { 0.02 };
            let mut value = device.empty(shape.dims())?;
            if !device.is_dry() {
                value.edit(|values| {
                    Philox::new(seed, RANDOM_STREAMS + id.index() as u64).fill_normal(values);
                    values.iter_mut().for_each(|v| *v *= deviation);
                })?;
            }
            let stored = if bf16 { rounded(&model.params.get(id).name, &value)? } else { value };
            model.params.set(id, stored)?;
            if bf16 && product {
                device.trim();
            }
        }
        Ok(model)
    }

    /// Stores the weights of all products in bf16, and all else, too, on a device that computes in it: for inference in
    /// half the memory.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn round_to_bf16(&mut self) -> Result<()> {
        round(&mut self.params)?;
        self.device().trim();
        Ok(())
    }

    fn build(config: PixArtConfig, grid: [usize; 2], device: &Device, seed: u64, scheme: Scheme) -> Result<PixArt> {
        config.check()?;
        let d = config.width;
        let mut params = ParamStore::default();
        let mut b = Builder::new(&mut params, device, seed, scheme);
        let patch_values = config.in_channels * config.patch * config.patch;
        let patch_shape = [d, config.in_channels, config.patch, config.patch];
        let x_embedder = b.linear_from("x_embedder.proj", &patch_shape, Init::xavier(patch_values, d), Init::Zeros)?;
        let small = Init::Normal(0.02);
        let pair = |b: &mut Builder<'_>, name: &str, sizes: [usize; 3]| -> Result<[Linear; 2]> {
            let mut below = b.below(name);
            let first = below.linear_from("0", &[sizes[1], sizes[0]], small, Init::Zeros)?;
            Ok([first, below.linear_from("2", &[sizes[2], sizes[1]], small, Init::Zeros)?])
        };
        let t_embedder = pair(&mut b, "t_embedder.mlp", [FREQUENCIES, d, d])?;
        let t_block = b.linear_from("t_block.1", &[6 * d, d], small, Init::Zeros)?;
        let mut y = b.below("y_embedder.y_proj");
        let caption = [
            y.linear_from("fc1", &[d, config.caption_channels], small, Init::Zeros)?,
            y.linear_from("fc2", &[d, d], small, Init::Zeros)?,
        ];
        let micro = match config.micro_conditions {
            false => None,
            true => Some(Micro {
                size: pair(&mut b, "csize_embedder.mlp", [FREQUENCIES, d / 3, d / 3])?,
                aspect: pair(&mut b, "ar_embedder.mlp", [FREQUENCIES, d / 3, d / 3])?,
            }),
        };
        let blocks = blocks(&config, grid, &mut b)?;
        let mut last = b.below("final_layer");
        let outputs = config.patch * config.patch * config.out_channels;
        let final_linear = last.linear_from("linear", &[outputs, d], Init::Zeros, Init::Zeros)?;
        let final_table = last.param("scale_shift_table", &[2, d], Init::Normal(1.0 / (d as f32).sqrt()))?;
        let positions = Mutex::new(None);
        let mut model = PixArt {
            config,
            params,
            x_embedder,
            t_embedder,
            t_block,
            caption,
            micro,
            blocks,
            final_linear,
            final_table,
            grid,
            positions,
            rows: Rows::default(),
        };
        for layer in model.micro.iter().flat_map(|micro| micro.size.iter().chain(&micro.aspect)) {
            for id in [Some(layer.weight), layer.bias].into_iter().flatten() {
                model.params.get_mut(id).trainable = false;
            }
        }
        Ok(model)
    }

    /// The same model with a store of its own that shares the values: setting one leaves the other as it is.
    ///
    /// # Errors
    /// As [`PixArt::unset`].
    pub fn duplicate(&self) -> Result<PixArt> {
        let twin = PixArt::unset(self.config.clone(), &Device::dry())?;
        Ok(PixArt { params: self.params.duplicate(), ..twin })
    }

    /// Device that holds the parameters.
    pub fn device(&self) -> &Device {
        self.params.get(self.final_table).value.device()
    }

    /// The operator at a site.
    pub fn operator(&self, block: usize, site: Site) -> Option<&dyn Operator> {
        let block = self.blocks.get(block)?;
        match site {
            Site::Attn => Some(block.attn.as_ref()),
            Site::Mlp => Some(block.mlp.as_ref()),
            Site::BlockPair => None,
        }
    }

    /// Keys and values of a text in every block: once per text, whatever the number of steps.
    ///
    /// # Errors
    /// Features of another width than the model's.
    pub fn keys<'m>(&'m self, g: &Graph<'m>, text: &Text) -> Result<Keys> {
        if text.features.dim(2) != self.config.caption_channels {
            return Err(Error::failure("pixart: text", "features of another width than the model reads")
                .is(text.features.tensor().shape())
                .must(format!("[B, T, {}]", self.config.caption_channels))
                .fix("use the text encoder that belongs to the transformer"));
        }
        let h = self.caption[0].forward(g, &self.params, &text.features, act::GELU)?;
        let h = self.caption[1].forward(g, &self.params, &h, act::NONE)?;
        let single = text.constant && !g.is_recording() && h.dim(1) == 1 && text.counts.iter().all(|count| *count == 1);
        let counts: Vec<i32> = text.counts.iter().map(|count| *count as i32).collect();
        let counts = Tensor::from_i32(h.tensor().device(), &[counts.len()], &counts)?;
        let of = |block: &Arc<Block>| block.key(g, &self.params, &h, single);
        Ok(Keys { blocks: self.blocks.iter().map(of).collect::<Result<_>>()?, counts })
    }

    /// As [`PixArt::forward`], and shows every site to `observer`; nothing is then computed twice.
    ///
    /// # Errors
    /// As [`PixArt::forward`], and those of the observer.
    pub fn forward_observed<'m>(
        &'m self,
        g: &Graph<'m>,
        x: &Var,
        t: &Tensor,
        keys: &Keys,
        micro: Option<&MicroConditions>,
        observer: &mut Observer<'_>,
    ) -> Result<Var> {
        let moments = self.moments_of(g, x, t, micro)?;
        self.run(g, x, &moments, keys, Run::default(), Look::Sites(observer))
    }

    /// Predicts noise (and variance values where the model has them).
    ///
    /// `x [B, C, H, W]` noisy latents, `t [B]` f32 timesteps in 0..1000 (fractions allowed), `keys` those of B texts,
    /// `micro` where the model embeds them. Returns `[B, out_channels, H, W]` in f32.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward<'m>(
        &'m self,
        g: &Graph<'m>,
        x: &Var,
        t: &Tensor,
        keys: &Keys,
        micro: Option<&MicroConditions>,
        run: Run,
    ) -> Result<Var> {
        let moments = self.moments_of(g, x, t, micro)?;
        self.run(g, x, &moments, keys, run, Look::Nobody)
    }

    /// As [`PixArt::forward`] for step `index` of timesteps that [`PixArt::moments`] embedded, the same for all
    /// samples; only the channels that were asked for there come out. `watch` sees the residual stream `[B, N, D]`
    /// after every block.
    ///
    /// # Errors
    /// As [`PixArt::forward`], an index that was not made, and those of `watch`.
    pub fn forward_at<'m>(
        &'m self,
        g: &Graph<'m>,
        x: &Var,
        (moments, index): (&Moments, usize),
        keys: &Keys,
        run: Run,
        watch: Option<&mut Watch<'_>>,
    ) -> Result<Var> {
        let look = watch.map_or(Look::Nobody, Look::Blocks);
        self.run(g, x, &moments.at(g, &self.rows, index, x.dim(0))?, keys, run, look)
    }

    /// The timesteps `t [B]` of a batch.
    fn moments_of<'m>(
        &'m self,
        g: &Graph<'m>,
        x: &Var,
        t: &Tensor,
        micro: Option<&MicroConditions>,
    ) -> Result<Moments> {
        if t.shape().dims() != [x.dim(0)] {
            return Err(Error::failure("pixart: t", "wrong shape").is(t.shape()).must(format!("[{}]", x.dim(0))));
        }
        self.moments(g, t, micro, Outputs::All)
    }

    fn run<'m>(
        &'m self,
        g: &Graph<'m>,
        x: &Var,
        moments: &Moments,
        keys: &Keys,
        run: Run,
        mut look: Look<'_, '_>,
    ) -> Result<Var> {
        let c = &self.config;
        let shape = x.tensor().shape();
        let &[b, channels, height, width] = shape.dims() else {
            return Err(Error::failure("pixart: x", "wrong rank").is(shape).must("[B, C, H, W]"));
        };
        if channels != c.in_channels || moments.len() != b || keys.counts.dim(0) != b {
            return Err(Error::failure("pixart: x, t, text", "shapes do not fit")
                .is(format!("{shape}, {} timesteps, {} texts", moments.len(), keys.counts.dim(0)))
                .must(format!("[B, {}, H, W], B timesteps, B texts", c.in_channels)));
        }
        let grid = c.grid(height, width)?;
        let (n, device) = (grid[0] * grid[1], x.tensor().device().clone());
        let none = contracts::embed::Params { act: act::NONE };
        let tokens = g.patchify(x, c.patch, grid[0], grid[1], contracts::patchify::Params {})?;
        let mut h = self.embed(g, &tokens, &Var::constant(self.positions(&device, grid)?))?;

        let (t, modulation) = (&moments.time, &moments.modulation);
        let rows = |rule, len| self.rows.of(&device, rule, len);
        let (zeros, samples) = (rows(Rule::Same(0), b)?, rows(Rule::Groups(n), b * n)?);
        let eps = if run.semantics == Semantics::Diffusers { c.norm_eps } else { EPS };

        let other_grid;
        let blocks = match grid == self.grid {
            true => &self.blocks,
            false => {
                other_grid = self.blocks_for(grid)?;
                &other_grid
            }
        };
        for (index, (block, key)) in blocks.iter().zip(&keys.blocks).enumerate() {
            h = match key {
                Key::Tokens(kv) if run.checkpoint && g.is_recording() && !matches!(look, Look::Sites(_)) => {
                    let (block, zeros, samples, counts) =
                        (Arc::clone(block), zeros.clone(), samples.clone(), keys.counts.clone());
                    g.checkpoint(&[&h, modulation, kv], move |g, inputs| {
                        let modulation = inputs[1].clone();
                        let shared = Shared { modulation, zeros: &zeros, samples: &samples, counts: &counts, eps };
                        block.forward(g, &self.params, &inputs[0], &Key::Tokens(inputs[2].clone()), &shared, None)
                    })?
                }
                key => {
                    let modulation = modulation.clone();
                    let shared = Shared { modulation, zeros: &zeros, samples: &samples, counts: &keys.counts, eps };
                    let observer = match &mut look {
                        Look::Sites(observer) => Some(observer),
                        _ => None,
                    };
                    block.forward(g, &self.params, &h, key, &shared, observer)?
                }
            };
            if let Look::Blocks(watch) = &mut look {
                watch(index, h.tensor())?;
            }
        }
        // Shift and scale of the last norm: the timestep itself on both rows of a table.
        let twice = g.embed(t, &rows(Rule::Groups(2), 2 * b)?, None, none)?;
        let table = g.param(&self.params, self.final_table);
        let last = g.embed(&table, &rows(Rule::Turns(2), 2 * b)?, Some(&twice), none)?;
        let last = g.reshape(&last, &[b, 2, c.width])?;
        let h = g.ln_modulate(&h, &last, contracts::ln_modulate::Params { shift: 0, scale: 1, eps })?;
        let out = match &moments.last {
            None => self.final_linear.forward(g, &self.params, &h, act::NONE)?,
            Some((weight, bias)) => {
                let bf16 = g.precision() == Precision::Bf16;
                let settings = contracts::gemm::Params { act: act::NONE, gate_row: 0, bf16 };
                g.gemm(&h, weight, Some(bias), None, None, None, settings)?
            }
        };
        let out = g.unpatchify(&out, moments.channels, c.patch, grid[0], grid[1], contracts::unpatchify::Params {})?;
        g.to_f32(&out)
    }

    fn embed(&self, g: &Graph<'_>, tokens: &Var, pos: &Var) -> Result<Var> {
        // The patch convolution is a product: its weight [D, C, P, P] flattens to [D, C·P·P].
        let weight = g.reshape(&g.param(&self.params, self.x_embedder.weight), &[self.config.width, tokens.dim(2)])?;
        let bias = self.x_embedder.bias.map(|id| g.param(&self.params, id));
        let settings = contracts::gemm::Params { act: act::NONE, gate_row: 0, bf16: false };
        g.gemm(tokens, &weight, bias.as_ref(), Some(pos), None, None, settings)
    }

    /// The timestep, with size and aspect ratio where the model embeds them: `[B, D]`, before any activation.
    fn time(&self, g: &Graph<'_>, t: &Tensor, micro: Option<&MicroConditions>) -> Result<Var> {
        let (b, d) = (t.dim(0), self.config.width);
        let time = self.waves(g, t, &self.t_embedder)?;
        let (layers, micro) = match (&self.micro, micro) {
            (None, None) => return Ok(time),
            (Some(layers), Some(micro)) => (layers, micro),
            (model, _) => {
                let (is, must) = if model.is_some() { ("absent", "given") } else { ("given", "absent") };
                return Err(Error::failure("pixart: size and aspect ratio", "do not fit the model").is(is).must(must));
            }
        };
        let (sizes, frozen) = (micro.size.reshape(&[2 * b])?, Graph::inference(g.precision()));
        let sizes = self.waves(&frozen, &sizes, &layers.size)?;
        let aspects = self.waves(&frozen, &micro.aspect, &layers.aspect)?;
        let (wide, narrow) = (sizes.tensor().values()?, aspects.tensor().values()?);
        let mut added = t.device().empty_of(&[b, d], time.tensor().dtype())?;
        added.edit(|added| {
            for (sample, row) in added.chunks_mut(d).enumerate() {
                let (size, aspect) = row.split_at_mut(d / 3 * 2);
                size.copy_from_slice(&wide[sample * size.len()..][..size.len()]);
                aspect.copy_from_slice(&narrow[sample * aspect.len()..][..aspect.len()]);
            }
        })?;
        g.add(&time, &Var::constant(added))
    }

    /// A number's sinusoid through two layers: `[B]` to `[B, out]`.
    fn waves(&self, g: &Graph<'_>, values: &Tensor, layers: &[Linear; 2]) -> Result<Var> {
        let waves = sinusoid(values, FREQUENCIES, contracts::sinusoid::Params { denominator: 128.0 })?;
        let b = waves.dim(0);
        let waves = Var::constant(waves.reshape(&[b, 1, FREQUENCIES])?);
        let h = layers[0].forward(g, &self.params, &waves, act::SILU)?;
        let h = layers[1].forward(g, &self.params, &h, act::NONE)?;
        g.reshape(&h, &[b, h.dim(2)])
    }

    /// Positions `[N, D]` of a grid; those of the last grid are kept.
    fn positions(&self, device: &Device, grid: [usize; 2]) -> Result<Tensor> {
        let mut kept = self.positions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, table)) = kept.as_ref()
            && *known == grid
            && table.device() == device
        {
            return Ok(table.clone());
        }
        let c = &self.config;
        let coordinates = |side: usize| -> Vec<f64> {
            (0..side).map(|i| i as f64 / (side as f64 / c.base() as f64) / c.interpolation).collect()
        };
        let shape = [grid[0] * grid[1], c.width];
        let table = match device.is_dry() {
            true => device.empty_of(&shape, device.element())?,
            false => {
                let values = positions::table(&coordinates(grid[0]), &coordinates(grid[1]), c.width);
                Tensor::from_f32_as(device, &shape, &values, device.element())?
            }
        };
        *kept = Some((grid, table.clone()));
        Ok(table)
    }

    /// The blocks over the same parameters, built for another grid of tokens: an operator may depend on it.
    fn blocks_for(&self, grid: [usize; 2]) -> Result<Vec<Arc<Block>>> {
        // Parameters are numbered in the order of their creation, so those of a twin are those of the model.
        let twin = PixArt::build(self.config.clone(), grid, &Device::dry(), 0, Scheme::Unset)?;
        let mut both = twin.params.iter().zip(self.params.iter());
        match both.find(|((_, a), (_, b))| a.name != b.name || a.value.shape() != b.value.shape()) {
            None => Ok(twin.blocks),
            Some(((_, p), _)) => Err(Error::failure(format!("pixart: {}", p.name), "depends on the picture's size")
                .is(format!("a grid of {} x {} tokens", grid[0], grid[1]))
                .must(format!("{} x {}", self.grid[0], self.grid[1]))),
        }
    }
}

/// All blocks, for a grid of tokens.
fn blocks(config: &PixArtConfig, grid: [usize; 2], b: &mut Builder<'_>) -> Result<Vec<Arc<Block>>> {
    let dims = config.block_dims(grid);
    let build = |(i, spec)| Ok(Arc::new(Block::build(i, spec, dims, b)?));
    config.blocks.iter().enumerate().map(build).collect()
}
