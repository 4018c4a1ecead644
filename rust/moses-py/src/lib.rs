//! `moses._core`: converts between Python and moses-core and releases the GIL in every call that does work.

#![allow(missing_docs)] // The Python face is documented in python/moses/_core.pyi.

mod buffer;
mod cuda;
mod dispatch;
mod error;
mod functions;
mod gate;
mod mask;
mod registry;
mod store;
mod surgery;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::cuda::cuda_source;
    #[pymodule_export]
    use super::dispatch::{
        Block, combine, combine_backward_rows, combine_backward_weights, dispatch_plan, gather, pool_bytes, pool_clear,
    };
    #[pymodule_export]
    use super::functions::{atomic_write, blake3_hex, error_codes, hash_buffers, safetensors_header};
    #[pymodule_export]
    use super::gate::{gate_backward, gate_forward};
    #[pymodule_export]
    use super::mask::Mask;
    #[pymodule_export]
    use super::registry::{LayerInfo, Registry, SpaceInfo, TaskInfo};
    #[pymodule_export]
    use super::store::{FileInfo, Store};
    #[pymodule_export]
    use super::surgery::{Checkpoint, SurgeryJob, compare_checkpoints};
}
