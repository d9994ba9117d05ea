//! A DiT as grafting sees it.

use super::names::diffusers_parts;
use super::{Dit, DitConfig, FREQUENCIES, Pair, Run, SaveAs, load, save};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::Result;
use crate::models::dit::BlockSpec;
use crate::models::sites::{Observer, SiteConfig, SiteModel, Work};
use crate::nn::Builder;
use crate::nn::operators::{BlockDims, Operator, Site};
use crate::tensor::{Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

impl SiteConfig for DitConfig {
    fn blocks(&self) -> &[BlockSpec] {
        &self.blocks
    }

    fn blocks_mut(&mut self) -> &mut [BlockSpec] {
        &mut self.blocks
    }

    fn dims(&self) -> BlockDims {
        self.block_dims()
    }

    fn pairs(&self) -> &[usize] {
        &self.pairs
    }

    fn add_pair(&mut self, pair: usize) -> Result<()> {
        self.pairs.push(pair);
        self.pairs.sort_unstable();
        Ok(())
    }

    fn picture(&self) -> [usize; 2] {
        [self.in_channels, self.input_size]
    }

    fn learns_variance(&self) -> bool {
        self.learn_sigma
    }

    fn check(&self) -> Result<()> {
        DitConfig::check(self)
    }

    fn rest(&self) -> Result<usize> {
        // `parameters` counts what stands around the blocks apart from them.
        let around = DitConfig { blocks: Vec::new(), pairs: Vec::new(), ..self.clone() };
        Ok(around.parameters() + self.depth() * (6 * self.width * self.width + 6 * self.width))
    }

    fn work(&self) -> Work {
        let (n, d, patch) = (self.tokens(), self.width, self.patch * self.patch);
        let mut work = Work { streams: vec![2 * n * d; 2 * self.depth() + 1], ..Work::default() };
        work.products = vec![[1, d, 6 * d]; self.depth()];
        work.products.extend([
            [n, patch * self.in_channels, d],
            [1, FREQUENCIES, d],
            [1, d, d],
            [1, d, 2 * d],
            [n, d, patch * self.out_channels()],
        ]);
        work
    }
}

impl SiteModel for Dit {
    type Config = DitConfig;
    /// `[B]` i32 labels.
    type Condition = Tensor;

    const KIND: &'static str = "DiT";
    const HAS_PARTS: bool = false;

    /// The projections of attention, of grafted operators and of the MLP, and the modulation.
    const ADAPTED: &'static [&'static str] =
        &["qkv", "proj", "in_proj", "out_proj", "fc1", "fc2", "adaLN_modulation.1"];

    fn describe(path: &Path) -> Result<DitConfig> {
        super::describe(path)
    }

    fn load(path: &Path, device: &Device) -> Result<Dit> {
        load(path, device)
    }

    fn save(&self, folder: &Path, metadata: &BTreeMap<String, String>) -> Result<()> {
        save(self, folder, SaveAs::F32, metadata)
    }

    fn unset(config: DitConfig, device: &Device) -> Result<Dit> {
        Dit::unset(config, device)
    }

    fn config(&self) -> &DitConfig {
        &self.config
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn params_mut(&mut self) -> &mut ParamStore {
        &mut self.params
    }

    fn device(&self) -> &Device {
        Dit::device(self)
    }

    fn operator(&self, block: usize, site: Site) -> Option<&dyn Operator> {
        Dit::operator(self, block, site)
    }

    fn diffusers_parts(name: &str) -> Vec<String> {
        diffusers_parts(name)
    }

    fn predict<'m>(
        &'m self,
        g: &Graph<'m>,
        x: &Var,
        t: &Tensor,
        labels: &Tensor,
        checkpoint: bool,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Var> {
        self.forward_observed(g, x, t, labels, Run { checkpoint, ..Run::default() }, observer)
    }

    fn pair(config: &DitConfig, index: usize, builder: &mut Builder<'_>) -> Result<Pair> {
        let specs = [2 * index, 2 * index + 1].map(|block| &config.blocks[block]);
        Pair::build(index, specs, config.block_dims(), builder)
    }
}
