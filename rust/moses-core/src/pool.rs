//! Memory that is used again. A fresh page costs the kernel more than copying it does (some four times), so the blocks that
//! results lived in are kept for the next results: at most `cap` bytes of free blocks, oldest dropped first.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytemuck::{Pod, Zeroable};

use crate::{Error, Result};

/// One cache line; blocks are made of them, so that every block is aligned for any vector.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Line([u64; 8]);

/// A block of lines. Whoever takes one from the pool owns it: it cannot be given twice.
pub type Block = Vec<Line>;

/// Bytes of a line.
pub const LINE_BYTES: usize = size_of::<Line>();

/// Free blocks, shared by all threads.
#[derive(Debug)]
pub struct Pool {
    free: Mutex<VecDeque<Block>>,
    cap: usize,
}

impl std::fmt::Debug for Line {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Line")
    }
}

fn bytes_of(block: &Block) -> usize {
    block.len().saturating_mul(LINE_BYTES)
}

impl Pool {
    /// An empty pool that keeps at most `cap` bytes.
    #[must_use]
    pub const fn new(cap: usize) -> Self {
        Self { free: Mutex::new(VecDeque::new()), cap }
    }

    // A panic while it was held left the list whole: every step of it is one call on the list.
    fn free(&self) -> MutexGuard<'_, VecDeque<Block>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of at least `bytes` bytes, whose content is anything: the smallest free one that wastes no more than half of
    /// itself, else a new one.
    ///
    /// # Errors
    /// `out_of_memory`.
    pub fn take(&self, bytes: usize) -> Result<Block> {
        let lines = bytes.div_ceil(LINE_BYTES);
        let mut free = self.free();
        let fitting = free.iter().enumerate().filter(|(_, block)| block.len() >= lines && block.len() / 2 <= lines);
        if let Some(block) = fitting.min_by_key(|(_, block)| block.len()).map(|(place, _)| place)
            && let Some(block) = free.remove(block)
        {
            return Ok(block);
        }
        drop(free);
        bytemuck::allocation::try_zeroed_vec(lines).map_err(|()| Error::OutOfMemory { bytes: bytes as u64 })
    }

    /// Takes a block back; the oldest go where the cap is passed.
    pub fn give(&self, block: Block) {
        let mut dropped = Vec::new(); // freed after the lock is let go
        let mut free = self.free();
        free.push_back(block);
        let mut held: usize = free.iter().map(bytes_of).fold(0, usize::saturating_add);
        while held > self.cap
            && let Some(oldest) = free.pop_front()
        {
            held = held.saturating_sub(bytes_of(&oldest));
            dropped.push(oldest);
        }
        drop(free);
    }

    /// Bytes of the free blocks.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.free().iter().map(bytes_of).fold(0, usize::saturating_add)
    }

    /// Gives the free blocks back to the system; the result is their bytes.
    pub fn clear(&self) -> usize {
        let blocks = std::mem::take(&mut *self.free());
        blocks.iter().map(bytes_of).fold(0, usize::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_used_again_and_never_twice() {
        let pool = Pool::new(1 << 20);
        let first = pool.take(1000).unwrap();
        let address = first.as_ptr();
        pool.give(first);
        let again = pool.take(900).unwrap();
        assert_eq!(again.as_ptr(), address);
        let other = pool.take(900).unwrap();
        assert_ne!(other.as_ptr(), address);
        assert_eq!(pool.bytes(), 0);
        assert!(bytemuck::cast_slice::<Line, u8>(&again).len() >= 900);
    }

    #[test]
    fn a_small_result_does_not_take_a_large_block() {
        let pool = Pool::new(1 << 20);
        pool.give(pool.take(1 << 16).unwrap());
        let small = pool.take(1 << 10).unwrap();
        assert_eq!(small.len() * LINE_BYTES, 1 << 10);
        assert_eq!(pool.bytes(), 1 << 16);
    }

    #[test]
    fn the_oldest_go_where_the_cap_is_passed() {
        let pool = Pool::new(1000);
        let blocks: Vec<Block> = (0..4).map(|_| pool.take(256).unwrap()).collect();
        blocks.into_iter().for_each(|block| pool.give(block));
        assert_eq!(pool.bytes(), 768);
        pool.give(pool.take(2048).unwrap());
        assert_eq!(pool.bytes(), 0);
        pool.give(pool.take(128).unwrap());
        assert_eq!((pool.clear(), pool.bytes()), (128, 0));
    }

    #[test]
    fn too_much_is_an_error() {
        assert_eq!(Pool::new(0).take(usize::MAX / 2).unwrap_err().code(), "out_of_memory");
    }
}
