//! The dispatch plan: a stable counting sort of routed pairs by expert.
//!
//! Pairs `token * top_k + slot` are split into one part a thread. Each part counts its ids (range check included) and notes
//! them as 16-bit keys (32 where there are more experts); a scan over experts, then parts, gives every part its own
//! cursors; each part then places its pairs. The result is the same for any number of parts.

use std::sync::atomic::{AtomicI32, Ordering};

use bytemuck::Pod;

use crate::limits::{MAX_PLAN_EXPERTS, MAX_PLAN_ROWS, MAX_THREADS};
use crate::parallel::{for_each, part_length};
use crate::pool::Pool;
use crate::{Error, Result};

/// Below this many pairs one thread is faster than waking another (measured).
pub const PARALLEL_PAIRS: usize = 32_768;

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// Experts; ids are below.
    pub num_experts: usize,
    /// Slots of a token.
    pub top_k: usize,
    /// Pairs that an expert takes at most.
    pub capacity: Option<usize>,
    /// Whether every expert has exactly `capacity` rows.
    pub pad: bool,
}

/// Where the plan is written.
#[derive(Debug)]
pub struct Output<'a> {
    /// The pair of each row, -1 where the row is empty. Atomic, since threads write to it at places of their own that are
    /// not slices; a relaxed store is a plain move.
    pub order: &'a [AtomicI32],
    /// The row of each pair, -1 where it is dropped.
    pub inverse: &'a mut [i32],
    /// The first row of each expert, and the end.
    pub offsets: &'a mut [i64],
    /// Pairs that each expert takes.
    pub counts: &'a mut [i64],
}

fn misfit(problem: impl Into<String>) -> Error {
    Error::DispatchArguments { problem: problem.into() }
}

impl Request {
    /// Rows of the plan of `pairs` pairs.
    ///
    /// # Errors
    /// `dispatch_arguments`: the request contradicts itself or is over a cap.
    pub fn rows(&self, pairs: usize) -> Result<usize> {
        if self.num_experts == 0 || self.num_experts > MAX_PLAN_EXPERTS {
            return Err(misfit(format!("num_experts is {}: give 1 to {MAX_PLAN_EXPERTS}", self.num_experts)));
        }
        if self.top_k == 0 || !pairs.is_multiple_of(self.top_k) {
            return Err(misfit(format!("{pairs} ids are not tokens of {} slots", self.top_k)));
        }
        if self.capacity == Some(0) || (self.pad && self.capacity.is_none()) {
            return Err(misfit("capacity is missing or 0: give at least 1"));
        }
        let room = self.capacity.map(|capacity| capacity.saturating_mul(self.num_experts));
        let rows = room.map_or(pairs, |room| if self.pad { room } else { room.min(pairs) });
        if rows > MAX_PLAN_ROWS || pairs > MAX_PLAN_ROWS {
            return Err(misfit(format!("a plan of {pairs} pairs and {rows} rows is over {MAX_PLAN_ROWS}: split it")));
        }
        Ok(rows)
    }
}

/// An integer that names an expert.
pub trait ExpertId: Copy + Send + Sync {
    /// As an index; what is negative becomes larger than any number of experts.
    fn index(self) -> usize;
    /// As a number, for messages.
    fn value(self) -> i64;
}

macro_rules! expert_ids {
    ($($type:ty),+) => {
        $(impl ExpertId for $type {
            #[inline(always)]
            fn index(self) -> usize {
                self as usize
            }
            fn value(self) -> i64 {
                i64::from(self)
            }
        })+
    };
}
expert_ids!(i64, i32, i16, i8, u8);

trait Key: Pod + Send + Sync {
    fn of(index: usize) -> Self;
    fn index(self) -> usize;
}

macro_rules! keys {
    ($($type:ty),+) => {
        $(impl Key for $type {
            #[inline(always)]
            fn of(index: usize) -> Self {
                index as $type
            }
            #[inline(always)]
            fn index(self) -> usize {
                self as usize
            }
        })+
    };
}
keys!(u16, u32);

