//! CPU path: strips of channels over threads, each a whole sequence; the long filter by sums over diagonals
//! where that is fewer steps, else by Fourier transforms.
//!
//! Samples of a strip go in groups of a fixed size, which share the preparation of the filter; the gradients of a
//! filter are added in the order of the groups. A first pass works on strips and keeps its results there, a second one
//! takes them to rows through what acts on rows: the gate q, or the transposed short filters.

use super::direct::{CHANNELS, Row};
use super::plan::{Plan, Strip, Work, ZEROS};
use super::spectrum::{Waves, accumulate, multiply};
use crate::gated_conv::strips::{gradient_rows, strip_gradients};
use crate::generated::long_conv::{Backward, Dims, Forward};
use crate::simd::{LANES, vectorised};
use rayon::prelude::*;
use std::cell::RefCell;

/// Samples of a group.
const GROUP: usize = 8;
/// Tokens that one thread takes at a time in the passes over rows.
const ROWS: usize = 64;
thread_local! {
    static WORK: RefCell<Work> = RefCell::default();
    /// Results of the strips, kept from call to call.
    static STAGE: RefCell<Vec<Row>> = const { RefCell::new(Vec::new()) };
}

fn gather(x: &[Row], channel: usize, wave: &mut [f32]) {
    let (front, rest) = wave.split_at_mut(x.len().min(wave.len()));
    front.iter_mut().zip(x).for_each(|(wave, x)| *wave = x.as_flattened()[channel]);
    rest.fill(0.0);
}

fn scatter(wave: &[f32], scale: f32, channel: usize, out: &mut [Row]) {
    out.iter_mut().zip(wave).for_each(|(out, wave)| out.as_flattened_mut()[channel] = scale * wave);
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let plan = Plan::new(a.dims, a.params, [a.short_weight, a.short_bias]);
    forward_by(&plan, a);
}

fn forward_by(plan: &Plan<'_>, a: Forward<'_, f32>) {
    let Dims { b, n, c, .. } = plan.dims;
    let mut stage = STAGE.take();
    stage.resize(plan.strips() * b * n, ZEROS);
    stage.par_chunks_mut(b * n).enumerate().for_each(|(index, out)| {
        let strip = plan.strip(index);
        out.par_chunks_mut(GROUP * n).enumerate().for_each(|(group, out)| {
            WORK.with_borrow_mut(|work| {
                plan.prepare(strip, a.filter, a.skip, work);
                for (i, out) in out.chunks_exact_mut(n).enumerate() {
                    mix(plan, strip, plan.sample(a.p, 3 * c, group * GROUP + i), work, out);
                }
            });
        });
    });
    a.y.par_chunks_mut(n * c).enumerate().for_each(|(sample, y)| {
        let p = plan.sample(a.p, 3 * c, sample);
        y.par_chunks_mut(ROWS * c).enumerate().for_each(|(block, y)| {
            vectorised(
                #[inline(always)]
                || {
                    for index in 0..plan.strips() {
                        let strip @ Strip { first, len, .. } = plan.strip(index);
                        let window = plan.window(strip);
                        let mixed = &stage[(index * b + sample) * n + block * ROWS..];
                        for (i, y) in y.chunks_exact_mut(c).enumerate() {
                            let y = &mut y[first..][..len];
                            plan.filters.short(&window, 0, p, block * ROWS + i, first, y);
                            y.iter_mut().zip(mixed[i].as_flattened()).for_each(|(y, mixed)| *y *= mixed);
                        }
                    }
                },
            );
        });
    });
    STAGE.set(stage);
}

