"""scripts/prepare_data.py: files that the rest of the project reads, whole or not at all."""

import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from m2rec.commands import prepare_data
from m2rec.data import inter_file
from m2rec.data.raw.batches import InteractionBatch, build_batch
from m2rec.data.raw.formats import FORMATS, TABLE_KINDS, RawFormat, RawInteraction
from m2rec.data.raw.options import PreparationOptions
from m2rec.data.raw.prepare import prepare_dataset
from m2rec.text.item_text import read_item_texts
from tests.conftest import as_arguments, random_rows, small

CSV = ["csv", "--user=user", "--item=item", "--time=time"]
Prepare = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """Call the command for the data set `x` in tmp_path/data; returns exit status, stdout, stderr."""

    def call(*arguments: object, dataset: str = "x") -> tuple[int, str, str]:
        common = [f"--dataset={dataset}", f"--data-path={tmp_path / 'data'}"]
        status = prepare_data.main([*map(str, arguments), *common])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def events(tmp_path: Path, *lines: str, header: str = "user,item,time") -> str:
    path = tmp_path / "clicks.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return f"--interactions={path}"


def read(tmp_path: Path, suffix: str = "inter", name: str = "x") -> list[list[str]]:
    text = (tmp_path / "data" / name / f"{name}.{suffix}").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()]


def left(tmp_path: Path) -> list[str]:
    """Everything under the data path."""
    return sorted(str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*"))


@pytest.fixture
def reviews(tmp_path: Path) -> tuple[str, str]:
    """Amazon 2023, gzipped: three reviews, five lines of metadata."""
    lines: list[dict[str, object]] = [
        {"user_id": "u1", "parent_asin": "B1", "rating": 5.0, "timestamp": 1588687728923},
        {"user_id": "u2", "parent_asin": "B2", "rating": 2.5, "timestamp": 1588687728000},
        {"user_id": "u1", "parent_asin": "B3", "rating": None, "timestamp": 1588687728924},
    ]
    items: list[dict[str, object]] = [
        {"parent_asin": "B0", "title": "Nobody has it"},
        {"parent_asin": "B2", "title": None, "categories": []},
        {"parent_asin": "B1", "title": 'A\t"big" &amp; long\nname', "features": ["x" * 3000]},
        {"parent_asin": "B1", "title": "Again"},
        {"parent_asin": "B2", "title": "Two", "store": "S"},
    ]
    for name, rows in (("r", lines), ("m", items)):
        content = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    return f"--interactions={tmp_path / 'r.jsonl.gz'}", f"--items={tmp_path / 'm.jsonl.gz'}"


def test_writes_both_files_and_the_statistics(tmp_path: Path, prepare: Prepare, reviews: tuple[str, str]):
    status, out, err = prepare("amazon-2023", *reviews)
    assert status == 0, err
    assert read(tmp_path) == [
        ["user_id:token", "item_id:token", "rating:float", "timestamp:float"],
        ["u1", "B1", "5", "1588687728.923"],
        ["u2", "B2", "2.5", "1588687728"],
        ["u1", "B3", "", "1588687728.924"],
    ]
    kinds = ["title:token_seq", "store:token", "categories:token_seq", "features:token_seq"]
    assert read(tmp_path, "item") == [
        ["item_id:token", *kinds, "description:token_seq"],
        ["B1", 'A "big" & long name', "", "", "x" * 2000, ""],
        ["B2", "Two", "S", "", "", ""],
    ]
    assert out.splitlines() == [
        "data set: x", "users: 2", "items: 3", "interactions: 3", "average length: 1.50",
        "sparsity: 50.00%", "items with text: 2",
    ]  # fmt: skip
    assert left(tmp_path) == ["x", "x/x.inter", "x/x.item"]


def test_the_project_reads_what_is_written(tmp_path: Path, prepare: Prepare, reviews: tuple[str, str]):
    prepare("amazon-2023", *reviews)
    inter = tmp_path / "data" / "x" / "x.inter"
    header = inter_file.read_header(inter, "\t")
    frame = inter_file.read_interactions(inter, "\t", header, list(header), "timestamp")
    assert frame["timestamp"].tolist() == [1588687728.923, 1588687728.0, 1588687728.924]
    assert frame["item_id"].tolist() == ["B1", "B2", "B3"]
    items = read_item_texts(inter.with_suffix(".item"), "item_id", None)
    assert items.tokens == ["B1", "B2"] and items.texts[1] == "Two. S"
    assert items.texts[0].startswith('A "big" & long name. xx')


def test_any_ids_and_texts_survive(tmp_path: Path, prepare: Prepare):
    """Random characters, those of tables and of Unicode's corners among them, come back as they were.

    Ids do without the blanks around them.
    """
    draw = random.Random(0)
    corners = "\t\n\r\0\"'\\,;|:# \x85\u2028\ufeff\xa0É😀aN&"
    ids = ["".join(draw.choices(corners, k=draw.randint(1, 4))) for _ in range(300)]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps({"u": "u", "i": text, "t": 1, "x": text}) for text in ids))
    columns = ["--user=u", "--item=i", "--time=t", "--item-id=i", "--text", "x", "--max-bad=1"]
    assert prepare("jsonl", f"--interactions={path}", f"--items={path}", *columns)[0] == 0
    inter = tmp_path / "data" / "x" / "x.inter"
    header = inter_file.read_header(inter, "\t")
    frame = inter_file.read_interactions(inter, "\t", header, ["item_id", "timestamp"], "timestamp")
    good = [text.strip() for text in ids if text.strip() and not set(text) & set("\t\n\r\0\x85")]
    assert frame["item_id"].tolist() == good and 50 < len(good) < 250
    item = inter.with_suffix(".item")
    table = inter_file.read_text_columns(item, "\t", inter_file.read_header(item, "\t"))
    with_text = dict.fromkeys(text for text in good if text.split())
    assert table["item_id"].tolist() == list(with_text)
    assert table["x"].tolist() == [" ".join(text.split()) for text in with_text]