/// Writes the plan of `ids` (tokens x slots).
///
/// # Errors
/// `expert_id_range` names the first id that is no expert; `dispatch_arguments` says what does not fit; `out_of_memory`.
pub fn plan<I: ExpertId>(
    ids: &[I],
    request: &Request,
    output: Output<'_>,
    threads: usize,
    scratch: &Pool,
) -> Result<()> {
    let rows = request.rows(ids.len())?;
    let experts = request.num_experts;
    let lengths = (output.order.len(), output.inverse.len(), output.offsets.len(), output.counts.len());
    if lengths != (rows, ids.len(), experts.saturating_add(1), experts) {
        return Err(misfit(format!("the outputs have lengths {lengths:?}")));
    }
    if experts <= 1 << 16 {
        sort::<I, u16>(ids, request, output, threads, scratch)
    } else {
        sort::<I, u32>(ids, request, output, threads, scratch)
    }
}

fn sort<I: ExpertId, K: Key>(
    ids: &[I],
    request: &Request,
    output: Output<'_>,
    threads: usize,
    scratch: &Pool,
) -> Result<()> {
    let Output { order, inverse, offsets, counts } = output;
    let experts = request.num_experts;
    let threads = if ids.len() < PARALLEL_PAIRS { 1 } else { threads.clamp(1, MAX_THREADS) };
    let part = part_length(ids.len(), threads);
    let parts = ids.len().div_ceil(part);

    let mut block = scratch.take(ids.len().saturating_mul(size_of::<K>()))?;
    let keys = bytemuck::cast_slice_mut::<_, K>(&mut block);
    let keys = keys.get_mut(..ids.len()).unwrap_or_default();
    let mut cursors = vec![0_u32; parts.saturating_mul(experts)];
    let jobs = ids.chunks(part).zip(keys.chunks_mut(part)).zip(cursors.chunks_mut(experts));
    let counted = for_each(jobs.collect(), |((ids, keys), counts)| count(ids, keys, counts));
    if counted.is_err() {
        scratch.give(block);
        return Err(first_bad(ids, request));
    }

    let limits = scan(&mut cursors, request, offsets, counts);
    let jobs = keys.chunks(part).zip(inverse.chunks_mut(part)).zip(cursors.chunks_mut(experts));
    let jobs = jobs.enumerate().map(|(number, job)| (number.wrapping_mul(part), job)).collect();
    let placed = for_each(jobs, |(first, ((keys, inverse), cursors))| {
        match &limits {
            None => place(keys, first, inverse, cursors, order),
            Some(limits) => place_within(keys, first, inverse, cursors, limits, order),
        }
        Ok(())
    });
    scratch.give(block);
    if request.capacity.is_some() {
        clear_empty_rows(order, offsets, counts);
    }
    placed
}

/// Counts ids and notes them as keys; an error where one is no expert.
fn count<I: ExpertId, K: Key>(ids: &[I], keys: &mut [K], counts: &mut [u32]) -> std::result::Result<(), ()> {
    let mut bad = false;
    for (id, key) in ids.iter().zip(keys) {
        let index = id.index();
        *key = K::of(index);
        match counts.get_mut(index) {
            Some(count) => *count = count.wrapping_add(1),
            None => bad = true,
        }
    }
    if bad { Err(()) } else { Ok(()) }
}

fn first_bad<I: ExpertId>(ids: &[I], request: &Request) -> Error {
    let bad = ids.iter().enumerate().find(|(_, id)| id.index() >= request.num_experts);
    let (place, id) = bad.map_or((0, -1), |(place, id)| (place, id.value()));
    let slots = request.top_k.max(1);
    Error::ExpertIdRange {
        token: place.wrapping_div(slots) as u64,
        slot: place.wrapping_rem(slots) as u64,
        id,
        num_experts: request.num_experts as u64,
    }
}

