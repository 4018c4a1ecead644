//! Plans, gather and combine for Python: buffers in and out without copying, results in memory that is used again.

use std::ffi::c_int;

use half::{bf16, f16};
use moses_core::limits::MAX_POOL_BYTES;
use moses_core::permute::{self, element::Element};
use moses_core::plan::{self, ExpertId, Output, Request};
use moses_core::pool::{LINE_BYTES, Line, Pool};
use moses_core::{Error, Result};
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::{buffer::PyUntypedBuffer, ffi};

use crate::buffer::Bytes;
use crate::error::Failure;

static POOL: Pool = Pool::new(MAX_POOL_BYTES);

/// Memory from the pool as a writable buffer; it goes back when nothing refers to it any more.
#[pyclass(frozen, module = "moses._core")]
pub(crate) struct Block {
    lines: Vec<Line>,
    bytes: usize,
}

#[pymethods]
impl Block {
    #[new]
    fn new(py: Python<'_>, size: usize) -> PyResult<Self> {
        let lines = py.detach(|| POOL.take(size)).map_err(Failure)?;
        Ok(Self { lines, bytes: size })
    }

    fn __len__(&self) -> usize {
        self.bytes
    }

    /// # Safety
    /// Called by Python with a `view` to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let length = isize::try_from(this.bytes).map_err(|_| PyBufferError::new_err("too large"))?;
        let memory = this.lines.as_ptr().cast_mut().cast();
        // SAFETY: the block is `lines` lines, at least `bytes` bytes, at an address that does not move; it lives as long as
        // `slf`, to which the view holds a reference. Nothing in Rust reads or writes it while it is lent.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), memory, length, 0, flags) };
        if filled == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        POOL.give(std::mem::take(&mut self.lines));
    }
}

#[pyfunction]
pub(crate) fn pool_bytes() -> usize {
    POOL.bytes()
}

#[pyfunction]
pub(crate) fn pool_clear(py: Python<'_>) -> usize {
    py.detach(|| POOL.clear())
}

/// A contiguous buffer of Python that is written to.
pub(crate) struct Target(PyUntypedBuffer);

impl<'a, 'py> FromPyObject<'a, 'py> for Target {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(&object)?;
        if !buffer.is_c_contiguous() || buffer.readonly() {
            return Err(PyBufferError::new_err("the output is not contiguous and writable"));
        }
        Ok(Self(buffer))
    }
}

pub(crate) fn misfit(problem: &str) -> Error {
    Error::DispatchArguments { problem: problem.into() }
}

impl Target {
    #[allow(clippy::mut_from_ref)] // the memory is not ours: see SAFETY
    pub(crate) fn items<T: bytemuck::Pod>(&self, what: &str) -> Result<&mut [T]> {
        let (pointer, bytes) = (self.0.buf_ptr().cast::<T>(), self.0.len_bytes());
        if bytes == 0 {
            return Ok(&mut []);
        }
        if !pointer.is_aligned() || !bytes.is_multiple_of(size_of::<T>()) {
            return Err(misfit(&format!("{what} is not aligned to its items: give a fresh array")));
        }
        // SAFETY: the buffer is C-contiguous and writable (checked when it was taken), aligned and a whole number of items,
        // and any bytes are a T. It stays while `self.0` is held. Each target of a call is borrowed once; that two of them,
        // or an input, are not the same memory is the caller's part: moses.ops makes every target fresh.
        Ok(unsafe { std::slice::from_raw_parts_mut(pointer, bytes.checked_div(size_of::<T>()).unwrap_or(0)) })
    }
}

pub(crate) fn read<'a, T: bytemuck::Pod>(bytes: &'a Bytes, what: &str) -> Result<&'a [T]> {
    if bytes.as_slice().is_empty() {
        return Ok(&[]); // whose address may be any
    }
    bytemuck::try_cast_slice(bytes.as_slice())
        .map_err(|_| misfit(&format!("{what} is not aligned to its items: give a fresh array")))
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(crate) fn dispatch_plan(
    py: Python<'_>,
    expert_ids: Bytes,
    top_k: usize,
    num_experts: usize,
    capacity: Option<usize>,
    pad: bool,
    order: Target,
    inverse: Target,
    offsets: Target,
    counts: Target,
    threads: usize,
) -> PyResult<()> {
    let (size, unsigned) = (expert_ids.item_size(), expert_ids.format() == "B");
    let request = Request { num_experts, top_k, capacity, pad };
    py.detach(|| {
        let output = Output {
            order: order.items("order")?,
            inverse: inverse.items("inverse")?,
            offsets: offsets.items("offsets")?,
            counts: counts.items("counts")?,
        };
        fn run<I: ExpertId + bytemuck::Pod>(
            ids: &Bytes,
            request: &Request,
            output: Output<'_>,
            threads: usize,
        ) -> Result<()> {
            plan::plan::<I>(read(ids, "expert_ids")?, request, output, threads, &POOL)
        }
        match (size, unsigned) {
            (8, _) => run::<i64>(&expert_ids, &request, output, threads),
            (4, _) => run::<i32>(&expert_ids, &request, output, threads),
            (2, _) => run::<i16>(&expert_ids, &request, output, threads),
            (1, true) => run::<u8>(&expert_ids, &request, output, threads),
            (1, false) => run::<i8>(&expert_ids, &request, output, threads),
            _ => Err(misfit("expert_ids are no integers: give int64")),
        }
    })
    .map_err(|error: Error| Failure(error).into())
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gather(
    py: Python<'_>,
    x: Bytes,
    row_bytes: usize,
    order: Bytes,
    inverse: Bytes,
    top_k: usize,
    out: Target,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        let plan = permute::Plan { order: read(&order, "order")?, inverse: read(&inverse, "inverse")?, top_k };
        permute::gather(x.as_slice(), row_bytes, &plan, out.items("the output")?, threads)
    })
    .map_err(|error: Error| Failure(error).into())
}

