"""The tables' data from public raw files: k-core and order, files found or fetched, results compared."""

import functools
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from m2rec.commands import prepare_data
from m2rec.data.raw import presets
from m2rec.data.raw.arrange import HeldInteractions
from m2rec.data.raw.batches import build_batch
from m2rec.data.raw.formats import RawInteraction
from m2rec.data.raw.options import FORMAT_NAMES, PreparationOptions
from m2rec.data.raw.public_data import Preset, read_presets
from m2rec.data.shipped import read_origin

ROOT = Path(__file__).parent.parent
REVIEWS = [  # in the order of the file: by product
    ("bob", "B1", 200), ("ann", "B1", 300), ("ann", "B2", 100), ("bob", "B3", 100), ("ann", "B3", 100),
]  # fmt: skip
MEMBERS = ["ml/ratings.dat", "ml/movies.dat"]
TEXTS = ["title", "brand"]
INTER = """user_id:token\titem_id:token\ttimestamp:float
bob\tB3\t100
bob\tB1\t200
ann\tB2\t100
ann\tB3\t100
ann\tB1\t300
"""
SEQUENCES = "1 1 2\n2 3 1 2\n"  # INTER with numbers


def interactions(*rows: tuple[str, str, int]) -> list[RawInteraction]:
    return [RawInteraction(user, item, Decimal(time), None) for user, item, time in rows]


def hold(rows: list[RawInteraction]) -> HeldInteractions:
    return HeldInteractions(iter([build_batch(rows[:7]), build_batch(rows[7:])]))


def list_held(held: HeldInteractions) -> list[tuple[str, str, int]]:
    rows: list[tuple[str, str, int]] = []
    for batch in held.iterate_batches():
        columns = (batch.users.to_pylist(), batch.items.to_pylist(), map(int, batch.times.to_pylist()))
        rows += zip(*columns, strict=True)
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_a_core_is_the_largest_part_that_is_one(seed: int):
    rng = random.Random(seed)
    draw = [(int(12 * rng.random() ** 2), int(12 * rng.random() ** 2)) for _ in range(60)]
    rows = interactions(*[(f"u{user}", f"i{item}", time) for time, (user, item) in enumerate(draw)])
    expected = list(rows)
    while True:  # one interaction at a time, in any order
        counts = Counter(x.user for x in expected) + Counter(x.item for x in expected)
        weak = [x for x in expected if min(counts[x.user], counts[x.item]) < 4]
        if not weak:
            break
        expected.remove(rng.choice(weak))
    assert 0 < len(expected) < len(rows), "the example says nothing"
    held = hold(rows)
    assert held.select_core(1) == (0, 0) and list_held(held) == [x[:3] for x in rows]
    dropped, rounds = held.select_core(4)
    assert list_held(held) == [x[:3] for x in expected]
    assert dropped == len(rows) - len(expected) and rounds > 1


def test_orders_and_times():
    rows = interactions(
        *REVIEWS, ("ann", "A9", 100)
    )  # ties stay in the file's order, not that of their codes
    held = hold(rows)
    held.sort_by_user()
    assert list_held(held) == [
        ("bob", "B3", 100), ("bob", "B1", 200), ("ann", "B2", 100), ("ann", "B3", 100), ("ann", "A9", 100),
        ("ann", "B1", 300),
    ]  # fmt: skip
    held = hold(rows)
    held.subtract_first_times()
    assert [time for *_, time in list_held(held)] == [100, 200, 0, 0, 0, 0]


def read(tmp_path: Path, suffix: str = "inter") -> str:
    return (tmp_path / "data" / "small" / f"small.{suffix}").read_text()


