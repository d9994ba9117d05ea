//! Tokens to image in the order of DiT's output layer: see `op.toml` for the index map.

pub mod cpu;
pub mod launch;

/// The oracle: the index map, element by element.
pub mod reference {
    use crate::Real;
    use crate::generated::unpatchify::{Backward, Dims, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        pairs(a.dims, |image, token| a.x[image] = a.tokens[token]);
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        if let Some(dtokens) = a.dtokens {
            pairs(a.dims, |image, token| dtokens[token] = a.dx[image]);
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
            f(i, ((token * p + y % p) * p + x % p) * c + channel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, draw_f32};
    use crate::generated::unpatchify::{Backward, CASES, Dims, Forward, Params};

    #[test]
    fn two_channels_by_hand() {
        // Two tokens of 2x2 pixels with two channels; a value names channel, row, column of the image.
        let tokens = [0., 100., 1., 101., 10., 110., 11., 111., 2., 102., 3., 103., 12., 112., 13., 113.];
        let mut x = [0.0f32; 16];
        let dims = Dims { b: 1, c: 2, p: 2, gh: 1, gw: 2 };
        reference::forward(Forward { dims, params: Params {}, tokens: &tokens, x: &mut x });
        assert_eq!(x, [0., 1., 2., 3., 10., 11., 12., 13., 100., 101., 102., 103., 110., 111., 112., 113.]);
    }

    #[test]
    fn cpu_is_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let (dims, params, len) = (case.dims, case.params, crate::generated::unpatchify::bytes(case.dims) / 8);
            let (tokens, dx) =
                (draw_f32(case.name, "tokens", len, Fill::Normal), draw_f32(case.name, "dx", len, Fill::Normal));
            let (mut got, mut want) = (vec![0.0; len], vec![0.0; len]);
            cpu::forward(Forward { dims, params, tokens: &tokens, x: &mut got });
            reference::forward(Forward { dims, params, tokens: &tokens, x: &mut want });
            assert_eq!(got, want, "{}", case.name);
            cpu::backward(Backward { dims, params, dx: &dx, dtokens: Some(&mut got) });
            reference::backward(Backward { dims, params, dx: &dx, dtokens: Some(&mut want) });
            assert_eq!(got, want, "{}", case.name);
        }
    }
}
