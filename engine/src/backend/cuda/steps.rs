//! Work as a whole: run, captured and replayed; or timed.

use super::Cuda;
use super::driver::{Handle, refused};
use super::graphs::{Capture, GraphKey, Step};
use crate::error::{Error, Result};
use cudarc::driver::{result, sys};

impl Cuda {
    /// Does work whose launches are always the same for `key`: plainly the first time, then captured, then replayed.
    /// The work must touch only what the key names or what lives as long as the graph.
    ///
    /// # Errors
    /// Those of the work; that it did in the capture what a graph cannot hold; those of the driver.
    pub fn graph(&self, key: &GraphKey, work: &mut dyn FnMut() -> Result<()>) -> Result<Step> {
        {
            let mut state = self.enter_outside("another graph is asked for")?;
            let stream = state.stream;
            if state.graphs.replay(key, stream)? {
                return Ok(Step::Replayed);
            }
            if !state.graphs.ran(key) {
                drop(state);
                work()?;
                return Ok(Step::Ran);
            }
            state.capture = Some(Capture::begin(&self.label, &key.work, stream)?);
        }
        let guard = EndCapture(self);
        let done = work();
        let mut state = self.enter()?;
        let stream = state.stream;
        let Some(mut capture) = state.capture.take() else {
            return Err(Error::failure(&self.label, format!("the capture of {} is gone", key.work)));
        };
        std::mem::forget(guard);
        self.turn.notify_all();
        let graph = capture.end(&self.label, stream);
        if let Err(e) = done.and(graph.as_ref().map(|_| ()).map_err(Clone::clone)) {
            if let Ok(graph) = graph {
                // SAFETY: just captured, not used.
                #[allow(unsafe_code)]
                let _ = unsafe { result::graph::destroy(graph.0) };
            }
            state.memory.free_all(&capture.held);
            return Err(e);
        }
        let freed = state.graphs.keep(key, graph?, std::mem::take(&mut capture.held))?;
        state.memory.free_all(&freed);
        state.graphs.replay(key, stream)?;
        Ok(Step::Captured)
    }

    /// Forgets all graphs: their memory is free again.
    ///
    /// # Errors
    /// Inside a capture.
    pub fn forget_graphs(&self) -> Result<()> {
        let mut state = self.enter_outside("graphs are forgotten")?;
        let freed = state.graphs.clear();
        state.memory.free_all(&freed);
        Ok(())
    }

    /// Graphs that are kept.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn graphs(&self) -> Result<usize> {
        Ok(self.enter()?.graphs.len())
    }

    /// Milliseconds that the device takes for work, from the end of what came before to its own end; waits for it.
    ///
    /// # Errors
    /// Those of the work and of the driver.
    pub fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f32> {
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let failed = |e| refused(e, &self.label, "cannot measure time");
        let mut events = [Handle(std::ptr::null_mut()); 2];
        let measured = (|| {
            for event in &mut events {
                let _state = self.enter_outside("time is measured")?;
                event.0 = result::event::create(flags).map_err(failed)?;
            }
            self.record(events[0])?;
            work()?;
            self.record(events[1])?;
            let _state = self.enter_outside("time is measured")?;
            // SAFETY: both events live and were recorded on this device's stream.
            #[allow(unsafe_code)]
            unsafe {
                result::event::synchronize(events[1].0).map_err(failed)?;
                result::event::elapsed(events[0].0, events[1].0).map_err(failed)
            }
        })();
        for event in events.iter().filter(|e| !e.0.is_null()) {
            // SAFETY: made above and not used after.
            #[allow(unsafe_code)]
            let _ = unsafe { result::event::destroy(event.0) };
        }
        measured
    }

    fn record(&self, event: Handle<sys::CUevent_st>) -> Result<()> {
        let state = self.enter_outside("time is measured")?;
        // SAFETY: event and stream are this device's and alive.
        #[allow(unsafe_code)]
        unsafe { result::event::record(event.0, state.stream.0) }
            .map_err(|e| refused(e, &self.label, "cannot record an event"))
    }
}

/// Ends the capture of work that panics, so that other threads do not wait for ever.
struct EndCapture<'c>(&'c Cuda);

impl Drop for EndCapture<'_> {
    fn drop(&mut self) {
        if let Ok(mut state) = self.0.enter()
            && let Some(mut capture) = state.capture.take()
        {
            let stream = state.stream;
            if let Ok(graph) = capture.end(&self.0.label, stream) {
                // SAFETY: just captured, not used.
                #[allow(unsafe_code)]
                let _ = unsafe { result::graph::destroy(graph.0) };
            }
            self.0.turn.notify_all();
        }
    }
}
