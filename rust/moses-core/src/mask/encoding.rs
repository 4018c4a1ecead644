//! Masks as bytes: the smallest of six encodings, chosen for each mask.
//!
//! | tag | encoding | payload |
//! | --- | --- | --- |
//! | 0 | empty | – |
//! | 1 | full | – |
//! | 2 | bitmap | varint number of bytes, bits with the lowest first, trailing zero bytes left out |
//! | 3 | indices | varint count, then the distance of each from the one before, less one, as varints |
//! | 4 | runs | varint count, then of each the gap before it and its length, less one, as varints |
//! | 5 | Roaring | varint number of bytes, the portable Roaring format |
//!
//! A mask by itself (`to_bytes`) is a version byte, the length as a varint, and an encoding. In a registry the length
//! is that of the space. Equal masks have equal bytes.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use roaring::RoaringBitmap;

use super::{Mask, checked_length};
use crate::limits::{MASK_BUDGET_BYTES, MASK_GROWTH, MAX_UNITS};
use crate::wire::{Reader, put_varint, varint_bytes};
use crate::{Error, Result};

const VERSION: u8 = 1;
const EMPTY: u8 = 0;
const FULL: u8 = 1;
const BITMAP: u8 = 2;
const INDICES: u8 = 3;
const RUNS: u8 = 4;
const ROARING: u8 = 5;

/// What decoding may still unfold, in bytes of memory. Some bytes of a file can stand for a mask of 2^28 units, and a
/// file can have many of these. Where the same few runs come again and again (a task that uses everything), they are
/// unfolded once and shared, so what is honest never meets the limit.
pub(crate) struct Budget {
    left: u64,
    limit: u64,
    shared: HashMap<(u64, Vec<RangeInclusive<u32>>), Mask>,
}

impl Budget {
    /// Masks of more runs than this are not looked for among those that were.
    const SHARED_RUNS: usize = 16;

    pub(crate) fn for_file(bytes: usize) -> Self {
        let limit = MASK_BUDGET_BYTES.saturating_add((bytes as u64).saturating_mul(MASK_GROWTH));
        Self { left: limit, limit, shared: HashMap::new() }
    }

    /// The mask of ascending runs that do not touch, all below `length`.
    fn unfold(&mut self, length: u64, runs: Vec<RangeInclusive<u32>>) -> Result<Mask> {
        let key = (length, runs);
        if let Some(mask) = self.shared.get(&key) {
            return Ok(mask.clone());
        }
        let mut last = None;
        for run in &key.1 {
            // A run costs its two ends, and a container for each 65,536 units that it goes into.
            let containers = (run.end() >> 16).saturating_sub(run.start() >> 16);
            let begins = u32::from(last.replace(run.end() >> 16).is_none_or(|last| last < run.start() >> 16));
            self.charge(u64::from(containers.saturating_add(begins)))?;
        }
        let mut units = RoaringBitmap::new();
        for run in &key.1 {
            units.insert_range(run.clone());
        }
        let mask = Mask::new(length, units);
        if key.1.len() <= Self::SHARED_RUNS {
            self.shared.insert(key, mask.clone());
        }
        Ok(mask)
    }

    fn charge(&mut self, containers: u64) -> Result<()> {
        let cost = containers.saturating_mul(64).saturating_add(4);
        match self.left.checked_sub(cost) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => {
                let value = self.limit.saturating_add(cost);
                Err(Error::Oversized { what: "set of masks", value, limit: self.limit })
            }
        }
    }
}

