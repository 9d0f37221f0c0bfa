"""How many requests a second the server answers, and how soon.

    python scripts/bench/serve.py                       # an untrained model of 3,416 items
    python scripts/bench/serve.py runs/NAME --checkout=../before
    python scripts/bench/serve.py --soak=600            # both kinds of requests, a reload every 20 s, memory

Connections ask one after the other, each as soon as its last answer is there. The server is `m2rec serve` in
a process of its own, with users on the disk. Of another checkout, too, with `--checkout`: the servers run at
the same time and are asked in turns. CPU seconds of the server say more than seconds on a machine that others
use. The client and the server share the machine.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import NamedTuple

import numpy as np
import psutil
import torch
from benchmarking import (
    ROOT,
    Row,
    build_benchmark_parser,
    parse_benchmark_arguments,
    print_row,
    write_benchmark_results,
)

from m2rec.nn.encoder import Encoder
from m2rec.serving.recommender import Recommender
from m2rec.serving.saved_model import build_saved_model
from m2rec.settings import ModelSettings

ITEMS, LENGTH, TEXT_WIDTH = 3_416, 200, 64
K = 10
USERS = 100
HEADERS = "Host: localhost\r\nContent-Type: application/json"


class Server(NamedTuple):
    """A server in a process of its own."""

    name: str
    port: int
    process: subprocess.Popen[str]
    first_ranking_seconds: float
    """From the line that says that it answers to the first ranking."""

    def read_cpu_seconds(self) -> np.ndarray:
        """CPU seconds so far: of all threads, and of the one that reads requests and writes answers."""
        pid, seconds = self.process.pid, []
        for path in (f"/proc/{pid}/stat", f"/proc/{pid}/task/{pid}/stat"):
            fields = Path(path).read_text().rpartition(")")[2].split()
            seconds.append((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
        return np.array(seconds)


def save_untrained_run(folder: Path) -> Path:
    """Write a model with initial weights of the default settings; returns its folder."""
    torch.manual_seed(0)
    settings = ModelSettings()
    encoder = Encoder(settings, ITEMS + 1, LENGTH, torch.randn(ITEMS + 1, TEXT_WIDTH))
    tokens = ["[PAD]", *map(str, range(1, ITEMS + 1))]
    titles = {token: f"The title of item {token}" for token in tokens[1:]}
    config = {**settings.model_dump(), "MAX_ITEM_LIST_LENGTH": LENGTH, "model": "M2Rec", "dataset": "none"}
    model = build_saved_model(
        encoder,
        tokens,
        titles=titles,
        counts=range(ITEMS + 1),
        config=config,
        text_mean=None,
        text_basis=None,
        text_source={},
    )
    Recommender(model).save(folder)
    return folder


@contextmanager
def start_server(name: str, checkout: Path, run: Path, state: Path) -> Iterator[Server]:
    """The server of a checkout, until the end."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    environment.pop("M2REC_TOKEN", None)
    command = [sys.executable, "scripts/serve.py", str(run), "--port=0", f"--state={state}"]
    process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r":(\d+)/$", process.stdout.readline().strip())
        if found is None:
            raise SystemExit(f"{name}: the server did not start")
        start = perf_counter()
        asyncio.run(ask_for(int(found[1]), 0, 1, iter([build_request("/recommend", {"history": []})])))
        yield Server(name, int(found[1]), process, perf_counter() - start)
    finally:
        process.terminate()
        process.wait()


def build_request(path: str, body: object) -> bytes:
    """The bytes of a request."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\n{HEADERS}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


class Connection(asyncio.Protocol):
    """Sends requests one after the other until the time is over or there are none.

    Args:
        requests: what to send.
        deadline: the last moment to send one; one is always sent.
    """

    def __init__(self, requests: Iterator[bytes], deadline: float) -> None:
        self._requests, self._deadline = requests, deadline
        self._data = b""
        self.latencies: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._transport.close()
            self.done.set_result(None)
            return
        self._start = perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Read an answer, and send the next request when it is whole."""
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.I)
        if not end or length is None or len(body) < int(length[1]):
            return
        now = perf_counter()
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(self._data.decode())
        self.latencies.append(now - self._start)
        self._data = b""
        if now > self._deadline:
            self._requests = iter(())
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        """The server must not hang up."""
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server hung up"))


async def ask_for(port: int, seconds: float, connections: int, requests: Iterator[bytes]) -> list[float]:
    """Seconds of each answer while so many connections ask for so long."""
    loop, deadline = asyncio.get_running_loop(), perf_counter() + seconds
    asking = []
    for _ in range(connections):
        _, protocol = await loop.create_connection(lambda: Connection(requests, deadline), "127.0.0.1", port)
        asking.append(protocol)
    await asyncio.gather(*(one.done for one in asking))
    return [latency for one in asking for latency in one.latencies]


