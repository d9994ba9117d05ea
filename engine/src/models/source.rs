//! Where weights are read from: safetensors (whole or sharded) or a restricted read of a `torch.save` file.

use crate::error::{Error, Result};
use crate::io::map::Mapped;
use crate::io::safetensors::TensorFile;
use crate::io::torch_zip::{TorchFile, TorchTensor};
use crate::io::weights::ShardedFile;
use crate::nn::operators::Shapes;
use half::bf16;
use std::collections::BTreeSet;

/// A tensor found in a file.
pub trait StoredTensor {
    /// Shape, outermost first.
    fn shape(&self) -> &[usize];
    /// Whether the dtype is a floating type that weights come in.
    fn is_weight(&self) -> bool;
    /// Name of the dtype.
    fn dtype_name(&self) -> String;
    /// Values as f32.
    ///
    /// # Errors
    /// When they cannot be read.
    fn values(&self) -> Result<Vec<f32>>;
    /// Values as f32 into memory of the caller, of as many elements.
    ///
    /// # Errors
    /// When they cannot be read.
    fn read(&self, target: &mut [f32]) -> Result<()> {
        let values = self.values()?;
        target.copy_from_slice(values.get(..target.len()).unwrap_or_default());
        Ok(())
    }
    /// Values as f32 in pieces, from the first to the last
    ///
    /// # Errors
    /// When they cannot be read, and those of `each`.
    fn pieces(&self, each: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        each(&self.values()?)
    }
    /// Where the tensor lies in its file, to read many in order.
    fn offset(&self) -> u64 {
        0
    }
}

/// A set of named tensors, read tensor by tensor; several threads may.
pub trait Source: Sync {
    /// The file or folder, for messages.
    fn place(&self) -> String;
    /// All names.
    fn names(&self) -> BTreeSet<String>;
    /// One tensor.
    fn tensor(&self, name: &str) -> Option<Box<dyn StoredTensor + '_>>;
    /// Shapes of all tensors.
    fn shapes(&self) -> Shapes {
        self.names().into_iter().filter_map(|n| Some((n.clone(), self.tensor(&n)?.shape().to_vec()))).collect()
    }
    /// Gives memory that reading took back to the system.
    fn release(&self);
}

impl StoredTensor for crate::io::safetensors::TensorView<'_> {
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn is_weight(&self) -> bool {
        self.dtype.is_weight()
    }
    fn dtype_name(&self) -> String {
        self.dtype.to_string()
    }
    fn values(&self) -> Result<Vec<f32>> {
        self.to_f32()
    }
    fn read(&self, target: &mut [f32]) -> Result<()> {
        self.read_f32(target)
    }
    fn pieces(&self, each: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        crate::io::safetensors::TensorView::pieces(self, each)
    }
    fn offset(&self) -> u64 {
        crate::io::safetensors::TensorView::offset(self)
    }
}

impl Source for ShardedFile {
    fn place(&self) -> String {
        self.place().to_string()
    }
    fn names(&self) -> BTreeSet<String> {
        self.names().map(str::to_string).collect()
    }
    fn tensor(&self, name: &str) -> Option<Box<dyn StoredTensor + '_>> {
        self.get(name).map(|view| Box::new(view) as Box<dyn StoredTensor + '_>)
    }
    fn release(&self) {
        self.release();
    }
}

impl Source for TensorFile {
    fn place(&self) -> String {
        self.place().to_string()
    }
    fn names(&self) -> BTreeSet<String> {
        self.names().map(str::to_string).collect()
    }
    fn tensor(&self, name: &str) -> Option<Box<dyn StoredTensor + '_>> {
        self.get(name).map(|view| Box::new(view) as Box<dyn StoredTensor + '_>)
    }
    fn release(&self) {
        self.release();
    }
}

impl StoredTensor for TorchTensor<'_, Mapped> {
    fn shape(&self) -> &[usize] {
        self.shape()
    }
    fn is_weight(&self) -> bool {
        self.dtype().is_weight()
    }
    fn dtype_name(&self) -> String {
        self.dtype().to_string()
    }
    fn values(&self) -> Result<Vec<f32>> {
        self.to_f32()
    }
}

