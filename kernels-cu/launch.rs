//! What a launch is: addresses with their element type, shapes, and the queue that kernels are put in.
//!
//! A kernel's arguments are a generated struct ([`crate::launchers`]) whose fields follow from its signature in the
//! `.cu` file; `<op>/launch.rs` chooses kernels and shapes, and puts them in a [`Queue`], which the engine's `emu` and
//! `cuda` backends are. Nothing here touches memory: an address is a number until a backend runs the kernel.

use half::bf16;
use std::fmt;
use std::marker::PhantomData;

/// Element type that a source is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ElementType {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
}

impl ElementType {
    /// Name in contracts, tables and flags.
    pub fn name(self) -> &'static str {
        match self {
            ElementType::F32 => "f32",
            ElementType::Bf16 => "bf16",
        }
    }

    /// The element called `name`.
    pub fn named(name: &str) -> Option<ElementType> {
        [ElementType::F32, ElementType::Bf16].into_iter().find(|e| e.name() == name)
    }

    /// The definition that makes `T` this type in a source.
    pub fn define(self) -> &'static str {
        match self {
            ElementType::F32 => "-DELEMENT_F32",
            ElementType::Bf16 => "-DELEMENT_BF16",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        if self == ElementType::F32 { 4 } else { 2 }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A type that kernels are compiled for.
pub trait Element: Copy + 'static {
    /// Its name at run time.
    const TYPE: ElementType;
}

impl Element for f32 {
    const TYPE: ElementType = ElementType::F32;
}
impl Element for bf16 {
    const TYPE: ElementType = ElementType::Bf16;
}

/// Address of elements in device memory that a kernel reads.
pub struct In<T>(u64, PhantomData<fn() -> T>);

/// Address of elements in device memory that a kernel writes.
pub struct Out<T>(u64, PhantomData<fn() -> T>);

// By hand: derived ones would ask the same of T.
impl<T> Clone for In<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for In<T> {}
impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Out<T> {}

impl<T> In<T> {
    /// The elements at `address`.
    pub fn at(address: u64) -> Self {
        In(address, PhantomData)
    }

    /// As a number.
    pub fn address(self) -> u64 {
        self.0
    }

    /// The elements from `elements` on.
    #[must_use]
    pub fn offset(self, elements: usize) -> Self {
        In::at(self.0 + (elements * size_of::<T>()) as u64)
    }
}

impl<T> Out<T> {
    /// The elements at `address`.
    pub fn at(address: u64) -> Self {
        Out(address, PhantomData)
    }

    /// As a number.
    pub fn address(self) -> u64 {
        self.0
    }

    /// The elements from `elements` on.
    #[must_use]
    pub fn offset(self, elements: usize) -> Self {
        Out::at(self.0 + (elements * size_of::<T>()) as u64)
    }

    /// The same elements, to be read by a later kernel.
    pub fn read(self) -> In<T> {
        In::at(self.0)
    }
}

/// An optional tensor as kernels take it: absent is the null address.
pub trait OrNull {
    /// The address type.
    type Address;
    /// The address, null where there is none.
    fn or_null(self) -> Self::Address;
}

impl<T> OrNull for Option<In<T>> {
    type Address = In<T>;
    fn or_null(self) -> In<T> {
        self.unwrap_or(In::at(0))
    }
}

impl<T> OrNull for Option<Out<T>> {
    type Address = Out<T>;
    fn or_null(self) -> Out<T> {
        self.unwrap_or(Out::at(0))
    }
}

/// How a kernel is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Blocks along x, y, z.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub threads: usize,
    /// Blocks of a cluster, along x.
    pub cluster: usize,
    /// Bytes of dynamic shared memory, without what the emulator puts between regions.
    pub shared: usize,
    /// Regions of it (`SmemPlan::take`).
    pub regions: usize,
    /// It may start before the launch before it has ended; see [`Shape::dependent`].
    pub dependent: bool,
}

impl Shape {
    /// `blocks` blocks along x of `threads` threads.
    pub fn new(blocks: usize, threads: usize) -> Shape {
        Shape { grid: [blocks, 1, 1], threads, cluster: 1, shared: 0, regions: 0, dependent: false }
    }

    /// With `blocks` along y.
    #[must_use]
    pub fn y(mut self, blocks: usize) -> Shape {
        self.grid[1] = blocks;
        self
    }

    /// With `blocks` along z.
    #[must_use]
    pub fn z(mut self, blocks: usize) -> Shape {
        self.grid[2] = blocks;
        self
    }

    /// With dynamic shared memory in regions of these bytes, each aligned to 16 bytes, as `SmemPlan` lays them out.
    #[must_use]
    pub fn shared(mut self, regions: &[usize]) -> Shape {
        self.shared = regions.iter().fold(0, |end, bytes| end.next_multiple_of(16) + bytes);
        self.regions = regions.len();
        self
    }

