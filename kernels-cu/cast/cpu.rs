//! CPU path: a copy, blocks over threads. Nothing on the host asks for it: there the working type is f32.

use crate::generated::cast::{Backward, Forward};
use rayon::prelude::*;

/// Elements of a block.
const BLOCK: usize = 1 << 15;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    copy(a.x, a.y);
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    if let Some(dx) = a.dx {
        copy(a.dy, dx);
    }
}

fn copy(from: &[f32], to: &mut [f32]) {
    to.par_chunks_mut(BLOCK).zip(from.par_chunks(BLOCK)).for_each(|(to, from)| to.copy_from_slice(from));
}
