//! Every Hopper instruction but wgmma on one tile, against plain loops.

use super::Row;
use super::data::*;
use graft_kernels::emu::{Argument, Build, Case, Program};
use half::bf16;

const SOURCE: &str = "kernels-cu/probes/probes_sm90.cu";

/// The driver's number of a swizzle, by the code of a wgmma descriptor.
pub const SWIZZLE_OF_TYPE: [u32; 4] = [0, 3, 2, 1];

type Check = fn(&Program) -> Result<(), String>;

const PROBES: [(&str, Check); 12] = [
    ("stmatrix", stmatrix),
    ("mma e4m3", mma_e4m3),
    ("numbers e4m3", e4m3_numbers),
    ("mbarrier", mbarrier),
    ("cp.async arrive", cp_async_arrive),
    ("bulk", bulk),
    ("tma load", tma_load),
    ("tma swizzles", tma_swizzles),
    ("tma store and reduce", tma_store),
    ("cluster", cluster),
    ("registers and election", registers),
    ("dependent grids", dependent_grids),
];

pub fn rows() -> Vec<Row> {
    let named = |(name, check): &(&str, Check), build| Row::new(format!("probe {name}"), SOURCE, build, *check);
    Build::ALL.iter().flat_map(|b| PROBES.iter().map(|p| named(p, *b))).collect()
}

/// The value of an e4m3 code.
pub fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

fn stmatrix(p: &Program) -> Result<(), String> {
    let v: Vec<u16> = (0..256).map(|i| i * 7 + 3).collect();
    let out = simple(p, "probe_stmatrix", 32, 1664, &halves(&v), 1664)?;
    // Lane l holds words 4l to 4l + 3, each two halves: element (row, column) of tile t.
    let held = |t: usize, row: usize, column: usize| v[(row * 4 + column / 2) * 8 + t * 2 + column % 2];
    let mut want = Vec::new();
    for (tiles, transposed) in [(1, false), (2, false), (4, false), (2, true), (4, true)] {
        for row in 0..tiles * 8 {
            for column in 0..8 {
                let (t, r) = (row / 8, row % 8);
                want.push(if transposed { held(t, column, r) } else { held(t, r, column) });
            }
        }
    }
    same(&out, &halves(&want))
}

fn mma_e4m3(p: &Program) -> Result<(), String> {
    // Codes of small whole numbers and halves: products and sums are exact.
    let codes: Vec<u8> = random_bytes("e4m3", 24 * 32)
        .iter()
        .map(|b| [0x00, 0x38, 0xb8, 0x40, 0xc4, 0x30][usize::from(b % 6)])
        .collect();
    let out = to_floats(&simple(p, "probe_mma_e4m3", 32, 0, &codes, 512)?);
    let dot = |m: usize, n: usize| (0..32).map(|i| e4m3(codes[m * 32 + i]) * e4m3(codes[512 + n * 32 + i])).sum();
    same(&out, &(0..128).map(|i| dot(i / 8, i % 8)).collect::<Vec<f32>>())
}

fn e4m3_numbers(p: &Program) -> Result<(), String> {
    let mut v = random_floats("e4m3 numbers", 64, 40.0);
    v[..10].copy_from_slice(&[0.0, -0.0, 447.0, 449.0, -1e9, 0.001, 0.0009765625, 0.0029296875, 17.0, 19.0]);
    let out = simple(p, "probe_e4m3", 32, 0, &floats(&v), 64)?;
    // The nearest code, the even one of two; beyond the largest it saturates.
    let nearest = |x: f32| {
        let codes = (0..0x7fu8).min_by(|a, b| {
            let far = |c: u8| (f64::from(e4m3(c)) - f64::from(x.abs())).abs();
            far(*a).total_cmp(&far(*b)).then((a & 1).cmp(&(b & 1)))
        });
        codes.unwrap() | if x.is_sign_negative() { 0x80 } else { 0 }
    };
    same(&out, &v.iter().map(|x| nearest(*x)).collect::<Vec<u8>>())
}

fn mbarrier(p: &Program) -> Result<(), String> {
    let v: Vec<u32> = (0..32).map(|i| i * 11).collect();
    let out = to_words(&simple(p, "probe_mbarrier", 64, 0, &words(&v), 7 * 128)?);
    let want: Vec<u32> = (0..7).flat_map(|round| v.iter().rev().map(move |x| x + round)).collect();
    same(&out, &want)
}

fn cp_async_arrive(p: &Program) -> Result<(), String> {
    let v = random_bytes("arrive", 512);
    let out = simple(p, "probe_cp_async_arrive", 64, 0, &v, 512)?;
    same(&out, &v.chunks(16).rev().flatten().copied().collect::<Vec<u8>>())
}