def write_reviews(path: Path, *more: tuple[str, str, int]) -> None:
    lines = [
        json.dumps({"reviewerID": user, "asin": item, "overall": 5.0, "unixReviewTime": time})
        for user, item, time in [*REVIEWS, *more]
    ]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A preset `small` with the files of a local server: reviews, texts, an archive of MovieLens."""
    served = tmp_path / "served"
    served.mkdir()
    write_reviews(served / "reviews.json.gz")
    metadata = [
        {
            "asin": f"B{n}",
            "title": f"T{n}",
            "brand": "X",
            "categories": [["Root", "C"]],
            "description": "long",
        }
        for n in (1, 2, 3)
    ]
    (served / "meta.json").write_text("\n".join(map(repr, metadata)))
    (served / "numbers.txt").write_text(SEQUENCES)
    with zipfile.ZipFile(served / "ml.zip", "w") as archive:
        archive.writestr("ml/ratings.dat", "".join(f"{u}::{i}::4::{t}\n" for u, i, t in REVIEWS))
        archive.writestr("ml/movies.dat", "B1::One (1999)::Drama|War\n")
        archive.writestr("../outside", "x")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(served))
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        values: dict[str, Any] = {
            "about": "a small data set",
            "page": "https://example.org/small",
            "terms": "any use",
            "sources": {
                "reviews": {
                    "files": {
                        "reviews.json.gz": {"url": f"{url}/reviews.json.gz"},
                        "meta.json": {"url": f"{url}/meta.json"},
                    },
                    "interactions": "reviews.json.gz",
                    "items": "meta.json",
                    "options": {
                        "format": "amazon-2014", "by_user": True, "no_rating": True, "text": TEXTS,
                    },
                    "sha256": hashlib.sha256(INTER.encode()).hexdigest(),
                    "note": "nothing differs",
                },
                "numbers": {
                    "files": {"numbers.txt": {"url": f"{url}/numbers.txt", "size": len(SEQUENCES)}},
                    "interactions": "numbers.txt",
                    "options": {"format": "sequences"},
                },
                "archive": {
                    "files": {"ml.zip": {"url": f"{url}/ml.zip", "unpack": MEMBERS}},
                    "interactions": "ml",
                    "options": {"format": "movielens", "by_user": True, "no_rating": True},
                    "sha256": hashlib.sha256(INTER.replace("ann\tB2\t100\n", "").encode()).hexdigest(),
                    "min_item_count": 2,
                },
                "account": {
                    "files": {"reviews.json.gz": {}},
                    "interactions": "reviews.json.gz",
                    "options": {"format": "amazon-2014"},
                },
            },
            "users": 2,
            "items": 3,
            "interactions": 5,
            "sequences_sha256": hashlib.sha256(SEQUENCES.encode()).hexdigest(),
        }  # fmt: skip
        monkeypatch.setattr(presets, "read_presets", lambda: {"small": Preset(**values)})
        yield values
        server.shutdown()


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = prepare_data.main(
            ["--preset=small", f"--data-path={tmp_path / 'data'}", *map(str, arguments)]
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_one_command_downloads_prepares_and_compares(
    tmp_path: Path, preset: dict[str, Any], command: Command, caplog: pytest.LogCaptureFixture
):
    status, out, _ = command("--download")
    assert status == 0 and read(tmp_path) == INTER
    assert out.count("as in the tables") == 5 and "NOT" not in out
    assert out.splitlines()[-1] == "note: nothing differs"
    assert read(tmp_path, "item").splitlines() == [
        "item_id:token\ttitle:token_seq\tbrand:token", "B1\tT1\tX", "B2\tT2\tX", "B3\tT3\tX",
    ]  # fmt: skip
    assert "(a small data set: any use; https://example.org/small)" in caplog.text
    assert sorted(p.name for p in (tmp_path / "data" / "raw").iterdir()) == ["meta.json", "reviews.json.gz"]
    preset["sources"]["reviews"]["files"]["reviews.json.gz"]["url"] = "http://127.0.0.1:9/gone"
    assert command("--download")[0] == 0, "files that exist are not asked for again"


def test_what_differs_is_said_line_by_line(tmp_path: Path, preset: dict[str, Any], command: Command):
    (raw := tmp_path / "raw").mkdir()
    write_reviews(raw / "reviews.json.gz", ("cat", "B3", 7))
    status, out, _ = command(f"--raw={raw}")
    assert status == 1
    assert "\nusers: 3, NOT as in the tables, which have 2\n" in out
    assert "\nitems: 3, as in the tables\n" in out
    assert "\ninteractions: 6, NOT as in the tables, which have 5\n" in out
    digest = hashlib.sha256(read(tmp_path).encode()).hexdigest()
    assert f"\nsha256 of small.inter: {digest}, NOT as in the tables, which have " in out
    # the same interactions, with a tie in another order
    write_reviews(raw / "reviews.json.gz")
    preset["sources"]["reviews"]["options"]["by_user"] = False
    status, out, _ = command(f"--raw={raw}")
    assert status == 1 and out.count("NOT as in the tables") == 2 and "sequences" in out


def test_numbered_sequences_have_the_same_order(tmp_path: Path, preset: dict[str, Any], command: Command):
    status, out, _ = command("--source=numbers", "--download")
    assert status == 0 and out.count("as in the tables") == 4
    assert read(tmp_path).splitlines()[1:3] == ["1\t1\t1", "1\t2\t2"]


def test_an_archive_is_unpacked(tmp_path: Path, preset: dict[str, Any], command: Command):
    status, out, _ = command("--source=archive", "--download")
    assert status == 0 and read(tmp_path) == INTER
    assert "sha256 of small.inter, items with 2 or more interactions: " in out
    assert read(tmp_path, "item").splitlines()[1] == "B1\tOne (1999)\tDrama, War"
    raw = tmp_path / "data" / "raw"
    found = sorted(str(p.relative_to(raw)) for p in raw.rglob("*") if p.is_file())
    assert found == ["ml.zip", "ml/movies.dat", "ml/ratings.dat"]
    (raw / "ml" / "ratings.dat").unlink()
    assert command("--source=archive")[0] == 0, "an archive that exists is unpacked"
    (raw / "ml" / "ratings.dat").unlink()
    (raw / "ml.zip").write_bytes(b"PK nothing")
    status, _, err = command("--source=archive")
    assert status == 2 and "ml.zip: it is damaged or another archive" in err


def test_files_at_other_places(tmp_path: Path, preset: dict[str, Any], command: Command):
    write_reviews(tmp_path / "mine.json.gz")
    status, out, _ = command(f"--interactions={tmp_path / 'mine.json.gz'}")
    assert status == 0 and read(tmp_path) == INTER and "items with text: -" in out


def test_texts_are_optional(
    tmp_path: Path, preset: dict[str, Any], command: Command, caplog: pytest.LogCaptureFixture
):
    (raw := tmp_path / "raw").mkdir()
    write_reviews(raw / "reviews.json.gz")
    status, out, _ = command(f"--raw={raw}")
    assert status == 0 and "items with text: -" in out
    assert (
        f"{raw / 'meta.json'}: no such file, so the items get no texts; --download fetches http"
        in caplog.text
    )


def test_mistakes(
    tmp_path: Path, preset: dict[str, Any], command: Command, capsys: pytest.CaptureFixture[str]
):
    raw = tmp_path / "data" / "raw"
    cases: list[tuple[tuple[str, ...], str]] = [
        ((), f"error: --raw: there is no {raw / 'reviews.json.gz'}; --download fetches http://127.0.0.1:"),
        ((), f"reviews.json.gz, or get the file from https://example.org/small and put it into {raw}\n"),
        (
            ("--source=account", "--download"),
            f"no {raw / 'reviews.json.gz'}; get the file from https://example.org/small and put it into ",
        ),
        (
            ("--source=reviewz",),
            "--source: expected one of reviews, numbers, archive, account, got 'reviewz'",
        ),
        (("--preset=smal",), "--preset: unknown preset 'smal'; did you mean 'small'?; it is one of small"),
        (("--core=5",), "--core: the preset sets it; leave it out"),
        (("csv",), "FORMAT: the preset sets it; leave out 'csv'"),
    ]
    for arguments, message in cases:
        status, _, err = command(*arguments)
        assert status == 2 and message in err and err.count("\n") == 1, err
    preset["sources"]["reviews"]["files"]["reviews.json.gz"]["url"] += "x"
    status, _, err = command("--download")
    assert status == 2 and "gzx: 404 " in err and "or get the file from https://example.org/small" in err
    for arguments, message in (
        (["csv", "--download"], "--download: needs a preset; add --preset=NAME"),
        (["csv"], "the following arguments are required: --interactions, --dataset"),
        ([], "the following arguments are required: FORMAT, --interactions, --dataset"),
    ):
        assert prepare_data.main(arguments) == 2 and message in capsys.readouterr().err


def test_the_shipped_presets():
    """Options that exist, hashes of the right form, and the counts that the shipped settings are for."""
    names = {field.name for field in fields(PreparationOptions)}
    shipped = read_presets()
    assert {"ml-1m", "amazon-beauty", "amazon-sports-outdoors", "amazon-toys-games", "food"} == set(shipped)
    for name, entry in shipped.items():
        for source in entry.sources.values():
            assert set(source.options) <= names - {"interactions", "items", "dataset", "data_path"}
            assert source.options["format"] in FORMAT_NAMES
            members = {member for file in source.files.values() for member in file.unpack}
            folders = {str(Path(member).parent) for member in members}
            assert source.interactions in {*source.files, *folders}
            assert source.items is None or source.items in source.files
            assert source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256)
            for file in source.files.values():
                assert file.url is None or file.url.startswith("https://")
        origin = read_origin(name)
        counts = {"users": entry.users, "items": entry.items, "interactions": entry.interactions}
        assert not origin or counts == {key: origin[key] for key in counts}


def test_the_page_of_results_has_the_same_hashes():
    page = (ROOT / "docs" / "results.md").read_text()
    for name, entry in read_presets().items():
        for source in entry.sources.values():
            if source.sha256:
                assert re.search(rf"`{name}`.*{source.sha256[:8]}", page), name


@pytest.mark.skipif("M2REC_DATA" not in os.environ, reason="needs the benchmark data")
def test_the_tables_data_from_the_order_of_the_public_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The public file has the reviews by product; reviewers appear in the order of the tables' file."""
    name = "amazon-toys-games"
    inter = Path(os.environ["M2REC_DATA"]) / name / f"{name}.inter"
    rows = [line.split("\t") for line in inter.read_text().splitlines()[1:]]
    order = {user: n for n, user in enumerate(dict.fromkeys(row[0] for row in rows))}
    rows.sort(key=lambda row: (row[1], order[row[0]]))
    reviews = tmp_path / "reviews.json"
    with reviews.open("w") as file:
        for user, item, time in rows:
            file.write(f'{{"reviewerID": "{user}", "asin": "{item}", "unixReviewTime": {time}}}\n')
    arguments = [f"--interactions={reviews}", f"--data-path={tmp_path / 'data'}"]
    assert prepare_data.main([f"--preset={name}", *arguments]) == 0
    assert capsys.readouterr().out.count("as in the tables") == 5
    assert (tmp_path / "data" / name / f"{name}.inter").read_bytes() == inter.read_bytes()
