"""Open the socket, answer until the process is told to stop, and reload on SIGHUP."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from m2rec.errors import UserError
from m2rec.serving.http.app import build_app
from m2rec.serving.http.service import Service

logger = logging.getLogger(__name__)

BACKLOG = 2048
STOP_SECONDS = 10  # for requests under way when the process is told to stop


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
        ValueError: the address is unknown, not this machine's, or in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"--port: {host}, {port} can't be used ({reason}); give another host or port"
        ) from None


def build_server(service: Service, token: str, announce: Callable[[], None]) -> uvicorn.Server:
    """What answers requests on the sockets that its `run` gets, until SIGINT or SIGTERM.

    Args:
        service: closed at the end.
        token: that requests must bear; empty for none.
        announce: is called when requests are answered.
    """

    def start(service: Service) -> None:
        _reload_on_hangup(service)
        announce()

    config = uvicorn.Config(
        build_app(service, token, start),
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    return uvicorn.Server(config)


def _reload_on_hangup(service: Service) -> None:
    if not hasattr(signal, "SIGHUP") or threading.current_thread() is not threading.main_thread():
        return  # Windows has none, and Python hands signals to the main thread only
    tasks = set()

    async def reload() -> None:
        with suppress(UserError):  # which the log has
            await service.reload()

    def start() -> None:
        task = asyncio.create_task(reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, start)
