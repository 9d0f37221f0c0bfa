"""Reading interaction files: what is right, and every way to be wrong."""

import random
import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from m2rec.data import download, fetch, inter_file

HEADER = {"user_id": "token", "item_id": "token", "timestamp": "float"}
FIRST = "user_id:token\titem_id:token\ttimestamp:float\n"


def read(path: Path):
    return inter_file.read_interactions(path, "\t", HEADER, list(HEADER), "timestamp")


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "x.inter"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_header(tmp_path: Path):
    path = written(tmp_path, "﻿user_id:token\ta:b:float_seq\r\n")
    assert inter_file.read_header(path, "\t") == {"user_id": "token", "a:b": "float_seq"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("user_id\titem_id\n", "'user_id' in the first line is not a column header; expected NAME:TYPE"),
        ("user_id,item_id\n", "'user_id,item_id' in the first line is not a column"),
        ("user_id:text\n", "'user_id:text' in the first line is not a column"),
        (b"user_id:token\titem\xe9:token\n", "not UTF-8"),
        ("a:token\tb:token\ta:float\n", "column 'a' is duplicated in the first line"),
        ("a:token\t b:token\n", "column ' b' in the first line has blanks around it; remove them"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, text: str | bytes, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        inter_file.read_header(written(tmp_path, text), "\t")
    assert str(tmp_path) in str(error.value)


def test_columns_are_required_with_their_type(tmp_path: Path):
    with pytest.raises(ValueError, match=r"column 'timestamp' \(TIME_FIELD\) is missing, the file has a, b"):
        inter_file.require_column(tmp_path, {"a": "token", "b": "token"}, "TIME_FIELD", "timestamp", "float")
    with pytest.raises(ValueError, match=r"column 'a' \(TIME_FIELD\) is 'token'; it must be 'float'"):
        inter_file.require_column(tmp_path, {"a": "token"}, "TIME_FIELD", "a", "float")


def test_tokens_stay_as_they_are(tmp_path: Path):
    path = written(tmp_path, FIRST + 'NA\t007\t1\n nan\t"q\t1e3\nÉ😀\tNULL\t-5.5\n')
    frame = read(path)
    assert frame["user_id"].tolist() == ["NA", " nan", "É😀"]
    assert frame["item_id"].tolist() == ["007", '"q', "NULL"]
    assert frame["timestamp"].tolist() == [1.0, 1000.0, -5.5]


def test_times_keep_double_precision(tmp_path: Path):
    path = written(tmp_path, FIRST + "a\tb\t1512345678901\na\tb\t1512345678902\n")
    assert read(path)["timestamp"].diff().iloc[1] == 1


@pytest.mark.parametrize("unit", [1, 3, 6, 9])
@pytest.mark.parametrize("in_seconds", [False, True])
def test_times_have_the_order_of_their_digits(tmp_path: Path, unit: int, in_seconds: bool):
    """Whole numbers of a unit since 1970, or seconds with as many places; some are the same time."""
    rng = random.Random(unit)
    times = [1_600_000_000 * 10**unit + rng.randrange(300) for _ in range(200)]
    text = [f"{t // 10**unit}.{t % 10**unit:0{unit}d}" if in_seconds else str(t) for t in times]
    lines = "".join(f"u\ti{k}\t{time}\n" for k, time in enumerate(text))
    frame = read(written(tmp_path, FIRST + lines)).sort_values("timestamp", kind="stable")
    ordered = sorted(range(200), key=times.__getitem__)  # of equal ones the first of the file
    assert frame["item_id"].tolist() == [f"i{k}" for k in ordered]


def test_only_tied_times_are_looked_at_again(tmp_path: Path):
    """Lines keep their places, since ids follow the order of the file; times are what they were, nearly."""
    lines = "u\tb\t1600000000000000009\nu\tc\t-5\nu\ta\t1600000000000000001\nu\td\t1600000000000000009\n"
    frame = read(written(tmp_path, FIRST + lines))
    assert frame["item_id"].tolist() == ["b", "c", "a", "d"]
    b, c, a, d = frame["timestamp"].tolist()
    assert c == -5 and a < b == d and b == pytest.approx(1.6e18, rel=1e-15)


def test_many_times_within_a_double(tmp_path: Path):
    """A thousand nanoseconds, of which a double holds four, and the one after them; negative ones too."""
    for sign in (1, -1):
        times = [sign * (1_600_000_000_000_000_000 + k) for k in [*range(1000), 1100]]
        lines = "".join(f"u\ti{k}\t{time}\n" for k, time in enumerate(times))
        found = read(written(tmp_path, FIRST + lines))["timestamp"].to_numpy()
        assert (np.diff(found) * sign > 0).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a\tb\tyesterday", "column 'timestamp' has 'yesterday' in line 3, not a number"),
        ("a\tb\tnan", "column 'timestamp' has 'nan' in line 3, not a number"),
        ("a\tb\tinf", "column 'timestamp' has 'inf' in line 3, not a number"),
        ("a\tb\t", "column 'timestamp' has nothing in line 3, not a number"),
        ("a\tb", "column 'timestamp' has nothing in line 3, not a number"),
        ("a\tb\t1\t2\t3", "line 3 has 5 columns, the first line names 3; repair or remove that line"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(written(tmp_path, f"{FIRST}a\tb\t1\n{line}\na\tb\t2\n"))


def test_a_surplus_column_from_the_first_line_on(tmp_path: Path):
    with pytest.raises(ValueError, match="line 2 has more than the 3 columns of the first line"):
        read(written(tmp_path, f"{FIRST}a\tb\t1\t2\na\tb\t1\t2\n"))


def test_blank_lines_are_skipped_but_counted(tmp_path: Path):
    assert len(read(written(tmp_path, f"{FIRST}a\tb\t1\n\na\tb\t2\n\n"))) == 2
    with pytest.raises(ValueError, match="in line 4,"):
        read(written(tmp_path, f"{FIRST}a\tb\t1\n\na\tb\tx\n"))


def test_latin_1_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="not UTF-8"):
        read(written(tmp_path, FIRST.encode() + "caf\xe9\tb\t1\n".encode("latin-1")))


def test_an_unknown_data_set_says_where_it_was_looked_for(tmp_path: Path):
    with pytest.raises(
        ValueError,
        match=r"dataset: 'mine' not found: there is no .*/mine/mine\.inter, and RecBole has no",
    ):
        download.download_dataset("mine", tmp_path / "mine", None)


def test_a_failed_download_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match=r"its download from http://127\.0\.0\.1:9/x\.zip failed"):
        download.download_dataset("mine", tmp_path / "data" / "mine", "http://127.0.0.1:9/x.zip")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_silent_server_is_given_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.5)
    monkeypatch.setattr(fetch, "PAUSES", ())
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.zip"
        start = time.perf_counter()
        with pytest.raises(ValueError, match="failed"):
            download.download_dataset("mine", tmp_path / "mine", url)
    assert time.perf_counter() - start < 10


