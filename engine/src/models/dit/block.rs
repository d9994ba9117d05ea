//! The blocks of a DiT: one after another, or two in parallel with a learned merge (arXiv 2506.05340, §6).

use super::{BlockSpec, EPS, Observer, Seen, Semantics, modulation};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::Result;
use crate::nn::operators::{self, BlockDims, Operator, Site};
use crate::nn::{Builder, Epilogue, Init, Linear};
use crate::ops::contracts;

/// Rows of a block's modulation table, in the order of the checkpoint.
mod row {
    pub const ATTN: Rows = Rows { shift: 0, scale: 1, gate: 2 };
    pub const MLP: Rows = Rows { shift: 3, scale: 4, gate: 5 };

    #[derive(Clone, Copy)]
    pub struct Rows {
        pub shift: usize,
        pub scale: usize,
        pub gate: usize,
    }
}

/// One block: token mixing, channel mixing, and the modulation of both.
#[derive(Debug)]
pub(crate) struct Block {
    index: usize,
    attn: Box<dyn Operator>,
    mlp: Box<dyn Operator>,
    modulation: Linear,
}

impl Block {
    /// Block `index` with new parameters, named `blocks.<index>.*`.
    ///
    /// # Errors
    /// An operator that cannot be built, or too little memory.
    pub fn build(index: usize, spec: &BlockSpec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Block> {
        let mut block = builder.below(&format!("blocks.{index}"));
        Ok(Block {
            index,
            attn: operators::build(&spec.attn, Site::Attn, dims, &mut block.below("attn"))?,
            mlp: operators::build(&spec.mlp, Site::Mlp, dims, &mut block.below("mlp"))?,
            modulation: block.linear_from(
                "adaLN_modulation.1",
                &[6 * dims.width, dims.width],
                Init::Zeros,
                Init::Zeros,
            )?,
        })
    }

    fn operator(&self, site: Site) -> Option<&dyn Operator> {
        match site {
            Site::Attn => Some(self.attn.as_ref()),
            Site::Mlp => Some(self.mlp.as_ref()),
            Site::BlockPair => None,
        }
    }

    fn forward(
        &self,
        g: &Graph<'_>,
        params: &ParamStore,
        x: &Var,
        condition: &Var,
        semantics: Semantics,
        mut observer: Option<&mut &mut Observer<'_>>,
    ) -> Result<Var> {
        let modulation = modulation(g, params, &self.modulation, condition, 6)?;
        let sites =
            [(Site::Attn, &self.attn, row::ATTN, EPS), (Site::Mlp, &self.mlp, row::MLP, semantics.mlp_norm_eps)];
        let mut x = x.clone();
        for (site, operator, rows, eps) in sites {
            let settings = contracts::ln_modulate::Params { shift: rows.shift, scale: rows.scale, eps };
            let h = g.ln_modulate(&x, &modulation, settings)?;
            x = match &mut observer {
                None => {
                    let epilogue = Epilogue { residual: &x, modulation: &modulation, gate_row: rows.gate };
                    operator.forward(g, params, &h, Some(epilogue))?
                }
                Some(observer) => {
                    let branch = operator.forward(g, params, &h, None)?;
                    observer(&Seen {
                        block: self.index,
                        site,
                        input: &h,
                        output: &branch,
                        gate: Some((&modulation, rows.gate)),
                        condition: Some(condition),
                    })?;
                    g.gate_residual(&x, &modulation, &branch, contracts::gate_residual::Params { gate_row: rows.gate })?
                }
            };
        }
        Ok(x)
    }
}

/// Blocks 2j and 2j + 1 on the same input x: `y = x + W·[B₁(x) − x; B₂(x) − x] + b`.
///
/// W starts as [I I] and b as zero, so that a new pair adds to x what both blocks add.
#[derive(Debug)]
pub struct Pair {
    index: usize,
    blocks: [Block; 2],
    merge: Linear,
}

impl Pair {
    /// Pair j = `index` with new parameters: those of its blocks, and `pairs.<j>.merge.weight [D, 2·D]` and
    /// `.bias [D]`.
    ///
    /// # Errors
    /// As [`Block::build`].
    pub fn build(index: usize, specs: [&BlockSpec; 2], dims: BlockDims, builder: &mut Builder<'_>) -> Result<Pair> {
        let mut block = |half: usize| Block::build(2 * index + half, specs[half], dims, builder);
        let blocks = [block(0)?, block(1)?];
        let (d, mut own) = (dims.width, builder.below(&format!("pairs.{index}")));
        let merge = own.linear_from("merge", &[d, 2 * d], Init::Eye(d), Init::Zeros)?;
        Ok(Pair { index, blocks, merge })
    }

