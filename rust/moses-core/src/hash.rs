//! BLAKE3 of bytes and of named buffers. The result does not depend on the number of threads.

use crate::{Error, Result};

/// Below this, threads cost more than they save.
const PARALLEL_BYTES: usize = 1 << 20;

/// The hash of `bytes`.
#[must_use]
pub fn hash(bytes: &[u8]) -> blake3::Hash {
    if bytes.len() < PARALLEL_BYTES {
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
