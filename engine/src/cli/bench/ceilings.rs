//! What the device can do at best: a large copy and one that stays in the caches, a large product, exponentials.

use super::{Rows, Subject};
use crate::autograd::{Graph, Precision, Var};
use crate::backend::{Device, cpu};
use crate::error::Result;
use crate::ops::contracts::gemm;
use crate::report::bench::{CACHED, CALL, CEILING, COPY, EXPS, PRODUCT, Row};
use crate::tensor::{DType, Tensor};
use graft_kernels::check::{Fill, draw_f32};
use std::time::Duration;

/// Time after which a ceiling takes no further sample.
const PATIENCE: Duration = Duration::from_secs(2);
const SAMPLES: usize = 7;
/// Larger than any cache.
const FLOATS: usize = 64 << 20;
/// Source and copy fit the caches of a processor.
const CACHED_FLOATS: usize = 128 << 10;
/// Copies of a sample that stays in the caches: one alone is too short for a clock.
const COPIES: usize = 64;
/// A side at which products reach their rate: on the host, and on a GPU.
const SIDES: [usize; 2] = [2048, 8192];
/// Calls with next to no work that are timed.
const CALLS: usize = 1000;
/// Exponentials of a sample.
const EXPONENTIALS: usize = 64 << 20;

/// The ceilings of `device` in its working type, put into `rows`; `product` is the type in which products compute on the host.
///
/// # Errors
/// When memory runs out.
pub(super) fn measure(device: &Device, product: Precision, rows: &mut Rows) -> Result<()> {
    rows.put(copy(device)?)?;
    rows.put(product_of(device, product)?)?;
    if device.is_host() {
        rows.put(copy_in_cache(device)?)?;
        rows.put(exponentials(device)?)?;
        rows.put(call(device)?)?;
    }
    Ok(())
}

fn ceiling(case: &str, work: String) -> Subject {
    Subject { bench: CEILING, case: case.into(), work }
}

fn copy(device: &Device) -> Result<Row> {
    let from = Tensor::zeros(device, &[FLOATS])?;
    let times = device.time(SAMPLES, PATIENCE, &mut || from.copy().map(drop))?;
    let mut row = ceiling(COPY, "read and write".into()).row(device, DType::F32, times);
    row.bytes = Some(2.0 * 4.0 * FLOATS as f64);
    Ok(row)
}

fn copy_in_cache(device: &Device) -> Result<Row> {
    let from = vec![1.0f32; CACHED_FLOATS * cpu::threads()];
    let mut to = vec![0.0f32; from.len()];
    let mut work = || {
        cpu::copies(&from, &mut to, COPIES);
        Ok(())
    };
    let times = device.time(SAMPLES, PATIENCE, &mut work)?;
    let mut row = ceiling(CACHED, "read and write".into()).row(device, DType::F32, times);
    row.bytes = Some(2.0 * 4.0 * (from.len() * COPIES) as f64);
    Ok(row)
}

fn product_of(device: &Device, precision: Precision) -> Result<Row> {
    let on_host = device.is_host();
    let element = if on_host && precision == Precision::Bf16 { DType::BF16 } else { device.element() };
    let side = SIDES[usize::from(!on_host)];
    // Random numbers: a GPU multiplies equal ones with less power, and so faster.
    let values = |name| draw_f32(PRODUCT, name, side * side, Fill::Normal);
    let x = Var::constant(Tensor::from_f32_as(device, &[1, side, side], &values("x"), device.element())?);
    let w = Tensor::from_f32_as(device, &[side, side], &values("w"), device.element())?;
    let w = Var::constant(if on_host && element == DType::BF16 { w.to_bf16()? } else { w });
    let g = Graph::inference(precision);
    let params = gemm::Params { act: 0, gate_row: 0, bf16: precision == Precision::Bf16 };
    let mut work = || g.gemm(&x, &w, None, None, None, None, params).map(drop);
    let times = device.time(SAMPLES, PATIENCE, &mut work)?;
    let mut row = ceiling(PRODUCT, format!("{side} cubed")).row(device, element, times);
    row.flops = Some(2.0 * (side as f64).powi(3));
    Ok(row)
}

/// An operator with next to no work.
fn call(device: &Device) -> Result<Row> {
    let x = Var::constant(Tensor::zeros(device, &[1, 1, 16])?);
    let w = Var::constant(Tensor::zeros(device, &[16, 16])?);
    let g = Graph::inference(Precision::F32);
    let params = gemm::Params { act: 0, gate_row: 0, bf16: false };
    let mut work = || g.gemm(&x, &w, None, None, None, None, params).map(drop);
    let times = device.time(CALLS, PATIENCE, &mut work)?;
    Ok(ceiling(CALL, "a product of 16 numbers".into()).row(device, DType::F32, times))
}

/// The exponential that softmax and activations use, over numbers in the caches.
fn exponentials(device: &Device) -> Result<Row> {
    let mut values = vec![0.0f32; 4096 * cpu::threads()];
    let rounds = EXPONENTIALS / values.len();
    let mut work = || {
        cpu::exponentials(&mut values, rounds);
        Ok(())
    };
    let times = device.time(SAMPLES, PATIENCE, &mut work)?;
    let mut row = ceiling(EXPS, "e^x of f32".into()).row(device, DType::F32, times);
    row.exps = Some((values.len() * rounds) as f64);
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_the_caches_has_ceilings_of_its_own() {
        let device = Device::cpu();
        let rows = [copy_in_cache(&device).unwrap(), exponentials(&device).unwrap()];
        assert!(rows.iter().all(|r| r.bench == CEILING && r.ms > 0.0));
        assert!(rows[0].bytes.is_some_and(|n| n > 1e6) && rows[1].exps.is_some_and(|n| n > 1e6), "{rows:?}");
    }
}
