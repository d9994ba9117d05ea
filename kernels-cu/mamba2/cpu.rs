//! CPU path: chunks of the scan as products of small matrices (`scan.rs`), heads over threads.
//!
//! Every head is computed in the same order whatever the split over threads; the backward pass, in `backward.rs`, sums
//! what the heads share over fixed groups of them.

pub use super::backward::backward;
use super::scan::{Bundle, CHUNK, Scan, fade, multiply, rows, scale_rows};
use crate::attention::layout::with_scratch;
use crate::attention::tiles::{Rows, Sum, pack, padded, product, product_transposed};
use crate::generated::mamba2::{Dims, Forward};
use crate::simd::vectorised;
use rayon::prelude::*;
use std::cell::Cell;

thread_local! {
    /// What heads share and results by head, kept from call to call.
    static SPARE: Cell<[Vec<f32>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { n, h, e, .. } = a.dims;
    let scan = Scan::new(a.dims, a.params, [a.xbc, a.p, a.dt_bias, a.a_log]);
    // Taken out of their cell, so that a call that this thread picks up while it waits finds empty ones.
    let [mut shared, mut by_head] = SPARE.take();
    scan.prepare(&mut shared);
    by_head.resize(a.y.len(), 0.0);
    by_head.par_chunks_mut(h * n * e).enumerate().for_each(|(sample, y)| {
        let most = Bundle::most(e);
        y.par_chunks_mut(most * n * e).enumerate().for_each(|(i, y)| {
            bundle_forward(&scan, &Bundle { sample, heads: i * most..h.min((i + 1) * most) }, &shared, y);
        });
    });
    let (results, skip, residual) = (&by_head, a.skip, a.residual);
    a.y.par_chunks_mut(h * e).enumerate().with_min_len(16).for_each(|(row, y)| {
        let (sample, time) = (row / n, scan.order.token(row % n));
        let x = &scan.xbc[row * scan.width()..][..h * e];
        let residual = residual.map(|r| &r[row * h * e..][..h * e]);
        vectorised(
            #[inline(always)]
            || {
                for (head, y) in y.chunks_exact_mut(e).enumerate() {
                    let scanned = &results[((sample * h + head) * n + time) * e..][..e];
                    let x = &x[head * e..][..e];
                    for i in 0..e {
                        y[i] = x[i].mul_add(skip[head], scanned[i]);
                    }
                }
                if let Some(residual) = residual {
                    for i in 0..residual.len() {
                        y[i] += residual[i];
                    }
                }
            },
        );
    });
    SPARE.set([shared, by_head]);
}

/// The scan of a bundle; `y [heads, N, E]` in the order of the scan.
fn bundle_forward(scan: &Scan<'_>, of: &Bundle, shared: &[f32], y: &mut [f32]) {
    let Dims { n, e, k, .. } = scan.dims;
    let (heads, wide, times) = (of.heads.len(), padded(e), scan.chunks() * CHUNK);
    let (columns, square) = (heads * wide, CHUNK * CHUNK);
    let (tall, state) = (CHUNK * columns, k * columns);
    let lengths = [heads * times, heads * times, heads * square, square, heads * CHUNK, tall, tall, tall, state, state];
    with_scratch(lengths, |[dt, decay, within, weights, since, xs, packed, read, state, packed_state]| {
        scan.steps(shared, of, dt, decay);
        for chunk in 0..scan.chunks() {
            let common = scan.shared(shared, of.sample, chunk);
            scan.decays(chunk, decay, within, since);
            scan.load(scan.xbc, scan.width(), of, chunk, Some(dt), xs);
            // What comes from before the chunk, faded, then what comes from within it.
            if chunk > 0 {
                pack(rows(state, columns), k, packed_state);
                product(common.c, CHUNK, packed_state, columns, Sum { data: read, stride: columns, add: false });
                scale_rows(read, heads, wide, since, CHUNK);
            }
            for g in 0..heads {
                multiply(&within[g * square..], common.cb, weights);
                pack(Rows { data: &xs[g * wide..], stride: columns, width: wide }, CHUNK, packed);
                let read = Sum { data: &mut read[g * wide..], stride: columns, add: chunk > 0 };
                product(rows(weights, CHUNK), CHUNK, packed, wide, read);
            }
            for (i, read) in read.chunks_exact(columns).take(scan.live(chunk)).enumerate() {
                for g in 0..heads {
                    y[(g * n + chunk * CHUNK + i) * e..][..e].copy_from_slice(&read[g * wide..][..e]);
                }
            }
            if chunk + 1 < scan.chunks() {
                scale_rows(xs, heads, wide, &within[square - CHUNK..], square);
                if chunk > 0 {
                    fade(state, wide, since);
                }
                pack(rows(xs, columns), CHUNK, packed);
                let state = Sum { data: state, stride: columns, add: chunk > 0 };
                product_transposed(common.b, CHUNK, packed, columns, state);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::Tier;
    use crate::check::{Fill, Tolerance, compare, draw_f32};
    use crate::generated::mamba2::{Backward, CASES, INFO, Params};

    /// Every output of both paths agrees; step sizes are drawn around `level`, before softplus.
    fn agree(name: &str, dims: Dims, params: Params, residual: bool, level: f32) {
        let Dims { b, n, w, h, e, k } = dims;
        let draw = |tensor: &str, len: usize| draw_f32(name, tensor, len, Fill::Normal);
        let (xbc, dy) = (draw("xbc", b * n * (h * e + 2 * k)), draw("dy", b * n * h * e));
        let (p, skip) = (draw("p", b * n * w), draw("skip", h));
        let dt_bias: Vec<f32> = draw("dt_bias", h).into_iter().map(|v| v + level).collect();
        let a_log = draw_f32(name, "a_log", h, Fill::Uniform(0.0, 2.7));
        let residual = residual.then(|| draw("residual", b * n * h * e));
        let run = |forward: fn(Forward<'_, f32>), backward: fn(Backward<'_, f32>)| {
            let lens = [b * n * h * e, xbc.len(), p.len(), h, h, h];
            let [mut y, mut dxbc, mut dp, mut d_bias, mut d_log, mut d_skip] = lens.map(|len| vec![f32::NAN; len]);
            let (xbc, p, dt_bias, a_log, skip) = (&xbc, &p, &dt_bias, &a_log, &skip);
            forward(Forward { dims, params, xbc, p, dt_bias, a_log, skip, residual: residual.as_deref(), y: &mut y });
            backward(Backward {
                dims,
                params,
                dy: &dy,
                xbc,
                p,
                dt_bias,
                a_log,
                skip,
                dxbc: Some(&mut dxbc),
                dp: Some(&mut dp),
                ddt_bias: Some(&mut d_bias),
                da_log: Some(&mut d_log),
                dskip: Some(&mut d_skip),
            });
            [("y", y), ("dxbc", dxbc), ("dp", dp), ("ddt_bias", d_bias), ("da_log", d_log), ("dskip", d_skip)]
        };
        let (got, want) = (run(forward, backward), run(reference::forward, reference::backward));
        for ((tensor, got), (_, want)) in got.iter().zip(&want) {
            let result = compare(got, want, INFO.tolerance.unwrap_or(Tolerance::F32));
            assert!(result.pass, "{name} {tensor}: {result:?}");
        }
    }

    #[test]
    fn agrees_with_the_oracle() {
        for case in CASES.iter().filter(|case| case.tier == Tier::Tiny) {
            agree(case.name, case.dims, case.params, !case.absent.contains(&"residual"), -2.0);
        }
    }

    #[test]
    fn decays_that_vanish_within_a_chunk_lose_nothing() {
        let dims = Dims { b: 1, n: 70, w: 3, h: 3, e: 4, k: 6 };
        for (name, level) in [("strong", 8.0), ("weak", -9.0)] {
            agree(name, dims, Params { dt_offset: 0, reverse: false }, false, level);
        }
    }
}
