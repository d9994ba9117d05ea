//! One launch: its shape checked, its arguments laid out, its tensor maps encoded.

use super::driver::{Handle, check};
use super::modules::{Function, Modules};
use crate::error::{Error, Result};
use cudarc::driver::sys;
use graft_kernels::launch::{Arg, Launch, Properties, Shape, TensorMap};
use std::ffi::c_void;

/// Dynamic shared memory that a kernel has without being prepared for it.
const SHARED_FREELY: usize = 48 << 10;

/// Blocks of a cluster that every device with clusters takes.
const CLUSTER: usize = 8;

/// Room for any argument: a tensor map is the largest and the most aligned.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Slot([u64; 16]);

/// The arguments of a launch, in memory that is used again for the next.
#[derive(Default)]
pub(super) struct Arguments {
    slots: Vec<Slot>,
    pointers: Vec<Handle<c_void>>,
}

/// The error of a launch that does not fit.
fn refuse(launch: &Launch<'_>, problem: &str, is: impl std::fmt::Display, must: impl std::fmt::Display) -> Error {
    Error::failure(format!("cuda: {} {}", launch.kernel.name, launch.element), problem).is(is).must(must)
}

/// Checks what the driver would refuse with less to say.
///
/// # Errors
/// Names the kernel, what was asked for, and what the device takes.
pub(super) fn check_shape(launch: &Launch<'_>, device: &Properties) -> Result<()> {
    let Shape { grid, threads, cluster, shared, .. } = launch.shape;
    if threads == 0 || threads > 1024 {
        return Err(refuse(launch, "a block has no such number of threads", threads, "1 to 1024"));
    }
    for (axis, blocks, most) in [("x", grid[0], i32::MAX as usize), ("y", grid[1], 65_535), ("z", grid[2], 65_535)] {
        if blocks == 0 || blocks > most {
            let problem = format!("a grid has no such number of blocks along {axis}");
            return Err(refuse(launch, &problem, blocks, format!("1 to {most}")));
        }
    }
    if shared > device.shared_per_block {
        let is = format!("{shared} bytes");
        let must = format!("at most {} bytes on {}", device.shared_per_block, device.name);
        return Err(refuse(launch, "too much shared memory for a block", is, must));
    }
    if cluster == 0 || cluster > CLUSTER || !grid[0].is_multiple_of(cluster) {
        let is = format!("clusters of {cluster} in {} blocks", grid[0]);
        return Err(refuse(launch, "no such clusters", is, format!("1 to {CLUSTER} that divide the blocks along x")));
    }
    if cluster > 1 && device.arch < 90 {
        let is = format!("compute capability {}.{}", device.arch / 10, device.arch % 10);
        return Err(refuse(launch, "the device has no clusters", is, "9.0 or newer"));
    }
    Ok(())
}

/// Prepares a function for the launch; during a capture nothing is left to prepare.
///
/// # Errors
/// Those of the driver, or that a capture cannot wait for it.
pub(super) fn prepare(launch: &Launch<'_>, function: &mut Function, label: &str, capturing: bool) -> Result<()> {
    let shared = launch.shape.shared;
    if shared <= SHARED_FREELY || shared <= function.shared {
        return Ok(());
    }
    if capturing {
        return Err(refuse(
            launch,
            "a capture cannot give a kernel more shared memory",
            format!("{shared} bytes, prepared for {}", function.shared.max(SHARED_FREELY)),
            "launched with as much before the capture",
        ));
    }
    Modules::allow_shared(label, function, shared)
}

