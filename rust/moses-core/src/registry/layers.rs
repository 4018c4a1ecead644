//! Layers, their experts and their spaces of units.

use super::{Event, Place, Registry};
use crate::limits::{
    MAX_BANK_BYTES, MAX_EXPERTS, MAX_EXPERTS_IN_ALL, MAX_LAYERS, MAX_NAME_BYTES, MAX_SPACES, MAX_UNIT_BYTES, MAX_UNITS,
};
use crate::{Error, ExpertId, LayerId, Mask, Result};

/// A place in the model where experts live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its id.
    pub id: LayerId,
    /// Its name: a module path.
    pub name: String,
    /// Its experts, in the order of the bank.
    pub experts: Vec<ExpertId>,
    /// What masks select from.
    pub spaces: Vec<Space>,
}

/// A set of units of one layer; every expert has equally many, expert by expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Space {
    /// Its name, unique in its layer.
    pub name: String,
    /// Units of one expert.
    pub units_per_expert: u64,
    /// Bytes of one unit.
    pub unit_bytes: u64,
}

impl Layer {
    /// The units of a space; 0 where there is no such space.
    #[must_use]
    pub fn length(&self, space: usize) -> u64 {
        let units = self.spaces.get(space).map_or(0, |space| space.units_per_expert);
        units.saturating_mul(self.experts.len() as u64)
    }

    /// The bytes of all units of all spaces.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let spaces = self.spaces.iter().enumerate();
        spaces.fold(0, |sum: u64, (at, space)| sum.saturating_add(self.length(at).saturating_mul(space.unit_bytes)))
    }
}

pub(super) fn within(what: &'static str, value: u64, limit: u64) -> Result<()> {
    if value > limit { Err(Error::Limit { what, value, limit }) } else { Ok(()) }
}

pub(super) fn check_name(what: &'static str, name: &str) -> Result<()> {
    let usable = !name.is_empty() && name.len() as u64 <= MAX_NAME_BYTES && !name.chars().any(char::is_control);
    if usable { Ok(()) } else { Err(Error::NameInvalid { what, name: name.chars().take(80).collect() }) }
}

/// The rules for a layer by itself, for a new one as for one that is read from a file.
pub(super) fn check_layer(layer: &Layer) -> Result<()> {
    check_name("layer", &layer.name)?;
    if layer.experts.is_empty() {
        return Err(Error::Zero { what: "the number of experts" });
    }
    if layer.spaces.is_empty() {
        return Err(Error::Zero { what: "the number of spaces" });
    }
    within("the number of experts of a layer", layer.experts.len() as u64, MAX_EXPERTS)?;
    within("the number of spaces of a layer", layer.spaces.len() as u64, MAX_SPACES)?;
    for (at, space) in layer.spaces.iter().enumerate() {
        check_name("space", &space.name)?;
        if layer.spaces.iter().take(at).any(|other| other.name == space.name) {
            return Err(Error::SpaceNameTaken { name: space.name.clone() });
        }
        if space.units_per_expert == 0 {
            return Err(Error::Zero { what: "units_per_expert" });
        }
        if space.unit_bytes == 0 {
            return Err(Error::Zero { what: "unit_bytes" });
        }
        within("the number of bytes of a unit", space.unit_bytes, MAX_UNIT_BYTES)?;
        within("the number of units of a space", layer.length(at), MAX_UNITS)?;
    }
    Ok(())
}

impl Registry {
    /// Adds a layer with `num_experts` experts; spaces are `(name, units_per_expert, unit_bytes)`.
    ///
    /// # Errors
    /// `layer_name_taken`, `space_name_taken`, `name_invalid`, `zero_count`, `limit_exceeded`.
    pub fn add_layer(&mut self, name: &str, num_experts: u64, spaces: Vec<Space>) -> Result<LayerId> {
        within("the number of layers", (self.layers.len() as u64).saturating_add(1), MAX_LAYERS)?;
        within("the number of experts of a layer", num_experts, MAX_EXPERTS)?;
        if self.layers.values().any(|layer| layer.name == name) {
            return Err(Error::LayerNameTaken { name: name.to_owned() });
        }
        let id = LayerId(self.next_layer);
        let next_layer = self.next_layer.checked_add(1).ok_or(ids_exhausted())?;
        let (experts, next_expert) = self.new_experts(num_experts)?;
        let layer = Layer { id, name: name.to_owned(), experts, spaces };
        check_layer(&layer)?;
        within("the number of bytes of the bank", self.total_bytes().saturating_add(layer.bytes()), MAX_BANK_BYTES)?;
        self.record(Event::LayerAdded { layer: id, num_experts: layer.experts.len() as u64 })?;
        (self.next_layer, self.next_expert) = (next_layer, next_expert);
        self.layers.insert(id, layer);
        Ok(id)
    }

