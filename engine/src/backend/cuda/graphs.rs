//! Captured work, by shape: what a step launches is recorded once and then replayed with one call.
//!
//! A graph holds addresses, sizes and tensor maps as they were when it was captured, so all of them belong to its
//! key; what changes from step to step (seed, timestep, noise level) is read from device memory. While a graph is
//! captured nothing may be allocated, uploaded, downloaded or waited for: an attempt is an error that names it.

use super::driver::{Handle, check, refused};
use crate::error::{Error, Result};
use cudarc::driver::{result, sys};

/// Graphs kept; the one that was not used for the longest time makes room.
const KEPT: usize = 8;

/// What a graph belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GraphKey {
    /// Which work: a model and a pass of it.
    pub work: String,
    /// Sizes that its launches depend on.
    pub shape: Vec<usize>,
    /// Addresses of the tensors that it reads and writes.
    pub addresses: Vec<u64>,
}

/// What was done with the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It ran plainly: the first time, which also loads and prepares its kernels.
    Ran,
    /// It was captured and launched: the second time.
    Captured,
    /// Its graph was launched.
    Replayed,
}

/// One recorded piece of work.
struct Graph {
    key: GraphKey,
    exec: Handle<sys::CUgraphExec_st>,
    /// Blocks that were freed while it was captured: its replays still use them.
    held: Vec<u64>,
    used: u64,
}

/// The graphs of a device.
pub(super) struct Graphs {
    label: String,
    graphs: Vec<Graph>,
    /// Keys that ran once, and when.
    seen: Vec<(GraphKey, u64)>,
    clock: u64,
}

impl Graphs {
    pub fn new(label: &str) -> Graphs {
        Graphs { label: label.to_string(), graphs: Vec::new(), seen: Vec::new(), clock: 0 }
    }

    /// Launches the graph of `key`; false where there is none.
    pub fn replay(&mut self, key: &GraphKey, stream: Handle<sys::CUstream_st>) -> Result<bool> {
        self.clock += 1;
        let Some(graph) = self.graphs.iter_mut().find(|g| g.key == *key) else { return Ok(false) };
        graph.used = self.clock;
        // SAFETY: graph and stream are those of this device and alive.
        #[allow(unsafe_code)]
        unsafe { result::graph::launch(graph.exec.0, stream.0) }
            .map_err(|e| refused(e, &self.label, format!("cannot replay {}", key.work)))?;
        Ok(true)
    }

    /// Whether the work ran before; it is remembered as having run.
    pub fn ran(&mut self, key: &GraphKey) -> bool {
        self.clock += 1;
        if let Some((_, when)) = self.seen.iter_mut().find(|(k, _)| k == key) {
            *when = self.clock;
            return true;
        }
        if self.seen.len() == 2 * KEPT {
            let oldest = (0..self.seen.len()).min_by_key(|i| self.seen[*i].1).unwrap_or(0);
            self.seen.swap_remove(oldest);
        }
        self.seen.push((key.clone(), self.clock));
        false
    }

    /// Keeps a graph that was just captured; gives the blocks that an evicted one held.
    ///
    /// # Errors
    /// When the driver refuses it; the graph is gone then.
    pub fn keep(&mut self, key: &GraphKey, graph: Handle<sys::CUgraph_st>, held: Vec<u64>) -> Result<Vec<u64>> {
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph was just captured; the pointer is to a live handle. The graph is not needed after.
        #[allow(unsafe_code)]
        let answer = unsafe {
            let answer = sys::cuGraphInstantiateWithFlags(&mut exec, graph.0, 0);
            let _ = result::graph::destroy(graph.0);
            answer
        };
        check(answer, &self.label, format!("cannot make a graph of {}", key.work))?;
        let mut freed = Vec::new();
        if self.graphs.len() == KEPT {
            let oldest = (0..self.graphs.len()).min_by_key(|i| self.graphs[*i].used).unwrap_or(0);
            freed = self.remove(oldest);
        }
        self.graphs.push(Graph { key: key.clone(), exec: Handle(exec), held, used: self.clock });
        Ok(freed)
    }

    fn remove(&mut self, at: usize) -> Vec<u64> {
        let graph = self.graphs.swap_remove(at);
        // SAFETY: made in `keep`. The driver lets a replay that is running end.
        #[allow(unsafe_code)]
        // Best effort: there is nothing to do about a graph that does not go.
        let _ = unsafe { result::graph::exec_destroy(graph.exec.0) };
        graph.held
    }

    /// Removes all graphs; gives the blocks that they held.
    pub fn clear(&mut self) -> Vec<u64> {
        self.seen.clear();
        let mut freed = Vec::new();
        while !self.graphs.is_empty() {
            freed.extend(self.remove(0));
        }
        freed
    }

    /// Number of graphs.
    pub fn len(&self) -> usize {
        self.graphs.len()
    }
}

/// A capture that goes on.
pub(super) struct Capture {
    /// The thread whose calls are recorded; others wait.
    pub thread: std::thread::ThreadId,
    work: String,
    /// The first thing that was tried and may not be.
    refused: Option<Error>,
    /// Blocks freed meanwhile.
    pub held: Vec<u64>,
}

impl Capture {
    pub fn begin(label: &str, work: &str, stream: Handle<sys::CUstream_st>) -> Result<Capture> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is this device's and alive.
        #[allow(unsafe_code)]
        unsafe { result::stream::begin_capture(stream.0, mode) }
            .map_err(|e| refused(e, label, format!("cannot capture {work}")))?;
        let thread = std::thread::current().id();
        Ok(Capture { thread, work: work.to_string(), refused: None, held: Vec::new() })
    }

    /// The error of something that a capture cannot hold; the capture fails even if the caller goes on.
    pub fn refuse(&mut self, label: &str, tried: &str) -> Error {
        let error = Error::failure(label, format!("{tried} inside the capture of {}", self.work))
            .must("launches, copies and fills on the device alone")
            .fix("do it before the work is given to the graph; run it once before, so that its memory is there");
        self.refused.get_or_insert(error).clone()
    }

    /// Ends it: the graph, or why there is none.
    pub fn end(&mut self, label: &str, stream: Handle<sys::CUstream_st>) -> Result<Handle<sys::CUgraph_st>> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream is being captured; the pointer is to a live handle.
        #[allow(unsafe_code)]
        let answer = unsafe { sys::cuStreamEndCapture(stream.0, &mut graph) };
        if let Some(error) = self.refused.take() {
            if !graph.is_null() {
                // SAFETY: just captured, not used.
                #[allow(unsafe_code)]
                let _ = unsafe { result::graph::destroy(graph) };
            }
            return Err(error);
        }
        check(answer, label, format!("cannot capture {}", self.work))?;
        Ok(Handle(graph))
    }
}
