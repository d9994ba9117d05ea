//! wgmma against plain loops: every width, the other types, chains of products.

use super::Row;
use super::data::*;
use super::probes_sm90::e4m3;
use graft_kernels::emu::{Argument, Build, Case, Program};
use half::{bf16, f16};

pub const SOURCE: &str = "kernels-cu/probes/wgmma_sm90.cu";

pub fn rows() -> Vec<Row> {
    let all = |build| {
        [
            Row::new("wgmma every width", SOURCE, build, widths),
            Row::new("wgmma f16, e4m3", SOURCE, build, types),
            Row::new("wgmma chain", SOURCE, build, chain),
        ]
    };
    Build::ALL.into_iter().flat_map(all).collect()
}

/// As `wgmma_desc` of the headers, for addresses relative to the image.
pub fn descriptor(lead: u32, stride: u32, swizzle_code: u64) -> u64 {
    u64::from(lead >> 4) << 16 | u64::from(stride >> 4) << 32 | swizzle_code << 62
}

/// A K-major tile without swizzle: cores of 8 rows by 16 bytes, those of one column one after the other.
pub fn k_major(rows: usize, row_bytes: usize, at: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    let mut image = vec![0; rows * row_bytes];
    for r in 0..rows {
        for b in 0..row_bytes {
            image[b / 16 * rows * 16 + r * 16 + b % 16] = at(r, b);
        }
    }
    image
}

fn byte(v: u16, b: usize) -> u8 {
    v.to_le_bytes()[b % 2]
}

/// A tile of 16-bit numbers, K-major.
fn tile(rows: usize, k: usize, values: &[f32], bits: fn(f32) -> u16) -> Vec<u8> {
    k_major(rows, 2 * k, |r, b| byte(bits(values[r * k + b / 2]), b))
}

/// Element (m, n) of the product, from each thread's accumulators.
pub fn accumulator(out: &[f32], n: usize, m: usize, column: usize) -> f32 {
    let (warp, row) = (m / 16, m % 16);
    let lane = row % 8 * 4 + column % 8 / 2;
    out[(warp * 32 + lane) * (n / 2) + column / 8 * 4 + row / 8 * 2 + column % 2]
}

pub fn compare(out: &[f32], n: usize, want: impl Fn(usize, usize) -> f32) -> Result<(), String> {
    for m in 0..64 {
        for column in 0..n {
            let (got, want) = (accumulator(out, n, m, column), want(m, column));
            if got != want {
                return Err(format!("row {m} column {column} is {got}, not {want}"));
            }
        }
    }
    Ok(())
}

fn to_bf16(x: f32) -> u16 {
    bf16::from_f32(x).to_bits()
}

fn to_f16(x: f32) -> u16 {
    f16::from_f32(x).to_bits()
}

fn widths(p: &Program) -> Result<(), String> {
    let mut case = Case::default();
    let a = small_integers("wgmma a", 64 * 16, 9);
    let image_a = case.buffer(&tile(64, 16, &a, to_bf16));
    let chosen: Vec<usize> = if p.build == Build::Plain { (1..=32).map(|i| i * 8).collect() } else { vec![8, 72, 256] };
    let mut outputs = Vec::new();
    for n in &chosen {
        let b = small_integers(&format!("wgmma b {n}"), n * 16, 9);
        let image = tile(*n, 16, &b, to_bf16);
        let (image_b, out) = (case.buffer(&image), case.buffer(&vec![0; 128 * n / 2 * 4]));
        let args = [
            Argument::Pointer(image_a, 0),
            Argument::Pointer(image_b, 0),
            2048u32.into(),
            (image.len() as u32).into(),
            descriptor(64 * 16, 128, 0).into(),
            descriptor(*n as u32 * 16, 128, 0).into(),
            Argument::Pointer(out, 0),
            (*n as u32).into(),
        ];
        case.launch("wgmma_width", 1, 128, 65536, &args);
        outputs.push((*n, b, out));
    }
    let result = finished(case.run(p, 0, false)?)?;
    for (n, b, out) in outputs {
        let dot = |m: usize, c: usize| (0..16).map(|k| a[m * 16 + k] * b[c * 16 + k]).sum();
        compare(&to_floats(&result.buffers[out]), n, dot).map_err(|e| format!("N={n}: {e}"))?;
    }
    Ok(())
}

