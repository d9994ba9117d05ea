//! Backward pass of the CPU path: the states are scanned again, then the chunks go by from the last to the first.
//!
//! The gradient of a decay is summed over the pairs of tokens that it lies between, chunk by chunk; taking it as the
//! difference of two sums over all pairs would be shorter and cancel where decays are strong. B and C collect from all
//! heads: groups of them sum apart, and what comes from within a chunk is summed as the `[CHUNK, CHUNK]` gradient of
//! C·Bᵀ, so that its products are taken once for all heads.

use super::scan::{Bundle, CHUNK, Scan, Shared, fade, multiply, rows, scale_rows};
use crate::attention::layout::with_scratch;
use crate::attention::tiles::{Rows, Sum, pack, pack_transposed, padded, product, product_transposed};
use crate::generated::mamba2::{Backward, Dims};
use crate::simd::{exp_m1, sum_by, vectorised};
use rayon::prelude::*;

/// Groups into which the bundles of a sample are split at most.
const GROUPS: usize = 8;
const SQUARE: usize = CHUNK * CHUNK;

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { b, n, w, h, e, k } = a.dims;
    let scan = Scan::new(a.dims, a.params, [a.xbc, a.p, a.dt_bias, a.a_log]);
    let mut shared = Vec::new();
    scan.prepare(&mut shared);
    let (most, times, wide_k) = (Bundle::most(e), scan.chunks() * CHUNK, padded(k));
    let per_group = h.div_ceil(most).div_ceil(GROUPS) * most;
    let groups = h.div_ceil(per_group);
    // By head in the order of the scan, and per group of heads: gradients of B and C, and of C·Bᵀ within chunks.
    let (mut dx, mut ddt) = (vec![0.0f32; b * h * n * e], vec![0.0f32; b * h * n]);
    let mut sums = vec![[0.0f64; 3]; b * h];
    let mut dbc = vec![0.0f32; b * groups * times * 2 * wide_k];
    let mut dcb = vec![0.0f32; b * groups * times * CHUNK];
    let samples = dx.par_chunks_mut(h * n * e).zip(ddt.par_chunks_mut(h * n)).zip(sums.par_chunks_mut(h));
    let collected = dbc.par_chunks_mut(groups * times * 2 * wide_k).zip(dcb.par_chunks_mut(groups * times * CHUNK));
    samples.zip(collected).enumerate().for_each(|(sample, (((dx, ddt), sums), (dbc, dcb)))| {
        let of_heads = dx.par_chunks_mut(per_group * n * e).zip(ddt.par_chunks_mut(per_group * n));
        let of_heads = of_heads.zip(sums.par_chunks_mut(per_group));
        let of_groups = dbc.par_chunks_mut(times * 2 * wide_k).zip(dcb.par_chunks_mut(times * CHUNK));
        of_heads.zip(of_groups).enumerate().for_each(|(group, (((dx, ddt), sums), (dbc, dcb)))| {
            let bundles = dx.chunks_mut(most * n * e).zip(ddt.chunks_mut(most * n)).zip(sums.chunks_mut(most));
            for (i, ((dx, ddt), sums)) in bundles.enumerate() {
                let first = group * per_group + i * most;
                let of = Bundle { sample, heads: first..first + sums.len() };
                let heads = Heads { scan: &scan, of, dy: a.dy, skip: a.skip, shared: &shared };
                heads.backward(dx, ddt, sums, dbc, dcb);
            }
        });
        collect(&scan, sample, &shared, groups, dbc, dcb);
    });
    if let Some(dxbc) = a.dxbc {
        dxbc.par_chunks_mut(scan.width()).enumerate().for_each(|(row, out)| {
            let (sample, time) = (row / n, scan.order.token(row % n));
            let (values, rest) = out.split_at_mut(h * e);
            for (head, out) in values.chunks_exact_mut(e).enumerate() {
                out.copy_from_slice(&dx[((sample * h + head) * n + time) * e..][..e]);
            }
            let dbc = &dbc[(sample * groups * times + time) * 2 * wide_k..][..2 * wide_k];
            rest[..k].copy_from_slice(&dbc[..k]);
            rest[k..].copy_from_slice(&dbc[wide_k..][..k]);
        });
    }
    if let Some(dp) = a.dp {
        dp.par_chunks_mut(w).enumerate().for_each(|(row, out)| {
            let (sample, time) = (row / n, scan.order.token(row % n));
            out.fill(0.0);
            let out = &mut out[scan.dt_offset..][..h];
            out.iter_mut().enumerate().for_each(|(head, out)| *out = ddt[(sample * h + head) * n + time]);
        });
    }
    for (i, out) in [a.ddt_bias, a.da_log, a.dskip].into_iter().enumerate() {
        for (head, out) in out.into_iter().flatten().enumerate() {
            *out = (0..b).map(|sample| sums[sample * h + head][i]).sum::<f64>() as f32;
        }
    }
}

