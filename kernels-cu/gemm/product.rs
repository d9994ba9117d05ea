//! Matrix products on the CPU: one entry point over the processor's kernels.
//!
//! With AVX-512 the product runs in packed panels of our own (`packed`, `pack`, `micro`), f32 or bf16, and vectors
//! stream the weight (`few_rows`); elsewhere the gemm crate multiplies in f32, with operands rounded first where bf16
//! products are asked for: the same numbers up to the order of the sums.

#![allow(unsafe_code)] // Threads write disjoint blocks of one result; the gemm crate takes raw pointers.

#[cfg(target_arch = "x86_64")]
mod few_rows;
#[cfg(target_arch = "x86_64")]
mod micro;
#[cfg(target_arch = "x86_64")]
mod pack;
#[cfg(target_arch = "x86_64")]
mod packed;
#[cfg(target_arch = "x86_64")]
pub mod windows;

use gemm::Parallelism;
use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Range;

/// Elements of a matrix.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    /// Stored in f32.
    F32(&'a [f32]),
    /// Stored in bf16.
    Bf16(&'a [bf16]),
    /// In f32, but not in memory: a left operand whose rows are written out as they are packed. Its strides are unused.
    Rows(&'a dyn Rows),
}

/// Rows of a matrix that are made on demand, a piece along k at a time.
pub trait Rows: Sync {
    /// Rows, and elements of each.
    fn size(&self) -> [usize; 2];

    /// Writes elements `from..from + out.len()` of row `row`, which are inside the matrix.
    fn write(&self, row: usize, from: usize, out: &mut [f32]);
}

/// A matrix in memory: element (i, j) lies at `i·strides[0] + j·strides[1]`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// Memory from the first element on.
    pub values: Values<'a>,
    /// Elements from row to row and from column to column.
    pub strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// A matrix over f32 values.
    pub fn f32(values: &'a [f32], strides: [usize; 2]) -> Self {
        Matrix { values: Values::F32(values), strides }
    }

    /// The matrix with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Matrix { values: self.values, strides: [self.strides[1], self.strides[0]] }
    }

    fn holds(&self, [rows, columns]: [usize; 2]) -> bool {
        let len = match self.values {
            Values::F32(values) => values.len(),
            Values::Bf16(values) => values.len(),
            Values::Rows(made) => return made.size()[0] >= rows && made.size()[1] >= columns,
        };
        rows * columns == 0 || (rows - 1) * self.strides[0] + (columns - 1) * self.strides[1] < len
    }

    /// All of memory as f32, rounded to bf16 where asked.
    fn to_f32(self, round: bool) -> Cow<'a, [f32]> {
        match self.values {
            Values::F32(values) if round => values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect(),
            Values::F32(values) => values.into(),
            Values::Bf16(values) => values.iter().map(|v| v.to_f32()).collect(),
            Values::Rows(made) => written(made, 0..made.size()[0], round).into(),
        }
    }
}

/// Some rows of a matrix made on demand, rounded to bf16 where asked.
fn written(made: &dyn Rows, rows: Range<usize>, round: bool) -> Vec<f32> {
    let k = made.size()[1];
    let mut out = vec![0.0; rows.len() * k];
    rows.zip(out.chunks_mut(k.max(1))).for_each(|(row, out)| made.write(row, 0, out));
    if round {
        out.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
    }
    out
}

/// A product to compute: c ← alpha·a·b + beta·c, `a` m×k, `b` k×n, `size` = [m, k, n].
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// Left operand.
    pub a: Matrix<'a>,
    /// Right operand.
    pub b: Matrix<'a>,
    /// m, k, n.
    pub size: [usize; 3],
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of what the result holds; at 0 the result is not read.
    pub beta: f32,
    /// Multiply operands rounded to bf16, and accumulate in f32.
    pub bf16: bool,
    /// Every row is a sample of its own, so there may be few of them. The caller says so, because choosing the path by
    /// the number of rows would let a result depend on the batch that it is in.
    pub vectors: bool,
}

impl<'a> Product<'a> {
    /// a·b.
    pub fn new(size: [usize; 3], a: Matrix<'a>, b: Matrix<'a>, bf16: bool) -> Self {
        Product { a, b, size, alpha: 1.0, beta: 0.0, bf16, vectors: false }
    }

    /// The same with [`Product::vectors`] set.
    pub fn of_vectors(self, vectors: bool) -> Self {
        Product { vectors, ..self }
    }
}

