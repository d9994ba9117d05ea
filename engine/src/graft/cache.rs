//! Activations of the teacher on disk: input, output and gate of every site (a pair of blocks has a condition in the
//! place of a gate) for a number of noised images.
//!
//! A shard is one batch at one site, one safetensors file `SITE/000012.safetensors` that is written atomically and says
//! what it belongs to: base model, data, seed, batch, arithmetic, site. Batches are those that the first steps of an
//! uncached run see, and the first pass over them keeps their order; so a run whose steps do not exceed the cache
//! gives the same bits with f32 activations as one without. Later passes shuffle the images anew, each with the
//! timestep and noise that it was kept with. Sites have folders of their own: processes that train different sites
//! fill one cache together.

use super::assemble;
use super::settings::DistillConfig;
use super::student::Lesson;
use crate::error::{Error, Result};
use crate::io::atomic::{RunLock, ensure_writable_dir, remove_leftovers};
use crate::io::dtype::FileDtype;
use crate::io::safetensors::{self, TensorFile, TensorRecord};
use crate::io::{files, system};
use crate::models::sites::SiteConfig as _;
use crate::tensor::{Device, Tensor};
use crate::train::config::Dtype;
use crate::train::sites::SiteLearner;
use graft_kernels::rng::Philox;
use half::bf16;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// Random streams that shuffle the passes after the first.
const PASS_STREAMS: u64 = 4 << 40;

/// Whether a site is a pair of blocks.
fn is_pair(site: &str) -> bool {
    site.starts_with("pairs.")
}

/// What is kept beside input and output.
fn beside_of(site: &str) -> &'static str {
    if is_pair(site) { "condition" } else { "gate" }
}

/// How far the filling of a cache is.
#[derive(Clone, Debug, PartialEq)]
pub struct Filling {
    /// Folder.
    pub folder: PathBuf,
    /// Bytes of the complete cache.
    pub bytes: u64,
    /// Batches that are done, and in all.
    pub batches: [u64; 2],
}

impl fmt::Display for Filling {
    /// `76.5 MiB of activations in cache-folder`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MiB of activations in {}", self.bytes as f64 / f64::from(1 << 20), self.folder.display())
    }
}

/// A cache for a number of sites.
pub(super) struct Cache {
    folder: PathBuf,
    batch: usize,
    shards: u64,
    /// Tokens N and width D.
    size: [usize; 2],
    sites: usize,
    dtype: FileDtype,
    seed: u64,
    /// What every shard must have come from.
    identity: BTreeMap<String, String>,
    /// The pass whose order is at hand.
    pass: Option<u64>,
    order: Vec<u32>,
    // One for each site, held until its shards are there.
    locks: Vec<RunLock>,
}

/// A batch as it was read back.
pub(super) struct Kept {
    input: Tensor,
    target: Tensor,
    /// `[B, 1, D]` the gate or the condition.
    beside: Tensor,
    pair: bool,
}

impl Kept {
    pub fn lesson(&self) -> Lesson<'_> {
        let (gate, condition) = match self.pair {
            false => (Some((&self.beside, 0)), None),
            true => (None, Some(&self.beside)),
        };
        Lesson { input: &self.input, target: &self.target, gate, condition }
    }
}

impl Cache {
    /// The cache that the settings ask for, locked; nothing where they ask for none.
    ///
    /// # Errors
    /// A folder that cannot be written, or whose sites another process uses.
    pub fn open<M: SiteLearner>(
        config: &DistillConfig,
        teacher: &M,
        data: &M::Data,
        sites: &[String],
    ) -> Result<Option<Cache>> {
        let Some(folder) = &config.cache else { return Ok(None) };
        let mut locks = Vec::new();
        for site in sites {
            let own = folder.join(site);
            ensure_writable_dir(&own)?;
            locks.push(RunLock::acquire(&own)?);
            remove_leftovers(&own)?;
        }
        let identity = [
            ("base", assemble::digest(teacher)?),
            ("data", M::digest(data)),
            ("seed", config.seed.to_string()),
            ("batch", config.batch.to_string()),
            ("products", format!("{:?}", config.dtype)),
        ];
        let dims = teacher.config().dims();
        let shards = config.cache_samples.div_ceil(config.batch.max(1)) as u64;
        Ok(Some(Cache {
            folder: folder.clone(),
            batch: config.batch,
            shards,
            size: [dims.tokens(), dims.width],
            sites: sites.len(),
            dtype: match config.cache_dtype {
                Dtype::F32 => FileDtype::F32,
                Dtype::Bf16 => FileDtype::Bf16,
            },
            seed: config.seed,
            identity: identity.into_iter().map(|(key, value)| (format!("graft.cache.{key}"), value)).collect(),
            pass: None,
            order: Vec::new(),
            locks,
        }))
    }

