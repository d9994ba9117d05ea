//! Image to tokens in convolution-weight order: see `op.toml` for the index map.

pub mod cpu;
pub mod launch;

/// The oracle: the index map, element by element.
pub mod reference {
    use crate::Real;
    use crate::generated::patchify::{Backward, Dims, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        pairs(a.dims, |image, token| a.tokens[token] = a.x[image]);
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        if let Some(dx) = a.dx {
            pairs(a.dims, |image, token| dx[image] = a.dtokens[token]);
        }
    }

    /// Calls `f(index in the image, index in the tokens)` for every element.
    fn pairs(dims: Dims, mut f: impl FnMut(usize, usize)) {
        let Dims { b, c, p, gh, gw } = dims;
        let (height, width) = (gh * p, gw * p);
        for i in 0..b * c * height * width {
            let (x, y, channel, sample) =
                (i % width, i / width % height, i / (width * height) % c, i / (c * width * height));
            let token = (sample * gh + y / p) * gw + x / p;
            f(i, ((token * c + channel) * p + y % p) * p + x % p);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, draw_f32};
    use crate::generated::patchify::{Backward, CASES, Dims, Forward, Params};

    #[test]
    fn two_channels_by_hand() {
        // Two channels of one row of two 2x2 patches; a value names channel, row, column.
        let x = [0., 1., 2., 3., 10., 11., 12., 13., 100., 101., 102., 103., 110., 111., 112., 113.];
        let mut tokens = [0.0f32; 16];
        let dims = Dims { b: 1, c: 2, p: 2, gh: 1, gw: 2 };
        reference::forward(Forward { dims, params: Params {}, x: &x, tokens: &mut tokens });
        assert_eq!(tokens, [0., 1., 10., 11., 100., 101., 110., 111., 2., 3., 12., 13., 102., 103., 112., 113.]);
    }

    #[test]
    fn cpu_is_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let (dims, params, len) = (case.dims, case.params, crate::generated::patchify::bytes(case.dims) / 8);
            let (x, dtokens) =
                (draw_f32(case.name, "x", len, Fill::Normal), draw_f32(case.name, "dtokens", len, Fill::Normal));
            let (mut got, mut want) = (vec![0.0; len], vec![0.0; len]);
            cpu::forward(Forward { dims, params, x: &x, tokens: &mut got });
            reference::forward(Forward { dims, params, x: &x, tokens: &mut want });
            assert_eq!(got, want, "{}", case.name);
            cpu::backward(Backward { dims, params, dtokens: &dtokens, dx: Some(&mut got) });
            reference::backward(Backward { dims, params, dtokens: &dtokens, dx: Some(&mut want) });
            assert_eq!(got, want, "{}", case.name);
        }
    }
}
