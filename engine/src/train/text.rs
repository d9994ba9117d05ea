//! Training of models that read text: a transformer with its text encoder from captions, or a transformer alone on
//! latents and features that were made before.

use super::batches::{Examples, images};
use super::learner::{Learner, Step};
use super::objective::{diffusion_loss, noise_batch};
use super::sites::Draw;
use super::teacher::Terms;
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::{Error, Result};
use crate::io::datasets::ImageSet;
use crate::models::pixart::{PixArt, Text, TextCondition};
use crate::models::t5::T5;
use crate::sample::solver::Prediction;
use crate::tensor::{Device, Tensor};

/// Pictures with the ids of their captions.
#[derive(Clone, Debug)]
pub struct Captioned {
    /// The pictures; their labels are not read.
    pub images: ImageSet,
    /// Ids of every picture's caption, the end token last.
    pub captions: Vec<Vec<u32>>,
    /// Ids of the empty text.
    pub null: Vec<u32>,
}

impl Examples for Captioned {
    fn count(&self) -> usize {
        self.images.n.min(self.captions.len())
    }
}

/// A transformer and the text encoder that it reads.
pub struct TextToImage {
    /// The transformer.
    pub transformer: PixArt,
    /// The encoder, with all blocks in memory.
    pub encoder: T5,
    /// What the transformer predicts.
    pub prediction: Prediction,
}

impl TextToImage {
    /// Features of texts given by their ids, padded to the longest.
    fn read<'m>(&'m self, g: &Graph<'m>, texts: &[&[u32]]) -> Result<Text> {
        let longest = texts.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let padded = texts.iter().flat_map(|ids| {
            let ids = ids.iter().map(|&id| i32::try_from(id).unwrap_or(i32::MAX));
            ids.chain(std::iter::repeat(0)).take(longest)
        });
        let device = self.encoder.device();
        let ids = Tensor::from_i32(device, &[texts.len(), longest], &padded.collect::<Vec<i32>>())?;
        let counts: Vec<usize> = texts.iter().map(|ids| ids.len()).collect();
        let counted: Vec<i32> = counts.iter().map(|&count| count as i32).collect();
        let features = self.encoder.forward(g, &ids, &Tensor::from_i32(device, &[texts.len()], &counted)?)?;
        Ok(Text { features, counts, constant: false })
    }
}

impl Learner for TextToImage {
    type Data = Captioned;
    type Teacher = std::convert::Infallible;

    fn device(&self) -> &Device {
        self.transformer.device()
    }

    fn stores(&self) -> Vec<&ParamStore> {
        vec![&self.transformer.params, &self.encoder.params]
    }

    fn stores_mut(&mut self) -> Vec<&mut ParamStore> {
        vec![&mut self.transformer.params, &mut self.encoder.params]
    }

    fn loss<'m>(
        &'m self,
        g: &Graph<'m>,
        step: &Step<'_, Captioned>,
        _teacher: Option<&Self::Teacher>,
    ) -> Result<(Var, Option<Terms>)> {
        let batch = images(self.device(), &step.data.images, step.chosen)?;
        let s = step.settings;
        let draw = Draw { schedule: step.schedule, dropout: s.label_dropout, seed: s.seed, step: step.number };
        let noised = noise_batch(self.device(), &batch.images, &draw, |dropped| {
            let read = |(&index, dropped): (&u32, &bool)| match dropped {
                true => &step.data.null[..],
                false => &step.data.captions[index as usize],
            };
            let text = self.read(g, &step.chosen.iter().zip(dropped).map(read).collect::<Vec<_>>())?;
            Ok(TextCondition { text, micro: None })
        })?;
        let noised = noised.towards(self.prediction, step.schedule)?;
        Ok((diffusion_loss(g, &self.transformer, &noised, s.activation_checkpointing)?, None))
    }

    fn duplicate(&self) -> Result<TextToImage> {
        let (transformer, encoder) = (self.transformer.duplicate()?, self.encoder.duplicate()?);
        Ok(TextToImage { transformer, encoder, prediction: self.prediction })
    }
}

