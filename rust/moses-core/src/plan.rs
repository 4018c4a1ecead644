//! The dispatch plan: a stable counting sort of routed pairs by expert.
//!
//! Pairs `token * top_k + slot` are split into one part a thread. Each part counts its ids (range check included) and notes
//! them as 16-bit keys (32 where there are more experts); a scan over experts, then parts, gives every part its own
//! cursors; each part then places its pairs. The result is the same for any number of parts.

use bytemuck::Pod;

use crate::limits::{MAX_PLAN_EXPERTS, MAX_PLAN_ROWS, MAX_THREADS};
use crate::parallel::{for_each, part_length, with_vectors};
use crate::pool::Pool;
use crate::{Error, Result};

/// Below this many pairs one thread is faster than waking another (measured).
pub const PARALLEL_PAIRS: usize = 32_768;

/// From this many pairs a part stages the pairs of each expert and writes them to `order` many at a time: where `order` is
/// not in the cache, every line of it that is begun waits for memory (measured: 1.5 to 3 times slower).
pub const STAGED_PAIRS: usize = 1 << 15;

/// Pairs of one expert that are staged, where experts have many and where they have fewer: a write of a stage is long enough
/// for the memory to stream, and all stages fit the second cache.
const LONG_STAGE: usize = 256;
/// See [`LONG_STAGE`].
const SHORT_STAGE: usize = 64;

/// Pairs an expert must have on average, for each pair of its stage, for the stage to pay.
const STAGE_USES: usize = 4;

/// Ids that are noted at a time, so that their keys are counted from the first cache.
const NOTED: usize = 2048;

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
    /// The pair of each row, -1 where the row is empty.
    pub order: &'a mut [i32],
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
            return Err(misfit(format!(
                "{pairs} ids are not tokens of {} slots: give (tokens, top_k) ids",
                self.top_k
            )));
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

/// An expert's number in as few bytes as hold it. `mask` makes any number an index below [`Key::SLOTS`], so that tables of
/// that many entries need no check; ids are checked before.
trait Key: Pod + Send + Sync {
    /// Entries of a table over keys; a power of two.
    const SLOTS: usize;
    fn of(index: usize) -> Self;
    fn index(self) -> usize;
}

macro_rules! keys {
    ($($name:ident($type:ty) = $slots:expr),+) => {
        $(#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(transparent)]
        struct $name($type);
        impl Key for $name {
            const SLOTS: usize = $slots;
            #[inline(always)]
            fn of(index: usize) -> Self {
                Self(index as $type)
            }
            #[inline(always)]
            fn index(self) -> usize {
                self.0 as usize & ($slots - 1)
            }
        })+
    };
}
keys!(Tiny(u8) = 1 << 8, Small(u16) = 1 << 12, Middle(u16) = 1 << 16, Large(u32) = MAX_PLAN_EXPERTS);

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
        return Err(misfit(format!("the outputs have lengths {lengths:?}: make plans with moses.dispatch_plan")));
    }
    match experts {
        0..=0x100 => sort::<I, Tiny>(ids, request, output, threads, scratch),
        0x101..=0x1000 => sort::<I, Small>(ids, request, output, threads, scratch),
        0x1001..=0x1_0000 => sort::<I, Middle>(ids, request, output, threads, scratch),
        _ => sort::<I, Large>(ids, request, output, threads, scratch),
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
    // tables are as long as keys can name, so that no access to them is out of range
    let table = if experts <= Small::SLOTS { K::SLOTS } else { experts };

    let mut block = scratch.take(ids.len().saturating_mul(size_of::<K>()))?;
    let keys = bytemuck::cast_slice_mut::<_, K>(&mut block);
    let keys = keys.get_mut(..ids.len()).unwrap_or_default();
    let mut cursors = vec![0_u32; parts.saturating_mul(table)];
    let jobs = ids.chunks(part).zip(keys.chunks_mut(part)).zip(cursors.chunks_mut(table));
    let counted: std::result::Result<(), ()> = for_each(jobs.collect(), threads, |((ids, keys), counts)| {
        with_vectors((ids, keys, counts, experts), &note_and_count::<I, K>)
    });
    if counted.is_err() {
        scratch.give(block);
        return Err(first_bad(ids, request));
    }

    let limits = scan(&mut cursors, table, request, offsets, counts);
    let uses = part.min(ids.len()).checked_div(experts).unwrap_or(0) / STAGE_USES;
    let staged = ids.len() >= STAGED_PAIRS && uses >= SHORT_STAGE;
    let whole = parts <= 1 && limits.is_none() && !staged;
    let placed = if whole {
        place_whole(keys, inverse, &mut cursors, order);
        Ok(())
    } else {
        let regions = regions(order, &cursors, table, offsets, limits.as_deref());
        let jobs = keys.chunks(part).zip(inverse.chunks_mut(part)).zip(cursors.chunks_mut(table)).zip(regions);
        let jobs = jobs.enumerate().map(|(number, job)| (number.wrapping_mul(part), job)).collect();
        for_each(jobs, threads, |(first, (((keys, inverse), cursors), mut regions))| {
            match &limits {
                Some(limits) => place_within(keys, first, inverse, cursors, limits, &mut regions),
                None if staged && uses >= LONG_STAGE => {
                    place_staged::<K, LONG_STAGE>(keys, first, inverse, cursors, &mut regions, scratch)?;
                }
                None if staged => {
                    place_staged::<K, SHORT_STAGE>(keys, first, inverse, cursors, &mut regions, scratch)?;
                }
                None => place(keys, first, inverse, cursors, &mut regions),
            }
            Ok(())
        })
    };
    scratch.give(block);
    placed
}

