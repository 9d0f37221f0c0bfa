"""DataFrames: a run of a frame is the run of its file, frames as data sets, rankings as frames, notebooks."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import m2rec
from m2rec.data.frames import InteractionColumns, UserHistories, read_frame, write_dataset
from m2rec.serving.recommender import Recommender
from m2rec.tensor_files import read_tensors
from tests.conftest import as_arguments, small

polars = pytest.importorskip("polars")

Command = Callable[..., tuple[int, str, str]]
FINISHED = Path(__file__).parent / "old_runs" / "runs" / "finished"
COLUMNS = InteractionColumns()
FRAME = pd.DataFrame(
    {
        "user_id": ["b", "a", "b", "a", "b"],
        "item_id": ["i1", "i2", "i3", "i1", "i2"],
        "timestamp": [3, 1, 1, 1, 2],
    }
)
HISTORIES = {"b": ["i3", "i2", "i1"], "a": ["i2", "i1"]}


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    return Recommender.load(FINISHED)


def test_a_run_of_a_frame_is_the_run_of_its_file(command: Command, toy: Path, tmp_path: Path):
    """With titles and text, from frames with other names of columns, in the order of the file."""
    rows = [(f"i{k}", f"title {k} of {k % 3}", f"kind {k % 4}") for k in range(20)]
    lines = ["item_id:token\ttitle:token_seq\tkind:token_seq", *map("\t".join, rows)]
    (toy / "toy" / "toy.item").write_text("\n".join(lines) + "\n")
    values = small(toy, topk=[5], metrics=["Hit", "NDCG"], valid_metric="NDCG@5", ties="shuffled")
    status, out, err = command(*as_arguments(values))
    assert status == 0, err
    of_file = Path(out.splitlines()[-1])

    clicks = pd.read_csv(toy / "toy" / "toy.inter", sep="\t")
    clicks.columns = ["customer", "sku", "when"]
    clicks["price"] = 1.5
    products = pd.DataFrame(rows, columns=["sku", "title", "kind"])
    keys = {**values, "data_path": str(tmp_path / "frames"), "runs_dir": str(tmp_path / "of_frame")}
    fitted = m2rec.fit(clicks, products, user="customer", item="sku", time="when", **keys)

    of_frame = fitted.folder
    assert of_frame is not None and of_frame.parent == tmp_path / "of_frame"
    assert {path.name for path in of_frame.iterdir()} == {path.name for path in of_file.iterdir()}
    tensors = [read_tensors(folder / "model.safetensors")[0] for folder in (of_file, of_frame)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    for name in ("items.json", "counts.json", "titles.json", "test_ranks.csv"):
        assert (of_frame / name).read_bytes() == (of_file / name).read_bytes(), name
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (of_file, of_frame))
    for key in ("valid", "test", "test_unseen", "test_new", "test_by", "data", "protocol", "epochs"):
        assert first[key] == second[key], key
    assert first["text"]["matched"] == second["text"]["matched"] == 20
    assert fitted.recommend(["i1", "i2"], 3) == Recommender.load(of_file).recommend(["i1", "i2"], 3)

    ranked = fitted.recommend_frame(["u7", "u3"], k=2)
    mine = clicks[clicks["customer"] == "u7"].sort_values("when", kind="stable")
    assert ranked["item"].tolist()[:2] == [x.item for x in fitted.recommend(mine["sku"].tolist(), 2)]
    assert ranked["user"].tolist() == ["u7", "u7", "u3", "u3"] and ranked["rank"].tolist() == [1, 2, 1, 2]


def test_fit_names_the_data_set_after_its_content(toy: Path, caplog: pytest.LogCaptureFixture):
    """A second call with the same frame uses the same files, and filtered items don't disturb."""
    clicks = pd.read_csv(toy / "toy" / "toy.inter", sep="\t")
    clicks.columns = ["user_id", "item_id", "timestamp"]
    keys = small(toy, epochs=1, runs_dir=str(toy / "runs"), item_inter_num_interval="[12,inf)")
    del keys["dataset"]
    with caplog.at_level(logging.WARNING):
        fitted = m2rec.fit(clicks, **keys)
    name = fitted.config["dataset"]
    assert name.startswith("frame-") and (toy / name / f"{name}.inter").is_file()
    assert len(fitted.tokens) < 21 and len(fitted.recommend_frame(list(fitted.histories), k=1)) > 20
    stamp = (toy / name / f"{name}.inter").stat().st_mtime_ns
    assert write_dataset(toy, None, clicks, COLUMNS) == name
    assert (toy / name / f"{name}.inter").stat().st_mtime_ns == stamp
    assert write_dataset(toy, None, clicks[1:], COLUMNS) != name
    assert not [path for path in toy.iterdir() if path.name.startswith("tmp")]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ([5, 3], ["5", "3"]),
        ([1.5, 1e20], ["1.5", "1e+20"]),
        ([1700000000123456789, 1700000000123456790], ["1700000000123456789", "1700000000123456790"]),
        (["881250949", "0881250950"], ["881250949", "0881250950"]),
        (pd.to_datetime(["2024-01-02", "1969-12-31"]), ["1704153600", "-86400"]),
        (pd.to_datetime(["2024-01-02T01:00+01:00"]), ["1704153600"]),
        (pd.to_datetime(["2024-01-02 00:00:00.25", "1969-12-31 23:59:58.5"]), ["1704153600.25", "-1.5"]),
        (pd.to_datetime([1700000000123456789, 0]), ["1700000000.123456789", "0"]),
        (polars.Series(["2024-01-02"]).str.to_date(), ["1704153600"]),
        (polars.Series(["2024-01-02 01:00+01:00"]).str.to_datetime(time_zone="UTC"), ["1704153600"]),
    ],
)
def test_times_keep_their_value(given: Any, written: list[str], tmp_path: Path):
    """Numbers as they are, dates as seconds since 1970; by the numbers in the file."""
    ids = ["x"] * len(given)
    make = polars.DataFrame if isinstance(given, polars.Series) else pd.DataFrame
    frame = make({"user_id": ids, "item_id": ids, "timestamp": given})
    name = write_dataset(tmp_path, None, frame, COLUMNS)
    lines = (tmp_path / name / f"{name}.inter").read_text().splitlines()[1:]
    found = [line.split("\t")[2] for line in lines]
    assert [_trim(text) for text in found] == written


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def test_ids_keep_their_text():
    """Numbers in a column with gaps are whole, leading zeros stay, an id may be missing."""
    frame = pd.DataFrame(
        {"user_id": [1, None, 2], "item_id": ["007", "", 'say "so"'], "timestamp": [1, 2, 3]}
    )
    table = read_frame(frame, COLUMNS)
    assert table["user"].tolist() == ["1", None, "2"] and table["item"].tolist() == ["007", None, 'say "so"']
    same = polars.DataFrame(
        {"user_id": [1, None, 2], "item_id": ["007", "", 'say "so"'], "timestamp": [1, 2, 3]}
    )
    assert read_frame(same, COLUMNS).equals(table)