/// Adds the groups of a sample to the first, and what came through C·Bᵀ within the chunks.
fn collect(scan: &Scan<'_>, sample: usize, shared: &[f32], groups: usize, dbc: &mut [f32], dcb: &mut [f32]) {
    let (k, wide) = (scan.dims.k, padded(scan.dims.k));
    let add = |all: &mut [f32]| {
        let (total, rest) = all.split_at_mut(all.len() / groups);
        for group in rest.chunks_exact(total.len()) {
            total.par_iter_mut().zip(group).with_min_len(1 << 14).for_each(|(sum, x)| *sum += x);
        }
    };
    add(dbc);
    add(dcb);
    let chunks = dbc.par_chunks_mut(CHUNK * 2 * wide).zip(dcb.par_chunks(SQUARE)).take(scan.chunks());
    chunks.enumerate().for_each(|(chunk, (dbc, dcb))| {
        let Shared { b, c, .. } = scan.shared(shared, sample, chunk);
        let dcb = Rows { data: dcb, stride: CHUNK, width: CHUNK };
        with_scratch([CHUNK * wide], |[packed]| {
            pack(c, CHUNK, packed);
            product_transposed(dcb, CHUNK, packed, k, Sum { data: dbc, stride: 2 * wide, add: true });
            pack(b, CHUNK, packed);
            product(dcb, CHUNK, packed, k, Sum { data: &mut dbc[wide..], stride: 2 * wide, add: true });
        });
    });
}

/// A bundle of heads.
struct Heads<'a> {
    scan: &'a Scan<'a>,
    of: Bundle,
    dy: &'a [f32],
    skip: &'a [f32],
    shared: &'a [f32],
}

/// Memory of a bundle's backward pass. Tensors `[.., H, E]` hold the heads side by side, each padded to whole vectors.
struct Buffers<'s> {
    /// Step sizes and decays, `[H, times]`.
    dt: &'s mut [f32],
    decay: &'s mut [f32],
    /// States before every chunk but the first, `[chunks - 1, K, H, E]`.
    states: &'s mut [f32],
    /// L and cum of the chunk at hand, `[H, CHUNK, CHUNK]` and `[H, CHUNK]`.
    within: &'s mut [f32],
    since: &'s mut [f32],
    /// L ∘ C·Bᵀ of a head, and its gradient of C·Bᵀ.
    weights: &'s mut [f32],
    dcb: &'s mut [f32],
    /// dt·x, dy, d(dt·x) and what goes through the state, `[CHUNK, H, E]`.
    xs: &'s mut [f32],
    dys: &'s mut [f32],
    dxs: &'s mut [f32],
    part: &'s mut [f32],
    /// Gradient of the state after the chunk, `[K, H, E]`.
    d_state: &'s mut [f32],
    /// Gradients of ln a, `[H, CHUNK]`, and terms of them.
    d_ln: &'s mut [f32],
    terms: &'s mut [f32],
    /// Packed factors: rows or columns of `[CHUNK, H, E]`, rows or columns of `[K, H, E]`.
    packed: &'s mut [f32],
    state_rows: &'s mut [f32],
    state_columns: &'s mut [f32],
}

