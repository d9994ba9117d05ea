//! A PixArt transformer as grafting sees it.

use super::names::diffusers_parts;
use super::{MicroConditions, PixArt, PixArtConfig, Run, SaveAs, Text, load, save};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::Result;
use crate::io::hub;
use crate::models::component;
use crate::models::dit::{BlockSpec, DitConfig};
use crate::models::sites::{Observer, SiteConfig, SiteModel, Work, no_pairs};
use crate::nn::operators::{self, BlockDims, Operator, Site};
use crate::nn::{Builder, Scheme};
use crate::tensor::{Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// What a PixArt transformer reads of a batch besides noisy pictures and timesteps.
#[derive(Clone, Debug)]
pub struct TextCondition {
    /// Texts of the batch.
    pub text: Text,
    /// Size and aspect ratio, where the model embeds them.
    pub micro: Option<MicroConditions>,
}

impl SiteConfig for PixArtConfig {
    fn blocks(&self) -> &[BlockSpec] {
        &self.blocks
    }

    fn blocks_mut(&mut self) -> &mut [BlockSpec] {
        &mut self.blocks
    }

    fn dims(&self) -> BlockDims {
        self.block_dims([self.base(); 2])
    }

    fn pairs(&self) -> &[usize] {
        &[]
    }

    fn add_pair(&mut self, pair: usize) -> Result<()> {
        Err(no_pairs(PixArt::KIND, pair))
    }

    fn picture(&self) -> [usize; 2] {
        [self.in_channels, self.sample_size]
    }

    fn learns_variance(&self) -> bool {
        self.out_channels == 2 * self.in_channels
    }

    fn check(&self) -> Result<()> {
        PixArtConfig::check(self)
    }

    fn rest(&self) -> Result<usize> {
        // Of a model with plain blocks, what is left without their operators.
        let plain = DitConfig::plain_block(self.heads, 4.0);
        let config = PixArtConfig { blocks: vec![plain.clone(); self.depth()], ..self.clone() };
        let (model, mut sites, device) = (PixArt::unset(config, &Device::dry())?, ParamStore::default(), Device::dry());
        for (site, spec) in [(Site::Attn, &plain.attn), (Site::Mlp, &plain.mlp)] {
            let mut builder = Builder::new(&mut sites, &device, 0, Scheme::Unset);
            operators::build(spec, site, self.dims(), &mut builder.below(&site.to_string()))?;
        }
        let trainable = model.params.iter().filter(|(_, p)| p.trainable).map(|(_, p)| p.value.len()).sum::<usize>();
        Ok(trainable - self.depth() * sites.elements())
    }

    /// Keys and values of the text are not part of it: they are made once for all steps.
    fn work(&self) -> Work {
        let (n, d, depth, patch) = (self.dims().tokens(), self.width, self.depth(), self.patch * self.patch);
        let mut work = Work { streams: vec![2 * n * d; 2 * depth + 1], ..Work::default() };
        work.products = [[n, d, d]].repeat(2 * depth);
        work.products.extend([
            [n, patch * self.in_channels, d],
            [1, super::FREQUENCIES, d],
            [1, d, d],
            [1, d, 6 * d],
            [n, d, patch * self.out_channels],
        ]);
        let (texts, numbers) = (self.max_tokens, 2 * (n + self.max_tokens) * d);
        work.cores = vec![(4.0 * n as f64 * texts as f64 * d as f64, numbers); depth];
        work
    }
}

impl SiteModel for PixArt {
    type Config = PixArtConfig;
    type Condition = TextCondition;

    const KIND: &'static str = "PixArt";
    const HAS_PARTS: bool = true;

    /// The projections of both attentions, of grafted operators and of the MLP; one modulation serves all blocks.
    const ADAPTED: &'static [&'static str] = &[
        "attn.qkv",
        "attn.proj",
        "cross_attn.q_linear",
        "cross_attn.kv_linear",
        "cross_attn.proj",
        "in_proj",
        "out_proj",
        "mlp.fc1",
        "mlp.fc2",
    ];

    fn describe(path: &Path) -> Result<PixArtConfig> {
        super::describe(&component(&hub::resolve(path)?, "transformer"))
    }

    fn load(path: &Path, device: &Device) -> Result<PixArt> {
        load(&component(&hub::resolve(path)?, "transformer"), device, false)
    }

    fn save(&self, folder: &Path, metadata: &BTreeMap<String, String>) -> Result<()> {
        save(self, folder, SaveAs::F32, metadata)
    }

    fn unset(config: PixArtConfig, device: &Device) -> Result<PixArt> {
        PixArt::unset(config, device)
    }

    fn config(&self) -> &PixArtConfig {
        &self.config
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn params_mut(&mut self) -> &mut ParamStore {
        &mut self.params
    }

    fn device(&self) -> &Device {
        PixArt::device(self)
    }

    fn operator(&self, block: usize, site: Site) -> Option<&dyn Operator> {
        PixArt::operator(self, block, site)
    }

    fn diffusers_parts(name: &str) -> Vec<String> {
        diffusers_parts(name)
    }

    fn predict<'m>(
        &'m self,
        g: &Graph<'m>,
        x: &Var,
        t: &Tensor,
        condition: &TextCondition,
        checkpoint: bool,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Var> {
        let (keys, micro) = (self.keys(g, &condition.text)?, condition.micro.as_ref());
        match observer {
            Some(observer) => self.forward_observed(g, x, t, &keys, micro, observer),
            None => self.forward(g, x, t, &keys, micro, Run { checkpoint, ..Run::default() }),
        }
    }
}