def draw_requests(kind: str, tokens: list[str], length: int, seed: int) -> Iterator[bytes]:
    """Requests without end: rankings after histories of this length, or events of users."""
    draw = np.random.default_rng(seed)
    bodies: list[object] = []
    for number in range(512):
        if kind == "recommend":
            bodies.append({"history": draw.choice(tokens, length).tolist(), "k": K})
        else:
            bodies.append({"user": f"u{draw.integers(USERS)}", "item": tokens[number % len(tokens)], "k": K})
    path = "/recommend" if kind == "recommend" else "/events"
    requests = [build_request(path, body) for body in bodies]
    return (requests[number % len(requests)] for number in count())


def measure_server(server: Server, kind: str, tokens: list[str], args: argparse.Namespace, seed: int) -> Row:
    """One round."""
    requests = draw_requests(kind, tokens, args.length, seed)
    cpu, start = server.read_cpu_seconds(), perf_counter()
    latencies = asyncio.run(ask_for(server.port, args.seconds, args.connections, requests))
    seconds, cpu = perf_counter() - start, server.read_cpu_seconds() - cpu
    return {
        "server": server.name,
        "what": kind,
        "per second": len(latencies) / seconds,
        "median ms": 1e3 * median(latencies),
        "p99 ms": 1e3 * quantiles(latencies, n=100)[-1],
        "CPU ms per request": 1e3 * float(cpu[0]) / len(latencies),
        "of them HTTP": 1e3 * float(cpu[1]) / len(latencies),
    }


async def soak_server(server: Server, tokens: list[str], args: argparse.Namespace) -> Row:
    """Two events and a ranking in turn for `--soak` seconds, with reloads; an answer that failed ends it."""
    events, rankings = (draw_requests(kind, tokens, args.length, 0) for kind in ("events", "recommend"))
    mixed = (next(rankings if number % 3 == 2 else events) for number in count())
    memory: list[float] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(args.reload_seconds or 20)
            memory.append(psutil.Process(server.process.pid).memory_info().rss / 2**20)
            if args.reload_seconds:
                server.process.send_signal(signal.SIGHUP)

    watching = asyncio.create_task(watch())
    latencies = await ask_for(server.port, args.soak, args.connections, mixed)
    watching.cancel()
    return {
        "server": server.name,
        "requests": len(latencies),
        "p99 ms": 1e3 * quantiles(latencies, n=100)[-1],
        "longest ms": 1e3 * max(latencies),
        "reloads": len(memory) if args.reload_seconds else 0,
        "MiB": " ".join(f"{size:.0f}" for size in memory),
    }


def merge_rounds(rounds: list[Row]) -> Row:
    """The median of each figure."""
    merged = dict(rounds[0])
    for name, value in rounds[0].items():
        if isinstance(value, float):
            merged[name] = median(row[name] for row in rounds)
    return merged


def main() -> None:
    """Measure and write the table."""
    parser = build_benchmark_parser(__doc__, "bench_serve")
    parser.add_argument("run", nargs="?", type=Path, help="run folder; default: an untrained model")
    parser.add_argument("--checkout", type=Path, nargs="*", default=[], help="other checkouts to compare")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--length", type=int, default=LENGTH, help="items of a history")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round")
    parser.add_argument(
        "--soak", type=float, default=0.0, help="seconds of mixed requests, instead of rounds"
    )
    parser.add_argument("--reload-seconds", type=float, default=20.0, help="between reloads; 0: none")
    args = parse_benchmark_arguments(parser)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = args.run.resolve() if args.run else save_untrained_run(folder / "run")
        tokens = list(Recommender.load(run).tokens[1:])
        servers = []
        for number, checkout in enumerate([ROOT, *(path.resolve() for path in args.checkout)]):
            name = checkout.name if number else "this"
            state = folder / f"{number}.db"
            servers.append(stack.enter_context(start_server(name, checkout, run, state)))
        rows = []
        if args.soak:
            rows = [print_row(asyncio.run(soak_server(server, tokens, args))) for server in servers]
        for kind in () if args.soak else ("recommend", "events"):
            rounds: dict[str, list[Row]] = {server.name: [] for server in servers}
            for turn in range(args.repeats):
                for server in servers:
                    rounds[server.name].append(measure_server(server, kind, tokens, args, turn))
            for server in servers:
                row = merge_rounds(rounds[server.name])
                row["first ranking ms"] = 1e3 * server.first_ranking_seconds
                rows.append(print_row(row))
    note = f"{args.connections} connections; histories of {args.length} items; load {os.getloadavg()[0]:.1f}"
    write_benchmark_results(args, rows, note)


if __name__ == "__main__":
    main()