    /// Adds `count` experts to a layer; every space grows at its end and the masks of old tasks stay valid.
    ///
    /// # Errors
    /// `layer_unknown`, `zero_count`, `limit_exceeded`.
    pub fn add_experts(&mut self, layer: LayerId, count: u64) -> Result<Vec<ExpertId>> {
        if count == 0 {
            return Err(Error::Zero { what: "the number of experts to add" });
        }
        within("the number of experts of a layer", count, MAX_EXPERTS)?;
        let mut grown = self.layer(layer)?.clone();
        let (added, next_expert) = self.new_experts(count)?;
        grown.experts.extend(&added);
        check_layer(&grown)?;
        let others = self.total_bytes().saturating_sub(self.layer(layer)?.bytes());
        within("the number of bytes of the bank", others.saturating_add(grown.bytes()), MAX_BANK_BYTES)?;
        let mut resized = Vec::new();
        for task in self.tasks.values() {
            for (&place, mask) in task.masks.range((layer, 0)..=(layer, usize::MAX)) {
                resized.push((task.id, place, mask.resized(grown.length(place.1))?));
            }
        }
        self.record(Event::ExpertsAdded { layer, num_experts: count })?;
        for (task, place, mask) in resized {
            if let Some(task) = self.tasks.get_mut(&task) {
                task.masks.insert(place, mask);
            }
        }
        self.next_expert = next_expert;
        self.layers.insert(layer, grown);
        Ok(added)
    }

    fn new_experts(&self, count: u64) -> Result<(Vec<ExpertId>, u32)> {
        let count = u32::try_from(count).map_err(|_| ids_exhausted())?;
        let next = self.next_expert.checked_add(count).ok_or(ids_exhausted())?;
        within("the number of experts in all", u64::from(next), MAX_EXPERTS_IN_ALL)?;
        Ok(((self.next_expert..next).map(ExpertId).collect(), next))
    }

    /// The layers, by id.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.layers.values()
    }

    /// A layer.
    ///
    /// # Errors
    /// `layer_unknown`.
    pub fn layer(&self, layer: LayerId) -> Result<&Layer> {
        self.layers.get(&layer).ok_or(Error::LayerUnknown { layer: layer.0 })
    }

    /// The place of a space and the number of its units.
    ///
    /// # Errors
    /// `layer_unknown`, `space_unknown`.
    pub fn place(&self, layer: LayerId, space: &str) -> Result<(Place, u64)> {
        let found = self.layer(layer)?;
        match found.spaces.iter().position(|other| other.name == space) {
            Some(at) => Ok(((layer, at), found.length(at))),
            None => Err(Error::SpaceUnknown { layer: layer.0, space: space.to_owned() }),
        }
    }

    /// Every place in canonical order, with its length and the bytes of a unit.
    pub(super) fn places(&self) -> impl Iterator<Item = (Place, u64, u64)> {
        self.layers.values().flat_map(|layer| {
            let spaces = layer.spaces.iter().enumerate();
            spaces.map(|(at, space)| ((layer.id, at), layer.length(at), space.unit_bytes))
        })
    }

    /// The bytes of the whole bank.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.layers.values().fold(0, |sum, layer| sum.saturating_add(layer.bytes()))
    }

    /// The units of a space that no live task uses.
    ///
    /// # Errors
    /// `layer_unknown`, `space_unknown`.
    pub fn free(&self, layer: LayerId, space: &str) -> Result<Mask> {
        let (_, length) = self.place(layer, space)?;
        Mask::full(length)?.difference(&self.used(layer, space)?)
    }
}

pub(super) fn ids_exhausted() -> Error {
    Error::Limit { what: "the number of ids ever given", value: 1 << 32, limit: (1 << 32) - 1 }
}
