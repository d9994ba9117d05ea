//! Scores of samples beside those of real images.

use super::real::Real;
use super::source::Source;
use super::{Args, Space};
use crate::cli::{out, progress, table::Table};
use crate::error::{Error, Result};
use crate::eval::classifier::Classifier;
use crate::eval::inception::{Inception, Seen, cache};
use crate::eval::samples::Samples;
use crate::eval::score::{Baseline, Reference, Score, read_pictures};
use crate::eval::standard::{ENOUGH, LogitsLayer, StandardScore, Target};
use crate::io::datasets::Split;
use crate::io::inception;
use crate::io::pictures::Pictures;
use crate::report::format::{percent, significant};
use crate::tensor::Device;
use serde_json::{Value, json};

/// Runs the command.
pub fn run(args: &Args, as_json: bool) -> Result<()> {
    let sets = args.sets()?;
    let real = Real::parse(&args.reference)?;
    if args.logits.is_some() && args.features == Space::Classifier {
        return Err(Error::usage("--logits", "it belongs to the Inception network").must("with --features inception"));
    }
    let device = Device::cpu();
    let source = Source::open(args, &device)?;
    // Before any sampling: whether the images fit is found out quickly.
    let small = match args.features {
        Space::Classifier => Some(Small::open(args, &real, &source, &device)?),
        Space::Inception => None,
    };
    if !source.prepare(args, &sets, as_json)? {
        return Ok(());
    }
    let space: Box<dyn Scores> = match small {
        Some(small) => Box::new(small),
        None => Box::new(Standard::open(args, &real, &source, &device)?),
    };
    let mut rows = Vec::new();
    for &set in &sets {
        rows.push(source.with_samples(args, set, |samples| space.score(samples))?);
    }
    if !as_json {
        return out::line(text(space.as_ref(), &rows, source.count(args)));
    }
    let (mean, sd) = space.summary(&rows);
    let mut record = json!({
        "model": args.model.display().to_string(),
        "reference": args.reference,
        "features": space.name(),
        "seed": sets[0].1,
        "samples": mean,
        "real": space.real(),
    });
    if matches!(source, Source::Model(_)) {
        record["sampler"] = json!(args.sampler);
        record["steps"] = json!(args.steps);
        record["guidance_scale"] = json!(args.guidance_scale);
    }
    if rows.len() > 1 {
        record["sets"] = sets.iter().map(|s| s.0).collect();
        record["scores"] = rows.iter().map(|row| space.record(row)).collect();
        record["sd"] = sd;
    }
    out::line(format_args!("{record:#}"))
}

/// A score in one of the feature spaces.
enum Row {
    Small(Score),
    Standard(StandardScore),
}

/// A feature space with a reference in it.
trait Scores {
    fn name(&self) -> &'static str;
    fn head(&self) -> Vec<&'static str>;
    fn cells(&self, row: &Row) -> Vec<String>;
    fn score(&self, samples: &Samples) -> Result<Row>;
    /// Rows of real images: name and score.
    fn real_rows(&self) -> Vec<(String, Row)>;
    /// What the rows of real images are, or why there are none.
    fn real_note(&self) -> String;
    fn real(&self) -> Value;
    /// Mean and spread.
    fn summary_rows(&self, rows: &[Row]) -> (Row, Row);

    fn record(&self, row: &Row) -> Value {
        match row {
            Row::Small(score) => json!(score),
            Row::Standard(score) => json!(score),
        }
    }

    fn summary(&self, rows: &[Row]) -> (Value, Value) {
        let (mean, sd) = self.summary_rows(rows);
        (self.record(&mean), self.record(&sd))
    }
}

