//! Samples of a model in a folder, made in parts: by several processes, over several days, through any interruption.
//!
//! Image i of the whole has seed + i and class i mod classes, so it is the same whoever makes it. A part is one file,
//! written all or nothing; what is there is never made again. Parts made by another recipe are refused.

use crate::error::{Error, Result};
use crate::io::dtype::FileDtype;
use crate::io::pictures::Pictures;
use crate::io::safetensors::{self, TensorFile, TensorRecord};
use crate::io::{atomic, json};
use crate::sample::pipeline::to_pixels;
use crate::tensor::Tensor;
use graft_kernels::rng::image_seed;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Images of a part.
pub const PART: usize = 100;
const RECIPE: &str = "recipe.json";

/// A share of the parts: those whose number is `index` modulo `of`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which share, from 0.
    pub index: usize,
    /// Shares in all, at least 1.
    pub of: usize,
}

impl Shard {
    /// Everything.
    pub const ALL: Shard = Shard { index: 0, of: 1 };
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(i, k)| Some((i.parse().ok()?, k.parse().ok()?)));
        match parsed {
            Some((index, of)) if index < of => Ok(Shard { index, of }),
            _ => Err("must be i/k with i from 0 to k - 1, such as 0/4".into()),
        }
    }
}

/// Seed of the first image of independent set `set`: sets of up to 2³² images share no noise, as those of seeds 0, 1, 2
/// would.
pub fn first_seed(set: u64) -> u64 {
    set << 32
}

/// `n` samples in a folder, or what there is of them.
#[derive(Debug)]
pub struct SampleFolder {
    dir: PathBuf,
    n: usize,
    classes: usize,
}

/// Samples with the classes that they were asked to be.
#[derive(Debug)]
pub struct Samples {
    /// The images.
    pub pictures: Pictures,
    /// Class of each.
    pub labels: Vec<i32>,
}

impl SampleFolder {
    /// Opens or begins a folder for `n` images in `classes` classes; `recipe` says all that decides what an image is,
    /// but not how many there are.
    ///
    /// # Errors
    /// "samples of another recipe" where the folder holds others, or a folder that cannot be written.
    pub fn open(dir: &Path, n: usize, classes: usize, recipe: &Value) -> Result<SampleFolder> {
        if n == 0 || classes == 0 {
            return Err(Error::usage("--n", "no images").is(n).must("at least 1"));
        }
        atomic::ensure_writable_dir(dir)?;
        let path = dir.join(RECIPE);
        if path.exists() {
            let found = json::read(&path)?;
            if found != *recipe {
                let differs = |key: &&String| found.get(key.as_str()) != recipe.get(key.as_str());
                let keys: Vec<&str> =
                    recipe.as_object().into_iter().flat_map(|o| o.keys()).filter(differs).map(|k| k.as_str()).collect();
                let show =
                    |from: &Value| keys.iter().map(|k| format!("{k} {}", from[k])).collect::<Vec<_>>().join(", ");
                return Err(Error::failure(path.display().to_string(), "samples of another recipe")
                    .is(show(&found))
                    .must(show(recipe))
                    .fix("choose another folder, or the settings that these samples were made with"));
            }
        } else {
            json::write(&path, recipe)?;
        }
        Ok(SampleFolder { dir: dir.to_path_buf(), n, classes })
    }

    fn parts(&self) -> usize {
        self.n.div_ceil(PART)
    }

    /// First image of a part, and how many it has.
    fn span(&self, part: usize) -> (usize, usize) {
        let start = part * PART;
        (start, PART.min(self.n - start))
    }

    fn file(&self, part: usize) -> PathBuf {
        let (start, count) = self.span(part);
        // The count is part of the name, so that a set that grows makes its last, shorter part anew.
        self.dir.join(format!("samples-{start:08}-{count:03}.safetensors"))
    }

    /// Images that are not there yet, of one share.
    pub fn missing(&self, shard: Shard) -> usize {
        self.missing_parts(shard).map(|part| self.span(part).1).sum()
    }

    fn missing_parts(&self, shard: Shard) -> impl Iterator<Item = usize> {
        (shard.index..self.parts()).step_by(shard.of).filter(|&part| !self.file(part).exists())
    }

    /// Class of image `i`.
    fn label(&self, i: usize) -> i32 {
        (i % self.classes) as i32
    }

    /// Makes what is missing of one share. `draw` makes images `[B, C, H, W]` in [−1, 1] of the given labels, from a
    /// seed for the first one.
    ///
    /// # Errors
    /// Those of `draw`, or a part that cannot be written; parts that were written stay.
    pub fn fill(&self, shard: Shard, seed: u64, draw: &mut dyn FnMut(&[i32], u64) -> Result<Tensor>) -> Result<()> {
        for part in self.missing_parts(shard) {
            let (start, count) = self.span(part);
            let labels: Vec<i32> = (start..start + count).map(|i| self.label(i)).collect();
            let images = draw(&labels, image_seed(seed, start as u64))?;
            let shape = [0, 2, 3, 1].map(|axis| images.dim(axis));
            let record = TensorRecord {
                name: "images".into(),
                dtype: FileDtype::U8,
                shape: shape.to_vec(),
                bytes: to_pixels(&images)?.into(),
            };
            safetensors::write(&self.file(part), [record], &BTreeMap::new())?;
        }
        Ok(())
    }

