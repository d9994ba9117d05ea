//! Low-rank adapters of linear layers: y = W·x + (α/R)·B·(A·x) with W frozen (LoRA, arXiv 2106.09685).
//!
//! A is drawn as PyTorch draws a linear weight (Kaiming-uniform) and B is zero, so that a model with fresh adapters
//! gives what it gave before. The parameters are named `<layer>.lora_A.weight` and `<layer>.lora_B.weight` and stand in
//! the store behind all others: what trains, averages or saves parameters treats them like any other.

use super::{Builder, Init, Scheme};
use crate::autograd::{Adapter, Graph, ParamId, ParamStore, Precision, Var};
use crate::error::{Error, Result};
use crate::ops::{self, act, contracts::gemm};
use crate::tensor::Tensor;

/// Which layers get adapters, and of what size.
#[derive(Clone, Debug)]
pub struct Lora<'s> {
    /// Rank R.
    pub rank: usize,
    /// α: the addition is scaled by α/R.
    pub alpha: f64,
    /// Layers, each by its name or by the end of it after a dot: `attn.qkv` is that layer in all blocks.
    pub modules: &'s [String],
    /// Whether each of `modules` must name a layer, or one of them all.
    pub strict: bool,
    /// Seed of A.
    pub seed: u64,
}

/// Attaches adapters and freezes everything but them and what `keep` says by name; layers that `keep` names get none.
/// Returns the number of adapters.
///
/// # Errors
/// A rank of 0, or a module that names no layer.
pub fn attach(params: &mut ParamStore, lora: &Lora<'_>, keep: &dyn Fn(&str) -> bool) -> Result<usize> {
    if lora.rank == 0 {
        return Err(Error::usage("lora: rank", "nothing to train").is(0).must("at least 1"));
    }
    let linear = params.iter().filter(|(_, p)| p.linear);
    let layers = linear.filter_map(|(id, p)| Some((id, p.name.strip_suffix(".weight")?.to_string())));
    let layers: Vec<(ParamId, String)> = layers.filter(|(_, layer)| !keep(layer)).collect();
    let fits = |module: &str, layer: &str| {
        layer.strip_suffix(module).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let idle = |module: &&String| layers.iter().all(|(_, layer)| !fits(module, layer));
    let unused: Vec<&String> = lora.modules.iter().filter(idle).collect();
    if let Some(module) = unused.first().filter(|_| lora.strict || unused.len() == lora.modules.len()) {
        let mut names: Vec<&str> = layers.iter().map(|(_, layer)| ending(layer)).collect();
        names.sort_unstable();
        names.dedup();
        return Err(Error::usage("lora: modules", "a pattern fits no linear layer that could be adapted")
            .is(format!("{module:?}"))
            .must(format!("a name or the end of one: {}", names.join(", "))));
    }
    let frozen: Vec<ParamId> = params.iter().filter(|(_, p)| !keep(&p.name)).map(|(id, _)| id).collect();
    for id in frozen {
        params.get_mut(id).trainable = false;
    }
    let chosen = layers.iter().filter(|(_, layer)| lora.modules.iter().any(|module| fits(module, layer)));
    let mut count = 0;
    for (weight, layer) in chosen {
        let held = &params.get(*weight).value;
        let (outputs, inputs, device) = (held.dim(0), held.dim(1), held.device().clone());
        let mut builder = Builder::new(params, &device, lora.seed, Scheme::Torch);
        let mut builder = builder.below(layer);
        let a = builder.param("lora_A.weight", &[lora.rank, inputs], Init::torch(inputs))?;
        let b = builder.param("lora_B.weight", &[outputs, lora.rank], Init::Zeros)?;
        params.attach(*weight, Adapter { a, b, scale: (lora.alpha / lora.rank as f64) as f32 });
        count += 1;
    }
    Ok(count)
}

/// The last two words of a layer's name, `attn.qkv` of `blocks.3.attn.qkv`.
fn ending(layer: &str) -> &str {
    let dots: Vec<usize> = layer.match_indices('.').map(|(at, _)| at).collect();
    dots.len().checked_sub(2).and_then(|i| dots.get(i)).map_or(layer, |at| &layer[at + 1..])
}

/// scale·A·x, `[B, N, R]`.
pub(super) fn down(g: &Graph<'_>, params: &ParamStore, x: &Var, adapter: Adapter) -> Result<Var> {
    let a = g.param(params, adapter.a);
    let settings = gemm::Params { act: act::NONE, gate_row: 0, bf16: g.precision() == Precision::Bf16 };
    if adapter.scale == 1.0 {
        return g.gemm(x, &a, None, None, None, None, settings);
    }
    let shape = [x.dim(0), 1, a.dim(0)];
    let scale = Tensor::from_f32(x.tensor().device(), &shape, &vec![adapter.scale; shape[0] * shape[2]])?;
    g.gemm(x, &a, None, None, Some(&Var::constant(scale)), None, settings)
}

/// Turns W into W + scale·B·A in every adapted layer and drops the adapters: the parameters are then those of the
/// model without them.
///
/// # Errors
/// When memory runs out.
pub fn merge(params: &mut ParamStore) -> Result<()> {
    let adapters: Vec<(ParamId, Adapter)> = params.adapters().collect();
    for (weight, adapter) in adapters {
        let (held, b) = (&params.get(weight).value, &params.get(adapter.b).value);
        let (outputs, inputs, rank) = (held.dim(0), held.dim(1), b.dim(1));
        let a = params.get(adapter.a).value.to_vec()?;
        // [in, R], as the rows of a linear layer that B's rows go through.
        let turned: Vec<f32> = (0..inputs * rank).map(|i| adapter.scale * a[i % rank * inputs + i / rank]).collect();
        let turned = Tensor::from_f32(held.device(), &[inputs, rank], &turned)?;
        let (rows, held) = (b.reshape(&[1, outputs, rank])?, held.reshape(&[1, outputs, inputs])?);
        let settings = gemm::Params { act: act::NONE, gate_row: 0, bf16: false };
        let merged = ops::gemm(&rows, &turned, None, None, None, Some(&held), false, settings)?.y;
        params.set(weight, merged.into_shape(&[outputs, inputs])?)?;
    }
    params.drop_adapters();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Epilogue, Linear};
    use crate::tensor::Device;

    const SIZES: (usize, usize, usize, usize) = (2, 5, 12, 7);

    fn values(device: &Device, shape: &[usize], seed: u64) -> Tensor {
        let mut values = vec![0.0; shape.iter().product()];
        graft_kernels::rng::Philox::new(seed, 0).fill_normal(&mut values);
        Tensor::from_f32(device, shape, &values).unwrap()
    }

    struct Bench {
        device: Device,
        params: ParamStore,
        layer: Linear,
    }

    fn bench() -> Bench {
        let (device, mut params) = (Device::cpu(), ParamStore::default());
        let (_, _, inputs, outputs) = SIZES;
        let layer = Builder::new(&mut params, &device, 3, Scheme::Torch).linear("fc", inputs, outputs).unwrap();
        Bench { device, params, layer }
    }

    fn adapted(alpha: f64) -> Bench {
        let mut bench = bench();
        let modules = ["fc".to_string()];
        let lora = Lora { rank: 3, alpha, modules: &modules, strict: true, seed: 5 };
        assert_eq!(attach(&mut bench.params, &lora, &|_| false).unwrap(), 1);
        bench
    }

    /// The layer in each of its uses: plain, with a table of rows, before an activation, with gate and residual.
    fn uses(bench: &Bench, g: &Graph<'_>, x: &Var) -> Vec<Var> {
        let (b, n, _, outputs) = SIZES;
        let constant = |shape: &[usize], seed| Var::constant(values(&bench.device, shape, seed));
        let (pos, residual) = (constant(&[n, outputs], 11), constant(&[b, n, outputs], 12));
        let modulation = constant(&[b, 2, outputs], 13);
        let epilogue = Epilogue { residual: &residual, modulation: &modulation, gate_row: 1 };
        let (layer, params) = (&bench.layer, &bench.params);
        vec![
            layer.forward(g, params, x, act::NONE).unwrap(),
            layer.forward_with_rows(g, params, x, &pos).unwrap(),
            layer.forward(g, params, x, act::GELU).unwrap(),
            layer.project(g, params, x, Some(epilogue)).unwrap(),
        ]
    }

    fn input(bench: &Bench) -> Tensor {
        values(&bench.device, &[SIZES.0, SIZES.1, SIZES.2], 1)
    }

    fn run(bench: &Bench) -> Vec<Vec<f32>> {
        let g = Graph::inference(Precision::F32);
        let found = uses(bench, &g, &Var::constant(input(bench)));
        found.into_iter().map(|y| y.tensor().to_vec().unwrap()).collect()
    }

    fn train_a_little(bench: &mut Bench) {
        let adapters: Vec<_> = bench.params.adapters().collect();
        for (_, adapter) in adapters {
            let shape = bench.params.get(adapter.b).value.shape();
            let b = values(&bench.device, shape.dims(), 21);
            bench.params.set(adapter.b, b).unwrap();
        }
    }

    fn difference(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).fold(0.0, |m, (x, y)| m.max((x - y).abs()))
    }

    #[test]
    fn fresh_adapters_change_no_bit() {
        for alpha in [3.0, 5.0] {
            assert_eq!(run(&bench()), run(&adapted(alpha)));
        }
    }

    #[test]
    fn merged_equals_unmerged() {
        for alpha in [3.0, 1.2] {
            let mut bench = adapted(alpha);
            let fresh = run(&bench);
            train_a_little(&mut bench);
            let before = run(&bench);
            merge(&mut bench.params).unwrap();
            assert_eq!((bench.params.len(), bench.params.adapters().count()), (2, 0));
            for ((merged, before), fresh) in run(&bench).iter().zip(&before).zip(&fresh) {
                assert!(difference(merged, before) < 1e-5 && difference(before, fresh) > 0.1);
            }
        }
    }

    /// With the plain layer's gradient G of the merged weight: dA = scale·Bᵀ·G and dB = scale·G·Aᵀ.
    #[test]
    fn gradients_are_those_of_the_merged_weight_and_go_nowhere_else() {
        let (mut low, mut merged) = (adapted(1.2), adapted(1.2));
        train_a_little(&mut low);
        train_a_little(&mut merged);
        merge(&mut merged.params).unwrap();
        merged.params.get_mut(merged.layer.weight).trainable = true;
        let (_, _, inputs, outputs) = SIZES;
        let (rank, scale) = (3, 0.4f32);
        for index in 0..4 {
            let gradients = |bench: &Bench| {
                let g = Graph::training(Precision::F32);
                let x = g.leaf(input(bench));
                let y = uses(bench, &g, &x).swap_remove(index);
                let shape = y.tensor().shape();
                let mut found = g.backward_from(&y, values(&bench.device, shape.dims(), 31)).unwrap();
                (found.take(&x).unwrap().to_vec().unwrap(), found)
            };
            let ((dx_low, found), (dx, plain)) = (gradients(&low), gradients(&merged));
            assert!(difference(&dx_low, &dx) < 1e-5);
            let (_, adapter) = low.params.adapters().next().unwrap();
            let named: Vec<ParamId> = found.of_store(&low.params).map(|(id, _)| id).collect();
            assert_eq!(named, [adapter.a, adapter.b]);
            let dense = plain.param(&merged.params, merged.layer.weight).unwrap().to_vec().unwrap();
            let [a, b] = [adapter.a, adapter.b].map(|id| low.params.get(id).value.to_vec().unwrap());
            let of = |id| found.param(&low.params, id).unwrap().to_vec().unwrap();
            let da: Vec<f32> = (0..rank * inputs)
                .map(|i| {
                    scale * (0..outputs).map(|o| b[o * rank + i / inputs] * dense[o * inputs + i % inputs]).sum::<f32>()
                })
                .collect();
            let db: Vec<f32> = (0..outputs * rank)
                .map(|i| {
                    scale * (0..inputs).map(|k| dense[i / rank * inputs + k] * a[i % rank * inputs + k]).sum::<f32>()
                })
                .collect();
            assert!(difference(&of(adapter.a), &da) < 1e-4 && difference(&of(adapter.b), &db) < 1e-4, "use {index}");
        }
    }

    #[test]
    fn patterns_are_ends_of_names_and_must_fit() {
        let build = || {
            let (device, mut params) = (Device::cpu(), ParamStore::default());
            let mut builder = Builder::new(&mut params, &device, 0, Scheme::Torch);
            for layer in ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.0.mlp.fc1", "blocks.0.mlp.xfc1"] {
                builder.linear(layer, 4, 6).unwrap();
            }
            builder.linear_from("x_embedder.proj", &[4, 1, 2, 2], Init::Zeros, Init::Zeros).unwrap();
            params
        };
        let try_with = |modules: &[&str], strict: bool, keep: &dyn Fn(&str) -> bool| {
            let (mut params, modules) = (build(), modules.iter().map(ToString::to_string).collect::<Vec<_>>());
            let lora = Lora { rank: 2, alpha: 2.0, modules: &modules, strict, seed: 0 };
            let count = attach(&mut params, &lora, keep)?;
            let trainable = params.iter().filter(|(_, p)| p.trainable).map(|(_, p)| p.name.clone());
            Ok::<_, Error>((count, trainable.collect::<Vec<_>>()))
        };
        let none: &dyn Fn(&str) -> bool = &|_| false;
        assert_eq!(try_with(&["qkv"], true, none).unwrap().0, 2);
        let fc1 = ["blocks.0.mlp.fc1.lora_A.weight", "blocks.0.mlp.fc1.lora_B.weight"].map(String::from).to_vec();
        assert_eq!(try_with(&["fc1"], true, none).unwrap(), (1, fc1));
        let kept = try_with(&["qkv"], true, &|name| name.starts_with("blocks.1.")).unwrap();
        assert!(kept.0 == 1 && kept.1.contains(&"blocks.1.attn.qkv.bias".to_string()) && kept.1.len() == 4);
        // A convolution is no linear layer, and what trains in full gets no adapter.
        let attention: &dyn Fn(&str) -> bool = &|name| name.contains("attn");
        for (modules, keep) in [(["proj"], none), (["kv"], none), (["qkv"], attention)] {
            let error = try_with(&modules, true, keep).unwrap_err().to_string();
            assert!(error.contains("lora: modules: a pattern fits no linear layer"), "{error}");
            assert!(error.contains("mlp.fc1"), "{error}");
        }
        assert_eq!(try_with(&["proj", "fc1"], false, none).unwrap().0, 1);
        assert!(try_with(&["proj", "fc1"], true, none).is_err() && try_with(&["proj"], false, none).is_err());
    }
}