/// The scores as a table.
fn text(space: &dyn Scores, rows: &[Row], n: usize) -> String {
    let mut table = Table::new(&[&[""], &space.head()[..]].concat());
    let mut add = |name: &str, row: &Row| table.row(std::iter::once(name.to_string()).chain(space.cells(row)));
    let (mean, sd) = space.summary_rows(rows);
    add("samples", &mean);
    if rows.len() > 1 {
        add("  spread ±", &sd);
    }
    space.real_rows().iter().for_each(|(name, row)| add(name, row));
    let sets = if rows.len() > 1 { format!("{} sets of {n} samples", rows.len()) } else { format!("{n} samples") };
    let mut text = format!("{table}{sets}; {}", space.real_note());
    if n < ENOUGH {
        text += &format!(
            "\na Fréchet distance of fewer than {ENOUGH} samples is mostly bias: read it beside real images, or compare kernel distances"
        );
    }
    text
}

fn optional(value: Option<f64>, show: fn(f64) -> String) -> String {
    value.filter(|v| !v.is_nan()).map_or("-".into(), show)
}

/// The space of the small classifier.
struct Small {
    classifier: Classifier,
    reference: Reference,
    baseline: Option<Baseline>,
}

impl Small {
    fn open(args: &Args, real: &Real, source: &Source, device: &Device) -> Result<Small> {
        let classifier = Classifier::load(&args.classifier, device)?;
        check(source, &classifier)?;
        if let Some((_, place)) = real.statistics()? {
            return Err(Error::usage("--ref", "statistics of the Inception network")
                .is(place)
                .must("with --features inception"));
        }
        let seed = args.sets()?[0].1;
        let reference = match real {
            Real::Set(data) if args.ref_n.is_none() => Reference::new(&classifier, &data.load(Split::Train)?, seed)?,
            _ => Reference::of_pictures(&classifier, &real.pictures(args.ref_n)?, seed)?,
        };
        let baseline = match real {
            Real::Set(data) => Some(reference.baseline(&classifier, &data.load(Split::Test)?, source.count(args))?),
            _ => None,
        };
        Ok(Small { classifier, reference, baseline })
    }
}

fn check(source: &Source, classifier: &Classifier) -> Result<()> {
    let (channels, side, classes) = match source {
        Source::Model(model) => (model.config.in_channels, [model.config.input_size; 2], model.config.classes),
        Source::Ready(samples) => {
            let p = &samples.pictures;
            (p.channels, [p.height, p.width], classifier.classes())
        }
    };
    if (channels, side, classes) != (1, [28, 28], classifier.classes()) {
        return Err(Error::usage("model", "does not make the images that the classifier reads")
            .is(format!("{channels} channels of {} x {} in {classes} classes", side[0], side[1]))
            .must(format!("1 channel of 28 x 28 in {} classes, or --features inception", classifier.classes())));
    }
    Ok(())
}

impl Scores for Small {
    fn name(&self) -> &'static str {
        "classifier"
    }

    fn head(&self) -> Vec<&'static str> {
        vec!["Fréchet", "kernel", "precision", "recall", "right class"]
    }

    fn cells(&self, row: &Row) -> Vec<String> {
        let Row::Small(s) = row else { return Vec::new() };
        let [precision, recall] = [s.precision, s.recall].map(percent);
        vec![significant(s.frechet), significant(s.kid), precision, recall, optional(Some(s.agreement), percent)]
    }

    fn score(&self, samples: &Samples) -> Result<Row> {
        let reading = read_pictures(&self.classifier, &samples.pictures)?;
        Ok(Row::Small(self.reference.score(&reading, &samples.labels)?))
    }

    fn real_rows(&self) -> Vec<(String, Row)> {
        let Some(b) = &self.baseline else { return Vec::new() };
        vec![("real images".into(), Row::Small(b.mean)), ("  spread ±".into(), Row::Small(b.sd))]
    }

    fn real_note(&self) -> String {
        match &self.baseline {
            None => "no other real images to hold them to".into(),
            Some(b) => {
                let shared = if b.disjoint { "disjoint" } else { "overlapping" };
                format!("real images: mean and spread over {} {shared} splits of as many", b.splits)
            }
        }
    }

    fn real(&self) -> Value {
        json!(self.baseline)
    }

    fn summary_rows(&self, rows: &[Row]) -> (Row, Row) {
        let scores: Vec<Score> =
            rows.iter().filter_map(|r| if let Row::Small(s) = r { Some(*s) } else { None }).collect();
        let (mean, sd) = Score::summary(&scores);
        (Row::Small(mean), Row::Small(sd))
    }
}

