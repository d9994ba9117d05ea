//! `graft convert IN OUT --to LAYOUT`: the same model under other names.

use super::model_args::{CLASS_NAMES_KEY, class_names};
use super::{Dtype, out};
use crate::error::{Error, Result};
use crate::models::dit::{self, Conversion, Layout, SaveAs};
use crate::models::{component, pixart};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, or checkpoint (.pt, .pth, safetensors); one without a plan has its operators read off its tensors.
    input: PathBuf,
    /// Folder to write; must be new or empty.
    output: PathBuf,
    /// Names of the tensors.
    #[arg(long, value_enum)]
    to: LayoutArg,
    /// Element type; as the input has it where not given.
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Tokens on each side that sliding windows reach, for checkpoints that do not say; 4 as published where not given.
    #[arg(long, value_name = "N")]
    window: Option<usize>,
}

/// A layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LayoutArg {
    /// The names of the original checkpoints, in model.safetensors.
    Original,
    /// The names of diffusers, in diffusion_pytorch_model.safetensors.
    Diffusers,
}

impl Args {
    fn save_as(&self) -> Option<SaveAs> {
        self.dtype.map(|dtype| match dtype {
            Dtype::F32 => SaveAs::F32,
            Dtype::Bf16 => SaveAs::Bf16,
        })
    }
}

/// Converts a PixArt transformer.
fn pixart(args: &Args, transformer: &Path, as_json: bool) -> Result<()> {
    if args.window.is_some() {
        return Err(Error::usage("--window", "a PixArt transformer has no sliding windows").must("absent"));
    }
    let layout = match args.to {
        LayoutArg::Original => pixart::Layout::Original,
        LayoutArg::Diffusers => pixart::Layout::Diffusers,
    };
    let done = pixart::convert(transformer, &args.output, layout, args.save_as())?;
    let layout = format!("{:?}", args.to).to_lowercase();
    let dtypes: Vec<&str> = done.dtypes.iter().map(|dtype| dtype.name()).collect();
    if as_json {
        let record = json!({ "output": args.output.display().to_string(), "layout": layout, "dtypes": dtypes, "depth": done.config.depth(), "left_out": done.left_out });
        return out::line(format!("{record:#}"));
    }
    let place = args.output.display();
    out::line(format!("{place}: {} blocks, {layout} names, {}", done.config.depth(), dtypes.join(" and ")))?;
    if done.left_out.is_empty() {
        return Ok(());
    }
    out::line(format!("left out, as only training uses it: {}", done.left_out.join(", ")))
}

/// Runs the command.
pub fn run(args: &Args, as_json: bool) -> Result<()> {
    if args.window == Some(0) {
        return Err(Error::usage("--window", "no window").is(0).must("at least 1"));
    }
    let transformer = component(&args.input, "transformer");
    if pixart::is_pixart(&transformer)? {
        return pixart(args, &transformer, as_json);
    }
    let mut extra = BTreeMap::new();
    // A table beside the model would be left behind.
    let classes = dit::describe(&args.input)?.classes;
    let names = class_names(&args.input, classes)?;
    if !names.is_empty() {
        let text = serde_json::to_string(&names).map_err(|e| Error::failure("class names", e.to_string()))?;
        extra.insert(CLASS_NAMES_KEY.to_string(), text);
    }
    let conversion = Conversion {
        layout: match args.to {
            LayoutArg::Original => Layout::Original,
            LayoutArg::Diffusers => Layout::Diffusers,
        },
        dtype: args.save_as(),
        options: args.window.map(|w| ("window".to_string(), w as f64)).into_iter().collect(),
        extra,
    };
    let (config, dtype, assumed) = dit::convert(&args.input, &args.output, &conversion)?;
    let (layout, dtype) = (format!("{:?}", args.to).to_lowercase(), format!("{dtype:?}").to_lowercase());
    let open: Vec<String> = assumed.iter().map(|a| format!("blocks.{}.{}: {}", a.block, a.site, a.option)).collect();
    if as_json {
        let record = json!({ "output": args.output.display().to_string(), "layout": layout, "dtype": dtype, "depth": config.depth(), "assumed": open });
        return out::line(format!("{record:#}"));
    }
    out::line(format!("{}: {} blocks, {layout} names, {dtype}", args.output.display(), config.depth()))?;
    if open.is_empty() {
        return Ok(());
    }
    out::line(format!("taken as published, since the checkpoint does not say: {}", open.join(", ")))
}
