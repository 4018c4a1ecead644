//! Who uses and who owns which unit, what is shared, and how a task's values are put together from their owners.
//!
//! Canonical order of a task's values: by layer id, by space in the layer's order, by unit ascending.

use std::collections::BTreeMap;

use super::{Place, Registry};
use crate::{Error, LayerId, Mask, Result, TaskId};

impl Registry {
    fn mask_at(&self, task: TaskId, place: Place) -> Result<Mask> {
        match self.task(task)?.masks.get(&place) {
            Some(mask) => Ok(mask.clone()),
            None => Mask::empty(self.layer(place.0)?.length(place.1)),
        }
    }

    fn union_at<'a>(&'a self, place: Place, keep: impl Fn(TaskId) -> bool + 'a) -> Result<Mask> {
        let masks = self.tasks.values().filter(|task| keep(task.id)).filter_map(|task| task.masks.get(&place));
        Mask::union_all(self.layer(place.0)?.length(place.1), masks)
    }

    fn owned_at(&self, task: TaskId, place: Place) -> Result<Mask> {
        self.mask_at(task, place)?.difference(&self.union_at(place, |other| other < task)?)
    }

    pub(super) fn exclusive_at(&self, task: TaskId, place: Place) -> Result<Mask> {
        self.mask_at(task, place)?.difference(&self.union_at(place, |other| other != task)?)
    }

    /// The units that a task uses.
    ///
    /// # Errors
    /// `task_unknown`, `layer_unknown`, `space_unknown`.
    pub fn mask(&self, task: TaskId, layer: LayerId, space: &str) -> Result<Mask> {
        self.mask_at(task, self.place(layer, space)?.0)
    }

    /// The units that any live task uses.
    ///
    /// # Errors
    /// `layer_unknown`, `space_unknown`.
    pub fn used(&self, layer: LayerId, space: &str) -> Result<Mask> {
        self.union_at(self.place(layer, space)?.0, |_| true)
    }

    /// The units that a task owns: those of its units that no live task with a lower id uses.
    ///
    /// # Errors
    /// `task_unknown`, `layer_unknown`, `space_unknown`.
    pub fn owned(&self, task: TaskId, layer: LayerId, space: &str) -> Result<Mask> {
        self.task(task)?;
        self.owned_at(task, self.place(layer, space)?.0)
    }

    /// The units that only this task uses: what forgetting it would free.
    ///
    /// # Errors
    /// `task_unknown`, `layer_unknown`, `space_unknown`.
    pub fn exclusive(&self, task: TaskId, layer: LayerId, space: &str) -> Result<Mask> {
        self.task(task)?;
        self.exclusive_at(task, self.place(layer, space)?.0)
    }

    /// By how many live tasks each unit of a space is used.
    ///
    /// # Errors
    /// `layer_unknown`, `space_unknown`.
    pub fn reference_counts(&self, layer: LayerId, space: &str) -> Result<Vec<u32>> {
        let (place, length) = self.place(layer, space)?;
        let mut counts = vec![0_u32; length as usize];
        for mask in self.tasks.values().filter_map(|task| task.masks.get(&place)) {
            mask.for_each(|unit| {
                if let Some(count) = counts.get_mut(unit as usize) {
                    *count = count.saturating_add(1);
                }
            });
        }
        Ok(counts)
    }

    fn sum_bytes(&self, count: impl Fn(Place) -> Result<u64>) -> Result<u64> {
        self.places().try_fold(0_u64, |sum, (place, _, unit_bytes)| {
            Ok(sum.saturating_add(count(place)?.saturating_mul(unit_bytes)))
        })
    }

    /// The bytes of the units that a task owns.
    ///
    /// # Errors
    /// `task_unknown`.
    pub fn new_bytes(&self, task: TaskId) -> Result<u64> {
        self.task(task)?;
        self.sum_bytes(|place| Ok(self.owned_at(task, place)?.count()))
    }

    /// The bytes of the units that any live task uses.
    ///
    /// # Errors
    /// None but by a broken invariant.
    pub fn used_bytes(&self) -> Result<u64> {
        self.sum_bytes(|place| Ok(self.union_at(place, |_| true)?.count()))
    }

    /// `used_bytes / total_bytes`; 0 where there are no layers.
    ///
    /// # Errors
    /// None but by a broken invariant.
    pub fn bank_fraction(&self) -> Result<f64> {
        let total = self.total_bytes();
        Ok(if total == 0 { 0.0 } else { self.used_bytes()? as f64 / total as f64 })
    }

    /// The bytes that each pair of live tasks shares, in the order of `tasks()`; on the diagonal what each uses.
    ///
    /// # Errors
    /// None but by a broken invariant.
    pub fn overlap(&self) -> Result<Vec<Vec<u64>>> {
        let unit_bytes: BTreeMap<Place, u64> =
            self.places().map(|(place, _, unit_bytes)| (place, unit_bytes)).collect();
        let shared = |left: &super::Task, right: &super::Task| {
            left.masks.iter().try_fold(0_u64, |sum, (place, mask)| {
                let units = right.masks.get(place).map_or(Ok(0), |other| mask.intersection_count(other))?;
                Ok(sum.saturating_add(units.saturating_mul(unit_bytes.get(place).copied().unwrap_or(0))))
            })
        };
        let mut rows: Vec<Vec<u64>> = Vec::with_capacity(self.tasks.len());
        for (at, left) in self.tasks.values().enumerate() {
            let mirrored: Vec<u64> = rows.iter().map(|row| row.get(at).copied().unwrap_or(0)).collect();
            let rest = self.tasks.values().skip(at).map(|right| shared(left, right));
            rows.push(mirrored.into_iter().map(Ok).chain(rest).collect::<Result<_>>()?);
        }
        Ok(rows)
    }

    /// A task's flat vector, put together from its owners' flat vectors of the units that they own.
    ///
    /// # Errors
    /// `task_unknown`, `task_open`, `values_missing`, `values_misfit`.
    pub fn assemble(&self, task: TaskId, owned_values: &BTreeMap<TaskId, &[u8]>) -> Result<Vec<u8>> {
        let masks = &self.ended_task(task)?.masks;
        let mut moves = Vec::new();
        let mut owned_bytes: BTreeMap<TaskId, usize> = BTreeMap::new();
        let mut to = 0_usize;
        for (place, length, unit_bytes) in self.places() {
            let bytes = |mask: &Mask| (mask.count() as usize).saturating_mul(unit_bytes as usize);
            let mut seen = Mask::empty(length)?;
            for (&owner, other) in self.tasks.range(..=task) {
                let Some(used) = other.masks.get(&place) else { continue };
                let owned = used.difference(&seen)?;
                seen = seen.union(used)?;
                let from = owned_bytes.entry(owner).or_default();
                let start = *from;
                *from = start.saturating_add(bytes(&owned));
                if let Some(mask) = masks.get(&place)
                    && owned.intersection_count(mask)? > 0
                {
                    moves.push(Move { owner, owned, mask, unit_bytes: unit_bytes as usize, from: start..*from, to });
                }
            }
            to = to.saturating_add(masks.get(&place).map_or(0, bytes));
        }
        // All sizes are checked before anything is allocated: what is given bounds what is made.
        for owner in moves.iter().map(|step| step.owner) {
            let missing = Error::ValuesMissing { task: task.0, owner: owner.0 };
            let length = owned_values.get(&owner).ok_or(missing)?.len();
            let wanted = owned_bytes.get(&owner).copied().unwrap_or(0);
            if length != wanted {
                return Err(Error::ValuesMisfit { owner: owner.0, length: length as u64, wanted: wanted as u64 });
            }
        }
        let mut values = vec![0_u8; to];
        for step in &moves {
            let source = owned_values.get(&step.owner).and_then(|source| source.get(step.from.clone()));
            if let (Some(source), Some(target)) = (source, values.get_mut(step.to..)) {
                copy_common(&step.owned, step.mask, step.unit_bytes, source, target);
            }
        }
        Ok(values)
    }

    /// The BLAKE3 hash of a task's flat vector as hexadecimal digits.
    ///
    /// # Errors
    /// As [`Registry::assemble`].
    pub fn content_hash(&self, task: TaskId, owned_values: &BTreeMap<TaskId, &[u8]>) -> Result<String> {
        Ok(crate::hash::hash_hex(&self.assemble(task, owned_values)?))
    }
}

