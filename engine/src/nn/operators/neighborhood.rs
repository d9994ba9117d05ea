//! Neighbourhood attention: every token sees the square of `kernel` × `kernel` tokens around it on the grid, shifted
//! inside at the borders.

use super::heads::{Heads, TEACHER_NAMES};
use super::{BlockDims, Kind, Operator, Site, SiteFlops, Spec};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::{Error, Result};
use crate::nn::{Builder, Epilogue};
use crate::ops::contracts::neighborhood_attention;

pub(super) const KIND: Kind = Kind {
    name: "neighborhood_attention",
    site: Site::Attn,
    summary: "softmax attention over a square of kernel × kernel tokens of the grid",
    options: &[("heads", "the model's"), ("kernel", "7")],
    build,
};

#[derive(Debug)]
struct Neighborhood {
    heads: Heads,
    kernel: usize,
    grid: [usize; 2],
}

fn build(spec: &Spec, dims: BlockDims, builder: &mut Builder<'_>) -> Result<Box<dyn Operator>> {
    let (kernel, [rows, columns]) = (spec.whole("kernel", 7)?, dims.grid);
    let error = |problem: &str| Error::usage(format!("{}: kernel", KIND.name), problem).is(kernel);
    if kernel % 2 == 0 {
        return Err(error("is even, so no token is its middle").must("an odd number"));
    }
    let fits = rows.min(columns);
    if kernel > fits {
        return Err(error("is wider than the grid of tokens")
            .must(format!("at most {fits}: the model has {rows} × {columns} tokens"))
            .fix(format!("set kernel = {}", if fits % 2 == 1 { fits } else { fits.saturating_sub(1).max(1) })));
    }
    Ok(Box::new(Neighborhood { heads: Heads::build(spec, dims, builder)?, kernel, grid: dims.grid }))
}

impl Operator for Neighborhood {
    fn spec(&self) -> Spec {
        Spec::new(KIND.name).with("heads", self.heads.count as f64).with("kernel", self.kernel as f64)
    }

    fn forward(&self, g: &Graph<'_>, params: &ParamStore, x: &Var, epilogue: Option<Epilogue<'_>>) -> Result<Var> {
        let [rows, columns] = self.grid;
        self.heads.around(g, params, x, epilogue, |qkv, scale| {
            let qkv = g.reshape(qkv, &[qkv.dim(0), rows, columns, 3, qkv.dim(3), qkv.dim(4)])?;
            g.neighborhood_attention(&qkv, self.kernel, neighborhood_attention::Params { scale })
        })
    }

    fn flops(&self, dims: BlockDims) -> SiteFlops {
        let keys = self.kernel * self.kernel;
        SiteFlops { operator: self.heads.softmax(dims, keys), projections: self.heads.projections(dims) }
    }

    fn teacher_names(&self) -> &'static [(&'static str, &'static str)] {
        TEACHER_NAMES
    }
}

#[cfg(test)]
mod tests {
    use super::super::{build, tests::refusal};
    use super::*;

    #[test]
    fn kernels_that_do_not_fit() {
        let dims = BlockDims { width: 8, heads: 2, grid: [6, 9] };
        let with = |kernel: f64| Spec::new(KIND.name).with("kernel", kernel);
        let default = refusal(&Spec::new(KIND.name), dims);
        assert!(default.contains("is 7") && default.contains("6 × 9 tokens"), "{default}");
        assert!(default.contains("set kernel = 5"), "{default}");
        assert!(refusal(&with(4.0), dims).contains("odd"));
        let (mut store, device) = (ParamStore::default(), crate::tensor::Device::cpu());
        let mut builder = Builder::new(&mut store, &device, 0, crate::nn::Scheme::Torch);
        let operator = build(&with(5.0), Site::Attn, dims, &mut builder).unwrap();
        // 25 keys for each of 54 tokens.
        assert_eq!(operator.flops(dims).operator, 54.0 * 25.0 * (4.0 * 8.0 + 2.0 * 2.0));
        assert_eq!(operator.spec(), with(5.0).with("heads", 2.0));
    }
}
