//! Tensors: a shape, a dtype and shared storage on a device. Always contiguous, row-major.
//!
//! Contiguity is an invariant, not a flag: operators that need a part of a tensor (a row of a modulation table, the
//! q/k/v parts of a projection) take the whole and an index. Storage comes from the device's [`pool`](device) and
//! returns to it when the last tensor that shares it is dropped.
//!
//! Slices ([`Tensor::f32s`]) are for the host's own devices; a tensor of a GPU is read as [`Tensor::values`], changed
//! by [`Tensor::edit`] and handed to kernels as an address.

mod device;
mod gpu;
mod memory;
mod pages;
mod shape;

pub use device::{Device, DeviceKind, MemoryStats};
pub use gpu::Gpu;
pub use memory::MemoryPlan;
pub use shape::Shape;

use crate::error::{Error, Result};
use device::Buffer;
use gpu::Memory;
use graft_kernels::Weight;
use graft_kernels::launch::{In, Out};
use half::bf16;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// bfloat16: weights on the CPU, anything on a GPU.
    BF16,
    /// 32-bit signed integer: labels and indices.
    I32,
}

impl DType {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::BF16 => 2,
        }
    }

    /// Little-endian elements as f32.
    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let words = bytes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
        match self {
            DType::F32 => words.map(f32::from_le_bytes).collect(),
            DType::I32 => words.map(|b| i32::from_le_bytes(b) as f32).collect(),
            DType::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
        })
    }
}

/// A contiguous, row-major tensor. Cloning shares the storage; writing needs sole ownership.
#[derive(Clone)]
pub struct Tensor {
    shape: Shape,
    dtype: DType,
    // None only while dropping.
    buffer: Option<Arc<Buffer>>,
}

impl Drop for Tensor {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            Buffer::release(buffer);
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {} on {})", self.shape, self.dtype, self.device().kind())
    }
}

impl Tensor {
    pub(crate) fn new(shape: Shape, dtype: DType, buffer: Arc<Buffer>) -> Self {
        Tensor { shape, dtype, buffer: Some(buffer) }
    }

    /// f32 values with a shape, on a device.
    ///
    /// # Errors
    /// When the number of values is not the product of the dims, or memory runs out.
    pub fn from_f32(device: &Device, shape: &[usize], values: &[f32]) -> Result<Tensor> {
        let mut t = device.empty(shape)?;
        same_length(t.shape, values.len())?;
        t.write(bytemuck::cast_slice(values))?;
        Ok(t)
    }

    /// f32 values rounded to a float type (ties to even), with a shape, on a device.
    ///
    /// # Errors
    /// As [`Tensor::from_f32`], or when the type is an integer.
    pub fn from_f32_as(device: &Device, shape: &[usize], values: &[f32], dtype: DType) -> Result<Tensor> {
        match dtype {
            DType::F32 => Tensor::from_f32(device, shape, values),
            DType::BF16 => {
                let mut t = device.empty_of(shape, dtype)?;
                same_length(t.shape, values.len())?;
                t.assign(values)?;
                Ok(t)
            }
            DType::I32 => Err(Error::failure("tensor", "wrong dtype").is(dtype).must("f32 or bf16")),
        }
    }

    /// i32 values with a shape, on a device.
    ///
    /// # Errors
    /// As [`Tensor::from_f32`].
    pub fn from_i32(device: &Device, shape: &[usize], values: &[i32]) -> Result<Tensor> {
        let mut t = device.empty_i32(shape)?;
        same_length(t.shape, values.len())?;
        t.write(bytemuck::cast_slice(values))?;
        Ok(t)
    }

