//! The encoder of T5 v1.1 (arXiv 1910.10683, gated GELU as in 2002.05202): text ids to features.
//!
//! Only real tokens go through it: padding is never attended to, positions count distances only, and nobody reads what
//! comes out at a padding. Scores are not scaled; the biases of the first block serve all. With bf16 products the last
//! matrix of every MLP stays in f32, as the residual stream does: its results outgrow 16-bit floats of 5 exponent bits. On
//! a device that computes in bf16 both are bf16, which has the exponents of f32.

mod charsmap;
mod load;
mod save;
mod tokenizer;

pub use load::{Residence, load, memory_of, plan_memory};
pub use save::{save, write_word_tokenizer};
pub use tokenizer::{Encoded, Tokenizer};

use crate::autograd::{Graph, ParamId, ParamStore, Precision, Var};
use crate::error::{Error, Result};
use crate::nn::{Builder, Init, Linear};
use crate::ops::{act, contracts};
use crate::tensor::{Device, Tensor};

/// Sizes of an encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct T5Config {
    /// Width D.
    pub width: usize,
    /// Attention heads H.
    pub heads: usize,
    /// Width of a head E; H·E may differ from D.
    pub head_width: usize,
    /// Hidden width of the MLP F.
    pub hidden: usize,
    /// Blocks.
    pub depth: usize,
    /// Rows of the table of embeddings.
    pub vocabulary: usize,
    /// Rows of the table of biases, of both directions.
    pub buckets: usize,
    /// Distance from which on all keys share a bias.
    pub max_distance: usize,
    /// Epsilon of the norms.
    pub eps: f32,
}

impl T5Config {
    /// T5-XXL v1.1, which PixArt reads.
    pub fn xxl() -> T5Config {
        T5Config {
            width: 4096,
            heads: 64,
            head_width: 64,
            hidden: 10_240,
            depth: 24,
            vocabulary: 32_128,
            buckets: 32,
            max_distance: 128,
            eps: 1e-6,
        }
    }

    /// Row of the table of biases for a key `distance` tokens after its query.
    fn bucket(&self, distance: isize) -> usize {
        let side = self.buckets / 2;
        let (base, size) = (if distance > 0 { side } else { 0 }, distance.unsigned_abs());
        let exact = side / 2;
        if size < exact {
            return base + size;
        }
        // Where the logarithm is a whole number, rounding must not decide.
        let octaves = (size as f64 / exact as f64).ln() / (self.max_distance as f64 / exact as f64).ln();
        base + (exact + (octaves * (side - exact) as f64 + 1e-9) as usize).min(side - 1)
    }

    fn check(&self) -> Result<()> {
        let wrong = |what: &str, is: String, must: &str| {
            Err(Error::failure(format!("t5: {what}"), "impossible size").is(is).must(must))
        };
        if self.depth == 0 || self.depth > 1000 {
            return wrong("num_layers", self.depth.to_string(), "1 to 1000");
        }
        if self.heads == 0 || self.head_width == 0 || self.width == 0 || self.hidden == 0 || self.vocabulary == 0 {
            return wrong("sizes", format!("{self:?}"), "positive");
        }
        if self.buckets < 4 || !self.buckets.is_multiple_of(2) || self.max_distance <= self.buckets / 4 {
            return wrong(
                "relative_attention",
                format!("{} buckets up to {}", self.buckets, self.max_distance),
                "an even number of at least 4, and a distance above a quarter of it",
            );
        }
        Ok(())
    }
}

/// A text to encode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Ids; the encoder gives features for each.
    pub ids: Vec<u32>,
    /// How many of them, from the first on, are attended to.
    pub count: usize,
}

impl Tokens {
    /// A text that is attended to as a whole.
    pub fn whole(ids: Vec<u32>) -> Tokens {
        Tokens { count: ids.len(), ids }
    }

    /// A text among `len` places, of which the rest is padding.
    pub fn padded(mut ids: Vec<u32>, len: usize) -> Tokens {
        let count = ids.len();
        ids.resize(len.max(count), 0);
        Tokens { ids, count }
    }
}

/// One block.
#[derive(Debug)]
struct Block {
    norm: ParamId,
    qkv: Linear,
    output: Linear,
    mlp_norm: ParamId,
    gate: Linear,
    value: Linear,
    narrow: Linear,
}

/// What a block adds `encoder.block.<index>.` in front of.
fn block_prefix(index: usize) -> String {
    format!("encoder.block.{index}")
}

