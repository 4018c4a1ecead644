//! The dtypes that rows are made of: f32 and f64 are summed as they are, bf16 and f16 as f32.
//!
//! Loops are plain, so that the compiler makes vectors of them for the width that `pulp` finds at run time; nothing is fused
//! or reordered by that.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Partial sums of a dot product: lane `l` takes the products of items `l`, `l + LANES`, ... in turn.
pub const LANES: usize = 32;

/// What sums are made in.
pub trait Sum: Copy + Send + Sync + PartialEq + std::fmt::Debug + 'static {
    /// +0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
}

impl Sum for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

impl Sum for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

/// A dtype of rows.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// The dtype of sums and weights.
    type Sum: Sum;

    /// `target = Σ weight * row` in the order of the rows, from +0.
    fn weighted_sum(rows: &[(Self::Sum, &[Self])], target: &mut [Self]);
    /// `target = weight * row`.
    fn scale(target: &mut [Self], weight: Self::Sum, row: &[Self]);
    /// The dot product of two rows.
    fn dot(left: &[Self], right: &[Self]) -> Self::Sum;
    /// Zeros.
    fn clear(target: &mut [Self]);
}

/// Sums of 16-bit rows, in blocks of `LANES` that stay in registers; `$widen` and `$narrow` convert a block.
macro_rules! blockwise_sum {
    ($widen:path, $narrow:path) => {
        #[inline(always)]
        fn weighted_sum(rows: &[(f32, &[Self])], target: &mut [Self]) {
            #[inline(always)]
            fn add<T: Element>(total: &mut [f32; LANES], weight: f32, items: &[T], widen: impl Fn(&[T], &mut [f32])) {
                let mut wide = [0.0; LANES];
                widen(items, &mut wide);
                total.iter_mut().zip(&wide).for_each(|(total, item)| *total += weight * item);
            }
            let (blocks, rest) = target.as_chunks_mut::<LANES>();
            // Two slots is what most models have: with both rows in hand the loop has no look-ups.
            if let [(weight, row), (other_weight, other_row)] = rows {
                let pairs = row.as_chunks::<LANES>().0.iter().zip(other_row.as_chunks::<LANES>().0);
                for (block, (items, others)) in blocks.iter_mut().zip(pairs) {
                    let mut total = [0.0; LANES];
                    add(&mut total, *weight, items, $widen);
                    add(&mut total, *other_weight, others, $widen);
                    $narrow(&total, block);
                }
            } else {
                for (number, block) in blocks.iter_mut().enumerate() {
                    let mut total = [0.0; LANES];
                    for (weight, row) in rows {
                        if let Some(items) = row.as_chunks::<LANES>().0.get(number) {
                            add(&mut total, *weight, items, $widen);
                        }
                    }
                    $narrow(&total, block);
                }
            }
            if !rest.is_empty() {
                let mut total = [0.0; LANES];
                for (weight, row) in rows {
                    let mut items = [<Self as bytemuck::Zeroable>::zeroed(); LANES];
                    items.iter_mut().zip(row.as_chunks::<LANES>().1).for_each(|(to, from)| *to = *from);
                    add(&mut total, *weight, &items, $widen);
                }
                let total = total.get(..rest.len()).unwrap_or_default();
                $narrow(total, rest);
            }
        }
    };
}

macro_rules! fold {
    ($lanes:ident) => {{
        let mut half = LANES / 2;
        while half > 0 {
            let (low, high) = $lanes.split_at_mut(half);
            low.iter_mut().zip(high.iter()).for_each(|(low, high)| *low += *high);
            half /= 2;
        }
        $lanes.first().copied().unwrap_or_default()
    }};
}