fn bulk(p: &Program) -> Result<(), String> {
    let (v, sums) = (small_integers("bulk", 256, 50), small_integers("sums", 256, 50));
    let mut case = Case::default();
    let args = [case.buffer(&floats(&v)), case.buffer(&[0; 1024]), case.buffer(&floats(&sums))];
    case.launch("probe_bulk", 1, 32, 1024, &args.map(|b| Argument::Pointer(b, 0)));
    let out = finished(case.run(p, 0, false)?)?;
    same(&to_floats(&out.buffers[1]), &v.iter().map(|x| 2.0 * x).collect::<Vec<f32>>())?;
    let want: Vec<f32> = v.iter().zip(&sums).map(|(x, s)| 2.0 * x + s).collect();
    same(&to_floats(&out.buffers[2]), &want)
}

/// Runs a box load of 2-byte elements; gives shared memory as it lies.
fn load(p: &Program, map: Argument, tensor: &[u8], coordinates: &[i32], bytes: usize) -> Result<Vec<u8>, String> {
    let mut case = Case::default();
    let (_, o) = (case.buffer(tensor), case.buffer(&vec![0xcc; bytes]));
    let mut args = vec![map];
    args.extend(coordinates.iter().map(|c| Argument::from(*c as u32)));
    args.extend([Argument::from(bytes as u32), Argument::Pointer(o, 0)]);
    case.launch(&format!("probe_tma_{}d", coordinates.len()), 1, 32, bytes as u32, &args);
    Ok(finished(case.run(p, 0, false)?)?.buffers.swap_remove(1))
}

/// Boxes of 1 to 5 dimensions, partly outside the tensor on both sides.
fn tma_load(p: &Program) -> Result<(), String> {
    let dims = [24u64, 5, 3, 4, 2];
    let block = [16u32, 3, 2, 3, 2];
    let corner = [-8i32, 3, -1, 2, 1];
    for rank in 1..=5 {
        let n = dims[..rank].iter().product::<u64>() as usize;
        let tensor: Vec<u16> = (0..n).map(|i| i as u16 + 1).collect();
        let strides: Vec<u64> = (1..rank).map(|d| 2 * dims[..d].iter().product::<u64>()).collect();
        let map = Argument::Map {
            element: 1,
            swizzle: 0,
            buffer: (0, 0),
            dims: dims[..rank].to_vec(),
            strides,
            block: block[..rank].to_vec(),
        };
        let elements = block[..rank].iter().product::<u32>() as usize;
        let out = load(p, map, &halves(&tensor), &corner[..rank], 2 * elements)?;
        let mut want = Vec::new();
        for e in 0..elements {
            let (mut rest, mut index, mut inside) = (e, 0i64, true);
            let mut step = 1i64;
            for d in 0..rank {
                let x = i64::from(corner[d]) + (rest % block[d] as usize) as i64;
                rest /= block[d] as usize;
                inside &= x >= 0 && x < dims[d] as i64;
                index += x * step;
                step *= dims[d] as i64;
            }
            want.push(if inside { tensor[index as usize] } else { 0 });
        }
        same(&out, &halves(&want)).map_err(|e| format!("rank {rank}: {e}"))?;
    }
    Ok(())
}

/// Where byte `b` of a box lies with a swizzle.
fn swizzled(b: usize, swizzle: u32) -> usize {
    let rows = [0, 1, 3, 7][swizzle as usize];
    b ^ (b >> 7 & rows) << 4
}

fn tma_swizzles(p: &Program) -> Result<(), String> {
    for swizzle in 0..4u32 {
        // Rows as wide as the swizzle, 12 of them, 4 past the end of the tensor.
        let width = [32, 16, 32, 64][swizzle as usize];
        let tensor: Vec<u16> = (0..width * 40).map(|i| i as u16 ^ 0x5a5a).collect();
        let map = Argument::Map {
            element: 9,
            swizzle,
            buffer: (0, 0),
            dims: vec![width as u64, 40],
            strides: vec![2 * width as u64],
            block: vec![width as u32, 12],
        };
        let out = load(p, map, &halves(&tensor), &[0, 32], 24 * width)?;
        let mut want = vec![0u8; 24 * width];
        for (i, byte) in halves(&tensor[32 * width..]).into_iter().enumerate() {
            want[swizzled(i, swizzle)] = byte;
        }
        same(&out, &want).map_err(|e| format!("swizzle {swizzle}: {e}"))?;
    }
    Ok(())
}

