//! Gated activations of experts' FFNs, act(gate) ⊙ up, and their gradients, in one pass over the memory.
//!
//! Every gate is `act(g) = g * sigmoid(z)` with `z = linear * g + cubic * g^3`: SiLU has (1, 0), GELU's tanh form (Hendrycks and Gimpel, arXiv
//! 1606.08415) has (2c, 2c * 0.044715) with c = sqrt(2 / pi). Guarantees: arithmetic is in f32 and rounded once; the bits are
//! the same for any number of threads.

use half::{bf16, f16};
use pulp::{Simd, WithSimd};

use crate::limits::MAX_THREADS;
use crate::parallel::for_each;
use crate::permute::PARALLEL_BYTES;
use crate::permute::element::{narrow_bf16, narrow_f16, widen_bf16, widen_f16};
use crate::{Error, Result};

/// Items that are worked on at a time: their f32 stay in the first cache.
const BLOCK: usize = 256;

/// The argument of the sigmoid, `linear * g + cubic * g^3`.
#[derive(Debug, Clone, Copy)]
pub struct Gate {
    /// Of g.
    pub linear: f32,
    /// Of g^3.
    pub cubic: f32,
}

/// A dtype of hidden rows.
pub trait Item: bytemuck::Pod + Send + Sync {
    /// To f32, exactly.
    fn widen(items: &[Self], wide: &mut [f32]);
    /// To the nearest, ties to even.
    fn narrow(wide: &[f32], items: &mut [Self]);
}

macro_rules! item {
    ($type:ty, $widen:path, $narrow:path) => {
        impl Item for $type {
            #[inline(always)]
            fn widen(items: &[Self], wide: &mut [f32]) {
                $widen(items, wide);
            }
            #[inline(always)]
            fn narrow(wide: &[f32], items: &mut [Self]) {
                $narrow(wide, items);
            }
        }
    };
}

#[inline(always)]
fn copy(from: &[f32], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
}
item!(f32, copy, copy);
item!(bf16, widen_bf16, narrow_bf16);
item!(f16, widen_f16, narrow_f16);

/// 1 / (1 + e^-z) to some 2 units in the last place: e^x as 2^k times a polynomial on |r| <= ln(2) / 2 (Cephes, Moshier 1992).
#[inline(always)]
fn sigmoid(z: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = (-z).clamp(-87.0, 88.0); // a NaN stays one
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let k = shifted - SHIFT;
    let r = x - k * LN2_HIGH - k * LN2_LOW;
    // Written out: a loop over the coefficients would keep the loop over items from becoming vectors.
    let p = ((1.987_569_1e-4 * r + 1.398_2e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2;
    let p = (p * r + 1.666_666_5e-1) * r + 0.5;
    let power = p * r * r + r + 1.0;
    let scaled = f32::from_bits(power.to_bits().wrapping_add(shifted.to_bits() << 23));
    1.0 / (1.0 + scaled)
}

impl Gate {
    /// `(sigmoid(z), dz / dg)`.
    #[inline(always)]
    fn parts(self, g: f32) -> (f32, f32) {
        let square = self.cubic * g * g;
        (sigmoid((self.linear + square) * g), self.linear + 3.0 * square)
    }
}

fn require(fits: bool, problem: &str) -> Result<()> {
    if fits { Ok(()) } else { Err(Error::DispatchArguments { problem: problem.into() }) }
}

fn rows_of(items: usize, width: usize) -> Result<usize> {
    let rows = items.checked_div(width).unwrap_or(0);
    require(rows.checked_mul(width) == Some(items) && width > 0, "hidden is not whole rows")?;
    Ok(rows)
}

fn part_rows(rows: usize, bytes: usize, threads: usize) -> usize {
    let threads = if bytes < PARALLEL_BYTES { 1 } else { threads.clamp(1, MAX_THREADS) };
    rows.div_ceil(threads).max(1)
}

/// `out = act(gate) * up` of rows `(gate, up)`, each of `width` items.
///
/// # Errors
/// `dispatch_arguments` where the lengths do not fit.
pub fn gate<T: Item>(act: Gate, hidden: &[T], width: usize, out: &mut [T], threads: usize) -> Result<()> {
    let double = width.saturating_mul(2);
    let rows = rows_of(hidden.len(), double)?;
    require(rows.checked_mul(width) == Some(out.len()), "the output does not have hidden's rows")?;
    let part = part_rows(rows, size_of_val(hidden), threads);
    let jobs = hidden.chunks(part.saturating_mul(double)).zip(out.chunks_mut(part.saturating_mul(width))).collect();
    for_each(jobs, threads, |(hidden, out)| {
        pulp::Arch::new().dispatch(Forward { act, width, hidden, out });
        Ok(())
    })
}

/// Kernels are types, since a closure would not be compiled for the vectors that were found.
struct Forward<'a, T> {
    act: Gate,
    width: usize,
    hidden: &'a [T],
    out: &'a mut [T],
}

impl<T: Item> WithSimd for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (mut g, mut u) = ([0.0_f32; BLOCK], [0.0_f32; BLOCK]);
        let rows = self.hidden.chunks_exact(self.width.saturating_mul(2));
        for (row, out) in rows.zip(self.out.chunks_exact_mut(self.width)) {
            let (gates, ups) = row.split_at(self.width);
            for ((gates, ups), out) in gates.chunks(BLOCK).zip(ups.chunks(BLOCK)).zip(out.chunks_mut(BLOCK)) {
                let g = g.get_mut(..gates.len()).unwrap_or_default();
                let u = u.get_mut(..ups.len()).unwrap_or_default();
                T::widen(gates, g);
                T::widen(ups, u);
                for (g, u) in g.iter_mut().zip(u.iter()) {
                    *g = *g * self.act.parts(*g).0 * u;
                }
                T::narrow(g, out);
            }
        }
    }
}

