//! The registry as bytes, version 1.
//!
//! `"MOSESREG"`, version (2 bytes), three sections, and the BLAKE3 hash of all before it (32 bytes). A section is its
//! number (1 byte), its length (8 bytes) and its content: 1 layers, 2 tasks, 3 history. Numbers in sections are varints.
//!
//! * layers: next layer id, next expert id, count; of each: id less the lowest possible, name, experts as
//!   runs (count; gap and length less one), spaces (count; name, units, unit bytes). A name is told by the one before:
//!   bytes shared at the start, bytes shared at the end, what is between.
//! * tasks: next task id, count; of each: id less the lowest possible, flags (1 ended, 2 domain, 4 hash), name, domain,
//!   hash, masks (count; layer id less that before, space, encoding as in `mask::encoding`).
//! * history: count; of each: kind (1 byte), id, and for layers and experts the count.

use std::collections::BTreeMap;

use super::{Event, Layer, Registry, Space, State, Task};
use crate::limits::{
    MAX_EVENTS, MAX_EXPERTS, MAX_EXPERTS_IN_ALL, MAX_LAYERS, MAX_NAME_BYTES, MAX_REGISTRY_BYTES, MAX_SPACES, MAX_TASKS,
};
use crate::mask::encoding::Budget;
use crate::wire::{Reader, put_string, put_varint};
use crate::{Error, ExpertId, LayerId, Mask, Result, TaskId};

const WHAT: &str = "registry";
const MAGIC: &[u8; 8] = b"MOSESREG";
const VERSION: u16 = 1;
const HASH_BYTES: usize = 32;

const ENDED: u8 = 1;
const DOMAIN: u8 = 2;
const HASHED: u8 = 4;