def test_a_run_on_prepared_data(tmp_path: Path, prepare: Prepare, command: Prepare):
    lines = [f"{user},{item},{time * 1000 + 7}" for user, item, time in random_rows()]
    assert prepare(*CSV, events(tmp_path, *lines))[0] == 0
    assert read(tmp_path)[1][2].endswith(".007")
    status, out, err = command(*as_arguments(small(tmp_path / "data", "x", epochs=1)))
    assert status == 0, err
    metrics = json.loads((Path(out.splitlines()[-1]) / "metrics.json").read_text())
    assert metrics["data"]["interactions"] == len(lines) and metrics["data"]["users"] == 30


def test_quotation_marks_swallow_no_rows(tmp_path: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture):
    """Between tabs they are text; between commas what they join is said, or an error from 1,000 lines on."""
    tracks = {(3, 2): '"Heroes', (15, 4): 'Remix 12"'}
    rows = [(f"u{u}", f"i{k}", 1500000000 + k, tracks.get((u, k), "x")) for u in range(20) for k in range(10)]

    def lines(separator: str) -> list[str]:
        return [separator.join(map(str, row)) for row in rows]

    expected = [[user, item, str(time)] for user, item, time, _ in rows]
    for separator in "\t|":
        header = separator.join(("user", "item", "time", "track"))
        assert prepare(*CSV, events(tmp_path, *lines(separator), header=header))[0] == 0
        assert read(tmp_path)[1:] == expected and "span several" not in caplog.text
    assert prepare(*CSV, events(tmp_path, *lines(","), header="user,item,time,track"))[0] == 0
    joined = 12 * 10 + 2
    assert read(tmp_path)[1:] == [row for n, row in enumerate(expected) if not 32 < n <= 32 + joined]
    assert "clicks.csv: 1 records span several lines (longest: 123 lines, from line 34)" in caplog.text
    many = [*lines(",")[:60], *[f"v{n},i,1,x" for n in range(1500)]]
    status, _, err = prepare(*CSV, events(tmp_path, *many, header="user,item,time,track"), "--max-bad=1")
    assert status == 2 and "clicks.csv: the record that begins in line 34 has more than" in err