impl Block {
    fn build(index: usize, c: &T5Config, builder: &mut Builder<'_>) -> Result<Block> {
        let mut b = builder.below(&block_prefix(index));
        let (d, inner) = (c.width, c.heads * c.head_width);
        let norm = b.param("layer.0.layer_norm.weight", &[d], Init::Ones)?;
        let qkv = b.linear_without_bias("layer.0.SelfAttention.qkv", d, 3 * inner)?;
        let output = b.linear_without_bias("layer.0.SelfAttention.o", inner, d)?;
        let mlp_norm = b.param("layer.1.layer_norm.weight", &[d], Init::Ones)?;
        let mut mlp = b.below("layer.1.DenseReluDense");
        let gate = mlp.linear_without_bias("wi_0", d, c.hidden)?;
        let value = mlp.linear_without_bias("wi_1", d, c.hidden)?;
        let narrow = mlp.linear_without_bias("wo", c.hidden, d)?;
        Ok(Block { norm, qkv, output, mlp_norm, gate, value, narrow })
    }

    /// The residual stream `[B, N, D]` after the block; `bias` is `[2·N − 1, H]`.
    fn forward(
        &self,
        g: &Graph<'_>,
        params: &ParamStore,
        c: &T5Config,
        x: &Var,
        (bias, counts): (&Var, &Tensor),
    ) -> Result<Var> {
        let (b, n, d) = (x.dim(0), x.dim(1), x.dim(2));
        let norm = |x: &Var, weight: ParamId| {
            let settings = contracts::rms_norm::Params { gate_offset: 0, eps: c.eps };
            g.rms_norm(x, None, &g.param(params, weight), settings)
        };
        let qkv = self.qkv.forward(g, params, &norm(x, self.norm)?, act::NONE)?;
        let qkv = g.reshape(&qkv, &[b, n, 3, c.heads, c.head_width])?;
        let y = g.relative_attention(&qkv, bias, Some(counts), contracts::relative_attention::Params { scale: 1.0 })?;
        let x = self.output.forward_onto(g, params, &g.reshape(&y, &[b, n, c.heads * c.head_width])?, Some(x))?;

        let h = norm(&x, self.mlp_norm)?;
        let gate = self.gate.forward(g, params, &h, act::GELU)?;
        // A token each, so that every one has a gate of its own.
        let gate = g.reshape(&gate, &[b * n, 1, c.hidden])?;
        let h = g.reshape(&h, &[b * n, 1, d])?;
        let settings = contracts::gemm::Params { act: act::NONE, gate_row: 0, bf16: g.precision() == Precision::Bf16 };
        let value = g.param(params, self.value.weight);
        let gated = g.gemm(&h, &value, None, None, Some(&gate), None, settings)?;
        let gated = g.reshape(&gated, &[b, n, c.hidden])?;
        let exact = contracts::gemm::Params { bf16: false, ..settings };
        g.gemm(&gated, &g.param(params, self.narrow.weight), None, None, None, Some(&x), exact)
    }
}

/// An encoder.
pub struct T5 {
    /// Sizes.
    pub config: T5Config,
    /// What is held in memory: everything, or all but the blocks.
    pub params: ParamStore,
    embeddings: ParamId,
    biases: ParamId,
    last_norm: ParamId,
    /// Empty where blocks are read as they are needed.
    blocks: Vec<Block>,
    stream: Option<load::Stream>,
    device: Device,
}

impl T5 {
    /// A new encoder with every block in memory, from a seed.
    ///
    /// # Errors
    /// Sizes that cannot be, or too little memory.
    pub fn new(config: T5Config, device: &Device, seed: u64) -> Result<T5> {
        T5::build(config, device, (device, seed, crate::nn::Scheme::Xavier), true)
    }

    fn build(
        config: T5Config,
        device: &Device,
        (held, seed, scheme): (&Device, u64, crate::nn::Scheme),
        resident: bool,
    ) -> Result<T5> {
        config.check()?;
        let mut params = ParamStore::default();
        let mut b = Builder::new(&mut params, held, seed, scheme);
        let embeddings = b.param("shared.weight", &[config.vocabulary, config.width], Init::Normal(1.0))?;
        let biases = b.param(BIASES, &[config.buckets, config.heads], Init::Normal(0.1))?;
        let last_norm = b.param("encoder.final_layer_norm.weight", &[config.width], Init::Ones)?;
        let count = if resident { config.depth } else { 0 };
        let blocks = (0..count).map(|i| Block::build(i, &config, &mut b)).collect::<Result<_>>()?;
        Ok(T5 { config, params, embeddings, biases, last_norm, blocks, stream: None, device: device.clone() })
    }

    /// The same encoder with a store of its own that shares the values: setting one leaves the other as it is.
    ///
    /// # Errors
    /// An encoder whose blocks are not in memory.
    pub fn duplicate(&self) -> Result<T5> {
        self.is_whole()?;
        let unset = (&Device::dry(), 0, crate::nn::Scheme::Unset);
        let twin = T5::build(self.config.clone(), &self.device, unset, true)?;
        Ok(T5 { params: self.params.duplicate(), ..twin })
    }

    fn is_whole(&self) -> Result<()> {
        match self.stream {
            Some(_) => Err(Error::failure("t5", "its blocks are not in memory").must("loaded as a whole")),
            None => Ok(()),
        }
    }

