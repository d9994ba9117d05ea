//! `graft encode --model DIR -p "…"`: features of texts in a file.

use super::model_args::RunArgs;
use super::out;
use super::texts::{self, Compat, Encoding, PartArgs};
use crate::error::{Error, Result};
use crate::io::dtype::FileDtype;
use crate::io::safetensors::{self, TensorRecord};
use crate::models::pixart;
use crate::tensor::Tensor;
use half::bf16;
use serde_json::json;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, or any folder with text_encoder and tokenizer.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    parts: PartArgs,
    /// Text to encode; may be given several times.
    #[arg(short, long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// File with a text on every line.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// What all texts are guided away from; the empty text where not given.
    #[arg(long, default_value = "", value_name = "TEXT")]
    negative_prompt: String,
    /// Whose behaviour to follow where the released programs differ.
    #[arg(long, value_enum, default_value_t = Compat::Diffusers)]
    compat: Compat,
    /// Most tokens of a text; as the model was trained where not given.
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// safetensors file to write: text [n, L, C], text_mask, negative and negative_mask; features are bf16 with --dtype
    /// bf16.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    super::sample::writable(&args.output)?;
    let mut prompts = args.prompt.clone();
    if let Some(path) = &args.prompts {
        prompts.extend(texts::lines(path)?);
    }
    if prompts.is_empty() {
        return Err(Error::usage("--prompt", "no text").must("at least one, or a file with --prompts"));
    }
    let components = args.parts.find(&args.model)?;
    let most = match args.max_tokens {
        Some(0) => return Err(Error::usage("--max-tokens", "no token").is(0).must("at least 1")),
        Some(most) => most,
        // The transformer need not be there.
        None => pixart::describe(&components.transformer).map_or(300, |config| config.max_tokens),
    };
    let encoding = Encoding {
        components: &components,
        residence: args.parts.residence(),
        most,
        compat: args.compat,
        run: &args.run,
    };
    let texts = encoding.encode(&prompts, &vec![args.negative_prompt.clone(); prompts.len()])?;
    let as_bf16 = args.run.dtype == super::Dtype::Bf16;
    let (text, text_mask) = padded(&texts.prompts)?;
    let (null, null_mask) = padded(&texts.nulls)?;
    let records = [
        features("text", &text, as_bf16),
        mask("text_mask", &text_mask),
        features("negative", &null, as_bf16),
        mask("negative_mask", &null_mask),
    ];
    let about = json!({ "prompts": prompts, "negative_prompt": args.negative_prompt, "compat": args.compat.name() });
    let metadata = BTreeMap::from([("graft.texts".to_string(), about.to_string())]);
    safetensors::write(&args.output, records, &metadata)?;
    out::line(format!("{} texts of up to {} tokens in {}", prompts.len(), text.1[1], args.output.display()))
}

/// Values and shape.
type Values<T> = (Vec<T>, Vec<usize>);

/// Texts of different lengths in one tensor, zeros behind the shorter ones, and their mask.
fn padded(texts: &[Tensor]) -> Result<(Values<f32>, Values<i64>)> {
    let (n, width) = (texts.len(), texts.first().map_or(0, |t| t.dim(1)));
    let longest = texts.iter().map(|t| t.dim(0)).max().unwrap_or(0);
    let (mut values, mut mask) = (vec![0.0; n * longest * width], vec![0; n * longest]);
    for (i, text) in texts.iter().enumerate() {
        values[i * longest * width..][..text.len()].copy_from_slice(&text.values()?);
        mask[i * longest..][..text.dim(0)].fill(1);
    }
    Ok(((values, vec![n, longest, width]), (mask, vec![n, longest])))
}

fn features<'v>(name: &str, (values, shape): &'v Values<f32>, as_bf16: bool) -> TensorRecord<'v> {
    if !as_bf16 {
        return TensorRecord::f32(name.to_string(), shape, values);
    }
    let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
    let bytes = Cow::Owned(bytemuck::cast_slice(&rounded).to_vec());
    TensorRecord { name: name.to_string(), dtype: FileDtype::Bf16, shape: shape.clone(), bytes }
}

fn mask<'v>(name: &str, (values, shape): &'v Values<i64>) -> TensorRecord<'v> {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    TensorRecord { name: name.to_string(), dtype: FileDtype::I64, shape: shape.clone(), bytes: Cow::Owned(bytes) }
}
