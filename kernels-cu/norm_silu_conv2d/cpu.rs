//! CPU path: the norm into memory of its own, then the convolution; what each of the two operators gives.

use super::{conv, norm_dims, norm_params};
use crate::generated::norm_silu_conv2d::Forward;
use crate::generated::{conv2d, group_norm_silu};
use rayon::prelude::*;

/// Values that one thread adds at a time.
const BLOCK: usize = 1 << 14;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let dims = a.dims;
    let mut ready = vec![0.0; a.x.len()];
    let (mut mean, mut rstd) = (vec![0.0; dims.b * dims.g], vec![0.0; dims.b * dims.g]);
    crate::group_norm_silu::cpu::forward(group_norm_silu::Forward {
        dims: norm_dims(dims),
        params: norm_params(a.params),
        x: a.x,
        gamma: a.gamma,
        beta: a.beta,
        stats: None,
        y: &mut ready,
        mean: &mut mean,
        rstd: &mut rstd,
    });
    let (dims, params) = conv(dims, a.params);
    let y = &mut *a.y;
    crate::conv2d::cpu::forward(conv2d::Forward { dims, params, x: &ready, filters: a.filters, bias: a.bias, y });
    if let Some(residual) = a.residual {
        let blocks = a.y.par_chunks_mut(BLOCK).zip(residual.par_chunks(BLOCK));
        blocks.for_each(|(y, residual)| y.iter_mut().zip(residual).for_each(|(y, residual)| *y += residual));
    }
}
