"""The server's state: users and items survive reloads, failures and kills, and nothing is half done."""

import asyncio
import http.client
import itertools
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from m2rec.nn.encoder import Encoder
from m2rec.run_folder import RunFolder
from m2rec.serving.http import batching, errors, service
from m2rec.serving.http.batching import Batcher
from m2rec.serving.http.jobs import AddEvent, Options, RankHistory, StoredEvent, Worker
from m2rec.serving.http.store import MAX_EVENTS, Event, Store
from m2rec.serving.http.users import LiveUsers
from m2rec.serving.recommender import Recommender
from tests.serving import HISTORY, T0, TOKEN, TOKENS, Client, V, as_pairs, save_model, serve

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    return Recommender.load(save_model(tmp_path_factory.mktemp("runs") / "first"))


def test_jobs_that_wait_are_worked_on_together():
    """While the first batch is under way the others wait, and then go together."""
    release, batches = threading.Event(), []

    def work(jobs: list[int]) -> list[int | Exception]:
        batches.append(list(jobs))
        release.wait(30)
        return [ValueError("seven") if job == 7 else -job for job in jobs]

    async def run() -> list[int | BaseException]:
        batcher = Batcher(work, lambda size: None)
        tasks = [asyncio.create_task(batcher.submit(0))]
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(batcher.submit(job)) for job in range(1, 10)]
        await asyncio.sleep(0.05)
        release.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()
        return answers

    answers = asyncio.run(run())
    assert batches == [[0], list(range(1, 10))]
    assert str(answers[7]) == "seven" and answers[:3] == [0, -1, -2]


def test_too_many_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batching, "MAX_WAITING", 2)
    release = threading.Event()

    def work(jobs: list[int]) -> list[int]:
        release.wait(30)
        return jobs

    async def run() -> None:
        batcher = Batcher(work, lambda size: None)
        tasks = [asyncio.create_task(batcher.submit(0))]
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(batcher.submit(job)) for job in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(errors.RequestError, match="wait already") as caught:
            await batcher.submit(3)
        assert caught.value.status == 503
        release.set()
        assert await asyncio.gather(*tasks) == [0, 1, 2]
        await batcher.close()

    asyncio.run(run())


def test_reload_under_load_drops_nothing(tmp_path: Path):
    """The folder changes ten times, once in three to a broken one, while users and histories are ranked."""
    models = [save_model(tmp_path / f"run{seed}", seed) for seed in (1, 2)]
    broken = tmp_path / "broken"
    shutil.copytree(models[0], broken)
    (broken / "model.safetensors").write_bytes((models[0] / "model.safetensors").read_bytes()[:-9])
    link = tmp_path / "current"
    link.symlink_to(models[0])
    expected = [dict(as_pairs(Recommender.load(model).recommend(HISTORY))) for model in models]
    failures: list[object] = []
    stop = threading.Event()

    def load(client: Client, number: int) -> int:
        n_events = 0
        while not stop.is_set():
            status, content = client.ask("POST", "/recommend", {"history": HISTORY})
            if status != 200 or {i["item"]: i["score"] for i in content["items"]} not in expected:
                failures.append(content)
            body = {"user": f"u{number}", "item": TOKENS[1 + n_events % 30], "k": 1}
            if client.ask("POST", "/events", body)[0] != 200:
                failures.append(body)
            n_events += 1
        return n_events

    with serve(link, TOKEN, state=tmp_path / "users.db") as client, ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load, client, number) for number in range(4)]
        for turn in range(10):
            target = [*models, broken][turn % 3]
            other = tmp_path / "next"
            other.symlink_to(target)
            other.replace(link)
            status, content = client.ask("POST", "/reload")
            if target == broken:
                assert status == 409 and content["error"].endswith("; the old model stays"), content
            else:
                assert status == 200 and content["run"] == target.name
                assert dict(client.items("POST", "/recommend", {"history": HISTORY})) == expected[turn % 3]
        stop.set()
        n_events = [one.result() for one in loads]
        assert not failures and min(n_events) > 0
        last = Recommender.load(models[0])  # the tenth
        for number, n in enumerate(n_events):
            live = last.session([TOKENS[1 + k % 30] for k in range(n)])
            assert client.items("GET", f"/users/u{number}/recommendations") == as_pairs(live.recommend())
        text = client.ask_raw("GET", "/metrics")[1].decode()
        assert 'm2rec_reloads_total{result="done"} 7' in text
        assert 'm2rec_reloads_total{result="failed"} 3' in text