def test_times_of_one_unit(tmp_path: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture):
    """Microseconds since the start of a log over 2.3 days, on both sides of what reads as milliseconds."""
    rows = [(f"u{u}", f"i{k}", u * 1000 + k * 40_000_000_000) for u in range(3) for k in range(6)]
    path = events(tmp_path, *[f"{user},{item},{time}" for user, item, time in rows])
    status, _, err = prepare(*CSV, path)
    assert (
        status == 2
        and "line 2 has the time '0', which reads as seconds, and line 5 has the time '12000" in err
    )
    assert "--time-unit=s|ms|us|ns" in err and err.count("\n") == 1 and left(tmp_path) == []
    for unit, places in (("s", 0), ("ms", 3), ("us", 6), ("ns", 9)):
        assert prepare(*CSV, path, f"--time-unit={unit}")[0] == 0
        assert [Decimal(row[2]) for row in read(tmp_path)[1:]] == [
            Decimal(time).scaleb(-places) for *_, time in rows
        ]
    assert "clicks.csv: timestamps read as microseconds" in caplog.text
    status, _, err = prepare(*CSV, path, "--time-unit=min")
    assert status == 2 and "--time-unit: invalid choice: 'min'" in err


def test_a_given_unit_holds_for_every_format(tmp_path: Path, prepare: Prepare, reviews: tuple[str, str]):
    assert prepare("amazon-2023", reviews[0], "--time-unit=us")[0] == 0
    assert [row[3] for row in read(tmp_path)[1:]] == ["1588687.728923", "1588687.728", "1588687.728924"]


def table_file(tmp_path: Path, kind: str, lines: list[dict[str, object]]) -> list[str]:
    """The arguments for a table of that kind with these lines, and the columns user, item and time."""
    path = tmp_path / f"clicks.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        __import__("pyarrow.parquet").parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, lines)))
    else:
        cells = [lines[0], *(line.values() for line in lines)]
        path.write_text("\n".join(",".join("" if c is None else str(c) for c in row) for row in cells))
    return [kind, f"--interactions={path}", *CSV[1:]]


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_zeros_of_a_label_are_said(
    tmp_path: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture, kind: str
):
    """And what is advised leaves them out."""

    def clicks(name: str, values: Sequence[object]) -> list[str]:
        users = enumerate(values)
        return table_file(
            tmp_path, kind, [{"user": f"u{n}", "item": "i", "time": n, name: v} for n, v in users]
        )

    truths = [True, False, True] if kind != "csv" else [1, 0, 1]
    for name, values in (("Label", [1, 0, 0]), ("is_click", [0.0, 1.0, 1.0]), ("clicked", truths)):
        caplog.clear()
        arguments = clicks(name, values)
        assert prepare(*arguments)[0] == 0 and len(read(tmp_path)) == 4
        zeros = len([value for value in values if not value])
        advice = f"--rating={name} --min-rating=1"
        assert f"column {name!r} is 0 in {zeros} lines, which count as interactions" in caplog.text
        assert advice in caplog.text
        caplog.clear()
        assert prepare(*arguments, *advice.split())[0] == 0
        assert [row[0] for row in read(tmp_path)[1:]] == [f"u{n}" for n, value in enumerate(values) if value]
        assert "is 0 in" not in caplog.text
    for name, values in (("click", [1, 1, 1]), ("labels", [1, 0, 0])):
        caplog.clear()
        assert prepare(*clicks(name, values))[0] == 0 and "is 0 in" not in caplog.text


def test_placeholders_and_giants_are_said(tmp_path: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture):
    lines = [f"u{k},i{k % 4},{k}" for k in range(8)]
    prepare(*CSV, events(tmp_path, *lines))
    assert "interactions (" not in caplog.text
    prepare(*CSV, events(tmp_path, *lines, "N/A,x,1", "N/A,y,2", *[f"{u},hit,1" for u in "abcdefghijk"]))
    assert "clicks.csv: user 'N/A' has 2 of 21 interactions (9.5%) and is named like a missing" in caplog.text
    assert "clicks.csv: item 'hit' has 11 of 21 interactions (52.4%), more than half" in caplog.text


def test_blanks_around_ids_are_said(tmp_path: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture):
    prepare(*CSV, events(tmp_path, "u,i,1", "u , i, 2", "v,i,3", header="user, item, time"))
    assert [row[:2] for row in read(tmp_path)[1:]] == [["u", "i"], ["u", "i"], ["v", "i"]]
    assert "clicks.csv: blanks around ids were removed: 2, the first from 'u ' in line 3" in caplog.text


