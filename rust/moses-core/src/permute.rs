//! Rows of tokens to rows of experts and back: gather, combine and their gradients, as `moses.ops` defines them.
//!
//! Guarantees: sums are in f32 (f64 for f64), in slot order, a product rounded before it is added, and rounded once at the
//! end, so the bits are the same for any number of threads and any vector width. Output rows are split over the threads; no
//! row is written by two. A plan's indices are checked where they are used.

pub mod element;

use crate::limits::MAX_THREADS;
use crate::parallel::{for_each, with_vectors};
use crate::{Error, Result};
use element::{Element, Sum};

/// Bytes of output below which one thread is faster than waking another.
pub const PARALLEL_BYTES: usize = 1 << 18;

/// A plan's indices: `order` row to pair, `inverse` pair to row, -1 for none; a token has `top_k` pairs.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    /// The pair of each row.
    pub order: &'a [i32],
    /// The row of each pair.
    pub inverse: &'a [i32],
    /// Slots of a token.
    pub top_k: usize,
}

fn misfit(problem: impl Into<String>) -> Error {
    Error::DispatchArguments { problem: problem.into() }
}

fn require(fits: bool, problem: &str) -> Result<()> {
    if fits { Ok(()) } else { Err(misfit(format!("{problem}: call it by moses.ops"))) }
}

fn bad_index(what: &'static str, place: usize, index: i32, length: usize) -> Error {
    Error::PlanIndex { what, place: place as u64, index: i64::from(index), length: length as u64 }
}

impl Plan<'_> {
    fn check(&self) -> Result<()> {
        require(self.top_k > 0 && self.inverse.len().is_multiple_of(self.top_k), "inverse is not tokens of top_k slots")
    }

    fn tokens(&self) -> usize {
        self.inverse.len().checked_div(self.top_k).unwrap_or(0)
    }
}

/// Parts a thread, where there are several: one that is held up leaves its later parts to the others.
const PARTS: usize = 8;

/// Splits `count` output rows of `width` items over the threads; `work` gets the first row's number and the rows.
fn by_rows<T: Send>(
    out: &mut [T],
    count: usize,
    width: usize,
    threads: usize,
    work: impl Fn((usize, &mut [T])) -> Result<()> + Sync,
) -> Result<()> {
    if width == 0 || count == 0 {
        return Ok(());
    }
    let parts = if threads == 1 { 1 } else { threads.saturating_mul(PARTS) };
    let rows = count.div_ceil(parts).max(1);
    let parts = out.chunks_mut(rows.saturating_mul(width)).enumerate().collect();
    // what is inlined here is compiled for the vectors that this machine has
    for_each(parts, threads, |(number, part): (usize, &mut [T])| {
        let first = number.saturating_mul(rows);
        with_vectors((first, part), &work)
    })
}

/// One thread where there is little to do.
fn threads_for(bytes: usize, threads: usize) -> usize {
    if bytes < PARALLEL_BYTES { 1 } else { threads.clamp(1, MAX_THREADS) }
}

fn row<T>(rows: &[T], index: usize, width: usize) -> Option<&[T]> {
    let start = index.checked_mul(width)?;
    rows.get(start..start.checked_add(width)?)
}

/// `out[j] = x[order[j] / top_k]`, zeros where `order[j]` is -1; rows are `row_bytes` bytes.
///
/// # Errors
/// `dispatch_arguments`, `plan_index`.
pub fn gather(x: &[u8], row_bytes: usize, plan: &Plan<'_>, out: &mut [u8], threads: usize) -> Result<()> {
    plan.check()?;
    let tokens = plan.tokens();
    require(tokens.checked_mul(row_bytes) == Some(x.len()), "x does not have the plan's tokens")?;
    require(plan.order.len().checked_mul(row_bytes) == Some(out.len()), "the output does not have the plan's rows")?;
    let threads = threads_for(out.len(), threads);
    by_rows(
        out,
        plan.order.len(),
        row_bytes,
        threads,
        #[inline(always)]
        |(first, part)| {
            let pairs = plan.order.get(first..).unwrap_or_default();
            for (place, (target, &pair)) in part.chunks_exact_mut(row_bytes).zip(pairs).enumerate() {
                if pair == -1 {
                    target.fill(0);
                    continue;
                }
                let token = usize::try_from(pair).ok().and_then(|pair| pair.checked_div(plan.top_k));
                match token.and_then(|token| row(x, token, row_bytes)) {
                    Some(source) => target.copy_from_slice(source),
                    None => return Err(bad_index("order", first.saturating_add(place), pair, plan.inverse.len())),
                }
            }
            Ok(())
        },
    )
}