    /// Device that runs the encoder.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Features of one batch of equally long texts, for training: `ids [B, N]` i32, `counts [B]` i32. Returns
    /// `[B, N, D]`.
    ///
    /// # Errors
    /// An id that the vocabulary has not, or an encoder whose blocks are not in memory.
    pub fn forward<'m>(&'m self, g: &Graph<'m>, ids: &Tensor, counts: &Tensor) -> Result<Var> {
        self.is_whole()?;
        let (mut x, bias) = (self.embed(g, ids)?, self.bias(g, ids.dim(1))?);
        for block in &self.blocks {
            x = block.forward(g, &self.params, &self.config, &x, (&bias, counts))?;
        }
        self.finish(g, &x)
    }

    /// Features of every text on its own: `[N, D]` each. Blocks that are not in memory are read once for all texts.
    ///
    /// # Errors
    /// An id that the vocabulary has not, no token at all, features that are not finite, or a block that cannot be read.
    pub fn encode(&self, texts: &[Tokens], precision: Precision) -> Result<Vec<Tensor>> {
        let g = &Graph::inference(precision);
        let mut states = Vec::with_capacity(texts.len());
        for text in texts {
            if text.count == 0 || text.count > text.ids.len() {
                return Err(Error::failure("t5: text", "no token that counts").is(text.count).must("at least one"));
            }
            if let Some(id) = text.ids.iter().find(|id| **id as usize >= self.config.vocabulary) {
                return Err(Error::failure("t5: ids", "not in the vocabulary")
                    .is(id)
                    .must(format!("0 to {}", self.config.vocabulary - 1))
                    .fix("use the tokenizer that belongs to the text encoder"));
            }
            let ids: Vec<i32> = text.ids.iter().map(|&id| i32::try_from(id).unwrap_or(i32::MAX)).collect();
            let ids = Tensor::from_i32(&self.device, &[1, ids.len()], &ids)?;
            let counts = Tensor::from_i32(&self.device, &[1], &[text.count as i32])?;
            states.push((self.embed(g, &ids)?, self.bias(g, ids.dim(1))?, counts));
        }
        for index in 0..self.config.depth {
            let read;
            let (block, params) = match &self.stream {
                None => (&self.blocks[index], &self.params),
                Some(stream) => {
                    read = stream.block(index, &self.config, &self.device)?;
                    (&read.0, &read.1)
                }
            };
            for (x, bias, counts) in &mut states {
                *x = block.forward(g, params, &self.config, x, (bias, counts))?;
                if let Some(value) = x.tensor().values()?.iter().find(|v| !v.is_finite()) {
                    return Err(Error::failure(format!("text encoder: block {index}"), "result is not finite")
                        .is(value)
                        .must("finite")
                        .fix("use the encoder's f32 or bf16 weights: 16-bit floats of 5 exponent bits overflow"));
                }
            }
        }
        let finish = |(x, ..): &(Var, Var, Tensor)| {
            let y = self.finish(g, x)?.into_tensor();
            let (n, d) = (y.dim(1), y.dim(2));
            y.into_shape(&[n, d])
        };
        states.iter().map(finish).collect()
    }

    fn embed(&self, g: &Graph<'_>, ids: &Tensor) -> Result<Var> {
        let (b, n) = (ids.dim(0), ids.dim(1));
        let table = g.param(&self.params, self.embeddings);
        let rows = g.embed(&table, &ids.reshape(&[b * n])?, None, contracts::embed::Params { act: act::NONE })?;
        g.reshape(&rows, &[b, n, self.config.width])
    }

    /// Biases for all distances between `n` tokens, `[2·n − 1, H]`.
    fn bias(&self, g: &Graph<'_>, n: usize) -> Result<Var> {
        let rows: Vec<i32> = (0..2 * n - 1).map(|r| self.config.bucket(r as isize + 1 - n as isize) as i32).collect();
        let rows = Tensor::from_i32(&self.device, &[rows.len()], &rows)?;
        g.embed(&g.param(&self.params, self.biases), &rows, None, contracts::embed::Params { act: act::NONE })
    }

    fn finish(&self, g: &Graph<'_>, x: &Var) -> Result<Var> {
        let settings = contracts::rms_norm::Params { gate_offset: 0, eps: self.config.eps };
        g.to_f32(&g.rms_norm(x, None, &g.param(&self.params, self.last_norm), settings)?)
    }
}

/// Name of the table of biases, which the first block holds in files.
const BIASES: &str = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_of_the_released_encoder() {
        let c = T5Config::xxl();
        // The distances at which a bucket begins.
        for (bucket, start) in [(7, 7), (8, 8), (9, 12), (10, 16), (11, 23), (12, 32), (13, 46), (14, 64), (15, 91)] {
            assert_eq!(c.bucket(-start), bucket, "{start}");
            assert_eq!(c.bucket(1 - start), bucket - 1, "{start}");
            assert_eq!(c.bucket(start), 16 + bucket, "{start}");
        }
        assert_eq!((c.bucket(0), c.bucket(5000), c.bucket(-5000)), (0, 31, 15));
    }
}
