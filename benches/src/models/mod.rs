//! Whole models as bench cases: the same work for us and for a peer, with weights and inputs that both can load.

mod dit;
mod pixart;
mod vae;

pub use dit::randomise;

use graft_engine::autograd::Precision;
use graft_engine::error::{Error, Result};
use graft_engine::io::safetensors::{self, TensorRecord};
use graft_engine::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// One forward pass, nothing recorded.
    Forward,
    /// Forward, backward and one AdamW update.
    TrainingStep,
    /// Pictures of latents.
    Decode,
}

impl Work {
    /// As rows name the pass.
    pub fn pass(self) -> &'static str {
        match self {
            Work::Forward => "forward",
            Work::TrainingStep => "training step",
            Work::Decode => "decode",
        }
    }

    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Work::Forward => "forward",
            Work::TrainingStep => "forward, backward, AdamW",
            Work::Decode => "decode",
        }
    }

    /// As the peer's argument.
    pub fn argument(self) -> &'static str {
        match self {
            Work::Forward => "forward",
            Work::TrainingStep => "training-step",
            Work::Decode => "forward",
        }
    }
}

/// The network of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// A DiT of a published size.
    Dit(&'static str),
    /// PixArt-Σ-XL/2 for pictures of so many pixels along a side, of so many blocks.
    PixArt {
        /// Pixels.
        side: usize,
        /// Blocks; all of them have 28.
        depth: usize,
    },
    /// The decoder of Stable Diffusion's autoencoder, for latents of so many pixels along a side.
    Vae {
        /// Pixels of the latents.
        side: usize,
    },
}

impl Network {
    /// Name of the Python function that loads it, after `load_`.
    pub fn loader(self) -> &'static str {
        match self {
            Network::Dit(_) => "dit",
            Network::PixArt { .. } => "pixart",
            Network::Vae { .. } => "vae_decoder",
        }
    }

    /// Name in words.
    pub fn words(self) -> String {
        match self {
            Network::Dit(size) => size.to_string(),
            Network::PixArt { side, depth } => format!("PixArt-Σ {side}², {depth} of 28 blocks"),
            Network::Vae { side } => format!("SD autoencoder, {0}²", 8 * side),
        }
    }
}

/// One model at one batch size.
#[derive(Clone, Copy, Debug)]
pub struct ModelCase {
    /// Name of the row.
    pub name: &'static str,
    /// What runs.
    pub network: Network,
    /// Batch B.
    pub batch: usize,
    /// What is measured.
    pub work: Work,
    /// The peer's time over ours that the project wants at the least, in f32 and in bf16.
    pub targets: [Option<f64>; 2],
    /// Most pairs of runs.
    pub pairs: usize,
}

/// Cases in the order in which they run; the last is small, so that it shows in seconds whether a set-up works.
pub const CASES: [ModelCase; 5] = [
    ModelCase {
        name: "dit_xl_2_256_forward",
        network: Network::Dit("DiT-XL/2"),
        batch: 1,
        work: Work::Forward,
        targets: [Some(1.0), Some(0.8)],
        pairs: 7,
    },
    ModelCase {
        name: "dit_s_2_256_training_step",
        network: Network::Dit("DiT-S/2"),
        batch: 8,
        work: Work::TrainingStep,
        targets: [Some(1.0), Some(1.0)],
        pairs: 7,
    },
    ModelCase {
        name: "pixart_sigma_512_forward",
        network: Network::PixArt { side: 512, depth: 4 },
        batch: 1,
        work: Work::Forward,
        targets: [Some(1.0), Some(0.8)],
        pairs: 5,
    },
    ModelCase {
        name: "sd_vae_256_decode",
        network: Network::Vae { side: 32 },
        batch: 1,
        work: Work::Decode,
        targets: [Some(1.0), Some(1.0)],
        pairs: 3,
    },
    ModelCase {
        name: "dit_s_8_256_training_step",
        network: Network::Dit("DiT-S/8"),
        batch: 2,
        work: Work::TrainingStep,
        targets: [None, None],
        pairs: 7,
    },
];

