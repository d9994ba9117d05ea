//! Linear layers with the epilogues of a transformer block.

use super::lora;
use crate::autograd::{Graph, ParamId, ParamStore, Precision, Var};
use crate::error::Result;
use crate::ops::{act, contracts::gemm};

/// y = x·wᵀ + b.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: ParamId,
    /// `[out]`.
    pub bias: Option<ParamId>,
}

/// What follows a branch of a block: `residual + modulation[gate_row] · branch`.
#[derive(Clone, Copy)]
pub struct Epilogue<'a> {
    /// Residual stream `[B, N, D]`.
    pub residual: &'a Var,
    /// Modulation table `[B, C, D]`.
    pub modulation: &'a Var,
    /// Row of the table that gates.
    pub gate_row: usize,
}

impl Linear {
    /// `act(x·wᵀ + b)` for `x [B, N, in]`; `activation` is a code of [`act`].
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, activation: usize) -> Result<Var> {
        self.run(g, params, x, None, activation, (None, None))
    }

    /// `x·wᵀ + b + pos[n]` for a table `pos [N, out]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward_with_rows(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, pos: &Var) -> Result<Var> {
        self.run(g, params, x, Some(pos), act::NONE, (None, None))
    }

    /// `x·wᵀ + b`, then the block's epilogue where there is one.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn project(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        let gate = epilogue.map(|e| (e.modulation, e.gate_row));
        self.run(g, params, x, None, act::NONE, (gate, epilogue.map(|e| e.residual)))
    }

    /// `x·wᵀ + b`, added to a residual stream where there is one.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward_onto(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, residual: Option<&Var>) -> Result<Var> {
        self.run(g, params, x, None, act::NONE, (None, residual))
    }

    fn run(
        &self,
        g: &Graph<'_>,
        params: &ParamStore,
        x: &Var,
        pos: Option<&Var>,
        activation: usize,
        (gate, residual): (Option<(&Var, usize)>, Option<&Var>),
    ) -> Result<Var> {
        let weight = g.param(params, self.weight);
        let bias = self.bias.map(|id| g.param(params, id));
        let gate_row = gate.map_or(0, |(_, row)| row);
        let settings = gemm::Params { act: activation, gate_row, bf16: g.precision() == Precision::Bf16 };
        let gate = gate.map(|(table, _)| table);
        let Some(adapter) = params.adapter(self.weight) else {
            return g.gemm(x, &weight, bias.as_ref(), pos, gate, residual, settings);
        };
        let low = lora::down(g, params, x, adapter)?;
        let up = g.param(params, adapter.b);
        if activation == act::NONE {
            // Gate and residual are linear: the addition takes the same gate, on what the layer has given.
            let y = g.gemm(x, &weight, bias.as_ref(), pos, gate, residual, settings)?;
            return g.gemm(&low, &up, None, None, gate, Some(&y), settings);
        }
        // Ahead of an activation the addition comes as a table of rows, one for each token of the batch.
        let (tokens, outputs) = (x.dim(0) * x.dim(1), up.dim(0));
        let added = g.gemm(&low, &up, None, None, None, None, gemm::Params { act: act::NONE, ..settings })?;
        let added = g.reshape(&added, &[tokens, outputs])?;
        let rows = g.reshape(x, &[1, tokens, x.dim(2)])?;
        let y = g.gemm(&rows, &weight, bias.as_ref(), Some(&added), None, None, settings)?;
        g.reshape(&y, &[x.dim(0), x.dim(1), outputs])
    }
}
