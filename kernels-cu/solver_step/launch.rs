//! Which kernel takes which shape.

use crate::generated::solver_step::{Dims, GpuForward, Params};
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::solver_step::{SolverStepForward, SolverStepForwardAny};

/// Blocks at the most; more elements go round.
const GRID: usize = 1 << 14;

/// Launches the step.
///
/// # Errors
/// Those of the queue.
#[rustfmt::skip]
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, c, co, s } = a.dims;
    let Params { guidance, guided_channels, inv_alpha, sigma, cx, ce, c0, c1, cn, learned, log_hi, log_lo } = a.params;
    let (x, cond, x_next, x0) = (a.x, a.cond, a.x_next, a.x0);
    let (uncond, noise, x0_prev) = (a.uncond.or_null(), a.noise.or_null(), a.x0_prev.or_null());
    let learned = usize::from(learned);
    let shape = |items: usize| Shape::new(items.div_ceil(128).clamp(1, GRID), 128);
    if s.is_multiple_of(4) {
        SolverStepForward {
            x, cond, uncond, noise, x0_prev, x_next, x0, b, c, co, s,
            guidance, guided_channels, inv_alpha, sigma, cx, ce, c0, c1, cn, learned, log_hi, log_lo,
        }
        .launch(queue, shape(b * c * s / 4))
    } else {
        SolverStepForwardAny {
            x, cond, uncond, noise, x0_prev, x_next, x0, b, c, co, s,
            guidance, guided_channels, inv_alpha, sigma, cx, ce, c0, c1, cn, learned, log_hi, log_lo,
        }
        .launch(queue, shape(b * c * s))
    }
}