/// f16 with an MN-major B, and e4m3, with A from shared memory and from registers.
fn types(p: &Program) -> Result<(), String> {
    let n = 72;
    let (a, b) = (small_integers("types a", 64 * 16, 5), small_integers("types b", n * 16, 5));
    let image_a = tile(64, 16, &a, to_f16);
    // MN-major without swizzle: cores of 8 along K by 16 bytes along N, those of one K row group apart by N·16 bytes.
    let mut image_b = vec![0u8; n * 32];
    for column in 0..n {
        for k in 0..16 {
            let at = column / 8 * 128 + k / 8 * n * 16 + k % 8 * 16 + column % 8 * 2;
            image_b[at..at + 2].copy_from_slice(&to_f16(b[column * 16 + k]).to_le_bytes());
        }
    }
    let fragment = |t: usize, i: usize, e: usize| {
        let (m, k) = (t / 32 * 16 + t % 32 / 4 + i % 2 * 8, i / 2 * 8 + t % 4 * 2 + e);
        u32::from(to_f16(a[m * 16 + k]))
    };
    let registers: Vec<u32> = (0..512).map(|i| fragment(i / 4, i % 4, 0) | fragment(i / 4, i % 4, 1) << 16).collect();
    let desc_b = descriptor(n as u32 * 16, 128, 0);
    let dot = |m: usize, c: usize| (0..16).map(|k| a[m * 16 + k] * b[c * 16 + k]).sum();
    for kernel in ["wgmma_ss_f16", "wgmma_rs_f16"] {
        let out = images(p, kernel, &image_a, &image_b, &registers, descriptor(1024, 128, 0), desc_b, n)?;
        compare(&out, n, dot).map_err(|e| format!("{kernel}: {e}"))?;
    }
    let code = |name: &str, len: usize| -> Vec<u8> {
        random_bytes(name, len).iter().map(|b| [0x00, 0x38, 0xb8, 0x40, 0xc4, 0x30][usize::from(b % 6)]).collect()
    };
    let (a, b) = (code("e4m3 a", 64 * 32), code("e4m3 b", n * 32));
    let image_a = k_major(64, 32, |r, i| a[r * 32 + i]);
    let image_b = k_major(n, 32, |r, i| b[r * 32 + i]);
    let registers: Vec<u32> = (0..512)
        .map(|i| {
            let (t, i) = (i / 4, i % 4);
            let at = (t / 32 * 16 + t % 32 / 4 + i % 2 * 8) * 32 + i / 2 * 16 + t % 4 * 4;
            u32::from_le_bytes([a[at], a[at + 1], a[at + 2], a[at + 3]])
        })
        .collect();
    let dot = |m: usize, c: usize| (0..32).map(|k| e4m3(a[m * 32 + k]) * e4m3(b[c * 32 + k])).sum();
    for kernel in ["wgmma_ss_e4m3", "wgmma_rs_e4m3"] {
        let desc_b = descriptor(n as u32 * 16, 128, 0);
        let out = images(p, kernel, &image_a, &image_b, &registers, descriptor(1024, 128, 0), desc_b, n)?;
        compare(&out, n, dot).map_err(|e| format!("{kernel}: {e}"))?;
    }
    Ok(())
}

/// Runs a probe on images of shared memory; gives the accumulators.
pub fn images(
    p: &Program,
    kernel: &str,
    a: &[u8],
    b: &[u8],
    registers: &[u32],
    da: u64,
    db: u64,
    n: usize,
) -> Result<Vec<f32>, String> {
    let mut case = Case::default();
    add_images(&mut case, kernel, a, b, registers, da, db, n);
    Ok(to_floats(&finished(case.run(p, 0, false)?)?.buffers[3]))
}

/// Adds one such launch; its accumulators are the last of its four buffers.
pub fn add_images(case: &mut Case, kernel: &str, a: &[u8], b: &[u8], registers: &[u32], da: u64, db: u64, n: usize) {
    let buffers = [case.buffer(a), case.buffer(b), case.buffer(&words(registers)), case.buffer(&vec![0; 256 * n])];
    let [image_a, image_b, ra, out] = buffers.map(|x| Argument::Pointer(x, 0));
    let sizes = [a.len() as u32, b.len() as u32];
    let args = [image_a, image_b, ra, sizes[0].into(), sizes[1].into(), da.into(), db.into(), out];
    case.launch(kernel, 1, 128, 65536, &args);
}

fn chain(p: &Program) -> Result<(), String> {
    let (a, b) = (small_integers("chain a", 4 * 64 * 16, 5), small_integers("chain b", 4 * 72 * 16, 5));
    let image =
        |v: &[f32], rows: usize| -> Vec<u8> { v.chunks(rows * 16).flat_map(|t| tile(rows, 16, t, to_bf16)).collect() };
    let (image_a, image_b) = (image(&a, 64), image(&b, 72));
    for seed in seeds(p) {
        let mut case = Case::default();
        let buffers = [case.buffer(&image_a), case.buffer(&image_b), case.buffer(&vec![0; 128 * 36 * 4])];
        let [x, y, out] = buffers.map(|i| Argument::Pointer(i, 0));
        let sizes = [image_a.len() as u32, image_b.len() as u32];
        let (da, db) = (descriptor(1024, 128, 0), descriptor(72 * 16, 128, 0));
        let args = [x, y, sizes[0].into(), sizes[1].into(), da.into(), db.into(), out];
        case.launch("wgmma_chain", 1, 128, 65536, &args);
        let out = to_floats(&finished(case.run(p, seed, false)?)?.buffers[2]);
        let product = |i: usize, m: usize, c: usize, k: usize| a[(i * 64 + m) * 16 + k] * b[(i * 72 + c) * 16 + k];
        compare(&out, 72, |m, c| (0..64).map(|k| product(k / 16, m, c, k % 16)).sum())?;
    }
    Ok(())
}