/// Notes ids as keys and counts them, in one pass; an error where one is no expert.
#[inline(always)]
fn note_and_count<I: ExpertId, K: Key>(
    (ids, keys, counts, experts): (&[I], &mut [K], &mut [u32], usize),
) -> std::result::Result<(), ()> {
    // Four tables in turn where they are small: an expert named twice in a row would else wait for its own count.
    let spread = K::SLOTS <= Small::SLOTS && ids.len() >= K::SLOTS.saturating_mul(16);
    let mut tables = vec![0_u32; if spread { K::SLOTS.saturating_mul(3) } else { 0 }];
    let mut bad = false;
    for (ids, keys) in ids.chunks(NOTED).zip(keys.chunks_mut(NOTED)) {
        for (id, key) in ids.iter().zip(keys.iter_mut()) {
            let index = id.index();
            bad |= index >= experts;
            *key = K::of(index);
        }
        count(keys, counts, &mut tables);
    }
    for table in tables.chunks_exact(K::SLOTS) {
        counts.iter_mut().zip(table).for_each(|(sum, count)| *sum = sum.wrapping_add(*count));
    }
    if bad { Err(()) } else { Ok(()) }
}

/// Counts keys, three of four in `tables` where there are any.
#[inline(always)]
fn count<K: Key>(keys: &[K], counts: &mut [u32], tables: &mut [u32]) {
    fn add(table: &mut [u32], index: usize) {
        if let Some(count) = table.get_mut(index) {
            *count = count.wrapping_add(1);
        }
    }
    let mut others = tables.chunks_exact_mut(K::SLOTS);
    let (Some(second), Some(third), Some(fourth)) = (others.next(), others.next(), others.next()) else {
        keys.iter().for_each(|key| add(counts, key.index()));
        return;
    };
    let (quads, rest) = keys.as_chunks::<4>();
    for [a, b, c, d] in quads {
        add(counts, a.index());
        add(second, b.index());
        add(third, c.index());
        add(fourth, d.index());
    }
    rest.iter().for_each(|key| add(counts, key.index()));
}

fn first_bad<I: ExpertId>(ids: &[I], request: &Request) -> Error {
    let bad = ids.iter().enumerate().find(|(_, id)| id.index() >= request.num_experts);
    let (place, id) = bad.map_or((0, -1), |(place, id)| (place, id.value()));
    let slots = request.top_k.max(1);
    Error::ExpertIdRange {
        token: place.checked_div(slots).unwrap_or(0) as u64,
        slot: place.checked_rem(slots).unwrap_or(0) as u64,
        id,
        num_experts: request.num_experts as u64,
    }
}