def test_polars_and_pandas_are_one_data_set(tmp_path: Path):
    items = {
        "item_id": ["i1", "i2"],
        "title": ["A\tb\nc", None],
        "year": [1999, None],
        "kinds": [["x", "y"], []],
    }
    clicks = FRAME.assign(click=[True, False, True, True, True])
    name = write_dataset(tmp_path, None, clicks, COLUMNS, pd.DataFrame(items), "item_id")
    others = polars.DataFrame(clicks.to_dict("list")), polars.DataFrame(items)
    assert write_dataset(tmp_path, None, others[0], COLUMNS, others[1], "item_id") == name
    assert (tmp_path / name / f"{name}.item").read_text() == (
        "item_id:token\ttitle:token_seq\tyear:token_seq\tkinds:token_seq\ni1\tA b c\t1999\tx y\ni2\t\t\t\n"
    )
    assert (tmp_path / name / f"{name}.inter").read_text().splitlines()[:3] == [
        "user_id:token\titem_id:token\ttimestamp:float\tclick:float", "b\ti1\t3\t1.0", "a\ti2\t1\t0.0",
    ]  # fmt: skip


def test_prices_are_no_text_unless_they_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    items = pd.DataFrame(
        {"item_id": ["i1", "i2"], "title": ["A", "B"], "price": [1.5, np.nan], "year": [1999.0, np.nan]}
    )
    name = write_dataset(tmp_path, None, FRAME, COLUMNS, items, "item_id")
    head = (tmp_path / name / f"{name}.item").read_text().splitlines()[0]
    assert head == "item_id:token\ttitle:token_seq\tyear:token_seq"
    assert (
        "items: column 'price' has numbers, which are no text; text=[COLUMN, ...] would take it"
        in caplog.text
    )
    name = write_dataset(tmp_path, None, FRAME, COLUMNS, items, "item_id", ["price"])
    assert (tmp_path / name / f"{name}.item").read_text().splitlines()[:2] == [
        "item_id:token\tprice:token_seq",
        "i1\t1.5",
    ]
    with pytest.raises(ValueError, match="items: the frame has no column of text; leave items out"):
        write_dataset(tmp_path, None, FRAME, COLUMNS, items[["item_id", "price"]], "item_id")


