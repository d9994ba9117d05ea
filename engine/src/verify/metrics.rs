//! Family `metrics`: Fréchet distance, precision and recall, inception score on given features.

use super::case::{Case, Values};
use super::checks::{Checks, unknown};
use crate::error::{Error, Result};
use crate::eval::{Features, frechet, inception_score, precision_recall};
use serde_json::Value;

/// Runs the metric that the inputs belong to.
pub fn run(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    let computed = if case.has_input("features_1") {
        fid(case, checks)?
    } else if case.has_input("logits") {
        score(case)?
    } else if case.has_input("real") {
        support(case, checks)?
    } else {
        return Err(unknown("metric", &case.name, &["frechet", "inception_score", "precision_recall"]));
    };
    scalars(case, checks, &computed)
}

/// Compares `expected.json`: each of its fields must have been computed.
fn scalars(case: &Case, checks: &mut Checks<'_>, computed: &[(&str, Vec<f64>)]) -> Result<()> {
    let expected = case.json("expected.json")?;
    for (name, want) in expected.as_object().into_iter().flatten() {
        let want: Option<Vec<f64>> = match want {
            Value::Array(list) => list.iter().map(Value::as_f64).collect(),
            number => number.as_f64().map(|n| vec![n]),
        };
        let got = computed.iter().find(|(n, _)| n == name);
        let (Some(want), Some((_, got))) = (want, got) else {
            checks.verdict(name, Some("expected, but nothing computes it".into()));
            continue;
        };
        if name == "precision" || name == "recall" {
            let problem = (*got != want).then(|| format!("is {got:?}; must be exactly {want:?}"));
            checks.verdict(name, problem);
        } else {
            checks.list(name, got, &want);
        }
    }
    Ok(())
}

fn features<'a>(name: &'a str, values: &Values, data: &'a [f32]) -> Result<Features<'a>> {
    match values.shape[..] {
        [_, dim] => Features::new(name, data, dim),
        _ => Err(Error::failure(name, "wrong rank").is(format!("{:?}", values.shape)).must("[n, D]")),
    }
}

fn fid(case: &Case, checks: &mut Checks<'_>) -> Result<Vec<(&'static str, Vec<f64>)>> {
    let moments = |name: &str| -> Result<frechet::Moments> {
        let values = case.input(name)?;
        Ok(frechet::Moments::from_features(&features(name, &values, &values.f32s())?))
    };
    let (first, second) = (moments("features_1")?, moments("features_2")?);
    for (moments, n) in [(&first, 1), (&second, 2)] {
        let dim = moments.dim();
        checks.values(&format!("mean_{n}"), &[dim], moments.mean())?;
        checks.values(&format!("cov_{n}"), &[dim, dim], moments.covariance())?;
    }
    let found = frechet::frechet_distance(&first, &second)?;
    Ok(vec![
        ("frechet", vec![found.distance]),
        // The same number by another algorithm.
        ("frechet_sqrtm", vec![found.distance]),
        ("mean_term", vec![found.mean_term]),
        ("trace_1", vec![found.trace_1]),
        ("trace_2", vec![found.trace_2]),
        ("trace_sqrt", vec![found.trace_sqrt]),
    ])
}

fn score(case: &Case) -> Result<Vec<(&'static str, Vec<f64>)>> {
    let logits = case.input("logits")?;
    let found = inception_score::inception_score(&features("logits", &logits, &logits.f32s())?, case.whole("splits")?)?;
    Ok(vec![("score", vec![found.mean]), ("std", vec![found.std]), ("per_split", found.per_split)])
}

fn support(case: &Case, checks: &mut Checks<'_>) -> Result<Vec<(&'static str, Vec<f64>)>> {
    let k = case.whole("k")?;
    let (real, generated) = (case.input("real")?, case.input("generated")?);
    let (real_data, generated_data) = (real.f32s(), generated.f32s());
    let real = features("real", &real, &real_data)?;
    let generated = features("generated", &generated, &generated_data)?;
    for (name, centres, others, other) in
        [("real", real, generated, "generated"), ("generated", generated, real, "real")]
    {
        let support = precision_recall::Support::new(centres, k)?;
        let radii = support.radii();
        checks.values(&format!("radii_{name}"), &[radii.len()], &radii)?;
        let inside: Vec<f64> = support.contains(&others)?.into_iter().map(f64::from).collect();
        checks.values(&format!("{other}_inside"), &[inside.len()], &inside)?;
    }
    let found = precision_recall::precision_recall(&real, &generated, k)?;
    Ok(vec![("precision", vec![found.precision]), ("recall", vec![found.recall])])
}