impl Registry {
    /// The registry as bytes. Equal registries have equal bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        for (number, section) in [(1, self.put_layers()), (2, self.put_tasks()), (3, self.put_history())] {
            out.push(number);
            out.extend_from_slice(&(section.len() as u64).to_le_bytes());
            out.extend_from_slice(&section);
        }
        let hash = crate::hash::hash(&out);
        out.extend_from_slice(hash.as_bytes());
        out
    }

    /// Reads what [`Registry::to_bytes`] wrote, and validates it.
    ///
    /// # Errors
    /// `format_magic`, `format_version`, `format_checksum`, `format_truncated`, `format_malformed`, `format_oversized`,
    /// `registry_inconsistent`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.len() as u64 > MAX_REGISTRY_BYTES {
            return Err(Error::Oversized { what: WHAT, value: bytes.len() as u64, limit: MAX_REGISTRY_BYTES });
        }
        let mut head = Reader::new(WHAT, bytes);
        if bytes.iter().zip(MAGIC).any(|(byte, wanted)| byte != wanted) {
            return Err(Error::Magic { what: WHAT });
        }
        head.take(MAGIC.len())?;
        let version = u16::from_le_bytes(head.array()?);
        if version != VERSION {
            return Err(Error::Version { what: WHAT, version: version.into(), known: VERSION.into() });
        }
        let Some((content, hash)) = bytes.split_last_chunk::<HASH_BYTES>() else {
            return Err(Error::Truncated { what: WHAT, offset: bytes.len() as u64 });
        };
        if crate::hash::hash(content) != *hash {
            return Err(Error::Checksum { what: WHAT });
        }
        let mut reader = Reader::new(WHAT, content);
        reader.take(MAGIC.len().saturating_add(2))?;
        let mut registry = Self::new();
        registry.read_layers(&mut section(&mut reader, 1)?)?;
        registry.read_tasks(&mut section(&mut reader, 2)?, &mut Budget::for_file(bytes.len()))?;
        registry.read_history(&mut section(&mut reader, 3)?)?;
        reader.end()?;
        registry.validate()?;
        Ok(registry)
    }

    /// The bytes that a task's masks take in the file.
    ///
    /// # Errors
    /// `task_unknown`.
    pub fn mask_bytes(&self, task: TaskId) -> Result<u64> {
        let mut out = Vec::new();
        put_masks(&mut out, self.task(task)?);
        Ok(out.len() as u64)
    }

    fn put_layers(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_varint(&mut out, self.next_layer.into());
        put_varint(&mut out, self.next_expert.into());
        put_varint(&mut out, self.layers.len() as u64);
        let (mut lowest, mut previous) = (0_u64, "");
        let mut previous_spaces: &[Space] = &[];
        for (&id, layer) in &self.layers {
            put_varint(&mut out, u64::from(id.0).saturating_sub(lowest));
            lowest = u64::from(id.0).saturating_add(1);
            put_name(&mut out, previous, &layer.name);
            previous = &layer.name;
            put_experts(&mut out, &layer.experts);
            put_varint(&mut out, layer.spaces.len() as u64);
            for (at, space) in layer.spaces.iter().enumerate() {
                put_name(&mut out, previous_spaces.get(at).map_or("", |space| &space.name), &space.name);
                put_varint(&mut out, space.units_per_expert);
                put_varint(&mut out, space.unit_bytes);
            }
            previous_spaces = &layer.spaces;
        }
        out
    }

    fn read_layers(&mut self, reader: &mut Reader<'_>) -> Result<()> {
        self.next_layer = reader.varint_u32()?;
        self.next_expert = reader.varint_u32()?;
        let (mut lowest, mut previous) = (0_u32, String::new());
        let mut previous_spaces: Vec<Space> = Vec::new();
        // No expert is in two layers, so there are at most as many as were ever given.
        let mut experts_left = (self.next_expert as usize).min(MAX_EXPERTS_IN_ALL as usize);
        for _ in 0..reader.count(MAX_LAYERS)? {
            let id = read_id(reader, &mut lowest)?;
            let name = read_name(reader, &previous)?;
            previous.clone_from(&name);
            let experts = read_experts(reader, self.next_expert, &mut experts_left)?;
            let mut spaces = Vec::new();
            for at in 0..reader.count(MAX_SPACES)? {
                let name = read_name(reader, previous_spaces.get(at).map_or("", |space| &space.name))?;
                spaces.push(Space { name, units_per_expert: reader.varint()?, unit_bytes: reader.varint()? });
            }
            previous_spaces.clone_from(&spaces);
            self.layers.insert(LayerId(id), Layer { id: LayerId(id), name, experts, spaces });
        }
        reader.end()?;
        // Lengths of masks come from the layers, so these must hold before any mask is read.
        self.validate()
    }

    fn put_tasks(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_varint(&mut out, self.next_task.into());
        put_varint(&mut out, self.tasks.len() as u64);
        let mut lowest = 0_u64;
        for (&id, task) in &self.tasks {
            put_varint(&mut out, u64::from(id.0).saturating_sub(lowest));
            lowest = u64::from(id.0).saturating_add(1);
            let ended = if task.state == State::Ended { ENDED } else { 0 };
            let domain = task.domain.as_ref().map_or(0, |_| DOMAIN);
            out.push(ended | domain | task.content_hash.map_or(0, |_| HASHED));
            put_string(&mut out, &task.name);
            if let Some(domain) = &task.domain {
                put_string(&mut out, domain);
            }
            out.extend_from_slice(task.content_hash.as_ref().map_or(&[], |hash| hash.as_slice()));
            put_masks(&mut out, task);
        }
        out
    }

    fn read_tasks(&mut self, reader: &mut Reader<'_>, budget: &mut Budget) -> Result<()> {
        self.next_task = reader.varint_u32()?;
        let mut lowest = 0;
        for _ in 0..reader.count(MAX_TASKS)? {
            let id = TaskId(read_id(reader, &mut lowest)?);
            let flags = reader.byte()?;
            if flags & !(ENDED | DOMAIN | HASHED) != 0 {
                return Err(reader.malformed("a task has unknown flags"));
            }
            let name = reader.string()?.to_owned();
            let domain = if flags & DOMAIN != 0 { Some(reader.string()?.to_owned()) } else { None };
            let content_hash = if flags & HASHED != 0 { Some(reader.array()?) } else { None };
            let state = if flags & ENDED != 0 { State::Ended } else { State::Open };
            let masks = self.read_masks(reader, budget)?;
            self.tasks.insert(id, Task { id, name, domain, state, content_hash, masks });
        }
        reader.end()
    }

    fn read_masks(&self, reader: &mut Reader<'_>, budget: &mut Budget) -> Result<BTreeMap<super::Place, Mask>> {
        let mut masks = BTreeMap::new();
        let (mut layer, mut last) = (0_u32, None);
        for _ in 0..reader.count(MAX_LAYERS.saturating_mul(MAX_SPACES))? {
            let step = reader.varint_u32()?;
            layer = layer.checked_add(step).ok_or_else(|| reader.malformed("a layer id is too high"))?;
            let space = reader.varint()? as usize;
            let place = (LayerId(layer), space);
            if last.replace(place).is_some_and(|last| last >= place) {
                return Err(reader.malformed("masks are not in order"));
            }
            let found = self.layers.get(&LayerId(layer)).filter(|layer| space < layer.spaces.len());
            let length = found.ok_or_else(|| reader.malformed("a mask is of no layer or space"))?.length(space);
            masks.insert(place, Mask::decode(reader, length, budget)?);
        }
        Ok(masks)
    }

    fn put_history(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_varint(&mut out, self.history.len() as u64);
        for event in &self.history {
            let (kind, id, count) = match *event {
                Event::LayerAdded { layer, num_experts } => (1, layer.0, Some(num_experts)),
                Event::ExpertsAdded { layer, num_experts } => (2, layer.0, Some(num_experts)),
                Event::TaskBegun(task) => (3, task.0, None),
                Event::TaskEnded(task) => (4, task.0, None),
                Event::TaskAbandoned(task) => (5, task.0, None),
                Event::TaskForgotten(task) => (6, task.0, None),
            };
            out.push(kind);
            put_varint(&mut out, id.into());
            count.into_iter().for_each(|count| put_varint(&mut out, count));
        }
        out
    }

    fn read_history(&mut self, reader: &mut Reader<'_>) -> Result<()> {
        for _ in 0..reader.count(MAX_EVENTS)? {
            let kind = reader.byte()?;
            let id = reader.varint_u32()?;
            self.history.push(match kind {
                1 => Event::LayerAdded { layer: LayerId(id), num_experts: reader.varint()? },
                2 => Event::ExpertsAdded { layer: LayerId(id), num_experts: reader.varint()? },
                3 => Event::TaskBegun(TaskId(id)),
                4 => Event::TaskEnded(TaskId(id)),
                5 => Event::TaskAbandoned(TaskId(id)),
                6 => Event::TaskForgotten(TaskId(id)),
                _ => return Err(reader.malformed(format!("{kind} is no kind of event"))),
            });
        }
        reader.end()
    }
}