def test_movielens_takes_a_folder(tmp_path: Path, prepare: Prepare):
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "ratings.dat").write_bytes(b"1::73::5::978300760\n2::1::2::978300761\n")
    (folder / "movies.dat").write_bytes(b"73::Mis\xe9rables, Les (1995)::Drama|Musical\n")
    status, out, err = prepare("movielens", f"--interactions={folder}", "--min-rating=3")
    assert status == 0, err
    assert read(tmp_path)[1:] == [["1", "73", "5", "978300760"]]
    assert read(tmp_path, "item")[1:] == [["73", "Misérables, Les (1995)", "Drama, Musical"]]
    assert out.split()[-1] == "1"


def test_min_rating_compares_decimals(tmp_path: Path, prepare: Prepare):
    path = events(tmp_path, "u,a,1,0.1", "u,b,2,0.09", "u,c,3,", header="user,item,time,stars")
    assert prepare(*CSV, path, "--rating=stars", "--min-rating=0.1")[0] == 0
    assert [row[1] for row in read(tmp_path)[1:]] == ["a"]


def test_repeats_are_kept_unless_they_are_not_wanted(
    tmp_path: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    path = events(tmp_path, "u,a,1", "u,b,2", "u,a,1.0", "u,a,3", "v,a,1")
    prepare(*CSV, path)
    assert len(read(tmp_path)) == 6
    prepare(*CSV, path, "--drop-repeats")
    assert [row[1:] for row in read(tmp_path)[1:]] == [["a", "1"], ["b", "2"], ["a", "3"], ["a", "1"]]
    assert "clicks.csv: exact duplicates removed: 1" in caplog.text


def test_malformed_lines_are_shown_and_limited(
    tmp_path: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture
):
    path = events(tmp_path, *[f"u,i{k},{k}" for k in range(97)], "u,,1", "u,x,soon")
    status, _, err = prepare(*CSV, path)
    assert status == 2 and "2 of 100 lines are malformed, more than --max-bad=0.01" in err
    assert left(tmp_path) == []
    assert prepare(*CSV, path, "--max-bad=0.02")[0] == 0 and len(read(tmp_path)) == 98
    assert "clicks.csv: 2 of 100 lines are malformed and left out: line 99: " in caplog.text
    assert "line 99: 'item' is empty; line 100: time 'soon' is neither" in caplog.text


def test_items_of_another_kind_and_a_text_limit(tmp_path: Path, prepare: Prepare):
    items = tmp_path / "products.tsv.gz"
    items.write_bytes(gzip.compress(b"sku\tlong name\na\tGreen tea, 100 g\n"))
    columns = [f"--items={items}", "--item-id=sku", "--text", "long name", "--text-limit=6"]
    status, _, err = prepare(*CSV, events(tmp_path, "u,a,1"), *columns)
    assert status == 0, err
    assert read(tmp_path, "item") == [["item_id:token", "long_name:token_seq"], ["a", "Green"]]


def test_mistakes(tmp_path: Path, prepare: Prepare, reviews: tuple[str, str]):
    clicks = events(tmp_path, "u,a,1")
    other = tmp_path / "other.csv"
    other.write_text("id,text\nz,Z\n")
    empty, header = tmp_path / "empty.csv", tmp_path / "header.csv"
    empty.touch()
    header.write_text("user,item,time\n")
    items = [f"--items={other}", "--item-id=id", "--text"]
    (tmp_path / "twice.csv").write_text("user,item,time,item\nu,a,1,b\n")
    twice = f"--interactions={tmp_path / 'twice.csv'}"
    cases: list[tuple[Sequence[str], str]] = [
        (["csv", clicks, "--user=user", "--time=time"], "--item: csv needs it; name a column of the file"),
        ([*CSV[:3], clicks, "--time=when"], "column 'when' is missing, the file has user, item, time"),
        ([*CSV, clicks, f"--items={other}"], "--item-id: csv needs it; name a column of the file of items"),
        ([*CSV, clicks, "--text", "x"], "--text: there is no file of items; set --items=FILE"),
        (
            [*CSV, clicks, *items, "text", "text"],
            "--text: expected distinct columns other than item_id, got",
        ),
        ([*CSV, clicks, *items, "item_id"], "other than item_id, got item_id"),
        ([*CSV, clicks, *items, "text"], "none of its items occurs in"),
        ([*CSV, clicks, *items, "plot"], "column 'plot' is missing, the file has id, text"),
        (
            [*CSV, clicks, "--min-rating=3"],
            "csv has no rating; name its column with --rating=COLUMN",
        ),
        (
            [*CSV, clicks, "--rating=time", "--min-rating=3"],
            "are left; loosen --keep=CONDITION or --min",
        ),
        ([*CSV, clicks, "--max-bad=2"], "--max-bad: expected a share from 0 to 1, got 2"),
        ([*CSV, clicks, "--text-limit=0"], "--text-limit: expected a whole number from 1, got 0"),
        ([*CSV, clicks, "--rating=time", "--min-rating=nan"], "--min-rating: expected a number"),
        ([*CSV, f"--interactions={empty}"], "empty.csv: the file is empty"),
        ([*CSV, f"--interactions={header}"], "header.csv: no interactions are left; is it the right file?"),
        ([*CSV, f"--interactions={tmp_path}"], f"--interactions: no file {tmp_path}"),
        ([*CSV, twice], "twice.csv: column 'item' occurs 2 times; rename all but one"),
        (["yelp", clicks, "--user=x"], "--user: the columns of yelp are fixed; leave it out"),
        (["yelp", f"--interactions={empty}"], "empty.csv: the file is empty"),
        (["yelp", clicks], "2 of 2 lines are malformed"),
        (["steam", clicks, "--min-rating=3"], "--min-rating: steam has no rating; leave it out"),
        (["amazon-2023", reviews[0], "--items=none.json"], "--items: no file none.json"),
        (["movielens", f"--interactions={tmp_path}"], "no u.data, ratings.dat, ratings.csv in it"),
        (
            ["movielens", f"--interactions={tmp_path}", f"--items={other}"],
            "--items: movielens takes the films",
        ),
    ]
    for arguments, message in cases:
        status, _, err = prepare(*arguments)
        assert status == 2 and message in err, (arguments, err)
        assert err.count("\n") == 1 and err.startswith("prepare_data.py: error: "), err
        assert not (tmp_path / "data" / "x").exists(), arguments
    for name in ("a/b", "..", ""):
        status, _, err = prepare(*CSV, clicks, dataset=name)
        assert status == 2 and "is not a valid folder name" in err


def test_a_failure_leaves_what_was_there(tmp_path: Path, prepare: Prepare, reviews: tuple[str, str]):
    prepare("amazon-2023", *reviews)
    before = read(tmp_path), read(tmp_path, "item")
    for name in ("r", "m"):
        path = tmp_path / f"{name}.jsonl.gz"
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        status, _, err = prepare("amazon-2023", *reviews, "--min-rating=3")
        assert status == 2 and "is cut off or damaged" in err and err.count("\n") == 1
        assert (read(tmp_path), read(tmp_path, "item")) == before
        assert left(tmp_path) == ["x", "x/x.inter", "x/x.item"]
        path.write_bytes(whole)


def test_a_stop_leaves_nothing(tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch):
    def stopped(self: object, tally: object, time_unit: object) -> Iterator[InteractionBatch]:
        yield build_batch([RawInteraction("u", "a", Decimal(1), None)])
        assert any(name.endswith(".tmp") for name in left(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(RawFormat, "batches", stopped)
    status, _, err = prepare(*CSV, events(tmp_path, "u,a,1"))
    assert status == 130 and "stopped; no data set was written" in err and left(tmp_path) == []


def test_the_raw_file_is_not_replaced(tmp_path: Path, prepare: Prepare):
    path = tmp_path / "data" / "x" / "x.inter"
    path.parent.mkdir(parents=True)
    path.write_text("user\titem\ttime\nu\ta\t1\n")
    status, _, err = prepare(*CSV, f"--interactions={path}")
    assert status == 2 and "the result would replace it; choose another --dataset=NAME" in err
    assert path.read_text().startswith("user\t")


def test_the_help_names_every_format(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in (*FORMATS, *TABLE_KINDS, "movielens"):
        assert f"\n  {name} " in text


def test_files_without_a_header(tmp_path: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture):
    """Names by position; a header that is there nevertheless is a malformed line, and said."""
    path = tmp_path / "ratings.csv"
    lines = [f"A{n},0{n % 3},{n % 5}.0,{1369699200 + n}" for n in range(200)]
    path.write_text("\n".join(["user,asin,stars,when", *lines]))
    arguments = ["csv", f"--interactions={path}", "--columns=user,item,rating,time"]
    assert prepare(*arguments)[0] == 0
    expected = [[f"A{n}", f"0{n % 3}", f"{n % 5}", f"{1369699200 + n}"] for n in range(200)]
    assert read(tmp_path)[1:] == expected
    assert "1 of 201 lines are malformed and left out: line 1: 'stars' is not a number" in caplog.text
    path.write_text("\n".join(lines))
    assert prepare(*arguments)[0] == 0 and read(tmp_path)[1:] == expected
    assert prepare(*arguments[:2], "--columns=who, ,-,time", "--user=who", "--item=time")[0] == 0
    assert read(tmp_path)[1:] == [[row[0], row[3], row[3]] for row in expected]


def test_the_order_of_the_file_is_the_time(
    tmp_path: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "sasrec.txt"
    path.write_text("1 6393\n1 13504\nx\n2 6393\n")
    pairs = ["csv", f"--interactions={path}", "--columns=user,item", "--separator= ", "--max-bad=0.5"]
    assert prepare(*pairs)[0] == 0
    assert read(tmp_path)[1:] == [["1", "6393", "1"], ["1", "13504", "2"], ["2", "6393", "3"]]
    said = "sasrec.txt: no time column: file order is used as time, 1, 2, 3, ..."
    assert caplog.text.count(said) == 1
    assert "not used" not in caplog.text
    path.write_text("1 6393 13504\n3\n2\t6393\n")
    assert prepare("sequences", f"--interactions={path}")[0] == 0
    assert read(tmp_path)[1:] == [["1", "6393", "1"], ["1", "13504", "2"], ["2", "6393", "3"]]
    assert caplog.text.count(said) == 2 and "empty lists, skipped: 1" in caplog.text


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_a_time_that_is_not_used_is_said(
    tmp_path: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture, kind: str
):
    rows: list[dict[str, object]] = [{"user": "u", "item": f"i{n}", "Timestamp": 9 - n} for n in range(3)]
    assert prepare(*table_file(tmp_path, kind, rows)[:-1])[0] == 0
    assert [row[1:] for row in read(tmp_path)[1:]] == [["i0", "1"], ["i1", "2"], ["i2", "3"]]
    assert "file order is used as time, 1, 2, 3, ...; column 'Timestamp' is not used" in caplog.text


def test_lists_of_events(tmp_path: Path, prepare: Prepare):
    sessions = [
        {"session": 0, "events": [{"aid": 15, "ts": 1659304800025, "type": "clicks"}]},
        {"session": 1, "events": [{"aid": n, "ts": 1659304900000 + n, "type": "carts"} for n in (16, 17)]},
    ]
    expected = [["0", "15", "1659304800.025"], ["1", "16", "1659304900.016"], ["1", "17", "1659304900.017"]]
    path = tmp_path / "otto.jsonl"
    arguments = ["jsonl", f"--interactions={path}", "--user=session", "--item=events[].aid"]
    for content in ("\n".join(map(json.dumps, sessions)), json.dumps(sessions, indent=1)):
        path.write_text(content)
        assert prepare(*arguments, "--time=events[].ts")[0] == 0
        assert read(tmp_path)[1:] == expected
    keep = ["--keep", "events[].type=carts", "events[].aid>16"]
    assert prepare(*arguments, "--time=events[].ts", *keep)[0] == 0
    assert read(tmp_path)[1:] == expected[2:]
    status, _, err = prepare("jsonl", f"--interactions={path}", "--user=session", "--item=aid")
    assert status == 2 and "the row has 'session, events'; did you mean 'events[].aid'?" in err


def test_dates_of_any_form(tmp_path: Path, prepare: Prepare):
    """What has one meaning is read; for the rest the error shows the option that reads it."""
    for text in ("2019-11-11 09:05:58 UTC", "Mon Nov 11 01:05:58 -0800 2019"):
        assert prepare(*CSV, events(tmp_path, f"u,a,{text}"))[0] == 0
        assert read(tmp_path)[1:] == [["u", "a", "1573463158"]]
    path = events(tmp_path, "u,a,11/11/2019 9:05:58 AM", "u,b,12/31/2019 12:00:00 AM")
    status, _, err = prepare(*CSV, path)
    assert status == 2 and "line 2 has the time '11/11/2019 9:05:58 AM'" in err and err.count("\n") == 1
    option = "--time-format=%m/%d/%Y %I:%M:%S %p"
    assert option.replace("=", "='") + "'" in err
    assert prepare(*CSV, path, option)[0] == 0
    assert [row[2] for row in read(tmp_path)[1:]] == ["1573463158", "1577750400"]


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_what_is_not_kept_is_said(
    tmp_path: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture, kind: str
):
    """Rows = interactions + those that each condition left out."""
    kinds = ("view", "cart", "purchase", None)
    rows = [
        {"user": f"u{n % 7}", "item": f"i{n}", "time": n, "event": kinds[n % 4], "stars": n % 6}
        for n in range(120)
    ]
    arguments = table_file(tmp_path, kind, rows)
    for conditions, holds in (
        (["event=purchase"], [lambda row: row["event"] == "purchase"]),
        (["event!=view", "stars >= 4"], [lambda row: row["event"] != "view", lambda row: row["stars"] >= 4]),
        (
            ["event in view, cart", "stars=2.0"],
            [lambda r: r["event"] in kinds[:2], lambda r: r["stars"] == 2],
        ),
        (["event="], [lambda row: row["event"] is None]),
        (["stars<1"], [lambda row: row["stars"] < 1]),
    ):
        caplog.clear()
        options = [f"--keep={condition}" for condition in conditions]
        assert prepare(*arguments, *options)[0] == 0
        left_over = rows
        for condition, test in zip(conditions, holds, strict=True):
            kept = [row for row in left_over if test(row)]
            dropped = len(left_over) - len(kept)
            assert f"removed by --keep='{condition}': {dropped} rows" in caplog.text
            left_over = kept
        assert [row[1] for row in read(tmp_path)[1:]] == [row["item"] for row in left_over]
    status, _, err = prepare(*arguments, "--keep", "evnt=view")
    assert status == 2 and "did you mean 'event'?" in err and err.count("\n") == 1
    status, _, err = prepare(*arguments, "--keep", "event=nothing", "--keep=stars>1")
    assert status == 2 and "are left; loosen --keep=CONDITION or --min-rating=NUMBER" in err


def test_conditions_on_published_formats(tmp_path: Path, prepare: Prepare, reviews: tuple[str, str]):
    assert prepare("amazon-2023", reviews[0], "--keep", "rating<=3")[0] == 0
    assert [row[0] for row in read(tmp_path)[1:]] == ["u2"]
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "ratings.dat").write_bytes(b"1::73::5::978300760\n2::1::2::978300761\n")
    assert prepare("movielens", f"--interactions={folder}", "--keep=rating=2")[0] == 0
    assert [row[0] for row in read(tmp_path)[1:]] == ["2"]


def test_items_without_a_header(tmp_path: Path, prepare: Prepare):
    items = tmp_path / "items.txt"
    items.write_text("a::Green tea\nb::Cup\n")
    status, _, err = prepare(
        *CSV, events(tmp_path, "u,a,1"), f"--items={items}", "--item-columns=id,name", "--item-separator=::",
        "--item-id=id", "--text", "name",
    )  # fmt: skip
    assert status == 0, err
    assert read(tmp_path, "item")[1:] == [["a", "Green tea"]]


def test_mistakes_with_layouts_and_conditions(tmp_path: Path, prepare: Prepare):
    clicks = events(tmp_path, "u,a,1")
    bare = ["csv", clicks]
    (tmp_path / "book.xlsx").write_bytes(b"\xd0\xcf\x11\xe0 and so on")
    cases: list[tuple[Sequence[str], str]] = [
        ([*CSV[:3], "--time=tmie", clicks], "name one of them, or all with --columns=NAME,... if line 1"),
        ([*CSV[:3], "--time=tmie", clicks], "; did you mean 'time'?"),
        ([*bare, "--columns=user,item"], "2 columns are named, line 1 has 3 with ','"),
        ([*bare, "--columns=user,item,user"], "--columns: expected distinct names, got 'user,item,user'"),
        ([*bare, "--columns=-,"], "--columns: expected distinct names, got '-,'"),
        ([*bare, "--columns=a,b,c", "--item=b"], "--user: csv needs it"),
        ([*CSV, clicks, "--separator=abc"], "--separator: expected one or two characters, got 'abc'"),
        ([*CSV, clicks, '--separator="'], "--separator: expected one or two"),
        ([*CSV, clicks, "--separator=\\t"], "column 'user' is missing, the file has user,item,time; name"),
        ([*CSV, clicks, "--item-columns=a"], "--item-columns: there is no file of items; leave it out"),
        (["jsonl", *CSV[1:], clicks, "--columns=a"], "--columns: jsonl names its columns itself"),
        (["parquet", *CSV[1:], clicks, "--separator=;"], "--separator: parquet names its columns itself"),
        (["yelp", clicks, "--separator=;"], "--separator: the columns of yelp are fixed"),
        (["sequences", clicks, clicks.replace("interactions", "items")], "--items: sequences has no file of"),
        (["sequences", clicks, "--time-unit=s"], "--time-unit: needs a time column, and there is none"),
        ([*CSV[:3], clicks, "--drop-repeats"], "--drop-repeats: needs a time column, and there is none"),
        ([*CSV[:3], clicks, "--time-format=%Y"], "--time-format: needs a time column"),
        ([*CSV, clicks, "--time-format=%Y", "--time-unit=s"], "--time-unit: the times are dates of one"),
        (["mind", clicks, "--time-unit=s"], "--time-unit: the times are dates of one format"),
        ([*CSV, clicks, "--time-format=%d"], "--time-format: '%d' has no year"),
        ([*CSV, clicks, "--keep=user"], "--keep: 'user' is not a valid condition; write COLUMN=VALUE"),
        ([*CSV, clicks, "--keep=user>b"], "--keep: 'user>b': > needs a number, got 'b'"),
        ([*CSV, clicks, "--keep=user>1"], "1 of 2 lines are malformed"),
        ([*CSV, f"--interactions={tmp_path / 'book.xlsx'}"], "is a spreadsheet; save it as CSV first"),
    ]  # fmt: skip
    for arguments, message in cases:
        status, _, err = prepare(*arguments)
        assert status == 2 and message in err, (arguments, err)
        assert err.count("\n") == 1 and not (tmp_path / "data" / "x").exists(), arguments


def test_from_python(tmp_path: Path):
    """Messages speak of arguments there, and remarks go where they are wanted."""
    clicks = tmp_path / "clicks.csv"
    clicks.write_text("user,item,time,label\nu,a,1,1\nu,b,2,0\n")
    options = PreparationOptions(
        "csv", clicks, "x", data_path=tmp_path / "data", user="user", item="item", time="time"
    )
    remarks: list[str] = []
    statistics = prepare_dataset(options, remarks.append)
    assert (statistics.interactions, len(statistics.users), statistics.texts) == (2, 1, None)
    assert any(remark.endswith("to drop them set rating=label min_rating=1") for remark in remarks)
    with pytest.raises(ValueError, match=r"^min_rating: csv has no rating; name its column with rating="):
        prepare_dataset(replace(options, min_rating=1.0))
    with pytest.raises(ValueError, match=r"^format: expected one of .*; did you mean 'jsonl'"):
        prepare_dataset(replace(options, format="json"))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("item_id: csv needs it", "--item-id: csv needs it"),
        ("x.csv: more than max_bad=0.01", "x.csv: more than --max-bad=0.01"),
        ("removed by keep='rating=2': 1 rows", "removed by --keep='rating=2': 1 rows"),
        ("/data/items: it is empty", "/data/items: it is empty"),
        ("user 'time' has 2 of 3 interactions", "user 'time' has 2 of 3 interactions"),
    ],
)
def test_arguments_become_flags(message: str, expected: str):
    assert prepare_data.replace_names_with_flags(message) == expected