    /// Bytes of all shards of `sites` sites.
    fn bytes(&self, shards: u64, sites: usize) -> u64 {
        let [n, d] = self.size;
        let sample = (2 * n * d + d) * self.dtype.bits() / 8;
        shards * (self.batch * sample * sites) as u64
    }

    /// Shards that lack files, with the sites that they lack, in order. Files that are there are checked.
    ///
    /// # Errors
    /// A damaged file or one of another cache; a disk without the space for what is missing.
    pub fn missing(&self, sites: &[String]) -> Result<Vec<(u64, Vec<String>)>> {
        let mut there = 0;
        for site in sites {
            let names = files::list(&self.folder.join(site))?;
            there += names.iter().filter(|p| p.extension().is_some_and(|e| e == "safetensors")).count();
        }
        let needed = self.bytes(self.shards, sites.len()).saturating_sub(self.bytes(1, there));
        self.check_space(needed, system::free_space(&self.folder)?)?;
        let mut missing = Vec::new();
        for shard in 0..self.shards {
            let mut lacking = Vec::new();
            for site in sites {
                let path = self.path(site, shard);
                if path.is_file() {
                    self.check(&TensorFile::open(&path)?, site, shard)?;
                } else {
                    lacking.push(site.clone());
                }
            }
            if !lacking.is_empty() {
                missing.push((shard, lacking));
            }
        }
        Ok(missing)
    }

    fn check_space(&self, needed: u64, free: Option<u64>) -> Result<()> {
        let Some(free) = free.filter(|free| *free < needed) else { return Ok(()) };
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        Err(Error::failure(self.folder.display().to_string(), "the disk is too small for the cache")
            .is(format!("{:.1} MiB free", mib(free)))
            .must(format!("{:.1} MiB", mib(needed)))
            .fix("choose another disk for `cache`, fewer `cache_samples`, or cache_dtype = \"bf16\""))
    }

    /// Lets other processes read and fill: the shards of these sites are all there.
    pub fn unlock(&mut self) {
        self.locks.clear();
    }

    /// What is said before a shard is filled.
    pub fn filling(&self, shard: u64) -> Filling {
        let bytes = self.bytes(self.shards, self.sites);
        Filling { folder: self.folder.clone(), bytes, batches: [shard, self.shards] }
    }

    fn path(&self, site: &str, shard: u64) -> PathBuf {
        self.folder.join(site).join(format!("{shard:06}.safetensors"))
    }

    fn header(&self, site: &str, shard: u64) -> BTreeMap<String, String> {
        let own = [("site", site.to_string()), ("shard", shard.to_string())];
        let own = own.into_iter().map(|(key, value)| (format!("graft.cache.{key}"), value));
        self.identity.clone().into_iter().chain(own).collect()
    }

    fn check(&self, file: &TensorFile, site: &str, shard: u64) -> Result<()> {
        for (key, must) in self.header(site, shard) {
            let is = file.metadata().get(&key).map_or("absent", String::as_str);
            if is != must {
                return Err(Error::failure(file.place(), format!("cache of something else ({key})"))
                    .is(is)
                    .must(must)
                    .fix("name another folder as `cache`, or remove this one"));
            }
        }
        let [n, d] = self.size;
        let (full, row) = ([self.batch, n, d], [self.batch, d]);
        for (name, shape) in [("input", &full[..]), ("output", &full), (beside_of(site), &row)] {
            let found = file.get(name).filter(|view| view.shape == shape && view.dtype == self.dtype);
            if found.is_none() {
                return Err(Error::failure(format!("{}: {name}", file.place()), "does not fit the cache")
                    .must(format!("{} {shape:?}", self.dtype))
                    .fix("remove the folder: it was made with another cache_dtype, or by another program"));
            }
        }
        Ok(())
    }

