//! Which kernels take which shape: both operands are rounded first, then multiplied.

use crate::generated::gemm_fp8::{Dims, ForwardWay, GpuForward};
use crate::launch::{Element, In, OrNull, Out, Queue, Shape, TensorMap};
use crate::launchers::gemm_fp8::{GemmFp8Forward, GemmFp8Round, GemmFp8RoundSm90, GemmFp8Wgmma128x192};
use crate::ways;

/// Warps of a block that rounds rows.
const WARPS: usize = 4;
/// Bytes of shared memory of the wgmma kernel: four stages of 128-byte rows of 128 + 192, eight slabs.
const SHARED: usize = 4 * 128 * (128 + 192) + 8 * 16 * 72 * 4;

/// The rows of a matrix, rounded: `[rows, stride]` bytes and a scale each.
struct Rounded {
    bytes: Out<u8>,
    scales: Out<f32>,
    rows: usize,
    stride: usize,
}

impl Rounded {
    fn map(&self, height: u32) -> TensorMap {
        TensorMap {
            element: 0,
            swizzle: 3,
            address: self.bytes.address(),
            rank: 2,
            dims: [self.stride as u64, self.rows as u64, 1, 1, 1],
            strides: [self.stride as u64, 0, 0, 0],
            block: [128, height, 1, 1, 1],
        }
    }
}

fn round<T: Element, Q: Queue>(
    queue: &mut Q,
    x: In<T>,
    [rows, k]: [usize; 2],
    native: bool,
) -> Result<Rounded, Q::Error> {
    // Tensor maps want rows of whole 16 bytes; zeros fill them up.
    let stride = k.next_multiple_of(16);
    let bytes = Out::<u8>::at(queue.scratch::<f32>((rows * stride).div_ceil(4))?.address());
    let scales = queue.scratch::<f32>(rows)?;
    let shape = Shape::new(rows.div_ceil(WARPS), 32 * WARPS);
    if native {
        GemmFp8RoundSm90 { x, to: bytes, scales, rows, k, stride }.launch(queue, shape)?;
    } else {
        GemmFp8Round { x, to: bytes, scales, rows, k, stride }.launch(queue, shape)?;
    }
    Ok(Rounded { bytes, scales, rows, stride })
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, k, f, c } = a.dims;
    let (rows, act, gate_row) = (b * n, a.params.act, a.params.gate_row);
    let takes = |way| way == ForwardWay::CudaCores || f.is_multiple_of(8);
    let way = ways::choose(queue, T::TYPE, &a.dims, takes);
    let native = way != ForwardWay::CudaCores;
    let x = round(queue, a.x, [rows, k], native)?;
    let w = round(queue, a.w, [f, k], native)?;
    let (bias, gate, residual, y) = (a.bias.or_null(), a.gate.or_null(), a.residual.or_null(), a.y);
    let (x_scales, w_scales, stride) = (x.scales.read(), w.scales.read(), x.stride);
    match way {
        ForwardWay::Wgmma128x192 => {
            let tiles = rows.div_ceil(128) * f.div_ceil(192);
            let shape = Shape::new(tiles.min(queue.properties().multiprocessors), 384).shared(&[SHARED]).dependent();
            let (x, w) = (x.map(128), w.map(192));
            GemmFp8Wgmma128x192 {
                x,
                w,
                x_scales,
                w_scales,
                bias,
                gate,
                residual,
                y,
                rows,
                n,
                k: stride,
                f,
                c,
                gate_row,
                act,
            }
            .launch(queue, shape)
        }
        ForwardWay::CudaCores => {
            let shape = Shape::new(rows.div_ceil(128) * f.div_ceil(64), 128);
            GemmFp8Forward {
                x: x.bytes.read(),
                w: w.bytes.read(),
                x_scales,
                w_scales,
                bias,
                gate,
                residual,
                y,
                rows,
                n,
                k,
                stride,
                f,
                c,
                gate_row,
                act,
            }
            .launch(queue, shape)
        }
    }
}
