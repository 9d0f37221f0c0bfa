"""Histories from files, recommendations into files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from m2rec.serving import batch_files, ranker
from m2rec.serving.batch_files import read_history_file
from tests.test_session import TOKENS, assert_same, events, recommender

HISTORIES = {"anna": events(3), "bert": [], "01": events(40, seed=1)}


def as_csv(path: Path) -> Path:
    lines = ["user,history", *(f"{user},{' '.join(tokens)}" for user, tokens in HISTORIES.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def as_json_lists(path: Path) -> Path:
    cells = [json.dumps(tokens).replace('"', '""') for tokens in HISTORIES.values()]
    rows = [f'{user},"{cell}"' for user, cell in zip(HISTORIES, cells, strict=True)]
    path.write_text("\n".join(["user,history", *rows]) + "\n")
    return path


def as_parquet(path: Path) -> Path:
    columns = {"user": list(HISTORIES), "other": [1, 2, 3], "history": list(HISTORIES.values())}
    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("name", "write"), [("h.csv", as_csv), ("h.csv", as_json_lists), ("h.parquet", as_parquet)]
)
def test_histories(tmp_path: Path, name: str, write: Callable[[Path], Path]):
    assert dict(read_history_file(write(tmp_path / name))) == HISTORIES


def test_a_row_of_several_lines_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A quotation mark that is left open makes one user of four."""
    path = tmp_path / "in.csv"
    path.write_text('user,history\na,"i1 i2\nb,i3\nc,i4\nd,i5 6"\ne,i6\n')
    assert dict(read_history_file(path)) == {"a": ["i1", "i2", "b,i3", "c,i4", "d,i5", "6"], "e": ["i6"]}
    assert [record.message for record in caplog.records] == [
        f"{path}: 1 records span several lines (longest: 4 lines, from line 2); "
        "an unclosed quotation mark there would explain it"
    ]
    path.write_text('user,history\na,"i1 i2\n' + "b,i3\n" * 2000)
    with pytest.raises(ValueError, match="the record that begins in line 2 has more than 1,000 "):
        list(read_history_file(path))
    path.write_text('user,history\na,i1\n"b,i2\nc,i3\n')
    with pytest.raises(ValueError, match="lines 3 to 4: a quotation mark is never closed"):
        list(read_history_file(path))
    path.write_text("user,history,user\na,i1,b\n")
    with pytest.raises(ValueError, match="column 'user' occurs 2 times"):
        list(read_history_file(path))


def test_recommendations_of_a_file(tmp_path: Path):
    model, out = recommender(whole_history=False), tmp_path / "out.parquet"
    assert model.recommend_file(as_csv(tmp_path / "in.csv"), out, k=4, progress=True) == 3
    table = parquet.read_table(out)
    assert table.column_names == ["user", "items", "scores"]
    assert table["user"].to_pylist() == list(HISTORIES)
    for items, scores, history in zip(
        table["items"].to_pylist(), table["scores"].to_pylist(), HISTORIES.values(), strict=True
    ):
        expected = model.recommend(history, k=4)
        assert items == [r.item for r in expected]
        assert scores == pytest.approx([r.score for r in expected], abs=1e-5)


def test_many_in_bounded_memory(monkeypatch: pytest.MonkeyPatch):
    """The input is read as far as the output has been made, but for a batch."""
    monkeypatch.setattr(ranker, "_RANKING_BATCH_SIZE", 10)
    read, most = 0, 0
    model = recommender(whole_history=False)

    def histories():
        nonlocal read
        for n in range(200):
            read += 1
            yield [TOKENS[1 + n % 30]]

    for done, found in enumerate(model.recommend_batch(histories(), k=2), 1):
        most = max(most, read - done)
        assert len(found) == 2
    assert done == 200 and most <= 10


