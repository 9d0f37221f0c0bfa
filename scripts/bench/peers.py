"""Peers: other libraries' models beside ours, on the same interactions, in one run.

    python scripts/bench/peers.py                                         # random histories, ml-1m's sizes
    python scripts/bench/peers.py --data-path dataset/ml-1m/ml-1m.inter   # RecBole's .inter file

RecTools and RePlay come from PyPI, each into an environment of its own in runs/bench/peers, which is made
once, with the version of PyTorch that runs this. A library that can't be installed is left out.

Every model runs in a process of its own, with the same width D, layers, heads, length L, rows per step,
threads and optimiser (Adam). In each round all models take turns. Training is a plain loop over the
library's own batches. Their number of trained targets differs: M2Rec and RecBole train all targets, the
others those of a user's last L, and RecBole needs a row for each. So time is given per target. Inference is
from the items of a history to its ten best of all items; the outputs are checked in every round.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from benchmarking import (
    ROOT,
    Row,
    build_benchmark_parser,
    parse_benchmark_arguments,
    print_row,
    write_benchmark_results,
)

ENVIRONMENTS = ROOT / "runs" / "bench" / "peers"
WORKERS = ROOT / "scripts" / "bench" / "peer_workers"

ML_1M_USERS, ML_1M_ITEMS = 6_040, 3_416
SHORTEST, MEDIAN, LONGEST = 20, 96, 2_277  # histories of ml-1m


@dataclass(frozen=True)
class Library:
    """A library with the script that runs its models, and what pip installs for it."""

    script: str
    packages: tuple[str, ...] = ()
    """None of them: it is installed beside m2rec."""
    optional: tuple[str, ...] = ()
    """For some models only."""


LIBRARIES = {
    "m2rec": Library("run_recbole.py"),
    "rectools": Library("run_rectools.py", ("rectools[torch]==0.19.0",)),
    "replay": Library(
        "run_replay.py", ("replay-rec[torch]==0.22.0",), ("openvino==2026.4.1", "onnx==1.23.2")
    ),
}
MODELS = {  # library, and the name in its script
    "M2Rec": ("m2rec", "m2rec"),
    "M2Rec, attention alone": ("m2rec", "attention"),
    "RecBole SASRec": ("m2rec", "sasrec"),
    "RecBole GRU4Rec": ("m2rec", "gru4rec"),
    "RecTools SASRec": ("rectools", "sasrec"),
    "RecTools HSTU": ("rectools", "hstu"),
    "RePlay SASRec": ("replay", "sasrec"),
    "RePlay SASRec, OpenVINO": ("replay", "openvino"),
}


class PeerFailed(Exception):
    """A library could not be installed, or a worker ended; the message is what was said last."""


def make_environment(name: str) -> Path:
    """The Python of a library's environment, which is made unless it is there with the same packages.

    Raises:
        PeerFailed: the library could not be installed.
    """
    library, folder = LIBRARIES[name], ENVIRONMENTS / name
    if not library.packages:
        return Path(sys.executable)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # without it pip could take another PyTorch, with gigabytes for CUDA
    constraint = f"torch=={torch.__version__.split('+')[0]}"
    wanted = "\n".join([sys.version, constraint, *library.packages, *library.optional])
    marker = folder / "installed.txt"
    if not marker.exists() or marker.read_text() != wanted:
        print(f"making {folder}", flush=True)
        create_environment(folder, python, library, constraint)
        marker.write_text(wanted)
    return python


def create_environment(folder: Path, python: Path, library: Library, constraint: str) -> None:
    """Make an environment and install the library.

    Raises:
        PeerFailed: the library could not be installed.
    """
    try:
        venv.create(folder, clear=True, with_pip=True)
    except subprocess.CalledProcessError as error:
        raise PeerFailed(f"no environment with pip can be made: {error}") from error
    constraints = folder / "constraints.txt"
    constraints.write_text(constraint + "\n")
    install_packages(python, constraints, library.packages)
    try:
        install_packages(python, constraints, library.optional)
    except PeerFailed as error:
        print(f"without {', '.join(library.optional)}: {error}")


def make_environments(models: list[str]) -> dict[str, Path]:
    """The Pythons of the models' libraries, by library, without those that can't be installed."""
    pythons = {}
    for name in dict.fromkeys(MODELS[model][0] for model in models):
        try:
            pythons[name] = make_environment(name)
        except PeerFailed as error:
            print(f"without {name}: {error}")
    return pythons


def install_packages(python: Path, constraints: Path, packages: tuple[str, ...]) -> None:
    """Install packages within the constraints.

    Raises:
        PeerFailed: pip could not.
    """
    if not packages:
        return
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    command = [*pip, "-c", str(constraints), *packages]
    done = subprocess.run(command, env=build_clean_environment(), capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise PeerFailed(find_last_line("\n".join(errors) or done.stderr))


def build_clean_environment() -> dict[str, str]:
    """The environment variables without those that lead Python to packages of this environment."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def find_last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


