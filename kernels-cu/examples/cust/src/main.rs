//! `ln_modulate` of graft in a context of cust, on buffers of cust: its result beside that of the oracle.
//!
//!     cargo run --release -- ../../../target/release/graft.cubins
//!
//! Any operator runs so: its `launch.rs` chooses kernels and shapes and puts them in a `Queue`, which `queue.rs` makes
//! of a stream.

mod queue;

use cust::context::Context;
use cust::device::Device;
use cust::memory::{CopyDestination, DeviceBuffer};
use cust::stream::{Stream, StreamFlags};
use graft_kernels::check::{Fill, Tolerance, compare, draw_f32};
use graft_kernels::generated::ln_modulate::{Dims, Forward, GpuForward, Params};
use graft_kernels::launch::{In, Out};
use graft_kernels::ln_modulate::{launch, reference};
use queue::CustQueue;
use std::error::Error;
use std::marker::PhantomData;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("give the archive that `cargo xtask cubins` writes")?;
    cust::init(cust::CudaFlags::empty())?;
    let device = Device::get_device(0)?;
    let _context = Context::new(device)?;
    let stream = Stream::new(StreamFlags::NON_BLOCKING, None)?;
    let mut queue = CustQueue::new(&stream, device, std::fs::read(&path)?)?;

    let dims = Dims { b: 2, n: 256, c: 6, d: 1152 };
    let params = Params { shift: 0, scale: 1, eps: 1e-6 };
    let (tokens, len) = (dims.b * dims.n, dims.b * dims.n * dims.d);
    let x = draw_f32("cust", "x", len, Fill::Normal);
    let modulation = draw_f32("cust", "modulation", dims.b * dims.c * dims.d, Fill::Normal);

    let (on_x, on_modulation) = (DeviceBuffer::from_slice(&x)?, DeviceBuffer::from_slice(&modulation)?);
    let on_y = DeviceBuffer::from_slice(&vec![f32::NAN; len])?;
    let on_statistics = [0; 2].map(|_| DeviceBuffer::from_slice(&vec![f32::NAN; tokens]));
    let [on_mean, on_rstd] = on_statistics;
    let (on_mean, on_rstd) = (on_mean?, on_rstd?);
    let address = |buffer: &DeviceBuffer<f32>| buffer.as_device_ptr().as_raw();
    let arguments = GpuForward::<f32> {
        dims,
        params,
        x: In::at(address(&on_x)),
        modulation: In::at(address(&on_modulation)),
        y: Out::at(address(&on_y)),
        mean: Out::at(address(&on_mean)),
        rstd: Out::at(address(&on_rstd)),
        element: PhantomData,
    };
    launch::forward(&mut queue, arguments)?;
    stream.synchronize()?;
    let mut got = vec![0.0; len];
    on_y.copy_to(&mut got)?;

    let (mut y, mut mean, mut rstd) = (vec![0.0; len], vec![0.0; tokens], vec![0.0; tokens]);
    let [y_out, mean_out, rstd_out] = [&mut y, &mut mean, &mut rstd];
    reference::forward(Forward {
        dims,
        params,
        x: &x,
        modulation: &modulation,
        y: y_out,
        mean: mean_out,
        rstd: rstd_out,
    });
    let found = compare(&got, &y, Tolerance::F32);
    println!(
        "{}: ln_modulate {:?}: largest error {:.1e}, rel rms {:.1e}",
        device.name()?,
        dims,
        found.max_abs,
        found.rel_rms
    );
    if found.pass { Ok(()) } else { Err("the result is not the oracle's".into()) }
}
