"""The server: real requests over a real socket, compared with the Recommender of the same folder."""

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from pydantic import ValidationError

from m2rec.commands import serve as command
from m2rec.serving.formatting import build_json_object
from m2rec.serving.http import new_items, schemas, security, users
from m2rec.serving.http.pages import HtmlPage
from m2rec.serving.recommender import Recommendation, Recommender
from tests import browser
from tests.serving import HISTORY, T0, TOKEN, TOKENS, Client, L, V, as_pairs, save_model, serve
from tests.text_models import save_model as save_language_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with serve(folder) as client:
        yield client


@pytest.fixture(scope="module")
def recommender(folder: Path) -> Recommender:
    return Recommender.load(folder)


def test_rankings_are_those_of_the_recommender(client: Client, recommender: Recommender):
    for body in (
        {"history": HISTORY, "k": 3},
        {"history": [], "k": 2},
        {"history": HISTORY, "exclude_seen": False, "k": V},
        {"history": HISTORY, "candidates": ["i5", "i6", "i9"], "exclude": ["i5", "unknown"]},
        {"history": HISTORY * 9},
    ):
        expected = recommender.recommend(**body)
        assert client.items("POST", "/recommend", body) == as_pairs(expected)
    body = {"history": ["new", *HISTORY], "candidates": ["i5", "newer"], "skip_unknown": True}
    assert client.items("POST", "/recommend", body) == as_pairs(
        recommender.recommend(HISTORY, candidates=["i5"])
    )
    _, content = client.ask("POST", "/recommend", {"history": ["i1"], "candidates": ["i3"]})
    assert content["items"][0]["title"] == "Élan <b>& co</b>"
    assert client.items("GET", "/similar/i3?k=2") == as_pairs(recommender.similar_items("i3", 2))


def test_reasons_stand_beside_each_item(client: Client, recommender: Recommender):
    """By the same ranking and the reasons of GET /explain; also for a user with a long history."""
    long = [TOKENS[1 + k % 30] for k in range(3 * L)]
    for item in long:
        client.items("POST", "/events", {"user": "reader", "item": item, "k": 0})
    live = recommender.session(long).recommend(4)
    new = ["new", *HISTORY]
    for body, expected in (
        ({"history": HISTORY, "k": 4}, recommender.recommend(HISTORY, 4, explain=True)),
        ({"history": new, "skip_unknown": True}, recommender.recommend(HISTORY, explain=True)),
        ({"user": "reader", "k": 4}, recommender.explain_ranking(long, live)),
        ({"history": ["i4"], "k": 2}, recommender.recommend(["i4"], 2, explain=True)),
        ({"history": [], "k": 2}, recommender.recommend([], 2, explain=True)),
    ):
        status, content = client.ask("POST", "/recommend", {**body, "explain": True})
        assert status == 200 and content["items"] == [
            {**build_json_object(entry), "score": pytest.approx(entry.score, abs=1e-4),
             "influences": [{**one._asdict(), "effect": pytest.approx(one.effect, abs=1e-4)}
                            for one in entry.influences],
             "nearest_by_text": [{**one._asdict(), "cosine": pytest.approx(one.cosine, abs=1e-4)}
                                 for one in entry.nearest_by_text]}
            for entry in expected
        ]  # fmt: skip
        assert [entry[:3] for entry in expected[:1]] and expected[0]._fields[:3] == Recommendation._fields
    assert any(entry.influences for entry in recommender.recommend(HISTORY, explain=True))
    client.ask("DELETE", "/users/reader")
    status, content = client.ask("POST", "/recommend", {"user": "reader", "explain": True})
    assert status == 404 and "has no events" in content["error"]
    status, content = client.ask("POST", "/recommend", {"history": ["tea"], "explain": True})
    assert status == 422 and "unknown item 'tea'" in content["error"]


