//! Which kernel takes which shape.

use crate::generated::conv2d::{Dims, ForwardWay, GpuForward, Params};
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::conv2d::{
    Conv2dForward, Conv2dHalo128x64, Conv2dHalo128x128, Conv2dWgmma128x64, Conv2dWgmma128x128, Conv2dWindows64x64,
    Conv2dWindows128x16, Conv2dWindows128x128,
};
use crate::ways;

/// Bytes of a row of an operand in shared memory: 64 values of the depth.
const ROW: usize = 128;
/// Rows and columns of results of a tile in the loop `halo`.
pub(crate) const HALO: [usize; 2] = [8, 16];
/// Blocks that keep an H100 or H200 busy, two on each multiprocessor. A constant: the choice depends on the shape alone.
pub(crate) const BUSY: usize = 264;

/// Tiles of pixels in the loop `halo`.
pub(crate) fn halo_tiles(b: usize, oh: usize, ow: usize) -> usize {
    b * oh.div_ceil(HALO[0]) * ow.div_ceil(HALO[1])
}

/// Shared memory of the loop `halo` with 128×`columns` tiles and a ring of 4 stages; parts of a GPU's family have less.
pub(crate) fn halo_bytes(columns: usize) -> usize {
    let pixels = (HALO[0] + 2) * (HALO[1] + 2);
    ((2 * pixels + 4 * columns) * ROW).max(128 * (columns + 8) * 4)
}

/// The launch of that loop.
pub(crate) fn halo_shape(tiles: usize, f: usize, columns: usize, threads: usize) -> Shape {
    Shape::new(tiles * f.div_ceil(columns), threads).shared(&[halo_bytes(columns)])
}

/// Whether offsets in an image and in 3x3 filters, counted up to a whole tile, fit 31 bits.
pub(crate) fn halo_fits([h, w, c, f]: [usize; 4]) -> bool {
    h * w * c < 1 << 31 && 9 * c * f.next_multiple_of(128) < 1 << 31
}

/// Launch of the loop `windows`: tiles, threads, stages.
fn windows_shape(dims: Dims, [rows, columns]: [usize; 2], threads: usize, stages: usize) -> Shape {
    let Dims { b, f, oh, ow, .. } = dims;
    let ring = stages * (rows + columns) * ROW;
    Shape::new((b * oh * ow).div_ceil(rows) * f.div_ceil(columns), threads).shared(&[
        ring.max(rows * (columns + 8) * 4),
        rows * 8,
        rows * 8,
    ])
}

/// Whether a large tile serves: there are enough of them for every multiprocessor, or so few results that it does not
/// matter.
pub(crate) fn large_tiles(tiles: usize, results: usize) -> bool {
    tiles >= BUSY || results <= 1 << 17
}

/// Whether a way takes a shape where a block can have `most` bytes of shared memory.
fn takes(way: ForwardWay, dims: Dims, params: Params, most: usize) -> bool {
    let Dims { b, h, w, c, f, kh, kw, oh, ow } = dims;
    let (vectors, pixels, tiles) = (c.is_multiple_of(8), b * oh * ow, halo_tiles(b, oh, ow));
    // Pixels that tiles hold and the image has not are work for nothing.
    let full = 2 * tiles * HALO[0] * HALO[1] <= 3 * pixels;
    let halo = vectors && f > 16 && (kh, kw, params.stride) == (3, 3, 1) && full && halo_fits([h, w, c, f]);
    match way {
        ForwardWay::Windows128x16 => vectors && f <= 16,
        ForwardWay::Wgmma128x128 | ForwardWay::Halo128x128 => {
            halo && f > 64 && halo_bytes(128) <= most && large_tiles(tiles * f.div_ceil(128), pixels * f)
        }
        ForwardWay::Wgmma128x64 | ForwardWay::Halo128x64 => halo,
        ForwardWay::Windows128x128 => {
            vectors && f > 64 && large_tiles(pixels.div_ceil(128) * f.div_ceil(128), pixels * f)
        }
        ForwardWay::Windows64x64 => vectors && f > 16,
        ForwardWay::CudaCores => true,
    }
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
#[rustfmt::skip]
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, h, w, c, f, kh, kw, oh, ow } = a.dims;
    let Params { stride, pad_h, pad_w, relu, bf16 } = a.params;
    let (relu, round) = (usize::from(relu), usize::from(bf16));
    let (x, filters, bias, y, tiles) = (a.x, a.filters, a.bias.or_null(), a.y, halo_tiles(b, oh, ow));
    macro_rules! halo {
        ($kernel:ident, $columns:literal, $threads:literal) => {
            $kernel { x, filters, bias, y, h, w, c, f, oh, ow, pad_h, pad_w, relu }
                .launch(queue, halo_shape(tiles, f, $columns, $threads))
        };
    }
    macro_rules! windows {
        ($kernel:ident, $tile:expr, $threads:literal, $stages:literal) => {
            $kernel { x, filters, bias, y, b, h, w, c, f, kh, kw, oh, ow, stride, pad_h, pad_w, relu }
                .launch(queue, windows_shape(a.dims, $tile, $threads, $stages))
        };
    }
    let most = queue.properties().shared_per_block;
    match ways::choose(queue, T::TYPE, &a.dims, |way| takes(way, a.dims, a.params, most)) {
        ForwardWay::Wgmma128x128 => halo!(Conv2dWgmma128x128, 128, 256),
        ForwardWay::Wgmma128x64 => halo!(Conv2dWgmma128x64, 64, 256),
        ForwardWay::Halo128x128 => halo!(Conv2dHalo128x128, 128, 128),
        ForwardWay::Halo128x64 => halo!(Conv2dHalo128x64, 64, 128),
        ForwardWay::Windows128x128 => windows!(Conv2dWindows128x128, [128, 128], 128, 3),
        ForwardWay::Windows64x64 => windows!(Conv2dWindows64x64, [64, 64], 128, 4),
        ForwardWay::Windows128x16 => windows!(Conv2dWindows128x16, [128, 16], 256, 4),
        ForwardWay::CudaCores => {
            let shape = Shape::new((b * oh * ow).div_ceil(128) * f.div_ceil(64), 128);
            Conv2dForward { x, filters, bias, y, b, h, w, c, f, kh, kw, oh, ow, stride, pad_h, pad_w, relu, round }
                .launch(queue, shape)
        }
    }
}
