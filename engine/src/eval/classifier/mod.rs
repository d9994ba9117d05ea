//! A small image classifier whose hidden layer is the feature space in which samples of small images are scored.
//!
//! Networks trained on photographs say little about 28 x 28 grey clothes, so the bundled data has its own: a
//! transformer of a few pre-norm blocks over square patches, made of the same operators as the diffusion models.
//! Its blocks are DiT blocks without a condition: a constant modulation table with shift 0, scale 0 and gate 1. The
//! last tokens, side by side, pass a layer of [`FEATURES`] GELU units and a layer of one logit per class. The features
//! are the inputs of those units, which are spread like a Gaussian; their outputs are mostly zero with rare large
//! values, from which no distance of a few hundred samples can be told well. [`train`] makes a classifier;
//! `assets/fashion-classifier` holds the trained one.

mod train;

pub use train::{Progress, Settings, train};

use crate::autograd::{Graph, ParamId, ParamStore, Precision, Var};
use crate::error::{Error, Result};
use crate::eval::Features;
use crate::io::dtype::FileDtype;
use crate::io::safetensors::{self, TensorRecord};
use crate::io::weights::open_weights;
use crate::models::{Source, read_weight};
use crate::nn::operators::{self, BlockDims, Operator, Site, Spec};
use crate::nn::{Builder, Epilogue, Init, Linear, Scheme};
use crate::ops::{act, contracts};
use crate::tensor::{Device, Tensor};
use half::bf16;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Width of the feature space.
pub const FEATURES: usize = 64;

/// Side of the images.
const SIDE: usize = 28;
const PATCH: usize = 4;
const GRID: usize = SIDE / PATCH;
const DEPTH: usize = 3;
const DIMS: BlockDims = BlockDims { width: 64, heads: 4, grid: [GRID, GRID] };
const MLP_RATIO: f64 = 2.0;
const EPS: f32 = 1e-6;
/// Images of one forward pass when reading many: bounds memory.
const READ_BATCH: usize = 250;
/// File below a classifier's folder.
const FILE: &str = "model.safetensors";

/// Rows of the constant modulation table.
const SHIFT: usize = 0;
const SCALE: usize = 1;
const GATE: usize = 2;

/// The classifier with its parameters, for grey images of 28 x 28.
#[derive(Debug)]
pub struct Classifier {
    /// All parameters.
    pub params: ParamStore,
    classes: usize,
    embed: Linear,
    positions: ParamId,
    blocks: Vec<[Box<dyn Operator>; 2]>,
    features: Linear,
    head: Linear,
}

/// What the classifier says of a set of images.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// `[n, FEATURES]`, row-major.
    pub features: Vec<f32>,
    /// Most likely class of each image.
    pub classes: Vec<usize>,
}

impl Reading {
    /// Images read.
    pub fn len(&self) -> usize {
        self.classes.len()
    }

    /// Whether no image was read.
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// The features, checked; `name` says in errors which set they describe.
    ///
    /// # Errors
    /// Fewer than two rows, or a value that is not finite.
    pub fn features<'a>(&'a self, name: &'a str) -> Result<Features<'a>> {
        Features::new(name, &self.features, FEATURES)
    }

    /// The images at `indices`, each of which must be below the number read.
    pub fn select(&self, indices: &[u32]) -> Reading {
        let row = |&i: &u32| &self.features[i as usize * FEATURES..][..FEATURES];
        Reading {
            features: indices.iter().flat_map(row).copied().collect(),
            classes: indices.iter().map(|&i| self.classes[i as usize]).collect(),
        }
    }

    /// Fraction of images whose class is the given label.
    ///
    /// # Errors
    /// When there is not one label per image, or no image.
    pub fn agreement(&self, labels: &[i32]) -> Result<f64> {
        if labels.len() != self.len() || self.is_empty() {
            return Err(Error::failure("labels", "do not fit the images").is(labels.len()).must(self.len().max(1)));
        }
        let right = self.classes.iter().zip(labels).filter(|&(&class, &label)| i32::try_from(class) == Ok(label));
        Ok(right.count() as f64 / self.len() as f64)
    }
}

impl Classifier {
    /// A new, untrained classifier.
    ///
    /// # Errors
    /// No class, or too little memory.
    pub fn new(classes: usize, device: &Device, seed: u64) -> Result<Classifier> {
        if classes == 0 {
            return Err(Error::usage("classes", "too few").is(0).must("at least 1"));
        }
        let d = DIMS.width;
        let mut params = ParamStore::default();
        let mut b = Builder::new(&mut params, device, seed, Scheme::Xavier);
        let embed = b.linear("embed", PATCH * PATCH, d)?;
        let positions = b.param("positions", &[DIMS.tokens(), d], Init::Normal(0.02))?;
        let mut blocks = Vec::with_capacity(DEPTH);
        for i in 0..DEPTH {
            let mut block = b.below(&format!("blocks.{i}"));
            blocks.push([
                operators::build(&Spec::new("mha"), Site::Attn, DIMS, &mut block.below("attn"))?,
                operators::build(&Spec::new("mlp").with("ratio", MLP_RATIO), Site::Mlp, DIMS, &mut block.below("mlp"))?,
            ]);
        }
        let features = b.linear("features", DIMS.tokens() * d, FEATURES)?;
        let head = b.linear("head", FEATURES, classes)?;
        Ok(Classifier { params, classes, embed, positions, blocks, features, head })
    }