/// At one place: what a task uses of what an owner owns, and where it lies in the flat vectors of both.
struct Move<'a> {
    owner: TaskId,
    owned: Mask,
    mask: &'a Mask,
    unit_bytes: usize,
    from: std::ops::Range<usize>,
    to: usize,
}

/// Copies the units of both masks from the flat vector of one to the flat vector of the other, run by run.
fn copy_common(owned: &Mask, mask: &Mask, unit_bytes: usize, source: &[u8], target: &mut [u8]) {
    let (mut owned_runs, mut mask_runs) = (owned.runs(), mask.runs());
    let (mut owned_run, mut mask_run) = (owned_runs.next(), mask_runs.next());
    // How many units of each mask lie before its current run.
    let (mut from, mut to) = (0_u64, 0_u64);
    let bytes = |units: u64| (units as usize).saturating_mul(unit_bytes);
    while let (Some(left), Some(right)) = (&owned_run, &mask_run) {
        let (start, end) = (left.start.max(right.start), left.end.min(right.end));
        if start < end {
            let from_start = bytes(from.saturating_add(start.saturating_sub(left.start)));
            let to_start = bytes(to.saturating_add(start.saturating_sub(right.start)));
            let count = bytes(end.saturating_sub(start));
            let source = source.get(from_start..from_start.saturating_add(count));
            let target = target.get_mut(to_start..to_start.saturating_add(count));
            if let (Some(source), Some(target)) = (source, target) {
                target.copy_from_slice(source);
            }
        }
        if left.end <= right.end {
            from = from.saturating_add(left.end.saturating_sub(left.start));
            owned_run = owned_runs.next();
        } else {
            to = to.saturating_add(right.end.saturating_sub(right.start));
            mask_run = mask_runs.next();
        }
    }
}
