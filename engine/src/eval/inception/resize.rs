//! Pictures as the network takes them: enlarged or reduced to 299 x 299, values about 0.

use crate::error::Result;
use crate::io::pictures::Pictures;
use crate::tensor::{Device, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Side of the network's input.
pub const SIDE: usize = 299;

/// The pixels along one axis that output `at` mixes, and the weight of the second: source at·size/299 without a
/// half-pixel offset, edges clamped, as the first versions of TensorFlow resize. The statistics of others were made
/// that way, so anything smoother would not be comparable.
fn mix(at: usize, size: usize) -> (usize, usize, f32) {
    let source = at as f32 * (size as f32 / SIDE as f32);
    let first = (source.floor() as usize).min(size - 1);
    (first, (first + 1).min(size - 1), source - source.floor())
}

/// Pictures `range` resized, in 0..=255: `[n, 299, 299, 3]`; grey ones in all three channels.
///
/// # Errors
/// When memory runs out.
pub fn resized(device: &Device, pictures: &Pictures, range: Range<usize>) -> Result<Tensor> {
    let (h, w, c) = (pictures.height, pictures.width, pictures.channels);
    let mut out = device.empty(&[range.len(), SIDE, SIDE, 3])?;
    let columns: Vec<_> = (0..SIDE).map(|x| mix(x, w)).collect();
    out.f32s_mut()?.par_chunks_mut(SIDE * 3).enumerate().for_each(|(row, line)| {
        let image = pictures.image(range.start + row / SIDE);
        let (top, bottom, down) = mix(row % SIDE, h);
        let (upper, lower) = (&image[top * w * c..][..w * c], &image[bottom * w * c..][..w * c]);
        for (pixel, &(left, right, across)) in line.chunks_exact_mut(3).zip(&columns) {
            for (channel, value) in pixel.iter_mut().enumerate() {
                let channel = if c == 1 { 0 } else { channel };
                let at = |line: &[u8], x: usize| f32::from(line[x * c + channel]);
                let between = |line: &[u8]| at(line, left) + (at(line, right) - at(line, left)) * across;
                let (upper, lower) = (between(upper), between(lower));
                *value = upper + (lower - upper) * down;
            }
        }
    });
    Ok(out)
}

/// Values 0..=255 to about −1..1: (x − 128)/128, exactly.
///
/// # Errors
/// When the tensor is shared or of another type.
pub fn normalise(images: &mut Tensor) -> Result<()> {
    images.f32s_mut()?.par_iter_mut().with_min_len(1 << 14).for_each(|v| *v = (*v - 128.0) / 128.0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_pixels_become_a_ramp_and_a_plateau() {
        let pictures = Pictures::new("x", [1, 1, 2, 1], vec![10, 110]).unwrap();
        let out = resized(&Device::cpu(), &pictures, 0..1).unwrap();
        let v = out.f32s().unwrap();
        assert_eq!((v[0], v[1], v[2]), (10.0, 10.0, 10.0));
        // Output 75 reads 75·2/299 = 0.50167; from 149.5 on the second pixel is the last one.
        assert!((v[75 * 3] - (10.0 + 100.0 * 150.0 / 299.0)).abs() < 1e-3, "{}", v[75 * 3]);
        assert_eq!((v[150 * 3], v[298 * 3]), (110.0, 110.0));
        // One row high: all rows alike.
        assert_eq!(v[..SIDE * 3], v[200 * SIDE * 3..201 * SIDE * 3]);
    }

    #[test]
    fn the_networks_own_size_changes_nothing() {
        let pixels: Vec<u8> = (0..2 * SIDE * SIDE * 3).map(|i| (i * 7 % 251) as u8).collect();
        let pictures = Pictures::new("x", [2, SIDE, SIDE, 3], pixels.clone()).unwrap();
        let mut out = resized(&Device::cpu(), &pictures, 1..2).unwrap();
        let want: Vec<f32> = pixels[SIDE * SIDE * 3..].iter().map(|&p| f32::from(p)).collect();
        assert_eq!(out.f32s().unwrap(), want);
        normalise(&mut out).unwrap();
        assert_eq!(out.f32s().unwrap()[5], (want[5] - 128.0) / 128.0);
    }
}
