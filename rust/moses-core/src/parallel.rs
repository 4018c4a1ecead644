//! Work split into as many parts as the caller wants threads; the first part runs on the calling thread.

/// Runs `work` on every job, each of them in parallel; the result is the first error by the order of jobs.
pub(crate) fn for_each<J: Send, E: Send>(jobs: Vec<J>, work: impl Fn(J) -> Result<(), E> + Sync) -> Result<(), E> {
    let mut results: Vec<Result<(), E>> = jobs.iter().map(|_| Ok(())).collect();
    let work = &work;
    let mut pairs = jobs.into_iter().zip(results.iter_mut());
    if let Some((first, first_result)) = pairs.next() {
        rayon::in_place_scope(|scope| {
            for (job, result) in pairs {
                scope.spawn(move |_| *result = work(job));
            }
            *first_result = work(first);
        });
    }
    results.into_iter().collect()
}

/// Items of a part when `length` items go to `threads` parts: a multiple of 16, so that parts do not share a cache line.
pub(crate) fn part_length(length: usize, threads: usize) -> usize {
    length.div_ceil(threads.max(1)).next_multiple_of(16).max(16)
}
