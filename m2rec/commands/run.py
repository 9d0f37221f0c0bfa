"""Train and evaluate M2Rec or a baseline: python run_mm.py [--key=value ...].

Every key of config.yaml can be given; config.yaml beside this file is read unless
--config_files="FILE ..." names others. --resume=runs/NAME goes on with a run that was stopped.
"""

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from m2rec.settings import Role, collect_keys

DEFAULT_CONFIG = Path(__file__).parents[2] / "config.yaml"
# keys that may be given together with --resume
RESUME_KEYS = collect_keys(Role.LOCAL, Role.START)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status: 2 for a mistake, 3 if a run can't go on."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if any(a in ("-h", "--help") for a in arguments):
        _print_line(f"{__doc__}")
        return 0
    others = os.environ.get("RANK", "0") != "0"  # of the processes that torchrun starts, one speaks
    _start_logging(logging.ERROR if others else logging.INFO)
    try:
        import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded
        from m2rec.training.configuration import build_config
        from m2rec.training.run import build_resumed_config, run_experiment
        from m2rec.training.signals import RunInterrupted
        from m2rec.yaml_values import parse_arguments

        given = parse_arguments(arguments)
        if given.get("state") == "DEBUG":  # before anything can go wrong
            logging.getLogger().setLevel(logging.DEBUG)
        folder = parse_resume_folder(given)
        machine = {key: given[key] for key in RESUME_KEYS if key in given}
        config = build_resumed_config(folder, machine) if folder else build_config(given, DEFAULT_CONFIG)
        logging.getLogger().setLevel(logging.ERROR if others else config["state"])
        try:
            result = run_experiment(config, folder)
        except RunInterrupted as stop:
            if not others:
                how = f"; python run_mm.py --resume={quote(str(stop.folder))} goes on" if stop.folder else ""
                sys.stderr.write(f"run_mm.py: stopped{how}\n")
            return 128 + stop.signal
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        if not others:
            sys.stderr.write(f"run_mm.py: error: {' '.join(str(error).split())}\n")
        return getattr(error, "exit_status", 2)  # a run that can't go on has its own
    except KeyboardInterrupt:
        sys.stderr.write("run_mm.py: stopped\n")
        return 130
    if not others:
        _print_line(format_metrics_table(result.metrics))
        _print_line(format_next_steps(result.folder, result.metrics["recommends"]))
        _print_line(str(result.folder))
    return 0


def parse_resume_folder(given: Mapping[str, Any]) -> Path | None:
    """The folder that --resume names, or None; what else a run needs is in the folder.

    Raises:
        ValueError: another key is given, or the value is no folder's name.
    """
    if "resume" not in given:
        return None
    others = sorted(set(given) - {"resume", *RESUME_KEYS})
    if others or not isinstance(given["resume"], str):
        what = f"it takes its keys from the run, not --{others[0]}" if others else "expected runs/NAME"
        raise ValueError(f"resume: {given['resume']!r}: {what}")
    return Path(given["resume"])


def format_metrics_table(metrics: dict[str, Any]) -> str:
    """The metrics as a table: a line per metric, a column per protocol."""
    returning = metrics["protocol"].get("returning")
    shown = ("valid", "test", "test_unseen", *(("test_new",) if returning else ()))
    parts = [part for part in shown if metrics[part]]
    seconds, protocol = metrics["seconds"]["total"], metrics["protocol"]
    title = f"{metrics['model']} on {metrics['dataset']}, seed {metrics['seed']}, {seconds:.0f} s"
    width = max(len(name) for name in ("metric", *metrics["test"])) + 2
    lines = ["", title, f"{'metric':<{width}}" + "".join(f"{part:>12}" for part in parts)]
    for name in metrics["test"]:
        lines.append(f"{name:<{width}}" + "".join(f"{metrics[part][name]:>12.4f}" for part in parts))
    lines.append(
        f"split {protocol['split']}, full ranking, time order {protocol['time_order']}; "
        "test: history stays in the ranking, test_unseen: history removed"
    )
    if returning:
        lines.append(returning)
    return "\n".join(lines)


def format_next_steps(folder: Path, recommends: bool) -> str:
    """What one would do next."""
    steps = {
        "look at it": str(page) if (page := folder / "report.html").exists() else "",
        "use it": f"python scripts/recommend.py {quote(str(folder))} --interactive" if recommends else "",
        "repeat it": f"python run_mm.py --config_files={quote(str(folder / 'config.yaml'))}",
    }
    return "\n".join(f"{what + ':':<12}{how}" for what, how in steps.items() if how)


class _PlainFormatter(logging.Formatter):
    """One line per message, without RecBole's colours where nobody sees them."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if sys.stderr.isatty() else re.sub(r"\x1b\[[0-9;]*m", "", text)


def _start_logging(level: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: record.name != "root" or record.levelno > logging.INFO)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of every font


def _print_line(text: str) -> None:
    sys.stdout.write(text + "\n")
