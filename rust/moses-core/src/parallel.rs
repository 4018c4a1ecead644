//! Work in parts, done by as many threads as the caller wants, itself among them; and loops compiled for the vectors of the machine.

use std::sync::{Mutex, PoisonError};

use pulp::{Arch, Simd, WithSimd};

/// Runs `work` on every job, on the calling thread and at most `threads - 1` others, each taking the next job when it has done one; the
/// result is the first error by the order of jobs.
pub(crate) fn for_each<J: Send, E: Send>(
    jobs: Vec<J>,
    threads: usize,
    work: impl Fn(J) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let mut results: Vec<Result<(), E>> = jobs.iter().map(|_| Ok(())).collect();
    let others = threads.min(jobs.len()).saturating_sub(1);
    let queue = Mutex::new(jobs.into_iter().zip(results.iter_mut()));
    let run = || {
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        while let Some((job, result)) = next() {
            *result = work(job);
        }
    };
    rayon::in_place_scope(|scope| {
        (0..others).for_each(|_| scope.spawn(|_| run()));
        run();
    });
    results.into_iter().collect()
}

/// Items of a part when `length` items go to `threads` parts: a multiple of 16, so that parts do not share a cache line.
pub(crate) fn part_length(length: usize, threads: usize) -> usize {
    length.div_ceil(threads.max(1)).next_multiple_of(16).max(16)
}

struct Kernel<'a, A, F> {
    arguments: A,
    work: &'a F,
}

impl<A, R, F: Fn(A) -> R> WithSimd for Kernel<'_, A, F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> R {
        (*self.work)(self.arguments)
    }
}

/// Calls `work`, compiled for the widest vectors that the machine has. It must be `inline(always)` itself, no reference to another
/// closure, and take what it changes as arguments: else it is called through a shim that is not inlined, and is compiled for the
/// least machine of all.
#[inline(always)]
pub(crate) fn with_vectors<A, R, F: Fn(A) -> R>(arguments: A, work: &F) -> R {
    Arch::new().dispatch(Kernel { arguments, work })
}