    /// Writes a batch at a site.
    ///
    /// # Errors
    /// A full disk; the shards that are there stay.
    pub fn store(&self, site: &str, shard: u64, lesson: &Lesson<'_>) -> Result<()> {
        let (table, row) = match (lesson.gate, lesson.condition) {
            (Some(gate), _) => gate,
            (None, Some(condition)) => (condition, 0),
            (None, None) => return Err(Error::failure(site, "neither a gate nor a condition to keep")),
        };
        let (b, d) = (table.dim(0), table.dim(2));
        let table_values = table.values()?;
        let rows = table_values.chunks(table.dim(1) * d);
        let beside: Vec<f32> = rows.flat_map(|table| table[row * d..][..d].iter().copied()).collect();
        let record = |name: &str, shape: &[usize], values: &'_ [f32]| TensorRecord {
            name: name.to_string(),
            dtype: self.dtype,
            shape: shape.to_vec(),
            bytes: Cow::Owned(self.encode(values)),
        };
        let shape = lesson.input.shape();
        let records = [
            record("input", shape.dims(), &lesson.input.values()?),
            record("output", shape.dims(), &lesson.target.values()?),
            record(beside_of(site), &[b, d], &beside),
        ];
        safetensors::write(&self.path(site, shard), records, &self.header(site, shard))
    }

    fn encode(&self, values: &[f32]) -> Vec<u8> {
        match self.dtype {
            FileDtype::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    /// The images of a step, as numbers of kept images.
    pub fn samples(&mut self, step: u64) -> &[u32] {
        let (pass, within) = (step / self.shards, (step % self.shards) as usize);
        if Some(pass) != self.pass {
            self.order = (0..(self.shards as usize * self.batch) as u32).collect();
            if pass > 0 {
                Philox::new(self.seed, PASS_STREAMS + pass).shuffle(&mut self.order);
            }
            self.pass = Some(pass);
        }
        &self.order[within * self.batch..][..self.batch]
    }

    /// Reads kept images at a site.
    ///
    /// # Errors
    /// A file that has gone or changed since the cache was opened.
    pub fn recall(&self, device: &Device, site: &str, samples: &[u32]) -> Result<Kept> {
        let [n, d] = self.size;
        let b = samples.len();
        let (mut input, mut target) = (device.empty(&[b, n, d])?, device.empty(&[b, n, d])?);
        let mut beside = device.empty(&[b, 1, d])?;
        let mut open: Option<(u64, TensorFile)> = None;
        for (row, &sample) in samples.iter().enumerate() {
            let (shard, within) = (u64::from(sample) / self.batch as u64, sample as usize % self.batch);
            let file = match open.take() {
                Some((same, file)) if same == shard => file,
                _ => {
                    let file = TensorFile::open(&self.path(site, shard))?;
                    self.check(&file, site, shard)?;
                    file
                }
            };
            for (name, tensor) in [("input", &mut input), ("output", &mut target), (beside_of(site), &mut beside)] {
                let len = tensor.len() / b;
                tensor.edit(|tensor| self.decode(&file, name, within, &mut tensor[row * len..][..len]))?;
            }
            open = Some((shard, file));
        }
        Ok(Kept { input, target, beside, pair: is_pair(site) })
    }

    /// One image of a tensor of a file that was checked.
    fn decode(&self, file: &TensorFile, name: &str, within: usize, target: &mut [f32]) {
        let bytes = file.get(name).map_or(&[][..], |view| view.bytes);
        match self.dtype {
            FileDtype::Bf16 => {
                let values = bytes.as_chunks::<2>().0[within * target.len()..].iter();
                target.iter_mut().zip(values).for_each(|(t, b)| *t = bf16::from_le_bytes(*b).to_f32());
            }
            _ => {
                let values = bytes.as_chunks::<4>().0[within * target.len()..].iter();
                target.iter_mut().zip(values).for_each(|(t, b)| *t = f32::from_le_bytes(*b));
            }
        }
    }
}