/// Turns the parts' counts into their first rows; writes offsets and counts. With a capacity the result is the row at which
/// each expert is full. Sums are of at most `MAX_PLAN_ROWS` rows: 32 bits hold them.
fn scan(
    cursors: &mut [u32],
    table: usize,
    request: &Request,
    offsets: &mut [i64],
    counts: &mut [i64],
) -> Option<Vec<u32>> {
    let experts = request.num_experts;
    let mut next = vec![0_u32; experts];
    for part in cursors.chunks(table) {
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
    for part in cursors.chunks_mut(table) {
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

/// The rows of every part and expert, as slices that do not meet, by part and then expert; empty rows are set to -1.
fn regions<'a>(
    order: &'a mut [i32],
    cursors: &[u32],
    table: usize,
    offsets: &[i64],
    limits: Option<&[u32]>,
) -> Vec<Vec<&'a mut [i32]>> {
    let experts = offsets.len().saturating_sub(1);
    let parts = cursors.len().checked_div(table).unwrap_or(0);
    let mut regions: Vec<Vec<&mut [i32]>> = (0..parts).map(|_| Vec::with_capacity(experts)).collect();
    let start_of = |part: usize, expert: usize| {
        let start = cursors.get(part.wrapping_mul(table).wrapping_add(expert));
        start.copied().map_or(0, |start| start as usize)
    };
    let (mut rest, mut at) = (order, 0_usize);
    let mut cut = |end: usize| {
        let (taken, left) = std::mem::take(&mut rest).split_at_mut_checked(end.saturating_sub(at)).unwrap_or_default();
        rest = left;
        at = at.max(end);
        taken
    };
    for expert in 0..experts {
        let next = offsets.get(expert.wrapping_add(1)).map_or(0, |end| usize::try_from(*end).unwrap_or(0));
        let full = limits.and_then(|limits| limits.get(expert)).map_or(next, |limit| *limit as usize);
        for (part, list) in regions.iter_mut().enumerate() {
            let following = part.wrapping_add(1);
            list.push(cut(if following < parts { start_of(following, expert) } else { full }));
        }
        cut(next).fill(-1);
    }
    rest.fill(-1);
    regions
}

/// Gives every pair its row, where one part is all.
fn place_whole<K: Key>(keys: &[K], inverse: &mut [i32], cursors: &mut [u32], order: &mut [i32]) {
    let mut pair = 0_i32;
    for (key, row_of) in keys.iter().zip(inverse) {
        if let Some(cursor) = cursors.get_mut(key.index()) {
            let row = *cursor;
            *cursor = row.wrapping_add(1);
            *row_of = row as i32;
            if let Some(slot) = order.get_mut(row as usize) {
                *slot = pair;
            }
        }
        pair = pair.wrapping_add(1);
    }
}

/// As `place`, by stages: the pair of row r waits at r modulo `STAGE` of its expert's stage until that is full.
fn place_staged<K: Key, const STAGE: usize>(
    keys: &[K],
    first: usize,
    inverse: &mut [i32],
    cursors: &mut [u32],
    regions: &mut [&mut [i32]],
    scratch: &Pool,
) -> Result<()> {
    let experts = regions.len();
    let mut block = scratch.take(experts.saturating_mul(size_of::<[i32; STAGE]>()))?;
    let (stages, _) = bytemuck::cast_slice_mut::<_, i32>(&mut block).as_chunks_mut::<STAGE>(); // blocks may be longer
    let mut written: Vec<u32> = cursors.iter().take(experts).copied().collect();
    let mut pair = first as i32;
    for (key, row_of) in keys.iter().zip(inverse) {
        let index = key.index();
        if let (Some(cursor), Some(stage)) = (cursors.get_mut(index), stages.get_mut(index)) {
            let row = *cursor;
            *cursor = row.wrapping_add(1);
            *row_of = row as i32;
            let place = row as usize & STAGE.wrapping_sub(1);
            if let Some(slot) = stage.get_mut(place) {
                *slot = pair;
            }
            if place == STAGE.wrapping_sub(1)
                && let (Some(region), Some(written)) = (regions.get_mut(index), written.get_mut(index))
            {
                write_stage(stage, region, written, row.wrapping_add(1));
            }
        }
        pair = pair.wrapping_add(1);
    }
    let experts = regions.iter_mut().zip(&mut written).zip(cursors.iter().zip(stages.iter()));
    experts.for_each(|((region, written), (cursor, stage))| write_stage(stage, region, written, *cursor));
    scratch.give(block);
    Ok(())
}

/// Writes the pairs of rows `written` to `end`, which one stage (a power of two long) holds, to the front of the expert's region.
#[inline(never)]
fn write_stage(stage: &[i32], region: &mut &mut [i32], written: &mut u32, end: u32) {
    let count = end.wrapping_sub(*written) as usize;
    let staged = stage.get(*written as usize & stage.len().wrapping_sub(1)..).and_then(|staged| staged.get(..count));
    if let (Some(staged), Some(rows)) = (staged, region.split_off_mut(..count)) {
        rows.copy_from_slice(staged);
    }
    *written = end;
}

/// Gives every pair of a part its row; `cursors` are the part's next rows.
fn place<K: Key>(keys: &[K], first: usize, inverse: &mut [i32], cursors: &mut [u32], regions: &mut [&mut [i32]]) {
    let mut slots: Vec<std::slice::IterMut<'_, i32>> = regions.iter_mut().map(|region| region.iter_mut()).collect();
    let mut pair = first as i32;
    for (key, row_of) in keys.iter().zip(inverse) {
        if let (Some(cursor), Some(slots)) = (cursors.get_mut(key.index()), slots.get_mut(key.index())) {
            *row_of = *cursor as i32;
            *cursor = cursor.wrapping_add(1);
            if let Some(slot) = slots.next() {
                *slot = pair;
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
    regions: &mut [&mut [i32]],
) {
    let mut slots: Vec<std::slice::IterMut<'_, i32>> = regions.iter_mut().map(|region| region.iter_mut()).collect();
    let mut pair = first as i32;
    for (key, row_of) in keys.iter().zip(inverse) {
        let index = key.index();
        let tables = (cursors.get_mut(index), limits.get(index), slots.get_mut(index));
        if let (Some(cursor), Some(limit), Some(slots)) = tables {
            *row_of = -1;
            if *cursor < *limit {
                *row_of = *cursor as i32;
                *cursor = cursor.wrapping_add(1);
                if let Some(slot) = slots.next() {
                    *slot = pair;
                }
            }
        }
        pair = pair.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests;