/// What is done to a piece of a row of the result once its sums are complete: row, first column, the piece, and the
/// same piece of the twin. It starts no product and no parallel work of its own.
pub type Finish<'a> = &'a (dyn Fn(usize, usize, &mut [f32], Option<&mut [f32]>) + Sync);

/// A result whose blocks several threads write, and its optional twin of the same shape.
pub struct Output<'a> {
    result: *mut f32,
    twin: Option<*mut f32>,
    stride: usize,
    size: [usize; 2],
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointers come from exclusive borrows, and `at` and `finish` leave it to the caller to keep to blocks that
// no other thread touches.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// `size` = [m, n] elements at `stride` from row to row.
    ///
    /// # Panics
    /// If a slice is too short.
    pub fn new(result: &'a mut [f32], twin: Option<&'a mut [f32]>, stride: usize, size: [usize; 2]) -> Self {
        let needed = if size[0] * size[1] == 0 { 0 } else { (size[0] - 1) * stride + size[1] };
        assert!(size[1] <= stride || size[0] <= 1, "rows of the result overlap");
        assert!(result.len() >= needed && twin.as_ref().is_none_or(|t| t.len() >= needed), "the result is too short");
        let twin = twin.map(|t| t.as_mut_ptr());
        Output { result: result.as_mut_ptr(), twin, stride, size, borrowed: PhantomData }
    }

    #[cfg(target_arch = "x86_64")]
    fn at(&self, row: usize, column: usize) -> *mut f32 {
        self.result.wrapping_add(row * self.stride + column)
    }

    #[cfg(target_arch = "x86_64")]
    fn stride(&self) -> usize {
        self.stride
    }

    /// Hands columns `columns` of `row` to `finish`.
    ///
    /// # Safety
    /// The piece lies inside the result and no other thread touches it.
    unsafe fn finish(&self, row: usize, columns: Range<usize>, finish: Finish<'_>) {
        let start = row * self.stride + columns.start;
        // SAFETY: inside the slices that `new` checked; exclusive by this function's contract.
        unsafe {
            let piece = |from: *mut f32| std::slice::from_raw_parts_mut(from.add(start), columns.len());
            finish(row, columns.start, piece(self.result), self.twin.map(piece));
        }
    }
}

/// Computes a product on the threads of the current pool; `finish` runs on every row piece, still in cache.
///
/// The bits of the result do not depend on the number of threads.
///
/// # Panics
/// If an operand reaches past its slice.
pub fn run(product: &Product<'_>, out: Output<'_>, finish: Finish<'_>) {
    dispatch(product, out, true, finish);
}

/// c ← alpha·a·b + beta·c for `a` m×k, `b` k×n, `c` m×n, on the calling thread; strides are `[row, column]` in
/// elements, those of c only from row to row. With `bf16` the operands are rounded to bf16 first; sums are f32 either
/// way. `c` is not read where beta is 0.
///
/// # Panics
/// If a matrix reaches past the end of its slice.
pub fn matmul(
    a: &[f32],
    a_strides: [usize; 2],
    b: &[f32],
    b_strides: [usize; 2],
    c: &mut [f32],
    c_stride: usize,
    [m, k, n]: [usize; 3],
    alpha: f32,
    beta: f32,
    bf16: bool,
) {
    let product = Product {
        a: Matrix::f32(a, a_strides),
        b: Matrix::f32(b, b_strides),
        size: [m, k, n],
        alpha,
        beta,
        bf16,
        vectors: false,
    };
    dispatch(&product, Output::new(c, None, c_stride, [m, n]), false, &|_, _, _, _| {});
}

fn dispatch(product: &Product<'_>, out: Output<'_>, parallel: bool, finish: Finish<'_>) {
    let [m, k, n] = product.size;
    assert!(product.a.holds([m, k]), "a reaches past its slice");
    assert!(product.b.holds([k, n]), "b reaches past its slice");
    assert_eq!(out.size, [m, n], "the result has the size of the product");
    assert!(!matches!(product.b.values, Values::Rows(_)), "only the left operand can be made on demand");
    if m * n == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    {
        if few_rows::fits(product) {
            return few_rows::run(product, &out, parallel, finish);
        }
        let kernel = if product.bf16 { micro::Kernel::Bf16 } else { micro::Kernel::F32 };
        if k > 0 && kernel.available() {
            return packed::run(kernel, product, out, parallel, finish);
        }
    }
    portable(product, &out, parallel, finish);
}