def test_a_file_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The input is read as far as the output has been written, but for a batch and a group."""
    monkeypatch.setattr(ranker, "_RANKING_BATCH_SIZE", 10)
    monkeypatch.setattr(batch_files, "_ROW_GROUP_SIZE", 20)
    lines = ["user,history", *(f"u{n},{TOKENS[1 + n % 30]}" for n in range(200))]
    (tmp_path / "in.csv").write_text("\n".join(lines) + "\n")
    read, ahead, real, write = 0, [], batch_files.read_history_file, parquet.ParquetWriter.write_table

    def counted(*arguments: Any) -> Iterator[Any]:
        nonlocal read
        for row in real(*arguments):
            read += 1
            yield row

    def watched(writer: parquet.ParquetWriter, table: pyarrow.Table) -> None:
        ahead.append(read - 20 * len(ahead))
        write(writer, table)

    monkeypatch.setattr(batch_files, "read_history_file", counted)
    monkeypatch.setattr(parquet.ParquetWriter, "write_table", watched)
    model = recommender(whole_history=False)
    assert model.recommend_file(tmp_path / "in.csv", tmp_path / "out.parquet", k=2) == 200
    assert len(ahead) == 10 and max(ahead) <= 30


def test_a_batch_is_each_alone():
    model = recommender(whole_history=False)
    histories = [events(n, seed=n) for n in (1, 50, 3, 12, 13)]
    for found, history in zip(model.recommend_batch(histories, 6), histories, strict=True):
        assert_same(found, model.recommend(history, 6))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user,history\nanna,i1 tea\n", "in.csv, user 'anna': history: unknown item 'tea'"),
        ("user,history\nanna,i1,i2\n", "line 2: 3 columns, the header has 2$"),
        ("user,items\nanna,i1\n", "history"),
        ("", "is empty"),
        ("\ruser,history\nanna,i1\n", "line 1 names no columns"),
        ("user,history\n,i1\n", "line 2: user is empty"),
        ('user,history\nanna,"[1, 2"\n', "line 2: history is not a valid JSON list"),
        ('user,history\nanna,"[[1], 2]"\n', "line 2: history is '.*', expected a list of tokens"),
        ('user,history\nanna,"[null]"\n', "line 2: history is '.*', expected a list of tokens"),
        (None, "there is no such file; give a CSV or Parquet file"),
    ],
)
def test_files_that_can_t_be_used_leave_nothing(tmp_path: Path, content: str | None, message: str):
    path, out = tmp_path / "in.csv", tmp_path / "out.parquet"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        recommender().recommend_file(path, out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_unknown_items_can_be_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path, out = tmp_path / "in.csv", tmp_path / "out.parquet"
    path.write_text("user,history\nanna,i1 tea i2\n")
    model = recommender()
    assert model.recommend_file(path, out, k=3, skip_unknown=True) == 1
    expected = model.recommend(["i1", "i2"], k=3)
    assert parquet.read_table(out)["items"].to_pylist() == [[r.item for r in expected]]
    assert [record.message for record in caplog.records] == ["skipped 1 unknown items, e.g. 'tea'"]


def test_one_remark_for_all(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "in.csv"
    path.write_text("user,history\n" + "".join(f"u{k},tea i1\ne{k},\n" for k in range(700)))
    recommender().recommend_file(path, tmp_path / "out.parquet", k=1, skip_unknown=True)
    assert [record.message for record in caplog.records] == [
        "skipped 700 unknown items, e.g. 'tea'",
        "700 empty histories: recommended the most popular items",
    ]


def test_a_very_long_history_and_blanks_before_a_list(tmp_path: Path):
    path, long = tmp_path / "in.csv", ["i1"] * 50_000
    path.write_text(f'user,history\na,{" ".join(long)}\nb, "[""i2""]"\n'.replace(', "[', ',"  ['))
    assert dict(read_history_file(path)) == {"a": long, "b": ["i2"]}


def test_no_histories(tmp_path: Path):
    for path, write in ((tmp_path / "in.parquet", as_parquet), (tmp_path / "in.csv", as_csv)):
        write(path)
        if path.suffix == ".csv":
            path.write_text("user,history\n")
        else:
            parquet.write_table(parquet.read_table(path).slice(0, 0), path)
        assert recommender().recommend_file(path, tmp_path / "out.parquet") == 0
        assert parquet.read_table(tmp_path / "out.parquet").num_rows == 0