impl Mask {
    /// The mask by itself as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        put_varint(&mut out, self.length);
        self.encode(&mut out);
        out
    }

    /// Reads what [`Mask::to_bytes`] wrote.
    ///
    /// # Errors
    /// `format_version`, `format_truncated`, `format_malformed`, `format_oversized`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("mask", bytes);
        let version = reader.byte()?;
        if version == 0 {
            return Err(Error::Magic { what: "mask" });
        }
        if version != VERSION {
            return Err(Error::Version { what: "mask", version: version.into(), known: VERSION.into() });
        }
        let length = reader.varint()?;
        if length > MAX_UNITS {
            return Err(Error::Oversized { what: "mask", value: length, limit: MAX_UNITS });
        }
        let mask = Self::decode(&mut reader, length, &mut Budget::for_file(bytes.len()))?;
        reader.end()?;
        Ok(mask)
    }

    /// Appends the smallest encoding; the first of the table where two are equally small.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let count = self.count();
        let Some(highest) = self.units.max() else {
            out.push(EMPTY);
            return;
        };
        if count == self.length {
            out.push(FULL);
            return;
        }
        let bitmap_bytes = u64::from(highest >> 3).saturating_add(1);
        let mut best = (varint_bytes(bitmap_bytes).saturating_add(bitmap_bytes), BITMAP);
        // Roaring first: it is cheap to size, and what it needs bounds the search among the others.
        let roaring = self.canonical();
        let roaring_bytes = roaring.serialized_size() as u64;
        best = best.min((varint_bytes(roaring_bytes).saturating_add(roaring_bytes), ROARING));
        // Each index costs at least one byte, each run at least two.
        if count.saturating_add(1) <= best.0 {
            best = best.min((self.sized(best.0, self.index_numbers(), count), INDICES));
        }
        // Counting runs word by word is faster where there are many, one by one where there are few.
        let dense = count >= bitmap_bytes;
        let bits = if dense || best.1 == BITMAP { self.bitmap(bitmap_bytes as usize) } else { Vec::new() };
        let runs = if dense { count_runs(&bits) } else { self.runs().count() as u64 };
        if runs.saturating_mul(2).saturating_add(1) <= best.0 {
            best = best.min((self.sized(best.0, self.run_numbers(), runs), RUNS));
        }
        out.push(best.1);
        match best.1 {
            BITMAP => {
                put_varint(out, bitmap_bytes);
                out.extend(bits);
            }
            INDICES => {
                put_varint(out, count);
                self.index_numbers().for_each(|number| put_varint(out, number));
            }
            RUNS => {
                put_varint(out, runs);
                self.run_numbers().for_each(|number| put_varint(out, number));
            }
            _ => {
                put_varint(out, roaring_bytes);
                // Writing to a vector does not fail.
                let _ = roaring.serialize_into(&mut *out);
            }
        }
    }

    /// The smallest Roaring form does not depend on how the mask came to be; where two are equally small, the first may.
    fn canonical(&self) -> RoaringBitmap {
        let mut units = RoaringBitmap::clone(&self.units);
        units.remove_run_compression();
        units.optimize();
        units
    }

    /// The bytes of a count and numbers as varints; `u64::MAX` as soon as they are over `limit`.
    fn sized(&self, limit: u64, mut numbers: impl Iterator<Item = u64>, count: u64) -> u64 {
        numbers
            .try_fold(varint_bytes(count), |bytes, number| {
                Some(bytes.saturating_add(varint_bytes(number))).filter(|&bytes| bytes <= limit)
            })
            .unwrap_or(u64::MAX)
    }

    fn index_numbers(&self) -> impl Iterator<Item = u64> + '_ {
        self.iter().scan(0_u64, |next, unit| {
            let distance = unit.saturating_sub(*next);
            *next = unit.saturating_add(1);
            Some(distance)
        })
    }

    fn run_numbers(&self) -> impl Iterator<Item = u64> + '_ {
        self.runs()
            .scan(0_u64, |next, run| {
                let gap = run.start.saturating_sub(*next);
                *next = run.end;
                Some([gap, run.end.saturating_sub(run.start).saturating_sub(1)])
            })
            .flatten()
    }

    fn bitmap(&self, bytes: usize) -> Vec<u8> {
        let mut bits = vec![0_u8; bytes];
        self.for_each(|unit| {
            if let Some(byte) = bits.get_mut((unit >> 3) as usize) {
                *byte |= 1 << (unit & 7);
            }
        });
        bits
    }

    /// Reads an encoding of a mask of `length` units.
    pub(crate) fn decode(reader: &mut Reader<'_>, length: u64, budget: &mut Budget) -> Result<Self> {
        checked_length(length)?;
        let tag = reader.byte()?;
        let units = match tag {
            EMPTY => RoaringBitmap::new(),
            FULL => {
                let last = u32::try_from(length.saturating_sub(1)).unwrap_or(0);
                return budget.unfold(length, (length > 0).then_some(0..=last).into_iter().collect());
            }
            BITMAP => {
                let count = reader.count(length.div_ceil(8))?;
                RoaringBitmap::from_lsb0_bytes(0, reader.take(count)?)
            }
            INDICES => decode_indices(reader, length)?,
            RUNS => {
                let runs = decode_runs(reader, length)?;
                return budget.unfold(length, runs);
            }
            ROARING => {
                let count = reader.count(u64::MAX)?;
                let mut bytes = reader.take(count)?;
                let units = RoaringBitmap::deserialize_from(&mut bytes)
                    .map_err(|error| reader.malformed(format!("bad Roaring bitmap ({error})")))?;
                if !bytes.is_empty() {
                    return Err(reader.malformed("bytes after a Roaring bitmap"));
                }
                units
            }
            _ => return Err(reader.malformed(format!("{tag} is no encoding of a mask"))),
        };
        match units.max() {
            Some(highest) if u64::from(highest) >= length => {
                Err(reader.malformed(format!("unit {highest} is outside a mask of {length}")))
            }
            _ => Ok(Self::new(length, units)),
        }
    }
}