/// Blocks of rows through the gemm crate.
fn portable(product: &Product<'_>, out: &Output<'_>, parallel: bool, finish: Finish<'_>) {
    const BLOCK_ROWS: usize = 128;
    let [m, k, n] = product.size;
    let made = if let Values::Rows(made) = product.a.values { Some(made) } else { None };
    let whole = if made.is_some() { Cow::default() } else { product.a.to_f32(product.bf16) };
    let b = product.b.to_f32(product.bf16);
    let a_strides = if made.is_some() { [k, 1] } else { product.a.strides };
    let [steps, b_strides] = [a_strides, product.b.strides].map(|s| s.map(|s| s as isize));
    let block = |index: usize| {
        let rows = index * BLOCK_ROWS..m.min((index + 1) * BLOCK_ROWS);
        let a = match made {
            Some(made) => written(made, rows.clone(), product.bf16).into(),
            None => Cow::Borrowed(&whole[rows.start * a_strides[0]..]),
        };
        // SAFETY: the operands hold the product's size (`dispatch`), and so does the result (`Output::new`), of which
        // this block of rows is touched by this thread alone.
        unsafe {
            gemm::gemm(
                rows.len(),
                n,
                k,
                out.result.add(rows.start * out.stride),
                1,
                out.stride as isize,
                product.beta != 0.0,
                a.as_ptr(),
                steps[1],
                steps[0],
                b.as_ptr(),
                b_strides[1],
                b_strides[0],
                product.beta,
                product.alpha,
                false,
                false,
                false,
                Parallelism::None,
            );
            rows.for_each(|row| out.finish(row, 0..n, finish));
        }
    };
    let blocks = m.div_ceil(BLOCK_ROWS);
    if parallel && blocks > 1 {
        (0..blocks).into_par_iter().for_each(block);
    } else {
        (0..blocks).for_each(block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Fill, Tolerance, compare, draw_f32};

    /// alpha·a·b + beta·c by its definition, in f64.
    fn plain(product: &Product<'_>, c: &[f32], stride: usize) -> Vec<f32> {
        let [m, k, n] = product.size;
        let (a, b) = (product.a.to_f32(product.bf16), product.b.to_f32(product.bf16));
        let mut out = c.to_vec();
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let term = |l: usize| {
                let (a, b) = (
                    a[i * product.a.strides[0] + l * product.a.strides[1]],
                    b[l * product.b.strides[0] + j * product.b.strides[1]],
                );
                f64::from(a) * f64::from(b)
            };
            let sum: f64 = (0..k).map(term).sum();
            let old = if product.beta == 0.0 { 0.0 } else { f64::from(product.beta) * f64::from(c[i * stride + j]) };
            out[i * stride + j] = (f64::from(product.alpha) * sum + old) as f32;
        }
        out
    }

    /// Strides of a rows × columns matrix: row-major, column-major, and every second element of longer rows.
    fn layouts(rows: usize, columns: usize) -> [[usize; 2]; 3] {
        [[columns + 3, 1], [1, rows + 1], [2 * columns, 2]]
    }

    #[test]
    fn every_layout_and_edge() {
        // One element, tile edges, a k over one stretch (513 words of f32; bf16 pairs with an odd end).
        for size @ [m, k, n] in
            [[1, 1, 1], [3, 5, 7], [13, 31, 33], [14, 33, 32], [29, 7, 65], [49, 32, 49], [15, 1030, 17]]
        {
            let a = draw_f32("product", "a", 4 * (m + 2) * (k + 3), Fill::Uniform(-0.25, 0.25));
            let b = draw_f32("product", "b", 4 * (k + 2) * (n + 3), Fill::Normal);
            let stored: Vec<bf16> = b.iter().map(|v| bf16::from_f32(*v)).collect();
            let stride = n + 2;
            let c = draw_f32("product", "c", m * stride, Fill::Normal);
            for (a_strides, b_strides) in layouts(m, k).into_iter().flat_map(|a| layouts(k, n).map(|b| (a, b))) {
                for (values, bf16) in [(Values::F32(&b), false), (Values::F32(&b), true), (Values::Bf16(&stored), true)]
                {
                    for (alpha, beta, vectors) in [(1.0, 0.0, false), (1.0, 0.0, true), (0.5, 1.5, false)] {
                        let (a, b) = (Matrix::f32(&a, a_strides), Matrix { values, strides: b_strides });
                        let product = Product { a, b, size, alpha, beta, bf16, vectors };
                        let want = plain(&product, &c, stride);
                        let paths: [fn(&Product<'_>, Output<'_>); 2] = [
                            |p, out| run(p, out, &|_, _, _, _| {}),
                            |p, out| portable(p, &out, true, &|_, _, _, _| {}),
                        ];
                        for (path, compute) in paths.iter().enumerate() {
                            let mut got = c.clone();
                            compute(&product, Output::new(&mut got, None, stride, [m, n]));
                            let found = compare(&got, &want, Tolerance::F32);
                            assert!(found.pass, "path {path} {size:?} {a_strides:?} {b_strides:?} {bf16}: {found:?}");
                        }
                    }
                }
            }
        }
    }

    /// A matrix in memory, handed out in pieces.
    struct Pieces<'a>(&'a [f32], [usize; 2]);

    impl Rows for Pieces<'_> {
        fn size(&self) -> [usize; 2] {
            self.1
        }
        fn write(&self, row: usize, from: usize, out: &mut [f32]) {
            let len = out.len();
            out.copy_from_slice(&self.0[row * self.1[1] + from..][..len]);
        }
    }

    #[test]
    fn rows_made_on_demand_multiply_as_those_in_memory() {
        for size @ [m, k, n] in [[1, 1, 1], [15, 37, 33], [49, 1030, 40], [300, 513, 70], [600, 19, 20]] {
            let a = draw_f32("rows", "a", m * k, Fill::Normal);
            let b = draw_f32("rows", "b", k * n, Fill::Uniform(-0.25, 0.25));
            for bf16 in [false, true] {
                let stored = Product::new(size, Matrix::f32(&a, [k, 1]), Matrix::f32(&b, [1, k]), bf16);
                let pieces = Pieces(&a, [m, k]);
                let made = Product { a: Matrix { values: Values::Rows(&pieces), strides: [k, 1] }, ..stored };
                let paths: [fn(&Product<'_>, Output<'_>); 2] =
                    [|p, out| run(p, out, &|_, _, _, _| {}), |p, out| portable(p, &out, true, &|_, _, _, _| {})];
                for path in paths {
                    let [want, got] = [stored, made].map(|product| {
                        let mut c = vec![f32::NAN; m * n];
                        path(&product, Output::new(&mut c, None, n, [m, n]));
                        c
                    });
                    assert_eq!(want, got, "{size:?}, bf16 {bf16}");
                }
            }
        }
    }

    #[test]
    fn finish_sees_every_element_once() {
        // Large enough for several blocks of both loop orders.
        for [m, k, n] in [[600, 16, 70], [600, 600, 300], [2, 40, 9000]] {
            let (a, b) = (vec![1.0; m * k], vec![1.0; k * n]);
            let product = Product::new([m, k, n], Matrix::f32(&a, [k, 1]), Matrix::f32(&b, [1, k]), false);
            let (mut c, mut twin) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
            run(&product, Output::new(&mut c, Some(&mut twin), n, [m, n]), &|row, from, c, twin| {
                if let Some(twin) = twin {
                    twin.iter_mut().enumerate().for_each(|(i, t)| *t = (row * n + from + i) as f32);
                }
                c.iter_mut().for_each(|c| *c += 1.0);
            });
            assert!(c.iter().all(|c| *c == k as f32 + 1.0));
            assert!(twin.iter().enumerate().all(|(i, t)| *t == i as f32));
        }
    }

    #[test]
    fn nan_and_infinity_arrive() {
        let b = [f32::NAN, 1.0, f32::INFINITY, 1.0];
        for bf16 in [false, true] {
            let mut c = [0.0; 2];
            matmul(&[1.0, 1.0], [2, 1], &b, [1, 2], &mut c, 2, [1, 2, 2], 1.0, 0.0, bf16);
            assert!(c[0].is_nan() && c[1] == f32::INFINITY, "{c:?}");
            let mut many = [0.0; 40];
            matmul(&[1.0; 40], [2, 1], &b, [1, 2], &mut many, 2, [20, 2, 2], 1.0, 0.0, bf16);
            assert!(many.chunks(2).all(|c| c[0].is_nan() && c[1] == f32::INFINITY), "{many:?}");
        }
    }

    #[test]
    fn empty_sums_are_zero() {
        let mut c = [7.0; 20];
        matmul(&[], [0, 1], &[], [2, 1], &mut c, 2, [10, 0, 2], 1.0, 0.0, false);
        assert_eq!(c, [0.0; 20]);
    }
}