macro_rules! wide {
    ($type:ty) => {
        impl Element for $type {
            type Sum = $type;

            // Block by block over the rows one after the other: rows of a power of two bytes begin at one place of their pages, where loads
            // of two of them beside stores to a third wait for each other (measured: 2 times slower).
            #[inline(always)]
            fn weighted_sum(rows: &[(Self, &[Self])], target: &mut [Self]) {
                for (number, block) in target.chunks_mut(BLOCK).enumerate() {
                    let mut total = [0.0; BLOCK];
                    let start = number.wrapping_mul(BLOCK);
                    for (weight, row) in rows {
                        let items = row.get(start..).unwrap_or_default();
                        total.iter_mut().zip(items).for_each(|(total, item)| *total += weight * item);
                    }
                    block.iter_mut().zip(&total).for_each(|(to, from)| *to = *from);
                }
            }
            #[inline(always)]
            fn scale(target: &mut [Self], weight: Self, row: &[Self]) {
                target.iter_mut().zip(row).for_each(|(target, item)| *target = weight * item);
            }
            #[inline(always)]
            fn dot(left: &[Self], right: &[Self]) -> Self {
                let mut lanes = [0.0; LANES];
                let (left, left_rest) = left.as_chunks::<LANES>();
                let (right, right_rest) = right.as_chunks::<LANES>();
                for (left, right) in left.iter().zip(right) {
                    lanes.iter_mut().zip(left.iter().zip(right)).for_each(|(lane, (l, r))| *lane += l * r);
                }
                lanes.iter_mut().zip(left_rest.iter().zip(right_rest)).for_each(|(lane, (l, r))| *lane += l * r);
                fold!(lanes)
            }
            #[inline(always)]
            fn clear(target: &mut [Self]) {
                target.fill(0.0);
            }
        }
    };
}
wide!(f32);
wide!(f64);

/// Items of a row that are worked on at a time: they and their sums stay in the first cache.
const BLOCK: usize = 256;

#[inline(always)]
pub(crate) fn widen_bf16(items: &[bf16], wide: &mut [f32]) {
    wide.iter_mut().zip(items).for_each(|(wide, item)| *wide = f32::from_bits(u32::from(item.to_bits()) << 16));
}

/// To nearest, ties to even, as bit arithmetic that becomes vectors.
#[inline(always)]
pub(crate) fn narrow_bf16(wide: &[f32], items: &mut [bf16]) {
    for (item, wide) in items.iter_mut().zip(wide) {
        let bits = wide.to_bits();
        let rounded = bits.wrapping_add(0x7fff).wrapping_add((bits >> 16) & 1) >> 16;
        let quiet = (bits >> 16) | 0x40;
        let nan = (bits & 0x7fff_ffff) > 0x7f80_0000;
        *item = bf16::from_bits(if nan { quiet } else { rounded } as u16);
    }
}

#[inline(always)]
pub(crate) fn widen_f16(items: &[f16], wide: &mut [f32]) {
    items.convert_to_f32_slice(wide);
}

#[inline(always)]
pub(crate) fn narrow_f16(wide: &[f32], items: &mut [f16]) {
    items.convert_from_f32_slice(wide);
}

macro_rules! narrow {
    ($type:ty, $widen:path, $narrow:path) => {
        impl Element for $type {
            type Sum = f32;

            blockwise_sum!($widen, $narrow);
            #[inline(always)]
            fn scale(target: &mut [Self], weight: f32, row: &[Self]) {
                let mut wide = [0.0_f32; BLOCK];
                for (target, row) in target.chunks_mut(BLOCK).zip(row.chunks(BLOCK)) {
                    let wide = wide.get_mut(..row.len()).unwrap_or_default();
                    $widen(row, wide);
                    wide.iter_mut().for_each(|item| *item *= weight);
                    $narrow(wide, target);
                }
            }
            #[inline(always)]
            fn dot(left: &[Self], right: &[Self]) -> f32 {
                let mut lanes = [0.0_f32; LANES];
                let (mut wide_left, mut wide_right) = ([0.0_f32; BLOCK], [0.0_f32; BLOCK]);
                for (left, right) in left.chunks(BLOCK).zip(right.chunks(BLOCK)) {
                    let wide_left = wide_left.get_mut(..left.len()).unwrap_or_default();
                    let wide_right = wide_right.get_mut(..right.len()).unwrap_or_default();
                    $widen(left, wide_left);
                    $widen(right, wide_right);
                    for (left, right) in wide_left.chunks(LANES).zip(wide_right.chunks(LANES)) {
                        lanes.iter_mut().zip(left.iter().zip(right)).for_each(|(lane, (l, r))| *lane += l * r);
                    }
                }
                fold!(lanes)
            }
            #[inline(always)]
            fn clear(target: &mut [Self]) {
                target.fill(<$type>::from_bits(0));
            }
        }
    };
}
narrow!(bf16, widen_bf16, narrow_bf16);
narrow!(f16, widen_f16, narrow_f16);
