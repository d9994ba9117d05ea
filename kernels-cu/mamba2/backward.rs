//! Backward pass of the CPU path: the states are scanned again, then the chunks go by from the last to the first.
//!
//! The gradient of a decay is summed over the pairs of tokens that it lies between, chunk by chunk; taking it as the
//! difference of two sums over all pairs would be shorter and cancel where decays are strong. B and C collect from all
//! heads: groups of them sum apart, and what comes from within a chunk is summed as the `[CHUNK, CHUNK]` gradient of
//! C·Bᵀ, so that its products are taken once for all heads.

use super::scan::{CHUNK, Scan, Shared, decays, multiply, padded_rows, scale_rows};
use crate::attention::layout::with_scratch;
use crate::attention::tiles::{Rows, Sum, pack, pack_transposed, padded, product, product_transposed};
use crate::generated::mamba2::{Backward, Dims};
use crate::simd::{exp_m1, sum_by, vectorised};
use rayon::prelude::*;

/// Groups into which the heads of a sample are split at most.
const GROUPS: usize = 8;
const SQUARE: usize = CHUNK * CHUNK;

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { b, n, w, h, e, k } = a.dims;
    let scan = Scan::new(a.dims, a.params, [a.xbc, a.p, a.dt_bias, a.a_log]);
    let mut shared = Vec::new();
    scan.prepare(&mut shared);
    let (per_group, times, wide_k) = (h.div_ceil(GROUPS), scan.chunks() * CHUNK, padded(k));
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
            let heads = dx.chunks_mut(n * e).zip(ddt.chunks_mut(n)).zip(sums);
            for (i, ((dx, ddt), sums)) in heads.enumerate() {
                let head = group * per_group + i;
                let one = Head { scan: &scan, sample, head, dy: a.dy, skip: a.skip[head], shared: &shared };
                one.backward(dx, ddt, sums, dbc, dcb);
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

/// One head of one sample.
struct Head<'a> {
    scan: &'a Scan<'a>,
    sample: usize,
    head: usize,
    dy: &'a [f32],
    skip: f32,
    shared: &'a [f32],
}

/// Memory of a head's backward pass. Rows of a head are padded to whole vectors.
struct Buffers<'s> {
    /// Step sizes and decays of all times.
    dt: &'s mut [f32],
    decay: &'s mut [f32],
    /// States before every chunk but the first, `[chunks - 1, K, E]`.
    states: &'s mut [f32],
    /// L and cum of the chunk at hand.
    within: &'s mut [f32],
    since: &'s mut [f32],
    /// L ∘ C·Bᵀ, and the gradient of C·Bᵀ.
    weights: &'s mut [f32],
    dcb: &'s mut [f32],
    /// dt·x, dy, d(dt·x) and a factor of a product, `[CHUNK, E]`.
    xs: &'s mut [f32],
    dys: &'s mut [f32],
    dxs: &'s mut [f32],
    part: &'s mut [f32],
    /// Gradient of the state after the chunk, `[K, E]`.
    d_state: &'s mut [f32],
    /// Gradient of C by way of the state before the chunk, `[CHUNK, K]`.
    dc: &'s mut [f32],
    /// Gradients of ln a, `[CHUNK]`, and terms of them.
    d_ln: &'s mut [f32],
    terms: &'s mut [f32],
    /// Packed factors of `[CHUNK, E]` and `[K, E]`, by rows and by columns.
    rows: &'s mut [f32],
    columns: &'s mut [f32],
    state_rows: &'s mut [f32],
    state_columns: &'s mut [f32],
}

