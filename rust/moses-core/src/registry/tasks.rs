//! Tasks: they begin, end with their masks (or are abandoned), and may be forgotten.

use std::collections::{BTreeMap, BTreeSet};

use super::layers::{check_name, ids_exhausted, within};
use super::{Place, Registry};
use crate::limits::{MAX_EVENTS, MAX_TASKS};
use crate::{Error, LayerId, Mask, Result, TaskId};

/// How far a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It began and is trained.
    Open,
    /// Its masks are fixed.
    Ended,
}

/// One unit of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Its id.
    pub id: TaskId,
    /// Its name, unique among the live tasks.
    pub name: String,
    /// Its domain, where one was given.
    pub domain: Option<String>,
    /// How far it is.
    pub state: State,
    /// The hash of its values, where it was set.
    pub content_hash: Option<[u8; 32]>,
    /// Which units it uses; what is missing is empty, and no mask that is there is.
    pub(super) masks: BTreeMap<Place, Mask>,
}

/// Something that happened. Names are not kept, so that a forgotten task is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A layer came.
    LayerAdded {
        /// Which.
        layer: LayerId,
        /// With how many experts.
        num_experts: u64,
    },
    /// Experts came to a layer.
    ExpertsAdded {
        /// Which layer.
        layer: LayerId,
        /// How many.
        num_experts: u64,
    },
    /// A task began.
    TaskBegun(TaskId),
    /// A task ended.
    TaskEnded(TaskId),
    /// An open task was given up.
    TaskAbandoned(TaskId),
    /// An ended task was removed.
    TaskForgotten(TaskId),
}

impl std::fmt::Display for Event {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::LayerAdded { layer, num_experts } => {
                write!(formatter, "layer {layer} added with {num_experts} experts")
            }
            Self::ExpertsAdded { layer, num_experts } => {
                write!(formatter, "{num_experts} experts added to layer {layer}")
            }
            Self::TaskBegun(task) => write!(formatter, "task {task} begun"),
            Self::TaskEnded(task) => write!(formatter, "task {task} ended"),
            Self::TaskAbandoned(task) => write!(formatter, "task {task} abandoned"),
            Self::TaskForgotten(task) => write!(formatter, "task {task} forgotten"),
        }
    }
}

impl Registry {
    pub(super) fn record(&mut self, event: Event) -> Result<()> {
        within("the number of events of the history", (self.history.len() as u64).saturating_add(1), MAX_EVENTS)?;
        self.history.push(event);
        Ok(())
    }

    /// Begins a task.
    ///
    /// # Errors
    /// `task_open` (another one), `task_name_taken`, `name_invalid`, `limit_exceeded`.
    pub fn begin_task(&mut self, name: &str, domain: Option<&str>) -> Result<TaskId> {
        check_name("task", name)?;
        domain.map_or(Ok(()), |domain| check_name("domain", domain))?;
        if let Some(open) = self.tasks.values().find(|task| task.state == State::Open) {
            return Err(Error::TaskOpen { task: open.id.0, name: open.name.clone() });
        }
        if self.tasks.values().any(|task| task.name == name) {
            return Err(Error::TaskNameTaken { name: name.to_owned() });
        }
        within("the number of live tasks", (self.tasks.len() as u64).saturating_add(1), MAX_TASKS)?;
        let id = TaskId(self.next_task);
        let next_task = self.next_task.checked_add(1).ok_or(ids_exhausted())?;
        self.record(Event::TaskBegun(id))?;
        self.next_task = next_task;
        let task = Task {
            id,
            name: name.to_owned(),
            domain: domain.map(str::to_owned),
            state: State::Open,
            content_hash: None,
            masks: BTreeMap::new(),
        };
        self.tasks.insert(id, task);
        Ok(id)
    }

    /// Ends the open task with the units that it uses: `(layer, space, mask)`; what is missing is empty.
    ///
    /// # Errors
    /// `task_unknown`, `task_ended`, `layer_unknown`, `space_unknown`, `mask_given_twice`, `mask_misfit`; then nothing has
    /// changed.
    pub fn end_task(&mut self, task: TaskId, masks: Vec<(LayerId, String, Mask)>) -> Result<()> {
        self.open_task(task)?;
        let mut placed = BTreeMap::new();
        for (layer, space, mask) in masks {
            let (place, wanted) = self.place(layer, &space)?;
            if mask.length() != wanted {
                return Err(Error::MaskMisfit { layer: layer.0, space, length: mask.length(), wanted });
            }
            if placed.insert(place, mask).is_some() {
                return Err(Error::MaskTwice { layer: layer.0, space });
            }
        }
        placed.retain(|_, mask| !mask.is_empty());
        self.record(Event::TaskEnded(task))?;
        if let Some(found) = self.tasks.get_mut(&task) {
            found.state = State::Ended;
            found.masks = placed;
        }
        Ok(())
    }