/// The long filter's output of one strip of a sample `[N, 3, C]`.
fn mix(plan: &Plan<'_>, strip: Strip, p: &[f32], work: &mut Work, out: &mut [Row]) {
    let [u, v, ..] = &mut work.rows;
    vectorised(
        #[inline(always)]
        || {
            plan.load(strip, 1, p, u);
            plan.load(strip, 2, p, v);
            product(v, u);
        },
    );
    let Some(transform) = &plan.transform else {
        return (0..strip.vectors()).for_each(|v| work.ahead[v].apply(v, u, out, false));
    };
    let (bins, scale) = (transform.bins(), 1.0 / transform.len as f32);
    let Waves { wave, filters, input, product, scratch, .. } = &mut work.waves;
    for channel in 0..strip.len {
        gather(&u[..plan.dims.n], channel, wave);
        transform.forward(wave, input, scratch);
        multiply::<false>(input, &filters[channel * bins..][..bins], product);
        transform.inverse(product, wave, scratch);
        scatter(wave, scale, channel, out);
    }
}

/// `out *= by`.
#[inline(always)]
fn product(by: &[Row], out: &mut [Row]) {
    for (out, by) in out.as_flattened_mut().iter_mut().zip(by.as_flattened()) {
        for i in 0..LANES {
            out[i] *= by[i];
        }
    }
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let plan = Plan::new(a.dims, a.params, [a.short_weight, a.short_bias]);
    backward_by(&plan, a);
}

fn backward_by(plan: &Plan<'_>, a: Backward<'_, f32>) {
    let Dims { b, n, c, k, l } = plan.dims;
    let (strips, groups, rows) = (plan.strips(), b.div_ceil(GROUP), gradient_rows(&plan.call.window));
    let mut stage = STAGE.take();
    stage.resize(strips * b * 3 * n, ZEROS);
    let zeros = |len: usize| vec![ZEROS; len];
    let (mut dtaps, mut dshort) = (zeros(strips * groups * l), zeros(strips * groups * 3 * rows));
    let sums = dtaps.par_chunks_mut(groups * l).zip(dshort.par_chunks_mut(groups * 3 * rows));
    stage.par_chunks_mut(b * 3 * n).zip(sums).enumerate().for_each(|(index, (out, (dtaps, dshort)))| {
        let strip = plan.strip(index);
        let sums = dtaps.par_chunks_mut(l).zip(dshort.par_chunks_mut(3 * rows));
        out.par_chunks_mut(GROUP * 3 * n).zip(sums).enumerate().for_each(|(group, (out, (dtaps, dshort)))| {
            WORK.with_borrow_mut(|work| {
                plan.prepare(strip, a.filter, a.skip, work);
                for (i, out) in out.chunks_exact_mut(3 * n).enumerate() {
                    let sample = group * GROUP + i;
                    let (p, dy) = (plan.sample(a.p, 3 * c, sample), plan.sample(a.dy, c, sample));
                    backward_strip(plan, strip, p, dy, work, out, dtaps, dshort);
                }
                spectra_to_taps(plan, strip, work, dtaps);
            });
        });
    });
    if let Some(dp) = a.dp {
        dp.par_chunks_mut(n * 3 * c).enumerate().for_each(|(sample, dp)| {
            dp.par_chunks_mut(ROWS * 3 * c).enumerate().for_each(|(block, dp)| {
                vectorised(
                    #[inline(always)]
                    || to_rows(plan, &stage, sample, block * ROWS, dp),
                );
            });
        });
    }
    STAGE.set(stage);
    // Groups are added in their order.
    let total = |sums: &[Row], len: usize, index: usize, i: usize, channel: usize| {
        (0..groups).map(|group| sums[(index * groups + group) * len + i].as_flattened()[channel]).sum::<f32>()
    };
    let (mut dfilter, mut dskip) = (a.dfilter, a.dskip);
    let (mut dweight, mut dbias) = (a.dshort_weight, a.dshort_bias);
    for index in 0..strips {
        let strip = plan.strip(index);
        for (ch, channel) in (0..strip.len).map(|channel| (strip.first + channel, channel)) {
            if let Some(out) = &mut dfilter {
                (0..l).for_each(|i| out[ch * l + plan.tap(strip, i)] = total(&dtaps, l, index, i, channel));
            }
            if let Some(out) = &mut dskip {
                out[ch] = total(&dtaps, l, index, (-plan.lags(strip.backward).0) as usize, channel);
            }
            for part in 0..3 {
                let sum = |row: usize| total(&dshort, 3 * rows, index, part * rows + row, channel);
                if let Some(out) = &mut dweight {
                    let at = |j: usize| if strip.backward { k - 1 - j } else { j };
                    (0..k).for_each(|j| out[(part * c + ch) * k + j] = sum(at(j)));
                }
                if let Some(out) = &mut dbias {
                    out[part * c + ch] = sum(rows - 1);
                }
            }
        }
    }
}

