"""Routes that are asked most, answered without the layers of FastAPI, which take longer than a ranking.

FastAPI has these routes too: it describes them, and answers what is not a POST.
"""

import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from m2rec.errors import UserError
from m2rec.serving.http.errors import NOT_JSON, UNREADABLE, RequestError, answer_mistake


class DirectRoute(NamedTuple):
    """A POST whose body is one JSON object."""

    path: str
    body: type[BaseModel]
    endpoint: Callable[[Any], Awaitable[Response]]
    """Takes the body."""


class DirectRoutes:
    """Answers some routes, and hands the other requests over.

    Args:
        app: answers the others.
        routes: what is answered here.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[DirectRoute]) -> None:
        self._app = app
        self._routes = {route.path: route for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        route = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if route is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # as FastAPI does
        try:
            content = await _read_body(receive)
            if content is None:
                return
            answer = await route.endpoint(route.body.model_validate(_parse_json(content)))
        except (UserError, ValidationError, HTTPException) as error:
            answer = answer_mistake(error)
        await answer(scope, receive, send)


async def _read_body(receive: Receive) -> bytes | None:
    """All of the body; None if whoever asked has gone."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _parse_json(content: bytes) -> Any:
    """What FastAPI makes of a body.

    Raises:
        ValueError: it is not JSON, or JSON that Python can't hold.
    """
    try:
        return json.loads(content)
    except json.JSONDecodeError:
        raise RequestError(422, NOT_JSON) from None
    except (ValueError, RecursionError):
        raise RequestError(400, UNREADABLE) from None
