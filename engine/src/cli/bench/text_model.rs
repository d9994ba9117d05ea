//! PixArt-Σ with random weights and the features of a random text: forward passes of the guided pair, and pictures.

use super::model::{Args, Work, paced};
use super::{Subject, show};
use crate::autograd::{Graph, Precision, Var};
use crate::backend::Device;
use crate::error::{Error, Result};
use crate::graft::cost::Counter;
use crate::graft::select::PAPER_PIXART;
use crate::models::pixart::{self, PixArt, PixArtConfig};
use crate::models::vae::{Vae, VaeConfig};
use crate::nn::operators::Spec;
use crate::report::bench::Row;
use crate::sample::text::{self, Request};
use crate::tensor::{DType, Tensor};
use std::time::Duration;

/// The name on the command line, and that of its rows.
pub const NAME: &str = "PixArt-Sigma";
const CASE: &str = "PixArt-Σ";
/// Time after which a pass on the host takes no further sample.
const PATIENCE: Duration = Duration::from_secs(20);
/// Pixels along a side for each latent, and the side that the largest published configuration is of.
const PIXELS: usize = 8;
const LARGEST: usize = 2048;
/// Scale and width of the published autoencoder.
const SCALING: f64 = 0.13025;

/// Every size, share of grafted layers and batch, a row each.
pub fn rows(args: &Args, work: Work, device: &Device, precision: Precision, json: bool) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for &pixels in &args.pixels {
        for &grafted in &args.grafted {
            let config = config(&args.operator, pixels, grafted)?;
            for &batch in &args.batch {
                let side = pixels / PIXELS;
                let mut found = measure(args, work, device, precision, config.clone(), side, batch)?;
                for row in &mut found {
                    row.axes.insert("percent grafted".to_string(), grafted);
                    show(row, json)?;
                }
                rows.extend(found);
            }
        }
    }
    Ok(rows)
}

/// The published configuration nearest to a resolution with a share of its layers grafted: half of them are the
/// paper's, other shares are spread evenly.
fn config(operator: &str, pixels: usize, grafted: f64) -> Result<PixArtConfig> {
    let published = [256, 512, 1024].into_iter().find(|side| *side >= pixels).unwrap_or(LARGEST);
    let mut config = PixArtConfig::sigma_xl(published)?;
    let unit = PIXELS * config.patch;
    if pixels == 0 || !pixels.is_multiple_of(unit) {
        return Err(Error::usage("--pixels", "no such resolution").is(pixels).must(format!("a multiple of {unit}")));
    }
    if !(0.0..=100.0).contains(&grafted) {
        return Err(Error::usage("--grafted", "no share of the layers").is(grafted).must("0 to 100 percent"));
    }
    let depth = config.depth();
    let count = (grafted / 100.0 * depth as f64).round() as usize;
    let layers: Vec<usize> = match count == PAPER_PIXART.len() {
        true => PAPER_PIXART.to_vec(),
        false => (0..count).map(|i| i * depth / count).collect(),
    };
    for i in layers {
        config.blocks[i].attn = Spec::new(operator);
    }
    Ok(config)
}

fn measure(
    args: &Args,
    work: Work,
    device: &Device,
    precision: Precision,
    config: PixArtConfig,
    side: usize,
    batch: usize,
) -> Result<Vec<Row>> {
    if batch == 0 {
        return Err(Error::usage("--batch", "nothing to run").is(0).must("at least 1"));
    }
    let tokens = (side / config.patch).pow(2);
    let flops = (side == config.sample_size).then(|| Counter::new(&config).model()).transpose()?.map(|c| c.flops);
    let bf16 = precision == Precision::Bf16;
    let model = PixArt::random_in(config, device, 1, bf16)?;
    let mut rows = Vec::new();
    let mut add = |bench, words: &str, passes: f64, times| {
        let element = if bf16 { DType::BF16 } else { DType::F32 };
        let mut row = Subject { bench, case: CASE.into(), work: words.into() }.row(device, element, times);
        row.flops = flops.map(|flops| passes * flops);
        row.peak_bytes = Some(device.memory().peak as u64);
        row.axes.extend([("batch".to_string(), batch as f64), ("tokens".to_string(), tokens as f64)]);
        rows.push(row);
    };
    device.reset_peak();
    match work {
        Work::Forward => {
            add("model", "forward", batch as f64, forward(args, device, precision, &model, side, batch, false)?);
            if batch == 2 {
                // What sampling does: a null prompt of one token costs no attention.
                let times = forward(args, device, precision, &model, side, batch, true)?;
                add("model", "forward, null prompt of one token", batch as f64, times);
            }
        }
        Work::Sampling => {
            let prompts =
                (0..batch).map(|i| features(&model, device, model.config.max_tokens, i)).collect::<Result<_>>()?;
            let nulls = (0..batch).map(|_| features(&model, device, 1, batch)).collect::<Result<_>>()?;
            let request = Request { steps: args.steps, batch, precision, ..Request::new(prompts, nulls, [side; 2], 0) };
            let vae = Vae::new(VaeConfig::released(SCALING), device, 1)?;
            let mut picture = || {
                let latents = text::generate(&model, &request, &mut |_, _| Ok(()))?;
                vae.decode(&vae.config.unscale(&latents)?, precision, &mut |_, _| {}).map(drop)
            };
            let times = paced(device, args.samples, &mut picture)?;
            add("e2e", &format!("{} steps", args.steps), 2.0 * (batch * args.steps) as f64, times);
        }
        Work::TrainingStep => {
            return Err(Error::usage("bench train", "PixArt is measured in forward passes and pictures")
                .is(NAME)
                .must("a DiT, as DiT-XL/2"));
        }
    }
    Ok(rows)
}