def test_after_a_reload_the_old_model_leaves_memory(tmp_path: Path):
    """Also the states of users who do not come back, and the search for titles."""
    folder = save_model(tmp_path / "run")
    with serve(folder, TOKEN) as client:
        assert client.service is not None
        for user in "abc":
            client.items("POST", "/events", {"user": user, "item": "i4"})
        client.ask("GET", "/items?search=tae")
        tables = []
        for _ in range(3):
            tables.append(weakref.ref(client.service.recommender.model.table))
            assert client.ask("POST", "/reload")[0] == 200
        assert [table() for table in tables] == [None] * 3
        assert "m2rec_users_in_memory 3" in client.ask_raw("GET", "/metrics")[1].decode()
        expected = Recommender.load(folder).session(["i4"]).recommend()
        assert client.items("GET", "/users/b/recommendations") == as_pairs(expected)


def test_a_link_is_followed_once_per_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It changes while the files are read, and again before it is asked what is served."""
    models = [save_model(tmp_path / f"run{seed}", seed) for seed in (1, 2)]
    link = tmp_path / "current"
    link.symlink_to(models[0])

    def turn() -> None:
        other = tmp_path / "next"
        other.symlink_to(models[1] if link.resolve() == models[0] else models[0])
        other.replace(link)

    read_tokens = RunFolder.read_tokens

    def turn_and_read(files: RunFolder) -> Any:
        turn()
        return read_tokens(files)

    with serve(link, TOKEN) as client:
        for number in (0, 1, 0):
            expected = as_pairs(Recommender.load(models[number]).recommend(HISTORY))
            assert client.items("POST", "/recommend", {"history": HISTORY}) == expected
            turn()
            assert client.ask("GET", "/model")[1]["run"] == models[number].name
            with monkeypatch.context() as patch:
                patch.setattr(RunFolder, "read_tokens", turn_and_read)
                assert client.ask("POST", "/reload")[0] == 200
            turn()


def test_a_model_without_finite_scores_is_not_taken(tmp_path: Path):
    folder = save_model(tmp_path / "run")
    with serve(folder, TOKEN) as client:
        recommender = Recommender.load(folder)
        encoder: Encoder = recommender.model.encoder
        encoder.id_embedding.weight.data[3] = float("nan")
        before = client.items("POST", "/recommend", {"history": HISTORY})
        recommender.save(folder)
        status, content = client.ask("POST", "/reload")
        assert status == 409 and "not finite" in content["error"]
        assert client.items("POST", "/recommend", {"history": HISTORY}) == before


def test_a_reload_keeps_users_and_added_items(tmp_path: Path):
    """The new run has fewer items: those that it lacks are skipped, and count again with the old one."""
    folder = save_model(tmp_path / "run")
    vector = np.random.default_rng(0).normal(size=T0).tolist()
    with serve(folder, TOKEN) as client:
        new = [{"item": "new", "title": "Autumn tea", "vector": vector}]
        assert client.ask("POST", "/items", {"items": new}) == (200, {"added": ["new"]})
        for item in ("i39", "new", "i2"):
            client.items("POST", "/events", {"user": "u", "item": item})
        before = client.items("GET", "/users/u/recommendations")
        shutil.rmtree(folder)
        save_model(folder, n_items=V - 1)
        status, content = client.ask("POST", "/reload")
        assert status == 200 and content["items"] == V - 1 and content["added_items"] == 1
        live = client.service.recommender.session(["new", "i2"])
        assert client.items("GET", "/users/u/recommendations") == as_pairs(live.recommend())
        shutil.rmtree(folder)
        save_model(folder)
        assert client.ask("POST", "/reload")[0] == 200
        assert client.items("GET", "/users/u/recommendations") == [
            (item, pytest.approx(score, abs=1e-4)) for item, score in before
        ]
        shutil.rmtree(folder)
        save_model(folder, text={"model": "another"})
        status, content = client.ask("POST", "/reload")
        assert status == 200 and content["added_items"] == 0


class Process:
    """The command in a process of its own."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "scripts/serve.py", *map(str, arguments), "--port=0"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/$", line.strip())
        assert found, line + self.process.stdout.read()
        self.client = Client(int(found[1]))

    def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.communicate(timeout=60)