    /// What the pair adds to its input `x [B, N, D]`; with `residual`, x included.
    ///
    /// # Errors
    /// When the shapes do not fit, and those of the observer.
    pub fn forward(
        &self,
        g: &Graph<'_>,
        params: &ParamStore,
        x: &Var,
        condition: &Var,
        run: (Semantics, bool),
        mut observer: Option<&mut &mut Observer<'_>>,
    ) -> Result<Var> {
        let (semantics, residual) = run;
        let [first, second] = &self.blocks;
        let first = first.forward(g, params, x, condition, semantics, observer.as_deref_mut())?;
        let second = second.forward(g, params, x, condition, semantics, observer)?;
        let deltas = g.branch_deltas(x, &first, &second, contracts::branch_deltas::Params {})?;
        let deltas = g.reshape(&deltas, &[x.dim(0), x.dim(1), 2 * x.dim(2)])?;
        self.merge.forward_onto(g, params, &deltas, residual.then_some(x))
    }
}

/// What the residual stream passes through next.
#[derive(Debug)]
pub(super) enum Unit {
    /// A block alone.
    Single(Block),
    /// Two blocks in parallel.
    Pair(Pair),
}

impl Unit {
    /// The operator at a site of a block, where it is in this unit.
    pub fn operator(&self, block: usize, site: Site) -> Option<&dyn Operator> {
        let blocks = match self {
            Unit::Single(block) => std::slice::from_ref(block),
            Unit::Pair(pair) => &pair.blocks,
        };
        blocks.iter().find(|b| b.index == block)?.operator(site)
    }

    /// The pair that is complete once this unit has run: its own, or that of a block and the one before it.
    pub fn completes(&self) -> Option<usize> {
        match self {
            Unit::Single(block) => (block.index % 2 == 1).then_some(block.index / 2),
            Unit::Pair(pair) => Some(pair.index),
        }
    }

    /// Whether a pair begins with this unit.
    pub fn begins_pair(&self) -> bool {
        match self {
            Unit::Single(block) => block.index.is_multiple_of(2),
            Unit::Pair(_) => true,
        }
    }

