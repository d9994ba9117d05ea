//! Inception score (arXiv 1606.03498): exp of the mean divergence of each image's class distribution from the average.

use crate::error::{Error, Result};
use crate::eval::Features;

/// Score over equal consecutive parts of a set.
#[derive(Clone, Debug, PartialEq)]
pub struct InceptionScore {
    /// Mean over the parts.
    pub mean: f64,
    /// Population standard deviation over the parts (denominator: their number).
    pub std: f64,
    /// Score of every part.
    pub per_split: Vec<f64>,
}

/// Inception score from classifier logits [n, classes], in `splits` equal consecutive parts (usually 10).
///
/// # Errors
/// A usage error when `splits` is 0 or does not divide n.
pub fn inception_score(logits: &Features, splits: usize) -> Result<InceptionScore> {
    let n = logits.len();
    if splits == 0 || !n.is_multiple_of(splits) {
        return Err(Error::usage("splits", format!("{n} images do not split evenly"))
            .is(splits)
            .must(format!("a divisor of {n}"))
            .fix("use 1 split, or another number of images"));
    }
    let part = n / splits * logits.dim();
    let per_split: Vec<f64> = logits.data().chunks_exact(part).map(|rows| score(rows, logits.dim())).collect();
    let mean = per_split.iter().sum::<f64>() / splits as f64;
    let variance = per_split.iter().map(|s| (s - mean) * (s - mean)).sum::<f64>() / splits as f64;
    Ok(InceptionScore { mean, std: variance.sqrt(), per_split })
}

/// exp(mean over rows of KL(p ‖ mean p)) = exp(entropy of the mean - mean entropy).
fn score(logits: &[f32], classes: usize) -> f64 {
    let rows = (logits.len() / classes) as f64;
    let mut average = vec![0.0; classes];
    let mut negative_entropy = 0.0;
    for row in logits.chunks_exact(classes) {
        let largest = row.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(f64::from(x)));
        let log_sum = row.iter().map(|&x| (f64::from(x) - largest).exp()).sum::<f64>().ln() + largest;
        for (average, &x) in average.iter_mut().zip(row) {
            let log_p = f64::from(x) - log_sum;
            let p = log_p.exp();
            *average += p / rows;
            negative_entropy += p * log_p / rows;
        }
    }
    // A class nobody predicts contributes nothing.
    let average_entropy: f64 = average.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum();
    (average_entropy + negative_entropy).exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::golden::{Case, numbers};

    #[test]
    fn golden_cases() {
        for case in ["metrics/inception_score", "metrics/inception_score_splits"] {
            let case = Case::open(case);
            let info = case.json("case.json");
            let number = |name: &str| info["config"][name].as_u64().unwrap() as usize;
            let tolerance = info["tolerance"]["score (float64)"]["rel"].as_f64().unwrap();
            let logits = case.input_f32("logits");
            let logits = Features::new("logits", &logits, number("classes")).unwrap();
            assert_eq!(logits.len(), number("n"));
            let got = inception_score(&logits, number("splits")).unwrap();
            let want = case.json("expected.json");
            let mut pairs = vec![(got.mean, want["score"].as_f64().unwrap()), (got.std, want["std"].as_f64().unwrap())];
            pairs.extend(got.per_split.iter().copied().zip(numbers(&want["per_split"])));
            assert_eq!(pairs.len(), 2 + number("splits"));
            for (got, want) in pairs {
                assert!((got - want).abs() <= tolerance * want, "{got} {want}");
            }
        }
    }

    #[test]
    fn extremes() {
        // Certain and all different: as many as classes. All the same: one. Huge logits must not overflow.
        let certain = [1e30, 0.0, 0.0, 0.0, 1e30, 0.0, 0.0, 0.0, 1e30];
        let score = |data: &[f32], splits| inception_score(&Features::new("logits", data, 3).unwrap(), splits).unwrap();
        assert!((score(&certain, 1).mean - 3.0).abs() < 1e-12);
        assert_eq!(score(&certain, 3).per_split, [1.0; 3]);
        assert!((score(&[0.3; 12], 2).mean - 1.0).abs() < 1e-12);
    }

    #[test]
    fn uneven_splits_are_refused() {
        let logits = Features::new("logits", &[0.0; 20], 2).unwrap();
        for splits in [0, 3, 20] {
            assert_eq!(inception_score(&logits, splits).unwrap_err().exit_code(), 2);
        }
    }
}
