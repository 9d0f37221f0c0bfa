"""Rebuild the result tables and the plots from results/: python scripts/report.py.

With run folders, python scripts/report.py RUN [RUN ...] [--output=FILE], pages are made instead: of one
run its report.html again, of several one page that sets them side by side. With --pictures=DIR the
pictures of one run's gate and filter are written there as SVG files.

Whatever stands between `<!-- results:NAME:TABLE -->` and `<!-- /results -->` in README.md and
docs/results.md is replaced by a table of results/NAME.yaml and results/NAME.csv. TABLE is one that
the YAML names, `reported` (published numbers beside ours), `buckets` (by popularity and length of
history) or `overview` (a line per data set; NAME+NAME in place of NAME are several sweeps). With
--check nothing is written, and the exit status is 1 if a page would change. With --paired the paired
tests of a sweep are made from its run folders, as results/NAME-paired.csv; those of runs that are not
there stay as they are, as long as the CSV has their numbers.
"""

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from m2rec.cli import Parser, run_command
from m2rec.errors import UserError
from m2rec.experiments import paired
from m2rec.experiments.ledger import (
    FinishedRuns,
    get_paired_tests_path,
    read_finished_runs,
    read_paired_tests,
    read_published_results,
    select_current_tests,
)
from m2rec.experiments.overview import make_overview_table
from m2rec.experiments.plots import write_sweep_plots
from m2rec.experiments.sweep_plan import OVERVIEW_TABLE, RESERVED_TABLES, Sweep
from m2rec.experiments.tables import make_bucket_tables, make_published_table, make_result_table
from m2rec.reports import run_page as html
from m2rec.storage import write_text

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
MARKED_PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md"]
MARKER_START = "<!-- results:"
MARKER_END = "<!-- /results -->"
MARKED_BLOCK = re.compile(
    rf"({MARKER_START}([^:\s]+):([^:\s]+) -->)((?:(?!{MARKER_START}).)*?)({MARKER_END})", re.DOTALL
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command("report.py", lambda: write_pages(parse_options(arguments)))


def write_pages(options: argparse.Namespace) -> int:
    """Write the page of runs, the paired tests, or the result tables."""
    if options.runs_shown:
        return write_run_pages(options)
    if options.paired:
        return write_paired_tests(options)
    return update_result_pages(options)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "runs_shown", nargs="*", type=Path, metavar="RUN", help="folders of finished runs, for a page of them"
    )
    parser.add_argument("--output", type=Path, help="page of several runs; default: comparison.html")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="folder for SVG files of one run")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page would change")
    parser.add_argument("--paired", metavar="NAME", help="make results/NAME-paired.csv from run folders")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "sweeps", help="folder of the sweeps' runs"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the sweeps")
    parser.add_argument(
        "--page", type=Path, action="append", help="file with markers; README.md and docs/results.md"
    )
    options = parser.parse_args(arguments)
    shown = len(options.runs_shown)
    if shown and (options.check or options.paired or options.page):
        parser.error("RUN goes with none of --check, --paired and --page")
    if options.paired and options.check:
        parser.error("--check writes nothing, and --paired does; give one of them")
    if options.output and shown < 2:
        parser.error("--output is for the page of several runs")
    if options.pictures and shown != 1:
        parser.error("--pictures is for one run")
    options.page = options.page or MARKED_PAGES
    options.output = options.output or Path("comparison.html")
    return options


def write_run_pages(options: argparse.Namespace) -> int:
    """Write a page of one run or of several, or pictures of one.

    Raises:
        ValueError: one is no finished run.
    """
    runs = options.runs_shown
    if options.pictures:
        for path in html.write_insight_charts(runs[0], options.pictures):
            print(path)
        return 0
    print(
        html.write_run_page(runs[0]) if len(runs) == 1 else html.write_comparison_page(runs, options.output)
    )
    return 0


def write_paired_tests(options: argparse.Namespace) -> int:
    """Write NAME-paired.csv.

    Raises:
        ValueError: the sweep or its runs can't be read or compared.
    """
    sweep = Sweep.read(options.results / f"{options.paired}.yaml")
    answers, path = read_finished_runs(sweep), get_paired_tests_path(sweep)
    before = read_paired_tests(path)
    earlier = select_current_tests(before, sweep, answers)
    if len(earlier) < len(before):
        logger.warning(
            "%s: dropped %s tests of runs that the CSV no longer has", path, len(before) - len(earlier)
        )
        write_text(path, paired.format_paired_tests(earlier))
    rows = paired.compare_with_baselines(sweep, answers, options.runs / sweep.name)
    write_text(path, paired.format_paired_tests(paired.merge_earlier_tests(rows, earlier)))
    print(path)
    return 0


def update_result_pages(options: argparse.Namespace) -> int:
    """Write the pages and the plots, or only say which pages would change.

    Raises:
        ValueError: a page, a marker or a result can't be used.
    """
    sweeps = {path.stem: Sweep.read(path) for path in sorted(options.results.glob("*.yaml"))}
    answers = {name: read_finished_runs(sweep) for name, sweep in sweeps.items()}
    old = {page: page.read_text(encoding="utf-8") for page in options.page}
    new = {page: fill_markers(page, text, sweeps, answers, options.results) for page, text in old.items()}
    changed = [page for page in options.page if new[page] != old[page]]
    if options.check:
        for page in changed:
            print(f"{page} is not what the results say; run python scripts/report.py")
        return int(bool(changed))
    for page in changed:
        write_text(page, new[page])
        print(page)
    for name, sweep in sweeps.items():
        for path in write_sweep_plots(sweep, answers[name]):
            print(path)
    return 0


def fill_markers(
    page: Path, text: str, sweeps: dict[str, Sweep], answers: dict[str, FinishedRuns], results: Path
) -> str:
    """The text of a page with the table of each marker.

    Raises:
        ValueError: a marker is not closed, or names no sweep or no table.
    """
    if len(MARKED_BLOCK.findall(text)) != text.count(MARKER_START) or text.count(MARKER_START) != text.count(
        MARKER_END
    ):
        lone = re.search(rf"{MARKER_START}[^\n]*|{MARKER_END}", MARKED_BLOCK.sub("", text))
        shown = lone[0] if lone else MARKER_START
        raise UserError(f"{page}: {shown!r} is no pair of {MARKER_START}NAME:TABLE --> and {MARKER_END}")

    def block(match: re.Match[str]) -> str:
        start, name, table, _, end = match.groups()
        names = name.split("+")
        for one in names:
            if one not in sweeps:
                raise UserError(f"{page}: {start} has no sweep, there is no {results / one}.yaml")
        known = [OVERVIEW_TABLE] if len(names) > 1 else [*sweeps[name].tables, *RESERVED_TABLES]
        if table not in known:
            raise UserError(f"{page}: {start} names no table; known: {', '.join(known)}")
        made = make_marked_table([sweeps[one] for one in names], answers, table, results)
        return f"{start}\n\n{made}\n\n{end}"

    return MARKED_BLOCK.sub(block, text)


def make_marked_table(
    sweeps: Sequence[Sweep], answers: dict[str, FinishedRuns], table: str, results: Path
) -> str:
    """The Markdown for one marker; all tables but the overview are of one sweep."""
    sweep, own = sweeps[0], answers[sweeps[0].name]
    if table == OVERVIEW_TABLE:
        return make_overview_table(sweeps, answers, read_published_results(results / "reported.csv"))
    if table == "reported":
        return make_published_table(sweep, own, read_published_results(results / "reported.csv"))
    if table == "buckets":
        return make_bucket_tables(sweep, own)
    return make_result_table(sweep, own, table)
