//! One table of every error: variant, fields, code, kind, message.
//!
//! Codes are stable and made for programs; messages are one line for people: what happened, where, how to mend it.
//! A test of the Python side fails when a code of this table has no test.

use std::io;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What an error is about; the Python side has a class for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The ledger was asked for what it does not have or must not do.
    Registry,
    /// Routes, a plan and rows do not fit each other.
    Dispatch,
    /// Bytes are damaged, hostile or of another version.
    Format,
    /// A run folder is locked, not there, read-only or lacks a file.
    Store,
    /// Experts cannot be added, cut, joined or taken out as it is asked for.
    Surgery,
    /// The operating system said no.
    Io,
}

macro_rules! errors {
    ($($(#[doc = $doc:literal])+ $variant:ident { $($field:ident : $type:ty),* } $code:literal $kind:ident $message:literal;)+) => {
        /// Everything that can go wrong.
        #[derive(Debug, thiserror::Error)]
        #[allow(missing_docs)] // The fields are what the message says.
        pub enum Error {
            $($(#[doc = $doc])+ #[error($message)] $variant { $($field: $type),* },)+
        }

        impl Error {
            /// Every code with its kind, in the order of the table.
            pub const CODES: &'static [(&'static str, Kind)] = &[$(($code, Kind::$kind)),+];

            /// The stable name of this error.
            #[must_use]
            pub fn code(&self) -> &'static str {
                match self { $(Self::$variant { .. } => $code,)+ }
            }

            /// What this error is about.
            #[must_use]
            pub fn kind(&self) -> Kind {
                match self { $(Self::$variant { .. } => Kind::$kind,)+ }
            }
        }
    };
}

errors! {
    /// A count or a size is over its cap in `limits`.
    Limit { what: &'static str, value: u64, limit: u64 } "limit_exceeded" Registry
        "{what} would be {value}, over the limit of {limit}: split it into smaller parts";
    /// An index of a mask is outside of it.
    MaskIndex { index: u64, length: u64 } "mask_index" Registry
        "unit {index} is outside a mask of {length} units: indices go from 0 to length - 1";
    /// Two masks of different lengths meet in set algebra.
    MaskLengths { left: u64, right: u64 } "mask_lengths_differ" Registry
        "masks of {left} and {right} units cannot be combined: resize the shorter one with resized()";
    /// A mask was asked to shrink.
    MaskShrinks { length: u64, wanted: u64 } "mask_shrinks" Registry
        "a mask of {length} units cannot shrink to {wanted}: masks only grow";
    /// No layer has this id.
    LayerUnknown { layer: u32 } "layer_unknown" Registry
        "layer {layer} is not in the registry: layers() lists those that are";
    /// The layer has no such space.
    SpaceUnknown { layer: u32, space: String } "space_unknown" Registry
        "layer {layer} has no space {space:?}: layers() lists its spaces";
    /// No live task has this id.
    TaskUnknown { task: u32 } "task_unknown" Registry
        "task {task} is not in the registry: it never began, or was forgotten; tasks() lists those that live";
    /// No live task has this name.
    TaskNameUnknown { name: String } "task_name_unknown" Registry
        "no task is named {name:?}: tasks() lists those that live";
    /// A layer has this name already.
    LayerNameTaken { name: String } "layer_name_taken" Registry
        "a layer is named {name:?} already: every layer needs a name of its own";
    /// A live task has this name already.
    TaskNameTaken { name: String } "task_name_taken" Registry
        "a task is named {name:?} already: choose another name or forget that task first";
    /// A space is named twice in one layer.
    SpaceNameTaken { name: String } "space_name_taken" Registry
        "the space {name:?} is given twice: every space of a layer needs a name of its own";
    /// A name is empty, too long or has control characters.
    NameInvalid { what: &'static str, name: String } "name_invalid" Registry
        "the {what} name {name:?} is not usable: give 1 to 512 bytes without control characters";
    /// A count that must be at least one is zero.
    Zero { what: &'static str } "zero_count" Registry
        "{what} is 0: give at least 1";
    /// Another task is open.
    TaskOpen { task: u32, name: String } "task_open" Registry
        "task {task} ({name}) is still open: end or abandon it first";
    /// The task has ended already.
    TaskEnded { task: u32, name: String } "task_ended" Registry
        "task {task} ({name}) has ended and cannot change: forget it, or begin another";
    /// One space was given two masks.
    MaskTwice { layer: u32, space: String } "mask_given_twice" Registry
        "layer {layer}, space {space:?} was given two masks: give one, their union";
    /// A mask does not have the length of its space.
    MaskMisfit { layer: u32, space: String, length: u64, wanted: u64 } "mask_misfit" Registry
        "the mask for layer {layer}, space {space:?} has {length} units where the space has {wanted}: take the length from layers()";
    /// The values of an owner were not given.
    ValuesMissing { task: u32, owner: u32 } "values_missing" Registry
        "task {task} uses units that task {owner} owns, whose values were not given: add owned_values[{owner}]";
    /// The values of an owner have the wrong size.
    ValuesMisfit { owner: u32, length: u64, wanted: u64 } "values_misfit" Registry
        "the values of task {owner} have {length} bytes where it owns {wanted}: give its file as it was written";
    /// A content hash is not 64 lower-case hexadecimal digits.
    HashInvalid { hash: String } "hash_invalid" Registry
        "{hash:?} is not a BLAKE3 hash: give 64 lower-case hexadecimal digits";
    /// Two buffers to hash have one name.
    NameTwice { name: String } "name_given_twice" Registry
        "the name {name:?} is given twice: every buffer needs a name of its own";
    /// The ledger contradicts itself.
    Inconsistent { problem: String } "registry_inconsistent" Format
        "the registry contradicts itself: {problem}; restore it from a copy";

    /// A routed id is no expert.
    ExpertIdRange { token: u64, slot: u64, id: i64, num_experts: u64 } "expert_id_range" Dispatch
        "token {token}, slot {slot} names expert {id} of {num_experts}: ids go from 0 to num_experts - 1";
    /// Arguments of a plan, or of gather and combine, do not fit each other.
    DispatchArguments { problem: String } "dispatch_arguments" Dispatch
        "{problem}";
    /// A plan that was not made by `dispatch_plan`.
    PlanIndex { what: &'static str, place: u64, index: i64, length: u64 } "plan_index" Dispatch
        "the plan's {what}[{place}] is {index} where -1 to {length} - 1 is allowed: make plans with dispatch_plan";
    /// The result does not fit into memory.
    OutOfMemory { bytes: u64 } "out_of_memory" Dispatch
        "{bytes} bytes could not be allocated: use smaller batches";

    /// The bytes are of something else.
    Magic { what: &'static str } "format_magic" Format
        "this is not a {what}: its first bytes are others; check the path";
    /// The bytes are of a version that this moses does not know.
    Version { what: &'static str, version: u64, known: u64 } "format_version" Format
        "the {what} has version {version}, this moses reads up to {known}: install a newer moses";
    /// The bytes end too early.
    Truncated { what: &'static str, offset: u64 } "format_truncated" Format
        "the {what} ends at byte {offset}, in the middle of a value: it was cut; restore it from a copy";
    /// The checksum is wrong.
    Checksum { what: &'static str } "format_checksum" Format
        "the checksum of the {what} is wrong: it was damaged; restore it from a copy";
    /// A value is impossible.
    Malformed { what: &'static str, offset: u64, problem: String } "format_malformed" Format
        "the {what} is malformed at byte {offset}: {problem}; restore it from a copy";
    /// A declared size is over its cap.
    Oversized { what: &'static str, value: u64, limit: u64 } "format_oversized" Format
        "the {what} declares {value} where at most {limit} is allowed: it is damaged or hostile; restore it from a copy";
    /// A safetensors file breaks a rule of its format.
    Safetensors { path: String, problem: String } "safetensors_invalid" Format
        "{path}: not a valid safetensors file: {problem}; download or write it again";
    /// A manifest breaks a rule of its format.
    Manifest { path: String, problem: String } "manifest_invalid" Format
        "{path}: not a valid manifest: {problem}; restore the run folder from a copy";
    /// A file is not what the manifest says.
    FileDamaged { name: String, path: String, problem: String } "file_damaged" Format
        "{path}: {name} is damaged: {problem}; restore it from a copy";

    /// The folder has no manifest.
    NotARun { path: String } "not_a_run" Store
        "{path}: no manifest.json is there, so it is not a run folder: check the path, or create a run";
    /// The folder has a manifest already.
    StoreExists { path: String } "store_exists" Store
        "{path}: a run is there already: open it, or choose another folder";
    /// Another process writes.
    StoreLocked { path: String } "store_locked" Store
        "{path}: another process is writing this run: wait until it ends, or stop it";
    /// The store was closed.
    StoreClosed { path: String } "store_closed" Store
        "{path}: the run was closed: open it again";
    /// The store was opened for reading.
    ReadOnly { path: String } "store_read_only" Store
        "{path}: the run was opened for reading: open it with write=True";
    /// A reader's generation is gone.
    StoreChanged { path: String, from: u64, to: u64 } "store_changed" Store
        "{path}: a writer moved the run from generation {from} to {to}: open it again";
    /// The name of a file breaks a rule.
    FileNameInvalid { name: String, problem: &'static str } "file_name_invalid" Store
        "the file name {name:?} is not usable: {problem}";
    /// The manifest does not name this file.
    FileUnknown { name: String, path: String } "file_unknown" Store
        "{path}: the run has no file {name:?}: files() lists those that it has";
    /// The manifest names a file that is not there.
    FileMissing { name: String, path: String } "file_missing" Store
        "{path}: {name} is missing: restore it from a copy";
    /// A file, or what is no folder, is in the way.
    PathTaken { name: String, path: String } "path_taken" Store
        "{path}: something else is where {name} must go: move it away, or choose another name";
    /// A commit is in place but a power cut may undo it.
    NotDurable { path: String, generation: u64, source: io::Error } "commit_not_durable" Store
        "{path}: generation {generation} is in place, but the disk did not confirm it ({source}): check the disk, then commit again";
    /// It is not known which generation is in place.
    Unknown { path: String, generation: u64, source: io::Error } "commit_unknown" Store
        "{path}: the disk failed while generation {generation} was put in place ({source}): check the disk, then open the run again";

    /// A checkpoint contradicts itself or breaks a rule.
    Checkpoint { path: String, problem: String } "checkpoint_invalid" Format
        "{path}: not a checkpoint that can be trusted: {problem}; download or write it again";
    /// A shard's name or link leads out of the folder.
    ShardPath { path: String, name: String, problem: &'static str } "shard_path" Format
        "{path}: the file name {name:?} is not usable: {problem}; every file must lie in the checkpoint's own folder";
    /// The index names a shard that is not there.
    ShardMissing { path: String, name: String } "shard_missing" Format
        "{path}: the shard {name:?} is missing: download it again";
    /// A file of tensors is there that the index does not name.
    ShardExtra { path: String, name: String } "shard_extra" Format
        "{path}: the index does not name the file {name:?}: move it away, or download the index again";
    /// The index names a tensor that its shard does not have.
    TensorMissing { path: String, tensor: String, shard: String } "tensor_missing" Format
        "{path}: the index names the tensor {tensor:?} in {shard:?}, which does not have it: download both again";
    /// A shard has a tensor that the index does not name, or names elsewhere.
    TensorUnlisted { path: String, tensor: String, shard: String, problem: &'static str } "tensor_unlisted" Format
        "{path}: the tensor {tensor:?} of {shard:?} {problem}: download the index again";
    /// The weights are pickled.
    Pickled { path: String, name: String } "weights_pickled" Format
        "{path}: {name:?} holds pickled weights, which are never loaded: save them as safetensors first";
    /// The experts of a layer and its gate or the config do not fit.
    Experts { path: String, layer: String, problem: String } "experts_misfit" Format
        "{path}: {layer}: {problem}; download or write the checkpoint again";

    /// The table of layouts has no such type.
    ModelType { path: String, model_type: String } "model_type_unknown" Surgery
        "{path}: surgery does not know the model type {model_type:?}: it knows mixtral, qwen2_moe, qwen3_moe, olmoe, flex_olmo, deepseek_v2, deepseek_v3 and gpt_oss";
    /// A plan that does not fit the checkpoint.
    PlanMisfit { what: String, problem: String } "plan_misfit" Surgery
        "{what}: {problem}; make the plan for this checkpoint";
    /// A token would use more experts than are left.
    TopK { layer: String, left: u64, top_k: u64 } "top_k_too_large" Surgery
        "{layer}: {left} experts would be left and a token uses {top_k}: keep more, or lower top-k";
    /// Routing by groups does not allow the count.
    GroupsMisfit { layer: String, left: u64, problem: String } "groups_misfit" Surgery
        "{layer}: {left} experts do not fit the routing by groups: {problem}";
    /// Layers with different numbers of experts.
    Uneven { layer: String, left: u64, other: u64 } "uneven_experts" Surgery
        "{layer}: {left} experts where another layer has {other}, which transformers cannot load: give every layer as many, or ask for uneven layers by name";
    /// A tensor that surgery would have to change and does not know.
    TensorUnknown { path: String, tensor: String, problem: String } "tensor_unknown" Surgery
        "{path}: the tensor {tensor:?} {problem}";
    /// Something that this type, layout or dtype does not allow.
    Unsupported { what: String, problem: String } "surgery_unsupported" Surgery
        "{what}: {problem}";
    /// The output is there already.
    OutputExists { path: String } "output_exists" Surgery
        "{path}: something is there already: choose another folder, or remove it";
    /// The output would be inside the input.
    OutputInside { path: String, source_path: String } "output_inside" Surgery
        "{path}: this is inside the checkpoint {source_path}: choose a folder outside of it";
    /// A source file is not what it was when the work was planned.
    SourceChanged { path: String } "source_changed" Surgery
        "{path}: the file changed since the work was planned: nothing was written; run the command again";
    /// The disk is too small.
    NoSpace { path: String, needed: u64, free: u64 } "no_space" Surgery
        "{path}: {needed} bytes would be written and {free} are free: make room, or choose another disk";
    /// Another process writes the same output.
    SurgeryBusy { path: String } "surgery_busy" Surgery
        "{path}: another process is at work there: wait until it ends";
    /// The user stopped the work.
    Cancelled { path: String } "cancelled" Surgery
        "{path}: the work was stopped: nothing was written";

    /// An error of the operating system.
    Io { path: String, doing: &'static str, source: io::Error } "io" Io
        "{path}: {doing} failed: {source}";
}

impl Error {
    /// Wraps an error of the operating system with what was done to which path.
    pub(crate) fn io(path: impl Into<String>, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, doing, source }
    }
}
