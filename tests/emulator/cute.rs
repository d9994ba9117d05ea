//! Fragments, descriptors and swizzles against tables that CuTe generated on the host (`tests/golden/cute`).
//!
//! `frag NAME T V ROWS` gives, for each of T threads and V values, the element of a matrix of ROWS rows (column-major
//! index). `smem NAME MN MAJOR LBO SBO OFFSET TYPE` gives where each element (mn, k) of an MN × 64 tile of 16-bit
//! numbers lies in bytes, and the fields of the descriptor of its k-slice from 16 on.

use super::Row;
use super::data::*;
use super::probes_sm90::SWIZZLE_OF_TYPE;
use super::wgmma::{self, add_images};
use graft_kernels::emu::{Argument, Build, Case, Program};
use graft_tools::codegen::workspace_root;
use half::bf16;
use std::collections::BTreeMap;

/// One layout of a tile.
struct Layout {
    name: String,
    mn: usize,
    mn_major: u32,
    lead: u32,
    stride: u32,
    offset: u32,
    swizzle: u64,
    at: Vec<usize>,
}

struct Tables {
    fragments: BTreeMap<String, Vec<usize>>,
    layouts: Vec<Layout>,
}

fn tables() -> Result<Tables, String> {
    let path = workspace_root().join("tests/golden/cute/tables.txt");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut tables = Tables { fragments: BTreeMap::new(), layouts: Vec::new() };
    let mut lines = text.lines();
    while let (Some(head), Some(values)) = (lines.next(), lines.next()) {
        let at: Vec<usize> =
            values.split_whitespace().map(|v| v.parse().map_err(|e| format!("{v}: {e}"))).collect::<Result<_, _>>()?;
        let words: Vec<&str> = head.split_whitespace().collect();
        let number = |i: usize| words[i].parse::<usize>().map_err(|e| format!("{head}: {e}"));
        if words[0] == "frag" {
            tables.fragments.insert(words[1].to_string(), at);
        } else {
            tables.layouts.push(Layout {
                name: words[1].to_string(),
                mn: number(2)?,
                mn_major: number(3)? as u32,
                lead: number(4)? as u32,
                stride: number(5)? as u32,
                offset: number(6)? as u32,
                swizzle: number(7)? as u64,
                at,
            });
        }
    }
    Ok(tables)
}

pub fn rows() -> Vec<Row> {
    vec![
        Row::new("cute mma fragments, 1 check", "kernels-cu/probes/probes.cu", Build::Plain, fragments),
        Row::new("cute wgmma N=64, 72 checks", wgmma::SOURCE, Build::Plain, |p| products(p, 64, 72)),
        Row::new("cute wgmma N=128, 72 checks", wgmma::SOURCE, Build::Plain, |p| products(p, 128, 72)),
        Row::new("cute boxes, 3 checks", "kernels-cu/probes/probes_sm90.cu", Build::Plain, boxes),
    ]
}

fn value(i: usize) -> f32 {
    ((i * 7919 + 13) % 31) as f32 - 15.0
}

fn bits(v: f32) -> u16 {
    bf16::from_f32(v).to_bits()
}

/// The probe loads its fragments by the rule of the headers; CuTe's rule must be the same one.
fn fragments(p: &Program) -> Result<(), String> {
    let t = tables()?;
    let (a, b) = (|m: usize, k: usize| value(m + 16 * k), |n: usize, k: usize| value(1000 + n + 8 * k));
    let mut input: Vec<u16> = (0..256).map(|i| bits(a(i / 16, i % 16))).collect();
    input.extend((0..128).map(|i| bits(b(i / 16, i % 16))));
    let out = to_floats(&simple(p, "probe_mma_bf16_k16", 32, 0, &halves(&input), 512)?);
    for m in 0..16 {
        for n in 0..8 {
            same(&[out[m * 8 + n]], &[(0..16).map(|k| a(m, k) * b(n, k)).sum()])?;
        }
    }
    // Registers of lane 4g + t as the headers state them, as element indices.
    let rule = |lane: usize, v: usize| (lane / 4 + v / 2 % 2 * 8) + 16 * (lane % 4 * 2 + v % 2 + v / 4 * 8);
    same(&t.fragments["mma_a"], &(0..256).map(|i| rule(i / 8, i % 8)).collect::<Vec<usize>>())?;
    let rule = |lane: usize, v: usize| lane / 4 + 8 * (lane % 4 * 2 + v % 2 + v / 2 * 8);
    same(&t.fragments["mma_b"], &(0..128).map(|i| rule(i / 4, i % 4)).collect::<Vec<usize>>())?;
    let rule = |lane: usize, v: usize| (lane / 4 + v / 2 * 8) + 16 * (lane % 4 * 2 + v % 2);
    same(&t.fragments["mma_c"], &(0..128).map(|i| rule(i / 4, i % 4)).collect::<Vec<usize>>())
}