    /// Classes that it tells apart.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// Device that holds the parameters.
    pub fn device(&self) -> &Device {
        self.params.get(self.positions).value.device()
    }

    /// The last tokens of images `[B, 1, 28, 28]` in [−1, 1], normalised and side by side: `[B, 1, N·D]`.
    fn tokens(&self, g: &Graph<'_>, images: &Tensor) -> Result<Var> {
        let b = images.dim(0);
        if images.shape().dims() != [b, 1, SIDE, SIDE] {
            return Err(Error::failure("classifier: images", "wrong shape")
                .is(images.shape())
                .must(format!("[n, 1, {SIDE}, {SIDE}]")));
        }
        let images = Var::constant(images.clone());
        let tokens = g.patchify(&images, PATCH, GRID, GRID, contracts::patchify::Params {})?;
        let positions = g.param(&self.params, self.positions);
        let mut x = self.embed.forward_with_rows(g, &self.params, &tokens, &positions)?;
        let modulation = Var::constant(constant_modulation(self.device(), b)?);
        let norm = contracts::ln_modulate::Params { shift: SHIFT, scale: SCALE, eps: EPS };
        for operator in self.blocks.iter().flatten() {
            let h = g.ln_modulate(&x, &modulation, norm)?;
            let epilogue = Epilogue { residual: &x, modulation: &modulation, gate_row: GATE };
            x = operator.forward(g, &self.params, &h, Some(epilogue))?;
        }
        let x = g.ln_modulate(&x, &modulation, norm)?;
        g.reshape(&x, &[b, 1, DIMS.tokens() * DIMS.width])
    }

    /// Features `[B, 1, FEATURES]` of tokens.
    fn features(&self, g: &Graph<'_>, tokens: &Var) -> Result<Var> {
        self.features.forward(g, &self.params, tokens, act::NONE)
    }

    /// Logits `[B, classes]` of tokens.
    fn logits(&self, g: &Graph<'_>, tokens: &Var) -> Result<Var> {
        let hidden = self.features.forward(g, &self.params, tokens, act::GELU)?;
        let logits = self.head.forward(g, &self.params, &hidden, act::NONE)?;
        g.reshape(&logits, &[tokens.dim(0), self.classes])
    }

    /// Features and classes of images `[n, 1, 28, 28]` in [−1, 1].
    ///
    /// # Errors
    /// Another shape, or too little memory.
    pub fn read(&self, images: &Tensor) -> Result<Reading> {
        let mut reading = Reading { features: Vec::new(), classes: Vec::new() };
        let g = Graph::inference(Precision::F32);
        let [channels, height, width] = [1, 2, 3].map(|axis| images.dim(axis));
        let values = images.f32s()?;
        for chunk in values.chunks((READ_BATCH * channels * height * width).max(1)) {
            let n = chunk.len() / (channels * height * width);
            let tokens = self.tokens(&g, &Tensor::from_f32(self.device(), &[n, channels, height, width], chunk)?)?;
            reading.features.extend_from_slice(self.features(&g, &tokens)?.tensor().f32s()?);
            reading.classes.extend(self.logits(&g, &tokens)?.tensor().f32s()?.chunks_exact(self.classes).map(largest));
        }
        Ok(reading)
    }

    /// Writes `model.safetensors` into a folder, weights rounded to bf16.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(&self, folder: &Path, metadata: &BTreeMap<String, String>) -> Result<()> {
        crate::io::atomic::ensure_writable_dir(folder)?;
        let records = self.params.iter().map(|(_, param)| {
            let rounded: Vec<bf16> = param.value.f32s()?.iter().map(|&v| bf16::from_f32(v)).collect();
            Ok(TensorRecord {
                name: param.name.clone(),
                dtype: FileDtype::Bf16,
                shape: param.value.shape().dims().to_vec(),
                bytes: Cow::Owned(bytemuck::cast_slice(&rounded).to_vec()),
            })
        });
        safetensors::write(&folder.join(FILE), records.collect::<Result<Vec<_>>>()?, metadata)
    }

    /// Reads the classifier of a folder; the number of classes is that of the file.
    ///
    /// # Errors
    /// A file that is missing or damaged, or a tensor that is missing, unexpected or of another shape.
    pub fn load(folder: &Path, device: &Device) -> Result<Classifier> {
        let file = open_weights(folder)?;
        let classes = file.get("head.bias").and_then(|t| t.shape.first().copied()).ok_or_else(|| {
            Error::failure(format!("{}: head.bias", folder.display()), "missing tensor").must("present in a classifier")
        })?;
        let mut classifier = Classifier::new(classes, device, 0)?;
        let wanted: Vec<_> = classifier.params.iter().map(|(id, p)| (id, p.name.clone(), p.value.shape())).collect();
        let known: BTreeSet<&str> = wanted.iter().map(|(_, name, _)| name.as_str()).collect();
        if let Some(extra) = Source::names(&file).iter().find(|name| !known.contains(name.as_str())) {
            return Err(Error::failure(format!("{}: {extra}", folder.display()), "unexpected tensor")
                .must("absent in a classifier")
                .fix("name the folder of a classifier, such as assets/fashion-classifier"));
        }
        for (id, name, shape) in &wanted {
            let values = read_weight(&file, name, shape.dims())?;
            classifier.params.set(*id, Tensor::from_f32(device, shape.dims(), &values)?)?;
        }
        Ok(classifier)
    }
}