    /// The residual stream after this unit.
    pub fn forward(
        &self,
        g: &Graph<'_>,
        params: &ParamStore,
        x: &Var,
        condition: &Var,
        semantics: Semantics,
        observer: Option<&mut &mut Observer<'_>>,
    ) -> Result<Var> {
        match self {
            Unit::Single(block) => block.forward(g, params, x, condition, semantics, observer),
            Unit::Pair(pair) => pair.forward(g, params, x, condition, (semantics, true), observer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Dit, DitConfig, Run, SaveAs, load, save};
    use super::*;
    use crate::autograd::Precision;
    use crate::io::files::test_dir;
    use crate::tensor::{Device, Tensor};
    use graft_kernels::rng::Philox;
    use std::collections::BTreeMap;

    /// Four blocks, the last two in parallel, in which every branch matters: nothing is zero as in a fresh model.
    fn model(pairs: &[usize]) -> Dit {
        let sizes = DitConfig { input_size: 4, in_channels: 1, classes: 3, ..DitConfig::plain(4, 8, 2) };
        let mut model = Dit::new(DitConfig { pairs: pairs.to_vec(), ..sizes }, &Device::cpu(), 1).unwrap();
        let ids: Vec<_> = model.params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
        for id in ids {
            let name = model.params.get(id).name.clone();
            if !name.starts_with("pairs.") {
                let mut value = model.params.get(id).value.copy().unwrap();
                let seed = name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
                let mut noise = vec![0.0; value.len()];
                Philox::new(seed, 0).fill_normal(&mut noise);
                value.f32s_mut().unwrap().iter_mut().zip(&noise).for_each(|(v, n)| *v += 0.2 * n);
                model.params.set(id, value).unwrap();
            }
        }
        model
    }

    fn edit(model: &mut Dit, name: &str, change: impl Fn(usize, f32) -> f32) {
        let id = model.params.find(name).unwrap();
        let mut value = model.params.get(id).value.copy().unwrap();
        value.f32s_mut().unwrap().iter_mut().enumerate().for_each(|(i, v)| *v = change(i, *v));
        model.params.set(id, value).unwrap();
    }

    fn inputs(model: &Dit) -> (Var, Tensor, Tensor) {
        let device = model.device();
        let mut noise = vec![0.0; 32];
        Philox::new(3, 0).fill_normal(&mut noise);
        let x = Tensor::from_f32(device, &[2, 1, 4, 4], &noise).unwrap();
        let t = Tensor::from_f32(device, &[2], &[17.0, 640.5]).unwrap();
        (Var::constant(x), t, Tensor::from_i32(device, &[2], &[2, 0]).unwrap())
    }

    /// Input and output of a site of the observed forward pass, and the prediction.
    fn observe(model: &Dit, block: usize, site: Site) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let (x, t, y) = inputs(model);
        let mut seen = None;
        let mut observer = |s: &Seen<'_>| {
            if (s.block, s.site) == (block, site) {
                assert!(seen.replace((s.input.tensor().to_vec()?, s.output.tensor().to_vec()?)).is_none());
            }
            Ok(())
        };
        let g = Graph::inference(Precision::F32);
        let out = model.forward_observed(&g, &x, &t, &y, Run::default(), Some(&mut observer)).unwrap();
        let (input, output) = seen.unwrap();
        (input, output, out.tensor().to_vec().unwrap())
    }

    fn close(a: &[f32], b: &[f32]) {
        assert_eq!(a.len(), b.len());
        let error = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        assert!(error <= 2e-6 * b.iter().map(|v| f64::from(v.abs())).fold(1.0, f64::max), "{error}");
    }

    #[test]
    fn a_new_pair_adds_what_both_blocks_add() {
        let pair = model(&[1]);
        assert_eq!(pair.units.len(), 3);
        let (input, both, _) = observe(&pair, 1, Site::BlockPair);
        // A block whose gates are zero adds nothing: rows 2 and 5 of its modulation table.
        let without = |block: usize| {
            let mut model = model(&[1]);
            for part in ["weight", "bias"] {
                let row = if part == "weight" { 64 } else { 8 };
                let gate = |i: usize, v: f32| if [2, 5].contains(&(i / row)) { 0.0 } else { v };
                edit(&mut model, &format!("blocks.{block}.adaLN_modulation.1.{part}"), gate);
            }
            observe(&model, 1, Site::BlockPair)
        };
        let ((in2, second, _), (in3, first, _)) = (without(2), without(3));
        assert!(input == in2 && input == in3);
        assert!(first.iter().chain(&second).map(|v| v.abs()).sum::<f32>() > 1.0);
        let sum: Vec<f32> = first.iter().zip(&second).map(|(a, b)| a + b).collect();
        close(&both, &sum);
        // In sequence the second block sees what the first has added, so the two models differ.
        let (serial_input, serial, _) = observe(&model(&[]), 1, Site::BlockPair);
        assert!(serial_input == input && serial != both);
    }