/// Puts the kernel on the stream.
///
/// # Errors
/// Arguments that are not the kernel's, or a refusal of the driver.
pub(super) fn start(
    launch: &Launch<'_>,
    arch: u32,
    function: &Function,
    stream: Handle<sys::CUstream_st>,
    arguments: &mut Arguments,
) -> Result<()> {
    if let Some(sizes) = &function.arguments {
        check_arguments(launch, sizes)?;
    }
    arguments.slots.clear();
    for arg in launch.args {
        arguments.slots.push(slot(launch, arg)?);
    }
    arguments.pointers.clear();
    arguments.pointers.extend(arguments.slots.iter_mut().map(|s| Handle((&raw mut *s).cast::<c_void>())));
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let mut attributes = [cluster(1); 2];
    let mut count = 0;
    if launch.shape.cluster > 1 {
        attributes[count] = cluster(number(launch.shape.cluster));
        count += 1;
    }
    if launch.shape.dependent && arch >= 90 {
        attributes[count] = dependent();
        count += 1;
    }
    let config = sys::CUlaunchConfig {
        gridDimX: number(launch.shape.grid[0]),
        gridDimY: number(launch.shape.grid[1]),
        gridDimZ: number(launch.shape.grid[2]),
        blockDimX: number(launch.shape.threads),
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: number(launch.shape.shared),
        hStream: stream.0,
        attrs: attributes.as_mut_ptr(),
        numAttrs: number(count),
    };
    // A handle is its pointer and nothing else.
    let pointers = arguments.pointers.as_mut_ptr().cast::<*mut c_void>();
    // SAFETY: config and attributes live until the call returns; there is a pointer for each argument (checked where
    // the driver tells the sizes, generated from the kernel's signature everywhere), each to a slot of at least its
    // size and alignment, which the driver copies before it returns.
    #[allow(unsafe_code)]
    let answer = unsafe { sys::cuLaunchKernelEx(&config, function.handle.0, pointers, std::ptr::null_mut()) };
    check(answer, format!("cuda: {} {}", launch.kernel.name, launch.element), "cannot be launched")
}

/// The attribute for clusters of `blocks` along x.
fn cluster(blocks: u32) -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks, y: 1, z: 1 },
        },
    }
}

/// The attribute of a launch that may start before the one before it has ended.
fn dependent() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

/// Bytes that an argument is passed in.
fn size(arg: &Arg) -> usize {
    match arg {
        Arg::I32(_) | Arg::U32(_) | Arg::F32(_) => 4,
        Arg::Address(_) | Arg::U64(_) => 8,
        Arg::Map(_) => 128,
    }
}

fn check_arguments(launch: &Launch<'_>, sizes: &[usize]) -> Result<()> {
    let given = launch.args.iter().map(size);
    if given.clone().eq(sizes.iter().copied()) {
        return Ok(());
    }
    let given: Vec<usize> = given.collect();
    Err(refuse(launch, "arguments do not fit the kernel", format!("{given:?} bytes"), format!("{sizes:?} bytes"))
        .fix("build the kernels and the program from the same sources"))
}

fn slot(launch: &Launch<'_>, arg: &Arg) -> Result<Slot> {
    let word = match arg {
        Arg::Address(v) | Arg::U64(v) => *v,
        Arg::I32(v) => u64::from(v.cast_unsigned()),
        Arg::U32(v) => u64::from(*v),
        Arg::F32(v) => u64::from(v.to_bits()),
        Arg::Map(map) => return encode(launch, map),
    };
    let mut slot = Slot([0; 16]);
    // In the order of bytes in memory, whatever it is: a 32-bit value stands in the first four.
    slot.0[0] = if size(arg) == 4 && cfg!(target_endian = "big") { word << 32 } else { word };
    Ok(slot)
}

