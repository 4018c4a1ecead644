//! Every cap, each with its reason. They are checked before anything is allocated.

/// Units of one space. 4,096 experts of rank 8 on 8,192 inputs; a mask of that many units is 32 MiB.
pub const MAX_UNITS: u64 = 1 << 28;
/// Bytes of one unit: a rank component of a 1,000,000-wide map in float64 has room.
pub const MAX_UNIT_BYTES: u64 = 1 << 24;
/// Layers of a registry. The largest models have some thousands of linear maps.
pub const MAX_LAYERS: u64 = 1 << 15;
/// Spaces of one layer; moses uses one or two.
pub const MAX_SPACES: u64 = 16;
/// Experts of one layer.
pub const MAX_EXPERTS: u64 = 1 << 16;
/// Experts that a registry ever had: 100 layers of 10,000. A file names them by runs, memory holds each.
pub const MAX_EXPERTS_IN_ALL: u64 = 1 << 20;
/// Tasks that live at once.
pub const MAX_TASKS: u64 = 1 << 16;
/// Events of the history. Some for each task and layer that ever was.
pub const MAX_EVENTS: u64 = 1 << 20;
/// Bytes of a name of a layer, a space, a task or a domain.
pub const MAX_NAME_BYTES: u64 = 512;
/// Bytes of the bank in all, so that sums of bytes never overflow 64 bits.
pub const MAX_BANK_BYTES: u64 = 1 << 60;
/// Bytes of a registry: 100 element masks over a 7 B model are some 600 MB.
pub const MAX_REGISTRY_BYTES: u64 = 1 << 31;
/// What short encodings (full, runs) may unfold to in memory, on top of `MASK_GROWTH` times the file.
pub const MASK_BUDGET_BYTES: u64 = 32 << 20;
/// See [`MASK_BUDGET_BYTES`].
pub const MASK_GROWTH: u64 = 16;

/// Bytes of a manifest: some 50,000 files.
pub const MAX_MANIFEST_BYTES: u64 = 16 << 20;
/// Files of a run folder.
pub const MAX_FILES: usize = 1 << 16;
/// Bytes of the logical name of a file, and of one of its components (what file systems allow, with room for a suffix).
pub const MAX_FILE_NAME_BYTES: usize = 512;
/// See [`MAX_FILE_NAME_BYTES`].
pub const MAX_COMPONENT_BYTES: usize = 200;
/// Folders that a name may go down.
pub const MAX_FILE_DEPTH: usize = 8;

/// Bytes of a safetensors header: some 100,000 tensors. The format's own cap is 100 MB.
pub const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Tensors of one safetensors file; more would unfold to more memory than a header may cost.
pub const MAX_TENSORS: usize = 150_000;
/// Bytes of the index of a checkpoint: 150,000 tensors. The largest published has 91,000 in 9 MB.
pub const MAX_INDEX_BYTES: u64 = 16 << 20;
/// Bytes of a config.json; published ones have some thousand, and lists of quantised modules some hundred thousand.
pub const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Tensors of a checkpoint.
pub const MAX_CHECKPOINT_TENSORS: usize = 150_000;
/// Shards of a checkpoint; the largest published has 163.
pub const MAX_SHARDS: usize = 4096;
/// Bytes of the `__metadata__` of a shard; `{"format": "pt"}` is usual.
pub const MAX_METADATA_BYTES: usize = 1 << 18;
/// Files of a checkpoint besides its shards.
pub const MAX_FILES_BESIDE: usize = 4096;
/// Bytes of a surgery plan or record.
pub const MAX_PLAN_BYTES: u64 = 64 << 20;
/// Bytes that a worker of surgery holds of a tensor at a time.
pub const MOVE_BYTES: usize = 1 << 20;
/// Threads that move bytes: enough to sync one shard while others are copied.
pub const MOVE_THREADS: usize = 4;

/// Dimensions of a tensor.
pub const MAX_DIMENSIONS: usize = 16;

/// Experts of a dispatch plan: counts of that many are 128 MiB.
pub const MAX_PLAN_EXPERTS: usize = 1 << 24;
/// Routed pairs of a plan, and rows: both are indexed by int32.
pub const MAX_PLAN_ROWS: usize = (1 << 31) - 1;
/// Threads that a kernel splits its work over; more than any machine pays for.
pub const MAX_THREADS: usize = 1 << 8;
/// Bytes of free blocks that the pool keeps: one gather of 65,536 x 1,024 float32 rows for two experts each, with the sum
/// and the gradient of it.
pub const MAX_POOL_BYTES: usize = 1 << 30;
