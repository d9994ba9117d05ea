//! Between f32 and the working type of a device: see `op.toml`. On the host both are f32, and it is a copy.

pub mod cpu;
pub mod launch;

/// The oracle: what a value is does not depend on how it is held.
pub mod reference {
    use crate::Real;
    use crate::generated::cast::{Backward, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        a.y.iter_mut().zip(a.x).for_each(|(y, x)| *y = *x);
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Some(dx) = a.dx else { return };
        dx.iter_mut().zip(a.dy).for_each(|(dx, dy)| *dx = *dy);
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::generated::cast::{Backward, Dims, Forward, Params};

    #[test]
    fn values_stay_what_they_are() {
        let x = [1.0f32, -0.0, f32::MIN_POSITIVE / 2.0, f32::INFINITY, 3.402_823_5e38];
        let (dims, params) = (Dims { l: x.len() }, Params {});
        for (forward, backward) in [
            (reference::forward as fn(Forward<'_, f32>), reference::backward as fn(Backward<'_, f32>)),
            (cpu::forward, cpu::backward),
        ] {
            let (mut y, mut dx) = ([f32::NAN; 5], [f32::NAN; 5]);
            forward(Forward { dims, params, x: &x, y: &mut y });
            backward(Backward { dims, params, dy: &y, dx: Some(&mut dx) });
            assert_eq!(y.map(f32::to_bits), x.map(f32::to_bits));
            assert_eq!(dx.map(f32::to_bits), x.map(f32::to_bits));
        }
    }
}
