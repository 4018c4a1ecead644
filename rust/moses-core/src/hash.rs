//! BLAKE3 of bytes and of named buffers. The result does not depend on the number of threads.

use std::sync::OnceLock;

use crate::{Error, Result};

/// Below this, threads cost more than they save.
const PARALLEL_BYTES: usize = 1 << 20;
/// More threads than this wait for memory.
const MAX_THREADS: usize = 8;

/// Whether the threads of rayon are there. They are not where the machine refuses them, nor in a process that was
/// forked after they were made (a worker of a data loader), where waiting for them would never end.
fn threads() -> bool {
    static MADE_IN: OnceLock<Option<u32>> = OnceLock::new();
    let made_in = MADE_IN.get_or_init(|| {
        let count = std::thread::available_parallelism().map_or(1, |count| count.get().min(MAX_THREADS));
        let made = rayon::ThreadPoolBuilder::new().num_threads(count).build_global();
        made.is_ok().then(std::process::id)
    });
    *made_in == Some(std::process::id())
}

/// The hash of `bytes`.
#[must_use]
pub fn hash(bytes: &[u8]) -> blake3::Hash {
    if bytes.len() < PARALLEL_BYTES || !threads() {
        return blake3::hash(bytes);
    }
    blake3::Hasher::new().update_rayon(bytes).finalize()
}

/// The hash of `bytes` as 64 hexadecimal digits.
#[must_use]
pub fn hash_hex(bytes: &[u8]) -> String {
    hash(bytes).to_hex().to_string()
}

/// The fingerprint of named buffers (tensors): names, lengths and bytes count, the order in which they are given does not.
///
/// # Errors
/// `name_given_twice`.
pub fn hash_buffers(buffers: &[(String, &[u8])]) -> Result<String> {
    let mut sorted: Vec<&(String, &[u8])> = buffers.iter().collect();
    sorted.sort_by(|left, right| left.0.cmp(&right.0));
    let mut hasher = blake3::Hasher::new_derive_key("moses 1 fingerprint of named buffers");
    let mut previous: Option<&str> = None;
    for (name, bytes) in sorted {
        if previous == Some(name) {
            return Err(Error::NameTwice { name: name.clone() });
        }
        previous = Some(name);
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(hash(bytes).as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Whether `text` is a hash as this module writes it.
#[must_use]
pub fn is_hex(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
