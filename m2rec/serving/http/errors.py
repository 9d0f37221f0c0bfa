"""Mistakes of a request, and how they are answered."""

import json
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from m2rec.errors import UserError

NOT_JSON = "body: is not valid JSON; send an object as GET /docs shows it"
UNREADABLE = "body: can't be read as JSON; send an object as GET /docs shows it"
_MAX_VALUE = 60  # characters of a wrong value in a message
_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not a known key; leave it out",
    "json_invalid": "is not valid JSON",
}


class RequestError(UserError):
    """A mistake in a request.

    Args:
        status: of the answer.
        message: key, value, cure.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def answer_json(content: Any, status: int = 200) -> Response:
    """JSON in ASCII, which holds any string that Python does."""
    return Response(_encode(content).encode(), status, media_type="application/json")


def answer_error(status: int, message: str) -> Response:
    """What is wrong, in one line."""
    answer = answer_json({"error": message}, status)
    if status == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    if status == 503:
        answer.headers["Retry-After"] = "1"
    return answer


def answer_mistake(error: Exception) -> Response:
    """The answer to what is wrong with a request; any other error is raised again."""
    if isinstance(error, UserError):
        return answer_error(getattr(error, "status", 422), str(error))
    if isinstance(error, ValidationError | RequestValidationError):
        return answer_error(422, describe_validation_errors(error.errors()))
    if isinstance(error, HTTPException):
        # FastAPI can't parse what Python's JSON can't
        return answer_error(error.status_code, UNREADABLE if error.status_code == 400 else str(error.detail))
    raise error


def describe_validation_errors(errors: Sequence[Any]) -> str:
    """The first mistake that pydantic found, as key, problem, value."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    kind = first["type"]
    if kind == "json_invalid":
        return NOT_JSON
    problem = _WORDS.get(kind, first["msg"].removeprefix("Value error, "))
    value = (
        "" if kind in ("missing", "extra_forbidden", "value_error") else f", got {_shorten(first['input'])}"
    )
    rest = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{place or 'body'}: {problem}{value}{rest}; GET /docs shows what is expected"


def _shorten(value: object) -> str:
    if isinstance(value, list | dict):
        return f"{len(value):,} entries"
    if isinstance(value, int) and abs(value) > 10**_MAX_VALUE:
        return "a very large number"
    text = repr(value)
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"