/// Features of several texts as one batch, `[B, L, C]` with zeros behind the shorter ones.
///
/// # Errors
/// No text, or features of different widths.
pub fn pad(device: &Device, texts: &[&Tensor]) -> Result<Text> {
    let width = texts.first().map_or(0, |text| text.dim(1));
    if let Some(other) = texts.iter().find(|text| text.dim(1) != width || text.dim(0) == 0) {
        return Err(Error::failure("texts", "features do not fit each other")
            .is(other.shape())
            .must(format!("[L, {width}]")));
    }
    let counts: Vec<usize> = texts.iter().map(|text| text.dim(0)).collect();
    let longest = counts.iter().copied().max().unwrap_or(1);
    let values = texts.iter().map(|text| text.values()).collect::<Result<Vec<_>>>()?;
    let mut features = device.empty(&[texts.len(), longest, width])?;
    features.edit(|to| {
        to.fill(0.0);
        for (to, from) in to.chunks_mut((longest * width).max(1)).zip(&values) {
            to[..from.len()].copy_from_slice(from);
        }
    })?;
    Ok(Text { features: Var::constant(features), counts, constant: false })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{ParamId, Precision};
    use crate::io::files::test_dir;
    use crate::models::pixart::PixArtConfig;
    use crate::models::t5::T5Config;
    use crate::sample::schedule::Schedule;
    use crate::train::batches::Batches;
    use crate::train::optimizer::AdamWSettings;
    use crate::train::pairs::{self, About, Pairs, ShardTexts};
    use crate::train::trainer::{LoopSettings, Trainer};
    use graft_kernels::rng::Philox;

    fn settings(batch: usize) -> LoopSettings {
        LoopSettings {
            steps: 1000,
            batch,
            seed: 3,
            label_dropout: 0.2,
            precision: Precision::F32,
            checkpoint_every: 1000,
            activation_checkpointing: false,
        }
    }

    /// A picture of one brightness for each of four captions, some of them longer.
    fn data() -> Captioned {
        let images = ImageSet {
            n: 4,
            channels: 1,
            height: 8,
            width: 8,
            pixels: [0u8, 80, 170, 255].iter().flat_map(|v| [*v; 64]).collect(),
            labels: vec![0; 4],
            class_names: vec!["plain"],
        };
        Captioned { images, captions: vec![vec![3, 1], vec![4, 1], vec![3, 4, 1], vec![4, 4, 3, 1]], null: vec![1] }
    }

    fn model() -> TextToImage {
        let config = PixArtConfig {
            patch: 4,
            sample_size: 8,
            in_channels: 1,
            out_channels: 2,
            caption_channels: 16,
            max_tokens: 6,
            ..PixArtConfig::plain(1, 32, 2)
        };
        let sizes =
            T5Config { width: 16, heads: 2, head_width: 8, hidden: 24, depth: 1, vocabulary: 5, ..T5Config::xxl() };
        let device = Device::cpu();
        TextToImage {
            transformer: PixArt::random(config, &device, 1).unwrap(),
            encoder: T5::new(sizes, &device, 2).unwrap(),
            prediction: Prediction::Velocity,
        }
    }

    fn step<'s>(
        data: &'s Captioned,
        chosen: &'s [u32],
        s: &'s LoopSettings,
        schedule: &'s Schedule,
    ) -> Step<'s, Captioned> {
        Step { data, chosen, number: 0, settings: s, schedule }
    }

    /// The whole way from the ids to the loss, by differences: an error in any operator between would show.
    #[test]
    fn gradients_reach_the_text_encoder() {
        let (mut model, data, settings, schedule) = (model(), data(), settings(4), Schedule::default());
        // A new transformer hardly reads its text: slopes would drown in the rounding of the loss.
        for (number, param) in (0..).zip(model.transformer.params.iter().map(|(id, _)| id).collect::<Vec<ParamId>>()) {
            let value = &mut model.transformer.params.get_mut(param).value;
            Philox::new(9, number).fill_normal(value.f32s_mut().unwrap());
            value.edit(|v| v.iter_mut().for_each(|v| *v *= 0.2)).unwrap();
        }
        let chosen = [0, 1, 2, 3];
        let value = |model: &TextToImage| -> f64 {
            let g = Graph::inference(Precision::F32);
            let (loss, _) = model.loss(&g, &step(&data, &chosen, &settings, &schedule), None).unwrap();
            f64::from(loss.tensor().values().unwrap()[0])
        };
        let grads = {
            let g = Graph::training(Precision::F32);
            let (loss, _) = model.loss(&g, &step(&data, &chosen, &settings, &schedule), None).unwrap();
            g.backward(&loss).unwrap()
        };
        for (store, name) in [
            (1, "shared.weight"),
            (1, "encoder.block.0.layer.0.SelfAttention.qkv.weight"),
            (1, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
            (1, "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"),
            (1, "encoder.final_layer_norm.weight"),
            (0, "y_embedder.y_proj.fc1.weight"),
            (0, "blocks.0.cross_attn.kv_linear.weight"),
            (0, "t_block.1.weight"),
        ] {
            let (id, gradient): (ParamId, Vec<f32>) = {
                let store = model.stores()[store];
                let id = store.find(name).unwrap();
                (id, grads.param(store, id).unwrap().to_vec().unwrap())
            };
            // Along the gradient itself, where the slope is its norm.
            let norm = gradient.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 1e-3, "{name}: {norm}");
            let start = model.stores()[store].get(id).value.to_vec().unwrap();
            let mut at = |by: f64| {
                let moved =
                    start.iter().zip(&gradient).map(|(v, g)| (f64::from(*v) + by * f64::from(*g) / norm) as f32);
                let moved = moved.collect::<Vec<f32>>();
                model.stores_mut()[store].get_mut(id).value.edit(|v| v.copy_from_slice(&moved)).unwrap();
                value(&model)
            };
            let h = 0.01;
            let slope = (at(h) - at(-h)) / (2.0 * h);
            at(0.0);
            assert!((slope - norm).abs() < 0.05 * norm + 2e-5, "{name}: {slope} by differences, {norm} by the tape");
        }
    }

    #[test]
    fn a_caption_decides_what_is_predicted() {
        let (data, settings, schedule) = (data(), settings(4), Schedule::default());
        let optimiser = AdamWSettings { lr: 5e-3, ema: 0.9, ..AdamWSettings::default() };
        let mut trainer = Trainer::homeless(model(), optimiser, settings.clone()).unwrap();
        let mut batches = Batches::new(&data, 4, 3).unwrap();
        for _ in 0..150 {
            trainer.update(&mut batches).unwrap();
        }
        let model = trainer.averaged().unwrap();
        let loss = |captions: [usize; 4]| -> f64 {
            let captions = captions.map(|i| data.captions[i].clone()).to_vec();
            let data = Captioned { captions, ..data.clone() };
            let settings = LoopSettings { label_dropout: 0.0, ..settings.clone() };
            let g = Graph::inference(Precision::F32);
            let sum = (0..20).map(|number| {
                let step = Step { number: 5000 + number, ..step(&data, &[0, 1, 2, 3], &settings, &schedule) };
                f64::from(model.loss(&g, &step, None).unwrap().0.tensor().values().unwrap()[0])
            });
            sum.sum::<f64>() / 20.0
        };
        let (right, wrong) = (loss([0, 1, 2, 3]), loss([3, 2, 1, 0]));
        assert!(right < 0.8 * wrong, "{right} with the right captions, {wrong} with others");
    }

    /// Features that are made before give the loss that the encoder gives in the loop.
    #[test]
    fn pairs_train_the_transformer_alone() {
        let (model, data, settings, schedule) = (model(), data(), settings(2), Schedule::default());
        let (g, folder) = (Graph::inference(Precision::F32), test_dir("text_pairs"));
        let chosen = [3, 1];
        let (want, _) = model.loss(&g, &step(&data, &chosen, &settings, &schedule), None).unwrap();
        let all: Vec<_> =
            data.captions.iter().chain([&data.null]).cloned().map(crate::models::t5::Tokens::whole).collect();
        let mut features = model.encoder.encode(&all, Precision::F32).unwrap();
        let null = features.pop().unwrap();
        let latents = images(&Device::cpu(), &data.images, &[0, 1, 2, 3]).unwrap().images;
        let about = About {
            transformer: String::new(),
            prompts: String::new(),
            count: 4,
            shard: 4,
            latent: [1, 8, 8],
            features: 16,
            factor: 1,
            seed: 0,
            sampling: String::new(),
            dtype: "f32".into(),
            prediction: Prediction::Velocity,
        };
        about.write(&folder).unwrap();
        let prompts = vec![String::new(); 4];
        pairs::write_texts(&about, &folder, 0, &ShardTexts { prompts, features, null }).unwrap();
        pairs::write_latents(&about, &folder, 0, &latents).unwrap();
        let pairs = Pairs::open(&folder).unwrap();
        let alone = Step { data: &pairs, chosen: &chosen, number: 0, settings: &settings, schedule: &schedule };
        let (found, _) = model.transformer.loss(&g, &alone, None).unwrap();
        let [want, found] = [want, found].map(|v| v.tensor().values().unwrap()[0]);
        assert!((want - found).abs() < 1e-4 * want, "{found} must be {want}");
    }
}
