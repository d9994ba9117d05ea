//! Family `operators`: one operator of the registry alone, its output and all its gradients.

use super::case::Case;
use super::checks::Checks;
use crate::autograd::{Graph, ParamStore, Precision};
use crate::error::{Error, Result};
use crate::io::safetensors::TensorFile;
use crate::models::Source;
use crate::models::read_weight;
use crate::nn::operators::{self, BlockDims, REGISTRY, Spec};
use crate::nn::{Builder, Scheme};
use crate::tensor::{Device, Tensor};

/// Operators by the beginning of a case's name, where that is not the name in the registry.
const ALIASES: &[(&str, &str)] = &[
    ("neighbourhood", "neighborhood_attention"),
    ("swa", "swa"),
    ("hyena_se", "hyena_se"),
    ("hyena_y", "hyena_y"),
    ("mlp_hyena_x", "mlp_hyena_x"),
    ("mamba2", "mamba2"),
    ("linear_attention", "linear_attention"),
    ("kv_compress", "kv_compress"),
];

/// Fields of the configuration that hold an option under another name.
const FIELDS: &[(&str, &str)] = &[
    ("heads", "num_heads"),
    ("ratio", "mlp_ratio"),
    ("state", "d_state"),
    ("taps", "d_conv"),
    ("head_width", "headdim"),
];

/// Runs a case; the operator is the longest known prefix of its name.
pub fn run(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    let known = REGISTRY.iter().map(|k| (k.name, k.name)).chain(ALIASES.iter().copied());
    let longest = known.filter(|(prefix, _)| case.name.starts_with(prefix)).max_by_key(|(prefix, _)| prefix.len());
    let kind = longest.and_then(|(_, name)| REGISTRY.iter().find(|k| k.name == name)).ok_or_else(|| {
        let names: Vec<&str> = REGISTRY.iter().map(|k| k.name).collect();
        Error::failure("operator", "unknown operator")
            .is(&case.name)
            .must(format!("a name that begins with one of {}", names.join(", ")))
    })?;
    let mut spec = Spec::new(kind.name);
    for (option, _) in kind.options {
        let fields = FIELDS.iter().filter(|(o, _)| o == option).map(|(_, field)| field);
        for key in std::iter::once(option).chain(fields) {
            match case.config.get(key) {
                None => {}
                Some(serde_json::Value::String(word)) => spec = spec.with(option, word.as_str()),
                Some(_) => spec = spec.with(option, case.number(key)?),
            }
        }
    }
    let device = Device::cpu();
    let x = case.input_f32(&device, "x")?;
    let heads = if case.config.get("num_heads").is_some() { case.whole("num_heads")? } else { 1 };
    let grid = match case.config.get("grid").and_then(serde_json::Value::as_array).map(Vec::as_slice) {
        Some([rows, columns]) => [rows, columns].map(|side| side.as_u64().unwrap_or(0) as usize),
        _ => [1, x.dim(1)],
    };
    let dims = BlockDims { width: x.dim(2), heads, grid };
    let mut params = ParamStore::default();
    let operator = operators::build(&spec, kind.site, dims, &mut Builder::new(&mut params, &device, 0, Scheme::Torch))?;
    fill(&mut params, &device, &TensorFile::open(&case.model().join("operator.safetensors"))?)?;

    let precision = checks.precision("output");
    if precision == Precision::Bf16 {
        let g = Graph::inference(precision);
        checks.tensor("output", operator.forward(&g, &params, &g.leaf(x.clone()), None)?.tensor())?;
    }
    let g = Graph::training(Precision::F32);
    let leaf = g.leaf(x);
    let output = operator.forward(&g, &params, &leaf, None)?;
    if precision == Precision::F32 {
        checks.tensor("output", output.tensor())?;
    }
    let mut found = g.backward_from(&output, case.input_f32(&device, "grad_output")?)?;
    if let Some(grad) = found.take(&leaf) {
        checks.tensor("grad.x", &grad)?;
    }
    for (id, param) in params.iter() {
        if let Some(grad) = found.param(&params, id) {
            checks.tensor(&format!("grad.{}", param.name), grad)?;
        }
    }
    Ok(())
}

/// Replaces every parameter by the tensor of its name; the file must have just these.
fn fill(params: &mut ParamStore, device: &Device, file: &TensorFile) -> Result<()> {
    if let Some(extra) = file.names().find(|name| params.find(name).is_none()) {
        return Err(Error::failure(format!("{}: {extra}", file.place()), "unexpected tensor")
            .must("a parameter of the operator"));
    }
    let names: Vec<(String, Vec<usize>)> =
        params.iter().map(|(_, p)| (p.name.clone(), p.value.shape().dims().to_vec())).collect();
    for (name, shape) in names {
        let value = Tensor::from_f32(device, &shape, &read_weight(file as &dyn Source, &name, &shape)?)?;
        if let Some(id) = params.find(&name) {
            params.set(id, value)?;
        }
    }
    Ok(())
}