impl Heads<'_> {
    /// Columns of a head, and of all.
    fn columns(&self) -> (usize, usize) {
        let wide = padded(self.scan.dims.e);
        (wide, self.of.heads.len() * wide)
    }

    /// Gradients of a bundle: `dx [heads, N, E]` and `ddt [heads, N]` in the order of the scan, the sums of dt_bias,
    /// a_log and skip; adds to those of B and C and of C·Bᵀ.
    fn backward(&self, dx: &mut [f32], ddt: &mut [f32], sums: &mut [[f64; 3]], dbc: &mut [f32], dcb: &mut [f32]) {
        let Dims { k, .. } = self.scan.dims;
        let (chunks, heads, wide_k) = (self.scan.chunks(), self.of.heads.len(), padded(k));
        let (_, columns) = self.columns();
        let (times, tall, state) = (heads * chunks * CHUNK, CHUNK * columns, k * columns);
        let (squares, ends) = (heads * SQUARE, heads * CHUNK);
        let first = [times, times, (chunks - 1) * state, squares, ends, SQUARE, SQUARE, tall, tall, tall];
        let second = [tall, state, ends, CHUNK, tall, state, columns * wide_k];
        let lengths: [usize; 17] = std::array::from_fn(|i| if i < 10 { first[i] } else { second[i - 10] });
        with_scratch(lengths, |buffers| {
            let [dt, decay, states, within, since, weights, dcb_one, xs, dys, dxs, buffers @ ..] = buffers;
            let [part, d_state, d_ln, terms, packed, state_rows, state_columns] = buffers;
            let mut s = Buffers {
                dt,
                decay,
                states,
                within,
                since,
                weights,
                dcb: dcb_one,
                xs,
                dys,
                dxs,
                part,
                d_state,
                d_ln,
                terms,
                packed,
                state_rows,
                state_columns,
            };
            self.scan.steps(self.shared, &self.of, s.dt, s.decay);
            for chunk in 0..chunks - 1 {
                self.scan_again(chunk, &mut s);
            }
            for chunk in (0..chunks).rev() {
                self.within(chunk, &mut s, &mut dcb[chunk * SQUARE..][..SQUARE]);
                let dbc = &mut dbc[chunk * CHUNK * 2 * wide_k..][..CHUNK * 2 * wide_k];
                if chunk + 1 < chunks {
                    self.after(chunk, &mut s, dbc);
                }
                if chunk > 0 {
                    self.before(chunk, &mut s, dbc);
                }
                self.finish(chunk, &s, dx, ddt, sums);
            }
        });
    }

    /// Decays of a chunk and dt·x.
    fn load(&self, chunk: usize, s: &mut Buffers<'_>) {
        self.scan.decays(chunk, s.decay, s.within, s.since);
        self.scan.load(self.scan.xbc, self.scan.width(), &self.of, chunk, Some(s.dt), s.xs);
    }

    /// The state after a chunk from that before it.
    fn scan_again(&self, chunk: usize, s: &mut Buffers<'_>) {
        let k = self.scan.dims.k;
        let (wide, columns) = self.columns();
        self.load(chunk, s);
        scale_rows(s.xs, self.of.heads.len(), wide, &s.within[SQUARE - CHUNK..], SQUARE);
        let (before, after) = s.states.split_at_mut(chunk * k * columns);
        let after = &mut after[..k * columns];
        if chunk > 0 {
            after.copy_from_slice(&before[(chunk - 1) * k * columns..]);
            fade(after, wide, s.since);
        }
        pack(rows(s.xs, columns), CHUNK, s.packed);
        let b = self.scan.shared(self.shared, self.of.sample, chunk).b;
        product_transposed(b, CHUNK, s.packed, columns, Sum { data: after, stride: columns, add: chunk > 0 });
    }

    /// What tokens of a chunk give to each other: d(dt·x) and d(ln a) begin with it.
    fn within(&self, chunk: usize, s: &mut Buffers<'_>, dcb: &mut [f32]) {
        let Dims { h, e, .. } = self.scan.dims;
        let (wide, columns) = self.columns();
        let cb = self.scan.shared(self.shared, self.of.sample, chunk).cb;
        self.load(chunk, s);
        self.scan.load(self.dy, h * e, &self.of, chunk, None, s.dys);
        for g in 0..self.of.heads.len() {
            let of_head = |data| Rows { data, stride: columns, width: wide };
            let (xs, dys) = (of_head(&s.xs[g * wide..]), of_head(&s.dys[g * wide..]));
            let within = &s.within[g * SQUARE..][..SQUARE];
            multiply(within, cb, s.weights);
            pack_transposed(xs, CHUNK, s.packed);
            product(dys, CHUNK, s.packed, CHUNK, Sum { data: s.dcb, stride: CHUNK, add: false });
            let (found, d_ln, terms) = (&mut *s.dcb, &mut s.d_ln[g * CHUNK..][..CHUNK], &mut s.terms[..CHUNK]);
            vectorised(
                #[inline(always)]
                || {
                    for i in 0..SQUARE {
                        found[i] *= within[i];
                        dcb[i] += found[i];
                    }
                    // Pairs i ≥ t > j: the terms of each j, with those of one i more at every step.
                    terms.fill(0.0);
                    for t in (0..CHUNK).rev() {
                        for j in 0..CHUNK {
                            terms[j] = found[t * CHUNK + j].mul_add(cb[t * CHUNK + j], terms[j]);
                        }
                        d_ln[t] = sum_by(CHUNK, |j| if j < t { terms[j] } else { 0.0 });
                    }
                },
            );
            pack(dys, CHUNK, s.packed);
            let dxs = Sum { data: &mut s.dxs[g * wide..], stride: columns, add: false };
            product_transposed(rows(s.weights, CHUNK), CHUNK, s.packed, wide, dxs);
        }
    }

    /// What tokens of a chunk give to those after it, by way of the state.
    fn after(&self, chunk: usize, s: &mut Buffers<'_>, dbc: &mut [f32]) {
        let k = self.scan.dims.k;
        let (heads, (wide, columns), wide_k) = (self.of.heads.len(), self.columns(), padded(k));
        let b = self.scan.shared(self.shared, self.of.sample, chunk).b;
        let remains = &s.within[SQUARE - CHUNK..];
        let state = rows(s.d_state, columns);
        pack(state, k, s.state_rows);
        product(b, CHUNK, s.state_rows, columns, Sum { data: s.part, stride: columns, add: false });
        scale_rows(s.part, heads, wide, remains, SQUARE);
        let (xs, dxs, part, d_ln) = (&*s.xs, &mut *s.dxs, &mut *s.part, &mut *s.d_ln);
        vectorised(
            #[inline(always)]
            || {
                for (g, d_ln) in d_ln.chunks_exact_mut(CHUNK).enumerate() {
                    let mut given = 0.0;
                    for t in 0..CHUNK {
                        let at = t * columns + g * wide;
                        let (x, part) = (&xs[at..][..wide], &part[at..][..wide]);
                        d_ln[t] += given;
                        given += sum_by(wide, |i| x[i] * part[i]);
                    }
                }
                for i in 0..dxs.len() {
                    dxs[i] += part[i];
                }
                part.copy_from_slice(xs);
            },
        );
        scale_rows(s.part, heads, wide, remains, SQUARE);
        pack_transposed(state, k, s.state_columns);
        let given = rows(s.part, columns);
        product(given, CHUNK, s.state_columns, k, Sum { data: dbc, stride: 2 * wide_k, add: true });
    }

    /// What tokens of a chunk take from those before it, by way of the state; turns the gradient of the state after
    /// the chunk into that of the state before it.
    fn before(&self, chunk: usize, s: &mut Buffers<'_>, dbc: &mut [f32]) {
        let k = self.scan.dims.k;
        let (heads, (wide, columns), wide_k) = (self.of.heads.len(), self.columns(), padded(k));
        let last = chunk + 1 == self.scan.chunks();
        let c = self.scan.shared(self.shared, self.of.sample, chunk).c;
        let state = &s.states[(chunk - 1) * k * columns..][..k * columns];
        pack(rows(state, columns), k, s.state_rows);
        product(c, CHUNK, s.state_rows, columns, Sum { data: s.part, stride: columns, add: false });
        scale_rows(s.part, heads, wide, s.since, CHUNK);
        let (d_state, read, dys, since) = (&mut *s.d_state, &mut *s.part, &*s.dys, &*s.since);
        vectorised(
            #[inline(always)]
            || {
                for (g, d_ln) in s.d_ln.chunks_exact_mut(CHUNK).enumerate() {
                    // What runs through the whole chunk, and what is taken at t or later.
                    let mut taken = 0.0;
                    if !last {
                        for at in (0..k).map(|row| row * columns + g * wide) {
                            let (state, d_state) = (&state[at..][..wide], &d_state[at..][..wide]);
                            taken += sum_by(wide, |i| state[i] * d_state[i]);
                        }
                        taken *= since[g * CHUNK + CHUNK - 1];
                    }
                    for t in (0..CHUNK).rev() {
                        let at = t * columns + g * wide;
                        let (dy, read) = (&dys[at..][..wide], &read[at..][..wide]);
                        taken += sum_by(wide, |i| dy[i] * read[i]);
                        d_ln[t] += taken;
                    }
                }
                read.copy_from_slice(dys);
            },
        );
        scale_rows(s.part, heads, wide, s.since, CHUNK);
        let taken = rows(s.part, columns);
        pack_transposed(rows(state, columns), k, s.state_columns);
        let dc = Sum { data: &mut dbc[wide_k..], stride: 2 * wide_k, add: true };
        product(taken, CHUNK, s.state_columns, k, dc);
        if !last {
            fade(s.d_state, wide, s.since);
        }
        pack(taken, CHUNK, s.packed);
        product_transposed(c, CHUNK, s.packed, columns, Sum { data: s.d_state, stride: columns, add: !last });
    }

    /// From d(dt·x) and d(ln a) to the gradients of what they are made of.
    fn finish(&self, chunk: usize, s: &Buffers<'_>, dx: &mut [f32], ddt: &mut [f32], sums: &mut [[f64; 3]]) {
        let Dims { n, h, e, .. } = self.scan.dims;
        let (wide, columns) = self.columns();
        let times = self.scan.chunks() * CHUNK;
        for (g, (head, sums)) in self.of.heads.clone().zip(sums).enumerate() {
            let (rate, skip) = (self.scan.rate(head), self.skip[head]);
            vectorised(
                #[inline(always)]
                || {
                    for t in 0..self.scan.live(chunk) {
                        let time = chunk * CHUNK + t;
                        let (row, dt) = (self.scan.row(self.of.sample, time), s.dt[g * times + time]);
                        let x = &self.scan.xbc[row * self.scan.width() + head * e..][..e];
                        let dy = &self.dy[(row * h + head) * e..][..e];
                        let dxs = &s.dxs[t * columns + g * wide..][..e];
                        let dx = &mut dx[(g * n + time) * e..][..e];
                        for i in 0..e {
                            dx[i] = dxs[i].mul_add(dt, skip * dy[i]);
                        }
                        let d_ln = s.d_ln[g * CHUNK + t];
                        // The derivative of softplus is 1 − e^−softplus.
                        let found = -exp_m1(-dt) * d_ln.mul_add(rate, sum_by(e, |i| x[i] * dxs[i]));
                        ddt[g * n + time] = found;
                        sums[0] += f64::from(found);
                        sums[1] += f64::from(d_ln * rate * dt);
                        sums[2] += f64::from(sum_by(e, |i| x[i] * dy[i]));
                    }
                },
            );
        }
    }
}
