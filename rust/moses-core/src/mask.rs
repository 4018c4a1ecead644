//! A mask: which units of a space are selected. Immutable, of fixed length, held compressed (Roaring bitmaps:
//! Chambi, Lemire, Kaser, Godin, "Better bitmap performance with Roaring bitmaps", 2016).
//!
//! Every mask is held in its smallest Roaring form, so set algebra costs about a bit a unit at most.

pub mod encoding;

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use roaring::{MultiOps, RoaringBitmap};

use crate::limits::MAX_UNITS;
use crate::{Error, Result};

/// A set of units out of `length`. Index `i` is in `0..length`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    length: u64,
    /// Shared between clones, so that these cost nothing.
    units: Arc<RoaringBitmap>,
}

impl Hash for Mask {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.length, self.units.len(), self.units.min(), self.units.max()).hash(state);
        for unit in self.units.iter().take(64) {
            unit.hash(state);
        }
    }
}

fn checked_length(length: u64) -> Result<u64> {
    if length > MAX_UNITS {
        return Err(Error::Limit { what: "the number of units of a mask", value: length, limit: MAX_UNITS });
    }
    Ok(length)
}

impl Mask {
    /// `units` must be below `length`, which must be within the limit: the callers of this module hold that.
    fn new(length: u64, mut units: RoaringBitmap) -> Self {
        units.optimize();
        Self { length, units: Arc::new(units) }
    }

    /// The mask that selects nothing.
    ///
    /// # Errors
    /// `limit_exceeded`.
    pub fn empty(length: u64) -> Result<Self> {
        Ok(Self::new(checked_length(length)?, RoaringBitmap::new()))
    }

    /// The mask that selects everything.
    ///
    /// # Errors
    /// `limit_exceeded`.
    pub fn full(length: u64) -> Result<Self> {
        let mut units = RoaringBitmap::new();
        units.insert_range(0..checked_length(length)? as u32);
        Ok(Self::new(length, units))
    }

    /// The mask that selects `indices`, in any order; repeats count once.
    ///
    /// # Errors
    /// `limit_exceeded`, `mask_index`.
    pub fn from_indices(length: u64, indices: &[u64]) -> Result<Self> {
        checked_length(length)?;
        if let Some(&index) = indices.iter().find(|&&index| index >= length) {
            return Err(Error::MaskIndex { index, length });
        }
        let mut sorted: Vec<u32> = indices.iter().map(|&index| index as u32).collect();
        sorted.sort_unstable();
        sorted.dedup();
        let mut units = RoaringBitmap::new();
        units.extend(sorted);
        Ok(Self::new(length, units))
    }

    /// The mask that selects every unit whose byte is not zero.
    ///
    /// # Errors
    /// `limit_exceeded`.
    pub fn from_bool(selected: &[u8]) -> Result<Self> {
        let length = checked_length(selected.len() as u64)?;
        let bits: Vec<u8> = selected
            .chunks(8)
            .map(|chunk| chunk.iter().rev().fold(0, |byte, &flag| byte << 1 | u8::from(flag != 0)))
            .collect();
        Ok(Self::new(length, RoaringBitmap::from_lsb0_bytes(0, &bits)))
    }

