//! Which kernel takes which shape.

use super::{conv, norm_dims, norm_params};
use crate::conv2d::launch::{halo_bytes, halo_fits, halo_shape, halo_tiles, large_tiles};
use crate::generated::norm_silu_conv2d::{Dims, ForwardWay, GpuForward};
use crate::generated::{axpy, conv2d, group_norm_silu};
use crate::launch::{Element, OrNull, Out, Queue, Shape};
use crate::launchers::norm_silu_conv2d::{
    NormSiluConv2d128x16, NormSiluConv2d128x64, NormSiluConv2d128x128, NormSiluConv2dTable, NormSiluConv2dWgmma128x64,
    NormSiluConv2dWgmma128x128,
};
use crate::ways;
use std::marker::PhantomData;

/// Whether a way takes a shape where a block can have `most` bytes of shared memory.
fn takes(way: ForwardWay, dims: Dims, most: usize) -> bool {
    let Dims { b, h, w, c, f, kh, kw, .. } = dims;
    let fused = c.is_multiple_of(8) && (kh, kw) == (3, 3) && halo_fits([h, w, c, f]) && b * c < 1 << 30;
    match way {
        ForwardWay::Fused128x16 => fused && f <= 16,
        ForwardWay::Wgmma128x128 | ForwardWay::Fused128x128 => {
            fused
                && f > 64
                && halo_bytes(128) <= most
                && large_tiles(halo_tiles(b, h, w) * f.div_ceil(128), b * h * w * f)
        }
        ForwardWay::Wgmma128x64 | ForwardWay::Fused128x64 => fused && f > 16,
        ForwardWay::Apart => true,
    }
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, h, w, c, g: groups, f, .. } = a.dims;
    let most = queue.properties().shared_per_block;
    let way = ways::choose(queue, T::TYPE, &a.dims, |way| takes(way, a.dims, most));
    if let ForwardWay::Apart = way {
        return apart(queue, a);
    }
    let (mean, rstd): (Out<f32>, Out<f32>) = (queue.scratch(b * groups)?, queue.scratch(b * groups)?);
    crate::group_norm_silu::launch::statistics(queue, norm_dims(a.dims), a.x, None, a.params.eps, [mean, rstd])?;
    let (mean, rstd, maps): (_, _, Out<f32>) = (mean.read(), rstd.read(), queue.scratch(2 * b * c)?);
    NormSiluConv2dTable { mean, rstd, gamma: a.gamma, beta: a.beta, maps, b, c, groups }
        .launch(queue, Shape::new((b * c).div_ceil(128), 128))?;
    let (x, maps, filters, y, tiles) = (a.x, maps.read(), a.filters, a.y, halo_tiles(b, h, w));
    let (bias, residual) = (a.bias.or_null(), a.residual.or_null());
    macro_rules! fused {
        ($kernel:ident, $columns:literal, $threads:literal) => {
            $kernel { x, maps, filters, bias, residual, y, h, w, c, f }
                .launch(queue, halo_shape(tiles, f, $columns, $threads))
        };
    }
    match way {
        ForwardWay::Wgmma128x128 => fused!(NormSiluConv2dWgmma128x128, 128, 256),
        ForwardWay::Wgmma128x64 => fused!(NormSiluConv2dWgmma128x64, 64, 256),
        ForwardWay::Fused128x128 => fused!(NormSiluConv2d128x128, 128, 128),
        ForwardWay::Fused128x64 => fused!(NormSiluConv2d128x64, 64, 128),
        _ => fused!(NormSiluConv2d128x16, 16, 256),
    }
}

/// The norm, the convolution and the sum, one after the other.
fn apart<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, h, w, c, g, f, .. } = a.dims;
    let ready: Out<T> = queue.scratch(b * h * w * c)?;
    let norm = group_norm_silu::GpuForward {
        dims: norm_dims(a.dims),
        params: norm_params(a.params),
        x: a.x,
        gamma: a.gamma,
        beta: a.beta,
        stats: None,
        y: ready,
        mean: queue.scratch(b * g)?,
        rstd: queue.scratch(b * g)?,
        element: PhantomData,
    };
    crate::group_norm_silu::launch::forward(queue, norm)?;
    let (dims, params) = conv(a.dims, a.params);
    let (x, y, element) = (ready.read(), a.y, PhantomData);
    let of = conv2d::GpuForward { dims, params, x, filters: a.filters, bias: a.bias, y, element };
    crate::conv2d::launch::forward(queue, of)?;
    let Some(x) = a.residual else { return Ok(()) };
    let (dims, params) = (axpy::Dims { l: b * h * w * f }, axpy::Params { alpha: 1.0 });
    crate::axpy::launch::forward(queue, axpy::GpuForward { dims, params, x, y, element })
}