def test_a_named_data_set_is_not_replaced(tmp_path: Path):
    assert write_dataset(tmp_path, "shop", FRAME, COLUMNS) == "shop"
    assert write_dataset(tmp_path, "shop", FRAME, COLUMNS) == "shop"
    before = (tmp_path / "shop" / "shop.inter").read_bytes()
    (tmp_path / "shop" / "shop.item").write_text("item_id:token\ttitle:token_seq\n")
    with pytest.raises(ValueError, match=r"^dataset: \S+shop\.item has texts of an earlier call; give items"):
        write_dataset(tmp_path, "shop", FRAME, COLUMNS)
    (tmp_path / "shop" / "shop.item").unlink()
    with pytest.raises(
        ValueError, match=r"^dataset: \S+shop\.inter has other content; choose another name, or "
    ):
        write_dataset(tmp_path, "shop", FRAME[1:], COLUMNS)
    assert (tmp_path / "shop" / "shop.inter").read_bytes() == before


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        ([1, 2], {}, "interactions: expected a DataFrame of pandas or polars, got list"),
        (
            polars.LazyFrame(),
            {},
            "interactions: expected a DataFrame of pandas or polars, got LazyFrame; call its",
        ),
        (
            FRAME,
            {"user": "usr_id"},
            "interactions: column 'usr_id' is missing, the frame has user_id, item_id, ",
        ),
        (FRAME, {"time": "when"}, r"name it with time=COLUMN, or give time=None for the order of the rows"),
        (FRAME.assign(user_id="a\tb"), {}, "user: column 'user_id': id 'a\\\\tb' has a tab, a newline or "),
        (
            FRAME.assign(item_id=True),
            {},
            "item: column 'item_id': True is not a valid id; convert or replace it",
        ),
        (
            FRAME.assign(timestamp="2024-01-02"),
            {},
            "time: column 'timestamp' has '2024-01-02' in row 0, not a ",
        ),
        (
            FRAME.assign(timestamp=[1, np.nan, 2, 3, 4]),
            {},
            "is empty in 1 rows, the first is row 1; fill or ",
        ),
        (
            FRAME.assign(timestamp=[1, np.inf, 2, 3, 4]),
            {},
            "has inf in row 1, not a number or date; convert ",
        ),
        (
            FRAME,
            {"USER_ID_FIELD": "u"},
            "USER_ID_FIELD: fit writes the files itself; name columns with user=",
        ),
        (FRAME, {"model": "SASRec"}, "model: a Recommender needs M2Rec's parts, which SASRec is not made of"),
        (FRAME, {"text": ["title"]}, "items: missing, and item_id or text is given; give the frame of items"),
        (
            FRAME,
            {"dataset": "a/b"},
            "dataset: 'a/b' is not a valid folder name; its folder is made in data_path",
        ),
        (FRAME, {"items": FRAME}, "items: item 'i1' occurs twice; keep one row, for example with drop_dupl"),
        (FRAME, {"items": FRAME[["item_id"]][:3]}, "items: the frame has no column of text; leave items out"),
        (
            FRAME,
            {"items": FRAME[:3], "text": ["name"]},
            "items: column 'name' is missing, the frame has user_id",
        ),
        (FRAME, {"epoch": 3}, "unknown key 'epoch'; did you mean 'epochs'?"),
    ],
)
def test_mistakes_are_one_line(
    frame: Any, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        m2rec.fit(frame, **options)
    assert message.replace("\\\\", "\\") in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_histories_of_a_frame():
    """By time, ties in the order of the rows; without times in the order of the rows."""
    histories = UserHistories(FRAME, COLUMNS)
    assert dict(histories) == HISTORIES and list(histories) == ["b", "a"] and "c" not in histories
    in_order = InteractionColumns(time=None)
    assert dict(UserHistories(FRAME, in_order)) == {"b": ["i1", "i3", "i2"], "a": ["i2", "i1"]}
    assert dict(UserHistories(FRAME, COLUMNS, {"i1", "i3"})) == {"b": ["i3", "i1"], "a": ["i1"]}


def test_histories_of_dates_that_are_closer_than_a_double_tells():
    """A double of seconds since 1970 has steps of 240 nanoseconds."""
    start = pd.Timestamp("2024-01-02").value
    times = pd.to_datetime([start + step for step in (90, 30, 30, 60, 1)])
    frame = pd.DataFrame({"user_id": "u", "item_id": list("dbcea"), "timestamp": times})
    for given in (frame, polars.from_pandas(frame)):
        assert dict(UserHistories(given, InteractionColumns())) == {"u": list("abced")}
    texts = frame.assign(timestamp=[f"1704153600.{n:022}" for n in (9, 3, 3, 6, 1)])
    assert dict(UserHistories(texts, InteractionColumns())) == {"u": list("abced")}
    assert dict(UserHistories(frame, InteractionColumns(), {"d", "e", "b"})) == {"u": list("bed")}


def test_every_kind_of_histories_is_ranked_alike(recommender: Recommender):
    expected = []
    for user, history in HISTORIES.items():
        for rank, (item, score, title) in enumerate(recommender.recommend(history, 3), 1):
            expected.append((user, rank, item, score, title))
    columns = ["user", "rank", "item", "score", "title"]
    expected_frame = pd.DataFrame(expected, columns=columns)
    for given in (FRAME, HISTORIES):
        pd.testing.assert_frame_equal(recommender.recommend_frame(given, 3), expected_frame)
    numbered = recommender.recommend_frame(list(HISTORIES.values()), 3)
    assert numbered["user"].tolist() == [0, 0, 0, 1, 1, 1]
    pd.testing.assert_frame_equal(numbered[columns[1:]], expected_frame[columns[1:]])
    ranked = recommender.recommend_frame(polars.DataFrame(FRAME.to_dict("list")), 3)
    assert isinstance(ranked, polars.DataFrame)
    pd.testing.assert_frame_equal(pd.DataFrame(ranked.to_dict(as_series=False)), expected_frame)


def test_users_need_known_histories():
    recommender = Recommender.load(FINISHED)
    with pytest.raises(ValueError, match="no history of user 'b' is known here; give histories"):
        recommender.recommend_frame(["b"])
    recommender.histories = HISTORIES
    assert recommender.recommend_frame(["b"], 2)["user"].tolist() == ["b", "b"]
    for given, message in (
        (["c"], "unknown user 'c'; give the history instead"),
        ("b", "expected a list, a dict or a DataFrame, got 'b'"),
        (["b", ["i1"]], "users and histories are mixed; give one kind"),
    ):
        with pytest.raises(ValueError, match=f"^users_or_histories: {message}"):
            recommender.recommend_frame(given)


def test_a_notebook_shows_tables_with_titles(recommender: Recommender):
    assert repr(recommender) == "<Recommender: M2Rec on toy, 30 items>"
    shown = recommender._repr_html_()
    assert "<caption>M2Rec on toy</caption>" in shown and "ndcg@10 on test_unseen" in shown
    token = next(token for token in recommender.tokens[1:] if token in recommender.titles)
    ranked = recommender.recommend(["i1"], 3, candidates=[token], exclude_seen=False)
    assert f"<td>1</td><td>{token}</td><td>{recommender.titles[token]}</td>" in ranked._repr_html_()
    live = recommender.session(["i1"]).recommend(2)
    for answer in (live, recommender.similar_items("i1", 2), next(recommender.recommend_batch([["i1"]], 2))):
        assert answer._repr_html_().count("<tr>") == 3
    events = recommender.explain(["i1", "i2"])
    assert "<th>semantic</th>" in events._repr_html_() and events._repr_html_().count("<tr>") == 3


def test_reasons_are_a_table(recommender: Recommender):
    reasons = recommender.find_reasons(["i1", "i2"], ["i3"])
    (reason,) = reasons
    assert reason.title == recommender.titles["i3"]
    shown = reasons._repr_html_()
    rows = len(reason.influences) + len(reason.nearest_by_text)
    assert "<caption>Reasons</caption>" in shown and shown.count("<tr>") == 1 + rows > 1
    assert f"<td>i3</td><td>{reason.title}</td>" in shown


def test_a_report_has_what_the_run_measured(tmp_path: Path):
    report = m2rec.Report(FINISHED)
    measured = json.loads((FINISHED / "metrics.json").read_text())
    assert list(report.metrics) == ["valid", "test", "test_unseen", "test_new"]
    assert report.metrics.loc["hit@5", "test_unseen"] == measured["test_unseen"]["hit@5"]
    assert report.baselines.index.tolist() == ["M2Rec"]  # it ran without baselines
    assert report.baselines.loc["M2Rec", "test"] == measured["test"]["ndcg@10"]
    shown = report._repr_html_()
    assert shown.count("<figure") == 9 and "loss by epoch: training loss from" in shown
    with pytest.raises(ValueError, match="is not a finished run"):
        m2rec.Report(tmp_path)


def test_a_data_set_is_read_as_the_frames_that_it_came_from(tmp_path: Path):
    items = pd.DataFrame({"item_id": ["i1", "i2"], "title": ["A b", "007"]})
    clicks = FRAME.assign(click=[1.0, 0.0, 1.0, 1.0, 1.0])
    write_dataset(tmp_path, "shop", clicks, COLUMNS, items, "item_id")
    read = m2rec.read_dataset("shop", tmp_path)
    pd.testing.assert_frame_equal(read[0], clicks, check_dtype=False)
    assert read[1] is not None
    pd.testing.assert_frame_equal(read[1], items, check_dtype=False)
    table = read[0].rename(columns=lambda name: f"{name}:{'token' if name.endswith('_id') else 'float'}")
    (tmp_path / "shop" / "shop.inter").unlink()
    (tmp_path / "shop" / "shop.item").unlink()
    table.to_parquet(tmp_path / "shop" / "shop.inter.parquet")
    as_parquet, none = m2rec.read_dataset("shop", tmp_path)
    pd.testing.assert_frame_equal(as_parquet, clicks, check_dtype=False)
    assert none is None
    shipped, films = m2rec.read_dataset(data_path=tmp_path)
    assert films is not None and (len(shipped), len(films)) == (100_000, 1_682)
    with pytest.raises(
        ValueError, match=r"^dataset: 'shoes' has no file \S+shoes\.inter; set data_path, or read"
    ):
        m2rec.read_dataset("shoes", tmp_path)


def test_a_table_escapes_texts_and_leaves_out_what_is_empty():
    from m2rec.serving.notebook import RankedItems
    from m2rec.serving.ranker import Recommendation

    shown = RankedItems([Recommendation("<b>", 1.5)])._repr_html_()
    assert "<td>&lt;b&gt;</td>" in shown and "title" not in shown
    assert RankedItems()._repr_html_().count("<tr>") == 1