    /// The number of units that could be selected.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The number of units that are selected.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.units.len()
    }

    /// `count / length`; 0 for a mask without units.
    #[must_use]
    pub fn density(&self) -> f64 {
        if self.length == 0 { 0.0 } else { self.count() as f64 / self.length as f64 }
    }

    /// Whether nothing is selected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// Whether `index` is selected; indices outside are not.
    #[must_use]
    pub fn contains(&self, index: u64) -> bool {
        u32::try_from(index).is_ok_and(|unit| self.units.contains(unit))
    }

    /// The selected units, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.units.iter().map(u64::from)
    }

    /// Calls `each` with every selected unit, ascending: in bulk, several times as fast as [`Mask::iter`].
    pub(crate) fn for_each(&self, mut each: impl FnMut(u32)) {
        // roaring 0.12's `next_many` overflows on a run of a whole container.
        if self.units.statistics().n_run_containers > 0 {
            return self.runs().for_each(|run| (run.start as u32..run.end as u32).for_each(&mut each));
        }
        let mut units = self.units.iter();
        let mut many = [0; 1024];
        loop {
            let found = units.next_many(&mut many);
            if found.is_empty() {
                return;
            }
            found.iter().copied().for_each(&mut each);
        }
    }

    /// The selected units as ascending half-open runs.
    pub fn runs(&self) -> impl Iterator<Item = std::ops::Range<u64>> + '_ {
        let mut units = self.units.iter();
        let mut next =
            move || units.next_range().map(|run| u64::from(*run.start())..u64::from(*run.end()).saturating_add(1));
        let mut held = next();
        // Roaring gives runs up to the border of a container; these are joined here.
        std::iter::from_fn(move || {
            let mut run = held.take()?;
            held = next();
            while let Some(following) = held.take_if(|following| following.start == run.end) {
                run.end = following.end;
                held = next();
            }
            Some(run)
        })
    }

    /// One byte a unit: 1 where it is selected.
    #[must_use]
    pub fn to_bool(&self) -> Vec<u8> {
        let mut selected = vec![0; self.length as usize];
        self.for_each(|unit| {
            if let Some(byte) = selected.get_mut(unit as usize) {
                *byte = 1;
            }
        });
        selected
    }

    /// The selected units as little-endian 64-bit numbers.
    #[must_use]
    pub fn to_indices(&self) -> Vec<u8> {
        let mut indices = Vec::with_capacity((self.count() as usize).saturating_mul(8));
        self.for_each(|unit| indices.extend_from_slice(&u64::from(unit).to_le_bytes()));
        indices
    }

    fn same_length(&self, other: &Self) -> Result<()> {
        if self.length == other.length {
            return Ok(());
        }
        Err(Error::MaskLengths { left: self.length, right: other.length })
    }

    /// Units of either.
    ///
    /// # Errors
    /// `mask_lengths_differ`.
    pub fn union(&self, other: &Self) -> Result<Self> {
        self.same_length(other)?;
        Ok(Self::new(self.length, &*self.units | &*other.units))
    }

    /// Units of both.
    ///
    /// # Errors
    /// `mask_lengths_differ`.
    pub fn intersection(&self, other: &Self) -> Result<Self> {
        self.same_length(other)?;
        Ok(Self::new(self.length, &*self.units & &*other.units))
    }

    /// Units of this one that are not in the other.
    ///
    /// # Errors
    /// `mask_lengths_differ`.
    pub fn difference(&self, other: &Self) -> Result<Self> {
        self.same_length(other)?;
        let units = std::ops::Sub::sub(&*self.units, &*other.units);
        Ok(Self::new(self.length, units))
    }

    /// The number of units of both.
    ///
    /// # Errors
    /// `mask_lengths_differ`.
    pub fn intersection_count(&self, other: &Self) -> Result<u64> {
        self.same_length(other)?;
        Ok(self.units.intersection_len(&other.units))
    }

    /// Units of any of `masks`, each of `length` units.
    ///
    /// # Errors
    /// `mask_lengths_differ`, `limit_exceeded`.
    pub fn union_all<'a>(length: u64, masks: impl IntoIterator<Item = &'a Self>) -> Result<Self> {
        checked_length(length)?;
        let units = masks
            .into_iter()
            .map(|mask| match mask.length == length {
                true => Ok(&*mask.units),
                false => Err(Error::MaskLengths { left: length, right: mask.length }),
            })
            .union()?;
        Ok(Self::new(length, units))
    }

    /// The same units out of `length`, which must not be smaller.
    ///
    /// # Errors
    /// `mask_shrinks`, `limit_exceeded`.
    pub fn resized(&self, length: u64) -> Result<Self> {
        if length < self.length {
            return Err(Error::MaskShrinks { length: self.length, wanted: length });
        }
        Ok(Self { length: checked_length(length)?, units: Arc::clone(&self.units) })
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mask(length: u64, indices: &[u64]) -> Mask {
        Mask::from_indices(length, indices).unwrap()
    }

    #[test]
    fn the_ways_to_make_a_mask_agree() {
        let wanted = mask(11, &[10, 0, 3, 3]);
        assert_eq!(Mask::from_bool(&[1, 0, 0, 255, 0, 0, 0, 0, 0, 0, 2]).unwrap(), wanted);
        assert_eq!(wanted.to_bool(), [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!((wanted.count(), wanted.length()), (3, 11));
        assert_eq!(wanted.iter().collect::<Vec<_>>(), [0, 3, 10]);
    }

    #[test]
    fn full_and_empty_have_every_and_no_unit() {
        for length in [0, 1, 8, 65_535, 65_536, 65_537, 200_000] {
            assert_eq!(Mask::full(length).unwrap().count(), length);
            assert_eq!(Mask::full(length).unwrap(), Mask::from_bool(&vec![1; length as usize]).unwrap());
            assert!(Mask::empty(length).unwrap().is_empty());
        }
    }

    #[test]
    fn runs_are_joined_over_containers() {
        let runs: Vec<_> = Mask::full(200_000).unwrap().runs().collect();
        assert!(matches!(&runs[..], [run] if *run == (0..200_000)));
    }

    /// Runs over whole containers and their borders, and noise: all kinds of containers.
    fn any_bools() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        let runs = || {
            let border = prop_oneof![0_usize..262_200, (0_usize..4, 0_usize..3).prop_map(|(at, by)| at * 65_536 + by)];
            let noise = (border.clone(), border, 1_usize..12);
            prop::collection::vec(noise, 0..5)
        };
        (1_usize..262_200, runs(), runs()).prop_map(|(length, left, right)| {
            let bools = |runs: Vec<(usize, usize, usize)>| {
                let mut bools = vec![0; length];
                for (start, end, step) in runs {
                    for at in (start.min(end)..start.max(end).min(length)).step_by(step) {
                        bools[at] ^= 1;
                    }
                }
                bools
            };
            (bools(left), bools(right))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn masks_do_what_bools_do((left, right) in any_bools()) {
            let (one, two) = (Mask::from_bool(&left).unwrap(), Mask::from_bool(&right).unwrap());
            let zip = |combine: fn(u8, u8) -> u8| -> Vec<u8> {
                left.iter().zip(&right).map(|(&left, &right)| combine(left, right)).collect()
            };
            let units: Vec<u64> = (0..left.len() as u64).filter(|&unit| left[unit as usize] == 1).collect();
            prop_assert_eq!(one.to_bool(), &left[..]);
            prop_assert_eq!(one.iter().collect::<Vec<_>>(), &units[..]);
            prop_assert_eq!(one.runs().flatten().collect::<Vec<_>>(), &units[..]);
            prop_assert_eq!(one.to_indices(), units.iter().flat_map(|unit| unit.to_le_bytes()).collect::<Vec<_>>());
            prop_assert_eq!(&Mask::from_indices(left.len() as u64, &units).unwrap(), &one);
            prop_assert_eq!(one.count(), units.len() as u64);
            for (mask, wanted) in [
                (one.union(&two).unwrap(), zip(|left, right| left | right)),
                (one.intersection(&two).unwrap(), zip(|left, right| left & right)),
                (one.difference(&two).unwrap(), zip(|left, right| left & !right)),
                (Mask::union_all(one.length(), [&one, &two, &one]).unwrap(), zip(|left, right| left | right)),
            ] {
                prop_assert_eq!(mask.to_bool(), &wanted[..]);
                let expected = Mask::from_bool(&wanted).unwrap();
                prop_assert_eq!(&mask, &expected);
                prop_assert_eq!(mask.to_bytes(), expected.to_bytes());
                prop_assert_eq!(&Mask::from_bytes(&mask.to_bytes()).unwrap(), &mask);
            }
            let both = one.intersection(&two).unwrap();
            prop_assert_eq!(one.intersection_count(&two).unwrap(), both.count());
        }
    }

    #[test]
    fn outside_and_unequal_are_errors() {
        assert_eq!(Mask::from_indices(4, &[4]).unwrap_err().code(), "mask_index");
        assert_eq!(Mask::empty(MAX_UNITS + 1).unwrap_err().code(), "limit_exceeded");
        assert_eq!(mask(4, &[1]).union(&mask(5, &[1])).unwrap_err().code(), "mask_lengths_differ");
        assert_eq!(mask(4, &[1]).resized(3).unwrap_err().code(), "mask_shrinks");
        assert_eq!(Mask::union_all(4, [&mask(5, &[])]).unwrap_err().code(), "mask_lengths_differ");
    }

    #[test]
    fn equal_masks_hash_equally_however_they_were_made() {
        use std::collections::hash_map::DefaultHasher;
        let hash = |mask: &Mask| {
            let mut hasher = DefaultHasher::new();
            mask.hash(&mut hasher);
            hasher.finish()
        };
        let (low, high) = (mask(9000, &(0..4500).collect::<Vec<_>>()), mask(9000, &(4500..9000).collect::<Vec<_>>()));
        let (joined, full) = (low.union(&high).unwrap(), Mask::full(9000).unwrap());
        assert_eq!(joined, full);
        assert_eq!(hash(&joined), hash(&full));
    }
}
