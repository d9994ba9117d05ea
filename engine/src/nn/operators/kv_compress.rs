//! Attention to fewer keys and values: both go through one depthwise convolution of stride `factor` over the grid and
//! one LayerNorm; the queries stay. The form and the initialisation of PixArt-Σ, whose token compression averages at
//! first.

use super::heads::{Heads, TEACHER_NAMES};
use super::{BlockDims, Kind, Operator, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamId, ParamStore, Var};
use crate::error::{Error, Result};
use crate::nn::{Builder, Epilogue, Init};
use crate::ops::contracts::{cross_attention, kv_compress};

pub(super) const KIND: Kind = Kind {
    name: "kv_compress",
    site: Site::Attn,
    summary: "softmax attention over the keys and values of a grid that is factor times coarser",
    options: &[("heads", "the model's"), ("factor", "2")],
    build,
};

/// Added to the variance of the LayerNorm.
const EPS: f32 = 1e-5;

#[derive(Debug)]
struct KvCompress {
    heads: Heads,
    factor: usize,
    grid: [usize; 2],
    weight: ParamId,
    bias: ParamId,
    gamma: ParamId,
    beta: ParamId,
}

fn build(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let (d, factor, [rows, columns]) = (dims.width, spec.whole("factor", 2)?, dims.grid);
    let error = |problem: &str| Error::usage(format!("{}: factor", KIND.name), problem).is(factor);
    if !(2..=4).contains(&factor) {
        return Err(error("out of range").must("2, 3 or 4"));
    }
    if factor > rows.min(columns) {
        return Err(error("leaves no key").must(format!("at most the sides of {rows} × {columns} tokens")));
    }
    let heads = Heads::build(spec, dims, builder)?;
    let mut convolution = builder.below("sr");
    let average = Init::Constant(1.0 / (factor * factor) as f32);
    let weight = convolution.param("weight", &[d, 1, factor, factor], average)?;
    let bias = convolution.param("bias", &[d], Init::Zeros)?;
    let mut norm = builder.below("norm");
    let (gamma, beta) = (norm.param("weight", &[d], Init::Ones)?, norm.param("bias", &[d], Init::Zeros)?);
    Ok(Box::new(KvCompress { heads, factor, grid: dims.grid, weight, bias, gamma, beta }))
}

impl KvCompress {
    /// Keys that remain.
    fn keys(&self) -> usize {
        self.grid.iter().map(|side| side / self.factor).product()
    }
}

impl Operator for KvCompress {
    fn spec(&self) -> Spec {
        Spec::new(KIND.name).with("heads", self.heads.count as f64).with("factor", self.factor as f64)
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        let (b, d, [rows, columns]) = (x.dim(0), x.dim(2), self.grid);
        let weight = g.reshape(&g.param(params, self.weight), &[d, self.factor, self.factor])?;
        let [bias, gamma, beta] = [self.bias, self.gamma, self.beta].map(|id| g.param(params, id));
        let settings = kv_compress::Params { first: 1, eps: EPS };
        self.heads.around(g, params, x, epilogue, |qkv, scale| {
            let on_grid = g.reshape(qkv, &[b, rows, columns, 3, d])?;
            let kv = g.kv_compress(&on_grid, &weight, &bias, &gamma, &beta, settings)?;
            let kv = g.reshape(&kv, &[b, self.keys(), 2, qkv.dim(3), qkv.dim(4)])?;
            g.cross_attention(qkv, &kv, None, cross_attention::Params { scale })
        })
    }

    /// The attention with the convolution (a multiply-add a tap) and the LayerNorm (8 operations an element) of keys
    /// and values.
    fn flops(&self, dims: BlockDims) -> SiteFlops {
        let taps = (self.factor * self.factor) as f64;
        let compression = 2.0 * self.keys() as f64 * dims.width as f64 * (2.0 * taps + 8.0);
        SiteFlops {
            operator: self.heads.softmax(dims, self.keys()) + compression,
            projections: self.heads.projections(dims),
        }
    }

    fn teacher_names(&self) -> &'static [(&'static str, &'static str)] {
        TEACHER_NAMES
    }
}

#[cfg(test)]
mod tests {
    use super::super::{build, tests::refusal};
    use super::*;
    use crate::nn::Scheme;
    use crate::tensor::Device;

    #[test]
    fn sizes_costs_and_start() {
        let (mut store, device) = (ParamStore::default(), Device::cpu());
        let dims = BlockDims { width: 8, heads: 2, grid: [5, 6] };
        let mut builder = Builder::new(&mut store, &device, 0, Scheme::Torch);
        let operator = build(&Spec::new(KIND.name), Site::Attn, dims, &mut builder).unwrap();
        // 30 queries, 2 × 3 keys.
        assert_eq!(operator.flops(dims).operator, 30.0 * 6.0 * (4.0 * 8.0 + 2.0 * 2.0) + 2.0 * 6.0 * 8.0 * 16.0);
        let of = |name: &str| store.get(store.find(name).unwrap()).value.to_vec().unwrap();
        assert_eq!((of("sr.weight"), of("sr.bias")), (vec![0.25; 32], vec![0.0; 8]));
        assert_eq!((of("norm.weight"), of("norm.bias")), (vec![1.0; 8], vec![0.0; 8]));
        assert!(refusal(&Spec::new(KIND.name).with("factor", 5.0), dims).contains("2, 3 or 4"));
        let narrow = BlockDims { grid: [2, 9], ..dims };
        assert!(refusal(&Spec::new(KIND.name).with("factor", 3.0), narrow).contains("2 × 9 tokens"));
    }
}
