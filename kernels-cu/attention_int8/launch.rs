//! Which kernel takes which shape.

use crate::generated::attention;
use crate::generated::attention_int8::{Dims, ForwardWay, GpuForward};
use crate::launch::{Element, In, Out, Queue, Shape};
use crate::launchers::attention_int8::{
    AttentionInt8Means, AttentionInt8Round, AttentionInt8Sums, AttentionInt864, AttentionInt880, AttentionInt8128,
};
use crate::ways;
use std::marker::PhantomData;

/// Tokens of a block, which share a scale; threads of a block.
const TOKENS: usize = 64;
const THREADS: usize = 128;

fn takes(way: ForwardWay, dims: Dims) -> bool {
    match way {
        ForwardWay::Int8 => dims.e.is_multiple_of(8) && dims.e <= 128,
        ForwardWay::Exact => true,
    }
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, h, e } = a.dims;
    let (qkv, y, scale) = (a.qkv, a.y, a.params.scale);
    if let ForwardWay::Exact = ways::choose(queue, T::TYPE, &a.dims, |way| takes(way, a.dims)) {
        let (dims, params) = (attention::Dims { b, n, h, e }, attention::Params { scale });
        let lse = queue.scratch(b * h * n)?;
        let exact = attention::GpuForward { dims, params, qkv, y, lse, element: PhantomData };
        return crate::attention::launch::forward(queue, exact);
    }
    let (pairs, blocks) = (b * h, b * h * n.div_ceil(TOKENS));
    // Bytes of a row of 8-bit numbers, and of a row of v in shared memory.
    let (row, values) = if e <= 64 { (64, 128) } else { (128, 256) };
    let (sums, means): (Out<f32>, Out<f32>) = (queue.scratch(blocks * e)?, queue.scratch(pairs * e)?);
    let scales: Out<f32> = queue.scratch(2 * blocks)?;
    let [q8, k8] = [bytes(queue, pairs * n * row)?, bytes(queue, pairs * n * row)?];
    let shape = Shape::new(blocks, THREADS);
    AttentionInt8Sums { qkv, sums, n, h, e }.launch(queue, shape)?;
    AttentionInt8Means { sums: sums.read(), means, n, e }.launch(queue, Shape::new(pairs, THREADS), T::TYPE)?;
    AttentionInt8Round { qkv, means: means.read(), q8, k8, scales, n, h, e, row, scale }.launch(queue, shape)?;
    let shape = shape.shared(&[TOKENS * row, 2 * TOKENS * (row + values)]);
    let (q8, k8, scales): (In<u8>, In<u8>, _) = (q8.read(), k8.read(), scales.read());
    match e {
        0..=64 => AttentionInt864 { qkv, q8, k8, scales, y, n, h, e }.launch(queue, shape),
        65..=80 => AttentionInt880 { qkv, q8, k8, scales, y, n, h, e }.launch(queue, shape),
        _ => AttentionInt8128 { qkv, q8, k8, scales, y, n, h, e }.launch(queue, shape),
    }
}

/// Scratch memory of so many bytes.
fn bytes<Q: Queue>(queue: &mut Q, count: usize) -> Result<Out<u8>, Q::Error> {
    Ok(Out::at(queue.scratch::<f32>(count.div_ceil(4))?.address()))
}
