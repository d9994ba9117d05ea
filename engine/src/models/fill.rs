//! Filling a model's parameters from a file, after all names were checked: nothing is half-loaded.

use super::source::{Source, read_weight};
use crate::autograd::{ParamId, ParamStore};
use crate::error::{Error, Result};
use crate::tensor::Device;
use std::collections::BTreeSet;

/// Where a parameter is found.
pub(super) struct Place {
    /// Tensors to be joined along the first axis.
    pub parts: Vec<String>,
    /// The file has a convolution's filters as `[F, C, Kh, Kw]`, the parameter as `[F, Kh, Kw, C]`.
    pub filters: bool,
}

impl Place {
    /// One tensor as it is.
    pub(super) fn of(name: impl Into<String>) -> Place {
        Place { parts: vec![name.into()], filters: false }
    }
}

/// How parameters are read.
pub(super) struct Fill<'f> {
    /// Where each is found, by our name.
    pub place: &'f dyn Fn(&str) -> Place,
    /// Names in the file that need not belong to the model.
    pub ignored: &'f dyn Fn(&str) -> bool,
    /// Whether weights of products are rounded to bf16 as they are read …
    pub bf16: bool,
    /// … but for these.
    pub exact: &'f dyn Fn(&str) -> bool,
}

/// Sets every parameter of a store to what `source` has, on `device`.
///
/// # Errors
/// A missing, unexpected, misshapen or non-finite tensor: the first missing one, since it explains more.
pub(super) fn fill(params: &mut ParamStore, source: &dyn Source, device: &Device, how: &Fill<'_>) -> Result<()> {
    let names = source.names();
    let wanted: Vec<(ParamId, Place)> = params.iter().map(|(id, p)| (id, (how.place)(&p.name))).collect();
    if let Some(missing) = wanted.iter().flat_map(|(_, place)| &place.parts).find(|n| !names.contains(*n)) {
        return Err(Error::failure(format!("{}: {missing}", source.place()), "missing tensor")
            .must("present in this model")
            .fix("use the complete checkpoint, with the config.json that belongs to it"));
    }
    let expected: BTreeSet<&String> = wanted.iter().flat_map(|(_, place)| &place.parts).collect();
    if let Some(extra) = names.iter().find(|n| !expected.contains(n) && !(how.ignored)(n)) {
        return Err(Error::failure(format!("{}: {extra}", source.place()), "unexpected tensor")
            .must("absent in a model of these sizes")
            .fix(
                "check that the checkpoint is of this kind of model, and its config.json the one that belongs to it",
            ));
    }
    for (id, place) in &wanted {
        let bf16 = how.bf16 && !(how.exact)(&params.get(*id).name);
        read_into(params, *id, source, device, place, bf16)?;
        // Else the whole file would stay in memory beside its copy.
        source.release();
    }
    device.trim();
    Ok(())
}

/// Sets one parameter.
fn read_into(
    params: &mut ParamStore,
    id: ParamId,
    source: &dyn Source,
    device: &Device,
    place: &Place,
    bf16: bool,
) -> Result<()> {
    let param = params.get(id);
    let (shape, is_product) = (param.value.shape(), is_product(&param.name, param.value.shape().dims()));
    let mut stored = shape.dims().to_vec();
    stored[0] /= place.parts.len().max(1);
    if let (true, &[f, h, w, c]) = (place.filters, stored.as_slice()) {
        stored = vec![f, c, h, w];
    }
    let mut value = device.empty(shape.dims())?;
    value.edit(|target| -> Result<()> {
        let chunk = (target.len() / place.parts.len().max(1)).max(1);
        for (name, target) in place.parts.iter().zip(target.chunks_mut(chunk)) {
            // A matrix may be stored as a convolution of one pixel.
            let found = source.tensor(name).map(|t| t.shape().to_vec()).unwrap_or_default();
            let pixel = found.len() == stored.len() + 2 && found.ends_with(&[1, 1]) && found.starts_with(&stored);
            let values = read_weight(source, name, if pixel { &found } else { &stored })?;
            match (place.filters, stored.as_slice()) {
                (true, &[f, c, h, w]) => turn_filters(&values, [f, c, h * w], target),
                _ => target.copy_from_slice(&values),
            }
        }
        Ok(())
    })??;
    params.set(id, if bf16 && is_product { value.to_bf16()? } else { value })
}

/// `[F, C, K]` to `[F, K, C]`.
fn turn_filters(from: &[f32], [f, c, k]: [usize; 3], to: &mut [f32]) {
    for filter in 0..f {
        for tap in 0..k {
            for channel in 0..c {
                to[(filter * k + tap) * c + channel] = from[(filter * c + channel) * k + tap];
            }
        }
    }
}

/// Whether a parameter is the weight of a product: tables that are looked up stay in f32.
pub(super) fn is_product(name: &str, shape: &[usize]) -> bool {
    shape.len() == 2 && name.ends_with("weight") && !name.contains("embedding_table")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_turn_by_hand() {
        // Two filters of two channels and three taps; a value names filter, channel, tap.
        let from = [0.0, 1.0, 2.0, 10.0, 11.0, 12.0, 100.0, 101.0, 102.0, 110.0, 111.0, 112.0];
        let mut to = [0.0; 12];
        turn_filters(&from, [2, 2, 3], &mut to);
        assert_eq!(to, [0.0, 10.0, 1.0, 11.0, 2.0, 12.0, 100.0, 110.0, 101.0, 111.0, 102.0, 112.0]);
    }
}
