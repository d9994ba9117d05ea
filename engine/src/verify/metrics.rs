//! Family `metrics`: Fréchet distance, precision and recall, inception score on given features, and the features that
//! the Inception network finds in given images.

use super::case::{Case, Values};
use super::checks::{Checks, unknown};
use crate::error::{Error, Result};
use crate::eval::inception::{Inception, resize};
use crate::eval::{Features, frechet, inception_score, precision_recall};
use crate::io::inception;
use crate::io::pictures::Pictures;
use crate::tensor::{Device, Tensor};
use serde_json::Value;

/// Runs the metric that the inputs belong to.
pub fn run(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    if case.has_input("images") {
        return network(case, checks);
    }
    let computed = if case.has_input("features_1") {
        fid(case, checks)?
    } else if case.has_input("logits") {
        score(case)?
    } else if case.has_input("real") {
        support(case, checks)?
    } else {
        return Err(unknown(
            "metric",
            &case.name,
            &["frechet", "inception_features", "inception_score", "precision_recall"],
        ));
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

/// Pixels between those of the resized images that are recorded, by rows and columns.
const RECORDED: [usize; 2] = [37, 41];

/// What the network sees in images `[n, H, W, C]` of bytes, where its weights have been fetched.
fn network(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    let Some(archive) = inception::find()? else {
        checks.skip(inception::ABSENT.into());
        return Ok(());
    };
    let network = Inception::load(&archive, &Device::cpu())?;
    let images = case.input("images")?;
    let &[n, h, w, c] = &images.shape[..] else {
        return Err(Error::failure("images", "wrong rank").is(format!("{:?}", images.shape)).must("[n, H, W, C]"));
    };
    let bytes = images.data.iter().map(|&v| v as u8).collect();
    let pictures = Pictures::new("images", [n, h, w, c], bytes)?;
    let mut resized = resize::resized(network.device(), &pictures, 0..n)?;
    let (shape, values) = every(&resized, RECORDED)?;
    checks.values("resized", &shape, &values)?;
    let channels = case.whole("channels")?;
    resize::normalise(&mut resized)?;
    network.forward(resized, &mut |name, out| {
        let wide: Vec<f64> = out.f32s()?.iter().map(|&v| f64::from(v)).collect();
        let (plane, width) = (out.dim(1) * out.dim(2), out.dim(3));
        let mean = |image: usize, channel: usize| {
            let values = wide[image * plane * width + channel..].iter().step_by(width).take(plane);
            values.sum::<f64>() / plane as f64
        };
        let means: Vec<f64> = (0..n)
            .flat_map(|image| (0..channels.min(width)).map(move |channel| (image, channel)))
            .map(|(i, c)| mean(i, c))
            .collect();
        checks.values(&format!("{name}.mean"), &[n, channels], &means)
    })?;
    let seen = network.read(&pictures, &mut |_| {})?;
    for (name, values) in [("pool3", &seen.pool), ("spatial", &seen.spatial)] {
        let wide: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
        checks.values(name, &[n, values.len() / n], &wide)?;
    }
    Ok(())
}

/// Every so many rows and columns of `[n, H, W, C]`.
fn every(images: &Tensor, [rows, columns]: [usize; 2]) -> Result<(Vec<usize>, Vec<f64>)> {
    let [n, h, w, c] = [0, 1, 2, 3].map(|axis| images.dim(axis));
    let values = images.f32s()?;
    let mut kept = Vec::new();
    for (image, y) in (0..n).flat_map(|image| (0..h).step_by(rows).map(move |y| (image, y))) {
        for x in (0..w).step_by(columns) {
            kept.extend(values[((image * h + y) * w + x) * c..][..c].iter().map(|&v| f64::from(v)));
        }
    }
    Ok((vec![n, h.div_ceil(rows), w.div_ceil(columns), c], kept))
}