def test_killed_under_load_and_started_again(tmp_path: Path):
    """Every event and item that was acknowledged is there, in its user's order; SIGHUP reloads."""
    folder = save_model(tmp_path / "run")
    state = tmp_path / "users.db"
    server = Process(folder, f"--state={state}")
    vector = np.random.default_rng(0).normal(size=T0).tolist()
    new = [{"item": "new", "title": "Autumn tea", "vector": vector}]
    assert server.client.ask("POST", "/items", {"items": new})[0] == 200
    acknowledged: dict[str, list[str]] = {f"u{n}": [] for n in range(8)}

    def send(user: str) -> None:
        number = int(user[1:])
        while True:
            item = ["new", *TOKENS[1:]][(number + 7 * len(acknowledged[user])) % V]
            try:
                status, _ = server.client.ask("POST", "/events", {"user": user, "item": item, "k": 1})
            except (OSError, ValueError, http.client.HTTPException):  # the server is gone
                return
            assert status == 200
            acknowledged[user].append(item)

    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(send, user) for user in acknowledged]
        deadline = time.monotonic() + 60
        while sum(map(len, acknowledged.values())) < 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        server.end(signal.SIGKILL)
        for one in sent:
            one.result()
    assert sum(map(len, acknowledged.values())) >= 200
    assert state.stat().st_mode & 0o077 == 0
    store, kept = Store(state), {}
    for user, items in acknowledged.items():
        kept[user], n_events = store.read_events(user)
        assert kept[user][: len(items)] == items and n_events == len(kept[user]) <= len(items) + 1
    store.close()

    server = Process(folder, f"--state={state}")
    live = Recommender.load(folder)
    live.add_items(["new"], np.array([vector], dtype=np.float32))
    for user, items in kept.items():
        found = server.client.items("GET", f"/users/{user}/recommendations?k=5")
        assert found == as_pairs(live.session(items).recommend(5))
    with pytest.raises(ValueError, match="another process uses it"):
        Store(state)
    shutil.rmtree(folder)
    save_model(folder, seed=5)
    server.process.send_signal(signal.SIGHUP)
    changed = Recommender.load(folder)
    changed.add_items(["new"], np.array([vector], dtype=np.float32))
    expected = as_pairs(changed.recommend(HISTORY))
    deadline = time.monotonic() + 60
    while server.client.items("POST", "/recommend", {"history": HISTORY}) != expected:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.end(signal.SIGTERM)
    assert server.process.returncode == -signal.SIGTERM
    Store(state).close()  # nobody uses it any more


def test_the_store(tmp_path: Path):
    path = tmp_path / "users.db"
    store = Store(path)
    store.add_events([Event("a", 1, "x"), Event("b", 1, "y"), Event("a", 2, "\ud7ffz")])
    with pytest.raises(errors.RequestError, match="nothing has changed") as caught:
        store.add_events([Event("c", 1, "x"), Event("a", 2, "again")])  # a number twice
    assert caught.value.status == 503
    store.close()
    store = Store(path)
    assert store.read_events("a") == (["x", "\ud7ffz"], 2) and store.read_events("c") == ([], 0)
    assert store.delete_events(["a", "nobody"]) == 2 and store.count_users() == 1
    many = [Event("d", number, f"i{number}") for number in range(1, MAX_EVENTS + 6)]
    store.add_events(many)
    kept, n_events = store.read_events("d")
    assert len(kept) == MAX_EVENTS and kept[0] == "i6" and n_events == MAX_EVENTS + 5
    store.close()
    path.write_text("something else " * 99)
    for bad in (path, tmp_path / "no folder" / "users.db", tmp_path):
        with pytest.raises(ValueError, match=r"^--state: .*; name"):
            Store(bad)
    sqlite3.connect(tmp_path / "other.db").executescript("CREATE TABLE t (a); PRAGMA user_version = 1;")
    with pytest.raises(ValueError, match="made by another program"):
        Store(tmp_path / "other.db")


