//! Data order: which images a step sees.

use crate::error::{Error, Result};
use crate::io::datasets::ImageSet;
use crate::tensor::{Device, Tensor};
use graft_kernels::rng::Philox;

/// Base of the random streams that shuffle epochs.
const SHUFFLE_STREAMS: u64 = 1 << 40;

/// A data set that steps draw from.
pub trait Examples {
    /// How many there are.
    fn count(&self) -> usize;
}

impl Examples for ImageSet {
    fn count(&self) -> usize {
        self.n
    }
}

/// Shuffled passes over a data set, addressed by step: the same seed gives the same batches, whatever ran before.
pub struct Batches<'d, D = ImageSet> {
    data: &'d D,
    batch: usize,
    seed: u64,
    epoch: Option<u64>,
    order: Vec<u32>,
}

/// Images in [−1, 1] and labels.
pub struct Batch {
    /// `[B, C, H, W]`.
    pub images: Tensor,
    /// `[B]`.
    pub labels: Vec<i32>,
}

impl<'d, D: Examples> Batches<'d, D> {
    /// Batches of `batch` images; the last, incomplete one of an epoch is left out.
    ///
    /// # Errors
    /// When the data set has fewer images than a batch, or the batch is empty.
    pub fn new(data: &'d D, batch: usize, seed: u64) -> Result<Self> {
        let n = data.count();
        if batch == 0 || batch > n {
            return Err(Error::usage("batch", "does not fit the data set").is(batch).must(format!("1 to {n}")));
        }
        Ok(Batches { data, batch, seed, epoch: None, order: (0..n as u32).collect() })
    }

    /// Steps in an epoch.
    pub fn per_epoch(&self) -> u64 {
        (self.data.count() / self.batch) as u64
    }

    /// The data set.
    pub fn data(&self) -> &'d D {
        self.data
    }

    /// Numbers of the examples of a step.
    pub fn chosen(&mut self, step: u64) -> &[u32] {
        let (epoch, within) = (step / self.per_epoch(), (step % self.per_epoch()) as usize);
        if self.epoch != Some(epoch) {
            (0..).zip(&mut self.order).for_each(|(i, slot)| *slot = i);
            Philox::new(self.seed, SHUFFLE_STREAMS + epoch).shuffle(&mut self.order);
            self.epoch = Some(epoch);
        }
        &self.order[within * self.batch..][..self.batch]
    }
}

impl Batches<'_> {
    /// The batch of a step.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn get(&mut self, device: &Device, step: u64) -> Result<Batch> {
        let data = self.data;
        images(device, data, self.chosen(step))
    }
}

/// The images at `indices` as a batch: `[H, W, C]` bytes become `[C, H, W]` floats x/127.5 − 1.
///
/// # Errors
/// When memory runs out.
pub fn images(device: &Device, data: &ImageSet, indices: &[u32]) -> Result<Batch> {
    let (c, area) = (data.channels, data.height * data.width);
    let mut images = device.empty(&[indices.len(), c, data.height, data.width])?;
    images.edit(|target| {
        for (image, &index) in target.chunks_mut(c * area).zip(indices) {
            let source = data.image(index as usize);
            for (at, value) in image.iter_mut().enumerate() {
                *value = f32::from(source[at % area * c + at / area]) / 127.5 - 1.0;
            }
        }
    })?;
    let labels = indices.iter().map(|&i| i32::from(data.labels[i as usize])).collect();
    Ok(Batch { images, labels })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(n: usize) -> ImageSet {
        let pixels = (0..n).flat_map(|i| [i as u8, 255, 0, 128]).collect();
        ImageSet {
            n,
            channels: 1,
            height: 2,
            width: 2,
            pixels,
            labels: (0..n).map(|i| i as u8).collect(),
            class_names: vec![],
        }
    }

    #[test]
    fn an_epoch_visits_every_image_once_and_can_be_entered_anywhere() {
        let (device, data) = (Device::cpu(), data(12));
        let mut batches = Batches::new(&data, 4, 7).unwrap();
        let mut seen: Vec<i32> = (0..3).flat_map(|s| batches.get(&device, s).unwrap().labels).collect();
        let second_epoch = batches.get(&device, 4).unwrap().labels;
        seen.sort_unstable();
        assert_eq!(seen, (0..12).collect::<Vec<i32>>());
        let mut fresh = Batches::new(&data, 4, 7).unwrap();
        assert_eq!(fresh.get(&device, 4).unwrap().labels, second_epoch);
        let mut other = Batches::new(&data, 4, 8).unwrap();
        assert_ne!(other.get(&device, 4).unwrap().labels, second_epoch);
    }

    #[test]
    fn bytes_become_minus_one_to_one() {
        let (device, data) = (Device::cpu(), data(3));
        let batch = images(&device, &data, &[0]).unwrap();
        assert_eq!(batch.images.to_vec().unwrap(), [-1.0, 1.0, -1.0, 128.0 / 127.5 - 1.0]);
    }
}
