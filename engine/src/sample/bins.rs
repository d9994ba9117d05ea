//! Sizes that PixArt was trained at: one for each of 40 aspect ratios, scaled by the size of the model; and how a
//! picture of such a size becomes one of another.

/// Height over width, and the size at 2048 pixels, as `(ratio, height, width)`.
const AT_2048: [(f64, usize, usize); 40] = [
    (0.25, 1024, 4096),
    (0.26, 1024, 3968),
    (0.27, 1024, 3840),
    (0.28, 1024, 3712),
    (0.32, 1152, 3584),
    (0.33, 1152, 3456),
    (0.35, 1152, 3328),
    (0.4, 1280, 3200),
    (0.42, 1280, 3072),
    (0.48, 1408, 2944),
    (0.5, 1408, 2816),
    (0.52, 1408, 2688),
    (0.57, 1536, 2688),
    (0.6, 1536, 2560),
    (0.68, 1664, 2432),
    (0.72, 1664, 2304),
    (0.78, 1792, 2304),
    (0.82, 1792, 2176),
    (0.88, 1920, 2176),
    (0.94, 1920, 2048),
    (1.0, 2048, 2048),
    (1.07, 2048, 1920),
    (1.13, 2176, 1920),
    (1.21, 2176, 1792),
    (1.29, 2304, 1792),
    (1.38, 2304, 1664),
    (1.46, 2432, 1664),
    (1.67, 2560, 1536),
    (1.75, 2688, 1536),
    (2.0, 2816, 1408),
    (2.09, 2944, 1408),
    (2.4, 3072, 1280),
    (2.5, 3200, 1280),
    (2.89, 3328, 1152),
    (3.0, 3456, 1152),
    (3.11, 3584, 1152),
    (3.62, 3712, 1024),
    (3.75, 3840, 1024),
    (3.88, 3968, 1024),
    (4.0, 4096, 1024),
];

/// The trained size (height, width) nearest in ratio to a wanted one, for a model trained at pictures of `side` pixels;
/// none where it is no published side.
pub fn nearest(side: usize, [height, width]: [usize; 2]) -> Option<[usize; 2]> {
    if ![256, 512, 1024, 2048].contains(&side) || width == 0 {
        return None;
    }
    let wanted = height as f64 / width as f64;
    let mut best = AT_2048[0];
    for bin in AT_2048 {
        // The first of two that are equally near.
        if (bin.0 - wanted).abs() < (best.0 - wanted).abs() {
            best = bin;
        }
    }
    Some([best.1 * side / 2048, best.2 * side / 2048])
}

/// Scales planes `[n, h, w]` so that they cover `want` (height, width), bilinearly, and cuts the middle out.
pub fn resize_and_crop(planes: &[f32], [h, w]: [usize; 2], want: [usize; 2]) -> Vec<f32> {
    let scale = (want[0] as f64 / h as f64).max(want[1] as f64 / w as f64);
    // Rounding must not leave a side one short of what is cut out.
    let size = [(h as f64 * scale) as usize, (w as f64 * scale) as usize];
    let size = [size[0].max(want[0]), size[1].max(want[1])];
    let first = [(size[0] - want[0]) / 2, (size[1] - want[1]) / 2];
    // Centres of pixels lie on centres of pixels.
    let source = |at: usize, from: usize, to: usize| {
        let x = ((at as f64 + 0.5) * from as f64 / to as f64 - 0.5).max(0.0);
        let below = (x as usize).min(from - 1);
        (below, (below + 1).min(from - 1), (x - below as f64) as f32)
    };
    let rows: Vec<_> = (0..want[0]).map(|i| source(first[0] + i, h, size[0])).collect();
    let columns: Vec<_> = (0..want[1]).map(|j| source(first[1] + j, w, size[1])).collect();
    let mut out = Vec::with_capacity(planes.len() / (h * w).max(1) * want[0] * want[1]);
    for plane in planes.chunks_exact(h * w) {
        for &(above, below, down) in &rows {
            let (top, bottom) = (&plane[above * w..][..w], &plane[below * w..][..w]);
            for &(left, right, across) in &columns {
                let mix = |line: &[f32]| line[left] + across * (line[right] - line[left]);
                out.push(mix(top) + down * (mix(bottom) - mix(top)));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_ratio() {
        assert_eq!(nearest(2048, [2048, 2048]), Some([2048, 2048]));
        assert_eq!(nearest(2048, [1080, 1920]), Some([1536, 2688]));
        assert_eq!(nearest(1024, [1920, 1080]), Some([1344, 768]));
        assert_eq!(nearest(256, [100, 1000]), Some([128, 512]));
        assert_eq!(nearest(300, [300, 300]), None);
        for (_, h, w) in AT_2048 {
            assert!(h % 128 == 0 && w % 128 == 0 && (14_784..=16_384).contains(&(h * w / 256)), "{h} {w}");
        }
    }

    #[test]
    fn pictures_are_scaled_and_cut() {
        let plane = [0.0, 1.0, 2.0, 3.0];
        assert_eq!(resize_and_crop(&plane, [2, 2], [2, 2]), plane);
        // Twice as wide: four rows and columns, of which the middle two rows remain.
        let out = resize_and_crop(&plane, [2, 2], [2, 4]);
        assert_eq!(out, [0.5, 0.75, 1.25, 1.5, 1.5, 1.75, 2.25, 2.5]);
        assert_eq!(resize_and_crop(&[1.0; 6], [2, 3], [5, 4]).len(), 20);
    }
}
