//! Which kernel takes which shape.

use crate::generated::group_norm_silu::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, In, OrNull, Out, Queue, Shape};
use crate::launchers::group_norm_silu::{
    GroupNormSiluBackward, GroupNormSiluBackwardAny, GroupNormSiluBackwardChannels, GroupNormSiluBackwardMeans,
    GroupNormSiluBackwardParameters, GroupNormSiluBackwardSums, GroupNormSiluBackwardSumsAny, GroupNormSiluForward,
    GroupNormSiluForwardAny, GroupNormSiluMoments, GroupNormSiluMomentsAny, GroupNormSiluStatistics,
};

/// Threads of a block; along the channels and along the pixels.
const THREADS: usize = 256;
const TILE: [usize; 2] = [16, 16];
/// Pixels of a thread where nothing is summed.
const STEPS: usize = 4;
/// Blocks that share a sum: three on each multiprocessor of an H100 or H200. A constant, so that the order of the sums
/// is the same on every device.
const BLOCKS: usize = 396;

/// Tiles of channels, blocks along the pixels that share a sum, blocks along the pixels where nothing is summed.
fn split(Dims { b, h, w, c, .. }: Dims) -> [usize; 3] {
    let tiles = c.div_ceil(TILE[0] * if c.is_multiple_of(8) { 8 } else { 1 });
    let splits = (BLOCKS / (b * tiles)).clamp(1, (h * w).div_ceil(2 * TILE[1]));
    [tiles, splits, (h * w).div_ceil(STEPS * TILE[1])]
}

/// Launches what makes `mean` and `rstd` of x, or copies them from `stats`.
///
/// # Errors
/// Those of the queue.
pub(crate) fn statistics<T: Element, Q: Queue>(
    queue: &mut Q,
    dims: Dims,
    x: In<T>,
    stats: Option<In<f32>>,
    eps: f32,
    [mean, rstd]: [Out<f32>; 2],
) -> Result<(), Q::Error> {
    let Dims { b, h, w, c, g: groups } = dims;
    let ([tiles, splits, _], p) = (split(dims), h * w);
    let mut partials = In::at(0);
    if stats.is_none() {
        let to: Out<f32> = queue.scratch(b * splits * 2 * c)?;
        let shape = Shape::new(b * splits * tiles, THREADS);
        if c.is_multiple_of(8) {
            GroupNormSiluMoments { x, partials: to, p, c, splits }.launch(queue, shape)?;
        } else {
            GroupNormSiluMomentsAny { x, partials: to, p, c, splits }.launch(queue, shape)?;
        }
        partials = to.read();
    }
    GroupNormSiluStatistics { partials, stats: stats.or_null(), mean, rstd, p, c, groups, splits, eps }.launch(
        queue,
        Shape::new(b * groups, 128),
        T::TYPE,
    )
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, h, w, c, g: groups } = a.dims;
    let (x, gamma, beta, y, mean, rstd, p) = (a.x, a.gamma, a.beta, a.y, a.mean, a.rstd, h * w);
    let silu = usize::from(a.params.silu);
    let [tiles, _, blocks] = split(a.dims);
    statistics(queue, a.dims, x, a.stats, a.params.eps, [mean, rstd])?;
    let (mean, rstd, shape) = (mean.read(), rstd.read(), Shape::new(b * blocks * tiles, THREADS));
    if c.is_multiple_of(8) {
        GroupNormSiluForward { x, gamma, beta, mean, rstd, y, p, c, groups, blocks, silu }.launch(queue, shape)
    } else {
        GroupNormSiluForwardAny { x, gamma, beta, mean, rstd, y, p, c, groups, blocks, silu }.launch(queue, shape)
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Dims { b, h, w, c, g: groups } = a.dims;
    let (dy, x, gamma, beta, mean, rstd, p) = (a.dy, a.x, a.gamma, a.beta, a.mean, a.rstd, h * w);
    let (silu, vectors) = (usize::from(a.params.silu), c.is_multiple_of(8));
    let [tiles, splits, blocks] = split(a.dims);
    let (own, parameters) = (a.stats.is_none() && a.dx.is_some(), a.dgamma.is_some() || a.dbeta.is_some());
    let mut means = In::at(0);
    if own || parameters {
        let partials: Out<f32> = queue.scratch(b * splits * 2 * c)?;
        let sums: Out<f32> = queue.scratch(b * 2 * c)?;
        let shape = Shape::new(b * splits * tiles, THREADS);
        if vectors {
            GroupNormSiluBackwardSums { dy, x, gamma, beta, mean, rstd, partials, p, c, groups, splits, silu }
                .launch(queue, shape)?;
        } else {
            GroupNormSiluBackwardSumsAny { dy, x, gamma, beta, mean, rstd, partials, p, c, groups, splits, silu }
                .launch(queue, shape)?;
        }
        GroupNormSiluBackwardChannels { partials: partials.read(), sums, c, splits }.launch(
            queue,
            Shape::new(b * (2 * c).div_ceil(32), 512),
            T::TYPE,
        )?;
        let sums = sums.read();
        if parameters {
            let (dgamma, dbeta) = (a.dgamma.or_null(), a.dbeta.or_null());
            GroupNormSiluBackwardParameters { sums, dgamma, dbeta, b, c }
                .launch(queue, Shape::new(c.div_ceil(128), 128))?;
        }
        if own {
            let (to, total): (Out<f32>, _) = (queue.scratch(b * groups * 2)?, b * groups);
            GroupNormSiluBackwardMeans { sums, gamma, means: to, total, p, c, groups }
                .launch(queue, Shape::new(total.div_ceil(4), 128))?;
            means = to.read();
        }
    }
    let (Some(dx), shape) = (a.dx, Shape::new(b * blocks * tiles, THREADS)) else { return Ok(()) };
    if vectors {
        GroupNormSiluBackward { dy, x, gamma, beta, mean, rstd, means, dx, p, c, groups, blocks, silu }
            .launch(queue, shape)
    } else {
        GroupNormSiluBackwardAny { dy, x, gamma, beta, mean, rstd, means, dx, p, c, groups, blocks, silu }
            .launch(queue, shape)
    }
}
