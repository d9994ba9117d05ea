//! CPU path: exact attention. Products of 8 bits would gain nothing there.

use crate::generated::attention;
use crate::generated::attention_int8::{Dims, Forward};

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { b, n, h, e } = a.dims;
    let mut lse = vec![0.0; b * h * n];
    let (dims, params) = (attention::Dims { b, n, h, e }, attention::Params { scale: a.params.scale });
    crate::attention::cpu::forward(attention::Forward { dims, params, qkv: a.qkv, y: a.y, lse: &mut lse });
}
