//! Training on pairs: a folder of them, or a part of it, as noised batches.

use super::{ABOUT, About, Half, PROMPTS, SUM, open};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::{Error, Result};
use crate::io::dtype::FileDtype;
use crate::io::hash;
use crate::io::safetensors::TensorFile;
use crate::models::pixart::{MicroConditions, PixArt, PixArtConfig, TextCondition};
use crate::sample::solver::Prediction;
use crate::tensor::{Device, Tensor};
use crate::train::batches::Examples;
use crate::train::learner::{Learner, Step};
use crate::train::objective::{Noised, noise_batch};
use crate::train::sites::{Draw, SiteLearner, site_loss};
use crate::train::teacher::{Teacher, Terms};
use crate::train::text::pad;
use half::bf16;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A shard that is mapped into memory.
#[derive(Debug)]
struct Shard {
    latents: TensorFile,
    texts: TensorFile,
    /// First row of every text, and the end of the last.
    rows: Vec<usize>,
}

/// The pairs of a folder, or a part of them.
#[derive(Clone, Debug)]
pub struct Pairs {
    /// What made them.
    pub about: About,
    shards: Arc<Vec<Shard>>,
    range: Range<usize>,
    /// Tokens of every text, where there are no shards and all values are zero: to rehearse with.
    blank: usize,
}

impl Pairs {
    /// Opens a complete folder and checks every byte.
    ///
    /// # Errors
    /// A folder without pairs, a shard that is missing or damaged.
    pub fn open(folder: &Path) -> Result<Pairs> {
        let about = About::read(folder)?.ok_or_else(|| {
            Error::usage(folder.display().to_string(), "no pairs")
                .is(format!("no {ABOUT}"))
                .must("a folder that `graft synthesize` has filled")
                .fix("run `graft synthesize --model BASE --prompts FILE -o DIR`, and name that folder")
        })?;
        let mut shards = Vec::new();
        for shard in 0..about.shards() {
            for half in [Half::Texts, Half::Latents] {
                let path = half.path(folder, shard);
                if !path.is_file() {
                    return Err(Error::failure(path.display().to_string(), "missing shard")
                        .must(format!("there: {} shards of {} pairs", about.shards(), about.count))
                        .fix("run `graft synthesize` again: it makes what is missing"));
                }
            }
            let texts = open(&about, folder, Half::Texts, shard)?;
            let latents = open(&about, folder, Half::Latents, shard)?;
            let counts = texts.get("counts").map_or(Ok(Vec::new()), |view| view.to_i64())?;
            let mut rows = vec![0];
            for count in counts {
                rows.push(rows.last().copied().unwrap_or(0) + count as usize);
            }
            shards.push(Shard { latents, texts, rows });
        }
        let range = 0..about.count;
        Ok(Pairs { about, shards: Arc::new(shards), range, blank: 0 })
    }

    /// All but the last tenth, to train on, and that tenth (at least one pair), to be kept back.
    ///
    /// # Errors
    /// Fewer than two pairs.
    pub fn split(self) -> Result<[Pairs; 2]> {
        let n = self.range.len();
        if n < 2 {
            return Err(Error::usage("data", "too few pairs").is(n).must("at least 2: one is kept back"));
        }
        let at = self.range.end - (n / 10).max(1);
        let part = |range: Range<usize>| Pairs { range, ..self.clone() };
        Ok([part(self.range.start..at), part(at..self.range.end)])
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Seed of the latent of a pair.
    pub fn seed(&self, index: usize) -> u64 {
        self.about.seed.wrapping_add((self.range.start + index) as u64)
    }

    /// The shard of a pair and its number there; nothing where all are blank.
    fn find(&self, index: usize) -> Option<(&Shard, usize)> {
        let global = self.range.start + index;
        Some((self.shards.get(global / self.about.shard)?, global % self.about.shard))
    }

    /// Rows `from..to` of a tensor of a file that was checked.
    fn rows(file: &TensorFile, name: &str, row: usize, range: Range<usize>) -> Vec<f32> {
        let Some(view) = file.get(name) else { return Vec::new() };
        let bytes = view.dtype.bits() / 8;
        let part = &view.bytes[range.start * row * bytes..range.end * row * bytes];
        match view.dtype {
            FileDtype::Bf16 => part.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            _ => part.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        }
    }

    /// Values of a pair's latent.
    fn latent(&self, index: usize) -> Vec<f32> {
        let len = self.about.latent.iter().product();
        match self.find(index) {
            Some((shard, at)) => Pairs::rows(&shard.latents, "latents", len, at..at + 1),
            None => vec![0.0; len],
        }
    }

    /// Features of a pair's text, `[L, C]`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn text(&self, index: usize, device: &Device) -> Result<Tensor> {
        let read = |(shard, at): (&Shard, usize)| {
            Pairs::rows(&shard.texts, "features", self.about.features, shard.rows[at]..shard.rows[at + 1])
        };
        self.features(self.find(index).map(read), device)
    }

