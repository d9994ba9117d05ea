//! CPU path: the strided copies of `patchify` with the channel fastest.

use crate::generated::unpatchify::{Backward, Dims, Forward};
use crate::patchify::cpu::Layout;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    layout(a.dims).to_image(a.tokens, a.x);
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    if let Some(dtokens) = a.dtokens {
        layout(a.dims).to_tokens(a.dx, dtokens);
    }
}

fn layout(dims: Dims) -> Layout {
    let Dims { c, p, gh, gw, .. } = dims;
    Layout { c, p, gh, gw, channel: 1, row: p * c, column: c }
}