/// With `grad` for `act(gate) * up`: `out` is that product again, `grad_hidden` the gradient of `(gate, up)`.
///
/// # Errors
/// `dispatch_arguments` where the lengths do not fit.
pub fn gate_backward<T: Item>(
    act: Gate,
    hidden: &[T],
    grad: &[T],
    width: usize,
    out: &mut [T],
    grad_hidden: &mut [T],
    threads: usize,
) -> Result<()> {
    let double = width.saturating_mul(2);
    let rows = rows_of(hidden.len(), double)?;
    let length = rows.checked_mul(width);
    require(length == Some(grad.len()), "the gradient does not have hidden's rows")?;
    require(length == Some(out.len()), "the output does not have hidden's rows")?;
    require(grad_hidden.len() == hidden.len(), "hidden's gradient does not have its rows")?;
    let part = part_rows(rows, size_of_val(hidden), threads);
    let (wide, narrow) = (part.saturating_mul(double), part.saturating_mul(width));
    let inputs = hidden.chunks(wide).zip(grad.chunks(narrow));
    let outputs = out.chunks_mut(narrow).zip(grad_hidden.chunks_mut(wide));
    type Job<'a, T> = ((&'a [T], &'a [T]), (&'a mut [T], &'a mut [T]));
    for_each(inputs.zip(outputs).collect(), threads, |((hidden, grad), (out, grad_hidden)): Job<'_, T>| {
        pulp::Arch::new().dispatch(Backward { act, width, hidden, grad, out, grad_hidden });
        Ok(())
    })
}

struct Backward<'a, T> {
    act: Gate,
    width: usize,
    hidden: &'a [T],
    grad: &'a [T],
    out: &'a mut [T],
    grad_hidden: &'a mut [T],
}

impl<T: Item> WithSimd for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (width, double) = (self.width, self.width.saturating_mul(2));
        let inputs = self.hidden.chunks_exact(double).zip(self.grad.chunks_exact(width));
        let outputs = self.out.chunks_exact_mut(width).zip(self.grad_hidden.chunks_exact_mut(double));
        for ((row, grad), (out, grad_hidden)) in inputs.zip(outputs) {
            row_backward(self.act, row.split_at(width), grad, out, grad_hidden.split_at_mut(width));
        }
    }
}

