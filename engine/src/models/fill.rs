//! Filling a model's parameters from a file, after all names were checked: nothing is half-loaded.

use super::source::{Source, read_weight, read_weight_into, read_weight_rounded};
use crate::autograd::{ParamId, ParamStore};
use crate::error::{Error, Result};
use crate::ops::to_working;
use crate::tensor::{DType, Device, Tensor};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

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
    /// Whether a model that is only run is read: on a device that computes in bf16 everything is rounded as it is read,
    /// elsewhere the weights of products …
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
    // In the order of the file, so that it is read from front to back.
    let offset = |place: &Place| place.parts.first().and_then(|n| source.tensor(n)).map_or(0, |t| t.offset());
    let job = |(id, place): (ParamId, Place)| {
        let bf16 = how.bf16 && (device.element() == DType::BF16 || !(how.exact)(&params.get(id).name));
        (offset(&place), id, place, bf16)
    };
    let mut jobs: Vec<(u64, ParamId, Place, bool)> = wanted.into_iter().map(job).collect();
    jobs.sort_by_key(|(offset, id, ..)| (*offset, id.index()));
    let held = &*params;
    let read = |(_, id, place, bf16): &(u64, ParamId, Place, bool)| -> Result<(ParamId, Tensor)> {
        let value = read_one(held, *id, source, device, place, *bf16)?;
        // Else the whole file would stay in memory beside its copy.
        source.release();
        Ok((*id, value))
    };
    // A device with memory of its own is fed by one thread.
    let readers = if device.is_host() { READERS.min(jobs.len()) } else { 1 };
    let values = in_parallel(&jobs, readers, &read)?;
    values.into_iter().try_for_each(|(id, value)| params.set(id, value))?;
    device.trim();
    Ok(())
}

/// Threads that read weights: enough to keep a disk busy while others convert.
const READERS: usize = 4;

/// What `work` makes of every job, by several threads that take them in order; the first error of the earliest job.
fn in_parallel<J: Sync, R: Send>(
    jobs: &[J],
    threads: usize,
    work: &(dyn Fn(&J) -> Result<R> + Sync),
) -> Result<Vec<R>> {
    if threads < 2 {
        return jobs.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(index) else { return done };
            let result = work(job);
            let failed = result.is_err();
            done.push((index, result));
            if failed {
                // Nobody begins another; those before it are under way and finish.
                next.store(jobs.len(), Ordering::Relaxed);
            }
        }
    };
    let all = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        readers.into_iter().map(|reader| reader.join()).collect::<Vec<_>>()
    });
    let mut done = Vec::with_capacity(jobs.len());
    for reader in all {
        done.extend(reader.map_err(|_| Error::failure("weights", "a thread that reads them stopped"))?);
    }
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// The value of one parameter.
fn read_one(
    params: &ParamStore,
    id: ParamId,
    source: &dyn Source,
    device: &Device,
    place: &Place,
    bf16: bool,
) -> Result<Tensor> {
    let param = params.get(id);
    let (shape, is_product) = (param.value.shape(), is_product(&param.name, param.value.shape().dims()));
    let mut stored = shape.dims().to_vec();
    stored[0] /= place.parts.len().max(1);
    if let (true, &[f, h, w, c]) = (place.filters, stored.as_slice()) {
        stored = vec![f, c, h, w];
    }
    let chunk = (param.value.len() / place.parts.len().max(1)).max(1);
    // A matrix may be stored as a convolution of one pixel.
    let in_file = |name: &str| -> Vec<usize> {
        let found = source.tensor(name).map(|t| t.shape().to_vec()).unwrap_or_default();
        let pixel = found.len() == stored.len() + 2 && found.ends_with(&[1, 1]) && found.starts_with(&stored);
        if pixel { found } else { stored.clone() }
    };
    let read = |target: &mut [f32]| -> Result<()> {
        for (name, target) in place.parts.iter().zip(target.chunks_mut(chunk)) {
            let stored = in_file(name);
            match (place.filters, stored.as_slice()) {
                (true, &[f, c, h, w]) => turn_filters(&read_weight(source, name, &stored)?, [f, c, h * w], target),
                _ => read_weight_into(source, name, &stored, target)?,
            }
        }
        Ok(())
    };
    if device.is_gpu() {
        let mut values = vec![0.0; param.value.len()];
        read(&mut values)?;
        let element = if bf16 { device.element() } else { DType::F32 };
        return Tensor::from_f32_as(device, shape.dims(), &values, element);
    }
    let bf16 = bf16 && is_product;
    if bf16 && device.is_host() && !place.filters {
        let mut value = device.empty_of(shape.dims(), DType::BF16)?;
        for (name, target) in place.parts.iter().zip(value.bf16s_mut()?.chunks_mut(chunk)) {
            read_weight_rounded(source, name, &in_file(name), target)?;
        }
        return Ok(value);
    }
    let mut value = device.empty(shape.dims())?;
    value.edit(read)??;
    if bf16 { value.to_bf16() } else { Ok(value) }
}

/// Stores the parameters of a model that is only run in bf16: all of them on a device that computes in it, elsewhere
/// the weights of products.
///
/// # Errors
/// When memory runs out.
pub(crate) fn round(params: &mut ParamStore) -> Result<()> {
    let ids: Vec<ParamId> = params.iter().map(|(id, _)| id).collect();
    for id in ids {
        let param = params.get(id);
        let value = rounded(&param.name, &param.value)?;
        params.set(id, value)?;
    }
    Ok(())
}

/// A parameter as [`round`] stores it.
pub(super) fn rounded(name: &str, value: &Tensor) -> Result<Tensor> {
    let device = value.device();
    match (value.dtype(), device.element()) {
        (DType::F32, DType::BF16) => to_working(value),
        (DType::F32, _) if !device.is_gpu() && is_product(name, value.shape().dims()) => value.to_bf16(),
        _ => Ok(value.clone()),
    }
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
    fn jobs_keep_their_order_and_the_earliest_error_counts() {
        let jobs: Vec<usize> = (0..100).collect();
        let double = |job: &usize| Ok(2 * job);
        for threads in [1, 3, 8] {
            let done = in_parallel(&jobs, threads, &double).unwrap();
            assert_eq!(done, jobs.iter().map(|job| 2 * job).collect::<Vec<_>>());
            let fail = |job: &usize| match job {
                ..40 => Ok(()),
                _ => Err(Error::failure(format!("job {job}"), "wrong")),
            };
            assert_eq!(in_parallel(&jobs, threads, &fail).unwrap_err().to_string(), "job 40: wrong");
        }
    }

    #[test]
    fn filters_turn_by_hand() {
        // Two filters of two channels and three taps; a value names filter, channel, tap.
        let from = [0.0, 1.0, 2.0, 10.0, 11.0, 12.0, 100.0, 101.0, 102.0, 110.0, 111.0, 112.0];
        let mut to = [0.0; 12];
        turn_filters(&from, [2, 2, 3], &mut to);
        assert_eq!(to, [0.0, 10.0, 1.0, 11.0, 2.0, 12.0, 100.0, 110.0, 101.0, 111.0, 102.0, 112.0]);
    }
}
