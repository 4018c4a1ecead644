//! Gated activations for Python, over rows of buffers.

use half::{bf16, f16};
use moses_core::gate::{self as kernel, Gate, Item};
use moses_core::{Error, Result};
use pyo3::prelude::*;

use crate::buffer::Bytes;
use crate::dispatch::{Target, misfit, read};
use crate::error::Failure;

/// Rows `start .. start + rows` of `hidden`; every other buffer is used from its start.
#[derive(Clone, Copy)]
struct Rows {
    start: usize,
    rows: usize,
    width: usize,
}

impl Rows {
    fn of_hidden<'a, T>(&self, hidden: &'a [T]) -> Result<&'a [T]> {
        let double = self.width.saturating_mul(2);
        let (start, end) = (self.start, self.start.saturating_add(self.rows));
        hidden
            .get(start.saturating_mul(double)..end.saturating_mul(double))
            .ok_or_else(|| misfit("hidden does not have these rows"))
    }
}

macro_rules! for_dtype {
    ($dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            "float32" => $function::<f32>($($argument),*),
            "bfloat16" => $function::<bf16>($($argument),*),
            "float16" => $function::<f16>($($argument),*),
            other => Err(misfit(&format!("rows are {other}: give float32, bfloat16 or float16"))),
        }
    };
}

fn first<T>(items: &[T], count: usize) -> Result<&[T]> {
    items.get(..count).ok_or_else(|| misfit("a buffer has too few rows"))
}

fn first_mut<T>(items: &mut [T], count: usize) -> Result<&mut [T]> {
    items.get_mut(..count).ok_or_else(|| misfit("a buffer has too few rows"))
}

fn forward<T: Item>(act: Gate, hidden: &Bytes, at: Rows, out: &Target, threads: usize) -> Result<()> {
    let out = first_mut(out.items("the output")?, at.rows.saturating_mul(at.width))?;
    kernel::gate::<T>(act, at.of_hidden(read(hidden, "hidden")?)?, at.width, out, threads)
}

fn backward<T: Item>(
    act: Gate,
    (hidden, grad): (&Bytes, &Bytes),
    at: Rows,
    (out, grad_hidden): (&Target, &Target),
    threads: usize,
) -> Result<()> {
    let narrow = at.rows.saturating_mul(at.width);
    let hidden = at.of_hidden::<T>(read(hidden, "hidden")?)?;
    let grad = first(read(grad, "grad")?, narrow)?;
    let out = first_mut(out.items("the output")?, narrow)?;
    let grad_hidden = first_mut(grad_hidden.items("hidden's gradient")?, narrow.saturating_mul(2))?;
    kernel::gate_backward::<T>(act, hidden, grad, at.width, out, grad_hidden, threads)
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gate_forward(
    py: Python<'_>,
    dtype: &str,
    form: (f32, f32),
    hidden: Bytes,
    start: usize,
    rows: usize,
    width: usize,
    out: Target,
    threads: usize,
) -> PyResult<()> {
    let (act, at) = (Gate { linear: form.0, cubic: form.1 }, Rows { start, rows, width });
    py.detach(|| for_dtype!(dtype, forward(act, &hidden, at, &out, threads)))
        .map_err(|error: Error| Failure(error).into())
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gate_backward(
    py: Python<'_>,
    dtype: &str,
    form: (f32, f32),
    hidden: Bytes,
    start: usize,
    rows: usize,
    width: usize,
    grad: Bytes,
    out: Target,
    grad_hidden: Target,
    threads: usize,
) -> PyResult<()> {
    let (act, at) = (Gate { linear: form.0, cubic: form.1 }, Rows { start, rows, width });
    py.detach(|| for_dtype!(dtype, backward(act, (&hidden, &grad), at, (&out, &grad_hidden), threads)))
        .map_err(|error: Error| Failure(error).into())
}