    /// A tensor of zeros.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn zeros(device: &Device, shape: &[usize]) -> Result<Tensor> {
        Self::zeros_of(device, shape, DType::F32)
    }

    /// A tensor of zeros of a given dtype.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn zeros_of(device: &Device, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let mut t = device.empty_of(shape, dtype)?;
        if let Some(memory) = t.buffer().memory() {
            memory.gpu().fill(memory.address(), 0, t.bytes())?;
        } else if !device.is_dry() {
            t.floats_mut()?.fill(0.0);
        }
        Ok(t)
    }

    /// Shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Size of one axis; 1 beyond the rank.
    pub fn dim(&self, axis: usize) -> usize {
        self.shape.dims().get(axis).copied().unwrap_or(1)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Device that holds the storage.
    pub fn device(&self) -> &Device {
        self.buffer().device()
    }

    fn buffer(&self) -> &Arc<Buffer> {
        match &self.buffer {
            Some(buffer) => buffer,
            None => unreachable!("the buffer is taken only by drop"),
        }
    }

    /// The same values in another shape.
    ///
    /// # Errors
    /// When the element counts differ.
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        let shape = Shape::new(shape)?;
        if shape.len() != self.len() {
            return Err(Error::failure("reshape", "element counts differ")
                .is(self.shape)
                .must(format!("the size of {shape}")));
        }
        Ok(Tensor { shape, dtype: self.dtype, buffer: self.buffer.clone() })
    }

    /// [`Tensor::reshape`] by move, so that sole ownership is kept.
    ///
    /// # Errors
    /// When the element counts differ.
    pub fn into_shape(mut self, shape: &[usize]) -> Result<Tensor> {
        let reshaped = self.reshape(shape)?.shape;
        self.shape = reshaped;
        Ok(self)
    }

    /// f32 values in place.
    ///
    /// # Errors
    /// When the dtype is another or the storage is not in host memory.
    pub fn f32s(&self) -> Result<&[f32]> {
        self.want(DType::F32)?;
        Ok(&self.floats()?[..self.len()])
    }

    /// i32 values in place.
    ///
    /// # Errors
    /// As [`Tensor::f32s`].
    pub fn i32s(&self) -> Result<&[i32]> {
        self.want(DType::I32)?;
        Ok(&bytemuck::cast_slice(self.floats()?)[..self.len()])
    }

    /// bf16 values in place.
    ///
    /// # Errors
    /// As [`Tensor::f32s`].
    pub fn bf16s(&self) -> Result<&[bf16]> {
        self.want(DType::BF16)?;
        Ok(&bytemuck::cast_slice(self.floats()?)[..self.len()])
    }

    /// The values as a weight, in whichever type they are stored.
    ///
    /// # Errors
    /// When the dtype is an integer.
    pub fn weight(&self) -> Result<Weight<'_, f32>> {
        Ok(match self.dtype {
            DType::BF16 => Weight::Bf16(self.bf16s()?),
            _ => Weight::Native(self.f32s()?),
        })
    }

    /// Mutable f32 values.
    ///
    /// # Errors
    /// When the dtype is another, or another tensor shares the storage.
    pub fn f32s_mut(&mut self) -> Result<&mut [f32]> {
        self.want(DType::F32)?;
        let len = self.len();
        Ok(&mut self.floats_mut()?[..len])
    }

    /// Mutable bf16 values.
    ///
    /// # Errors
    /// As [`Tensor::f32s_mut`].
    pub fn bf16s_mut(&mut self) -> Result<&mut [bf16]> {
        self.want(DType::BF16)?;
        let len = self.len();
        Ok(&mut bytemuck::cast_slice_mut(self.floats_mut()?)[..len])
    }

    /// Mutable i32 values.
    ///
    /// # Errors
    /// As [`Tensor::f32s_mut`].
    pub fn i32s_mut(&mut self) -> Result<&mut [i32]> {
        self.want(DType::I32)?;
        let len = self.len();
        Ok(&mut bytemuck::cast_slice_mut(self.floats_mut()?)[..len])
    }

    fn floats(&self) -> Result<&[f32]> {
        self.buffer().floats().ok_or_else(|| elsewhere(self.shape))
    }

    fn floats_mut(&mut self) -> Result<&mut [f32]> {
        let shape = self.shape;
        self.alone()?.floats_mut().ok_or_else(|| elsewhere(shape))
    }

    /// The storage, which no other tensor may share.
    fn alone(&mut self) -> Result<&mut Buffer> {
        let shape = self.shape;
        self.buffer.as_mut().and_then(Arc::get_mut).ok_or_else(|| {
            Error::failure(format!("tensor {shape}"), "written while another tensor shares its storage")
                .fix("write to a copy (Tensor::copy)")
        })
    }

    /// Values on the host as f32: in place where they are there in that type, a copy otherwise.
    ///
    /// # Errors
    /// When the dtype is an integer, or the device fails.
    pub fn values(&self) -> Result<Cow<'_, [f32]>> {
        self.want_float()?;
        if self.buffer().memory().is_none() && self.dtype == DType::F32 {
            return Ok(Cow::Borrowed(self.f32s()?));
        }
        Ok(Cow::Owned(self.to_vec()?))
    }

    /// Changes values as f32 on the host: in place where they are there in that type, else through a copy that is
    /// rounded back.
    ///
    /// # Errors
    /// As [`Tensor::f32s_mut`], or the device fails.
    pub fn edit<R>(&mut self, change: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        self.want_float()?;
        if self.buffer().memory().is_none() && self.dtype == DType::F32 {
            return Ok(change(self.f32s_mut()?));
        }
        let mut values = self.values()?.into_owned();
        let out = change(&mut values);
        self.assign(&values)?;
        Ok(out)
    }

    /// Writes values, rounded to the element type; as many as there are elements.
    fn assign(&mut self, values: &[f32]) -> Result<()> {
        match self.dtype {
            DType::BF16 => {
                let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
                self.write(bytemuck::cast_slice(&rounded))
            }
            _ => self.write(bytemuck::cast_slice(values)),
        }
    }

    fn want_float(&self) -> Result<()> {
        match self.dtype {
            DType::I32 => self.want(DType::F32),
            _ => Ok(()),
        }
    }

    fn download(&self, bytes: &mut [u8]) -> Result<()> {
        match self.buffer().memory() {
            Some(memory) => memory.gpu().download(memory.address(), bytes),
            None => Ok(()),
        }
    }

    /// Fills the storage from bytes of its length.
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let buffer = self.alone()?;
        if let Some(memory) = buffer.memory() {
            return memory.gpu().upload(memory.address(), bytes);
        }
        let target = bytemuck::cast_slice_mut::<f32, u8>(buffer.floats_mut().unwrap_or_default());
        target[..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// Where a kernel reads the elements. The caller has checked the dtype.
    pub(crate) fn input<T>(&self) -> Result<In<T>> {
        Ok(In::at(self.address()?))
    }

    /// Where a kernel writes the elements. The caller has checked the dtype.
    ///
    /// # Errors
    /// When another tensor shares the storage.
    pub(crate) fn output<T>(&mut self) -> Result<Out<T>> {
        self.alone()?;
        Ok(Out::at(self.address()?))
    }

    fn address(&self) -> Result<u64> {
        self.buffer().memory().map(Memory::address).ok_or_else(|| {
            Error::failure(format!("tensor {}", self.shape), "is not in the memory of a GPU").is(self.device().kind())
        })
    }

    /// Whether this tensor alone owns its storage, so that it may be written in place.
    pub fn is_unique(&mut self) -> bool {
        self.buffer.as_mut().is_some_and(|b| Arc::get_mut(b).is_some())
    }

    fn want(&self, dtype: DType) -> Result<()> {
        if self.dtype == dtype {
            return Ok(());
        }
        Err(Error::failure(format!("tensor {}", self.shape), "wrong dtype").is(self.dtype).must(dtype))
    }

    /// A copy in fresh storage on the same device.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn copy(&self) -> Result<Tensor> {
        let mut copy = self.device().empty_of(self.shape.dims(), self.dtype)?;
        if let Some((to, from)) = copy.buffer().memory().zip(self.buffer().memory()) {
            to.gpu().copy(to.address(), from.address(), self.bytes())?;
        } else if !self.device().is_dry() {
            let words = (self.bytes()).div_ceil(4);
            copy.floats_mut()?[..words].copy_from_slice(&self.floats()?[..words]);
        }
        Ok(copy)
    }

    /// The values rounded to bf16 (ties to even).
    ///
    /// # Errors
    /// When the dtype is not f32, or memory runs out.
    pub fn to_bf16(&self) -> Result<Tensor> {
        if self.device().is_gpu() {
            return Tensor::from_f32_as(self.device(), self.shape.dims(), &self.values()?, DType::BF16);
        }
        let mut rounded = self.device().empty_of(self.shape.dims(), DType::BF16)?;
        if self.device().is_dry() {
            return Ok(rounded);
        }
        let target: &mut [bf16] = bytemuck::cast_slice_mut(rounded.floats_mut()?);
        target.iter_mut().zip(self.f32s()?).for_each(|(t, s)| *t = bf16::from_f32(*s));
        Ok(rounded)
    }

    /// All values as f32 on the host, whatever the dtype.
    ///
    /// # Errors
    /// When the storage cannot be read.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        if self.device().is_gpu() {
            let mut bytes = vec![0u8; self.bytes()];
            self.download(&mut bytes)?;
            return Ok(self.dtype.decode(&bytes));
        }
        Ok(match self.dtype {
            DType::F32 => self.f32s()?.to_vec(),
            DType::BF16 => self.bf16s()?.iter().map(|v| v.to_f32()).collect(),
            DType::I32 => self.i32s()?.iter().map(|&v| v as f32).collect(),
        })
    }
}

