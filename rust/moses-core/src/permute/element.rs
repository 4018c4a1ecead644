//! The dtypes that rows are made of: f32 and f64 are summed in place, bf16 and f16 in a row of f32 beside.
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
}

impl Sum for f32 {
    const ZERO: Self = 0.0;
}

impl Sum for f64 {
    const ZERO: Self = 0.0;
}

/// A dtype of rows.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// The dtype of sums and weights.
    type Sum: Sum;
    /// Room for one row of sums, where the row itself is not it.
    type Scratch: Send;
    /// A sum in progress.
    type Running<'a>;

    /// Room for rows of `width`.
    fn scratch(width: usize) -> Self::Scratch;
    /// A sum at +0 that ends in `target`.
    fn begin<'a>(target: &'a mut [Self], scratch: &'a mut Self::Scratch) -> Self::Running<'a>;
    /// Adds `weight * row`.
    fn add_scaled(sum: &mut Self::Running<'_>, weight: Self::Sum, row: &[Self]);
    /// Adds `row`.
    fn add(sum: &mut Self::Running<'_>, row: &[Self]);
    /// Rounds the sum into its target.
    fn finish(sum: Self::Running<'_>);
    /// `target = weight * row`.
    fn scale(target: &mut [Self], weight: Self::Sum, row: &[Self]);
    /// The dot product of two rows.
    fn dot(left: &[Self], right: &[Self]) -> Self::Sum;
    /// Zeros.
    fn clear(target: &mut [Self]);
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
            type Scratch = ();
            type Running<'a> = &'a mut [$type];

            #[inline(always)]
            fn scratch(_: usize) {}
            #[inline(always)]
            fn begin<'a>(target: &'a mut [Self], _: &'a mut ()) -> &'a mut [Self] {
                target.fill(0.0);
                target
            }
            #[inline(always)]
            fn add_scaled(sum: &mut &mut [Self], weight: Self, row: &[Self]) {
                sum.iter_mut().zip(row).for_each(|(sum, item)| *sum += weight * item);
            }
            #[inline(always)]
            fn add(sum: &mut &mut [Self], row: &[Self]) {
                sum.iter_mut().zip(row).for_each(|(sum, item)| *sum += item);
            }
            #[inline(always)]
            fn finish(_: &mut [Self]) {}
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

/// Items of a narrow row that are widened at a time: they and their sums stay in the first cache.
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
            type Scratch = Vec<f32>;
            type Running<'a> = (&'a mut [$type], &'a mut [f32]);

            #[inline(always)]
            fn scratch(width: usize) -> Vec<f32> {
                vec![0.0; width]
            }
            #[inline(always)]
            fn begin<'a>(target: &'a mut [Self], scratch: &'a mut Vec<f32>) -> Self::Running<'a> {
                scratch.fill(0.0);
                (target, scratch)
            }
            #[inline(always)]
            fn add_scaled(sum: &mut Self::Running<'_>, weight: f32, row: &[Self]) {
                let mut wide = [0.0_f32; BLOCK];
                for (sum, row) in sum.1.chunks_mut(BLOCK).zip(row.chunks(BLOCK)) {
                    let wide = wide.get_mut(..row.len()).unwrap_or_default();
                    $widen(row, wide);
                    sum.iter_mut().zip(wide.iter()).for_each(|(sum, item)| *sum += weight * item);
                }
            }
            #[inline(always)]
            fn add(sum: &mut Self::Running<'_>, row: &[Self]) {
                Self::add_scaled(sum, 1.0, row); // a product with 1 is exact
            }
            #[inline(always)]
            fn finish(sum: Self::Running<'_>) {
                $narrow(sum.1, sum.0);
            }
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
