//! Operators of `kernels-cu` on the emulator, against their oracles on the same bf16 inputs.

use super::Row;
use super::data::*;
use graft_kernels::check::{Fill, Tolerance, compare, draw_f64};
use graft_kernels::generated::ln_modulate::{CASES, Dims, Forward, Params};
use graft_kernels::ln_modulate::reference;
use graft_tools::emu::{Argument, Build, Case, Outcome, Program};
use half::bf16;

const LN_MODULATE: &str = "kernels-cu/ln_modulate/ln_modulate.cu";

/// Blocks that a launch takes at most: fewer than the rows of the larger cases, so that blocks walk.
const BLOCKS: usize = 5;

pub fn rows() -> Vec<Row> {
    let tiny = CASES.iter().filter(|c| c.dims.b * c.dims.n * c.dims.d <= 1 << 20);
    let of_case = |case: &'static graft_kernels::Case<Dims, Params>| {
        Build::ALL.into_iter().map(move |build| {
            Row::new(format!("op ln_modulate/{} bf16 forward", case.name), LN_MODULATE, build, move |p| {
                // The checkers' builds are slow: one sample of the real model's shape is the plain build's.
                let seeds = if build == Build::Plain { 0..3 } else { 0..1 };
                seeds.into_iter().try_for_each(|seed| ln_modulate(p, case, seed))
            })
        })
    };
    let small = |case: &graft_kernels::Case<Dims, Params>, build| build == Build::Plain || case.dims.n < 100;
    let mut rows: Vec<Row> = Vec::new();
    for case in tiny {
        rows.extend(of_case(case).filter(|row| small(case, row.build)));
    }
    rows.push(Row::new("op ln_modulate sectors", LN_MODULATE, Build::Plain, sectors));
    rows
}

fn rounded(case: &str, name: &str, len: usize) -> Vec<bf16> {
    draw_f64(case, name, len, Fill::Normal).into_iter().map(bf16::from_f64).collect()
}

fn bytes(values: &[bf16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_bits().to_le_bytes()).collect()
}

/// Runs a case; gives y, mean and rstd with the outcome.
fn run(
    p: &Program,
    case: &graft_kernels::Case<Dims, Params>,
    seed: u64,
    count: bool,
) -> Result<(Outcome, [Vec<f32>; 3]), String> {
    let Dims { b, n, c, d } = case.dims;
    let (x, modulation) = (rounded(case.name, "x", b * n * d), rounded(case.name, "modulation", b * c * d));
    let mut launch = Case::default();
    let buffers = [
        launch.buffer(&bytes(&x)),
        launch.buffer(&bytes(&modulation)),
        // NaN, so that an element that is not written shows.
        launch.buffer(&vec![0xff; 2 * b * n * d]),
        launch.buffer(&vec![0xff; 4 * b * n]),
        launch.buffer(&vec![0xff; 4 * b * n]),
    ];
    let mut args: Vec<Argument> = buffers.map(|i| Argument::Pointer(i, 0)).to_vec();
    let sizes = [b * n, n, c, d, case.params.shift, case.params.scale];
    args.extend(sizes.map(|v| Argument::from(v as u32)));
    args.push(case.params.eps.into());
    let kernel = if d % 8 == 0 && d <= 1280 { "ln_modulate_forward_bf16" } else { "ln_modulate_forward_any_bf16" };
    let grid = (b * n).div_ceil(4).min(BLOCKS);
    launch.launch(kernel, grid as u32, 128, 0, &args);
    let outcome = finished(launch.run(p, seed, count)?)?;
    let y = outcome.buffers[2].chunks_exact(2).map(|v| bf16::from_le_bytes([v[0], v[1]]).to_f32()).collect();
    let (mean, rstd) = (to_floats(&outcome.buffers[3]), to_floats(&outcome.buffers[4]));
    Ok((outcome, [y, mean, rstd]))
}

fn ln_modulate(p: &Program, case: &graft_kernels::Case<Dims, Params>, seed: u64) -> Result<(), String> {
    let Dims { b, n, c, d } = case.dims;
    let wide = |v: Vec<bf16>| v.into_iter().map(f64::from).collect::<Vec<f64>>();
    let x = wide(rounded(case.name, "x", b * n * d));
    let modulation = wide(rounded(case.name, "modulation", b * c * d));
    let (mut y, mut mean, mut rstd) = (vec![0.0f64; b * n * d], vec![0.0; b * n], vec![0.0; b * n]);
    reference::forward(Forward {
        dims: case.dims,
        params: case.params,
        x: &x,
        modulation: &modulation,
        y: &mut y,
        mean: &mut mean,
        rstd: &mut rstd,
    });
    let (_, got) = run(p, case, seed, false)?;
    // y is rounded to bf16 once, after f32 arithmetic.
    let tolerances = [Tolerance::BF16, Tolerance::F32, Tolerance::F32];
    for (((name, got), want), tolerance) in ["y", "mean", "rstd"].iter().zip(&got).zip([y, mean, rstd]).zip(tolerances)
    {
        let want: Vec<f32> = want.iter().map(|v| *v as f32).collect();
        let result = compare(got, &want, tolerance);
        if !result.pass {
            return Err(format!("seed {seed}: {name}: {result:?}"));
        }
    }
    Ok(())
}

/// The kernel reads x once and writes y once: its counted sectors are those of the bound.
fn sectors(p: &Program) -> Result<(), String> {
    let Some(case) = CASES.iter().find(|c| c.name == "dit_xl_256") else { return Err("no such case".to_string()) };
    let (outcome, _) = run(p, case, 0, true)?;
    let of = |what: &str| -> u64 {
        let lines = outcome.counters.lines().filter(|l| l.split_whitespace().nth(2) == Some(what));
        let field = |l: &str| l.split("sectors=").nth(1)?.split(' ').next()?.parse::<u64>().ok();
        lines.filter_map(field).sum()
    };
    let elements = (case.dims.b * case.dims.n * case.dims.d) as u64;
    same(&[of("load"), of("store")], &[elements * 2 / 32; 2])
        .map_err(|e| format!("{e}; counted:\n{}", outcome.counters))
}
