//! Parameters and FLOPs of a model, and what a graft changes about them.
//!
//! Counted as the paper's table 4 counts: per kind of site, over all its operators, the operator itself apart from the
//! projections around it; 2 FLOPs a multiply-add. Nothing is trained or loaded for it.

use crate::autograd::ParamStore;
use crate::error::Result;
use crate::models::dit::DitConfig;
use crate::nn::operators::{self, Site, SiteFlops, Spec};
use crate::nn::{Builder, Scheme};
use crate::tensor::Device;
use serde::Serialize;

/// Cost of the operators of one kind of site, or of one such operator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct SiteCost {
    /// Trainable parameters.
    pub params: usize,
    /// FLOPs of the operator for one image.
    pub flops_operator: f64,
    /// FLOPs of the projections around it for one image.
    pub flops_projections: f64,
}

impl SiteCost {
    /// All FLOPs for one image.
    pub fn flops(&self) -> f64 {
        self.flops_operator + self.flops_projections
    }

    fn add(&mut self, other: SiteCost) {
        self.params += other.params;
        self.flops_operator += other.flops_operator;
        self.flops_projections += other.flops_projections;
    }
}

/// Cost of a whole model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelCost {
    /// All token mixers.
    pub attn: SiteCost,
    /// All channel mixers.
    pub mlp: SiteCost,
    /// Trainable parameters, everything included.
    pub params: usize,
    /// FLOPs of a forward pass for one image, everything included.
    pub flops: f64,
    /// Tokens of an image.
    pub tokens: usize,
}

/// Change in per cent; zero where there was nothing and is nothing.
pub fn percent(before: f64, after: f64) -> f64 {
    if before == after { 0.0 } else { 100.0 * (after - before) / before }
}

/// Counts operators, each distinct one once.
pub struct Counter<'c> {
    config: &'c DitConfig,
    known: Vec<(Site, Spec, SiteCost)>,
}

