//! CPU path: the product, then the convolution and the gates, some thousand tokens at a time.
//!
//! What each of the two operators gives, to the bit. Where p is not asked for it lies in memory of the calling thread
//! that is kept from call to call.

use super::{gates, projection};
use crate::Weight;
use crate::generated::gemm_gated_conv::{Backward, Dims, Forward, Params};
use crate::generated::{gated_conv, gemm};
use std::borrow::Cow;
use std::cell::Cell;

/// Tokens that are projected at a time: whole samples, and one at the least.
const TOKENS: usize = 4096;

thread_local! {
    /// The projection of the samples at hand.
    static PROJECTED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

fn project((dims, params): (Dims, Params), x: &[f32], w: Weight<'_, f32>, bias: Option<&[f32]>, y: &mut [f32]) {
    let (dims, params) = projection(dims, params);
    let of = gemm::Forward { dims, params, x, w, bias, pos: None, gate: None, residual: None, y, pre: None };
    crate::gemm::cpu::forward(of);
}

/// Forward pass.
pub fn forward(mut a: Forward<'_, f32>) {
    let Dims { b, n, d, c, .. } = a.dims;
    let (token, samples) = (3 * c, (TOKENS / n.max(1)).clamp(1, b.max(1)));
    let mut kept = PROJECTED.take();
    if a.p.is_none() && kept.len() < samples * n * token {
        kept.resize(samples * n * token, 0.0);
    }
    for first in (0..b).step_by(samples) {
        let count = samples.min(b - first);
        let (from, rows) = (first * n, count * n);
        let dims = Dims { b: count, ..a.dims };
        let p = match &mut a.p {
            Some(p) => &mut p[from * token..][..rows * token],
            None => &mut kept[..rows * token],
        };
        project((dims, a.params), &a.x[from * d..][..rows * d], a.w, a.bias, p);
        let (dims, params) = gates(dims, a.params);
        crate::gated_conv::cpu::forward(gated_conv::Forward {
            dims,
            params,
            p,
            short_weight: Some(a.short_weight),
            short_bias: Some(a.short_bias),
            inner_weight: None,
            inner_bias: None,
            y: &mut a.y[from * c..][..rows * c],
        });
    }
    PROJECTED.set(kept);
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { b, n, c, .. } = a.dims;
    let p: Cow<'_, [f32]> = match a.p {
        Some(p) => p.into(),
        None => {
            let mut p = vec![0.0; b * n * 3 * c];
            project((a.dims, a.params), a.x, a.w, a.bias, &mut p);
            p.into()
        }
    };
    let mut dp = vec![0.0; b * n * 3 * c];
    let (dims, params) = gates(a.dims, a.params);
    crate::gated_conv::cpu::backward(gated_conv::Backward {
        dims,
        params,
        dy: a.dy,
        p: &p,
        short_weight: Some(a.short_weight),
        short_bias: Some(a.short_bias),
        inner_weight: None,
        inner_bias: None,
        dp: Some(&mut dp),
        dshort_weight: a.dshort_weight,
        dshort_bias: a.dshort_bias,
        dinner_weight: None,
        dinner_bias: None,
    });
    let (dims, params) = projection(a.dims, a.params);
    crate::gemm::cpu::backward(gemm::Backward {
        dims,
        params,
        dy: &dp,
        x: a.x,
        w: a.w,
        gate: None,
        pre: None,
        dx: a.dx,
        dw: a.dw,
        dbias: a.dbias,
        dpos: None,
        dgate: None,
    });
}
