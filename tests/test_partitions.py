"""Recommendations for the partitions of a cluster are those of a Recommender in one process."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from m2rec import Recommender, recommend_partitions
from m2rec.serving import partitions
from tests.serving import save_model


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(save_model(tmp_path / "model"))


def build_histories(run: str, n: int) -> pd.DataFrame:
    tokens = Recommender.load(run).tokens[1:]
    rng = np.random.default_rng(0)
    histories = [rng.choice(tokens, size=1 + i % 5).tolist() for i in range(n)]
    return pd.DataFrame({"user": [f"u{i}" for i in range(n)], "history": histories, "country": "x"})


def rank_directly(run: str, frame: pd.DataFrame, k: int) -> list[list[str]]:
    histories = [[str(token) for token in history] for history in frame["history"]]
    rankings = Recommender.load(run).recommend_batch(histories, k)
    return [[entry.item for entry in ranking] for ranking in rankings]


def test_a_frame_and_an_iterator_of_frames(run: str):
    frame = build_histories(run, 7)
    frame.index = pd.Index([10, 11, 11, 11, 14, 15, 16])
    expected = rank_directly(run, frame, 3)
    found = recommend_partitions(frame, run, k=3)
    assert list(found) == ["user", "items", "scores"] and found.index.equals(frame.index)
    assert found["user"].tolist() == frame["user"].tolist()
    assert found["items"].tolist() == expected
    assert all(len(scores) == 3 and scores == sorted(scores, reverse=True) for scores in found["scores"])
    parts = list(recommend_partitions(iter([frame[:4], frame[4:4], frame[4:]]), run, k=3))
    assert [len(part) for part in parts] == [4, 0, 3]
    pd.testing.assert_frame_equal(pd.concat([parts[0], parts[2]]), found)


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA], ids=str)
def test_missing_cells(run: str, missing: Any):
    """A missing history is an empty one, as in files; a user must not be missing."""
    frame = build_histories(run, 3)
    frame["history"] = [frame["history"][0], missing, frame["history"][2]]
    assert len(recommend_partitions(frame, run)["items"][1]) == 10
    frame["user"] = ["u0", missing, "u2"]
    with pytest.raises(ValueError, match="row 1 of a partition: user is empty"):
        recommend_partitions(frame, run)


def test_arrays_as_arrow_gives_them(run: str):
    frame = build_histories(run, 3)
    expected = recommend_partitions(frame, run)
    frame["history"] = [np.array(history, dtype=object) for history in frame["history"]]
    pd.testing.assert_frame_equal(recommend_partitions(frame, run), expected)


@pytest.mark.parametrize(
    ("cell", "message"),
    [(3, "row 1 of a partition: history is '3', expected a list"), (["nothing"], "unknown item 'nothing'")],
)
def test_a_mistake_names_the_row(run: str, cell: Any, message: str):
    frame = build_histories(run, 2)
    frame["history"] = pd.Series([frame["history"][0], cell], dtype=object)
    with pytest.raises(ValueError, match=message):
        recommend_partitions(frame, run)


def test_a_worker_loads_the_run_once(run: str, monkeypatch: pytest.MonkeyPatch):
    partitions._load.cache_clear()
    loads = []
    load = Recommender.load
    monkeypatch.setattr(Recommender, "load", lambda *args: loads.append(args) or load(*args))
    frame = build_histories(run, 2)
    loads.clear()
    threads = [threading.Thread(target=recommend_partitions, args=(frame, run)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1


def test_dask_with_a_worker_process(run: str, tmp_path: Path):
    import dask.dataframe
    from distributed import Client, LocalCluster

    frame = build_histories(run, 20)
    for number, part in enumerate(np.array_split(np.arange(20), 4)):
        frame.iloc[part].to_parquet(tmp_path / f"part-{number}.parquet", index=False)
    expected = recommend_partitions(frame, run, k=4)
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        parts = dask.dataframe.read_parquet(str(tmp_path / "part-*.parquet"))
        assert parts.npartitions == 4
        meta = {"user": object, "items": object, "scores": object}
        found = parts.map_partitions(recommend_partitions, run, k=4, meta=meta).compute()
    assert found["user"].tolist() == expected["user"].tolist()
    assert [list(cell) for cell in found["items"]] == [list(cell) for cell in expected["items"]]
    for cell, other in zip(found["scores"], expected["scores"], strict=True):
        assert list(cell) == pytest.approx(list(other), rel=1e-5)  # other batches round otherwise