    /// Started while the launch before it still runs (programmatic dependent launch), where the device can. The kernel
    /// must call `wait_for_previous` before it reads or writes global memory.
    #[must_use]
    pub fn dependent(mut self) -> Shape {
        self.dependent = true;
        self
    }

    /// In clusters of `blocks` along x.
    #[must_use]
    pub fn cluster(mut self, blocks: usize) -> Shape {
        self.cluster = blocks;
        self
    }
}

/// A kernel argument as it is passed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// An address in device memory, or null.
    Address(u64),
    /// A 32-bit signed integer.
    I32(i32),
    /// A 32-bit unsigned integer.
    U32(u32),
    /// A 64-bit unsigned integer.
    U64(u64),
    /// A float.
    F32(f32),
    /// A tensor map, encoded when the kernel is launched.
    Map(TensorMap),
}

/// Description of a tensor in device memory for the tensor memory accelerator (`cuTensorMapEncodeTiled`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorMap {
    /// `CUtensorMapDataType`: 9 is bf16, 7 is f32, 6 is f16.
    pub element: u32,
    /// 0, 1, 2, 3 for none, 32, 64, 128 bytes.
    pub swizzle: u32,
    /// Address of element 0.
    pub address: u64,
    /// Dimensions.
    pub rank: usize,
    /// Elements along each dimension, innermost first.
    pub dims: [u64; 5],
    /// Bytes from one element to the next along dimensions 1 and up.
    pub strides: [u64; 4],
    /// Elements of a box along each dimension.
    pub block: [u32; 5],
}

/// A kernel of the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its operator: the directory of its source.
    pub op: &'static str,
    /// File name of its source in that directory.
    pub source: &'static str,
    /// Its `extern "C"` name.
    pub name: &'static str,
    /// Lowest architecture that has its instructions: 80, or 90 for the Hopper-only sources.
    pub arch: u32,
}

/// One launch, ready to be put in a queue.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Which kernel.
    pub kernel: &'static Kernel,
    /// Compiled for which element.
    pub element: ElementType,
    /// How it is started.
    pub shape: Shape,
    /// Its arguments, in order.
    pub args: &'a [Arg],
}

/// What a device is to those who choose kernels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Name of the device.
    pub name: String,
    /// Compute capability: 10·major + minor.
    pub arch: u32,
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Most bytes of shared memory a block can ask for.
    pub shared_per_block: usize,
    /// Bytes of device memory.
    pub memory: u64,
}

/// Where kernels are put, to run in order.
pub trait Queue {
    /// Why something could not be put in.
    type Error;

    /// What the device is.
    fn properties(&self) -> &Properties;

    /// Memory for intermediate results, valid for the launches of this operator call. Its values are unspecified.
    ///
    /// # Errors
    /// When memory runs out.
    fn scratch<T: Element>(&mut self, elements: usize) -> Result<Out<T>, Self::Error>;

    /// Sets `elements` elements to zero, in order with the launches.
    ///
    /// # Errors
    /// Those of the device.
    fn zero<T: Element>(&mut self, at: Out<T>, elements: usize) -> Result<(), Self::Error>;

    /// Puts a launch in.
    ///
    /// # Errors
    /// Those of the device: a missing kernel, a shape that it refuses.
    fn launch(&mut self, launch: &Launch<'_>) -> Result<(), Self::Error>;

    /// The error for an argument that does not fit its type in the kernel.
    fn refuse(&self, kernel: &'static Kernel, argument: &'static str, value: usize) -> Self::Error;
}

/// `value` as the `int` that a kernel takes.
///
/// # Errors
/// [`Queue::refuse`] when it does not fit.
pub fn int<Q: Queue>(
    queue: &Q,
    kernel: &'static Kernel,
    argument: &'static str,
    value: usize,
) -> Result<Arg, Q::Error> {
    i32::try_from(value).map(Arg::I32).map_err(|_| queue.refuse(kernel, argument, value))
}

/// `value` as the `uint32_t` that a kernel takes.
///
/// # Errors
/// [`Queue::refuse`] when it does not fit.
pub fn uint<Q: Queue>(
    queue: &Q,
    kernel: &'static Kernel,
    argument: &'static str,
    value: usize,
) -> Result<Arg, Q::Error> {
    u32::try_from(value).map(Arg::U32).map_err(|_| queue.refuse(kernel, argument, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_laid_out_like_the_sources_do() {
        let shape = Shape::new(3, 128).shared(&[20, 8]);
        assert_eq!((shape.shared, shape.regions), (40, 2));
        assert_eq!(Shape::new(3, 128).y(2).grid, [3, 2, 1]);
    }

    #[test]
    fn an_absent_tensor_is_null_and_offsets_count_elements() {
        assert_eq!(None::<In<f32>>.or_null().address(), 0);
        assert_eq!(Out::<bf16>::at(256).offset(3).read().address(), 262);
    }
}