fn section<'a>(reader: &mut Reader<'a>, wanted: u8) -> Result<Reader<'a>> {
    if reader.byte()? != wanted {
        return Err(reader.malformed(format!("section {wanted} is not where it must be")));
    }
    let length = u64::from_le_bytes(reader.array()?);
    if length > MAX_REGISTRY_BYTES {
        return Err(Error::Oversized { what: WHAT, value: length, limit: MAX_REGISTRY_BYTES });
    }
    Ok(Reader::new(WHAT, reader.take(length as usize)?))
}

fn read_id(reader: &mut Reader<'_>, lowest: &mut u32) -> Result<u32> {
    let above = reader.varint_u32()?;
    let id = lowest.checked_add(above).filter(|&id| id < u32::MAX);
    let id = id.ok_or_else(|| reader.malformed("an id is too high"))?;
    *lowest = id.saturating_add(1);
    Ok(id)
}

/// Names of layers are much alike: `model.layers.7.mlp.up_proj` after `model.layers.6.mlp.up_proj` takes four bytes.
fn put_name(out: &mut Vec<u8>, previous: &str, name: &str) {
    let equal = |(left, right): &(u8, u8)| left == right;
    let start = previous.bytes().zip(name.bytes()).take_while(equal).count();
    let (before, after) = (previous.as_bytes().get(start..), name.as_bytes().get(start..));
    let (before, after) = (before.unwrap_or_default(), after.unwrap_or_default());
    let end = before.iter().rev().copied().zip(after.iter().rev().copied()).take_while(equal).count();
    put_varint(out, start as u64);
    put_varint(out, end as u64);
    let middle = after.get(..after.len().saturating_sub(end)).unwrap_or_default();
    put_varint(out, middle.len() as u64);
    out.extend_from_slice(middle);
}

fn read_name(reader: &mut Reader<'_>, previous: &str) -> Result<String> {
    let (start, end) = (reader.varint()?, reader.varint()?);
    let middle = reader.count(MAX_NAME_BYTES)?;
    let middle = reader.take(middle)?;
    let previous = previous.as_bytes();
    let start = previous.get(..start as usize);
    let end = previous.len().checked_sub(end as usize).and_then(|at| previous.get(at..));
    let (Some(start), Some(end)) = (start, end) else {
        return Err(reader.malformed("a name shares more than there is"));
    };
    let name = [start, middle, end].concat();
    if name.len() as u64 > MAX_NAME_BYTES {
        return Err(reader.malformed("a name is too long"));
    }
    String::from_utf8(name).map_err(|_| reader.malformed("a name is not UTF-8"))
}

fn put_masks(out: &mut Vec<u8>, task: &Task) {
    put_varint(out, task.masks.len() as u64);
    let mut previous = 0;
    for (&(layer, space), mask) in &task.masks {
        put_varint(out, layer.0.saturating_sub(previous).into());
        previous = layer.0;
        put_varint(out, space as u64);
        mask.encode(out);
    }
}

fn put_experts(out: &mut Vec<u8>, experts: &[ExpertId]) {
    let mut runs: Vec<std::ops::Range<u64>> = Vec::new();
    for expert in experts.iter().map(|expert| u64::from(expert.0)) {
        match runs.last_mut() {
            Some(run) if run.end == expert => run.end = expert.saturating_add(1),
            _ => runs.push(expert..expert.saturating_add(1)),
        }
    }
    put_varint(out, runs.len() as u64);
    let mut next = 0;
    for run in runs {
        put_varint(out, run.start.saturating_sub(next));
        put_varint(out, run.end.saturating_sub(run.start).saturating_sub(1));
        next = run.end;
    }
}

fn read_experts(reader: &mut Reader<'_>, next_expert: u32, left: &mut usize) -> Result<Vec<ExpertId>> {
    let mut experts = Vec::new();
    let mut next = 0_u32;
    for _ in 0..reader.count(MAX_EXPERTS)? {
        let start = next.saturating_add(reader.varint_u32()?);
        let end = start.saturating_add(reader.varint_u32()?).saturating_add(1);
        if end > next_expert {
            return Err(reader.malformed("an expert has an id that was never given"));
        }
        let count = end.saturating_sub(start) as usize;
        *left =
            left.checked_sub(count).ok_or_else(|| reader.malformed("there are more experts than were ever given"))?;
        experts.extend((start..end).map(ExpertId));
        next = end;
    }
    Ok(experts)
}