/// The case with a name.
///
/// # Errors
/// When there is none.
pub fn case(name: &str) -> Result<ModelCase> {
    let names = CASES.map(|c| c.name).join(", ");
    CASES.into_iter().find(|c| c.name == name).ok_or_else(|| Error::usage("case", "unknown case").is(name).must(names))
}

/// What a network does when it is measured.
trait Subject {
    /// One unit of work; its output, or the loss of a training step.
    fn run(&mut self) -> Result<Vec<f32>>;
    /// Writes weights below `folder/model` (diffusers layout, f32) and inputs beside it.
    fn export(&self, folder: &Path) -> Result<()>;
    /// Tokens of a sample, or pixels of its latents.
    fn tokens(&self) -> usize;
}

/// A model with its inputs, ready to be run again and again.
pub struct Prepared(Box<dyn Subject>);

impl Prepared {
    /// Draws the weights and inputs of a case: the same on every machine.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(case: ModelCase, precision: Precision) -> Result<Prepared> {
        Ok(Prepared(match case.network {
            Network::Dit(size) => Box::new(dit::Case::new(case, size, precision)?),
            Network::PixArt { side, depth } => Box::new(pixart::Case::new(case, side, depth, precision)?),
            Network::Vae { side } => Box::new(vae::Case::new(case, side, precision)?),
        }))
    }

    /// One measured unit of work. Returns the output of a forward pass, or the loss of a training step.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn run(&mut self) -> Result<Vec<f32>> {
        self.0.run()
    }

    /// Tokens N of a sample; pixels of its latents for a decoder.
    pub fn tokens(&self) -> usize {
        self.0.tokens()
    }

    /// Writes weights (diffusers layout, f32) and inputs below `folder`, for a peer to load.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn export(&self, folder: &Path) -> Result<()> {
        self.0.export(folder)
    }
}

/// Writes the inputs of a case below `folder`.
fn write_inputs(folder: &Path, tensors: &[(&str, &Tensor)]) -> Result<()> {
    let values = tensors.iter().map(|(_, t)| t.to_vec()).collect::<Result<Vec<_>>>()?;
    let records = tensors.iter().zip(&values).map(|((name, t), v)| TensorRecord::f32(*name, t.shape().dims(), v));
    safetensors::write(&folder.join("inputs.safetensors"), records, &BTreeMap::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_training_step_lowers_its_own_loss_and_a_case_is_the_same_each_time() {
        let case = case("dit_s_8_256_training_step").unwrap();
        let mut one = Prepared::new(case, Precision::F32).unwrap();
        let mut two = Prepared::new(case, Precision::F32).unwrap();
        let first = one.run().unwrap();
        assert_eq!(first, two.run().unwrap());
        assert!(one.run().unwrap() < first);
    }

    #[test]
    fn every_network_runs_and_is_written_for_a_peer() {
        let folder = std::env::temp_dir().join(format!("graft-models-{}", std::process::id()));
        let base = CASES[2];
        for (network, work) in
            [(Network::PixArt { side: 256, depth: 1 }, Work::Forward), (Network::Vae { side: 2 }, Work::Decode)]
        {
            let case = ModelCase { network, work, ..base };
            let mut prepared = Prepared::new(case, Precision::F32).unwrap();
            let first = prepared.run().unwrap();
            assert!(first.iter().all(|v| v.is_finite()) && first.iter().any(|v| v.abs() > 1e-3), "{network:?}");
            assert_eq!(prepared.run().unwrap(), first);
            prepared.export(&folder).unwrap();
            assert!(folder.join("model/config.json").is_file() && folder.join("inputs.safetensors").is_file());
            std::fs::remove_dir_all(&folder).unwrap();
        }
    }
}
