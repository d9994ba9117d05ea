//! Operators of a model by layer: what `graft inspect` and `graft plan check` print.

use super::table::Table;
use crate::error::Result;
use crate::graft::cost::{Counter, SiteCost};
use crate::graft::gpu::{self, GPUS, Gpu, Prediction};
use crate::graft::plan::{Assignment, Plan};
use crate::models::sites::SiteConfig;
use crate::nn::operators::Site;
use crate::report::format::{count, seconds};
use serde_json::{Value, json};

/// One site of one layer.
pub struct SiteRow {
    layer: usize,
    site: Site,
    operator: String,
    grafted: bool,
    cost: SiteCost,
    /// Predicted seconds by GPU.
    seconds: Vec<(&'static str, f64)>,
}

/// Every site in the order of the model; those that `assignments` name count as grafted.
///
/// # Errors
/// An operator that cannot take the model's sizes.
pub fn rows<C: SiteConfig>(config: &C, assignments: &[Assignment], predicted: &[Prediction]) -> Result<Vec<SiteRow>> {
    let mut counter = Counter::new(config);
    let mut rows = Vec::with_capacity(2 * config.depth());
    for (layer, block) in config.blocks().iter().enumerate() {
        for (site, spec) in [(Site::Attn, &block.attn), (Site::Mlp, &block.mlp)] {
            let of = |p: &Prediction| if site == Site::Attn { p.attn[layer] } else { p.mlp[layer] };
            rows.push(SiteRow {
                layer,
                site,
                operator: spec.to_string(),
                grafted: assignments.iter().any(|a| a.block == layer && a.site == site),
                cost: counter.site(site, spec)?,
                seconds: predicted.iter().map(|p| (p.gpu, of(p))).collect(),
            });
        }
    }
    Ok(rows)
}

/// Layers with the same operator at the same site in one line; numbers are those of one layer.
pub fn table(rows: &[SiteRow]) -> Table {
    let mut head: Vec<String> =
        ["site", "layers", "operator", "parameters", "FLOP operator", "FLOP projections"].map(String::from).into();
    let gpus = rows.first().map_or(&[][..], |r| &r.seconds);
    head.extend(gpus.iter().map(|(gpu, _)| format!("{gpu}*")));
    let mut table = Table::new(&head.iter().map(String::as_str).collect::<Vec<_>>());
    for (layers, first) in grouped(rows) {
        let mut cells = vec![
            first.site.to_string(),
            layers,
            format!("{}{}", first.operator, if first.grafted { " (grafted)" } else { "" }),
            first.cost.params.to_string(),
            count(first.cost.flops_operator),
            count(first.cost.flops_projections),
        ];
        cells.extend(first.seconds.iter().map(|(_, s)| seconds(*s)));
        table.row(cells);
    }
    table
}

/// What the star in [`table`] means.
pub fn remark(batch: usize) -> String {
    format!("* time of one forward pass, predicted, not measured: batch of {batch}, bf16")
}

/// Every site as JSON.
pub fn json(rows: &[SiteRow]) -> Vec<Value> {
    rows.iter()
        .map(|r| {
            let mut row = json!({
                "layer": r.layer, "site": r.site, "operator": r.operator, "parameters": r.cost.params,
                "flops_operator": r.cost.flops_operator, "flops_projections": r.cost.flops_projections,
            });
            for (gpu, s) in &r.seconds {
                row["predicted_seconds"][*gpu] = json!(s);
            }
            row
        })
        .collect()
}

/// Predictions for a model: of one GPU, or of all that are known.
///
/// # Errors
/// An unknown GPU.
pub fn predictions<C: SiteConfig>(config: &C, name: Option<&str>, batch: usize) -> Result<Vec<Prediction>> {
    let gpus: Vec<Gpu> = match name {
        Some(name) => vec![name.parse()?],
        None => GPUS.to_vec(),
    };
    gpus.into_iter().map(|gpu| gpu::predict(config, gpu, batch)).collect()
}

/// What the base model decided, a sentence each.
pub fn chosen(plan: &Plan) -> Vec<String> {
    let line = |(site, pattern, layers): (Site, String, Vec<usize>)| {
        format!("{site}, {pattern}: layers {}", layers.iter().map(usize::to_string).collect::<Vec<_>>().join(", "))
    };
    plan.chosen().into_iter().map(line).collect()
}

fn grouped(rows: &[SiteRow]) -> Vec<(String, &SiteRow)> {
    let mut groups: Vec<(Vec<usize>, &SiteRow)> = Vec::new();
    let alike = |a: &SiteRow, b: &SiteRow| (a.site, &a.operator, a.grafted) == (b.site, &b.operator, b.grafted);
    for row in rows {
        match groups.iter_mut().find(|(_, first)| alike(first, row)) {
            Some((layers, _)) => layers.push(row.layer),
            None => groups.push((vec![row.layer], row)),
        }
    }
    groups.into_iter().map(|(layers, first)| (ranges(&layers), first)).collect()
}

/// Ascending numbers as ranges.
pub fn ranges(numbers: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &n in numbers {
        match parts.last_mut() {
            Some((_, end)) if *end + 1 == n => *end = n,
            _ => parts.push((n, n)),
        }
    }
    let part = |&(a, b): &(usize, usize)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    parts.iter().map(part).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::dit::DitConfig;
    use crate::nn::operators::Spec;

    #[test]
    fn layer_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn alike_layers_share_a_line() {
        let mut config = DitConfig::named("DiT-S/2").unwrap();
        config.blocks[3].attn = Spec::new("hyena_x").with("taps", 4.0);
        let grafted = [Assignment::new(3, Site::Attn, config.blocks[3].attn.clone())];
        let predicted = predictions(&config, Some("h100"), 2).unwrap();
        let rows = rows(&config, &grafted, &predicted).unwrap();
        assert_eq!(rows.len(), 24);
        let text = table(&rows).to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].contains("h100*") && lines[1].contains("0-2,4-11") && lines[1].contains("mha(heads=6)"));
        assert!(lines[2].contains("0-11") && lines[3].contains("hyena_x(taps=4) (grafted)"), "{text}");
        let json = json(&rows);
        assert_eq!(json[0]["parameters"], 4 * 384 * 384 + 4 * 384);
        assert_eq!(json[6]["predicted_seconds"]["h100"], predicted[0].attn[3]);
    }
}