    /// Features of the null text, `[L, C]`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn null(&self, device: &Device) -> Result<Tensor> {
        let read = |shard: &Shard| {
            let rows = shard.texts.get("null").map_or(0, |view| view.shape[0]);
            Pairs::rows(&shard.texts, "null", self.about.features, 0..rows)
        };
        self.features(self.shards.first().map(read), device)
    }

    fn features(&self, values: Option<Vec<f32>>, device: &Device) -> Result<Tensor> {
        let width = self.about.features;
        match values {
            Some(values) => Tensor::from_f32(device, &[values.len() / width, width], &values),
            None => Tensor::zeros(device, &[self.blank, width]),
        }
    }

    /// The prompt of a pair.
    pub fn prompt(&self, index: usize) -> String {
        let Some((shard, at)) = self.find(index) else { return String::new() };
        let prompts = shard.texts.metadata().get(PROMPTS);
        let prompts: Vec<String> = prompts.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        prompts.into_iter().nth(at).unwrap_or_default()
    }
}

impl Examples for Pairs {
    fn count(&self) -> usize {
        self.len()
    }
}

impl Learner for PixArt {
    type Data = Pairs;
    type Teacher = Teacher<PixArt>;

    fn device(&self) -> &Device {
        PixArt::device(self)
    }

    fn stores(&self) -> Vec<&ParamStore> {
        vec![&self.params]
    }

    fn stores_mut(&mut self) -> Vec<&mut ParamStore> {
        vec![&mut self.params]
    }

    fn loss<'m>(
        &'m self,
        g: &Graph<'m>,
        step: &Step<'_, Pairs>,
        teacher: Option<&Teacher<PixArt>>,
    ) -> Result<(Var, Option<Terms>)> {
        site_loss(g, self, step, teacher)
    }

    fn duplicate(&self) -> Result<PixArt> {
        PixArt::duplicate(self)
    }
}

impl SiteLearner for PixArt {
    fn noised(&self, pairs: &Pairs, chosen: &[u32], draw: &Draw<'_>) -> Result<Noised<TextCondition>> {
        let (device, [c, h, w]) = (PixArt::device(self), pairs.about.latent);
        let mut images = device.empty(&[chosen.len(), c, h, w])?;
        images.edit(|images| {
            for (image, index) in images.chunks_mut(c * h * w).zip(chosen) {
                image.copy_from_slice(&pairs.latent(*index as usize));
            }
        })?;
        let noised = noise_batch(device, &images, draw, |dropped| {
            let text = |(index, dropped): (&u32, &bool)| match dropped {
                true => pairs.null(device),
                false => pairs.text(*index as usize, device),
            };
            let texts: Vec<Tensor> = chosen.iter().zip(dropped).map(text).collect::<Result<_>>()?;
            let text = pad(device, &texts.iter().collect::<Vec<_>>())?;
            Ok(TextCondition { text, micro: micro(self, pairs, chosen.len())? })
        })?;
        noised.towards(pairs.about.prediction, draw.schedule)
    }

    fn check(&self, pairs: &Pairs) -> Result<()> {
        let c = &self.config;
        let want = ([c.in_channels, c.sample_size, c.sample_size], c.caption_channels);
        if (pairs.about.latent, pairs.about.features) == want {
            return Ok(());
        }
        let say = |(latent, width): ([usize; 3], usize)| format!("latents {latent:?}, features of {width}");
        Err(Error::usage("data", "the pairs do not fit the model")
            .is(say((pairs.about.latent, pairs.about.features)))
            .must(say(want))
            .fix("make the pairs with the base model, at the size that it was trained at"))
    }

    fn bytes(_pairs: &Pairs) -> usize {
        // The files are mapped: what is read of them the system may take back.
        0
    }

    fn digest(pairs: &Pairs) -> String {
        let sums = pairs.shards.iter().flat_map(|shard| [&shard.texts, &shard.latents]);
        let sums: Vec<&str> = sums.map(|file| file.metadata().get(SUM).map_or("", String::as_str)).collect();
        hash::sha256(format!("{sums:?} {:?}", pairs.range).as_bytes())
    }

    fn blank(config: &PixArtConfig, n: usize) -> Pairs {
        let side = config.sample_size;
        let about = About {
            transformer: String::new(),
            prompts: String::new(),
            count: n,
            shard: n.max(1),
            latent: [config.in_channels, side, side],
            features: config.caption_channels,
            factor: 1,
            seed: 0,
            sampling: String::new(),
            dtype: "f32".into(),
            prediction: Prediction::Noise,
        };
        Pairs { about, shards: Arc::new(Vec::new()), range: 0..n, blank: config.max_tokens }
    }
}

/// Size and aspect ratio of the pairs' pictures, where the model is told them.
fn micro(model: &PixArt, pairs: &Pairs, batch: usize) -> Result<Option<MicroConditions>> {
    if !model.config.micro_conditions {
        return Ok(None);
    }
    let [_, height, width] = pairs.about.latent;
    let pixels = [height, width].map(|side| (side * pairs.about.factor) as f32);
    let device = PixArt::device(model);
    Ok(Some(MicroConditions {
        size: Tensor::from_f32(device, &[batch, 2], &pixels.repeat(batch))?,
        aspect: Tensor::from_f32(device, &[batch], &vec![pixels[0] / pixels[1]; batch])?,
    }))
}