/// Gradients of q, k and v of one strip of a sample to `out [3, N]`; adds those of the filters to `dtaps` (or to the
/// spectra that become it) and `dshort`.
fn backward_strip(
    plan: &Plan<'_>,
    strip: Strip,
    p: &[f32],
    dy: &[f32],
    work: &mut Work,
    out: &mut [Row],
    dtaps: &mut [Row],
    dshort: &mut [Row],
) {
    let (Dims { n, c, l, .. }, Strip { first, len, .. }) = (plan.dims, strip);
    let [key, value, u, d_mixed, mixed, du] = &mut work.rows;
    vectorised(
        #[inline(always)]
        || {
            plan.load(strip, 0, p, d_mixed);
            plan.load(strip, 1, p, key);
            plan.load(strip, 2, p, value);
            u.clone_from(key);
            product(value, u);
            for t in 0..n {
                let dy = &dy[t * c + first..][..len];
                d_mixed[t].as_flattened_mut()[..len].iter_mut().zip(dy).for_each(|(d, dy)| *d *= dy);
            }
        },
    );
    for rows in [&mut *mixed, &mut *du] {
        rows.resize(n, ZEROS);
    }
    match &plan.transform {
        None => {
            let (lowest, _) = plan.lags(strip.backward);
            for v in 0..strip.vectors() {
                work.ahead[v].apply(v, u, mixed, false);
                work.back[v].apply(v, d_mixed, du, false);
                work.lags.set([l, n], -lowest - (n as isize - 1), n, |i| u[n - 1 - i][v]);
                work.lags.apply(v, d_mixed, dtaps, true);
            }
        }
        Some(transform) => {
            let (bins, scale) = (transform.bins(), 1.0 / transform.len as f32);
            let Waves { wave, filters, sums, input, output, product, scratch } = &mut work.waves;
            for channel in 0..len {
                let filter = &filters[channel * bins..][..bins];
                gather(&u[..n], channel, wave);
                transform.forward(wave, input, scratch);
                gather(&d_mixed[..n], channel, wave);
                transform.forward(wave, output, scratch);
                accumulate(output, input, &mut sums[channel * bins..][..bins]);
                multiply::<false>(input, filter, product);
                transform.inverse(product, wave, scratch);
                scatter(wave, scale, channel, mixed);
                multiply::<true>(output, filter, product);
                transform.inverse(product, wave, scratch);
                scatter(wave, scale, channel, du);
            }
        }
    }
    vectorised(
        #[inline(always)]
        || {
            let (dq, rest) = out.split_at_mut(n);
            let (dk, dv) = rest.split_at_mut(n);
            for t in 0..n {
                dq[t] = mixed[t];
                (dk[t], dv[t]) = (du[t], du[t]);
                dq[t].as_flattened_mut()[..len].iter_mut().zip(&dy[t * c + first..]).for_each(|(d, dy)| *d *= dy);
            }
            product(value, dk);
            product(key, dv);
            if plan.call.short[0].is_some() {
                let window = plan.window(strip);
                for (part, dshort) in dshort.chunks_exact_mut(gradient_rows(&window)).enumerate() {
                    let d = |t: usize| &out[part * n + t].as_flattened()[..len];
                    let x = |t: usize| &p[(t * 3 + part) * c + first..][..len];
                    strip_gradients(
                        &window,
                        &(0..n),
                        d,
                        x,
                        dshort.as_flattened_mut().as_flattened_mut(),
                        CHANNELS,
                        (0, len),
                    );
                }
            }
        },
    );
}

