//! `graft eval --captions`: pictures of a model that reads text, looked up among the real ones they were asked to be.

use super::Args;
use crate::cli::model_args::RunArgs;
use crate::cli::texts::{Compat, Encoding};
use crate::cli::{out, progress};
use crate::error::{Error, Result};
use crate::eval::retrieval::{Drawn, Retrieval, of_drawn, of_set, retrieve};
use crate::io::captioned::{self, CaptionedSet};
use crate::io::datasets::Split;
use crate::io::json as json_file;
use crate::models::pipeline::{Components, Overrides};
use crate::models::pixart::{self, PixArt};
use crate::models::t5::Residence;
use crate::sample::solver::Prediction;
use crate::sample::text::{self, Request};
use crate::tensor::Device;
use graft_kernels::rng::Philox;
use serde_json::json;
use std::path::Path;

/// Random stream that chooses pairs.
const CHOICE_STREAM: u64 = 1 << 41;

/// Runs the command on the data set in `dir`: pairs of concept and style that training saw, and those held out.
pub fn run(args: &Args, dir: &Path, as_json: bool) -> Result<()> {
    let (seen, unseen) = (captioned::emoji(dir, Split::Train)?, captioned::emoji(dir, Split::Test)?);
    let components = Components::find(&args.model, &Overrides::default())?;
    let model = pixart::load(&components.transformer, &Device::cpu(), false)?;
    if components.vae.is_some() || model.config.in_channels != seen.images.channels {
        return Err(Error::usage("--captions", "the model does not draw pictures of this kind")
            .is(format!("{} channels", model.config.in_channels))
            .must(format!("{} channels of pixels, without an autoencoder", seen.images.channels)));
    }
    let mut real = of_set(&seen)?;
    let first_unseen = real.len();
    real.extend(of_set(&unseen)?);
    let mut results = Vec::new();
    for (name, set, offset) in [("seen in training", &seen, 0), ("held out", &unseen, first_unseen)] {
        let mut order: Vec<u32> = (0..set.captions.len() as u32).collect();
        Philox::new(args.seed, CHOICE_STREAM).shuffle(&mut order);
        order.truncate(args.n.unwrap_or(order.len()));
        results.push((name, retrieve(&draw(args, &components, &model, set, &order, offset)?, &real)?));
    }
    if as_json {
        let [seen, held_out] = [0, 1].map(|i: usize| &results[i].1);
        return out::line(format_args!(
            "{:#}",
            json!({
                "model": args.model.display().to_string(),
                "data": dir.display().to_string(),
                "seed": args.seed,
                "seen": seen,
                "held_out": held_out,
            })
        ));
    }
    for (name, found) in &results {
        out::line(line(name, found))?;
    }
    Ok(())
}

fn line(name: &str, r: &Retrieval) -> String {
    format!(
        "{name}: {} pictures, own one nearest {:.0} %, among the 10 nearest {:.0} %, {:.1} % of {:.0} candidates nearer",
        r.n,
        100.0 * r.first,
        100.0 * r.tenth,
        100.0 * r.nearer,
        r.candidates
    )
}

/// Draws the captions at `order`; the real picture of caption i is number `offset` + i.
fn draw(
    args: &Args,
    components: &Components,
    model: &PixArt,
    set: &CaptionedSet,
    order: &[u32],
    offset: usize,
) -> Result<Vec<Drawn>> {
    let prompts: Vec<String> = order.iter().map(|&i| set.captions[i as usize].clone()).collect();
    let run = RunArgs::new("cpu", args.dtype);
    let encoding = Encoding {
        components,
        residence: Residence::Memory,
        most: model.config.max_tokens,
        compat: Compat::Diffusers,
        run: &run,
    };
    let texts = encoding.encode(&prompts, &vec![String::new(); prompts.len()])?;
    let side = set.images.height;
    let stated = components.scheduler.as_deref().map(json_file::read).transpose()?;
    let request = Request {
        sampler: args.sampler.parse()?,
        steps: args.steps,
        guidance: args.guidance_scale,
        batch: args.batch,
        precision: args.dtype.into(),
        factor: 1,
        prediction: stated.as_ref().map_or(Prediction::Noise, Prediction::stated),
        ..Request::new(texts.prompts, texts.nulls, [side, side], args.seed)
    };
    let bar = progress::bar((order.len() * args.steps) as u64, "sample");
    let drawn = text::generate(model, &request, &mut |p, _| {
        bar.set_position((p.images * args.steps + p.batch * p.step) as u64);
        Ok(())
    });
    bar.finish_and_clear();
    of_drawn(&drawn?, order.iter().map(|&i| offset + i as usize))
}
