"""Result tables between markers in Markdown pages, and NAME-paired.csv."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from m2rec.errors import UserError
from m2rec.experiments.ledger import (
    DatasetResults,
    format_csv,
    get_paired_tests_path,
    merge_paired_tests,
    read_finished_runs,
    read_paired_tests,
    read_published_results,
    read_sweep_results,
    select_current_tests,
)
from m2rec.experiments.paired import compare_with_baselines
from m2rec.experiments.plots import write_sweep_plots
from m2rec.experiments.sweep_plan import OVERVIEW_TABLE, RESERVED_TABLES, Sweep
from m2rec.experiments.tables import make_table
from m2rec.storage import write_text

logger = logging.getLogger(__name__)

MARKER_START = "<!-- results:"
MARKER_END = "<!-- /results -->"
_MARKED_BLOCK = re.compile(
    rf"({MARKER_START}([^:\s]+):([^:\s]+) -->)((?:(?!{MARKER_START}).)*?){MARKER_END}", re.DOTALL
)


def write_paired_tests(path: Path, runs: Path) -> Path:
    """Compute NAME-paired.csv; tests of runs that are not in the folder stay as long as NAME.csv has them.

    Args:
        path: NAME.yaml.
        runs: folder of the sweeps' runs.

    Returns:
        NAME-paired.csv.

    Raises:
        ValueError: the sweep or its runs can't be read or compared.
    """
    sweep = Sweep.read(path)
    finished = read_finished_runs(sweep)
    path = get_paired_tests_path(sweep)
    before = read_paired_tests(path)
    earlier = select_current_tests(before, sweep, finished)
    if dropped := len(before) - len(earlier):
        logger.warning("%s: dropped %s tests of runs that the CSV no longer has", path, dropped)
        write_text(path, format_csv(earlier))
    tests = compare_with_baselines(sweep, finished, runs / sweep.name)
    write_text(path, format_csv(merge_paired_tests(tests, earlier)))
    return path


def update_pages(pages: Sequence[Path], results: Path, check: bool = False) -> list[Path]:
    """Write result tables into pages, and the sweeps' plots.

    Args:
        pages: files with markers.
        results: folder of the sweeps.
        check: whether to write nothing.

    Returns:
        The files written; with `check`, the pages that would change.

    Raises:
        ValueError: a page, a marker or a result can't be used.
    """
    sweeps = {path.stem: read_sweep_results(Sweep.read(path)) for path in sorted(results.glob("*.yaml"))}
    published = read_published_results(results / "reported.csv")
    changed = {}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        filled = _fill_markers(page, text, sweeps, published)
        if filled != text:
            changed[page] = filled
    written = list(changed)
    if not check:
        for page, text in changed.items():
            write_text(page, text)
        for all_results in sweeps.values():
            written += write_sweep_plots(all_results)
    return written


def _fill_markers(
    page: Path, text: str, sweeps: Mapping[str, list[DatasetResults]], published: pd.DataFrame
) -> str:
    """The text of a page with the table of each marker.

    Raises:
        ValueError: a marker is not closed, or names an unknown sweep or table.
    """
    unmatched = re.search(rf"{MARKER_START}[^\n]*|{MARKER_END}", _MARKED_BLOCK.sub("", text))
    if unmatched:
        expected = f"{MARKER_START}NAME:TABLE --> ... {MARKER_END}"
        raise UserError(f"{page}: {unmatched[0]!r} is unmatched; expected {expected}")

    def fill(block: re.Match[str]) -> str:
        start, name, table, _ = block.groups()
        names = name.split("+")
        for one in names:
            if one not in sweeps:
                raise UserError(f"{page}: {start}: unknown sweep {one!r}; known: {', '.join(sweeps)}")
        known = [OVERVIEW_TABLE] if len(names) > 1 else [*sweeps[name][0].sweep.tables, *RESERVED_TABLES]
        if table not in known:
            raise UserError(f"{page}: {start}: unknown table; known: {', '.join(known)}")
        all_results = [results for one in names for results in sweeps[one]]
        return f"{start}\n\n{make_table(all_results, table, published)}\n\n{MARKER_END}"

    return _MARKED_BLOCK.sub(fill, text)
