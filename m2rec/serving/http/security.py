"""What stands before every route: who may ask, how much, and what leaves.

The server trusts its machine's own users: on a loopback address without a token it answers whoever names it
by a loopback name. A page of another site can send requests through a browser, but not with JSON's content
type, and it can't read answers unless its own name leads to this machine, so both are checked. Nor may it
make the server work: browsers say that a request is of another site.
"""

import hmac
import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import ip_address
from time import perf_counter
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m2rec.errors import UserError
from m2rec.serving.http.errors import answer_error
from m2rec.serving.http.metrics import Metrics
from m2rec.serving.http.schemas import MAX_BODY_BYTES

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "M2REC_TOKEN"
MIN_TOKEN_LENGTH = 16
OPEN_ROUTES = ("/", "/docs", "/openapi.json", "/healthz")
"""Answered without a token, and to links of other sites: they hold nothing of the run."""
MAX_QUERY_BYTES = 32 * 2**10
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"}
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


def read_token(host: str) -> str:
    """The token of the environment, empty without one.

    Args:
        host: that the server listens on.

    Raises:
        ValueError: it is too short, or missing where others can reach the server.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    is_sendable = token.isascii() and token.isprintable() and token == token.strip()
    if token and (len(token) < MIN_TOKEN_LENGTH or not is_sendable):
        raise UserError(
            f"{TOKEN_VARIABLE}: {len(token)} characters; set at least {MIN_TOKEN_LENGTH} letters or digits"
        )
    if not token and not is_loopback(host):
        raise UserError(
            f"--host: {host} can be reached by others; set {TOKEN_VARIABLE} to a secret that requests must "
            "send, or use 127.0.0.1"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether a name or address, without a port, is the machine itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@lru_cache(64)
def names_loopback(host_header: str) -> bool:
    """Whether a Host header such as `localhost:8000` or `[::1]` names the machine itself."""
    try:
        split = urlsplit(f"//{host_header}")
        has_port_only = split.netloc == host_header and "@" not in host_header
        return has_port_only and is_loopback(split.hostname or "")
    except ValueError:
        return False


class Guard:
    """The outermost layer: checks each request, counts it, and answers what fails.

    Args:
        app: the application.
        token: that requests must bear; empty for none.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, token: str, metrics: Metrics) -> None:
        self.app, self.token, self.metrics = app, token.encode(), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status = perf_counter(), 0

        async def send_secured(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        try:
            refusal = self._find_refusal(scope)
            if refusal:
                await answer_error(*refusal)(scope, receive, send_secured)
            else:
                await self.app(scope, _limit_body(receive), send_secured)
        except Exception:
            logger.exception("%s %s failed", scope["method"], _get_route(scope))
            if not status:
                message = "the server made a mistake; its log says which"
                await answer_error(500, message)(scope, receive, send_secured)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.requests[method, _get_route(scope), status] += 1
        self.metrics.request_seconds.observe(perf_counter() - start)

    def _find_refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and message for a request that must not reach a route."""
        headers, path = _read_headers(scope), scope["path"]
        if len(scope["query_string"]) > MAX_QUERY_BYTES:
            return 414, f"query: {len(scope['query_string']):,} bytes; send at most {MAX_QUERY_BYTES:,}"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > MAX_BODY_BYTES:
            return 413, _BodyTooLargeError().detail
        if scope["method"] == "POST" and path != "/reload" and not _has_json(headers):  # that has no body
            return 415, "Content-Type: not application/json; send JSON with this header"
        if path == "/reload" and not self.token:
            return (
                403,
                f"/reload: needs a token; start the server with {TOKEN_VARIABLE} set, or send it SIGHUP",
            )
        if self.token:
            return None if path in OPEN_ROUTES else self._check_token(headers)
        host = headers.get("host", "")
        if path != "/healthz" and (len(host) > 300 or not names_loopback(host)):
            return 403, f"Host: {host[:60]!r} is not this machine's own name; use 127.0.0.1 or localhost"
        if path not in OPEN_ROUTES and headers.get("sec-fetch-site", "").lower() == "cross-site":
            return 403, "Sec-Fetch-Site: a page of another site asks; type this address into the browser"
        return None

    def _check_token(self, headers: Mapping[str, str]) -> tuple[int, str] | None:
        kind, _, given = headers.get("authorization", "").partition(" ")
        # headers are latin-1
        if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self.token):
            return None
        return 401, f"Authorization: send 'Bearer TOKEN' with the token of the server's {TOKEN_VARIABLE}"


def _read_headers(scope: Scope) -> Mapping[str, str]:
    """Headers by lower-case name; of several the first."""
    pairs = reversed(scope["headers"])
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in pairs}


def _has_json(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def _get_route(scope: Scope) -> str:
    """The route's pattern, not the path, which anyone can choose."""
    return str(getattr(scope.get("route"), "path", "other"))


class _BodyTooLargeError(HTTPException):  # which FastAPI lets through where it reads a body
    def __init__(self) -> None:
        super().__init__(413, f"body: more than {MAX_BODY_BYTES:,} bytes; send less at a time")


def _limit_body(receive: Receive) -> Receive:
    """The same messages, until the bodies are too large together."""
    n_bytes = 0

    async def receive_limited() -> Message:
        nonlocal n_bytes
        message = await receive()
        n_bytes += len(message.get("body", b""))
        if n_bytes > MAX_BODY_BYTES:
            raise _BodyTooLargeError
        return message

    return receive_limited