    /// All samples, or nothing while some are missing.
    ///
    /// # Errors
    /// A part that is damaged or of another shape than the first.
    pub fn load(&self) -> Result<Option<Samples>> {
        if self.missing(Shard::ALL) > 0 {
            return Ok(None);
        }
        let (mut pixels, mut first) = (Vec::new(), None);
        for part in 0..self.parts() {
            let path = self.file(part);
            let file = TensorFile::open(&path)?;
            let view = file.get("images").filter(|v| v.dtype == FileDtype::U8 && v.shape.len() == 4);
            let wrong = || Error::failure(path.display().to_string(), "not a part of samples");
            let view = view.ok_or_else(|| wrong().must("bytes images [n, H, W, C]"))?;
            let image = *first.get_or_insert([view.shape[1], view.shape[2], view.shape[3]]);
            let want = [&[self.span(part).1], &image[..]].concat();
            if view.shape != want {
                return Err(wrong().is(format!("{:?}", view.shape)).must(format!("{want:?}")));
            }
            pixels.extend_from_slice(view.bytes);
        }
        let [h, w, c] = first.unwrap_or_default();
        let pictures = Pictures::new(&self.dir.display().to_string(), [self.n, h, w, c], pixels)?;
        Ok(Some(Samples { pictures, labels: (0..self.n).map(|i| self.label(i)).collect() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::{list, test_dir};
    use crate::tensor::Device;
    use serde_json::json;

    /// Images of one pixel that tell their label and seed.
    fn draw(labels: &[i32], seed: u64) -> Result<Tensor> {
        let value = |(i, l): (usize, &i32)| (f64::from(*l) + 10.0 * (seed + i as u64) as f64 - 128.0) / 127.5;
        let values: Vec<f32> = labels.iter().enumerate().map(|p| value(p) as f32 + 1e-4).collect();
        Tensor::from_f32(&Device::cpu(), &[labels.len(), 1, 1, 1], &values)
    }

    #[test]
    fn shards_make_the_same_images_in_any_order_and_through_interruptions() {
        let recipe = json!({"steps": 2});
        let whole = SampleFolder::open(&test_dir("samples_whole"), 250, 3, &recipe).unwrap();
        whole.fill(Shard::ALL, 0, &mut draw).unwrap();
        let want = whole.load().unwrap().unwrap();
        assert_eq!((want.pictures.n, &want.labels[..4]), (250, &[0, 1, 2, 0][..]));
        // Image 7 has class 1 and seed 7.
        assert_eq!(want.pictures.image(7), [71]);

        let dir = test_dir("samples_shards");
        let open = || SampleFolder::open(&dir, 250, 3, &recipe).unwrap();
        let (first, second) = (Shard { index: 0, of: 2 }, Shard { index: 1, of: 2 });
        assert_eq!((open().missing(first), open().missing(second)), (150, 100));
        open().fill(second, 0, &mut draw).unwrap();
        // Interrupted after one part of two.
        let mut parts = 0;
        let stopped = open().fill(first, 0, &mut |labels, seed| {
            parts += 1;
            if parts == 2 { Err(Error::failure("test", "killed")) } else { draw(labels, seed) }
        });
        assert_eq!(stopped.unwrap_err().problem(), "killed");
        assert!(open().load().unwrap().is_none());
        assert_eq!(open().missing(Shard::ALL), 50);
        let mut made = 0;
        open()
            .fill(first, 0, &mut |labels, seed| {
                made += labels.len();
                draw(labels, seed)
            })
            .unwrap();
        assert_eq!(made, 50);
        let got = open().load().unwrap().unwrap();
        assert_eq!((got.pictures.pixels(), got.labels), (want.pictures.pixels(), want.labels));
        // More images: whole parts stay, the short one is made anew.
        let more = SampleFolder::open(&dir, 300, 3, &recipe).unwrap();
        assert_eq!(more.missing(Shard::ALL), 100);
    }

    #[test]
    fn another_recipe_and_damaged_parts_are_refused() {
        let dir = test_dir("samples_bad");
        let folder = SampleFolder::open(&dir, 5, 2, &json!({"steps": 2, "seed": 1})).unwrap();
        let error = SampleFolder::open(&dir, 5, 2, &json!({"steps": 3, "seed": 1})).unwrap_err().to_string();
        assert!(error.contains("samples of another recipe; is steps 2; must be steps 3"), "{error}");
        folder.fill(Shard::ALL, 1, &mut draw).unwrap();
        let part = list(&dir).unwrap().into_iter().find(|p| p.extension().is_some_and(|e| e == "safetensors")).unwrap();
        let other = TensorRecord {
            name: "images".into(),
            dtype: FileDtype::U8,
            shape: vec![4, 1, 1, 1],
            bytes: vec![0; 4].into(),
        };
        safetensors::write(&part, [other], &BTreeMap::new()).unwrap();
        assert!(folder.load().unwrap_err().to_string().contains("is [4, 1, 1, 1]; must be [5, 1, 1, 1]"));
        std::fs::write(&part, b"short").unwrap();
        assert!(folder.load().is_err());
        assert!(SampleFolder::open(&dir, 0, 2, &json!({})).is_err());
    }

    #[test]
    fn shards_by_name() {
        assert_eq!("1/4".parse(), Ok(Shard { index: 1, of: 4 }));
        for bad in ["4/4", "1", "-1/2", "0/0", "a/b", ""] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }
}
