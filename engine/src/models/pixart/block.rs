//! A block of a PixArt transformer: self-attention and MLP modulated by one shared vector and a table of the block's
//! own, and between them cross-attention to the text, without a norm and without a gate.

use super::text::Key;
use crate::autograd::{Graph, ParamId, ParamStore, Var};
use crate::error::Result;
use crate::models::dit::BlockSpec;
use crate::models::sites::{Observer, Seen};
use crate::nn::operators::{self, BlockDims, Operator, Site};
use crate::nn::{Builder, Epilogue, Init, Linear};
use crate::ops::{act, contracts};
use crate::tensor::Tensor;

/// Rows of the modulation table: shift, scale and gate of a site.
const ATTN: [usize; 3] = [0, 1, 2];
const MLP: [usize; 3] = [3, 4, 5];

/// One block.
#[derive(Debug)]
pub(super) struct Block {
    index: usize,
    pub attn: Box<dyn Operator>,
    pub mlp: Box<dyn Operator>,
    table: ParamId,
    query: Linear,
    key_value: Linear,
    output: Linear,
    heads: usize,
}

/// What all blocks of a forward pass share.
pub(super) struct Shared<'s> {
    /// `[B, 6·D]` modulation.
    pub modulation: Var,
    /// `[B]` zeros, and `[B·N]` the sample of every token.
    pub zeros: &'s Tensor,
    pub samples: &'s Tensor,
    /// `[B]` text tokens.
    pub counts: &'s Tensor,
    /// Epsilon of the norms.
    pub eps: f32,
}

impl Block {
    /// Block `index` with new parameters, named `blocks.<index>.*`.
    pub fn build(index: usize, spec: &BlockSpec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Block> {
        let mut b = builder.below(&format!("blocks.{index}"));
        let d = dims.width;
        let table = b.param("scale_shift_table", &[6, d], Init::Normal(1.0 / (d as f32).sqrt()))?;
        let attn = operators::build(&spec.attn, Site::Attn, dims, &mut b.below("attn"))?;
        let mut cross = b.below("cross_attn");
        let query = cross.linear("q_linear", d, d)?;
        let key_value = cross.linear("kv_linear", d, 2 * d)?;
        // Zero at first, so that a new model does not depend on the text.
        let output = cross.linear_from("proj", &[d, d], Init::Zeros, Init::Zeros)?;
        let mlp = operators::build(&spec.mlp, Site::Mlp, dims, &mut b.below("mlp"))?;
        Ok(Block { index, attn, mlp, table, query, key_value, output, heads: dims.heads })
    }

    /// Keys and values of the text `[B, L, D]`; `single` where every sample has one token, so that attention to it is
    /// its value.
    pub fn key(&self, g: &Graph<'_>, params: &ParamStore, text: &Var, single: bool) -> Result<Key> {
        let (b, l, d) = (text.dim(0), text.dim(1), text.dim(2));
        let kv = self.key_value.forward(g, params, text, act::NONE)?;
        if !single {
            return Ok(Key::Tokens(g.reshape(&kv, &[b, l, 2, self.heads, d / self.heads])?));
        }
        let mut value = text.tensor().device().empty_of(&[b, 1, d], kv.tensor().dtype())?;
        let pairs = kv.tensor().values()?;
        let pairs = pairs.chunks(2 * d);
        value
            .edit(|value| value.chunks_mut(d).zip(pairs).for_each(|(value, pair)| value.copy_from_slice(&pair[d..])))?;
        let added = self.output.forward(g, params, &Var::constant(value), act::NONE)?;
        Ok(Key::Constant(g.reshape(&added, &[b, d])?))
    }

    /// The residual stream after the block; `observer` is shown its sites.
    pub fn forward(
        &self,
        g: &Graph<'_>,
        params: &ParamStore,
        x: &Var,
        key: &Key,
        shared: &Shared<'_>,
        mut observer: Option<&mut &mut Observer<'_>>,
    ) -> Result<Var> {
        let (b, d) = (x.dim(0), x.dim(2));
        let none = contracts::embed::Params { act: act::NONE };
        let table = g.reshape(&g.param(params, self.table), &[1, 6 * d])?;
        let modulation = g.embed(&table, shared.zeros, Some(&shared.modulation), none)?;
        let modulation = g.reshape(&modulation, &[b, 6, d])?;
        let x = self.site(g, params, (Site::Attn, x), &modulation, shared.eps, observer.as_deref_mut())?;
        let x = self.read(g, params, &x, key, shared)?;
        self.site(g, params, (Site::Mlp, &x), &modulation, shared.eps, observer)
    }

    /// A gated site: x + gate·operator(norm(x)·(1 + scale) + shift).
    fn site(
        &self,
        g: &Graph<'_>,
        params: &ParamStore,
        (site, x): (Site, &Var),
        modulation: &Var,
        eps: f32,
        observer: Option<&mut &mut Observer<'_>>,
    ) -> Result<Var> {
        let (operator, [shift, scale, gate_row]) =
            if site == Site::Attn { (&self.attn, ATTN) } else { (&self.mlp, MLP) };
        let h = g.ln_modulate(x, modulation, contracts::ln_modulate::Params { shift, scale, eps })?;
        let Some(observer) = observer else {
            return operator.forward(g, params, &h, Some(Epilogue { residual: x, modulation, gate_row }));
        };
        let output = operator.forward(g, params, &h, None)?;
        let gate = Some((modulation, gate_row));
        observer(&Seen { block: self.index, site, input: &h, output: &output, gate, condition: None })?;
        g.gate_residual(x, modulation, &output, contracts::gate_residual::Params { gate_row })
    }

    /// x plus what it reads in the text.
    fn read(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, key: &Key, shared: &Shared<'_>) -> Result<Var> {
        let (b, n, d) = (x.dim(0), x.dim(1), x.dim(2));
        let kv = match key {
            Key::Tokens(kv) => kv,
            Key::Constant(added) => {
                let rows = g.reshape(x, &[b * n, d])?;
                let sum = g.embed(added, shared.samples, Some(&rows), contracts::embed::Params { act: act::NONE })?;
                return g.reshape(&sum, &[b, n, d]);
            }
        };
        let e = d / self.heads;
        let q = self.query.forward(g, params, x, act::NONE)?;
        let q = g.reshape(&q, &[b, n, 1, self.heads, e])?;
        let scale = 1.0 / (e as f32).sqrt();
        let y = g.cross_attention(&q, kv, Some(shared.counts), contracts::cross_attention::Params { scale })?;
        self.output.forward_onto(g, params, &g.reshape(&y, &[b, n, d])?, Some(x))
    }
}