class Worker:
    """A process with one model; see peer_workers/worker.py."""

    def __init__(self, python: Path, model: str, task: dict[str, Any], log: Path) -> None:
        library, name = MODELS[model]
        environment = build_clean_environment()
        if library == "m2rec":  # its packages are this environment's
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self.log = log
        with log.open("w") as messages:
            self.process = subprocess.Popen(
                [str(python), str(WORKERS / LIBRARIES[library].script), json.dumps({**task, "model": name})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                env={**environment, "OMP_NUM_THREADS": str(task["threads"])},
                cwd=log.parent,
                text=True,
            )

    def read_answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            PeerFailed: the process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise PeerFailed(find_last_line(self.log.read_text()))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, request: str) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            PeerFailed: the process has ended.
        """
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        return self.read_answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


@dataclass
class TimedPeer:
    """A model's worker, what it said when it was ready, and the rounds."""

    worker: Worker
    versions: dict[str, str]
    epoch_targets: int
    training: list[float]
    """Seconds per target, by round."""
    inference: list[float]
    """Seconds per history, by round."""

    def measure(self, steps: int) -> None:
        """Some training steps, unless the model only ranks, and one ranking of all histories."""
        if self.epoch_targets:
            answer = self.worker.ask(f"train {steps}")
            self.training.append(answer["seconds"] / answer["targets"])
        answer = self.worker.ask("rank")
        self.inference.append(answer["seconds"] / answer["histories"])


@contextmanager
def start_workers(models: list[str], task: dict[str, Any], folder: Path) -> Iterator[dict[str, TimedPeer]]:
    """The models that can run here; they load at the same time."""
    with ExitStack() as stack:
        pythons, started, ready = make_environments(models), {}, {}
        for model in models:
            if python := pythons.get(MODELS[model][0]):
                started[model] = Worker(python, model, task, folder / f"{len(started)}.log")
                stack.callback(started[model].close)
        for model, worker in started.items():
            try:
                ready[model] = TimedPeer(worker, **worker.read_answer(), training=[], inference=[])
            except PeerFailed as error:
                print(f"without {model}: {error}")
        yield ready


def read_interactions(path: Path) -> pd.DataFrame:
    """Columns user, item and time of a .inter file, 5-core."""
    frame = pd.read_csv(path, sep="\t")
    frame.columns = [name.partition(":")[0] for name in frame.columns]
    frame = frame.rename(columns={"user_id": "user", "item_id": "item", "timestamp": "time"})
    frame = frame[["user", "item", "time"]]
    size = len(frame) + 1
    while len(frame) < size:
        size = len(frame)
        for column in ("user", "item"):
            frame = frame[frame.groupby(column)[column].transform("size") >= 5]
    return frame


