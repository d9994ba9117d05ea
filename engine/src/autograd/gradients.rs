//! Gradients found by a backward pass.

use super::{ParamId, ParamStore, Source, Var};
use crate::backend::add_into;
use crate::error::Result;
use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// Gradients by source; a missing one is zero.
#[derive(Default)]
pub struct Gradients {
    nodes: Vec<Option<Tensor>>,
    params: BTreeMap<(u64, ParamId), Tensor>,
}

impl Gradients {
    pub(super) fn new(nodes: usize) -> Self {
        Gradients { nodes: vec![None; nodes], params: BTreeMap::new() }
    }

    /// Adds a contribution; nothing happens where source or value is absent.
    pub(crate) fn add(&mut self, source: Option<Source>, value: Option<Tensor>) -> Result<()> {
        let (Some(source), Some(value)) = (source, value) else { return Ok(()) };
        let held = match source {
            Source::Node(index) => &mut self.nodes[index as usize],
            Source::Param { store, id } => match self.params.entry((store, id)) {
                std::collections::btree_map::Entry::Occupied(entry) => return add_into(entry.into_mut(), &value),
                std::collections::btree_map::Entry::Vacant(entry) => {
                    entry.insert(value);
                    return Ok(());
                }
            },
        };
        match held {
            Some(sum) => add_into(sum, &value),
            None => {
                *held = Some(value);
                Ok(())
            }
        }
    }

    pub(super) fn take_node(&mut self, index: usize) -> Option<Tensor> {
        self.nodes[index].take()
    }

    /// The gradient of a leaf, by move.
    pub fn take(&mut self, leaf: &Var) -> Option<Tensor> {
        match leaf.source {
            Some(Source::Node(index)) => self.nodes.get_mut(index as usize)?.take(),
            Some(Source::Param { store, id }) => self.params.remove(&(store, id)),
            None => None,
        }
    }

    /// The gradient of a parameter.
    pub fn param(&self, store: &ParamStore, id: ParamId) -> Option<&Tensor> {
        self.params.get(&(store.identity(), id))
    }

    /// All parameter gradients of one store, by parameter.
    pub fn of_store<'a>(&'a self, store: &ParamStore) -> impl Iterator<Item = (ParamId, &'a Tensor)> + use<'a> {
        let identity = store.identity();
        self.params.range((identity, ParamId::FIRST)..=(identity, ParamId::LAST)).map(|((_, id), t)| (*id, t))
    }

    pub(super) fn merge_params(&mut self, other: Gradients) -> Result<()> {
        for ((store, id), value) in other.params {
            self.add(Some(Source::Param { store, id }), Some(value))?;
        }
        Ok(())
    }
}