/// The runs of ones in bits with the lowest first: each begins at a one after a zero.
fn count_runs(bits: &[u8]) -> u64 {
    let mut before = 0_u64;
    let begins = |word: u64, before: &mut u64| {
        let begins = word & !(word << 1 | *before);
        *before = word >> 63;
        u64::from(begins.count_ones())
    };
    let (words, rest) = bits.as_chunks::<8>();
    let runs: u64 = words.iter().map(|word| begins(u64::from_le_bytes(*word), &mut before)).sum();
    let rest = rest.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
    runs.saturating_add(begins(rest, &mut before))
}

fn decode_indices(reader: &mut Reader<'_>, length: u64) -> Result<RoaringBitmap> {
    let count = reader.count(length)?;
    let mut units = RoaringBitmap::new();
    let mut next = 0_u64;
    for _ in 0..count {
        let unit = next.saturating_add(reader.varint()?);
        if unit >= length {
            return Err(reader.malformed(format!("unit {unit} is outside a mask of {length}")));
        }
        units.try_push(unit as u32).map_err(|_| reader.malformed("indices are not ascending"))?;
        next = unit.saturating_add(1);
    }
    Ok(units)
}

fn decode_runs(reader: &mut Reader<'_>, length: u64) -> Result<Vec<RangeInclusive<u32>>> {
    let count = reader.count(length)?;
    let mut runs = Vec::new();
    let mut next = 0_u64;
    for at in 0..count {
        let gap = reader.varint()?;
        if gap == 0 && at > 0 {
            return Err(reader.malformed("two runs touch"));
        }
        let start = next.saturating_add(gap);
        let last = start.saturating_add(reader.varint()?);
        if last >= length {
            return Err(reader.malformed(format!("unit {last} is outside a mask of {length}")));
        }
        runs.push(start as u32..=last as u32);
        next = last.saturating_add(1);
    }
    Ok(runs)
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn payload(mask: &Mask) -> Vec<u8> {
        let mut out = Vec::new();
        mask.encode(&mut out);
        out
    }

    fn tag_and_size(length: u64, indices: impl IntoIterator<Item = u64>) -> (u8, usize) {
        let mask = Mask::from_indices(length, &indices.into_iter().collect::<Vec<_>>()).unwrap();
        let bytes = payload(&mask);
        (bytes[0], bytes.len())
    }

    /// A fixed generator, so that sizes are the same on every machine.
    fn noise(count: u64, seed: u64) -> impl Iterator<Item = u64> {
        (0..count).scan(seed, |state, _| {
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            Some(*state)
        })
    }

    #[test]
    fn each_shape_gets_its_smallest_encoding() {
        assert_eq!(tag_and_size(1 << 20, []), (EMPTY, 1));
        assert_eq!(tag_and_size(1 << 12, 0..1 << 12), (FULL, 1));
        assert_eq!(tag_and_size(32, [0, 5, 9, 17, 18, 22, 30]), (BITMAP, 6));
        assert_eq!(tag_and_size(1 << 20, [7, 100_000, 700_000]).0, INDICES);
        assert_eq!(tag_and_size(1 << 20, (1000..5000).chain(90_000..400_000)).0, RUNS);
        // A dense noisy part beside long runs: only Roaring chooses for each 65,536 units by itself.
        let noisy = noise(40_000, 7).map(|number| number % 65_536);
        assert_eq!(tag_and_size(1 << 24, noisy.chain(1 << 20..1 << 23)).0, ROARING);
    }

    #[test]
    fn a_task_of_24_layers_of_32_components_costs_well_under_2_kilobytes() {
        let bytes: usize = (1..=24).map(|layer| tag_and_size(32, noise(9, layer).map(|number| number % 32)).1).sum();
        assert!(bytes <= 24 * 6, "{bytes}");
    }

    #[test]
    fn an_element_mask_costs_about_a_bit_a_unit() {
        let length = 1_u64 << 20;
        let selected: Vec<u8> = noise(length, 3).map(|number| u8::from(number % 10 < 3)).collect();
        let bytes = Mask::from_bool(&selected).unwrap().to_bytes().len() as u64;
        assert!(bytes * 8 <= length + length / 50, "{bytes}");
    }

    #[test]
    fn hostile_bytes_are_named() {
        let code = |bytes: &[u8]| Mask::from_bytes(bytes).unwrap_err().code();
        assert_eq!(code(&[]), "format_truncated");
        assert_eq!(code(&[0]), "format_magic");
        assert_eq!(code(&[9, 0]), "format_version");
        assert_eq!(code(&[1, 8, 6]), "format_malformed"); // no such tag
        assert_eq!(code(&[1, 8, EMPTY, 0]), "format_malformed"); // a byte too many
        assert_eq!(code(&[1, 0xff, 0xff, 0xff, 0xff, 0x7f, FULL]), "format_oversized");
        assert_eq!(code(&[1, 7, BITMAP, 1, 0x80]), "format_malformed"); // unit 7 of 7
        assert_eq!(code(&[1, 8, BITMAP, 2, 1, 1]), "format_oversized"); // more bytes than the mask has
        assert_eq!(code(&[1, 8, BITMAP, 1]), "format_truncated");
        assert_eq!(code(&[1, 8, INDICES, 2, 7, 0]), "format_malformed"); // unit 8 of 8
        assert_eq!(code(&[1, 8, RUNS, 1, 7, 1]), "format_malformed");
        assert_eq!(code(&[1, 8, RUNS, 2, 1, 1, 0, 1]), "format_malformed"); // two runs that are one
        assert_eq!(code(&[1, 8, ROARING, 0]), "format_malformed");
        assert_eq!(code(&[1, 0x80, 0x00, EMPTY]), "format_malformed"); // a number longer than it must be
        let eleven = [0xff; 11];
        assert_eq!(code(&[&[1][..], &eleven].concat()), "format_malformed");
    }

    #[test]
    fn few_bytes_never_unfold_to_much() {
        let mut budget = Budget::for_file(0);
        let decode =
            |budget: &mut Budget, bytes: &[u8], length| Mask::decode(&mut Reader::new("mask", bytes), length, budget);
        // The same one is shared, however often it comes.
        for _ in 0..1000 {
            assert_eq!(decode(&mut budget, &[FULL], MAX_UNITS).unwrap().count(), MAX_UNITS);
        }
        // Others are not: each of these has a length of its own.
        let result = (0..1000).try_for_each(|less| decode(&mut budget, &[FULL], MAX_UNITS - less).map(|_| ()));
        assert_eq!(result.unwrap_err().code(), "format_oversized");
    }

    #[test]
    fn what_was_written_is_read_whatever_its_shape() {
        // Millions of short runs in the longest mask: the most that is honest.
        let indices: Vec<u64> =
            (0..MAX_UNITS / 256).flat_map(|at| [at * 256 + 5, at * 256 + 6, at * 256 + 7]).collect();
        let mask = Mask::from_indices(MAX_UNITS, &indices).unwrap();
        let bytes = mask.to_bytes();
        assert_eq!(bytes[6], RUNS);
        assert_eq!(Mask::from_bytes(&bytes).unwrap(), mask);
    }

    fn any_mask() -> impl Strategy<Value = Mask> {
        let runs = prop::collection::vec((0_u64..200_000, 0_u64..3000), 0..12);
        let single = prop::collection::vec(0_u64..200_000, 0..300);
        (1_u64..200_000, runs, single).prop_map(|(length, runs, single)| {
            let mut indices: Vec<u64> =
                runs.iter().flat_map(|&(start, size)| start..start + size).chain(single).collect();
            indices.iter_mut().for_each(|index| *index %= length);
            Mask::from_indices(length, &indices).unwrap()
        })
    }

    proptest! {
        #[test]
        fn bytes_and_back(mask in any_mask()) {
            let bytes = mask.to_bytes();
            let back = Mask::from_bytes(&bytes).unwrap();
            prop_assert_eq!(&back, &mask);
            prop_assert_eq!(back.to_bytes(), bytes);
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), tag in 0_u8..6) {
            let _ = Mask::from_bytes(&bytes);
            let framed = [&[1, 0x80, 0x80, 0x04, tag][..], &bytes].concat();
            if let Ok(mask) = Mask::from_bytes(&framed) {
                prop_assert!(mask.iter().all(|unit| unit < mask.length()));
                prop_assert_eq!(mask.iter().count() as u64, mask.count());
            }
        }

        #[test]
        fn flipped_bits_never_panic(mask in any_mask(), position in any::<prop::sample::Index>(), bit in 0..8) {
            let mut bytes = mask.to_bytes();
            let at = position.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            if let Ok(other) = Mask::from_bytes(&bytes) {
                prop_assert_eq!(Mask::from_bytes(&other.to_bytes()).unwrap(), other);
            }
        }
    }
}