/// B in every layout of width `n`, A in every layout and in registers.
fn products(p: &Program, n: usize, checks: usize) -> Result<(), String> {
    let t = tables()?;
    let a = |m: usize, k: usize| value(m * 64 + k);
    let b = |j: usize, k: usize| value(5000 + j * 64 + k);
    let image = |l: &Layout, f: &dyn Fn(usize, usize) -> f32| {
        let mut bytes = vec![0; l.mn * 128];
        for (i, at) in l.at.iter().enumerate() {
            bytes[*at..at + 2].copy_from_slice(&bits(f(i / 64, i % 64)).to_le_bytes());
        }
        bytes
    };
    let desc = |l: &Layout| wgmma::descriptor(l.lead, l.stride, l.swizzle) | u64::from(l.offset >> 4);
    let of_a = &t.fragments["wgmma_a16"];
    let element = |i: usize| u32::from(bits(a(of_a[i] % 64, 16 + of_a[i] / 64)));
    let registers: Vec<u32> = (0..512).map(|i| element(2 * i) | element(2 * i + 1) << 16).collect();
    let mut case = Case::default();
    let mut names = Vec::new();
    for y in t.layouts.iter().filter(|l| l.mn == n) {
        let image_b = image(y, &b);
        let kernel = format!("wgmma_rs_{n}_{}", y.mn_major);
        add_images(&mut case, &kernel, &[0; 16], &image_b, &registers, 0, desc(y), n);
        names.push(format!("A registers, B {}", y.name));
        for x in t.layouts.iter().filter(|l| l.mn == 64) {
            let kernel = format!("wgmma_ss_{n}_{}{}", x.mn_major, y.mn_major);
            add_images(&mut case, &kernel, &image(x, &a), &image_b, &[0; 4], desc(x), desc(y), n);
            names.push(format!("A {}, B {}", x.name, y.name));
        }
    }
    if names.len() != checks {
        return Err(format!("{} checks, not {checks}", names.len()));
    }
    let result = finished(case.run(p, 0, false)?)?;
    let of_c = &t.fragments[&format!("wgmma_c{n}")];
    for (i, name) in names.iter().enumerate() {
        let out = to_floats(&result.buffers[4 * i + 3]);
        let want: Vec<f32> = of_c.iter().map(|c| (16..32).map(|k| a(c % 64, k) * b(c / 64, k)).sum()).collect();
        same(&out, &want).map_err(|e| format!("{name}: {e}"))?;
    }
    Ok(())
}

/// A box with a swizzle lies as CuTe's K-major layout of that swizzle, within one atom column.
fn boxes(p: &Program) -> Result<(), String> {
    let t = tables()?;
    let mut checked = 0;
    for l in t.layouts.iter().filter(|l| l.mn == 64 && l.mn_major == 0 && l.swizzle != 0) {
        let swizzle = SWIZZLE_OF_TYPE[l.swizzle as usize];
        let columns = [0, 16, 32, 64][swizzle as usize];
        let tensor: Vec<u16> = (0..4096).collect();
        let map = Argument::Map {
            element: 1,
            swizzle,
            buffer: (0, 0),
            dims: vec![64, 64],
            strides: vec![128],
            block: vec![columns as u32, 64],
        };
        let mut case = Case::default();
        let bytes = 128 * columns;
        let (_, o) = (case.buffer(&halves(&tensor)), case.buffer(&vec![0; bytes]));
        let zero = || Argument::from(0u32);
        let args = [map, zero(), zero(), (bytes as u32).into(), Argument::Pointer(o, 0)];
        case.launch("probe_tma_2d", 1, 32, bytes as u32, &args);
        let out = finished(case.run(p, 0, false)?)?.buffers.swap_remove(o);
        for row in 0..64 {
            for k in 0..columns {
                let at = l.at[row * 64 + k];
                let got = u16::from_le_bytes([out[at], out[at + 1]]);
                same(&[got], &[tensor[row * 64 + k]]).map_err(|e| format!("{}: {e}", l.name))?;
            }
        }
        checked += 1;
    }
    if checked == 3 { Ok(()) } else { Err(format!("{checked} checks, not 3")) }
}