/// The call of `$function` for the dtype that `$dtype` names.
macro_rules! for_dtype {
    ($dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            "float32" => $function::<f32>($($argument),*),
            "float64" => $function::<f64>($($argument),*),
            "bfloat16" => $function::<bf16>($($argument),*),
            "float16" => $function::<f16>($($argument),*),
            other => Err(misfit(&format!("rows are {other}: give float32, float64, bfloat16 or float16"))),
        }
    };
}

struct Call<'a> {
    width: usize,
    plan: permute::Plan<'a>,
    threads: usize,
}

fn combine_of<T: Element>(y: &Bytes, weights: Option<&Bytes>, out: &Target, call: &Call<'_>) -> Result<()>
where
    T::Sum: bytemuck::Pod,
{
    let weights = weights.map(|weights| read(weights, "weights")).transpose()?;
    permute::combine::<T>(read(y, "y")?, call.width, &call.plan, weights, out.items("the output")?, call.threads)
}

fn rows_of<T: Element>(grad: &Bytes, weights: &Bytes, out: &Target, call: &Call<'_>) -> Result<()>
where
    T::Sum: bytemuck::Pod,
{
    let (grad, weights) = (read(grad, "grad")?, read(weights, "weights")?);
    permute::combine_backward_rows::<T>(grad, call.width, &call.plan, weights, out.items("the output")?, call.threads)
}

fn weights_of<T: Element>(grad: &Bytes, y: &Bytes, out: &Target, call: &Call<'_>) -> Result<()>
where
    T::Sum: bytemuck::Pod,
{
    let (grad, y) = (read(grad, "grad")?, read(y, "y")?);
    permute::combine_backward_weights::<T>(grad, y, call.width, &call.plan, out.items("the output")?, call.threads)
}

#[pyfunction]
#[pyo3(signature = (dtype, y, width, order, inverse, top_k, weights, out, threads))]
#[allow(clippy::too_many_arguments)]
pub(crate) fn combine(
    py: Python<'_>,
    dtype: &str,
    y: Bytes,
    width: usize,
    order: Bytes,
    inverse: Bytes,
    top_k: usize,
    weights: Option<Bytes>,
    out: Target,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        let plan = permute::Plan { order: read(&order, "order")?, inverse: read(&inverse, "inverse")?, top_k };
        let call = Call { width, plan, threads };
        for_dtype!(dtype, combine_of(&y, weights.as_ref(), &out, &call))
    })
    .map_err(|error: Error| Failure(error).into())
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(crate) fn combine_backward_rows(
    py: Python<'_>,
    dtype: &str,
    grad: Bytes,
    width: usize,
    order: Bytes,
    inverse: Bytes,
    top_k: usize,
    weights: Bytes,
    out: Target,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        let plan = permute::Plan { order: read(&order, "order")?, inverse: read(&inverse, "inverse")?, top_k };
        let call = Call { width, plan, threads };
        for_dtype!(dtype, rows_of(&grad, &weights, &out, &call))
    })
    .map_err(|error: Error| Failure(error).into())
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(crate) fn combine_backward_weights(
    py: Python<'_>,
    dtype: &str,
    grad: Bytes,
    y: Bytes,
    width: usize,
    order: Bytes,
    inverse: Bytes,
    top_k: usize,
    out: Target,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        let plan = permute::Plan { order: read(&order, "order")?, inverse: read(&inverse, "inverse")?, top_k };
        let call = Call { width, plan, threads };
        for_dtype!(dtype, weights_of(&grad, &y, &out, &call))
    })
    .map_err(|error: Error| Failure(error).into())
}

const _: () = assert!(LINE_BYTES.is_multiple_of(align_of::<f64>()));
