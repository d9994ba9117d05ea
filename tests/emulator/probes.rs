//! Every sm_80 instruction on one tile, against plain loops.

use super::Row;
use super::data::*;
use graft_kernels::emu::{Argument, Build, Case, Program};
use half::{bf16, f16};

const SOURCE: &str = "kernels-cu/probes/probes.cu";

type Check = fn(&Program) -> Result<(), String>;

const PROBES: [(&str, Check); 12] = [
    ("warp", warp),
    ("ldmatrix", ldmatrix),
    ("mma 16-bit", mma_16bit),
    ("mma s8", mma_s8),
    ("cp.async", cp_async),
    ("numbers", numbers),
    ("special", special),
    ("memory", memory),
    ("barriers", barriers),
    ("atomics", atomics),
    ("flags", flags),
    ("counters", counters),
];

pub fn rows() -> Vec<Row> {
    let named = |(name, check): &(&str, Check), build| Row::new(format!("probe {name}"), SOURCE, build, *check);
    Build::ALL.iter().flat_map(|b| PROBES.iter().map(|p| named(p, *b))).collect()
}

fn warp(p: &Program) -> Result<(), String> {
    let v: Vec<u32> = (0..32).map(|i| (i * 37 + 11) % 101 + i % 2).collect();
    let out = to_words(&simple(p, "probe_warp", 32, 0, &words(&v), 2048)?);
    let mut want = Vec::new();
    for lane in 0..32usize {
        let first = lane / 8 * 8;
        let mask = |f: &dyn Fn(u32) -> bool| (0..32).filter(|l| f(v[*l as usize])).fold(0u32, |m, l| m | 1 << l);
        want.extend([
            v[5],
            v[if lane >= 3 { lane - 3 } else { lane }],
            v[if lane + 7 < 32 { lane + 7 } else { lane }],
            v[lane ^ 9],
            v[first + 5],
            v[if lane - first >= 3 { lane - 3 } else { lane }],
            v[if lane + 7 < first + 8 { lane + 7 } else { lane }],
            v[if lane ^ 9 < first + 8 { lane ^ 9 } else { lane }],
            mask(&|x| x & 1 == 1),
            1,
            1,
            mask(&|x| x % 4 == v[lane] % 4),
            v.iter().sum(),
            (*v.iter().min().unwrap()).wrapping_sub(500),
            *v.iter().max().unwrap(),
            if lane % 2 == 1 { v[lane ^ 2] } else { 0 },
        ]);
    }
    same(&out, &want)
}

fn ldmatrix(p: &Program) -> Result<(), String> {
    let h: Vec<u16> = (0..256).map(|i| i * 3 + 1).collect();
    let out = to_words(&simple(p, "probe_ldmatrix", 32, 0, &halves(&h), 32 * 15 * 4)?);
    let plain = |tile: usize, lane: usize, e: usize| h[(tile * 8 + lane / 4) * 8 + lane % 4 * 2 + e];
    let trans = |tile: usize, lane: usize, e: usize| h[(tile * 8 + lane % 4 * 2 + e) * 8 + lane / 4];
    let word = |f: &dyn Fn(usize, usize, usize) -> u16, tile, lane| {
        u32::from(f(tile, lane, 0)) | u32::from(f(tile, lane, 1)) << 16
    };
    let mut want = Vec::new();
    for lane in 0..32 {
        for f in [&plain as &dyn Fn(usize, usize, usize) -> u16, &trans] {
            for tiles in [1, 2, 4] {
                want.extend((0..tiles).map(|t| word(f, t, lane)));
            }
        }
        want.push(word(&trans, 0, lane));
    }
    same(&out, &want)
}