#[inline(always)]
fn row_backward<T: Item>(
    act: Gate,
    (gates, ups): (&[T], &[T]),
    grad: &[T],
    out: &mut [T],
    (grad_gates, grad_ups): (&mut [T], &mut [T]),
) {
    let (mut g, mut u, mut d) = ([0.0_f32; BLOCK], [0.0_f32; BLOCK], [0.0_f32; BLOCK]);
    let inputs = gates.chunks(BLOCK).zip(ups.chunks(BLOCK)).zip(grad.chunks(BLOCK));
    let outputs = out.chunks_mut(BLOCK).zip(grad_gates.chunks_mut(BLOCK)).zip(grad_ups.chunks_mut(BLOCK));
    for (((gates, ups), grad), ((out, grad_gates), grad_ups)) in inputs.zip(outputs) {
        let g = g.get_mut(..gates.len()).unwrap_or_default();
        let u = u.get_mut(..ups.len()).unwrap_or_default();
        let d = d.get_mut(..grad.len()).unwrap_or_default();
        T::widen(gates, g);
        T::widen(ups, u);
        T::widen(grad, d);
        for ((g, u), d) in g.iter_mut().zip(u.iter_mut()).zip(d.iter_mut()) {
            let (sigmoid, slope) = act.parts(*g);
            let active = *g * sigmoid;
            let change = sigmoid + active * (1.0 - sigmoid) * slope;
            (*g, *u, *d) = (*d * *u * change, active * *u, *d * active);
        }
        T::narrow(g, grad_gates);
        T::narrow(u, out);
        T::narrow(d, grad_ups);
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing, clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SILU: Gate = Gate { linear: 1.0, cubic: 0.0 };
    const GELU: Gate = Gate { linear: 1.595_769, cubic: 0.071_354_814 };

    fn exact(act: Gate, g: f64) -> (f64, f64) {
        let (linear, cubic) = (f64::from(act.linear), f64::from(act.cubic));
        let sigmoid = 1.0 / (1.0 + (-(linear * g + cubic * g * g * g)).exp());
        (g * sigmoid, sigmoid + g * sigmoid * (1.0 - sigmoid) * (linear + 3.0 * cubic * g * g))
    }

    fn near(found: f32, wanted: f64, scale: f64) -> bool {
        (f64::from(found) - wanted).abs() <= 1e-6 * (wanted.abs() + scale) + 1e-30
    }

    #[test]
    fn a_sigmoid_is_right_everywhere_and_finite_at_the_ends() {
        for step in -20_000..20_000 {
            let z = step as f32 / 200.0;
            let wanted = 1.0 / (1.0 + (-f64::from(z)).exp());
            let found = f64::from(sigmoid(z));
            assert!((found - wanted).abs() <= 4e-7 * wanted + 1e-37, "{z}: {found} for {wanted}");
        }
        assert!(sigmoid(f32::NAN).is_nan());
        assert_eq!(sigmoid(f32::INFINITY), 1.0);
        assert!(sigmoid(f32::NEG_INFINITY) < 1e-37);
    }

    proptest! {
        #[test]
        fn the_gate_and_its_gradient_are_the_formula_for_any_threads(
            rows in 0..5_usize, width in 1..600_usize, seed in any::<u32>(), gelu in any::<bool>(), threads in 1..4_usize,
        ) {
            let act = if gelu { GELU } else { SILU };
            let mut state = seed;
            let mut draw = |count: usize| -> Vec<f32> {
                (0..count).map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 20) as f32 - 8.0
                }).collect()
            };
            let (hidden, grad) = (draw(rows * width * 2), draw(rows * width));
            let (mut out, mut again, mut change) = (vec![0.0; grad.len()], vec![0.0; grad.len()], vec![0.0; hidden.len()]);
            gate(act, &hidden, width, &mut out, threads).unwrap();
            gate_backward(act, &hidden, &grad, width, &mut again, &mut change, threads).unwrap();
            for row in 0..rows {
                for item in 0..width {
                    let (g, u) = (hidden[row * 2 * width + item], hidden[row * 2 * width + width + item]);
                    let (place, d) = (row * width + item, f64::from(grad[row * width + item]));
                    let (value, slope) = exact(act, f64::from(g));
                    prop_assert!(near(out[place], value * f64::from(u), 1.0));
                    prop_assert!(near(again[place], value * f64::from(u), 1.0));
                    // the slope's own rounding, some ulps of sums of terms up to 4, counts as often as it is multiplied
                    let factor = d * f64::from(u);
                    prop_assert!(near(change[row * 2 * width + item], factor * slope, 1.0 + 8.0 * factor.abs()));
                    prop_assert!(near(change[row * 2 * width + width + item], d * value, 1.0));
                }
            }
        }
    }

    #[test]
    fn parts_of_threads_join_and_narrow_items_round_once() {
        let width = 300;
        let hidden: Vec<bf16> = (0..400 * 2 * width).map(|n| bf16::from_f32((n % 977) as f32 / 100.0 - 4.0)).collect();
        let grad: Vec<bf16> = (0..400 * width).map(|n| bf16::from_f32((n % 331) as f32 / 50.0 - 3.0)).collect();
        let run = |threads| {
            let (mut out, mut change) = (vec![bf16::ZERO; grad.len()], vec![bf16::ZERO; hidden.len()]);
            gate_backward(SILU, &hidden, &grad, width, &mut out, &mut change, threads).unwrap();
            let mut forward = vec![bf16::ZERO; grad.len()];
            gate(SILU, &hidden, width, &mut forward, threads).unwrap();
            assert_eq!(forward, out);
            (out, change)
        };
        assert_eq!(run(1), run(3));
        let (out, _) = run(2);
        for row in [0, 133, 399] {
            let (g, u) = (hidden[row * 2 * width + 7], hidden[row * 2 * width + width + 7]);
            let wanted = exact(SILU, f64::from(g.to_f32())).0 * f64::from(u.to_f32());
            assert!((out[row * width + 7].to_f64() - wanted).abs() <= wanted.abs() / 256.0);
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let (hidden, mut short) = ([0.0_f32; 12], [0.0_f32; 5]);
        assert!(gate(SILU, &hidden, 3, &mut short, 1).is_err());
        assert!(gate(SILU, &hidden, 5, &mut short, 1).is_err());
        assert!(gate(SILU, &hidden, 0, &mut short, 1).is_err());
        let (mut six, mut twelve) = ([0.0_f32; 6], [0.0_f32; 12]);
        assert!(gate_backward(SILU, &hidden, &short, 3, &mut six, &mut twelve, 1).is_err());
        assert!(gate_backward(SILU, &hidden, &[0.0; 6], 3, &mut short, &mut twelve, 1).is_err());
        assert!(gate_backward(SILU, &hidden, &[0.0; 6], 3, &mut six, &mut short, 1).is_err());
    }
}