def test_a_user_is_followed(client: Client, recommender: Recommender):
    live = recommender.session()
    for item in HISTORY * 5:
        live.add(item)
        found = client.items("POST", "/events", {"user": "anna/b c", "item": item, "k": 4})
        assert found == as_pairs(live.recommend(4))
    path = "/users/anna%2Fb%20c"
    assert client.items("GET", f"{path}/recommendations?k=2") == as_pairs(live.recommend(2))
    body = {"user": "anna/b c", "candidates": ["i7", "i8"]}
    assert client.items("POST", "/recommend", body) == as_pairs(live.recommend(candidates=["i7", "i8"]))
    assert client.items("POST", "/events", {"user": "anna/b c", "item": "i1", "k": 0}) == []
    assert client.ask("DELETE", path) == (200, {"deleted": 5 * len(HISTORY) + 1})
    assert client.ask("DELETE", path) == (200, {"deleted": 0})
    status, content = client.ask("GET", f"{path}/recommendations")
    assert status == 404 and "POST /events" in content["error"]


def test_a_model_that_needs_the_whole_history_follows_users_too(tmp_path: Path):
    folder = save_model(tmp_path / "run", mixer="attention")
    recommender = Recommender.load(folder)
    assert not users.is_recurrent(recommender)
    with serve(folder) as client:
        for n, item in enumerate(HISTORY, 1):
            found = client.items("POST", "/events", {"user": "u", "item": item})
            assert found == as_pairs(recommender.recommend(HISTORY[:n]))


