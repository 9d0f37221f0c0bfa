"""Requests that mean no good: made from the description of the routes, with wrong values in any place."""

import json
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving import T0, TOKENS, Client, save_model, serve

Draw = Callable[[st.SearchStrategy[Any]], Any]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(TOKENS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
odd_values = st.sampled_from([
    "", " ", "\0", "\ud800", "i1" * 200, "../../etc/passwd", "%00",
    "<script>", "' OR 1=1; --", "\u0131\u0307" * 90,
    -1, 0, 2**63, 10**400, -(10**400), 1e308, float("nan"), float("-inf"), True, None, {}, [], [[]], [None],
    ["i1"] * 300, {"a": {"b": []}}, {str(k): k for k in range(30)}, [0.3] * T0, [3e38] * T0,
])  # fmt: skip
raw_bodies = st.binary(max_size=60) | st.sampled_from([
    b"", b"{", b"null", b"[" * 2_000, b'{"k": 1' + b"0" * 5_000 + b"}", b'{"history": ["\\ud800"]}',
    b'{"history": [], "history": 1}', b"\xff\xfe{}", b'\xef\xbb\xbf{"history": []}',
])  # fmt: skip


class Request(NamedTuple):
    """What is sent."""

    method: str
    target: str
    body: bytes | None
    headers: dict[str, str]


def draw_value(draw: Draw, schema: Mapping[str, Any], parts: Mapping[str, Any], oddity: int) -> Any:
    """A value of a JSON schema; one in `oddity` is another one."""
    if draw(st.integers(1, oddity)) == 1:
        return draw(odd_values | json_values)
    if "$ref" in schema:
        return draw_value(draw, parts[schema["$ref"].rpartition("/")[2]], parts, oddity)
    if "anyOf" in schema:
        return draw_value(draw, draw(st.sampled_from(schema["anyOf"])), parts, oddity)
    kind = schema.get("type")
    if kind == "object":
        known, needed = schema.get("properties", {}), schema.get("required", [])
        chosen = draw(st.sets(st.sampled_from(sorted(known)))) | set(needed) if known else set()
        return {key: draw_value(draw, known[key], parts, oddity) for key in sorted(chosen)}
    if kind == "array":
        return [draw_value(draw, schema["items"], parts, oddity) for _ in range(draw(st.integers(0, 4)))]
    return draw({
        "string": st.sampled_from([*TOKENS[1:], "anna", "tea"]),
        "integer": st.integers(0, 1_001),
        "number": st.floats(-2, 2),
        "boolean": st.booleans(),
        "null": st.none(),
    }[kind])  # fmt: skip


def as_text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode()


@st.composite
def requests(draw: Draw, schema: Mapping[str, Any]) -> Request:
    """A request to a route, or to something like one."""
    parts = schema["components"]["schemas"]
    path = draw(st.sampled_from(sorted(schema["paths"])))
    method, route = draw(st.sampled_from(sorted(schema["paths"][path].items(), key=str)))
    query = []
    for one in route.get("parameters", []):
        value = draw_value(draw, one["schema"], parts, 4)
        if one["in"] == "path":
            path = path.replace(f"{{{one['name']}}}", urllib.parse.quote(as_text(value)[:300], safe=""))
        elif draw(st.booleans()):
            values = value if isinstance(value, list) else [value]
            query += [(one["name"], as_text(entry)) for entry in values]
    target = path + ("?" + urllib.parse.urlencode(query) if query else "")
    if draw(st.integers(1, 20)) == 1:
        target += "".join(f"%{byte:02x}" for byte in draw(st.binary(max_size=12)))
    body = None
    if "requestBody" in route:
        content = draw_value(draw, route["requestBody"]["content"]["application/json"]["schema"], parts, 8)
        body = draw(raw_bodies) if draw(st.integers(1, 8)) == 1 else json.dumps(content).encode()
    headers = draw(st.sampled_from([{}] * 8 + [
        {"Content-Type": "text/plain"}, {"Content-Type": "application/json; charset=latin-1"},
        {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Content-Length": "-1"},
        {"Authorization": "Bearer \xff"}, {"Expect": "100-continue"}, {"Accept-Encoding": "gzip"},
    ]))  # fmt: skip
    if draw(st.integers(1, 20)) == 1:
        method = draw(st.sampled_from(["put", "patch", "options", "head", "trace", "delete"]))
    return Request(method.upper(), target, body, headers)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serve(save_model(tmp_path_factory.mktemp("runs") / "run")) as client:
        yield client


def check_requests(client: Client, n: int) -> None:
    """Each of n requests is answered, with JSON where there is a mistake, and never by a mistake of ours."""
    _, schema = client.ask("GET", "/openapi.json")
    seen: set[int] = set()

    @settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(requests(schema))
    def check(request: Request) -> None:
        status, content, headers = client.ask_raw(*request)
        seen.add(status)
        assert status < 500, (request, content)
        is_bare = request.method == "HEAD" or not headers.get("content-type", "").startswith(
            "application/json"
        )
        if status >= 400 and not is_bare:
            assert list(json.loads(content)) == ["error"], (request, content)

    check()
    assert {200, 422} <= seen
    assert client.ask("POST", "/recommend", {"history": ["i1"]})[0] == 200


def test_no_request_breaks_the_server(client: Client):
    check_requests(client, 80)


@pytest.mark.slow
def test_no_request_of_ten_thousand_breaks_the_server(client: Client):
    check_requests(client, 10_000)


keys = st.sampled_from([
    "history", "user", "k", "item", "items", "candidates", "exclude", "exclude_seen", "skip_unknown",
    "vector",
])  # fmt: skip
bodies = st.dictionaries(keys, json_values, max_size=4).map(lambda body: json.dumps(body).encode())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["/recommend", "/events", "/items", "/reload"]), bodies | st.binary(max_size=60))
def test_no_body_breaks_the_server(client: Client, path: str, body: bytes):
    status, content = client.ask("POST", path, body)
    assert status == 200 or (400 <= status < 500 and list(content) == ["error"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["/similar/", "/users/", "/items?search=", "/explain?history=", "/explain?user=", "/"]),
    st.binary(max_size=12),
)
def test_no_path_breaks_the_server(client: Client, path: str, rest: bytes):
    quoted = "".join(f"%{byte:02x}" for byte in rest)
    status, content, _ = client.ask_raw("GET", path + quoted)
    assert status in (200, 404, 405, 422) and (b"error" in content or status == 200)