def draw_interactions(users: int) -> pd.DataFrame:
    """Random histories with the lengths of ml-1m, in which every item occurs if there are users enough."""
    generator = np.random.default_rng(0)
    lengths = (MEDIAN * np.exp(generator.standard_normal(users))).clip(SHORTEST, LONGEST).astype(int)
    n = int(lengths.sum())
    items = np.concatenate([generator.permutation(ML_1M_ITEMS) for _ in range(-(-n // ML_1M_ITEMS))])[:n]
    return pd.DataFrame(
        {"user": np.repeat(np.arange(users), lengths), "item": items, "time": 60 * np.arange(n)}
    )


def write_interactions(frame: pd.DataFrame, path: Path) -> None:
    """The columns in order of user and time, ties in the order of the file, with ids from 0."""
    frame = frame.sort_values(["user", "time"], kind="stable")
    numbers = {name: pd.factorize(frame[name])[0] for name in ("user", "item")}
    np.savez(path, **numbers, time=frame["time"].to_numpy(dtype=np.int64))


def make_row(model: str, peer: TimedPeer, reference: TimedPeer) -> Row:
    """A row of the table: medians over the rounds, of times and of their ratios to those of `reference`."""
    row: Row = {"model": model}
    if peer.training:
        seconds = median(peer.training)
        row["training, us per target"] = seconds * 1e6
        row["targets per epoch"] = peer.epoch_targets
        row["training, s per epoch"] = seconds * peer.epoch_targets
        if reference.training:
            row["training, ratio"] = compute_median_ratio(peer.training, reference.training)
    row["inference, ms per history"] = median(peer.inference) * 1e3
    row["inference, ratio"] = compute_median_ratio(peer.inference, reference.inference)
    return row


def compute_median_ratio(times: list[float], reference: list[float]) -> float:
    """The median of the rounds' ratios: within a round the machine's speed hardly changes."""
    return median(time / other for time, other in zip(times, reference, strict=True))


def parse_arguments() -> argparse.Namespace:
    """The arguments, for a CPU."""
    parser = build_benchmark_parser(__doc__, "bench_peers")
    parser.set_defaults(device="cpu")
    parser.add_argument("--data-path", type=Path, help="interactions, a .inter file; random ones by default")
    parser.add_argument("--users", type=int, default=ML_1M_USERS, help="only the first ones")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--length", type=int, default=200, help="L, items of a history that count")
    parser.add_argument("--width", type=int, default=64, help="D")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2, help="heads of attention")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--batch", type=int, default=64, help="rows of a step, and histories ranked at once")
    parser.add_argument("--steps", type=int, default=2, help="training steps in a round")
    parser.add_argument("--histories", type=int, default=256, help="histories ranked in a round")
    args = parse_benchmark_arguments(parser)
    if args.device != "cpu":
        parser.error("--device: the peers are measured on a CPU only")
    return args


def measure_peers(args: argparse.Namespace, frame: pd.DataFrame, folder: Path) -> dict[str, TimedPeer]:
    """All models in turn in every round; the first round warms up and does not count."""
    path = folder / "interactions.npz"
    write_interactions(frame, path)
    names = ("length", "width", "layers", "heads", "dropout", "batch", "threads")
    task = {name: getattr(args, name) for name in names}
    task |= {"data": str(path), "histories": min(args.histories, frame["user"].nunique())}
    with start_workers(args.models, task, folder) as peers:
        for number in range(args.repeats + 1):
            measure_round(peers, args.steps)
            if number == 0:
                for peer in peers.values():
                    peer.training.clear()
                    peer.inference.clear()
    return peers


def measure_round(peers: dict[str, TimedPeer], steps: int) -> None:
    """Each model in turn; one that fails is left out from now on."""
    for model, peer in list(peers.items()):
        try:
            peer.measure(steps)
        except PeerFailed as error:
            print(f"without {model}: {error}")
            del peers[model]


def describe_run(args: argparse.Namespace, frame: pd.DataFrame) -> str:
    """The sizes, and what differs between the libraries."""
    return (
        f"{frame['user'].nunique():,} users, {frame['item'].nunique():,} items, {len(frame):,} interactions; "
        f"D = {args.width}, {args.layers} layers, {args.heads} heads, L = {args.length}, {args.batch} rows a "
        "step, whole softmax; ratios are to the first row. The feed-forward parts are D wide in RecTools and "
        "RePlay, 4 D in M2Rec and RecBole."
    )


def main() -> None:
    """Run the benchmark."""
    args = parse_arguments()
    frame = draw_interactions(args.users) if args.data_path is None else read_interactions(args.data_path)
    frame = frame[frame["user"].isin(frame["user"].unique()[: args.users])]
    with tempfile.TemporaryDirectory() as folder:
        peers = measure_peers(args, frame, Path(folder))
    if not peers:
        raise SystemExit("no model could run")
    reference = next(iter(peers.values()))
    rows = [print_row(make_row(model, peer, reference)) for model, peer in peers.items()]
    versions = {model: peer.versions for model, peer in peers.items()}
    write_benchmark_results(args, rows, describe_run(args, frame), versions=versions)


if __name__ == "__main__":
    main()
