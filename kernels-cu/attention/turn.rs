//! Transposes squares of one vector by one vector in registers.

use super::tiles::WIDTH;

/// A square of values, by rows.
pub type Square = [[f32; WIDTH]; WIDTH];

/// Exchanges rows and columns.
#[inline(always)]
pub fn turn(square: &mut Square) {
    #[cfg(target_arch = "x86_64")]
    if let pulp::x86::Arch::V4(simd) = crate::simd::arch() {
        return in_registers(simd, square);
    }
    for i in 0..WIDTH {
        for j in 0..i {
            (square[i][j], square[j][i]) = (square[j][i], square[i][j]);
        }
    }
}

/// Four rounds: pairs of values, quadruples, and twice quarters of registers.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn in_registers(simd: pulp::x86::V4, square: &mut Square) {
    use bytemuck::cast;
    use std::arch::x86_64::{__m512, __m512d};
    let f = simd.avx512f;
    let mut r = [cast::<_, __m512>([0.0f32; WIDTH]); WIDTH];
    for i in 0..WIDTH {
        r[i] = cast(square[i]);
    }
    let mut s: [__m512d; WIDTH] = [cast([0.0f32; WIDTH]); WIDTH];
    for i in (0..WIDTH).step_by(2) {
        s[i] = cast(f._mm512_unpacklo_ps(r[i], r[i + 1]));
        s[i + 1] = cast(f._mm512_unpackhi_ps(r[i], r[i + 1]));
    }
    // r[4q + j] holds column 4p + j of rows 4q..4q+4 in its quarter p.
    for q in (0..WIDTH).step_by(4) {
        r[q] = cast(f._mm512_unpacklo_pd(s[q], s[q + 2]));
        r[q + 1] = cast(f._mm512_unpackhi_pd(s[q], s[q + 2]));
        r[q + 2] = cast(f._mm512_unpacklo_pd(s[q + 1], s[q + 3]));
        r[q + 3] = cast(f._mm512_unpackhi_pd(s[q + 1], s[q + 3]));
    }
    // The even and the odd quarters of four row groups are gathered, then the columns of each.
    let mut t = r;
    for j in 0..4 {
        t[j] = f._mm512_shuffle_f32x4::<0b10_00_10_00>(r[j], r[j + 4]);
        t[j + 4] = f._mm512_shuffle_f32x4::<0b11_01_11_01>(r[j], r[j + 4]);
        t[j + 8] = f._mm512_shuffle_f32x4::<0b10_00_10_00>(r[j + 8], r[j + 12]);
        t[j + 12] = f._mm512_shuffle_f32x4::<0b11_01_11_01>(r[j + 8], r[j + 12]);
    }
    for j in 0..4 {
        r[j] = f._mm512_shuffle_f32x4::<0b10_00_10_00>(t[j], t[j + 8]);
        r[j + 8] = f._mm512_shuffle_f32x4::<0b11_01_11_01>(t[j], t[j + 8]);
        r[j + 4] = f._mm512_shuffle_f32x4::<0b10_00_10_00>(t[j + 4], t[j + 12]);
        r[j + 12] = f._mm512_shuffle_f32x4::<0b11_01_11_01>(t[j + 4], t[j + 12]);
    }
    for i in 0..WIDTH {
        square[i] = cast(r[i]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns() {
        let value = |i: usize, j: usize| (i * WIDTH + j) as f32;
        let mut square: Square = std::array::from_fn(|i| std::array::from_fn(|j| value(i, j)));
        crate::simd::vectorised(|| turn(&mut square));
        for (i, row) in square.iter().enumerate() {
            (0..WIDTH).for_each(|j| assert_eq!(row[j], value(j, i), "{i},{j}"));
        }
    }
}
