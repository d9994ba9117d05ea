//! Launches of the tensor-core kernels of the attention family (`common/mma_attention.cuh`).

use crate::launch::Shape;

/// The widest head that they take; heads go in steps of eight columns, which are 16 bytes.
const WIDEST: usize = 128;

/// Whether heads of `e` columns fit.
pub(crate) fn fits(e: usize) -> bool {
    e > 0 && e.is_multiple_of(8) && e <= WIDEST
}

/// Tokens of a stage.
const STAGE: usize = 64;

/// Bytes of `rows` tokens in shared memory, heads of up to `width` columns: an odd number of 16-byte chunks each.
pub(crate) fn stage_bytes(rows: usize, width: usize) -> usize {
    rows * if width / 8 % 2 == 1 { width } else { width + 8 } * 2
}

/// Bytes of the eight rows through which each warp's results go.
pub(crate) fn own_rows(warps: usize, width: usize) -> usize {
    stage_bytes(8 * warps, width)
}

/// A block for each `rows` of `tokens` tokens of `heads` heads in all samples, with two stages of two tensors.
pub(crate) fn by_tiles(tokens: usize, heads: usize, rows: usize, threads: usize, width: usize) -> Shape {
    Shape::new(tokens.div_ceil(rows) * heads, threads).shared(&[stage_bytes(STAGE, width); 4])
}

/// Multiprocessors of an H100 or H200, for splits that decide the order of a sum and so must not follow from the device.
pub(crate) const MULTIPROCESSORS: usize = 132;

/// How many of the `steps` of a head a block takes, `least` or more, so that all blocks of `heads` heads end soonest where
/// `places` of them run at one time and each takes `start` steps' time to begin.
pub(crate) fn steps_of_block(steps: usize, heads: usize, places: usize, start: usize, least: usize) -> usize {
    // More than this saves no time to begin that would be seen.
    const MOST: usize = 64;
    let time = |each: usize| (steps.div_ceil(each) * heads).div_ceil(places.max(1)) * (each + start);
    let most = steps.clamp(1, MOST);
    (least.min(most)..=most).rev().min_by_key(|&each| time(each)).unwrap_or(1)
}

/// Launches the kernel of the narrowest head that is wide enough: `by_width!(e, queue, [64 => A, 128 => B], { fields },
/// |width| shape)`. The last one takes the rest.
macro_rules! by_width {
    ($e:expr, $queue:expr, [$($width:literal => $kernel:ident),+; $last:literal => $widest:ident], $fields:tt, $shape:expr) => {
        match $e {
            $(..=$width => by_width!(@one $queue, $kernel $fields, ($shape)($width)),)+
            _ => by_width!(@one $queue, $widest $fields, ($shape)($last)),
        }
    };
    (@one $queue:expr, $kernel:ident { $($field:ident $(: $value:expr)?),* $(,)? }, $shape:expr) => {
        $kernel { $($field $(: $value)?),* }.launch($queue, $shape)
    };
}
pub(crate) use by_width;

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks fill the places once where they can, and small work is spread out.
    #[test]
    fn blocks_fill_the_places() {
        assert_eq!(steps_of_block(256, 16, 3 * MULTIPROCESSORS, 1, 1), 11);
        assert_eq!(steps_of_block(4, 32, 2 * MULTIPROCESSORS, 2, 1), 1);
        assert_eq!(steps_of_block(4, 512, 2 * MULTIPROCESSORS, 2, 1), 4);
        assert_eq!(steps_of_block(11, 1, 396, 2, 6), 6);
        assert_eq!((steps_of_block(0, 1, 4, 1, 2), steps_of_block(1, 1, 0, 1, 6)), (1, 1));
    }

    /// The eight rows of a fragment lie in different groups of four banks.
    #[test]
    fn rows_are_an_odd_number_of_chunks_apart() {
        for width in [32, 64, 72, 80, 96, 128] {
            assert_eq!(stage_bytes(1, width) / 16 % 2, 1, "{width}");
        }
        assert_eq!((stage_bytes(64, 72), stage_bytes(64, 64)), (9216, 9216));
        assert!(fits(72) && fits(8) && !fits(0) && !fits(9) && !fits(136));
    }
}