impl Head<'_> {
    /// Gradients of a head: `dx [N, E]` and `ddt [N]` in the order of the scan, the sums of dt_bias, a_log and skip;
    /// adds to those of B and C and of C·Bᵀ.
    fn backward(&self, dx: &mut [f32], ddt: &mut [f32], sums: &mut [f64; 3], dbc: &mut [f32], dcb: &mut [f32]) {
        let Dims { e, k, .. } = self.scan.dims;
        let (chunks, wide, wide_k) = (self.scan.chunks(), padded(e), padded(k));
        let (times, tall, state) = (chunks * CHUNK, CHUNK * wide, k * wide);
        let lengths = [
            [times, times, (chunks - 1) * state, SQUARE, CHUNK, SQUARE, SQUARE, tall, tall, tall],
            [tall, state, CHUNK * wide_k, CHUNK, CHUNK, tall, e * CHUNK, state, e * wide_k, 0],
        ];
        let lengths: [usize; 20] = std::array::from_fn(|i| lengths[i / 10][i % 10]);
        with_scratch(lengths, |buffers| {
            let [dt, decay, states, within, since, weights, dcb_one, xs, dys, dxs, buffers @ ..] = buffers;
            let [part, d_state, dc, d_ln, terms, rows, columns, state_rows, state_columns, _] = buffers;
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
                dc,
                d_ln,
                terms,
                rows,
                columns,
                state_rows,
                state_columns,
            };
            self.scan.steps(self.shared, self.sample, self.head, s.dt, s.decay);
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
                let live = chunk * CHUNK..chunk * CHUNK + self.scan.live(chunk);
                self.finish(chunk, &s, &mut dx[live.start * e..live.end * e], &mut ddt[live], sums);
            }
        });
    }

    /// Decays of a chunk and dt·x.
    fn load(&self, chunk: usize, s: &mut Buffers<'_>) {
        let times = chunk * CHUNK..(chunk + 1) * CHUNK;
        decays(&s.decay[times.clone()], s.within, s.since);
        self.scan.load(self.scan.xbc, self.scan.width(), [self.sample, self.head, chunk], &s.dt[times], s.xs);
    }

    /// The state after a chunk from that before it.
    fn scan_again(&self, chunk: usize, s: &mut Buffers<'_>) {
        let Dims { e, k, .. } = self.scan.dims;
        let wide = padded(e);
        self.load(chunk, s);
        scale_rows(s.xs, wide, &s.within[SQUARE - CHUNK..]);
        let (before, after) = s.states.split_at_mut(chunk * k * wide);
        let after = &mut after[..k * wide];
        if chunk > 0 {
            after.copy_from_slice(&before[(chunk - 1) * k * wide..]);
            scale_rows(after, k * wide, &s.since[CHUNK - 1..]);
        }
        pack(padded_rows(s.xs, e), CHUNK, s.rows);
        let b = self.scan.shared(self.shared, self.sample, chunk).b;
        product_transposed(b, CHUNK, s.rows, e, Sum { data: after, stride: wide, add: chunk > 0 });
    }

    /// What tokens of a chunk give to each other: d(dt·x) begins with it, d(ln a) too.
    fn within(&self, chunk: usize, s: &mut Buffers<'_>, dcb: &mut [f32]) {
        let Dims { h, e, .. } = self.scan.dims;
        let wide = padded(e);
        let cb = self.scan.shared(self.shared, self.sample, chunk).cb;
        self.load(chunk, s);
        self.scan.load(self.dy, h * e, [self.sample, self.head, chunk], &[1.0; CHUNK], s.dys);
        multiply(s.within, cb, s.weights);
        pack_transposed(padded_rows(s.xs, e), CHUNK, s.columns);
        product(padded_rows(s.dys, e), CHUNK, s.columns, CHUNK, Sum { data: s.dcb, stride: CHUNK, add: false });
        let (within, found, d_ln, columns) = (&*s.within, &mut *s.dcb, &mut *s.d_ln, &mut *s.terms);
        vectorised(
            #[inline(always)]
            || {
                for i in 0..SQUARE {
                    found[i] *= within[i];
                    dcb[i] += found[i];
                }
                // Pairs i ≥ t > j: the terms of each j, with those of one i more at every step.
                columns.fill(0.0);
                for t in (0..CHUNK).rev() {
                    for j in 0..CHUNK {
                        columns[j] = found[t * CHUNK + j].mul_add(cb[t * CHUNK + j], columns[j]);
                    }
                    d_ln[t] = sum_by(CHUNK, |j| if j < t { columns[j] } else { 0.0 });
                }
            },
        );
        pack(padded_rows(s.dys, e), CHUNK, s.rows);
        let weights = Rows { data: s.weights, stride: CHUNK, width: CHUNK };
        product_transposed(weights, CHUNK, s.rows, e, Sum { data: s.dxs, stride: wide, add: false });
    }

    /// What tokens of a chunk give to those after it, by way of the state.
    fn after(&self, chunk: usize, s: &mut Buffers<'_>, dbc: &mut [f32]) {
        let Dims { e, k, .. } = self.scan.dims;
        let (wide, wide_k) = (padded(e), padded(k));
        let b = self.scan.shared(self.shared, self.sample, chunk).b;
        let remains = &s.within[SQUARE - CHUNK..];
        let state = padded_rows(s.d_state, e);
        pack(state, k, s.state_rows);
        product(b, CHUNK, s.state_rows, e, Sum { data: s.part, stride: wide, add: false });
        scale_rows(s.part, wide, remains);
        let (xs, dxs, part, d_ln) = (&*s.xs, &mut *s.dxs, &mut *s.part, &mut *s.d_ln);
        vectorised(
            #[inline(always)]
            || {
                let mut given = 0.0;
                for t in 0..CHUNK {
                    let (x, part) = (&xs[t * wide..][..wide], &part[t * wide..][..wide]);
                    d_ln[t] += given;
                    given += sum_by(wide, |i| x[i] * part[i]);
                    let dxs = &mut dxs[t * wide..][..wide];
                    for i in 0..wide {
                        dxs[i] += part[i];
                    }
                }
                part.copy_from_slice(xs);
            },
        );
        scale_rows(s.part, wide, remains);
        pack_transposed(state, k, s.state_columns);
        let given = padded_rows(s.part, e);
        product(given, CHUNK, s.state_columns, k, Sum { data: dbc, stride: 2 * wide_k, add: true });
    }

    /// What tokens of a chunk take from those before it, by way of the state; turns the gradient of the state after
    /// the chunk into that of the state before it.
    fn before(&self, chunk: usize, s: &mut Buffers<'_>, dbc: &mut [f32]) {
        let Dims { e, k, .. } = self.scan.dims;
        let (wide, wide_k) = (padded(e), padded(k));
        let last = chunk + 1 == self.scan.chunks();
        let c = self.scan.shared(self.shared, self.sample, chunk).c;
        let state = &s.states[(chunk - 1) * k * wide..][..k * wide];
        s.part.copy_from_slice(s.dys);
        scale_rows(s.part, wide, s.since);
        let taken = padded_rows(s.part, e);
        pack_transposed(padded_rows(state, e), k, s.state_columns);
        product(taken, CHUNK, s.state_columns, k, Sum { data: s.dc, stride: wide_k, add: false });
        let (d_state, dc, d_ln, all) = (&mut *s.d_state, &*s.dc, &mut *s.d_ln, s.since[CHUNK - 1]);
        vectorised(
            #[inline(always)]
            || {
                // What runs through the whole chunk, and what is taken at t or later.
                let mut taken = if last { 0.0 } else { all * sum_by(state.len(), |i| state[i] * d_state[i]) };
                for t in (0..CHUNK).rev() {
                    let (c, dc) = (c.row(t), &dc[t * wide_k..][..k]);
                    taken += sum_by(k, |i| c[i] * dc[i]);
                    d_ln[t] += taken;
                    let sum = &mut dbc[t * 2 * wide_k + wide_k..][..k];
                    for i in 0..k {
                        sum[i] += dc[i];
                    }
                }
                if !last {
                    for d in d_state.iter_mut() {
                        *d *= all;
                    }
                }
            },
        );
        pack(taken, CHUNK, s.rows);
        product_transposed(c, CHUNK, s.rows, e, Sum { data: s.d_state, stride: wide, add: !last });
    }

    /// From d(dt·x) and d(ln a) to the gradients of what they are made of.
    fn finish(&self, chunk: usize, s: &Buffers<'_>, dx: &mut [f32], ddt: &mut [f32], sums: &mut [f64; 3]) {
        let Dims { h, e, .. } = self.scan.dims;
        let (rate, wide) = (self.scan.rate(self.head), padded(e));
        vectorised(
            #[inline(always)]
            || {
                for (t, (dx, ddt)) in dx.chunks_exact_mut(e).zip(ddt).enumerate() {
                    let time = chunk * CHUNK + t;
                    let (row, dt) = (self.scan.row(self.sample, time), s.dt[time]);
                    let x = &self.scan.xbc[row * self.scan.width() + self.head * e..][..e];
                    let dy = &self.dy[(row * h + self.head) * e..][..e];
                    let dxs = &s.dxs[t * wide..][..e];
                    for i in 0..e {
                        dx[i] = dxs[i].mul_add(dt, self.skip * dy[i]);
                    }
                    // The derivative of softplus is 1 − e^−softplus.
                    *ddt = -exp_m1(-dt) * s.d_ln[t].mul_add(rate, sum_by(e, |i| x[i] * dxs[i]));
                    sums[0] += f64::from(*ddt);
                    sums[1] += f64::from(s.d_ln[t] * rate * dt);
                    sums[2] += f64::from(sum_by(e, |i| x[i] * dy[i]));
                }
            },
        );
    }
}
