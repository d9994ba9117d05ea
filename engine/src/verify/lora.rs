//! Family `lora`: adapters of PEFT on a transformer, beside its weights and merged into them.

use super::case::Case;
use super::checks::Checks;
use super::pixart::{Inputs, forward};
use crate::error::Result;
use crate::models::lora;
use crate::models::pixart::{self, PixArt, Semantics, diffusers_parts};
use crate::tensor::Tensor;

/// Outputs without, with and after merging the adapter, and the merged weights.
pub fn run(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    let device = case.device.clone();
    let mut model = pixart::load(&case.model().join("base"), &device, false)?;
    let inputs = Inputs::read(case, &device)?;
    let output = |model: &PixArt, checks: &Checks<'_>| -> Result<Tensor> {
        forward(model, &inputs, Semantics::Original, checks.precision("output"))
    };
    let plain = output(&model, checks)?;
    checks.tensor("output_without_adapter", &plain)?;
    let places = ["adapter", "adapter.safetensors", "lora.safetensors"].map(|name| case.model().join(name));
    let adapter = places.iter().find(|path| path.exists()).unwrap_or(&places[0]);
    lora::attach(&mut model, adapter, 1.0)?;
    let adapted = output(&model, checks)?;
    checks.tensor("output", &adapted)?;
    crate::nn::lora::merge(&mut model.params)?;
    checks.label("merged");
    let merged = output(&model, checks)?;
    checks.tensor("output", &merged)?;
    for (_, param) in model.params.iter() {
        let parts = diffusers_parts(&param.name);
        let mut shape = param.value.shape().dims().to_vec();
        shape[0] /= parts.len();
        let values: Vec<f64> = param.value.to_vec()?.into_iter().map(f64::from).collect();
        for (name, values) in parts.iter().zip(values.chunks(values.len() / parts.len())) {
            checks.values(&format!("merged.{name}"), &shape, values)?;
        }
    }
    Ok(())
}