fn mma_16bit(p: &Program) -> Result<(), String> {
    for (kernel, k, is_f16) in [
        ("probe_mma_bf16_k16", 16, false),
        ("probe_mma_f16_k16", 16, true),
        ("probe_mma_bf16_k8", 8, false),
        ("probe_mma_f16_k8", 8, true),
    ] {
        let v = small_integers(kernel, 24 * k, 9);
        let bits = |x: &f32| if is_f16 { f16::from_f32(*x).to_bits() } else { bf16::from_f32(*x).to_bits() };
        let input: Vec<u16> = v.iter().map(bits).collect();
        let out = to_floats(&simple(p, kernel, 32, 0, &halves(&input), 512)?);
        let (a, b) = v.split_at(16 * k);
        let dot = |m: usize, n: usize| (0..k).map(|i| a[m * k + i] * b[n * k + i]).sum();
        let want: Vec<f32> = (0..128).map(|i| dot(i / 8, i % 8)).collect();
        same(&out, &want).map_err(|e| format!("{kernel}: {e}"))?;
    }
    Ok(())
}

fn mma_s8(p: &Program) -> Result<(), String> {
    let v = random_bytes("s8", 24 * 32);
    let out = to_words(&simple(p, "probe_mma_s8", 32, 0, &v, 512)?);
    let at = |i: usize| i32::from(v[i] as i8);
    let dot = |m: usize, n: usize| (0..32).map(|i| at(m * 32 + i) * at(512 + n * 32 + i)).sum::<i32>() as u32;
    same(&out, &(0..128).map(|i| dot(i / 8, i % 8)).collect::<Vec<u32>>())
}

fn cp_async(p: &Program) -> Result<(), String> {
    let v = random_bytes("cp_async", 896);
    let out = simple(p, "probe_cp_async", 32, 0, &v, 896)?;
    let mut want = vec![0; 896];
    for (start, size) in [(0, 16), (512, 8), (768, 4)] {
        for lane in 0..32 {
            let (at, n) = (start + lane * size, lane % (size + 1));
            want[at..at + n].copy_from_slice(&v[at..at + n]);
        }
    }
    same(&out, &want)
}

fn numbers(p: &Program) -> Result<(), String> {
    let mut v = random_floats("numbers", 64, 3.0);
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 65519.0, 65520.0, 1e-7, 6e-8, 2.9e-8, 3.1e-5, 1e30];
    v[..special.len()].copy_from_slice(&special);
    (v[20], v[21]) = (1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0); // halfway between two bf16: to even, down and up
    (v[22], v[23]) = (1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0); // the same for f16
    let out = to_words(&simple(p, "probe_numbers", 32, 0, &floats(&v), 768)?);
    let pair = |f: &dyn Fn(f32) -> u16, i: usize| u32::from(f(v[2 * i])) | u32::from(f(v[2 * i + 1])) << 16;
    let to_bf16 = |x: f32| bf16::from_f32(x).to_bits();
    let to_f16 = |x: f32| f16::from_f32(x).to_bits();
    let mut want: Vec<u32> = (0..32).map(|i| pair(&to_bf16, i)).collect();
    want.extend((0..32).map(|i| pair(&to_f16, i)));
    want.extend((0..32).map(|i| bf16::from_f32(v[2 * i]).to_f32().to_bits()));
    want.extend((0..32).map(|i| f16::from_f32(v[2 * i + 1]).to_f32().to_bits()));
    want.extend((0..32).map(|i| u32::from(to_bf16(v[2 * i + 1]))));
    want.extend((0..32).map(|i| u32::from(to_f16(v[2 * i]))));
    same(&out, &want)
}

fn special(p: &Program) -> Result<(), String> {
    let v: Vec<f32> = (0..32).map(|i| 0.1 + i as f32 * 0.06).collect();
    let out = to_floats(&simple(p, "probe_special", 32, 0, &floats(&v), 640)?);
    let functions: [fn(f64) -> f64; 5] = [f64::exp2, f64::log2, f64::recip, |x| x.sqrt().recip(), f64::tanh];
    let want: Vec<f64> = functions.iter().flat_map(|f| v.iter().map(move |x| f(f64::from(*x)))).collect();
    // tanh.approx is good to 2^-11, the others to 2^-22.
    close(&out[..128], &want[..128], 1e-5)?;
    close(&out[128..], &want[128..], 1e-3)
}