    /// Takes units away from an ended task: of each `(layer, space, mask)` it keeps those in the mask; what is missing stays as it
    /// is. Its content hash no longer holds, and is cleared.
    ///
    /// # Errors
    /// `task_unknown`, `task_open`, `layer_unknown`, `space_unknown`, `mask_given_twice`, `mask_misfit`; then nothing has
    /// changed.
    pub fn narrow_task(&mut self, task: TaskId, kept: Vec<(LayerId, String, Mask)>) -> Result<()> {
        let mut masks = self.ended_task(task)?.masks.clone();
        let mut narrowed = BTreeSet::new();
        for (layer, space, mask) in kept {
            let (place, wanted) = self.place(layer, &space)?;
            if mask.length() != wanted {
                return Err(Error::MaskMisfit { layer: layer.0, space, length: mask.length(), wanted });
            }
            if !narrowed.insert(place) {
                return Err(Error::MaskTwice { layer: layer.0, space });
            }
            if let Some(found) = masks.get_mut(&place) {
                // an old mask is as long as its space was when the task ended
                *found = found.resized(wanted)?.intersection(&mask)?;
            }
        }
        masks.retain(|_, mask| !mask.is_empty());
        if let Some(found) = self.tasks.get_mut(&task) {
            found.masks = masks;
            found.content_hash = None;
        }
        Ok(())
    }

    /// Gives up the open task; its id is not given again.
    ///
    /// # Errors
    /// `task_unknown`, `task_ended`.
    pub fn abandon_task(&mut self, task: TaskId) -> Result<()> {
        self.open_task(task)?;
        self.record(Event::TaskAbandoned(task))?;
        self.tasks.remove(&task);
        Ok(())
    }

    /// Removes an ended task. The result is what is freed: the units that no other live task uses, in canonical order.
    ///
    /// # Errors
    /// `task_unknown`, `task_open`.
    pub fn forget_task(&mut self, task: TaskId) -> Result<Vec<(LayerId, String, Mask)>> {
        self.ended_task(task)?;
        let mut freed = Vec::new();
        for (place, _, _) in self.places() {
            let exclusive = self.exclusive_at(task, place)?;
            if !exclusive.is_empty() {
                let space = self.layer(place.0)?.spaces.get(place.1).map(|space| space.name.clone());
                freed.push((place.0, space.unwrap_or_default(), exclusive));
            }
        }
        self.record(Event::TaskForgotten(task))?;
        self.tasks.remove(&task);
        Ok(freed)
    }

    /// The live tasks, by id.
    pub fn tasks(&self) -> impl Iterator<Item = &Task> {
        self.tasks.values()
    }

    /// The live task of this name.
    ///
    /// # Errors
    /// `task_name_unknown`.
    pub fn task_named(&self, name: &str) -> Result<&Task> {
        let found = self.tasks.values().find(|task| task.name == name);
        found.ok_or_else(|| Error::TaskNameUnknown { name: name.to_owned() })
    }

    /// A live task.
    ///
    /// # Errors
    /// `task_unknown`.
    pub fn task(&self, task: TaskId) -> Result<&Task> {
        self.tasks.get(&task).ok_or(Error::TaskUnknown { task: task.0 })
    }

    fn open_task(&self, task: TaskId) -> Result<&Task> {
        let found = self.task(task)?;
        match found.state {
            State::Open => Ok(found),
            State::Ended => Err(Error::TaskEnded { task: task.0, name: found.name.clone() }),
        }
    }

    pub(super) fn ended_task(&self, task: TaskId) -> Result<&Task> {
        let found = self.task(task)?;
        match found.state {
            State::Ended => Ok(found),
            State::Open => Err(Error::TaskOpen { task: task.0, name: found.name.clone() }),
        }
    }

    /// Notes the hash of a task's values: 64 lower-case hexadecimal digits.
    ///
    /// # Errors
    /// `task_unknown`, `task_open`, `hash_invalid`.
    pub fn set_content_hash(&mut self, task: TaskId, hash: &str) -> Result<()> {
        self.ended_task(task)?;
        let parsed = crate::hash::is_hex(hash).then(|| blake3::Hash::from_hex(hash).ok()).flatten();
        let parsed = parsed.ok_or_else(|| Error::HashInvalid { hash: hash.chars().take(80).collect() })?;
        if let Some(found) = self.tasks.get_mut(&task) {
            found.content_hash = Some(*parsed.as_bytes());
        }
        Ok(())
    }
}
