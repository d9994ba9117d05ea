//! Training on pairs: a folder of them, or a part of it, as noised batches.

use super::{ABOUT, About, Half, PROMPTS, SUM, open};
use crate::autograd::Var;
use crate::error::{Error, Result};
use crate::io::dtype::FileDtype;
use crate::io::hash;
use crate::io::safetensors::TensorFile;
use crate::models::pixart::{MicroConditions, PixArt, Text, TextCondition};
use crate::tensor::{Device, Tensor};
use crate::train::batches::Order;
use crate::train::examples::{Draw, Examples, Stream};
use crate::train::objective::{Noised, noise_batch};
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
        Ok(Pairs { about, shards: Arc::new(shards), range })
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

    fn find(&self, index: usize) -> (&Shard, usize) {
        let global = self.range.start + index;
        (&self.shards[global / self.about.shard], global % self.about.shard)
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
        let (shard, at) = self.find(index);
        Pairs::rows(&shard.latents, "latents", self.about.latent.iter().product(), at..at + 1)
    }

    /// Features of a pair's text, `[L, C]`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn text(&self, index: usize, device: &Device) -> Result<Tensor> {
        let values = self.text_values(Some(index));
        Tensor::from_f32(device, &[values.len() / self.about.features, self.about.features], &values)
    }

    /// Features of the null text, `[L, C]`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn null(&self, device: &Device) -> Result<Tensor> {
        let values = self.text_values(None);
        Tensor::from_f32(device, &[values.len() / self.about.features, self.about.features], &values)
    }

    fn text_values(&self, index: Option<usize>) -> Vec<f32> {
        let width = self.about.features;
        match index {
            Some(index) => {
                let (shard, at) = self.find(index);
                Pairs::rows(&shard.texts, "features", width, shard.rows[at]..shard.rows[at + 1])
            }
            None => {
                let (shard, _) = self.find(0);
                let rows = shard.texts.get("null").map_or(0, |view| view.shape[0]);
                Pairs::rows(&shard.texts, "null", width, 0..rows)
            }
        }
    }

    /// The prompt of a pair.
    pub fn prompt(&self, index: usize) -> String {
        let (shard, at) = self.find(index);
        let prompts = shard.texts.metadata().get(PROMPTS);
        let prompts: Vec<String> = prompts.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        prompts.into_iter().nth(at).unwrap_or_default()
    }
}

impl Examples<PixArt> for Pairs {
    fn count(&self) -> usize {
        self.len()
    }

    fn bytes(&self) -> usize {
        // The files are mapped: what is read of them the system may take back.
        0
    }

    fn digest(&self) -> Result<String> {
        let sums = self.shards.iter().flat_map(|shard| [&shard.texts, &shard.latents]);
        let sums: Vec<&str> = sums.map(|file| file.metadata().get(SUM).map_or("", String::as_str)).collect();
        Ok(hash::sha256(format!("{sums:?} {:?}", self.range).as_bytes()))
    }

    fn check(&self, model: &PixArt) -> Result<()> {
        let c = &model.config;
        let want = ([c.in_channels, c.sample_size, c.sample_size], c.caption_channels);
        if (self.about.latent, self.about.features) == want {
            return Ok(());
        }
        let say = |(latent, width): ([usize; 3], usize)| format!("latents {latent:?}, features of {width}");
        Err(Error::usage("data", "the pairs do not fit the model")
            .is(say((self.about.latent, self.about.features)))
            .must(say(want))
            .fix("make the pairs with the base model, at the size that it was trained at"))
    }

    fn stream(&self, batch: usize, seed: u64) -> Result<Box<dyn Stream<PixArt> + '_>> {
        Ok(Box::new(PairStream { pairs: self, order: Order::new(self.len(), batch, seed)? }))
    }
}

struct PairStream<'p> {
    pairs: &'p Pairs,
    order: Order,
}

impl Stream<PixArt> for PairStream<'_> {
    fn noised(&mut self, model: &PixArt, draw: &Draw<'_>) -> Result<Noised<TextCondition>> {
        let (pairs, device) = (self.pairs, model.device());
        let chosen: Vec<usize> = self.order.at(draw.place).iter().map(|i| *i as usize).collect();
        let [c, h, w] = pairs.about.latent;
        let mut images = device.empty(&[chosen.len(), c, h, w])?;
        images.edit(|images| {
            for (image, index) in images.chunks_mut(c * h * w).zip(&chosen) {
                image.copy_from_slice(&pairs.latent(*index));
            }
        })?;
        noise_batch(device, &images, draw, |dropped| {
            let text = |(index, dropped): (&usize, &bool)| pairs.text_values((!dropped).then_some(*index));
            let texts: Vec<Vec<f32>> = chosen.iter().zip(dropped).map(text).collect();
            condition(model, &texts, [h, w].map(|side| side * pairs.about.factor))
        })
    }
}

/// What a model reads of texts, each `[L, C]`, beside pictures of a size in pixels.
fn condition(model: &PixArt, texts: &[Vec<f32>], pixels: [usize; 2]) -> Result<TextCondition> {
    let (device, width, b) = (model.device(), model.config.caption_channels, texts.len());
    let counts: Vec<usize> = texts.iter().map(|text| text.len() / width).collect();
    let longest = counts.iter().copied().max().unwrap_or(1).max(1);
    let mut features = device.empty(&[b, longest, width])?;
    features.edit(|features| {
        for (row, text) in features.chunks_mut(longest * width).zip(texts) {
            row[..text.len()].copy_from_slice(text);
            row[text.len()..].fill(0.0);
        }
    })?;
    let micro = match model.config.micro_conditions {
        false => None,
        true => {
            let aspect = vec![pixels[0] as f32 / pixels[1] as f32; b];
            let size: Vec<f32> = pixels.map(|side| side as f32).repeat(b);
            Some(MicroConditions {
                size: Tensor::from_f32(device, &[b, 2], &size)?,
                aspect: Tensor::from_f32(device, &[b], &aspect)?,
            })
        }
    };
    Ok(TextCondition { text: Text { features: Var::constant(features), counts, constant: false }, micro })
}

/// Blank pairs for a model, with the longest texts: to rehearse with.
#[derive(Debug)]
pub struct BlankPairs {
    /// How many.
    pub n: usize,
}

impl Examples<PixArt> for BlankPairs {
    fn count(&self) -> usize {
        self.n
    }

    fn bytes(&self) -> usize {
        0
    }

    fn digest(&self) -> Result<String> {
        Ok(String::new())
    }

    fn check(&self, _model: &PixArt) -> Result<()> {
        Ok(())
    }

    fn stream(&self, batch: usize, _seed: u64) -> Result<Box<dyn Stream<PixArt> + '_>> {
        Ok(Box::new(BlankStream { batch }))
    }
}

struct BlankStream {
    batch: usize,
}

impl Stream<PixArt> for BlankStream {
    fn noised(&mut self, model: &PixArt, draw: &Draw<'_>) -> Result<Noised<TextCondition>> {
        let (c, b, device) = (&model.config, self.batch, model.device());
        let images = Tensor::zeros(device, &[b, c.in_channels, c.sample_size, c.sample_size])?;
        noise_batch(device, &images, draw, |_| {
            let text = vec![0.0; c.max_tokens * c.caption_channels];
            condition(model, &vec![text; b], [c.sample_size; 2])
        })
    }
}
