//! The part of moses that owns bytes, ids, masks and the CPU's dispatch.
//!
//! Guarantees: no unsafe code; no panic, hang or allocation beyond [`limits`] on any input; every error has a stable
//! code ([`Error::code`]); the same input gives the same bytes on every machine and for any number of threads.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod document;
pub mod error;
pub mod gate;
pub mod hash;
pub mod id;
pub mod layout;
pub mod limits;
pub mod mask;
pub mod parallel;
pub mod permute;
pub mod plan;
pub mod pool;
pub mod registry;
pub mod shard;
pub mod store;
pub mod surgery;
pub mod vfs;
mod wire;

pub use error::{Error, Kind, Result};
pub use id::{ExpertId, LayerId, TaskId};
pub use mask::Mask;
pub use registry::Registry;
pub use store::Store;
