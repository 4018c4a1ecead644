//! The invariants of the ledger, checked from the outside: after every load, and after each step of the property tests.

use std::collections::BTreeSet;

use super::layers::{check_layer, check_name};
use super::{Event, Registry, State, Task};
use crate::limits::{MAX_BANK_BYTES, MAX_EVENTS, MAX_EXPERTS_IN_ALL, MAX_LAYERS, MAX_TASKS};
use crate::{Error, Result};

fn held(holds: bool, problem: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Inconsistent { problem: problem() }) }
}

impl Registry {
    /// Checks every invariant.
    ///
    /// # Errors
    /// `registry_inconsistent`.
    pub fn validate(&self) -> Result<()> {
        self.validate_layers()?;
        held(self.tasks.len() as u64 <= MAX_TASKS, || "it has too many tasks".to_owned())?;
        let mut names = BTreeSet::new();
        let mut open = 0_usize;
        for (&id, task) in &self.tasks {
            held(id == task.id && id.0 < self.next_task, || format!("task {id} has an id that was never given"))?;
            held(names.insert(task.name.as_str()), || format!("two tasks are named {:?}", task.name))?;
            open = open.saturating_add(usize::from(task.state == State::Open));
            self.validate_task(task)?;
        }
        held(open <= 1, || format!("{open} tasks are open"))?;
        held(self.history.len() as u64 <= MAX_EVENTS, || "its history is too long".to_owned())?;
        for event in &self.history {
            let known = match event {
                Event::LayerAdded { layer, .. } | Event::ExpertsAdded { layer, .. } => layer.0 < self.next_layer,
                Event::TaskBegun(task)
                | Event::TaskEnded(task)
                | Event::TaskAbandoned(task)
                | Event::TaskForgotten(task) => task.0 < self.next_task,
            };
            held(known, || format!("its history says \"{event}\", an id that was never given"))?;
        }
        Ok(())
    }

    fn validate_layers(&self) -> Result<()> {
        held(self.layers.len() as u64 <= MAX_LAYERS, || "it has too many layers".to_owned())?;
        held(u64::from(self.next_expert) <= MAX_EXPERTS_IN_ALL, || "it has too many experts".to_owned())?;
        held(self.total_bytes() <= MAX_BANK_BYTES, || "its bank has too many bytes".to_owned())?;
        let (mut names, mut experts) = (BTreeSet::new(), BTreeSet::new());
        for (&id, layer) in &self.layers {
            held(id == layer.id && id.0 < self.next_layer, || format!("layer {id} has an id that was never given"))?;
            held(names.insert(layer.name.as_str()), || format!("two layers are named {:?}", layer.name))?;
            check_layer(layer).map_err(|error| Error::Inconsistent { problem: format!("layer {id}: {error}") })?;
            held(layer.experts.is_sorted_by(|left, right| left < right), || {
                format!("the experts of layer {id} do not rise")
            })?;
            for &expert in &layer.experts {
                held(expert.0 < self.next_expert, || format!("expert {expert} has an id that was never given"))?;
                held(experts.insert(expert), || format!("expert {expert} is in two layers"))?;
            }
        }
        Ok(())
    }

    fn validate_task(&self, task: &Task) -> Result<()> {
        let id = task.id;
        let names = [Some(&task.name), task.domain.as_ref()];
        for name in names.into_iter().flatten() {
            check_name("task", name).map_err(|error| Error::Inconsistent { problem: format!("task {id}: {error}") })?;
        }
        let ended = task.state == State::Ended;
        held(ended || task.masks.is_empty(), || format!("task {id} is open and has masks"))?;
        held(ended || task.content_hash.is_none(), || format!("task {id} is open and has a content hash"))?;
        for (place, mask) in &task.masks {
            let length = self.layers.get(&place.0).filter(|layer| place.1 < layer.spaces.len());
            let length = length.map(|layer| layer.length(place.1));
            held(length == Some(mask.length()), || {
                format!("task {id} has a mask of {} units at layer {}, space {}", mask.length(), place.0, place.1)
            })?;
            held(!mask.is_empty(), || format!("task {id} has an empty mask at layer {}", place.0))?;
        }
        Ok(())
    }
}