fn memory(p: &Program) -> Result<(), String> {
    let v = random_bytes("memory", 1024);
    let out = simple(p, "probe_memory", 64, 1024, &v, 3200)?;
    let reversed = |size: usize| (0..64).rev().flat_map(|i| v[i * size..(i + 1) * size].to_vec()).collect::<Vec<u8>>();
    let mut want = reversed(16);
    want.extend(reversed(8));
    want.extend(reversed(4));
    want.extend(floats(&(0..64).rev().map(|i| i as f32).collect::<Vec<f32>>()));
    want.extend(reversed(2));
    want.extend(reversed(16));
    same(&out, &want)
}

fn barriers(p: &Program) -> Result<(), String> {
    let v: Vec<u32> = (0..32).map(|i| i * 5).collect();
    let out = to_words(&simple(p, "probe_barriers", 96, 0, &words(&v), 259 * 4)?);
    let mut want = Vec::new();
    for round in 0..4 {
        for _ in 0..2 {
            want.extend((0..32).map(|i| v[31 - i] + round));
        }
    }
    want.extend([48, 0, 1]);
    same(&out, &want)
}

fn atomics(p: &Program) -> Result<(), String> {
    let mut case = Case::default();
    let o = case.buffer(&[0; 32]);
    case.launch("probe_atomics", 8, 64, 0, &[Argument::Pointer(o, 0)]);
    let out = to_words(&finished(case.run(p, 2, false)?)?.buffers[0]);
    same(&out[..6], &[512, 511, 128, 256.0f32.to_bits(), 128.0f32.to_bits(), 1])
}

fn flags(p: &Program) -> Result<(), String> {
    let v: Vec<u32> = (0..32).map(|i| i + 7).collect();
    for seed in seeds(p) {
        let mut case = Case::default();
        let buffers = [case.buffer(&words(&v)), case.buffer(&[0; 128]), case.buffer(&[0; 4])];
        let args = buffers.map(|b| Argument::Pointer(b, 0));
        case.launch_shaped("probe_flags", [4, 1, 1], [32, 1, 1], 1, 0, 4, &args);
        let out = to_words(&finished(case.run(p, seed, false)?)?.buffers[1]);
        let want: Vec<u32> = v.iter().map(|x| ((x * 3 + 1) * 3 + 2) * 3 + 3).collect();
        same(&out, &want)?;
    }
    Ok(())
}

/// Bank conflicts and sectors of accesses whose cost is known.
fn counters(p: &Program) -> Result<(), String> {
    let mut case = Case::default();
    let (i, o) = (case.buffer(&[1; 1024]), case.buffer(&[0; 3200]));
    case.launch("probe_memory", 1, 64, 1024, &[Argument::Pointer(i, 0), Argument::Pointer(o, 0)]);
    let text = finished(case.run(p, 0, true)?)?.counters;
    let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("probe_memory probes.cu:")).collect();
    // Two warps; a warp's 16-byte accesses are 4 cycles and 16 sectors, its 4-byte ones 1 and 4, without conflicts.
    let wide = "shared-load requests=2 cycles=8 conflicts=0 sectors=0 rows=0 bytes=1024";
    let narrow = "store requests=2 cycles=0 conflicts=0 sectors=8 rows=0 bytes=256";
    let from_global = "load requests=2 cycles=0 conflicts=0 sectors=32 rows=0 bytes=1024";
    for want in [wide, narrow, from_global] {
        if !lines.iter().any(|l| l.ends_with(want)) {
            return Err(format!("no line ends in `{want}`:\n{text}"));
        }
    }
    Ok(())
}
