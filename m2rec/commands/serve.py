"""Serve a trained run over HTTP: python scripts/serve.py runs/NAME --port=8000 --state=users.db

The page for people is at /, the routes are at /docs. Without a token only this machine is served.
--host=0.0.0.0 serves others, who must send the token that the variable M2REC_TOKEN holds.
SIGHUP, or POST /reload, reads the run folder again, so RUN may be a link that has been changed.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from m2rec.cli import Parser, add_recommender_options, run_command, write_escaped
from m2rec.errors import UserError
from m2rec.serving.hub_name import SOURCE_HELP, parse_source

MIN_USERS = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    return run_command("serve", lambda: serve(parse_options(arguments)))


def serve(options: argparse.Namespace) -> None:
    """Load the run and answer requests until the process is told to stop."""
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise UserError(f"serve: needs {package}; run: pip install fastapi uvicorn")
    from m2rec.serving.http.security import read_token
    from m2rec.serving.http.server import build_server, open_socket
    from m2rec.serving.http.service import Service, ServiceOptions

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    # a line for each visitor without a history would say nothing
    logging.getLogger("m2rec.serving.arguments").setLevel(logging.ERROR)
    token = read_token(options.host)
    with open_socket(options.host, options.port) as listener:
        service = Service(
            ServiceOptions(
                options.run,
                options.state,
                options.text_encoder,
                options.device,
                options.precision,
                options.max_users,
            )
        )
        host = f"[{options.host}]" if ":" in options.host else options.host
        port = listener.getsockname()[1]
        line = f"{options.run} is served at http://{host}:{port}/\n"
        server = build_server(service, token, lambda: write_escaped(line, sys.stdout))
        server.run(sockets=[listener])


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser("serve", __doc__)
    add = parser.add_argument
    add("run", type=parse_source, help=SOURCE_HELP)
    add("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
    add("--port", type=int, default=8000, help="0 for any free one; default: 8000")
    add(
        "--state",
        type=Path,
        metavar="FILE",
        help="SQLite file that keeps users and added items; default: memory, which ends with the server",
    )
    add(
        "--text-encoder",
        default="",
        metavar="MODEL",
        help="the run's language model, a folder or a name on the hub, for new items by text",
    )
    add("--max-users", type=int, default=10_000, help="users whose state is in memory; default: 10000")
    add_recommender_options(parser)
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 65_536:
        parser.error(f"--port: {options.port} is not a port; give a number from 0 to 65535")
    if options.max_users < MIN_USERS:
        parser.error(f"--max-users: expected a whole number from {MIN_USERS}, got {options.max_users}")
    return options