/// `out[t] = sum over slots s of weights[t, s] * y[inverse[t, s]]`; without weights each is 1.
///
/// # Errors
/// `dispatch_arguments`, `plan_index`.
pub fn combine<T: Element>(
    y: &[T],
    width: usize,
    plan: &Plan<'_>,
    weights: Option<&[T::Sum]>,
    out: &mut [T],
    threads: usize,
) -> Result<()> {
    plan.check()?;
    let tokens = plan.tokens();
    require(plan.order.len().checked_mul(width) == Some(y.len()), "y does not have the plan's rows")?;
    require(tokens.checked_mul(width) == Some(out.len()), "the output does not have the plan's tokens")?;
    require(weights.is_none_or(|w| w.len() == plan.inverse.len()), "weights are not (tokens, top_k)")?;
    let threads = threads_for(size_of_val(out), threads);
    by_rows(
        out,
        tokens,
        width,
        threads,
        #[inline(always)]
        |(first, part)| {
            let start = first.saturating_mul(plan.top_k);
            let slots = plan.inverse.get(start..).unwrap_or_default().chunks_exact(plan.top_k);
            let mut sources: Vec<(T::Sum, &[T])> = Vec::with_capacity(plan.top_k);
            for (place, (target, rows)) in part.chunks_exact_mut(width).zip(slots).enumerate() {
                let first_pair = place.saturating_mul(plan.top_k).saturating_add(start);
                sources.clear();
                for (slot, &index) in rows.iter().enumerate() {
                    if index == -1 {
                        continue;
                    }
                    let pair = first_pair.saturating_add(slot);
                    let source = usize::try_from(index).ok().and_then(|index| row(y, index, width));
                    let source = source.ok_or_else(|| bad_index("inverse", pair, index, plan.order.len()))?;
                    // a product with 1 is exact
                    let weight = weights.map_or(Some(T::Sum::ONE), |weights| weights.get(pair).copied());
                    sources.push((weight.unwrap_or(T::Sum::ZERO), source));
                }
                T::weighted_sum(&sources, target);
            }
            Ok(())
        },
    )
}

/// `out[j] = weights[order[j]] * grad[order[j] / top_k]`, zeros where `order[j]` is -1.
///
/// # Errors
/// `dispatch_arguments`, `plan_index`.
pub fn combine_backward_rows<T: Element>(
    grad: &[T],
    width: usize,
    plan: &Plan<'_>,
    weights: &[T::Sum],
    out: &mut [T],
    threads: usize,
) -> Result<()> {
    plan.check()?;
    let tokens = plan.tokens();
    require(tokens.checked_mul(width) == Some(grad.len()), "grad does not have the plan's tokens")?;
    require(plan.order.len().checked_mul(width) == Some(out.len()), "the output does not have the plan's rows")?;
    require(weights.len() == plan.inverse.len(), "weights are not (tokens, top_k)")?;
    let threads = threads_for(size_of_val(out), threads);
    by_rows(
        out,
        plan.order.len(),
        width,
        threads,
        #[inline(always)]
        |(first, part)| {
            let pairs = plan.order.get(first..).unwrap_or_default();
            for (place, (target, &pair)) in part.chunks_exact_mut(width).zip(pairs).enumerate() {
                if pair == -1 {
                    T::clear(target);
                    continue;
                }
                let index = usize::try_from(pair).unwrap_or(usize::MAX);
                let token = index.checked_div(plan.top_k);
                match (weights.get(index), token.and_then(|token| row(grad, token, width))) {
                    (Some(&weight), Some(source)) => T::scale(target, weight, source),
                    _ => return Err(bad_index("order", first.saturating_add(place), pair, plan.inverse.len())),
                }
            }
            Ok(())
        },
    )
}

/// `out[t, s] = sum over d of grad[t, d] * y[inverse[t, s], d]` in [`element::LANES`] lanes that fold by halves; 0 where dropped.
///
/// # Errors
/// `dispatch_arguments`, `plan_index`.
pub fn combine_backward_weights<T: Element>(
    grad: &[T],
    y: &[T],
    width: usize,
    plan: &Plan<'_>,
    out: &mut [T::Sum],
    threads: usize,
) -> Result<()> {
    plan.check()?;
    let tokens = plan.tokens();
    require(tokens.checked_mul(width) == Some(grad.len()), "grad does not have the plan's tokens")?;
    require(plan.order.len().checked_mul(width) == Some(y.len()), "y does not have the plan's rows")?;
    require(out.len() == plan.inverse.len(), "the output is not (tokens, top_k)")?;
    if width == 0 {
        out.fill(T::Sum::ZERO);
        return Ok(());
    }
    by_rows(
        out,
        tokens,
        plan.top_k,
        threads_for(size_of_val(grad), threads), // the work is in the rows read, not in the few sums written
        #[inline(always)]
        |(first, part)| {
            let slots = plan.inverse.get(first.saturating_mul(plan.top_k)..).unwrap_or_default();
            for (place, (target, &index)) in part.iter_mut().zip(slots).enumerate() {
                *target = T::Sum::ZERO;
                if index == -1 {
                    continue;
                }
                let token = first.saturating_add(place.checked_div(plan.top_k).unwrap_or(0));
                let left = row(grad, token, width);
                let right = usize::try_from(index).ok().and_then(|index| row(y, index, width));
                match (left, right) {
                    (Some(left), Some(right)) => *target = T::dot(left, right),
                    _ => {
                        let place = first.saturating_mul(plan.top_k).saturating_add(place);
                        return Err(bad_index("inverse", place, index, plan.order.len()));
                    }
                }
            }
            Ok(())
        },
    )
}

#[cfg(test)]
mod tests;