@pytest.mark.parametrize("is_kept", [True, False])
def test_who_came_longest_ago_leaves_memory(recommender: Recommender, tmp_path: Path, is_kept: bool):
    live = LiveUsers(Store(tmp_path / "users.db" if is_kept else None), max_users=2)
    for user, item in (("a", "i1"), ("b", "i2"), ("a", "i3"), ("c", "i4")):
        live.add_events(recommender, [(user, item)])
    assert len(live) == 2
    a, b = (live.rank(recommender, [user], 3)[0] for user in "ab")
    assert a is not None and as_pairs(a) == as_pairs(recommender.recommend(["i1", "i3"], 3))
    assert (b is not None) is is_kept
    if b is not None:
        assert as_pairs(b) == as_pairs(recommender.recommend(["i2"], 3))
    assert live.read_history("c") == ["i4"] and len(live) <= 2


def test_an_event_that_can_t_be_written_has_not_happened(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
):
    store = Store(None)
    live = LiveUsers(store, max_users=9)
    live.add_events(recommender, [("a", "i1")])

    def fail(events: object) -> None:
        raise errors.RequestError(503, "--state: can't be written")

    with monkeypatch.context() as patch:
        patch.setattr(store, "add_events", fail)
        with pytest.raises(errors.RequestError):
            live.add_events(recommender, [("a", "i2"), ("b", "i2")])
    live.add_events(recommender, [("a", "i3")])
    (found,) = live.rank(recommender, ["a"], 3)
    assert found is not None and as_pairs(found) == as_pairs(recommender.recommend(["i1", "i3"], 3))
    assert live.read_history("a") == ["i1", "i3"] and live.read_history("b") == []


def test_an_event_that_is_stored_is_said_to_be(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Neither a state that can't be advanced nor a ranking that fails makes it an error."""
    live = LiveUsers(Store(None), max_users=9)
    worker = Worker(lambda: recommender, live)
    options = Options()
    jobs = [AddEvent("a", "i1", 3, options), AddEvent("b", "i2", 0, options), AddEvent("a", "i3", 3, options)]

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Recommender, "add_events", fail)
        first, nothing, last = worker.answer(jobs)
        assert nothing == StoredEvent([]) and as_pairs(last.ranking) == as_pairs(
            recommender.recommend(["i1", "i3"], 3)
        )
        patch.setattr(Recommender, "recommend_sessions", fail)
        history = RankHistory(("i1", "i3"), 3, options)
        first, second, ranking = worker.answer([jobs[0], AddEvent("b", "i2", 3, options), history])
        assert first == second == StoredEvent([], first.warning) and first.warning.startswith(
            "the event is stored, don't send it again"
        )
        assert as_pairs(ranking) == as_pairs(last.ranking)  # others are answered
    assert live.read_history("a") == ["i1", "i3", "i1"] and live.read_history("b") == ["i2", "i2"]
    (after,) = worker.answer([AddEvent("a", "i4", 3, options)])
    assert as_pairs(after.ranking) == as_pairs(recommender.recommend(["i1", "i3", "i1", "i4"], 3))
    assert not after.warning and "out of memory" in caplog.text


def test_what_fails_before_it_is_stored_fails_alone(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
):
    store = Store(None)
    worker = Worker(lambda: recommender, LiveUsers(store, max_users=9))
    read = store.read_events

    def read_or_fail(user: str) -> Any:
        if user == "b":
            raise RuntimeError("damaged")
        return read(user)

    with monkeypatch.context() as patch:
        patch.setattr(store, "read_events", read_or_fail)
        a, b, c = worker.answer([AddEvent(user, "i1", 3, Options()) for user in "abc"])
    assert len(a.ranking) == len(c.ranking) == 3 and str(b) == "damaged"
    assert [read(user)[1] for user in "abc"] == [1, 0, 1]