def test_many_at_once_get_each_their_own(client: Client, recommender: Recommender):
    """Different options, users of whom one comes often, and mistakes among them."""

    def ask(number: int) -> None:
        history, k = TOKENS[1 + number % 30 : 5 + number % 30], 1 + number % 7
        if number % 5 == 0:
            status, content = client.ask("POST", "/recommend", {"history": ["tea"], "k": k})
            assert status == 422 and "unknown item 'tea'" in content["error"]
        elif number % 5 == 1:
            user = f"user {number % 3}"
            assert len(client.items("POST", "/events", {"user": user, "item": history[0], "k": k})) == k
        else:
            keep = number % 2 == 0
            body = {"history": history, "k": k, "exclude_seen": keep}
            expected = recommender.recommend(history, k, keep)
            assert client.items("POST", "/recommend", body) == as_pairs(expected)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(150)))
    deleted = [client.ask("DELETE", f"/users/user%20{n}")[1]["deleted"] for n in range(3)]
    assert sum(deleted) == 30


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/recommend", {"history": ["tea"]}, 422, "history: unknown item 'tea'; remove it"),
        ("POST", "/recommend", {}, 422, "body: give either history or user"),
        ("POST", "/recommend", {"history": [], "user": "a"}, 422, "give either history or user"),
        ("POST", "/recommend", {"history": [], "k": 0}, 422, "k: .*got 0; GET /docs"),
        ("POST", "/recommend", {"history": [], "k": 1001}, 422, "k: .*got 1001"),
        ("POST", "/recommend", {"history": [1]}, 422, "history.0: .*got 1"),
        ("POST", "/recommend", {"history": ["i1"] * 10_001}, 422, "history: .*got 10,001 entries"),
        ("POST", "/recommend", {"history": [], "kk": 1}, 422, "kk: is not a known key; leave it out"),
        ("POST", "/recommend", b"{", 422, "body: is not valid JSON"),
        ("POST", "/recommend", b'{"k": 1' + b"0" * 5000 + b"}", 400, "body"),
        ("POST", "/recommend", b"[" * 100_000, 400, "body"),
        ("POST", "/recommend", b'{"history": ["\\ud800"]}', 422, "history"),
        ("POST", "/recommend", {"user": "nobody"}, 404, "user: has no events; send one by POST /events"),
        ("POST", "/events", {"user": "a", "item": "tea"}, 422, "unknown item 'tea'"),
        ("POST", "/events", {"user": "", "item": "i1"}, 422, "user: "),
        ("POST", "/events", {"user": "a" * 201, "item": "i1"}, 422, "user: "),
        ("GET", "/similar/tea", None, 422, "unknown item 'tea'"),
        ("GET", "/similar/i1?k=x", None, 422, "k: .*got 'x'"),
        ("GET", "/explain", None, 422, "give either history or user"),
        ("GET", "/explain?history=i1&item=tea", None, 422, "items: unknown item 'tea'"),
        ("GET", "/explain?user=nobody", None, 404, "user: has no events"),
        ("GET", "/items?search=", None, 422, "search: "),
        ("GET", "/../../etc/passwd", None, 404, "is not a route; GET /docs lists them"),
        ("GET", "/recommend", None, 405, "is not a route"),
        ("PUT", "/users/a", None, 405, "is not a route"),
        ("GET", "/items?search=" + "a" * 40_000, None, 414, "query: .*at most"),
        ("POST", "/items", {"items": []}, 422, "items: "),
        ("POST", "/items", {"items": [{"item": "n"}]}, 422, "items.0: give either text or vector"),
        ("POST", "/items", {"items": [{"item": "n", "text": "tea"}]}, 409, "text: .*--text-encoder=tiny"),
        ("POST", "/items", {"items": [{"item": "n", "vector": [1.0]}]}, 422, r"expected \(1, 16\)"),
        ("POST", "/items", {"items": [{"item": "i1", "vector": [1.0] * T0}]}, 422, "already in the cat"),
        ("POST", "/items", b'{"items": [{"item": "n", "vector": [NaN]}]}', 422, "items.0.vector.0: .*nan"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_in_one_line(
    client: Client, method: str, path: str, body: object, status: int, message: str
):
    found, content = client.ask(method, path, body)
    assert list(content) == ["error"] and re.search(message, content["error"]), content
    assert found == status and "\n" not in content["error"] and len(content["error"]) < 400


def test_a_body_that_is_too_large_is_not_read(client: Client):
    large = b'{"history": ["' + b"i" * schemas.MAX_BODY_BYTES + b'"]}'
    status, content = client.ask("POST", "/recommend", b"", {"Content-Length": str(len(large))})
    assert status == 413 and "send less" in content["error"]
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:  # its size unsaid
        connection.sendall(
            b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"%x\r\n%s\r\n" % (2**16, b"a" * 2**16)
        with contextlib.suppress(OSError):  # the server has hung up
            for _ in range(schemas.MAX_BODY_BYTES // 2**16 + 2):
                connection.sendall(chunk)
        assert b" 413 " in connection.recv(100)


def test_only_this_machine_is_answered_without_a_token(client: Client):
    for host, status in (
        ("127.0.0.1", 200), ("LOCALHOST:8000", 200), ("[::1]:80", 200), ("127.5.5.5", 200),
        ("evil.example", 403), ("localhost.evil.example", 403), ("evil.example@localhost", 403),
        ("127.0.0.1.evil.example:8000", 403), ("localhost/evil", 403), ("10.0.0.1", 403), ("", 403),
        ("[", 403),
    ):  # fmt: skip
        found, content = client.ask("GET", "/model", headers={"Host": host})
        assert found == status, (host, content)
    assert client.ask("GET", "/healthz", headers={"Host": "probe.internal"}) == (200, {"status": "ok"})


def test_a_page_of_another_site_can_send_nothing(client: Client):
    """What a form can send: these content types, and no other method."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        body = json.dumps({"user": "u", "item": "i1"}).encode()
        status, content = client.ask("POST", "/events", body, {"Content-Type": kind})
        assert status == 415 and "application/json" in content["error"]
    assert client.ask("GET", "/users/u/recommendations")[0] == 404
    _, _, headers = client.ask_raw("OPTIONS", "/events", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in headers


def test_a_page_of_another_site_can_ask_for_nothing(client: Client):
    """What costs, or changes something, is refused; the page may be linked to."""
    cross = {"Sec-Fetch-Site": "cross-site"}
    for method, path in (
        ("GET", "/explain?history=i1&item=i2"), ("GET", "/items?search=tea"), ("GET", "/similar/i1"),
        ("GET", "/users/u/recommendations"), ("DELETE", "/users/u"), ("GET", "/model"), ("GET", "/metrics"),
    ):  # fmt: skip
        status, content = client.ask(method, path, headers=cross)
        assert status == 403 and content["error"].startswith("Sec-Fetch-Site: "), path
        assert client.ask_raw(method, path, headers={"Sec-Fetch-Site": "same-origin"})[0] != 403
    for path in ("/", "/docs", "/healthz"):
        assert client.ask_raw("GET", path, headers=cross)[0] == 200


def test_a_token_is_asked_for(folder: Path):
    with serve(folder, TOKEN) as client:
        assert client.ask("GET", "/model", headers={"Host": "shop.example"})[0] == 200
        assert client.ask("POST", "/reload")[0] == 200
        for wrong in ("", TOKEN[:-1], TOKEN + "x", "ü" * 20):
            headers = {"Authorization": f"Bearer {wrong}".encode().decode("latin-1")}
            for path in ("/model", "/docs/", "/metrics", "/items?search=tea", "/nothing"):
                status, content = client.ask("GET", path, headers=headers)
                assert status == 401 and "M2REC_TOKEN" in content["error"]
            assert client.ask("POST", "/reload", headers=headers)[0] == 401
            for path in ("/", "/docs", "/openapi.json", "/healthz"):
                assert client.ask_raw("GET", path, headers=headers)[0] == 200


def test_reload_needs_a_token(client: Client):
    status, content = client.ask("POST", "/reload")
    assert status == 403 and "M2REC_TOKEN" in content["error"] and "SIGHUP" in content["error"]


def test_tokens_and_hosts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("M2REC_TOKEN", raising=False)
    assert security.read_token("127.0.0.1") == security.read_token("localhost") == ""
    with pytest.raises(ValueError, match=r"--host: 0\.0\.0\.0 can be reached by others; set M2REC_TOKEN"):
        security.read_token("0.0.0.0")
    monkeypatch.setenv("M2REC_TOKEN", "short")
    with pytest.raises(ValueError, match="M2REC_TOKEN: 5 characters; set at least 16"):
        security.read_token("127.0.0.1")
    monkeypatch.setenv("M2REC_TOKEN", TOKEN)
    assert security.read_token("::") == TOKEN


def test_many_mistakes_in_a_body_are_one():
    for body in (
        {"items": [{"item": "a", "vector": [[]] * 9_000}] * 9},
        {"items": [{"item": "a", "vector": [0.0], **{f"key{n}": 1 for n in range(9_000)}}]},
    ):
        with pytest.raises(ValidationError) as caught:
            schemas.ItemsRequest.model_validate(body)
        assert caught.value.error_count() == 1
    with pytest.raises(ValidationError) as caught:
        schemas.RecommendRequest.model_validate({"history": [1] * 9_000})
    assert caught.value.error_count() == 1


def test_new_items_by_text(tmp_path: Path):
    """A language model in a folder made the run's vectors; the server has it."""
    pytest.importorskip("sentence_transformers")
    name = save_language_model(tmp_path / "bert", "bert")
    from m2rec.text.language_model import TextEncoder
    from m2rec.text.sentence_model import TextEncoderOptions

    encoder = TextEncoder(TextEncoderOptions(name))
    source = {**encoder.fingerprint_fields, **encoder.describe(), "columns": "title category"}
    folder = save_model(tmp_path / "run", text=source)
    other = save_language_model(tmp_path / "other", "bert", seed=1)
    with pytest.raises(ValueError, match="model_sha256"):
        new_items.open_text_encoder(other, Recommender.load(folder))
    with serve(folder, text_encoder=name) as client:
        status, about = client.ask("GET", "/model")
        assert status == 200 and not about["no_texts"] and about["text_form"] == "title. category"
        assert about["learned_gate"] and about["branches"][0] == "temporal"
        text = "toy story. comedy"
        new = [{"item": "new", "title": "Toy story 9", "text": text}]
        assert client.ask("POST", "/items", {"items": new}) == (200, {"added": ["new"]})
        expected = Recommender.load(folder)
        expected.add_items(["new"], encoder.encode([text]))
        assert client.items("GET", "/similar/new") == as_pairs(expected.similar_items("new"))
        history = ["new", "i1"]
        found = client.items("POST", "/recommend", {"history": history})
        assert found == as_pairs(expected.recommend(history))
        assert client.ask("GET", "/items?search=toy")[1]["items"] == [{"item": "new", "title": "Toy story 9"}]


def test_why_there_are_no_new_items(tmp_path: Path):
    lsa = Recommender.load(save_model(tmp_path / "lsa", text={"model": "lsa"}))
    assert "lsa, which is fitted to its own texts" in new_items.describe_abilities(lsa, None).no_texts
    with pytest.raises(ValueError, match="lsa, which is fitted"):
        new_items.open_text_encoder("any", lsa)
    no_text = Recommender.load(save_model(tmp_path / "no", text_in_table=False))
    assert new_items.describe_abilities(no_text, None).no_vectors.endswith("train with text_in_table: true")


def test_reasons_are_exact(client: Client, recommender: Recommender):
    history = ["i4", "i9", "i2", "i9", "i11"]
    query = "&".join(f"history={item}" for item in history)
    status, content = client.ask("GET", f"/explain?{query}&item=i5&n=5")
    assert status == 200
    (reasons,) = content["reasons"]
    (column,) = recommender.to_ids(["i5"])

    def log_probability(items: list[str]) -> float:
        scores = recommender.scores([items])[0].double().numpy()
        return float(scores[column] - np.log(np.exp(scores[1:]).sum()))

    effects = {}
    for left_out in set(history):
        rest = [item for item in history if item != left_out]
        effects[left_out] = log_probability(history) - log_probability(rest)
    expected = sorted(((e, i) for i, e in effects.items() if e > 0), reverse=True)
    found = [(one["effect"], one["item"]) for one in reasons["influences"]]
    assert found == [(pytest.approx(effect, abs=1e-4), item) for effect, item in expected]
    vectors = recommender.model.encoder.vectors.numpy()

    def compare(item: str) -> float:
        a, b = vectors[recommender.to_ids([item])[0]], vectors[column]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    near = sorted(((compare(i), i) for i in set(history) if compare(i) > 0), reverse=True)
    found = [(one["cosine"], one["item"]) for one in reasons["nearest_by_text"]]
    assert found == [(pytest.approx(cosine, abs=1e-5), item) for cosine, item in near]
    events = [(e["item"], pytest.approx(e["weights"])) for e in content["events"]]
    assert events == [(e.item, e.weights) for e in recommender.explain(history)]
    (alone,) = recommender.find_reasons(["i4", "i4"], ["i5"])
    assert alone.influences == []
    long = [TOKENS[1 + k % 30] for k in range(5 * L)]
    (of_long,) = recommender.find_reasons(long, ["i5"], 99)
    assert {one.item for one in of_long.influences} <= set(long[-L:])


def test_metrics_can_be_read(client: Client):
    client.ask("POST", "/recommend", {"history": HISTORY})
    client.ask("GET", "/made/up/path")
    status, content, headers = client.ask_raw("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    values: dict[str, float] = {}
    for line in content.decode().splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) m2rec_\w+ .+", line)
        else:
            found = re.fullmatch(r"(m2rec_\w+(?:\{\w+=.*\})?) ([-+.e\d]+)", line)
            assert found, line
            values[found[1]] = float(found[2])
    assert values['m2rec_requests_total{method="POST",route="/recommend",status="200"}'] >= 1
    assert values['m2rec_requests_total{method="GET",route="other",status="404"}'] >= 1
    assert not any("made" in name for name in values)
    assert values["m2rec_items"] == V - 1
    counted = sum(value for name, value in values.items() if name.startswith("m2rec_requests_total"))
    assert values['m2rec_request_seconds_bucket{le="+Inf"}'] == counted
    assert values["m2rec_request_seconds_count"] == counted


def test_every_route_is_on_the_page_of_routes(client: Client):
    _, schema = client.ask("GET", "/openapi.json")
    status, content, headers = client.ask_raw("GET", "/docs")
    page = content.decode()
    assert status == 200 and "http://" not in page and "https://" not in page
    for path, methods in schema["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in page
    assert {"/recommend", "/events", "/items", "/explain", "/reload", "/metrics"} <= set(schema["paths"])
    assert "integer, 1 to 1,000" in page and "<script" not in page
    assert "script-src 'none'" in headers["content-security-policy"]


def test_the_page_loads_nothing_from_elsewhere(client: Client):
    status, content, headers = client.ask_raw("GET", "/")
    page = content.decode()
    assert status == 200 and headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"https?://|innerHTML|\bsrc=|@import|url\(", page)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert HtmlPage.build(page).policy == policy


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (400, True)])
def test_the_page_in_a_browser(tmp_path: Path, folder: Path, width: int, dark: bool):
    """By keyboard alone: find, add, look why, remove, add a new item; nothing is wider than the window."""
    pytest.importorskip("sentence_transformers")
    name = save_language_model(tmp_path / "bert", "bert")
    from m2rec.text.language_model import TextEncoder
    from m2rec.text.sentence_model import TextEncoderOptions

    encoder = TextEncoder(TextEncoderOptions(name))
    run = save_model(tmp_path / "run", text={**encoder.fingerprint_fields, **encoder.describe()})
    with serve(run, text_encoder=name) as client:
        page = browser.Browser(tmp_path / "profile", width, 900, dark)
        try:
            _walk_through(page, client)
        finally:
            page.close()
        assert page.problems == []


def _walk_through(page: browser.Browser, client: Client) -> None:
    page.open(f"http://127.0.0.1:{client.port}/")
    page.wait_for("document.querySelectorAll('#ranking li').length === 10")
    assert page.evaluate("document.querySelector('#ranking .name').textContent") == "Tea of the year 1939"
    assert page.evaluate("document.getElementById('reasons').disabled")
    page.evaluate("document.getElementById('find').focus()")
    page.press("elan")
    page.wait_for("document.querySelectorAll('#found li').length === 1")
    page.press("Enter")
    page.wait_for("document.querySelectorAll('#weights li').length === 1")
    page.press("tea of")
    page.wait_for("document.querySelectorAll('#found li').length > 2")
    page.press("ArrowDown", "ArrowDown", "ArrowUp", "Enter")
    page.wait_for("document.querySelectorAll('#weights li').length === 2")
    names = page.evaluate("[...document.querySelectorAll('#history .name')].map((e) => e.textContent)")
    assert names[1] == "Élan <b>& co</b>" and names[0].startswith("Tea of the year")
    tokens = page.evaluate("tokensOf()")
    shown = page.evaluate("[...document.querySelectorAll('#ranking .name')].map((e) => e.textContent)")
    _, expected = client.ask("POST", "/recommend", {"history": tokens})
    assert shown == [entry["title"] for entry in expected["items"]]
    page.evaluate("document.querySelector('#ranking button').focus()")
    page.press("Enter")
    page.wait_for("document.querySelectorAll('.why p').length === 2")
    one = page.evaluate("document.querySelector('.why').textContent")
    assert one.startswith(("Because of ", "No item of the history raises it.")), one
    page.press("Enter")
    page.wait_for("document.querySelector('.why').hidden")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "false"
    page.evaluate("document.getElementById('reasons').focus()")
    page.press(" ")
    page.wait_for("document.querySelectorAll('.why:not([hidden])').length === 10")
    assert page.evaluate("document.querySelector('.why').textContent") == one
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.querySelector('#reasons').getAttribute('aria-pressed')") == "true"
    page.evaluate("document.querySelector('#history button').focus()")
    page.press(" ")
    page.wait_for("document.querySelectorAll('#weights li').length === 1")
    for field, text in (("token", "new-1"), ("name", "Toy story 9"), ("text", "a toy story")):
        page.evaluate(f"document.getElementById('new-{field}').focus()")
        page.press(text)
    page.press("Tab", "Enter")
    page.wait_for("document.getElementById('new-done').textContent.includes('is in the catalogue')")
    assert "new-1" in client.service.recommender.model.ids
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(15, 19, 24)" if dark else "rgb(255, 255, 255)")
    assert page.evaluate("document.getElementById('problem').hidden")


def test_what_the_command_refuses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("M2REC_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            ([str(folder), "--host=0.0.0.0", "--port=0"], "set M2REC_TOKEN"),
            ([str(folder), f"--port={port}"], "give another host or port"),
            ([str(folder), "--port=70000"], "give a number from 0 to 65535"),
            ([str(folder), "--port=0", "--max-users=1"], "expected a whole number from 100, got 1"),
            ([str(tmp_path / "none"), "--port=0"], "none"),
            ([str(folder), "--port=0", f"--state={tmp_path}"], "--state: "),
        ):
            assert command.main(arguments) == 2
            said = capsys.readouterr().err
            assert said.startswith("serve.py: error: ") and message in said and said.count("\n") == 1