/// The error for host access to values that are in a GPU's memory.
fn elsewhere(shape: Shape) -> Error {
    Error::failure(format!("tensor {shape}"), "its values are not in host memory").fix("use Tensor::values or to_vec")
}

fn same_length(shape: Shape, values: usize) -> Result<()> {
    if shape.len() == values {
        return Ok(());
    }
    Err(Error::failure("tensor", "number of values does not match the shape")
        .is(format!("{values} values"))
        .must(format!("{} for {shape}", shape.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_shared_storage_is_refused() {
        let device = Device::cpu();
        let mut a = Tensor::from_f32(&device, &[2], &[1.0, 2.0]).unwrap();
        let b = a.clone();
        assert!(a.f32s_mut().unwrap_err().to_string().contains("shares its storage"));
        drop(b);
        a.f32s_mut().unwrap()[0] = 5.0;
        assert_eq!(a.f32s().unwrap(), [5.0, 2.0]);
    }

    #[test]
    fn storage_is_recycled() {
        let device = Device::cpu();
        let first = device.empty(&[100]).unwrap();
        let address = first.f32s().unwrap().as_ptr();
        drop(first);
        let second = device.empty(&[10, 10]).unwrap();
        assert_eq!(second.f32s().unwrap().as_ptr(), address);
        assert_eq!(device.memory().live, second.bytes().next_multiple_of(64));
    }

    #[test]
    fn bf16_rounds_to_even() {
        let device = Device::cpu();
        let t = Tensor::from_f32(&device, &[2], &[1.0, 1.0 + 1.0 / 256.0]).unwrap();
        assert_eq!(t.to_bf16().unwrap().to_vec().unwrap(), [1.0, 1.0]);
    }
}
