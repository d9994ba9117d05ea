//! Reverse-mode differentiation: a small tape over fused operators.
//!
//! A [`Graph`] either records or does not. When it does, each operator pushes one node with the tensors it saved
//! and a closure that turns the gradient of its result into gradients of its inputs; about seven nodes per
//! transformer block. [`Graph::checkpoint`] keeps only the inputs of a whole block and runs it again in the
//! backward pass. Sums are taken in reverse tape order, so a step is deterministic.

mod gradients;
mod params;

pub use gradients::Gradients;
pub use params::{Adapter, Param, ParamId, ParamStore};

use crate::backend::{add_into, add_scaled};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use std::cell::{Cell, RefCell};

/// Arithmetic of the products in a graph. On the host all else is f32; a GPU is opened for one of them
/// ([`Device::element`](crate::tensor::Device::element)) and computes all but what is f32 by contract in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// f32 products.
    #[default]
    F32,
    /// Products of values rounded to bf16, accumulated in f32.
    Bf16,
}

impl From<Precision> for DType {
    /// The working type of a GPU that computes in this precision.
    fn from(precision: Precision) -> DType {
        match precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        }
    }
}

/// Where a gradient goes: a result on the tape, or a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Result of node `0` of the tape.
    Node(u32),
    /// Parameter of a store.
    Param {
        /// Identity of the store.
        store: u64,
        /// Parameter in it.
        id: ParamId,
    },
}

/// A tensor in a graph, with the place its gradient goes to (none for constants).
#[derive(Clone, Debug)]
pub struct Var {
    tensor: Tensor,
    source: Option<Source>,
}

impl Var {
    /// A value without a gradient.
    pub fn constant(tensor: Tensor) -> Var {
        Var { tensor, source: None }
    }

    /// The value.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The value, by move.
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }

    /// The same value without a gradient.
    pub fn detach(&self) -> Var {
        Var::constant(self.tensor.clone())
    }

    /// Size of one axis.
    pub fn dim(&self, axis: usize) -> usize {
        self.tensor.dim(axis)
    }
}

type Backward<'m> = Box<dyn FnOnce(&Tensor, &mut Gradients) -> Result<()> + 'm>;

struct Node<'m> {
    op: &'static str,
    saved_bytes: usize,
    // None for leaves.
    backward: Option<Backward<'m>>,
}

/// A computation: runs operators, and records them when asked to.
pub struct Graph<'m> {
    recording: bool,
    precision: Precision,
    /// Whether operators run in f32, whatever the working type of their device.
    exact: Cell<bool>,
    nodes: RefCell<Vec<Node<'m>>>,
    saved_bytes: Cell<usize>,
}

