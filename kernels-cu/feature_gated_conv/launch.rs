//! Which kernel takes which shape.

use crate::generated::feature_gated_conv::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Out, Queue, Shape};
use crate::launchers::feature_gated_conv::{
    FeatureGatedConvAnyBackwardGate, FeatureGatedConvAnyBackwardInput, FeatureGatedConvAnyBackwardSums,
    FeatureGatedConvAnyForward, FeatureGatedConvBackward, FeatureGatedConvBackwardFilters, FeatureGatedConvForward,
};

/// Threads of a block, and of one of the fused backward pass.
const THREADS: usize = 128;
const BACKWARD_THREADS: usize = 256;
/// Taps that the fused kernels are made for.
const TAPS: usize = 8;
/// Blocks of the backward pass: a constant, so that the order of the sums is the same on every device.
const BLOCKS: usize = 528;

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, f, k } = a.dims;
    let (p, weight, bias, y, rows) = (a.p, a.weight, a.bias, a.y, b * n);
    if k <= TAPS && f.is_multiple_of(8) {
        FeatureGatedConvForward { p, weight, bias, y, rows, n, f, k }
            .launch(queue, Shape::new((rows * f / 8).div_ceil(THREADS), THREADS))
    } else {
        FeatureGatedConvAnyForward { p, weight, bias, y, rows, n, f, k }
            .launch(queue, Shape::new((rows * f).div_ceil(THREADS), THREADS))
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, f, k } = a.dims;
    let (dy, p, weight, bias, rows) = (a.dy, a.p, a.weight, a.bias, b * n);
    let (dweight, dbias, wanted) = (a.dweight.or_null(), a.dbias.or_null(), a.dweight.is_some() || a.dbias.is_some());
    if k <= TAPS && f.is_multiple_of(8) && f <= 8184 {
        let splits = (BLOCKS / n).clamp(1, b);
        let partials: Out<f32> = if wanted { queue.scratch(splits * n * (TAPS + 1))? } else { Out::at(0) };
        let shape = Shape::new(splits * n, BACKWARD_THREADS).shared(&[(3 * f + 8) * 4]);
        FeatureGatedConvBackward { dy, p, weight, bias, dp: a.dp.or_null(), partials, b, n, f, k, splits }
            .launch(queue, shape)?;
        if !wanted {
            return Ok(());
        }
        let shape = Shape::new((n * (k + 1)).div_ceil(THREADS), THREADS);
        return FeatureGatedConvBackwardFilters { partials: partials.read(), dweight, dbias, n, k, splits }
            .launch(queue, shape);
    }
    let du: Out<f32> = queue.scratch(rows * 3 * f)?;
    FeatureGatedConvAnyBackwardGate { dy, p, weight, bias, du, rows, n, f, k }
        .launch(queue, Shape::new((rows * f).div_ceil(THREADS), THREADS))?;
    let du = du.read();
    if let Some(dp) = a.dp {
        FeatureGatedConvAnyBackwardInput { du, weight, dp, rows, n, f, k }
            .launch(queue, Shape::new((rows * 3 * f).div_ceil(THREADS), THREADS))?;
    }
    if !wanted {
        return Ok(());
    }
    FeatureGatedConvAnyBackwardSums { du, p, dweight, dbias, b, n, f, k }
        .launch(queue, Shape::new(n * (k + 1), THREADS))
}
