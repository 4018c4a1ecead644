//! `Registry` and the values that it gives.

use std::sync::RwLock;

use moses_core::registry::{Registry as CoreRegistry, Space, State, Task};
use moses_core::{LayerId, Mask as CoreMask, TaskId};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::buffer::{Buffers, Bytes};
use crate::error::{Failure, poisoned};
use crate::mask::Mask;

#[pyclass(frozen, get_all, eq, module = "moses._core")]
#[derive(PartialEq, Clone)]
pub(crate) struct SpaceInfo {
    name: String,
    units_per_expert: u64,
    unit_bytes: u64,
    length: u64,
}

#[pymethods]
impl SpaceInfo {
    fn __repr__(&self) -> String {
        let Self { name, units_per_expert, unit_bytes, length } = self;
        format!(
            "SpaceInfo(name={name:?}, units_per_expert={units_per_expert}, unit_bytes={unit_bytes}, length={length})"
        )
    }
}

#[pyclass(frozen, get_all, eq, module = "moses._core")]
#[derive(PartialEq)]
pub(crate) struct LayerInfo {
    id: u32,
    name: String,
    expert_ids: Vec<u32>,
    spaces: Vec<SpaceInfo>,
}

#[pymethods]
impl LayerInfo {
    fn __repr__(&self) -> String {
        let spaces: Vec<String> = self.spaces.iter().map(SpaceInfo::__repr__).collect();
        let Self { id, name, expert_ids, .. } = self;
        format!("LayerInfo(id={id}, name={name:?}, expert_ids={expert_ids:?}, spaces=[{}])", spaces.join(", "))
    }
}

#[pyclass(frozen, get_all, eq, module = "moses._core")]
#[derive(PartialEq)]
pub(crate) struct TaskInfo {
    id: u32,
    name: String,
    domain: Option<String>,
    state: &'static str,
    content_hash: Option<String>,
}

#[pymethods]
impl TaskInfo {
    fn __repr__(&self) -> String {
        let Self { id, name, state, .. } = self;
        format!("TaskInfo(id={id}, name={name:?}, state={state:?})")
    }
}

impl From<&Task> for TaskInfo {
    fn from(task: &Task) -> Self {
        let hex = |hash: &[u8; 32]| hash.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            id: task.id.0,
            name: task.name.clone(),
            domain: task.domain.clone(),
            state: match task.state {
                State::Open => "open",
                State::Ended => "ended",
            },
            content_hash: task.content_hash.as_ref().map(hex),
        }
    }
}

#[pyclass(frozen, module = "moses._core")]
pub(crate) struct Registry(RwLock<CoreRegistry>);

type Placed = Vec<(u32, String, Mask)>;

fn placed(masks: Vec<(LayerId, String, CoreMask)>) -> Placed {
    masks.into_iter().map(|(layer, space, mask)| (layer.0, space, Mask(mask))).collect()
}

impl Registry {
    /// Without the GIL: reads.
    fn read<T: Send>(
        &self,
        py: Python<'_>,
        work: impl Send + FnOnce(&CoreRegistry) -> moses_core::Result<T>,
    ) -> PyResult<T> {
        py.detach(|| Ok(work(&*self.0.read().map_err(poisoned)?).map_err(Failure)?))
    }

    /// Without the GIL: changes.
    fn write<T: Send>(
        &self,
        py: Python<'_>,
        work: impl Send + FnOnce(&mut CoreRegistry) -> moses_core::Result<T>,
    ) -> PyResult<T> {
        py.detach(|| Ok(work(&mut *self.0.write().map_err(poisoned)?).map_err(Failure)?))
    }
}

#[pymethods]
impl Registry {
    #[new]
    fn new() -> Self {
        Self(RwLock::new(CoreRegistry::new()))
    }

    fn add_layer(
        &self,
        py: Python<'_>,
        name: &str,
        num_experts: u64,
        spaces: Vec<(String, u64, u64)>,
    ) -> PyResult<u32> {
        let spaces = spaces.into_iter();
        let spaces = spaces.map(|(name, units_per_expert, unit_bytes)| Space { name, units_per_expert, unit_bytes });
        let spaces = spaces.collect();
        self.write(py, |registry| registry.add_layer(name, num_experts, spaces)).map(|layer| layer.0)
    }

    fn add_experts(&self, py: Python<'_>, layer: u32, count: u64) -> PyResult<Vec<u32>> {
        let added = self.write(py, |registry| registry.add_experts(LayerId(layer), count))?;
        Ok(added.into_iter().map(|expert| expert.0).collect())
    }

    fn layers(&self, py: Python<'_>) -> PyResult<Vec<LayerInfo>> {
        self.read(py, |registry| {
            let info = |layer: &moses_core::registry::Layer| LayerInfo {
                id: layer.id.0,
                name: layer.name.clone(),
                expert_ids: layer.experts.iter().map(|expert| expert.0).collect(),
                spaces: layer
                    .spaces
                    .iter()
                    .enumerate()
                    .map(|(at, space)| SpaceInfo {
                        name: space.name.clone(),
                        units_per_expert: space.units_per_expert,
                        unit_bytes: space.unit_bytes,
                        length: layer.length(at),
                    })
                    .collect(),
            };
            Ok(registry.layers().map(info).collect())
        })
    }

    #[pyo3(signature = (name, domain = None))]
    fn begin_task(&self, py: Python<'_>, name: &str, domain: Option<&str>) -> PyResult<u32> {
        self.write(py, |registry| registry.begin_task(name, domain)).map(|task| task.0)
    }

