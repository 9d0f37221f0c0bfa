"""Rebuild the result tables and the plots from results/: python scripts/report.py.

With run folders, python scripts/report.py RUN [RUN ...] [--output=FILE], HTML pages are written instead:
for one run its report.html again, for several runs one page that sets them side by side. With
--pictures=DIR the charts of one run's gate and filter are written there as SVG files.

In README.md and docs/results.md the text between `<!-- results:NAME:TABLE -->` and `<!-- /results -->`
is replaced by a table of results/NAME.yaml and results/NAME.csv. TABLE is one that the YAML names,
`reported` (published numbers beside ours), `buckets` (by popularity and length of history) or `overview`
(a line per data set; NAME+NAME instead of NAME are several sweeps). With --check nothing is written, and
the exit status is 1 if a page would change. With --paired the paired tests of a sweep are computed from
its run folders, as results/NAME-paired.csv; tests of runs that are not there stay, as long as the CSV has
their numbers.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from m2rec.cli import CHECKOUT, Parser, run_command

RESULTS = CHECKOUT / "results"
MARKED_PAGES = [CHECKOUT / "README.md", CHECKOUT / "docs" / "results.md"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command("report", lambda: write_pages(parse_options(arguments)))


def write_pages(options: argparse.Namespace) -> int:
    """Write the page of runs, the paired tests, or the result tables; returns 1 if a page would change."""
    from m2rec.experiments.pages import update_pages, write_paired_tests

    if options.runs_shown:
        written = write_run_pages(options)
    elif options.paired:
        written = [write_paired_tests(options.results / f"{options.paired}.yaml", options.runs)]
    else:
        written = update_pages(options.page, options.results, options.check)
    for path in written:
        print(f"{path} is not what the results say; run python scripts/report.py" if options.check else path)
    return int(options.check and bool(written))


def write_run_pages(options: argparse.Namespace) -> list[Path]:
    """Write a page of one run or of several, or the charts of one."""
    from m2rec.reports import run_page

    runs = options.runs_shown
    if options.pictures:
        return run_page.write_insight_charts(runs[0], options.pictures)
    if len(runs) > 1:
        return [run_page.write_comparison_page(runs, options.output)]
    return [run_page.write_run_page(runs[0])]


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("report", __doc__)
    parser.add_argument(
        "runs_shown", nargs="*", type=Path, metavar="RUN", help="folders of finished runs, for a page of them"
    )
    parser.add_argument("--output", type=Path, help="page of several runs; default: comparison.html")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="folder for SVG files of one run")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page would change")
    parser.add_argument("--paired", metavar="NAME", help="make results/NAME-paired.csv from run folders")
    parser.add_argument(
        "--runs", type=Path, default=CHECKOUT / "runs" / "sweeps", help="folder of the sweeps' runs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the sweeps")
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
    if not shown and options.results == RESULTS and not RESULTS.is_dir():
        parser.error("RUN: give a run folder; without one, result tables are made, and they need a checkout")
    options.page = options.page or MARKED_PAGES
    options.output = options.output or Path("comparison.html")
    return options