/// The space of the Inception network.
struct Standard<'a> {
    args: &'a Args,
    network: Inception,
    target: Target,
    logits: Option<LogitsLayer>,
    real: Option<StandardScore>,
    note: String,
}

impl<'a> Standard<'a> {
    fn open(args: &'a Args, real: &Real, source: &Source, device: &Device) -> Result<Standard<'a>> {
        let archive = match &args.network {
            Some(path) => path.clone(),
            None => inception::find()?
                .ok_or_else(|| Error::failure("--features inception", "no network").fix(inception::ABSENT))?,
        };
        let network = Inception::load(&archive, device)?;
        let logits = args.logits.as_deref().map(|path| LogitsLayer::load(path, device)).transpose()?;
        let n = source.count(args);
        let target = match real.statistics()? {
            Some((npz, place)) => Target::of_statistics(&npz, &place)?,
            None => Target::of_pictures(see(args, &network, &real.pictures(args.ref_n)?, "reference")?)?,
        };
        let mut space =
            Standard { args, network, target, logits, real: None, note: "no other real images to hold them to".into() };
        if let Real::Set(data) = real {
            let test = data.load(Split::Test)?;
            if test.n < n {
                space.note = format!("no row of real images: there are only {} held-out ones", test.n);
            } else {
                let seen = see(args, &space.network, &Pictures::of_set(&test, 0..n)?, "real")?;
                space.real = Some(space.target.score(&seen, space.logits.as_ref(), args.sets()?[0].1)?);
                space.note = "real images: as many held-out ones".into();
            }
        }
        Ok(space)
    }
}

fn see(args: &Args, network: &Inception, pictures: &Pictures, what: &str) -> Result<Seen> {
    let bar = progress::bar(pictures.n as u64, what);
    let seen = cache::read(network, pictures, args.cache.as_deref(), &mut |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    Ok(seen)
}

impl Scores for Standard<'_> {
    fn name(&self) -> &'static str {
        "inception"
    }

    fn head(&self) -> Vec<&'static str> {
        let mut head = vec!["FID", "sFID", "KID", "KID ±", "precision", "recall"];
        head.extend(self.logits.as_ref().map(|_| "IS"));
        head
    }

    fn cells(&self, row: &Row) -> Vec<String> {
        let Row::Standard(s) = row else { return Vec::new() };
        let mut cells = vec![significant(s.fid)];
        cells.extend([s.sfid, s.kid, s.kid_sd].map(|v| optional(v, significant)));
        cells.extend([s.precision, s.recall].map(|v| optional(v, percent)));
        cells.extend(self.logits.as_ref().map(|_| optional(s.inception_score, significant)));
        cells
    }

    fn score(&self, samples: &Samples) -> Result<Row> {
        let seen = see(self.args, &self.network, &samples.pictures, "samples")?;
        Ok(Row::Standard(self.target.score(&seen, self.logits.as_ref(), self.args.sets()?[0].1)?))
    }

    fn real_rows(&self) -> Vec<(String, Row)> {
        self.real.iter().map(|s| ("real images".to_string(), Row::Standard(*s))).collect()
    }

    fn real_note(&self) -> String {
        self.note.clone()
    }

    fn real(&self) -> Value {
        json!(self.real)
    }

    fn summary_rows(&self, rows: &[Row]) -> (Row, Row) {
        let scores: Vec<StandardScore> =
            rows.iter().filter_map(|r| if let Row::Standard(s) = r { Some(*s) } else { None }).collect();
        let (mean, sd) = StandardScore::summary(&scores);
        (Row::Standard(mean), Row::Standard(sd))
    }
}