def test_a_download_arrives_whole(tmp_path: Path):
    """A zip served locally, under another name inside, ends as NAME/NAME.inter."""
    import functools
    import http.server
    import zipfile

    served = tmp_path / "served"
    served.mkdir()
    with zipfile.ZipFile(served / "thing.zip", "w") as archive:
        archive.writestr("thing.inter", FIRST + "a\tb\t1\n")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/thing.zip"
        download.download_dataset("mine", tmp_path / "data" / "mine", url)
        server.shutdown()
    assert [p.name for p in (tmp_path / "data").rglob("*") if p.is_file()] == ["mine.inter"]


@pytest.mark.parametrize("separator", ["||", "::", " ", "\t", "|"])
def test_any_text_may_separate_columns(tmp_path: Path, separator: str):
    """Several characters are no pattern; a tab that was said to be there is found to be another mark."""
    lines = FIRST + "".join(f"u{k}\ti{k}\t{k}.5\n" for k in range(9))
    path = written(tmp_path, lines.replace("\t", separator))
    frame = inter_file.read_interactions(path, separator, HEADER, list(HEADER), "timestamp")
    assert frame.to_dict("list") == {
        "user_id": [f"u{k}" for k in range(9)],
        "item_id": [f"i{k}" for k in range(9)],
        "timestamp": [k + 0.5 for k in range(9)],
    }
    if separator != "\t":
        hint = inter_file.suggest_separator(inter_file.read_header(path, "\t"))
        assert hint == f" (field_separator: {separator!r} seems to stand between its columns)"
    path.write_text(path.read_text() + separator.join("abcd") + "\n")
    with pytest.raises(ValueError, match="line 11 has 4 columns, the first line names 3"):
        inter_file.read_interactions(path, separator, HEADER, list(HEADER), "timestamp")