    fn end_task(&self, py: Python<'_>, task: u32, masks: Vec<(u32, String, PyRef<'_, Mask>)>) -> PyResult<()> {
        let masks: Vec<_> =
            masks.into_iter().map(|(layer, space, mask)| (LayerId(layer), space, mask.0.clone())).collect();
        self.write(py, |registry| registry.end_task(TaskId(task), masks))
    }

    fn narrow_task(&self, py: Python<'_>, task: u32, kept: Vec<(u32, String, PyRef<'_, Mask>)>) -> PyResult<()> {
        let kept: Vec<_> =
            kept.into_iter().map(|(layer, space, mask)| (LayerId(layer), space, mask.0.clone())).collect();
        self.write(py, |registry| registry.narrow_task(TaskId(task), kept))
    }

    fn abandon_task(&self, py: Python<'_>, task: u32) -> PyResult<()> {
        self.write(py, |registry| registry.abandon_task(TaskId(task)))
    }

    fn forget_task(&self, py: Python<'_>, task: u32) -> PyResult<Placed> {
        self.write(py, |registry| registry.forget_task(TaskId(task))).map(placed)
    }

    fn tasks(&self, py: Python<'_>) -> PyResult<Vec<TaskInfo>> {
        self.read(py, |registry| Ok(registry.tasks().map(TaskInfo::from).collect()))
    }

    fn task(&self, py: Python<'_>, name: &str) -> PyResult<TaskInfo> {
        self.read(py, |registry| registry.task_named(name).map(TaskInfo::from))
    }

    fn history(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.read(py, |registry| Ok(registry.history().iter().map(ToString::to_string).collect()))
    }

    fn mask(&self, py: Python<'_>, task: u32, layer: u32, space: &str) -> PyResult<Mask> {
        self.read(py, |registry| registry.mask(TaskId(task), LayerId(layer), space)).map(Mask)
    }

    fn used(&self, py: Python<'_>, layer: u32, space: &str) -> PyResult<Mask> {
        self.read(py, |registry| registry.used(LayerId(layer), space)).map(Mask)
    }

    fn free(&self, py: Python<'_>, layer: u32, space: &str) -> PyResult<Mask> {
        self.read(py, |registry| registry.free(LayerId(layer), space)).map(Mask)
    }

    fn owned(&self, py: Python<'_>, task: u32, layer: u32, space: &str) -> PyResult<Mask> {
        self.read(py, |registry| registry.owned(TaskId(task), LayerId(layer), space)).map(Mask)
    }

    fn exclusive(&self, py: Python<'_>, task: u32, layer: u32, space: &str) -> PyResult<Mask> {
        self.read(py, |registry| registry.exclusive(TaskId(task), LayerId(layer), space)).map(Mask)
    }

    fn reference_counts<'py>(&self, py: Python<'py>, layer: u32, space: &str) -> PyResult<Bound<'py, PyBytes>> {
        let counts: Vec<u8> = self.read(py, |registry| {
            let counts = registry.reference_counts(LayerId(layer), space)?;
            Ok(counts.into_iter().flat_map(u32::to_le_bytes).collect())
        })?;
        Ok(PyBytes::new(py, &counts))
    }

    fn new_bytes(&self, py: Python<'_>, task: u32) -> PyResult<u64> {
        self.read(py, |registry| registry.new_bytes(TaskId(task)))
    }

    fn used_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        self.read(py, CoreRegistry::used_bytes)
    }

    fn total_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        self.read(py, |registry| Ok(registry.total_bytes()))
    }

    fn bank_fraction(&self, py: Python<'_>) -> PyResult<f64> {
        self.read(py, CoreRegistry::bank_fraction)
    }

    fn mask_bytes(&self, py: Python<'_>, task: u32) -> PyResult<u64> {
        self.read(py, |registry| registry.mask_bytes(TaskId(task)))
    }

    fn overlap(&self, py: Python<'_>) -> PyResult<Vec<Vec<u64>>> {
        self.read(py, CoreRegistry::overlap)
    }

    fn assemble<'py>(&self, py: Python<'py>, task: u32, owned_values: Buffers<u32>) -> PyResult<Bound<'py, PyBytes>> {
        let flat = self.read(py, |registry| registry.assemble(TaskId(task), &owned_values.as_slices(TaskId)))?;
        Ok(PyBytes::new(py, &flat))
    }

    fn content_hash(&self, py: Python<'_>, task: u32, owned_values: Buffers<u32>) -> PyResult<String> {
        self.read(py, |registry| registry.content_hash(TaskId(task), &owned_values.as_slices(TaskId)))
    }

    fn set_content_hash(&self, py: Python<'_>, task: u32, hash: &str) -> PyResult<()> {
        self.write(py, |registry| registry.set_content_hash(TaskId(task), hash))
    }

    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = self.read(py, |registry| Ok(registry.to_bytes()))?;
        Ok(PyBytes::new(py, &bytes))
    }

    #[staticmethod]
    fn from_bytes(py: Python<'_>, data: Bytes) -> PyResult<Self> {
        let registry = py.detach(|| CoreRegistry::from_bytes(data.as_slice()).map_err(Failure))?;
        Ok(Self(RwLock::new(registry)))
    }

    fn validate(&self, py: Python<'_>) -> PyResult<()> {
        self.read(py, CoreRegistry::validate)
    }

    fn __eq__(&self, py: Python<'_>, other: &Self) -> PyResult<bool> {
        if std::ptr::eq(self, other) {
            return Ok(true);
        }
        // One lock at a time: two threads that compare in opposite orders must not wait for each other.
        let other = other.read(py, |registry| Ok(registry.clone()))?;
        self.read(py, |registry| Ok(*registry == other))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        self.read(py, |registry| {
            Ok(format!("Registry({} layers, {} tasks)", registry.layers().count(), registry.tasks().count()))
        })
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let make = slf.get_type().getattr("from_bytes")?;
        (make, (slf.get().to_bytes(py)?,)).into_pyobject(py)
    }
}
