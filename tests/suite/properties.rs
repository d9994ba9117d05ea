//! Property tests: shapes drawn at random, laws that must hold for all of them.

use graft_engine::autograd::{Graph, Precision, Var};
use graft_engine::backend::Device;
use graft_engine::ops::{self, contracts};
use graft_engine::tensor::Tensor;
use graft_kernels::check::{Fill, draw_f32};
use proptest::prelude::*;

fn tensor(device: &Device, name: &str, shape: &[usize]) -> Tensor {
    Tensor::from_f32(device, shape, &draw_f32("property", name, shape.iter().product(), Fill::Normal)).unwrap()
}

fn product(act: usize) -> contracts::gemm::Params {
    contracts::gemm::Params { act, gate_row: 0, bf16: false }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Cutting into patches and putting together again, after the permutation between their two orders, is the identity.
    #[test]
    fn patches_round_trip((b, c, p, gh, gw) in (1usize..4, 1usize..5, 1usize..5, 1usize..6, 1usize..6)) {
        let device = Device::cpu();
        let x = tensor(&device, "x", &[b, c, gh * p, gw * p]);
        let tokens = ops::patchify(&x, p, gh, gw, contracts::patchify::Params {}).unwrap();
        let source = tokens.f32s().unwrap();
        let area = p * p;
        // (c, p, q) → (p, q, c)
        let reordered: Vec<f32> = (0..b * gh * gw)
            .flat_map(|t| (0..area * c).map(move |i| source[t * area * c + i % c * area + i / c]))
            .collect();
        let tokens = Tensor::from_f32(&device, &[b, gh * gw, area * c], &reordered).unwrap();
        let back = ops::unpatchify(&tokens, c, p, gh, gw, contracts::unpatchify::Params {}).unwrap();
        prop_assert_eq!(back.to_vec().unwrap(), x.to_vec().unwrap());
    }

    /// A product of tokens does not depend on how its rows are grouped into samples (one token a sample is the case of
    /// conditioning vectors, which have a path of their own), and it is the product.
    #[test]
    fn products_do_not_see_how_rows_are_grouped((b, n, k, f) in (1usize..5, 2usize..20, 1usize..70, 1usize..70)) {
        let device = Device::cpu();
        let (x, w) = (tensor(&device, "x", &[b, n, k]), tensor(&device, "w", &[f, k]));
        let whole = ops::gemm(&x, &w, None, None, None, None, false, product(0)).unwrap().y;
        let flat = ops::gemm(&x.reshape(&[1, b * n, k]).unwrap(), &w, None, None, None, None, false, product(0)).unwrap().y;
        let naive = |row: usize, col: usize| -> f64 {
            let (x, w) = (x.f32s().unwrap(), w.f32s().unwrap());
            (0..k).map(|i| f64::from(x[row * k + i]) * f64::from(w[col * k + i])).sum()
        };
        for (at, (got, grouped)) in whole.f32s().unwrap().iter().zip(flat.f32s().unwrap()).enumerate() {
            prop_assert_eq!(got.to_bits(), grouped.to_bits());
            let want = naive(at / f, at % f);
            prop_assert!((f64::from(*got) - want).abs() <= 1e-4 * (1.0 + want.abs()), "{} against {}", got, want);
        }
    }

    /// A shape that does not fit is an error that names the operator, never a panic and never a result.
    #[test]
    fn wrong_shapes_are_refused(
        (b, n, k, f) in (1usize..4, 1usize..6, 1usize..10, 1usize..10),
        (db, dk) in (0usize..3, 0usize..3),
    ) {
        let device = Device::cpu();
        let x = tensor(&device, "x", &[b, n, k]);
        let w = tensor(&device, "w", &[f, k + dk]);
        let residual = tensor(&device, "residual", &[b + db, n, f]);
        let outcome = ops::gemm(&x, &w, None, None, None, Some(&residual), false, product(0));
        prop_assert_eq!(outcome.is_ok(), db == 0 && dk == 0);
        if let Err(e) = outcome {
            prop_assert!(e.to_string().starts_with("gemm: "), "{}", e);
        }
    }

    /// Attention averages values: with equal values for all tokens it returns them; and it does not depend on the
    /// order of the keys.
    #[test]
    fn attention_is_an_average((b, n, h, e) in (1usize..3, 1usize..40, 1usize..4, 1usize..20)) {
        let device = Device::cpu();
        let mut qkv = draw_f32("property", "qkv", b * n * 3 * h * e, Fill::Normal);
        for (at, value) in qkv.iter_mut().enumerate() {
            if at / (h * e) % 3 == 2 {
                *value = (at % (h * e)) as f32;
            }
        }
        let qkv = Tensor::from_f32(&device, &[b, n, 3, h, e], &qkv).unwrap();
        let settings = contracts::attention::Params { scale: 1.0 / (e as f32).sqrt() };
        let out = ops::attention(&qkv, settings).unwrap().y;
        for (at, value) in out.f32s().unwrap().iter().enumerate() {
            let want = (at % (h * e)) as f32;
            prop_assert!((value - want).abs() <= 1e-4 * (1.0 + want), "{} against {}", value, want);
        }
    }

    /// A checkpointed computation has the gradients of the plain one, bit for bit.
    #[test]
    fn checkpointing_changes_no_bit((b, n, d) in (1usize..4, 1usize..9, 1usize..17)) {
        let device = Device::cpu();
        let (x, w) = (tensor(&device, "x", &[b, n, d]), tensor(&device, "w", &[d, d]));
        let run = |checkpoint: bool| -> Vec<f32> {
            let g = Graph::training(Precision::F32);
            let leaf = g.leaf(x.clone());
            let weight = Var::constant(w.clone());
            let block = move |g: &Graph<'_>, v: &[Var]| g.gemm(&v[0], &weight, None, None, None, Some(&v[0]), product(1));
            let out = if checkpoint { g.checkpoint(&[&leaf], block) } else { block(&g, std::slice::from_ref(&leaf)) }.unwrap();
            let mut grads = g.backward_from(&out, tensor(&device, "dy", &[b, n, d])).unwrap();
            grads.take(&leaf).unwrap().to_vec().unwrap()
        };
        prop_assert_eq!(run(false), run(true));
    }
}
