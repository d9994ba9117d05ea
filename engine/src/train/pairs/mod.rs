//! Pairs of latents and text features on disk, as a text-to-image model makes them for its own graft, and what trains
//! on them.
//!
//! | in the folder | what |
//! |---|---|
//! | `pairs.json` | what made them, and how many there are; written first |
//! | `texts-00000.safetensors` | of a shard: `features [ΣL, C]`, `counts [n]` of tokens, `null [L, C]`; prompts in the metadata |
//! | `latents-00000.safetensors` | of a shard: `latents [n, C, H, W]` |
//!
//! Every file appears whole and says whom it belongs to and what the sum of its tensors is; a shard whose two files are
//! there is complete.

mod stream;

pub use stream::Pairs;

use crate::error::{Error, Result};
use crate::io::dtype::FileDtype;
use crate::io::safetensors::{self, TensorFile, TensorRecord};
use crate::io::{hash, json};
use crate::sample::solver::Prediction;
use crate::tensor::{Device, Tensor};
use half::bf16;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The file that says what a folder of pairs holds.
pub const ABOUT: &str = "pairs.json";

const BELONGS: &str = "graft.pairs.identity";
const SHARD: &str = "graft.pairs.shard";
const SUM: &str = "graft.pairs.sha256";
const PROMPTS: &str = "graft.pairs.prompts";

/// What made the pairs of a folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// Digest of the transformer.
    pub transformer: String,
    /// Digest of the prompts in their order.
    pub prompts: String,
    /// Pairs in all.
    pub count: usize,
    /// Pairs in a shard; the last may have fewer.
    pub shard: usize,
    /// Channels, height and width of a latent.
    pub latent: [usize; 3],
    /// Width of the text features.
    pub features: usize,
    /// Pixels along a side of a latent's pixel.
    pub factor: usize,
    /// Seed of the first latent; that of the i-th is i higher.
    pub seed: u64,
    /// Sampler, steps, guidance and whatever else a latent depends on, as text.
    pub sampling: String,
    /// `f32` or `bf16`.
    pub dtype: String,
    /// What the transformer predicts.
    #[serde(default)]
    pub prediction: Prediction,
}

impl About {
    /// Number of shards.
    pub fn shards(&self) -> usize {
        self.count.div_ceil(self.shard.max(1))
    }

    /// Numbers of the pairs of a shard.
    pub fn range(&self, shard: usize) -> Range<usize> {
        let start = shard * self.shard;
        start..(start + self.shard).min(self.count)
    }

    /// What every file of the folder must state.
    fn identity(&self) -> String {
        hash::sha256(serde_json::json!(self).to_string().as_bytes())
    }

    /// Reads what a folder holds; nothing where it holds no pairs.
    ///
    /// # Errors
    /// A damaged file.
    pub fn read(folder: &Path) -> Result<Option<About>> {
        let path = folder.join(ABOUT);
        if !path.is_file() {
            return Ok(None);
        }
        let about: About = serde_json::from_value(json::read(&path)?).map_err(|e| {
            Error::failure(path.display().to_string(), format!("does not say what the pairs are: {e}"))
                .must("the file that `graft synthesize` writes")
        })?;
        if about.shard == 0 || about.count == 0 || about.latent.contains(&0) || about.factor == 0 {
            return Err(Error::failure(path.display().to_string(), "impossible numbers")
                .is(format!("{} pairs in shards of {}, latents {:?}", about.count, about.shard, about.latent))
                .must("positive"));
        }
        Ok(Some(about))
    }

    /// Writes it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        json::write(&folder.join(ABOUT), &serde_json::json!(self))
    }
}

/// One of the two files of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// Text features.
    Texts,
    /// Latents.
    Latents,
}

impl Half {
    /// Its file.
    pub fn path(self, folder: &Path, shard: usize) -> PathBuf {
        let name = if self == Half::Texts { "texts" } else { "latents" };
        folder.join(format!("{name}-{shard:05}.safetensors"))
    }
}

/// Text features of a shard.
#[derive(Clone, Debug)]
pub struct ShardTexts {
    /// The prompts themselves.
    pub prompts: Vec<String>,
    /// `[L, C]` of each.
    pub features: Vec<Tensor>,
    /// `[L, C]` of the null text.
    pub null: Tensor,
}

/// Writes a half of a shard, all or nothing.
fn write(
    about: &About,
    folder: &Path,
    half: Half,
    shard: usize,
    records: Vec<TensorRecord<'_>>,
    more: Option<(&str, String)>,
) -> Result<()> {
    let mut metadata = BTreeMap::from([
        (BELONGS.to_string(), about.identity()),
        (SHARD.to_string(), shard.to_string()),
        (SUM.to_string(), sum(records.iter().map(|r| (r.name.as_str(), &r.bytes[..])))),
    ]);
    metadata.extend(more.map(|(key, value)| (key.to_string(), value)));
    safetensors::write(&half.path(folder, shard), records, &metadata)
}

/// Digest of tensors by name.
fn sum<'t>(tensors: impl Iterator<Item = (&'t str, &'t [u8])>) -> String {
    let mut found: Vec<(&str, String)> = tensors.map(|(name, bytes)| (name, hash::sha256(bytes))).collect();
    found.sort_unstable();
    hash::sha256(format!("{found:?}").as_bytes())
}