fn tma_store(p: &Program) -> Result<(), String> {
    // A box of 32 × 4 over a tensor of 40 × 6 floats, hanging over the right and the lower edge.
    for add in 0..2u32 {
        let (v, before) = (small_integers("store", 128, 99), small_integers("before", 240, 99));
        let mut case = Case::default();
        let (i, t) = (case.buffer(&floats(&v)), case.buffer(&floats(&before)));
        let map = Argument::Map {
            element: 7,
            swizzle: 3,
            buffer: (t, 0),
            dims: vec![40, 6],
            strides: vec![160],
            block: vec![32, 4],
        };
        let (x, y) = (16u32, 4u32);
        let args =
            [map, Argument::from(x), Argument::from(y), Argument::from(512u32), add.into(), Argument::Pointer(i, 0)];
        case.launch("probe_tma_store", 1, 32, 512, &args);
        let out = to_floats(&finished(case.run(p, 0, false)?)?.buffers[t]);
        let mut want = before.clone();
        for row in 0..2 {
            for column in 0..24 {
                let at = &mut want[(row + 4) * 40 + column + 16];
                let stored = v[swizzled((row * 32 + column) * 4, 3) / 4];
                *at = if add == 1 { *at + stored } else { stored };
            }
        }
        same(&out, &want).map_err(|e| format!("add {add}: {e}"))?;
    }
    // bf16 sums round to bf16.
    let mut case = Case::default();
    let ones = vec![bf16::from_f32(1.0).to_bits(); 64];
    let (i, t) = (case.buffer(&halves(&ones)), case.buffer(&halves(&[bf16::from_f32(256.0).to_bits(); 64])));
    let (dims, block) = (vec![64, 1], vec![64, 1]);
    let map = Argument::Map { element: 9, swizzle: 0, buffer: (t, 0), dims, strides: vec![128], block };
    let zero = || Argument::from(0u32);
    case.launch(
        "probe_tma_store",
        1,
        32,
        128,
        &[map, zero(), zero(), 128u32.into(), 1u32.into(), Argument::Pointer(i, 0)],
    );
    let out = &finished(case.run(p, 0, false)?)?.buffers[t];
    same(out, &halves(&[bf16::from_f32(256.0).to_bits(); 64]))
}

fn cluster(p: &Program) -> Result<(), String> {
    let v: Vec<u32> = (0..256).map(|i| (i as f32 + 1.0).to_bits()).collect();
    for seed in seeds(p) {
        let mut case = Case::default();
        let (i, o) = (case.buffer(&words(&v)), case.buffer(&vec![0; 8 * 2048]));
        let (dims, block) = (vec![16, 16], vec![16, 16]);
        let map = Argument::Map { element: 2, swizzle: 0, buffer: (i, 0), dims, strides: vec![64], block };
        let args = [map, Argument::Pointer(i, 0), Argument::Pointer(o, 0)];
        case.launch_shaped("probe_cluster", [8, 1, 1], [32, 1, 1], 4, 4096, 0, &args);
        let out = to_words(&finished(case.run(p, seed, false)?)?.buffers[o]);
        for b in 0..8u32 {
            let (rank, next, before) = (b % 4, (b + 1) % 4, (b + 3) % 4);
            let got = &out[b as usize * 512..][..512];
            let own = |r: u32| v[..32].iter().map(move |x| x.wrapping_add(r * 1000));
            let mut want: Vec<u32> = own(next).collect();
            want.extend(own(before));
            want.extend((0..32).map(|l| l * 7 + before));
            want.extend(own(before));
            want.extend(&v);
            want.extend(&v[..64]);
            want.extend((0..32).map(|l| ((l + next) as f32).to_bits()));
            want.extend([400 + rank; 32]);
            same(got, &want).map_err(|e| format!("seed {seed}, block {b}: {e}"))?;
        }
    }
    Ok(())
}

fn registers(p: &Program) -> Result<(), String> {
    for seed in seeds(p) {
        let mut case = Case::default();
        let o = case.buffer(&[0; 48]);
        case.launch("probe_registers", 1, 384, 0, &[Argument::Pointer(o, 0)]);
        let out = to_words(&finished(case.run(p, seed, false)?)?.buffers[0]);
        same(&out, &[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2])?;
    }
    Ok(())
}

fn dependent_grids(p: &Program) -> Result<(), String> {
    let v: Vec<u32> = (0..128).map(|i| i * i).collect();
    for seed in seeds(p) {
        let mut case = Case::default();
        let [i, m, o] = [case.buffer(&words(&v)), case.buffer(&[0; 512]), case.buffer(&[0; 512])];
        let pair = |a, b| [Argument::Pointer(a, 0), Argument::Pointer(b, 0)];
        case.launch_shaped("probe_grid_first", [4, 1, 1], [32, 1, 1], 1, 0, 2, &pair(i, m));
        case.launch_shaped("probe_grid_second", [4, 1, 1], [32, 1, 1], 1, 0, 1, &pair(m, o));
        let out = to_words(&finished(case.run(p, seed, false)?)?.buffers[2]);
        same(&out, &(0..128).map(|n| v[127 - n] * 3 + 1).collect::<Vec<u32>>())?;
    }
    Ok(())
}