/// Encodes a tensor map as the copy engine reads it.
fn encode(launch: &Launch<'_>, map: &TensorMap) -> Result<Slot> {
    use sys::CUtensorMapDataType as Type;
    use sys::CUtensorMapSwizzle as Swizzle;
    let element = match map.element {
        0 => Type::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        1 => Type::CU_TENSOR_MAP_DATA_TYPE_UINT16,
        2 => Type::CU_TENSOR_MAP_DATA_TYPE_UINT32,
        3 => Type::CU_TENSOR_MAP_DATA_TYPE_INT32,
        6 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        7 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        9 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        other => return Err(refuse(launch, "a tensor map of no such element", other, "0 to 3, 6, 7 or 9")),
    };
    let swizzle = match map.swizzle {
        0 => Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        1 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        2 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        3 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        other => return Err(refuse(launch, "a tensor map of no such swizzle", other, "0 to 3")),
    };
    if !(1..=5).contains(&map.rank) {
        return Err(refuse(launch, "a tensor map of no such rank", map.rank, "1 to 5"));
    }
    let mut slot = Slot([0; 16]);
    let steps = [1u32; 5];
    // SAFETY: the slot has the size and alignment of a tensor map; the lists have at least `rank` numbers (one less
    // for the strides), as the call asks. It reads no device memory.
    #[allow(unsafe_code)]
    let answer = unsafe {
        sys::cuTensorMapEncodeTiled(
            (&raw mut slot).cast::<sys::CUtensorMap>(),
            element,
            map.rank as u32,
            map.address as *mut c_void,
            map.dims.as_ptr(),
            map.strides.as_ptr(),
            map.block.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            // Heads of 72 elements share sectors: the larger fetch serves the neighbour.
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    let place = format!("cuda: {} {}", launch.kernel.name, launch.element);
    check(answer, place, format!("the tensor map {map:?} is refused"))?;
    Ok(slot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use graft_kernels::launch::{ElementType, Kernel};

    static KERNEL: Kernel = Kernel { op: "none", source: "none.cu", name: "none", arch: 80 };

    fn problem(shape: Shape, arch: u32) -> String {
        let launch = Launch { kernel: &KERNEL, element: ElementType::F32, shape, args: &[] };
        let name = "GPU".to_string();
        let device = Properties { name, arch, multiprocessors: 1, shared_per_block: 100 << 10, memory: 1 << 30 };
        check_shape(&launch, &device).err().map_or("none".to_string(), |e| e.to_string())
    }

    #[test]
    fn shapes_that_no_device_takes_are_named() {
        assert_eq!(problem(Shape::new(1 << 20, 1024).y(65_535).shared(&[100 << 10]), 80), "none");
        assert_eq!(problem(Shape::new(8, 32).cluster(8), 90), "none");
        for (shape, arch, words) in [
            (Shape::new(1, 1025), 90, "none f32: a block has no such number of threads; is 1025; must be 1 to 1024"),
            (Shape::new(1, 0), 90, "is 0; must be 1 to 1024"),
            (Shape::new(0, 32), 90, "blocks along x; is 0"),
            (Shape::new(1 << 31, 32), 90, "blocks along x; is 2147483648; must be 1 to 2147483647"),
            (Shape::new(1, 32).z(65_536), 90, "blocks along z; is 65536; must be 1 to 65535"),
            (Shape::new(1, 32).shared(&[101 << 10]), 90, "is 103424 bytes; must be at most 102400 bytes on GPU"),
            (Shape::new(9, 32).cluster(2), 90, "clusters of 2 in 9 blocks"),
            (Shape::new(16, 32).cluster(16), 90, "must be 1 to 8"),
            (Shape::new(8, 32).cluster(2), 80, "has no clusters; is compute capability 8.0"),
        ] {
            assert!(problem(shape, arch).contains(words), "{}", problem(shape, arch));
        }
    }

    #[test]
    fn arguments_are_counted_and_measured() {
        let args = [Arg::Address(1), Arg::I32(-1), Arg::F32(1.5)];
        let launch = Launch { kernel: &KERNEL, element: ElementType::F32, shape: Shape::new(1, 1), args: &args };
        assert!(check_arguments(&launch, &[8, 4, 4]).is_ok());
        let error = check_arguments(&launch, &[8, 4]).unwrap_err().to_string();
        assert!(error.contains("is [8, 4, 4] bytes; must be [8, 4] bytes"), "{error}");
        assert_eq!(slot(&launch, &args[1]).unwrap().0[0], 0xffff_ffff);
    }
}