/// Takes the sums of filter gradients from their spectra to `dtaps`, where there are any.
fn spectra_to_taps(plan: &Plan<'_>, strip: Strip, work: &mut Work, dtaps: &mut [Row]) {
    let Some(transform) = &plan.transform else { return };
    let scale = 1.0 / transform.len as f32;
    let Waves { wave, sums, scratch, .. } = &mut work.waves;
    for (channel, spectrum) in sums.chunks_exact_mut(transform.bins()).enumerate() {
        transform.inverse(spectrum, wave, scratch);
        plan.places(strip, transform).for_each(|(i, place)| dtaps[i].as_flattened_mut()[channel] = scale * wave[place]);
    }
}

/// Rows of dp from token `from` on, through the transposed short filters.
#[inline(always)]
fn to_rows(plan: &Plan<'_>, stage: &[Row], sample: usize, from: usize, dp: &mut [f32]) {
    let Dims { b, n, c, .. } = plan.dims;
    for index in 0..plan.strips() {
        let strip @ Strip { first, len, .. } = plan.strip(index);
        let window = plan.window(strip);
        let strip = &stage[(index * b + sample) * 3 * n..][..3 * n];
        for (i, rows) in dp.chunks_exact_mut(3 * c).enumerate() {
            for part in 0..3 {
                let d = |t: usize| &strip[part * n + t].as_flattened()[..len];
                let out = &mut rows[part * c + first..][..len];
                plan.filters.short_transposed(&window, part, d, from + i, first, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{reference, spectrum::Transform};
    use super::*;
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32};
    use crate::generated::long_conv::{CASES, INFO};

    /// Either way of convolving, on every case, whichever the sizes would choose.
    #[test]
    fn both_paths_agree_with_the_oracle() {
        for case in CASES.iter().filter(|case| case.tier == Tier::Tiny) {
            let (dims @ Dims { b, n, c, l, .. }, params) = (case.dims, case.params);
            let draw = |name: &str, len: usize| draw_f32(case.name, name, len, Fill::Normal);
            let (p, dy, skip) = (draw("p", b * n * 3 * c), draw("dy", b * n * c), draw("skip", c));
            let filter = draw_f32(case.name, "filter", c * l, Fill::Uniform(-0.3, 0.3));
            let (short_weight, short_bias) = (None, None);
            let run = |forward: &dyn Fn(Forward<'_, f32>), backward: &dyn Fn(Backward<'_, f32>)| {
                let nan = |len: usize| vec![f32::NAN; len];
                let (mut y, mut dp, mut df, mut ds) = (nan(dy.len()), nan(p.len()), nan(c * l), nan(c));
                let (p, filter, skip, dy) = (&p[..], &filter[..], &skip[..], &dy[..]);
                forward(Forward { dims, params, p, short_weight, short_bias, filter, skip, y: &mut y });
                backward(Backward {
                    dims,
                    params,
                    dy,
                    p,
                    short_weight,
                    short_bias,
                    filter,
                    skip,
                    dp: Some(&mut dp),
                    dshort_weight: None,
                    dshort_bias: None,
                    dfilter: Some(&mut df),
                    dskip: Some(&mut ds),
                });
                [y, dp, df, ds]
            };
            let want = run(&reference::forward, &reference::backward);
            let mut plan = Plan::new(dims, params, [None, None]);
            for transform in [None, Some(Transform::at_least(plan.circle()))] {
                plan.transform = transform;
                let got = run(&|a| forward_by(&plan, a), &|a| backward_by(&plan, a));
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let what = format!("{} tensor {i}, by transform {}", case.name, plan.transform.is_some());
                    assert_close(&what, got, want, INFO.tolerance.unwrap_or(Tolerance::F32));
                }
            }
        }
    }
}
