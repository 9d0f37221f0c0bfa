"""Train and evaluate M2Rec or a baseline: python run_mm.py [--key=value ...].

Every key of config.yaml can be given. The checkout's config.yaml is read, or for an installed package that
of the working folder if there is one, unless --config_files="FILE ..." names others. --resume=runs/NAME
resumes a run that was stopped. --continue_from=runs/NAME trains the model of a finished run further on the
data with new interactions.

--search=30m looks for better settings first, on validation, for 30 minutes or as many trials (--search=40),
and ends with the run of the best. The same command resumes a search that was stopped.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from m2rec.cli import name_command, name_commands_in, name_program, run_command
from m2rec.commands.config_file import find_config_file
from m2rec.errors import UserError
from m2rec.reports.baselines import describe_comparison, list_compared_models
from m2rec.run_folder import RunFolder
from m2rec.settings import Role, collect_keys

if TYPE_CHECKING:
    from m2rec.training.run import RunResult

_FIRST_SIGNAL_STATUS = 128  # a lower exit status is that of a mistake
_SECONDS_TO_REPORT = 20  # at most: torchrun ends the others when the first process has printed and failed
# keys that may be given together with --resume
RESUME_KEYS = collect_keys(Role.LOCAL, Role.START)


def main(arguments: Sequence[str] | None = None, command: str = "train") -> int:
    """Run from command-line arguments.

    Args:
        arguments: those after the command; `sys.argv`'s by default.
        command: `train`, or `search`, whose lines begin with its own name.

    Returns:
        The exit status: 2 for a mistake, 3 if a run can't be resumed, 128 and the signal after a stop.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "-h" in arguments or "--help" in arguments:
        print(name_commands_in(__doc__))
        return 0
    if os.environ.get("RANK", "0") == "0":
        _start_logging(logging.INFO)
        return run_command(command, lambda: _train(arguments))
    _start_logging(logging.ERROR)  # of torchrun's processes only the first one prints
    with open(os.devnull, "w") as nowhere, ExitStack() as stack:
        stack.enter_context(redirect_stdout(nowhere))
        if os.environ.get("LOCAL_RANK") != "0":  # each machine's first one prints mistakes
            stack.enter_context(redirect_stderr(nowhere))
        status = run_command(command, lambda: _train(arguments, logging.ERROR))
    if 0 < status < _FIRST_SIGNAL_STATUS:
        time.sleep(_SECONDS_TO_REPORT)  # torchrun ends all processes as soon as one has failed
    return status


def _train(arguments: Sequence[str], log_level: int | None = None) -> int:
    """Train and print the result; `log_level` is stronger than the key `state`."""
    from m2rec.yaml_values import parse_arguments

    given = parse_arguments(arguments)
    if "search" in given and "resume" not in given:
        from m2rec.commands.search import run_search

        outcome = run_search(arguments, given, log_level)
    else:
        outcome = _run_once(given, log_level)
    if isinstance(outcome, int):
        return outcome
    print(format_metrics_table(outcome.metrics))
    print(format_next_steps(outcome.folder, outcome.metrics["recommends"]))
    print(str(outcome.folder))
    return 0


def _run_once(given: Mapping[str, Any], log_level: int | None) -> "RunResult | int":
    """A new run or a resumed one; the exit status where it was stopped."""
    from m2rec.commands.own_process import pause_garbage_collection  # before PyTorch is loaded

    with pause_garbage_collection():
        from m2rec.training.continued_run import build_run_config
        from m2rec.training.new_run import find_interrupted_run
        from m2rec.training.run import build_resumed_config, run_experiment
        from m2rec.training.signals import RunInterrupted

    if given.get("state") == "DEBUG":  # before anything can fail
        logging.getLogger().setLevel(logging.DEBUG)
    folder = parse_resume_folder(given)
    if folder is None:
        config = build_run_config(given, find_config_file())
        folder = find_interrupted_run(Path(config["runs_dir"]))
    if folder is not None:
        overrides = {key: given[key] for key in RESUME_KEYS if key in given}
        config = build_resumed_config(folder, overrides)
    logging.getLogger().setLevel(log_level or config["state"])
    try:
        return run_experiment(config, folder)
    except RunInterrupted as stop:
        cure = ""
        if stop.folder:
            cure = f"; resume with: {name_command('train')} --resume={quote(str(stop.folder))}"
        sys.stderr.write(f"{name_program('train')}: stopped{cure}\n")
        return 128 + stop.signal


def parse_resume_folder(given: Mapping[str, Any]) -> Path | None:
    """The folder that --resume names, or None.

    Raises:
        ValueError: the value is not a name, or a key is given that belongs to the run.
    """
    if "resume" not in given:
        return None
    name = given["resume"]
    for key in sorted(given):
        if key not in ("resume", *RESUME_KEYS):
            raise UserError(f"resume: {name!r}: it takes its keys from the run, not --{key}")
    if not isinstance(name, str):
        raise UserError(f"resume: {name!r}: expected runs/NAME")
    return Path(name)


def format_metrics_table(metrics: dict[str, Any]) -> str:
    """The metrics as a table: a line per metric, a column per protocol."""
    protocol = metrics["protocol"]
    names = ["valid", "test", "test_unseen"]
    if "returning" in protocol:
        names.append("test_new")
    columns = {name: metrics[name] for name in names if metrics[name]}
    titles = "".join(map("{:>12}".format, columns))
    width = 2 + max(map(len, ["metric", *metrics["test"]]))
    seconds = metrics["seconds"]["total"]
    lines = [
        "",
        f"{metrics['model']} on {metrics['dataset']}, seed {metrics['seed']}, {seconds:.0f} s",
        "metric".ljust(width) + titles,
    ]
    for metric in metrics["test"]:
        values = [f"{column[metric]:12.4f}" for column in columns.values()]
        lines.append(metric.ljust(width) + "".join(values))
    lines.append(
        f"split {protocol['split']}, full ranking, time order {protocol['time_order']}, "
        f"ties {protocol['tie_order']}; "
        "test: history stays in the ranking, test_unseen: history removed"
    )
    if "returning" in protocol:
        lines.append(protocol["returning"])
    return "\n".join([*lines, *_format_baselines(metrics, list(columns))])


def _format_baselines(metrics: dict[str, Any], protocols: Sequence[str]) -> list[str]:
    """The run and its baselines on valid_metric: a line per model, a column per protocol."""
    models = list_compared_models(metrics)
    if not models:
        return []
    metric = metrics["valid_metric"]
    width = 2 + max(map(len, [metric, *models]))
    lines = ["", metric.ljust(width) + "".join(map("{:>12}".format, protocols))]
    for name, by_protocol in models.items():
        values = [f"{by_protocol[protocol][metric]:12.4f}" for protocol in protocols]
        lines.append(name.ljust(width) + "".join(values))
    return [*lines, describe_comparison(metrics)]


def format_next_steps(folder: Path, recommends: bool) -> str:
    """Suggested next commands."""
    files, steps = RunFolder(folder), []
    if files.report_file.exists():
        steps.append(f"look at it: {files.report_file}")
    if recommends:
        steps.append(f"use it:     {name_command('recommend')} {quote(str(folder))} --interactive")
    steps.append(f"repeat it:  {name_command('train')} --config_files={quote(str(files.config_file))}")
    return "\n".join(steps)


class _PlainFormatter(logging.Formatter):
    """Log lines without RecBole's colours."""

    def format(self, record: logging.LogRecord) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", super().format(record))


def _start_logging(level: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: record.name != "root" or record.levelno > logging.INFO)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it logs every font
