//! The ledger: which layers and experts there are, which tasks, and which units each task uses.
//!
//! It is the only owner of that knowledge. Invariants, held by every operation and checked by [`Registry::validate`]:
//! ids rise and are never given twice; names are unique; at most one task is open and it has no masks; every mask has
//! the length of its space. The owner of a unit is the live task with the lowest id that uses it.

mod format;
mod layers;
mod overlap;
mod tasks;
#[cfg(test)]
mod tests;
mod validate;

use std::collections::BTreeMap;

pub use layers::{Layer, Space};
pub use tasks::{Event, State, Task};

use crate::{LayerId, TaskId};

/// Where a mask belongs: a layer and the index of one of its spaces.
pub type Place = (LayerId, usize);

/// The ledger of layers, experts, tasks, masks and their history.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Registry {
    layers: BTreeMap<LayerId, Layer>,
    tasks: BTreeMap<TaskId, Task>,
    history: Vec<Event>,
    next_layer: u32,
    next_expert: u32,
    next_task: u32,
}

impl Registry {
    /// A ledger without layers and tasks.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Everything that happened, oldest first.
    #[must_use]
    pub fn history(&self) -> &[Event] {
        &self.history
    }
}
