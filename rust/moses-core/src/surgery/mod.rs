//! Surgery on checkpoints: a plan of what becomes of each layer's experts, turned into a list of byte moves, and those done.
//!
//! Guarantees: everything is checked before anything is written; the output appears whole or not at all; memory is bounded
//! whatever a tensor's size ([`crate::limits::MOVE_BYTES`]); what is kept keeps its bits.

mod build;
mod disk;
mod execute;
mod in_place;
mod job;
mod layer;
mod made;
mod norms;
mod request;
#[cfg(test)]
mod tests;
mod upcycle;
mod verify;

pub use build::build;
pub use disk::{Disk, RealDisk};
pub use execute::{Done, Target, execute};
pub use job::{Job, OutFile, OutShard, OutTensor, Piece, ShardContent};
pub use made::Made;
pub use norms::norms;
pub use request::{LayerRequest, NewRows, Options, Request, SlotRequest};
pub use upcycle::{Upcycle, upcycle};
pub use verify::{Comparison, compare};