/// Turns the parts' counts into their first rows; writes offsets and counts. With a capacity the result is the row at which
/// each expert is full. Sums are of at most `MAX_PLAN_ROWS` rows: 32 bits hold them.
fn scan(cursors: &mut [u32], request: &Request, offsets: &mut [i64], counts: &mut [i64]) -> Option<Vec<u32>> {
    let experts = request.num_experts;
    let mut next = vec![0_u32; experts];
    for part in cursors.chunks(experts) {
        next.iter_mut().zip(part).for_each(|(sum, count)| *sum = sum.wrapping_add(*count));
    }
    let capacity = request.capacity.map(|capacity| u32::try_from(capacity).unwrap_or(u32::MAX));
    let mut limits = capacity.map(|_| Vec::with_capacity(experts));
    let mut row = 0_u32;
    for ((next, offset), count) in next.iter_mut().zip(offsets.iter_mut()).zip(counts) {
        let taken = capacity.map_or(*next, |capacity| capacity.min(*next));
        *offset = i64::from(row);
        *count = i64::from(taken);
        *next = row;
        if let Some(limits) = &mut limits {
            limits.push(row.wrapping_add(taken));
        }
        row = row.wrapping_add(if request.pad { capacity.unwrap_or(0) } else { taken });
    }
    if let Some(end) = offsets.last_mut() {
        *end = i64::from(row);
    }
    for part in cursors.chunks_mut(experts) {
        match &limits {
            None => part.iter_mut().zip(&mut next).for_each(|(cursor, next)| {
                let count = std::mem::replace(cursor, *next);
                *next = next.wrapping_add(count);
            }),
            Some(limits) => part.iter_mut().zip(next.iter_mut().zip(limits)).for_each(|(cursor, (next, limit))| {
                let count = std::mem::replace(cursor, *next);
                *next = next.saturating_add(count).min(*limit);
            }),
        }
    }
    limits
}

/// Gives every pair of a part its row. Keys are below the number of experts (counted), and cursors of parts do not meet.
fn place<K: Key>(keys: &[K], first: usize, inverse: &mut [i32], cursors: &mut [u32], order: &[AtomicI32]) {
    let mut pair = first as i32;
    for (key, row_of) in keys.iter().zip(inverse) {
        if let Some(cursor) = cursors.get_mut(key.index()) {
            let row = *cursor;
            *cursor = row.wrapping_add(1);
            *row_of = row as i32;
            if let Some(slot) = order.get(row as usize) {
                slot.store(pair, Ordering::Relaxed);
            }
        }
        pair = pair.wrapping_add(1);
    }
}

/// As `place`, where an expert is full at its limit.
fn place_within<K: Key>(
    keys: &[K],
    first: usize,
    inverse: &mut [i32],
    cursors: &mut [u32],
    limits: &[u32],
    order: &[AtomicI32],
) {
    let mut pair = first as i32;
    for (key, row_of) in keys.iter().zip(inverse) {
        if let (Some(cursor), Some(limit)) = (cursors.get_mut(key.index()), limits.get(key.index())) {
            let row = *cursor;
            if row < *limit {
                *cursor = row.wrapping_add(1);
                *row_of = row as i32;
                if let Some(slot) = order.get(row as usize) {
                    slot.store(pair, Ordering::Relaxed);
                }
            } else {
                *row_of = -1;
            }
        }
        pair = pair.wrapping_add(1);
    }
}

/// Rows that no pair has: behind each expert's, and behind the last expert's.
fn clear_empty_rows(order: &[AtomicI32], offsets: &[i64], counts: &[i64]) {
    let clear = |from: i64, to: usize| {
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        order.get(from..to).unwrap_or_default().iter().for_each(|row| row.store(-1, Ordering::Relaxed));
    };
    for ((begin, end), count) in offsets.iter().zip(offsets.iter().skip(1)).zip(counts) {
        clear(begin.saturating_add(*count), usize::try_from(*end).unwrap_or(0));
    }
    clear(offsets.last().copied().unwrap_or(0), order.len());
}

#[cfg(test)]
mod tests;
