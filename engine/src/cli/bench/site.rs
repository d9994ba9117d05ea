//! Operators as they sit in a block, by number of tokens: how the cost of each kind grows.

use super::{Keep, PATIENCE_MODEL, Subject, ceilings};
use crate::autograd::{Graph, ParamStore, Precision, Var};
use crate::backend;
use crate::error::{Error, Result};
use crate::nn::operators::{self, BlockDims, Site, Spec};
use crate::nn::{Builder, Scheme};
use crate::report::bench::Row;
use crate::tensor::{DType, Device, Tensor};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Operators that can take the place of attention, as plans name them.
    #[arg(value_delimiter = ',', default_value = "mha,swa,linear_attention,hyena_x")]
    operators: Vec<String>,
    /// Tokens; the nearest square or two squares side by side.
    #[arg(long, value_delimiter = ',', default_value = "256,1024,4096")]
    tokens: Vec<usize>,
    /// Width of the model.
    #[arg(long, default_value_t = 1152)]
    width: usize,
    /// Attention heads.
    #[arg(long, default_value_t = 16)]
    heads: usize,
    /// Samples that go through together.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// cpu or cuda.
    #[arg(long, default_value = "cpu")]
    backend: String,
    /// Measurements of each.
    #[arg(long, default_value_t = 5)]
    samples: usize,
    #[command(flatten)]
    keep: Keep,
}

/// Runs the command.
pub fn run(args: &Args, json: bool) -> Result<()> {
    if args.batch == 0 || args.heads == 0 || !args.width.is_multiple_of(args.heads) {
        return Err(Error::usage("--heads", "does not divide the width")
            .is(format!("{} heads, width {}, batch {}", args.heads, args.width, args.batch))
            .must("a divisor of the width, and a batch of at least 1"));
    }
    let device = backend::open_as(&args.backend, DType::F32)?;
    let mut rows = args.keep.open(json)?;
    ceilings::measure(&device, Precision::F32, &mut rows)?;
    for name in &args.operators {
        for &tokens in &args.tokens {
            rows.put(measure(args, &device, name, grid(tokens)?)?)?;
        }
    }
    rows.finish()
}

/// Rows and columns of so many tokens: a square, or one of half the rows.
fn grid(tokens: usize) -> Result<[usize; 2]> {
    let rows = (1..=tokens.isqrt()).rev().find(|rows| tokens.is_multiple_of(*rows));
    match rows.map(|rows| [rows, tokens / rows]) {
        Some([h, w]) if w <= 2 * h => Ok([h, w]),
        _ => Err(Error::usage("--tokens", "no grid").is(tokens).must("a square, or twice a square")),
    }
}

fn measure(args: &Args, device: &Device, name: &str, grid: [usize; 2]) -> Result<Row> {
    let dims = BlockDims { width: args.width, heads: args.heads, grid };
    let mut params = ParamStore::default();
    let mut builder = Builder::new(&mut params, device, 1, Scheme::Xavier);
    let operator = operators::build(&Spec::new(name), Site::Attn, dims, &mut builder)?;
    let shape = [args.batch, dims.tokens(), args.width];
    let mut x = Tensor::zeros(device, &shape)?;
    x.edit(|values| values.iter_mut().enumerate().for_each(|(i, v)| *v = (i % 17) as f32 / 17.0 - 0.5))?;
    let (x, g) = (Var::constant(x), Graph::inference(Precision::F32));
    device.reset_peak();
    let mut forward = || operator.forward(&g, &params, &x, None).map(drop);
    let times = device.time(args.samples, PATIENCE_MODEL, &mut forward)?;
    let case = format!("{name}, width {}", args.width);
    let mut row = Subject { bench: "site", case, work: "forward".into() }.row(device, DType::F32, times);
    row.flops = Some(args.batch as f64 * operator.flops(dims).total());
    row.peak_bytes = Some(device.memory().peak as u64);
    row.axes.extend([("tokens".to_string(), dims.tokens() as f64), ("batch".to_string(), args.batch as f64)]);
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn every_default_operator_is_measured_at_its_tokens() {
        let args = Line::parse_from(["site", "--width", "32", "--heads", "2", "--samples", "1"]).args;
        for name in &args.operators {
            let row = measure(&args, &Device::cpu(), name, grid(32).unwrap()).unwrap();
            assert!(row.ms > 0.0 && row.flops.unwrap() > 0.0 && row.axes["tokens"] == 32.0, "{row:?}");
        }
        assert_eq!(grid(65_536).unwrap(), [256, 256]);
        assert_eq!(grid(8192).unwrap(), [64, 128]);
        assert!(grid(7).is_err() && grid(0).is_err());
    }
}