/// Features `[tokens, C]` of a random text.
fn features(model: &PixArt, device: &Device, tokens: usize, text: usize) -> Result<Tensor> {
    let shape = [tokens, model.config.caption_channels];
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| ((i * 7 + text * 13) % 61) as f32 / 30.0 - 1.0).collect();
    Tensor::from_f32(device, &shape, &values)
}

/// A pass of a batch; `null` gives its second half prompts of one token.
fn forward(
    args: &Args,
    device: &Device,
    precision: Precision,
    model: &PixArt,
    side: usize,
    batch: usize,
    null: bool,
) -> Result<Vec<f64>> {
    let c = &model.config;
    let g = Graph::inference(precision);
    let keys = |text: usize, tokens: usize| -> Result<pixart::Keys> {
        let found = features(model, device, tokens, text)?.reshape(&[1, tokens, c.caption_channels])?;
        let text = pixart::Text { constant: tokens == 1, ..pixart::Text::new(&g, &Var::constant(found), None)? };
        model.keys(&g, &text)
    };
    let shape = [batch, c.in_channels, side, side];
    let x = Var::constant(Tensor::from_f32(device, &shape, &vec![0.5; shape.iter().product()])?);
    let t = Tensor::from_f32(device, &[batch], &vec![500.0; batch])?;
    if !null {
        let all = pixart::Keys::join(&(0..batch).map(|i| keys(i, c.max_tokens)).collect::<Result<Vec<_>>>()?)?;
        let mut pass = || model.forward(&g, &x, &t, &all, None, pixart::Run::default()).map(drop);
        return device.time(args.samples, PATIENCE, &mut pass);
    }
    // The halves run one after the other, as in sampling.
    let half = [1, c.in_channels, side, side];
    let x = Var::constant(Tensor::from_f32(device, &half, &vec![0.5; half.iter().product()])?);
    let t = Tensor::from_f32(device, &[1], &[500.0])?;
    let (prompt, none) = (keys(0, c.max_tokens)?, keys(1, 1)?);
    let mut pass = || {
        model.forward(&g, &x, &t, &prompt, None, pixart::Run::default())?;
        model.forward(&g, &x, &t, &none, None, pixart::Run::default()).map(drop)
    };
    device.time(args.samples, PATIENCE, &mut pass)
}

#[cfg(test)]
mod tests {
    use super::super::model::tests::args;
    use super::*;

    #[test]
    fn half_of_the_layers_are_the_papers() {
        let grafted = |percent| {
            let found = config("hyena_x", 2048, percent).unwrap();
            (0..28).filter(|&i| found.blocks[i].attn == Spec::new("hyena_x")).collect::<Vec<_>>()
        };
        assert_eq!(grafted(50.0), PAPER_PIXART);
        assert_eq!((grafted(0.0).len(), grafted(100.0).len(), grafted(25.0)[1]), (0, 28, 4));
        assert!(config("hyena_x", 2047, 0.0).is_err() && config("hyena_x", 2048, -1.0).is_err());
        // Larger than any published one: its positions are stretched.
        assert_eq!(config("hyena_x", 4096, 0.0).unwrap().sample_size, LARGEST / PIXELS);
    }

    #[test]
    fn a_small_model_gives_its_rows() {
        let args = args(&[NAME, "--samples", "1", "--steps", "1"]);
        let small =
            PixArtConfig { sample_size: 4, caption_channels: 8, max_tokens: 3, ..PixArtConfig::plain(2, 16, 2) };
        let of = |work, batch| measure(&args, work, &Device::cpu(), Precision::F32, small.clone(), 4, batch).unwrap();
        let works: Vec<String> = of(Work::Forward, 2).into_iter().map(|row| row.work).collect();
        assert_eq!(works, ["forward", "forward, null prompt of one token"]);
        let row = &of(Work::Sampling, 1)[0];
        assert_eq!((row.case.as_str(), row.work.as_str(), row.axes["tokens"]), (CASE, "1 steps", 4.0));
        assert!(row.ms > 0.0 && row.flops.unwrap() > 0.0);
    }
}