/// The state dict of a `torch.save` file, averaged weights preferred.
pub(super) struct TorchWeights {
    file: TorchFile,
}

impl TorchWeights {
    /// Opens a file and makes sure that it holds a state dict.
    pub(super) fn open(path: &std::path::Path) -> Result<Self> {
        let file = TorchFile::open(path)?;
        file.state_dict()?;
        Ok(TorchWeights { file })
    }
}

impl Source for TorchWeights {
    fn place(&self) -> String {
        self.file.place().to_string()
    }
    fn names(&self) -> BTreeSet<String> {
        // `open` has found a state dict, so it is found again.
        self.file.state_dict().map(|d| d.keys().map(|k| k.to_string()).collect()).unwrap_or_default()
    }
    fn tensor(&self, name: &str) -> Option<Box<dyn StoredTensor + '_>> {
        let mut dict = self.file.state_dict().ok()?;
        dict.remove(name).map(|t| Box::new(t) as Box<dyn StoredTensor + '_>)
    }
    fn shapes(&self) -> Shapes {
        let dict = self.file.state_dict();
        dict.map(|d| d.iter().map(|(k, t)| (k.to_string(), t.shape().to_vec())).collect()).unwrap_or_default()
    }
    fn release(&self) {
        self.file.release();
    }
}

/// Finds a weight and checks presence, dtype and shape.
fn find_weight<'s>(source: &'s dyn Source, name: &str, shape: &[usize]) -> Result<Box<dyn StoredTensor + 's>> {
    let place = || format!("{}: {name}", source.place());
    let tensor = source.tensor(name).ok_or_else(|| {
        Error::failure(place(), "missing tensor")
            .must(format!("present with shape {shape:?}"))
            .fix("use the complete checkpoint of this model")
    })?;
    if !tensor.is_weight() {
        return Err(Error::failure(place(), "unsupported dtype for a weight")
            .is(tensor.dtype_name())
            .must("F32, F16, BF16 or F64"));
    }
    if tensor.shape() != shape {
        return Err(Error::failure(place(), "wrong shape")
            .is(format!("{:?}", tensor.shape()))
            .must(format!("{shape:?}")));
    }
    Ok(tensor)
}

/// Error unless all values of a weight are finite.
fn check_finite(source: &dyn Source, name: &str, values: &[f32]) -> Result<()> {
    // Without an early end, so that it runs in vectors: the exponent of what is not finite is all ones.
    let is_finite = values.iter().fold(true, |all, v| all & v.is_finite());
    if is_finite {
        return Ok(());
    }
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::failure(format!("{}: {name}", source.place()), "non-finite weights")
            .is(format!("{} at element {at}", values[at]))
            .must("finite numbers")
            .fix("the checkpoint is damaged or its training diverged: use another one")),
    }
}

/// Reads a weight and checks presence, dtype, shape and finiteness.
pub(crate) fn read_weight(source: &dyn Source, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let values = find_weight(source, name, shape)?.values()?;
    check_finite(source, name, &values)?;
    Ok(values)
}

/// As [`read_weight`], rounded to bf16 piece by piece, so that it is never whole in f32.
pub(crate) fn read_weight_rounded(source: &dyn Source, name: &str, shape: &[usize], target: &mut [bf16]) -> Result<()> {
    let mut rest = target;
    find_weight(source, name, shape)?.pieces(&mut |values| {
        check_finite(source, name, values)?;
        let now = rest.split_off_mut(..values.len().min(rest.len())).unwrap_or_default();
        now.iter_mut().zip(values).for_each(|(to, from)| *to = bf16::from_f32(*from));
        Ok(())
    })
}

/// As [`read_weight`], into memory of the caller.
pub(crate) fn read_weight_into(source: &dyn Source, name: &str, shape: &[usize], target: &mut [f32]) -> Result<()> {
    find_weight(source, name, shape)?.read(target)?;
    check_finite(source, name, target)
}