impl<'c> Counter<'c> {
    /// A counter for operators in blocks of a model's sizes.
    pub fn new(config: &'c DitConfig) -> Counter<'c> {
        Counter { config, known: Vec::new() }
    }

    /// Cost of one operator.
    ///
    /// # Errors
    /// An operator that cannot take these sizes.
    pub fn site(&mut self, site: Site, spec: &Spec) -> Result<SiteCost> {
        if let Some((.., cost)) = self.known.iter().find(|(s, k, _)| *s == site && k == spec) {
            return Ok(*cost);
        }
        let (mut scratch, device, dims) = (ParamStore::default(), Device::cpu(), self.config.block_dims());
        let operator = operators::build(spec, site, dims, &mut Builder::new(&mut scratch, &device, 0, Scheme::Torch))?;
        let SiteFlops { operator: flops_operator, projections: flops_projections } = operator.flops(dims);
        let cost = SiteCost { params: scratch.elements(), flops_operator, flops_projections };
        self.known.push((site, spec.clone(), cost));
        Ok(cost)
    }

    /// Cost of the whole model.
    ///
    /// # Errors
    /// An operator that cannot take the model's sizes.
    pub fn model(&mut self) -> Result<ModelCost> {
        let c = self.config;
        let (mut attn, mut mlp) = (SiteCost::default(), SiteCost::default());
        for block in &c.blocks {
            attn.add(self.site(Site::Attn, &block.attn)?);
            mlp.add(self.site(Site::Mlp, &block.mlp)?);
        }
        let plain = DitConfig::plain_block(c.heads, 4.0);
        let plain_sites = self.site(Site::Attn, &plain.attn)?.params + self.site(Site::Mlp, &plain.mlp)?.params;
        // `parameters` counts plain blocks: what remains without their operators is the rest of every model.
        let plain_model = DitConfig { blocks: vec![plain; c.depth()], ..c.clone() };
        let rest = plain_model.parameters() - c.depth() * plain_sites;
        let flops = attn.flops() + mlp.flops() + flops_around(c);
        Ok(ModelCost { attn, mlp, params: attn.params + mlp.params + rest, flops, tokens: c.tokens() })
    }
}

/// FLOPs of the products outside the sites, for one image: patch embedding, timestep embedding, modulation, last layer.
fn flops_around(c: &DitConfig) -> f64 {
    let (n, d) = (c.tokens() as f64, c.width as f64);
    let patch = (c.patch * c.patch) as f64;
    let condition = 256.0 * d + d * d + (6 * c.depth() + 2) as f64 * d * d;
    2.0 * (n * d * patch * (c.in_channels + c.out_channels()) as f64 + condition)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graft::plan::tests::plan;

    fn grafted(layers: &str, site: &str, operator: &str) -> (ModelCost, ModelCost) {
        let base = DitConfig::named("DiT-XL/2").unwrap();
        let text = format!("[[graft]]\nsite = \"{site}\"\nlayers = {layers}\noperator = {operator}\n");
        let mut after = base.clone();
        for a in plan(&text).unwrap().resolve(&base).unwrap() {
            *after.spec_mut(a.block, a.site).unwrap() = a.spec;
        }
        (Counter::new(&base).model().unwrap(), Counter::new(&after).model().unwrap())
    }

    fn near(found: f64, published: f64) {
        assert!((found - published).abs() <= 0.005 + 1e-9, "{found:.4} against {published}");
    }

    #[test]
    fn hyena_x_rows_of_table_4() {
        for (layers, op, projections, params) in
            [("\"every-other\"", -49.90, 0.13, 0.16), ("\"3-of-4\"", -74.85, 0.20, 0.24)]
        {
            let (before, after) = grafted(layers, "attn", "{ kind = \"hyena_x\", taps = 4 }");
            near(percent(before.attn.flops_operator, after.attn.flops_operator), op);
            near(percent(before.attn.flops_projections, after.attn.flops_projections), projections);
            near(percent(before.attn.params as f64, after.attn.params as f64), params);
            assert_eq!(before.mlp, after.mlp);
        }
    }

    #[test]
    fn window_rows_of_table_4() {
        for (layers, op) in [("\"every-other\"", -48.24), ("\"3-of-4\"", -72.36), ("\"all\"", -96.48)] {
            let (before, after) = grafted(layers, "attn", "{ kind = \"swa\", window = 4 }");
            near(percent(before.attn.flops_operator, after.attn.flops_operator), op);
            // Two projections as before.
            assert_eq!(before.attn.flops_projections, after.attn.flops_projections);
            assert_eq!((before.attn.params, before.mlp), (after.attn.params, after.mlp));
        }
    }

    /// Not in the table, worked out from its formulas: 49 of 256 keys, a state of 72 × 72 a head, 64 of 256 keys.
    #[test]
    fn other_attentions() {
        let full = 4.0 * 256.0 * 1152.0 + 2.0 * 16.0 * 256.0;
        for (operator, per_query, params) in [
            ("{ kind = \"neighborhood_attention\", kernel = 7 }", full * 49.0 / 256.0, 0),
            ("{ kind = \"linear_attention\" }", 4.0 * 1152.0 * 73.0, 0),
            ("{ kind = \"kv_compress\" }", full / 4.0 + 2.0 * 1152.0 * 16.0 / 4.0, 8064),
        ] {
            let (before, after) = grafted("\"all\"", "attn", operator);
            assert_eq!(before.attn.flops_operator, 28.0 * 256.0 * full);
            assert_eq!(after.attn.flops_operator, 28.0 * 256.0 * per_query, "{operator}");
            assert_eq!(after.attn.params, before.attn.params + 28 * params, "{operator}");
        }
    }

    #[test]
    fn mlp_rows_of_table_4() {
        for (layers, ratio, change) in [("\"every-other\"", 3, -12.5), ("\"all\"", 6, 50.0)] {
            let (before, after) = grafted(layers, "mlp", &format!("{{ kind = \"mlp\", ratio = {ratio} }}"));
            assert_eq!(percent(before.mlp.flops(), after.mlp.flops()), change);
            // Biases do not all scale with the width; the table prints no more digits than this.
            assert!((percent(before.mlp.params as f64, after.mlp.params as f64) - change).abs() < 0.01);
        }
    }

    #[test]
    fn whole_model_is_as_published() {
        let (base, after) = grafted("\"every-other\"", "attn", "{ kind = \"hyena_x\", taps = 4 }");
        assert_eq!((base.params, base.tokens), (674_834_720, 256));
        assert_eq!(after.params - base.params, 14 * (5_330_304 - 5_313_024));
        // 118.62 GMAC, without the softmax that the operator count of table 4 includes.
        let softmax = 28.0 * 2.0 * 16.0 * 65_536.0;
        assert!(((base.flops - softmax) / 2.0 / 118.62e9 - 1.0).abs() < 1e-4, "{}", base.flops / 2.0);
    }
}