    #[test]
    fn a_pair_is_observed_the_same_in_sequence_and_changes_nothing() {
        for pairs in [&[][..], &[0], &[0, 1]] {
            let model = model(pairs);
            let (x, t, y) = inputs(&model);
            let g = Graph::inference(Precision::F32);
            let plain = model.forward(&g, &x, &t, &y, Run::default()).unwrap().tensor().to_vec().unwrap();
            let (before, added, out) = observe(&model, 0, Site::BlockPair);
            close(&out, &plain);
            let (after, ..) = observe(&model, 1, Site::BlockPair);
            close(&after, &before.iter().zip(&added).map(|(a, b)| a + b).collect::<Vec<_>>());
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let mut model = model(&[0, 1]);
        // Away from [I I], so that a merge that ignored its weight would show.
        edit(&mut model, "pairs.1.merge.weight", |i, v| v + 0.1 * (i as f32).sin());
        let (x, t, y) = inputs(&model);
        let loss = |model: &Dit| -> f64 {
            let g = Graph::inference(Precision::F32);
            let out = model.forward(&g, &x, &t, &y, Run::default()).unwrap().tensor().to_vec().unwrap();
            out.iter().enumerate().map(|(i, v)| f64::from(*v) * (i as f64).cos()).sum()
        };
        for checkpoint in [false, true] {
            let g = Graph::training(Precision::F32);
            let out = model.forward(&g, &x, &t, &y, Run { checkpoint, ..Run::default() }).unwrap();
            let shape = out.tensor().shape();
            let weights: Vec<f32> = (0..shape.len()).map(|i| (i as f64).cos() as f32).collect();
            let cotangent = Tensor::from_f32(model.device(), shape.dims(), &weights).unwrap();
            let grads = g.backward_from(&out, cotangent).unwrap();
            for name in [
                "pairs.0.merge.weight",
                "pairs.1.merge.weight",
                "pairs.1.merge.bias",
                "blocks.2.attn.qkv.weight",
                "blocks.3.mlp.fc1.weight",
                "blocks.3.adaLN_modulation.1.weight",
                "x_embedder.proj.weight",
            ] {
                let id = model.params.find(name).unwrap();
                let gradient = grads.param(&model.params, id).unwrap().to_vec().unwrap();
                let mut direction = vec![0.0f32; gradient.len()];
                Philox::new(11, gradient.len() as u64).fill_normal(&mut direction);
                let analytic: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
                let original = model.params.get(id).value.clone();
                let mut at = |h: f32| {
                    edit(&mut model, name, |i, v| v + h * direction[i]);
                    let value = loss(&model);
                    model.params.set(id, original.clone()).unwrap();
                    value
                };
                let numeric = (at(2e-3) - at(-2e-3)) / 4e-3;
                assert!((numeric - analytic).abs() <= 5e-3 * analytic.abs().max(1.0), "{name}: {analytic} {numeric}");
            }
        }
    }

    #[test]
    fn pairs_survive_saving_and_loading() {
        let folder = test_dir("pairs_save");
        let mut model = model(&[1]);
        edit(&mut model, "pairs.1.merge.bias", |i, _| i as f32);
        save(&model, &folder, SaveAs::F32, &BTreeMap::new()).unwrap();
        let loaded = load(&folder, &Device::cpu()).unwrap();
        assert_eq!((&loaded.config.pairs, loaded.config.serial_depth()), (&vec![1], 3));
        assert!(loaded.params.iter().map(|(_, p)| &p.name).eq(model.params.iter().map(|(_, p)| &p.name)));
        for ((_, a), (_, b)) in loaded.params.iter().zip(model.params.iter()) {
            assert_eq!(a.value.to_vec().unwrap(), b.value.to_vec().unwrap(), "{}", a.name);
        }
        assert!(observe(&loaded, 1, Site::BlockPair) == observe(&model, 1, Site::BlockPair));
    }

    #[test]
    fn impossible_pairs_are_refused() {
        for pairs in [vec![2], vec![1, 1], vec![1, 0]] {
            let config = DitConfig { pairs, ..DitConfig::plain(5, 8, 2) };
            assert!(config.check().unwrap_err().to_string().contains("rising numbers below 2, as there are 5 blocks"));
        }
        let xl = DitConfig { pairs: (0..14).collect(), ..DitConfig::named("DiT-XL/2").unwrap() };
        assert_eq!((xl.parameters(), xl.serial_depth()), (712_009_760, 14));
    }
}