def test_few_requests_of_new_items_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service, "MAX_CHANGES", 2)
    with serve(save_model(tmp_path / "run")) as client, ThreadPoolExecutor(8) as pool:
        assert client.service is not None
        release = threading.Event()
        client.service._changes.submit(release.wait, 60)  # the first to change the model

        def add(number: int) -> tuple[int, Any]:
            return client.ask("POST", "/items", {"items": [{"item": f"n{number}", "vector": [0.3] * T0}]})

        asked = [pool.submit(add, number) for number in range(6)]
        answers = [one.result() for one in itertools.islice(as_completed(asked), 4)]
        assert {status for status, _ in answers} == {503}
        assert all("send this one again later" in content["error"] for _, content in answers)
        release.set()
        assert sorted(one.result()[0] for one in asked) == [200, 200, 503, 503, 503, 503]
        assert client.service.n_added == 2 and add(9)[0] == 200


def test_one_model_answers_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The run changes to one without an item between the request and its ranking."""
    folder = save_model(tmp_path / "run")
    smaller = Recommender.load(save_model(tmp_path / "smaller", n_items=V - 1))
    with serve(folder) as client:
        assert client.service is not None
        submit, larger = client.service._batcher.submit, client.service.recommender

        async def change_and_submit(job: Any) -> Any:
            client.service.recommender = smaller
            return await submit(job)

        for item in ("i39", "i5", "i39"):
            client.items("POST", "/events", {"user": "u", "item": item})
        monkeypatch.setattr(client.service._batcher, "submit", change_and_submit)
        body = {"history": ["i39", "i5"], "candidates": ["i39", "i6"], "skip_unknown": True}
        expected = as_pairs(smaller.recommend(["i5"], candidates=["i6"]))
        assert client.items("POST", "/recommend", body) == expected
        client.service.recommender = larger
        status, content = client.ask("GET", "/explain?user=u&item=i6")
        assert status == 200 and [event["item"] for event in content["events"]] == ["i5"]
        client.service.recommender = larger
        body = {"user": "u", "candidates": ["i39", "i6"], "skip_unknown": True, "explain": True}
        status, content = client.ask("POST", "/recommend", body)
        assert status == 200 and [entry["item"] for entry in content["items"]] == ["i6"]


def test_an_item_is_there_once_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not before, nor one whose scores are not finite."""
    with serve(save_model(tmp_path / "run")) as client:

        def add(item: str, value: float) -> tuple[int, Any]:
            return client.ask("POST", "/items", {"items": [{"item": item, "vector": [value] * T0}]})

        assert client.service is not None
        store = client.service._store
        status, answer = add("huge", 3e38)
        assert status == 422 and "the text vector of 'huge' is too large" in answer["error"]

        def fail(items: object) -> None:
            raise errors.RequestError(503, "--state: can't be written")

        with monkeypatch.context() as patch:
            patch.setattr(store, "add_items", fail)
            assert add("tea", 0.3)[0] == 503
        for item in ("huge", "tea"):
            assert client.ask("POST", "/events", {"user": "a", "item": item})[0] == 422
        assert client.service.n_added == 0 and not store.read_items()
        assert add("tea", 0.3) == (200, {"added": ["tea"]}) and client.service.n_added == 1
        assert client.ask("POST", "/events", {"user": "a", "item": "tea"})[0] == 200


def test_questions_for_nobody_push_out_nobody(recommender: Recommender):
    live = LiveUsers(Store(None), max_users=2)
    live.add_events(recommender, [("anna", "i1")])
    for number in range(9):
        with pytest.raises(ValueError, match="zzz"):
            live.rank(recommender, [f"ghost{number}", "anna"], 3, candidates=["zzz"])
    live.add_events(recommender, [("b", "i2")])
    assert len(live) == 2 and live.read_history("anna") == ["i1"]
