"""A run's page and pictures, written into a folder."""

from __future__ import annotations

from pathlib import Path

from moses.report.results import Results, read_results

PAGE = "report.html"
PICTURES = (
    "til-matrix.png",
    "tail-matrix.png",
    "scores.png",
    "bytes.png",
    "bank.png",
    "experts.png",
    "overlap.png",
    "confusion.png",
)


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write `report.html` and its PNGs into `out` (default: the run folder) and return the page's path.

    The page is self-contained; the PNGs beside it are for papers and slides. A picture that has nothing to show is not
    written, and one of an earlier report goes. Each file is replaced atomically; the same results give the same bytes.
    Raises RunError where the run has no results yet, FormatError where they are damaged, OSError where `out` cannot be
    written.
    """
    from moses._core import atomic_write
    from moses.report.page import build_page

    results = read_results(run_dir)
    folder = Path(run_dir if out is None else out)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(results)
    for name in PICTURES:
        if name in pictures:
            atomic_write(folder / name, pictures[name])
        else:
            (folder / name).unlink(missing_ok=True)
    page = folder / PAGE
    atomic_write(page, build_page(results, Path(run_dir).resolve().name, pictures).encode("utf-8"))
    return page


def draw_pictures(results: Results) -> dict[str, bytes]:
    """The PNGs by file name, in the order of `PICTURES`; those that have nothing to show are not there."""
    from moses.report import curves, heatmaps
    from moses.report.page import overlap_tasks

    pictures: dict[str, bytes] = {}
    if results.til is not None and (results.base or results.til.matrix):
        pictures["til-matrix.png"] = heatmaps.transfer_matrix(results, results.til, "TIL: score after each task")
    if results.tail is not None and (results.base or results.tail.matrix):
        pictures["tail-matrix.png"] = heatmaps.transfer_matrix(results, results.tail, "TaIL: score after each task")
    if any(mode is not None and mode.matrix for mode in (results.til, results.tail)):
        pictures["scores.png"] = curves.score_curves(results)
    if results.capacity:
        pictures["bytes.png"] = curves.bytes_bars(results)
    if any(task.bank_fraction is not None for task in results.capacity):
        pictures["bank.png"] = curves.bank_curve(results)
    if any(results.expert_use.get(task) for task in results.tasks):
        pictures["experts.png"] = heatmaps.expert_use(results)
    if results.overlap and any(map(any, results.overlap)):
        pictures["overlap.png"] = heatmaps.overlap_map(overlap_tasks(results), results.overlap)
    if results.tail is not None and results.tail.confusion is not None:
        pictures["confusion.png"] = heatmaps.confusion_map(results, results.tail.confusion)
    return pictures