/// `[B, 3, D]`: no shift, no scale, an open gate.
fn constant_modulation(device: &Device, batch: usize) -> Result<Tensor> {
    let mut table = Tensor::zeros(device, &[batch, 3, DIMS.width])?;
    table.f32s_mut()?.chunks_exact_mut(3 * DIMS.width).for_each(|rows| rows[GATE * DIMS.width..].fill(1.0));
    Ok(table)
}

/// Index of the largest logit, the first of equals.
fn largest(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::datasets::{Split, fashion_mnist};
    use crate::io::files::test_dir;
    use crate::train::batches;

    fn asset(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets").join(name)
    }

    #[test]
    fn the_shipped_classifier_is_as_accurate_as_stated() {
        let device = Device::cpu();
        let classifier = Classifier::load(&asset("fashion-classifier"), &device).unwrap();
        let test = fashion_mnist(&asset("fashion-mnist"), Split::Test).unwrap();
        let batch = batches::images(&device, &test, &(0..test.n as u32).collect::<Vec<_>>()).unwrap();
        let reading = classifier.read(&batch.images).unwrap();
        let accuracy = reading.agreement(&batch.labels).unwrap();
        assert!(accuracy > 0.9, "{accuracy}");
        let upside_down: Vec<f32> =
            batch.images.f32s().unwrap().chunks(784).flat_map(|i| i.iter().rev()).copied().collect();
        let flipped = Tensor::from_f32(&device, &[test.n, 1, 28, 28], &upside_down).unwrap();
        assert!(classifier.read(&flipped).unwrap().agreement(&batch.labels).unwrap() < 0.6);
    }

    #[test]
    fn saved_and_loaded_it_reads_the_same() {
        let (device, dir) = (Device::cpu(), test_dir("classifier"));
        let original = Classifier::new(3, &device, 5).unwrap();
        original.save(&dir, &BTreeMap::new()).unwrap();
        let loaded = Classifier::load(&dir, &device).unwrap();
        assert_eq!(loaded.classes(), 3);
        let images = Tensor::from_f32(&device, &[2, 1, 28, 28], &[0.25; 2 * 784]).unwrap();
        let reading = loaded.read(&images).unwrap();
        assert_eq!((reading.features.len(), reading.len()), (2 * FEATURES, 2));
        assert_eq!(reading.features[..FEATURES], reading.features[FEATURES..]);
        let exact = original.read(&images).unwrap();
        let furthest = reading.features.iter().zip(&exact.features).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(furthest > 0.0 && furthest < 0.05, "bf16 weights moved the features by {furthest}");
        // Saving what was loaded changes nothing any more.
        let again = test_dir("classifier_again");
        loaded.save(&again, &BTreeMap::new()).unwrap();
        assert_eq!(std::fs::read(dir.join(FILE)).unwrap(), std::fs::read(again.join(FILE)).unwrap());
    }

    #[test]
    fn foreign_files_and_images_are_refused() {
        let (device, dir) = (Device::cpu(), test_dir("classifier_bad"));
        safetensors::write(&dir.join(FILE), [TensorRecord::f32("w", &[1], &[0.0])], &BTreeMap::new()).unwrap();
        assert_eq!(Classifier::load(&dir, &device).unwrap_err().problem(), "missing tensor");
        let classifier = Classifier::new(2, &device, 0).unwrap();
        let wrong = Tensor::zeros(&device, &[1, 3, 28, 28]).unwrap();
        assert_eq!(classifier.read(&wrong).unwrap_err().problem(), "wrong shape");
        let reading = Reading { features: vec![0.0; FEATURES], classes: vec![1] };
        assert_eq!(reading.agreement(&[1]).unwrap(), 1.0);
        assert_eq!(reading.agreement(&[0]).unwrap(), 0.0);
        assert!(reading.agreement(&[]).is_err());
    }
}
