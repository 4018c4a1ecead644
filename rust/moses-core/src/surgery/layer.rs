//! One layer's surgery as output tensors.

use std::borrow::Cow;

use super::job::{Fate, OutTensor, Piece};
use super::made::{Made, stream, value_bytes};
use super::request::{LayerRequest, NewRows, SlotRequest};
use crate::checkpoint::{Checkpoint, MoeLayer, Part, Region};
use crate::layout::{Dense, GateKind, Layout, LayoutNames};
use crate::{Error, Result};

/// A selection bias with which an expert is never chosen; both sigmoid scores and logits are far above it.
const MASKED: f64 = -1e4;

/// The same layer of every source; shard numbers count on from source to source.
pub(super) struct Joined<'a> {
    pub(super) layers: Vec<(&'a Checkpoint, &'a MoeLayer, u32)>,
    pub(super) new_rows: NewRows,
    pub(super) seed: u64,
    /// Standard deviation of fresh weights.
    pub(super) initializer_range: f64,
}

fn shifted(region: Region, by: u32) -> Region {
    Region { shard: region.shard.saturating_add(by), ..region }
}

impl<'a> Joined<'a> {
    pub(super) fn first(&self) -> Result<&'a MoeLayer> {
        let first = self.layers.first().map(|(_, layer, _)| *layer);
        first.ok_or_else(|| Error::PlanMisfit {
            what: "the plan".to_owned(),
            problem: "it has no checkpoint".to_owned(),
        })
    }

    /// The source of expert `number`: its layer, its number there, its shift.
    fn expert(&self, number: u64) -> Option<(&'a Checkpoint, &'a MoeLayer, u64, u32)> {
        let mut left = number;
        for (checkpoint, layer, shift) in &self.layers {
            if left < layer.num_experts() {
                return Some((checkpoint, layer, left, *shift));
            }
            left = left.saturating_sub(layer.num_experts());
        }
        None
    }

    fn part(&self, expert: u64, role: &str) -> Option<(&'a Part, Region)> {
        let (_, layer, number, shift) = self.expert(expert)?;
        let parts = layer.experts.get(usize::try_from(number).ok()?)?;
        let part = parts.iter().find(|part| part.role == role)?;
        Some((part, shifted(part.region, shift)))
    }

    /// The parts of the first expert, which are those of each: what differs is refused here.
    pub(super) fn parts(&self) -> Result<&'a [Part]> {
        let first = self.first()?;
        let parts = first.experts.first().map_or(&[][..], Vec::as_slice);
        for (checkpoint, layer, _) in self.layers.iter().skip(1) {
            let theirs = layer.experts.first().map_or(&[][..], Vec::as_slice);
            let same = parts.len() == theirs.len()
                && parts.iter().all(|part| {
                    theirs
                        .iter()
                        .any(|other| (&part.role, part.dtype, &part.shape) == (&other.role, other.dtype, &other.shape))
                });
            if !same {
                let problem =
                    "its experts have other shapes or dtypes than those that they would stand beside".to_owned();
                return Err(Error::PlanMisfit { what: format!("{}: {}", checkpoint.shown(), layer.block), problem });
            }
        }
        Ok(parts)
    }

    /// The bytes of one role of one slot.
    fn content(&self, block: &str, number: u64, slot: &SlotRequest, like: &Part) -> Result<Piece> {
        if let Some((_, region)) = slot.copied().and_then(|expert| self.part(expert, &like.role)) {
            return Ok(Piece::Copy(region));
        }
        let is_matrix = like.shape.len() > 1;
        let made = self.make(slot, like.dtype, &like.role, block, number, |expert| {
            self.part(expert, &like.role).map(|(_, region)| region)
        })?;
        let num_values = like.shape.iter().try_fold(1_u64, |product, &size| product.checked_mul(size)).unwrap_or(0);
        let fresh = slot.sources.is_empty() && is_matrix;
        Ok(Piece::Make(Made { num_values, normal: if fresh { self.initializer_range } else { 0.0 }, ..made }))
    }

    fn make(
        &self,
        slot: &SlotRequest,
        dtype: &'static str,
        role: &str,
        block: &str,
        number: u64,
        region: impl Fn(u64) -> Option<Region>,
    ) -> Result<Made> {
        if value_bytes(dtype).is_none() {
            return Err(Error::Unsupported {
                what: block.to_owned(),
                problem: format!(
                    "its {role} is {dtype}, with which surgery does not compute: use plain copies without noise"
                ),
            });
        }
        let weights = slot.weights.iter().copied().chain(std::iter::repeat(1.0));
        let sources = slot.sources.iter().zip(weights).filter_map(|(&expert, weight)| Some((region(expert)?, weight)));
        Ok(Made {
            sources: sources.collect(),
            noise: slot.noise,
            normal: 0.0,
            constant: 0.0,
            dtype,
            num_values: 0,
            stream: stream(self.seed, block, number, role),
        })
    }

    /// All output tensors of the layer.
    pub(super) fn tensors(
        &self,
        request: &LayerRequest,
        names: &'static LayoutNames,
        dense: Option<&'static Dense>,
    ) -> Result<Vec<OutTensor>> {
        let first = self.first()?;
        let parts = self.parts()?;
        let stray = parts.iter().find(|part| {
            let known = names.tensors.iter().any(|(_, roles)| roles.contains(&&*part.role));
            !known && (names.layout != Layout::PerExpert || first.layout != Layout::PerExpert || request.dense)
        });
        if let Some(part) = stray {
            return Err(Error::Unsupported {
                what: first.block.clone(),
                problem: format!(
                    "its experts have {:?}, which has no place in the {} layout: keep the layout",
                    part.role,
                    names.layout.name()
                ),
            });
        }
        if request.dense {
            return self.dense_tensors(request, dense, parts);
        }
        let mut tensors = match names.layout {
            Layout::PerExpert => self.single_tensors(request, names, parts)?,
            Layout::Fused | Layout::Mxfp4 => self.joint_tensors(request, names, parts)?,
        };
        for number in 0..first.gates.len() {
            tensors.push(self.gate(request, names, number)?);
        }
        Ok(tensors)
    }

    fn dense_tensors(
        &self,
        request: &LayerRequest,
        dense: Option<&'static Dense>,
        parts: &[Part],
    ) -> Result<Vec<OutTensor>> {
        let first = self.first()?;
        let (Some(dense), Some(slot)) = (dense, request.slots.first()) else {
            let problem =
                "no dense model type computes what one expert of this type does: keep it as a mixture of one expert";
            return Err(Error::Unsupported { what: first.block.clone(), problem: problem.to_owned() });
        };
        let mut tensors = Vec::new();
        for part in parts {
            let named = dense.tensors.iter().find(|(role, _)| *role == part.role);
            let (_, name) = named.ok_or_else(|| Error::Unsupported {
                what: first.block.clone(),
                problem: format!("its experts have {:?}, for which a dense FFN has no place", part.role),
            })?;
            tensors.push(OutTensor {
                name: format!("{}.{name}", first.block),
                dtype: part.dtype,
                shape: part.shape.clone(),
                pieces: vec![self.content(&first.block, 0, slot, part)?],
                fate: if slot.copied().is_some() { Fate::Renamed } else { Fate::Made },
            });
        }
        Ok(tensors)
    }

    fn single_tensors(&self, request: &LayerRequest, names: &LayoutNames, parts: &[Part]) -> Result<Vec<OutTensor>> {
        let first = self.first()?;
        let mut tensors = Vec::with_capacity(request.slots.len().saturating_mul(parts.len()));
        for (number, slot) in (0_u64..).zip(&request.slots) {
            for part in parts {
                let named = names.tensors.iter().find(|(_, roles)| roles.contains(&&*part.role));
                let suffix = named.map_or(&*part.role, |(suffix, _)| suffix);
                let fate = match slot.copied() {
                    _ if !slot.kept() => Fate::Made,
                    Some(source) if source == number && first.layout == Layout::PerExpert => Fate::Kept,
                    Some(_) if first.layout == Layout::PerExpert => Fate::Renamed,
                    _ => Fate::Cut,
                };
                tensors.push(OutTensor {
                    name: format!("{}.{}.{number}.{suffix}", first.block, names.experts),
                    dtype: part.dtype,
                    shape: part.shape.clone(),
                    pieces: vec![self.content(&first.block, number, slot, part)?],
                    fate,
                });
            }
        }
        Ok(tensors)
    }

    fn joint_tensors(&self, request: &LayerRequest, names: &LayoutNames, parts: &[Part]) -> Result<Vec<OutTensor>> {
        let first = self.first()?;
        let mut tensors = Vec::new();
        for (suffix, roles) in names.tensors {
            let mut found = Vec::with_capacity(roles.len());
            for role in *roles {
                let part = parts.iter().find(|part| part.role == *role);
                found.push(part.ok_or_else(|| Error::Unsupported {
                    what: first.block.clone(),
                    problem: format!("its experts have no {role}, which the {} layout needs", names.layout.name()),
                })?);
            }
            let Some((like, others)) = found.split_first() else { continue };
            if let Some(other) = others.iter().find(|part| (part.dtype, &part.shape) != (like.dtype, &like.shape)) {
                return Err(Error::Unsupported {
                    what: first.block.clone(),
                    problem: format!(
                        "its {} and {} differ in shape or dtype, so they cannot lie in one tensor",
                        like.role, other.role
                    ),
                });
            }
            let mut shape = like.shape.clone();
            if let Some(rows) = shape.first_mut() {
                *rows = rows.saturating_mul(roles.len() as u64);
            }
            shape.insert(0, request.slots.len() as u64);
            let mut pieces = Vec::with_capacity(request.slots.len().saturating_mul(roles.len()));
            for (number, slot) in (0_u64..).zip(&request.slots) {
                for part in &found {
                    pieces.push(self.content(&first.block, number, slot, part)?);
                }
            }
            let fate = if request.slots.iter().all(SlotRequest::kept) { Fate::Cut } else { Fate::Made };
            let name = format!("{}.{}.{suffix}", first.block, names.experts);
            tensors.push(OutTensor { name, dtype: like.dtype, shape, pieces, fate });
        }
        Ok(tensors)
    }

    fn gate(&self, request: &LayerRequest, names: &LayoutNames, number: usize) -> Result<OutTensor> {
        let (checkpoint, first, _) = self.layers.first().ok_or_else(|| Error::PlanMisfit {
            what: request.layer.clone(),
            problem: "it has no checkpoint".to_owned(),
        })?;
        let missing =
            |what: &str| Error::PlanMisfit { what: request.layer.clone(), problem: format!("{what} is missing") };
        let gate = first.gates.get(number).ok_or_else(|| missing("the gate"))?;
        let named = names.gates.get(gate.number).ok_or_else(|| missing("the gate's name"))?;
        let tensor = checkpoint.tensors.get(gate.tensor as usize).ok_or_else(|| missing("the gate"))?;
        let row = |expert: u64| {
            let (checkpoint, layer, place, shift) = self.expert(expert)?;
            let theirs = layer.gates.iter().find(|theirs| theirs.number == gate.number)?;
            let tensor = checkpoint.tensors.get(theirs.tensor as usize)?;
            let offset = tensor.region.offset.saturating_add(place.saturating_mul(theirs.row_bytes));
            Some(shifted(Region { shard: tensor.region.shard, offset, len: theirs.row_bytes }, shift))
        };
        for (other, layer, _) in self.layers.iter().skip(1) {
            let theirs = layer.gates.iter().find(|theirs| theirs.number == gate.number);
            let theirs = theirs.and_then(|theirs| other.tensors.get(theirs.tensor as usize));
            if theirs.map(|theirs| (theirs.dtype, theirs.shape.get(1..))) != Some((tensor.dtype, tensor.shape.get(1..)))
            {
                let problem = "its gate has another shape or dtype than the one that its rows would join".to_owned();
                return Err(Error::PlanMisfit { what: format!("{}: {}", other.shown(), layer.block), problem });
            }
        }
        let mut pieces = Vec::with_capacity(request.slots.len());
        for (place, slot) in (0_u64..).zip(&request.slots) {
            let masked = slot.new && self.new_rows == NewRows::Masked && gate.kind == GateKind::Bias;
            // Of a noisy copy the row is that of its source: it is chosen where its source is.
            let plain = SlotRequest { noise: 0.0, ..slot.clone() };
            if let Some(region) = plain.copied().filter(|_| !masked).and_then(row) {
                pieces.push(Piece::Copy(region));
                continue;
            }
            let made = self.make(&plain, tensor.dtype, named.name, &first.block, place, row)?;
            let num_values = gate.row_bytes.checked_div(value_bytes(tensor.dtype).unwrap_or(1)).unwrap_or(0);
            let fresh = slot.sources.is_empty() && gate.kind == GateKind::Row;
            pieces.push(Piece::Make(if masked {
                Made { sources: Vec::new(), constant: MASKED, num_values, ..made }
            } else {
                Made { normal: if fresh { self.initializer_range } else { 0.0 }, num_values, ..made }
            }));
        }
        let mut shape = tensor.shape.clone();
        if let Some(rows) = shape.first_mut() {
            *rows = request.slots.len() as u64;
        }
        let name = format!("{}.{}", first.block, named.name);
        let same = request.slots.len() as u64 == first.num_experts()
            && (0_u64..).zip(&request.slots).all(|(place, slot)| slot.kept() && slot.copied() == Some(place));
        let fate = match (same, *tensor.name == *name) {
            (true, true) => Fate::Kept,
            (true, false) => Fate::Renamed,
            _ if request.slots.iter().all(SlotRequest::kept) => Fate::Cut,
            _ => Fate::Made,
        };
        Ok(OutTensor { name, dtype: tensor.dtype, shape, pieces, fate })
    }
}

/// The plan of a layer that is not named: every expert stays.
pub(super) fn identity(layer: &MoeLayer) -> LayerRequest {
    LayerRequest {
        layer: layer.block.clone(),
        before: layer.num_experts(),
        slots: (0..layer.num_experts()).map(SlotRequest::keep).collect(),
        dense: false,
    }
}

/// Whether the role is one that the table has.
pub(super) fn is_known(part: &Part) -> bool {
    matches!(part.role, Cow::Borrowed(_))
}