fn record<'v>(about: &About, name: &str, shape: &[usize], values: &'v [f32]) -> TensorRecord<'v> {
    if about.dtype != "bf16" {
        return TensorRecord::f32(name, shape, values);
    }
    let bytes = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
    TensorRecord { name: name.to_string(), dtype: FileDtype::Bf16, shape: shape.to_vec(), bytes: Cow::Owned(bytes) }
}

/// Writes the texts of a shard, all or nothing.
///
/// # Errors
/// A full disk, or a folder that cannot be written.
pub fn write_texts(about: &About, folder: &Path, shard: usize, texts: &ShardTexts) -> Result<()> {
    let mut values = Vec::new();
    for features in &texts.features {
        values.extend_from_slice(&features.values()?);
    }
    let counts: Vec<i64> = texts.features.iter().map(|features| features.dim(0) as i64).collect();
    let rows = counts.iter().sum::<i64>() as usize;
    let null = texts.null.values()?;
    let records = vec![
        record(about, "features", &[rows, about.features], &values),
        record(about, "null", &[texts.null.dim(0), about.features], &null),
        TensorRecord::i64("counts", &[counts.len()], &counts),
    ];
    let prompts = serde_json::json!(texts.prompts).to_string();
    write(about, folder, Half::Texts, shard, records, Some((PROMPTS, prompts)))
}

/// Writes the latents `[n, C, H, W]` of a shard, all or nothing.
///
/// # Errors
/// A value that is not finite, a full disk, or a folder that cannot be written.
pub fn write_latents(about: &About, folder: &Path, shard: usize, latents: &Tensor) -> Result<()> {
    let values = latents.values()?;
    if let Some(value) = values.iter().find(|v| !v.is_finite()) {
        let place = Half::Latents.path(folder, shard).display().to_string();
        return Err(Error::failure(place, "a latent is not finite").is(value).must("finite").fix("check the weights"));
    }
    let records = vec![record(about, "latents", latents.shape().dims(), &values)];
    write(about, folder, Half::Latents, shard, records, None)
}

/// Opens a half of a shard that is there, and checks it to the last byte.
///
/// # Errors
/// A file that is damaged, or of other pairs.
pub fn open(about: &About, folder: &Path, half: Half, shard: usize) -> Result<TensorFile> {
    let path = half.path(folder, shard);
    let damaged = |problem: &str| {
        Error::failure(path.display().to_string(), problem)
            .fix("remove the file and run `graft synthesize` again: only what is missing is made")
    };
    let file = TensorFile::open(&path).map_err(|e| e.context("damaged shard"))?;
    let stated = |key: &str| file.metadata().get(key).map_or("nothing", String::as_str);
    if (stated(BELONGS), stated(SHARD)) != (about.identity().as_str(), shard.to_string().as_str()) {
        return Err(damaged("shard of other pairs").is(stated(BELONGS)).must(about.identity()));
    }
    let names: Vec<String> = file.names().map(str::to_string).collect();
    let views: Vec<_> = names.iter().filter_map(|name| file.get(name)).collect();
    let found = sum(views.iter().map(|view| (view.name, view.bytes)));
    if found != stated(SUM) {
        return Err(damaged("damaged shard").is(format!("a sum of {found:.16}")).must(format!("{:.16}", stated(SUM))));
    }
    let ([c, h, w], n) = (about.latent, about.range(shard).len());
    let fits = match half {
        Half::Latents => file.get("latents").is_some_and(|v| v.shape == [n, c, h, w]),
        Half::Texts => {
            let wide = |name: &str| {
                file.get(name).is_some_and(|v| matches!(v.shape, [rows, w] if *rows > 0 && *w == about.features))
            };
            let counts = file.get("counts").map(|v| v.to_i64()).transpose()?.unwrap_or_default();
            let rows: i64 = counts.iter().fold(0, |sum, count| sum.saturating_add(*count));
            let all = file.get("features").map_or(0, |v| v.shape[0] as i64);
            wide("features") && wide("null") && counts.len() == n && counts.iter().all(|c| *c > 0) && rows == all
        }
    };
    if !fits {
        return Err(damaged("tensors do not fit the pairs").must(format!("{n} of latents {:?}", about.latent)));
    }
    Ok(file)
}

/// Reads the texts of a shard.
///
/// # Errors
/// As [`open`].
pub fn read_texts(about: &About, folder: &Path, shard: usize, device: &Device) -> Result<ShardTexts> {
    let file = open(about, folder, Half::Texts, shard)?;
    let prompts = file.metadata().get(PROMPTS).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let values = |name: &str| file.get(name).map_or(Ok(Vec::new()), |view| view.to_f32());
    let counts = file.get("counts").map_or(Ok(Vec::new()), |view| view.to_i64())?;
    let (all, width) = (values("features")?, about.features);
    let (mut features, mut start) = (Vec::with_capacity(counts.len()), 0);
    for count in counts {
        let len = count as usize * width;
        features.push(Tensor::from_f32(device, &[count as usize, width], &all[start..start + len])?);
        start += len;
    }
    let null = values("null")?;
    Ok(ShardTexts { prompts, features, null: Tensor::from_f32(device, &[null.len() / width, width], &null)? })
}