impl<'m> Graph<'m> {
    /// A graph that records nothing and saves nothing.
    pub fn inference(precision: Precision) -> Graph<'m> {
        Graph {
            recording: false,
            precision,
            exact: Cell::new(false),
            nodes: RefCell::new(Vec::new()),
            saved_bytes: Cell::new(0),
        }
    }

    /// A graph that records every operator with a differentiable input.
    pub fn training(precision: Precision) -> Graph<'m> {
        Graph { recording: true, ..Graph::inference(precision) }
    }

    /// Whether operators are recorded.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// Arithmetic of the products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Runs `work` with every operator in f32, whatever the working type of the device: for small parts whose results
    /// a narrower type would blur. On the host, which computes in f32, this changes nothing.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn in_f32<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        let before = self.exact.replace(true);
        let done = work();
        self.exact.set(before);
        done
    }

    /// Whether operators run in f32, whatever the working type of their device.
    pub(crate) fn is_exact(&self) -> bool {
        self.exact.get()
    }

    /// Bytes of the tensors that the tape keeps for the backward pass.
    pub fn saved_bytes(&self) -> usize {
        self.saved_bytes.get()
    }

    /// Names of the recorded operators, in order.
    pub fn tape(&self) -> Vec<&'static str> {
        self.nodes.borrow().iter().map(|n| n.op).collect()
    }

    /// A leaf whose gradient is wanted (an input of the network, for instance).
    pub fn leaf(&self, tensor: Tensor) -> Var {
        if !self.recording {
            return Var::constant(tensor);
        }
        let source = self.push(Node { op: "leaf", saved_bytes: 0, backward: None });
        Var { tensor, source: Some(source) }
    }

    /// A parameter of a store; its gradient is found by [`Gradients::param`].
    pub fn param(&self, store: &ParamStore, id: ParamId) -> Var {
        let param = store.get(id);
        let source = (self.recording && param.trainable).then(|| Source::Param { store: store.identity(), id });
        Var { tensor: param.value.clone(), source }
    }

    pub(crate) fn source(&self, var: &Var) -> Option<Source> {
        if self.recording { var.source } else { None }
    }

    fn push(&self, node: Node<'m>) -> Source {
        self.saved_bytes.set(self.saved_bytes.get() + node.saved_bytes);
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(node);
        Source::Node(nodes.len() as u32 - 1)
    }

    pub(crate) fn record(
        &self,
        op: &'static str,
        tensor: Tensor,
        saved_bytes: usize,
        backward: impl FnOnce(&Tensor, &mut Gradients) -> Result<()> + 'm,
    ) -> Var {
        let source = self.push(Node { op, saved_bytes, backward: Some(Box::new(backward)) });
        Var { tensor, source: Some(source) }
    }

    /// The same values in another shape.
    ///
    /// # Errors
    /// When the element counts differ.
    pub fn reshape(&self, x: &Var, shape: &[usize]) -> Result<Var> {
        let tensor = x.tensor.reshape(shape)?;
        let Some(source) = self.source(x) else { return Ok(Var::constant(tensor)) };
        let original = x.tensor.shape();
        Ok(self
            .record("reshape", tensor, 0, move |dy, grads| grads.add(Some(source), Some(dy.reshape(original.dims())?))))
    }

    /// Elementwise a + b of equal shapes.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn add(&self, a: &Var, b: &Var) -> Result<Var> {
        let mut sum = a.tensor.copy()?;
        add_into(&mut sum, &b.tensor)?;
        let sources = [self.source(a), self.source(b)];
        if sources.iter().all(Option::is_none) {
            return Ok(Var::constant(sum));
        }
        Ok(self.record("add", sum, 0, move |dy, grads| {
            grads.add(sources[0], Some(dy.clone()))?;
            grads.add(sources[1], Some(dy.clone()))
        }))
    }

    /// Σ factor·x of scalars: the terms of a loss.
    ///
    /// # Errors
    /// A term that is not a scalar.
    pub fn weighted_sum(&self, terms: &[(f32, &Var)]) -> Result<Var> {
        let mut sum = 0.0f64;
        for (factor, x) in terms {
            if x.tensor.len() != 1 {
                return Err(Error::failure("weighted sum", "a term is not a scalar").is(x.tensor.shape()).must("[1]"));
            }
            sum += f64::from(*factor) * f64::from(x.tensor.values()?[0]);
        }
        let Some((_, first)) = terms.first() else {
            return Err(Error::failure("weighted sum", "nothing to add").must("at least one term"));
        };
        let (device, shape) = (first.tensor.device().clone(), first.tensor.shape());
        let sum = Tensor::from_f32(&device, shape.dims(), &[sum as f32])?;
        let sources: Vec<_> = terms.iter().map(|(factor, x)| (*factor, self.source(x))).collect();
        if sources.iter().all(|(_, source)| source.is_none()) {
            return Ok(Var::constant(sum));
        }
        Ok(self.record("weighted_sum", sum, 0, move |dy, grads| {
            let dy_value = dy.values()?[0];
            for (factor, source) in sources {
                grads.add(source, Some(Tensor::from_f32(dy.device(), dy.shape().dims(), &[factor * dy_value])?))?;
            }
            Ok(())
        }))
    }

    /// Elementwise a − b of equal shapes.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn sub(&self, a: &Var, b: &Var) -> Result<Var> {
        let mut difference = a.tensor.copy()?;
        add_scaled(&mut difference, &b.tensor, -1.0)?;
        let sources = [self.source(a), self.source(b)];
        if sources.iter().all(Option::is_none) {
            return Ok(Var::constant(difference));
        }
        Ok(self.record("sub", difference, 0, move |dy, grads| {
            grads.add(sources[0], Some(dy.clone()))?;
            let Some(source) = sources[1] else { return Ok(()) };
            let mut negated = Tensor::zeros_of(dy.device(), dy.shape().dims(), dy.dtype())?;
            add_scaled(&mut negated, dy, -1.0)?;
            grads.add(Some(source), Some(negated))
        }))
    }

    /// Runs `block` without keeping anything but its inputs; the backward pass runs it again.
    ///
    /// `block` must be a pure function of `inputs` and of parameters, and give the same result each time.
    ///
    /// # Errors
    /// Those of `block`.
    pub fn checkpoint(&self, inputs: &[&Var], block: impl Fn(&Graph<'m>, &[Var]) -> Result<Var> + 'm) -> Result<Var> {
        let values: Vec<Var> = inputs.iter().map(|v| v.detach()).collect();
        let out = block(&Graph::inference(self.precision), &values)?;
        if !self.recording {
            return Ok(out.detach());
        }
        let sources: Vec<Option<Source>> = inputs.iter().map(|v| self.source(v)).collect();
        let saved = values.iter().map(|v| v.tensor.bytes()).sum();
        let precision = self.precision;
        Ok(self.record("checkpoint", out.into_tensor(), saved, move |dy, grads| {
            let inner = Graph::training(precision);
            let leaves: Vec<Var> = values
                .into_iter()
                .zip(&sources)
                .map(|(v, s)| if s.is_some() { inner.leaf(v.tensor) } else { v })
                .collect();
            let out = block(&inner, &leaves)?;
            let mut found = inner.backward_from(&out, dy.clone())?;
            for (leaf, source) in leaves.iter().zip(sources) {
                grads.add(source, found.take(leaf))?;
            }
            grads.merge_params(found)
        }))
    }

    /// Gradients of a scalar.
    ///
    /// # Errors
    /// When `loss` is not a scalar, or an operator's backward pass fails.
    pub fn backward(self, loss: &Var) -> Result<Gradients> {
        if loss.tensor.len() != 1 {
            return Err(Error::failure("backward", "the loss is not a scalar").is(loss.tensor.shape()).must("[1]"));
        }
        let one = Tensor::from_f32(loss.tensor.device(), loss.tensor.shape().dims(), &[1.0])?;
        self.backward_from(loss, one)
    }

    /// Gradients of Σ output·cotangent. The tape is consumed: each node's saved tensors go as soon as it has run.
    ///
    /// # Errors
    /// When an operator's backward pass fails.
    pub fn backward_from(self, output: &Var, cotangent: Tensor) -> Result<Gradients> {
        let nodes = self.nodes.into_inner();
        let mut grads = Gradients::new(nodes.len());
        grads.add(output.source, Some(cotangent))?;
        for (index, node) in nodes.into_iter().enumerate().rev() {
            let Some(backward) = node.backward else { continue };
            if let Some(dy) = grads.take_node(index) {
                backward(&dy, &mut grads)?;
            }
        }
        Ok(grads)
    }
}
