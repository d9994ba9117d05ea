//! Matrix products of strided f32 matrices on the CPU.

#![allow(unsafe_code)] // The gemm crate takes raw pointers; every index it can reach is checked first.

use gemm::Parallelism;
use half::bf16;

/// c ← alpha·a·b + beta·c for `a` m×k, `b` k×n, `c` m×n, on the calling thread; strides are `[row, column]` in
/// elements. With `bf16` the operands are rounded to bf16 first; sums are f32 either way.
///
/// `c` is not read where beta is 0.
///
/// # Panics
/// If a matrix reaches past the end of its slice.
pub fn matmul(
    a: &[f32],
    a_strides: [usize; 2],
    b: &[f32],
    b_strides: [usize; 2],
    c: &mut [f32],
    c_strides: [usize; 2],
    [m, k, n]: [usize; 3],
    alpha: f32,
    beta: f32,
    bf16: bool,
) {
    if bf16 {
        let (a, b) = (rounded(a), rounded(b));
        return f32_product(&a, a_strides, &b, b_strides, c, c_strides, [m, k, n], alpha, beta, Parallelism::None);
    }
    f32_product(a, a_strides, b, b_strides, c, c_strides, [m, k, n], alpha, beta, Parallelism::None);
}

/// Every element rounded to bf16.
pub(super) fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect()
}

/// As [`matmul`] without rounding, on the threads of `parallelism`.
pub(super) fn f32_product(
    a: &[f32],
    a_strides: [usize; 2],
    b: &[f32],
    b_strides: [usize; 2],
    c: &mut [f32],
    c_strides: [usize; 2],
    [m, k, n]: [usize; 3],
    alpha: f32,
    beta: f32,
    parallelism: Parallelism,
) {
    let fits = |len: usize, [rows, columns]: [usize; 2], [row, column]: [usize; 2]| {
        rows * columns == 0 || (rows - 1) * row + (columns - 1) * column < len
    };
    assert!(fits(a.len(), [m, k], a_strides), "a reaches past its slice");
    assert!(fits(b.len(), [k, n], b_strides), "b reaches past its slice");
    assert!(fits(c.len(), [m, n], c_strides), "c reaches past its slice");
    let [a_strides, b_strides, c_strides] = [a_strides, b_strides, c_strides].map(|s| s.map(|s| s as isize));
    // SAFETY: the largest index of each matrix was checked against its slice above, and c is borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            c_strides[1],
            c_strides[0],
            beta != 0.0,
            a.as_ptr(),
            a_strides[1],
            a_strides[0],
            b.as_ptr(),
            b_strides[1],
            b_strides[0],
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}
