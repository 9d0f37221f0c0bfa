"""Each raw format as it is published, quirks included, and what becomes of values."""

import gzip
import json
import re
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from m2rec.data.raw import formats
from m2rec.data.raw.formats import FORMATS, RawInteraction, RawItem
from m2rec.data.raw.tally import Tally


def written(tmp_path: Path, content: str, name: str, encoding: str = "utf-8") -> Path:
    """Write a file, gzipped if its name says so."""
    path = tmp_path / name
    data = content.encode(encoding)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def event(user: str, item: str, time: str, rating: str | None = None) -> RawInteraction:
    return RawInteraction(user, item, Decimal(time), None if rating is None else Decimal(rating))


ML_100K = {
    "u.data": "196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
    "u.item": "1|Toy Story (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?Toy%20Story%20(1995)"
    "|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "267|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "543|Misérables, Les (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?Mis%E9rables%2C+Les+%281995%29"
    "|0|0|0|0|0|0|0|0|1|0|0|0|1|0|0|0|0|0|1\n",
}
ML_1M = {
    "ratings.dat": "1::1193::5::978300760\n1::661::3::978302109\n",
    "movies.dat": "1::Toy Story (1995)::Animation|Children's|Comedy\n73::Misérables, "
    "Les (1995)::Drama|Musical\n",
}
ML_20M = {
    "ratings.csv": "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,4.0,1112484676\n",
    "movies.csv": "movieId,title,genres\n1,Toy Story (1995),Adventure|Animation\n"
    '11,"American President, The (1995)",Comedy|Drama\n'
    '7789,"11\'09""01 - September 11 (2002)",Drama\n83773,Away with Words (1999),(no genres listed)\n',
}


@pytest.mark.parametrize(
    ("files", "encoding", "events", "items"),
    [
        (
            ML_100K,
            "latin-1",
            [event("196", "242", "881250949", "3"), event("186", "302", "891717742", "3")],
            [
                RawItem("1", ("Toy Story (1995)", "Animation, Children's, Comedy")),
                RawItem("267", ("unknown", "")),
                RawItem("543", ("Misérables, Les (1995)", "Drama, Musical, Western")),
            ],
        ),
        (
            ML_1M,
            "latin-1",
            [event("1", "1193", "978300760", "5"), event("1", "661", "978302109", "3")],
            [
                RawItem("1", ("Toy Story (1995)", "Animation, Children's, Comedy")),
                RawItem("73", ("Misérables, Les (1995)", "Drama, Musical")),
            ],
        ),
        (
            ML_20M,
            "utf-8",
            [event("1", "2", "1112486027", "3.5"), event("1", "29", "1112484676", "4")],
            [
                RawItem("1", ("Toy Story (1995)", "Adventure, Animation")),
                RawItem("11", ("American President, The (1995)", "Comedy, Drama")),
                RawItem("7789", ("11'09\"01 - September 11 (2002)", "Drama")),
                RawItem("83773", ("Away with Words (1999)", "")),
            ],
        ),
    ],
)
def test_movielens(
    tmp_path: Path, files: dict[str, str], encoding: str, events: list[RawInteraction], items: list[RawItem]
):
    for name, content in files.items():
        written(tmp_path, content, name, encoding)
    found, ratings, films = formats.find_movielens_files(tmp_path)
    assert films is not None
    assert list(found.interactions(Tally(ratings))) == events
    assert list(found.items(Tally(films))) == items
    films.unlink()
    assert formats.find_movielens_files(tmp_path)[2] is None
    ratings.unlink()
    with pytest.raises(ValueError, match=r"no u\.data, ratings\.dat, ratings\.csv in it"):
        formats.find_movielens_files(tmp_path)


# per format: lines of interactions, what they are, lines of items, what they are
PUBLISHED: dict[str, tuple[str, list[RawInteraction], str, list[RawItem]]] = {
    "amazon-2014": (
        '{"reviewerID": "A1YJEY40YUW4SE", "asin": "7806397051", "reviewerName": "Andrea", "helpful": [3, 4], '
        '"reviewText": "Very oily, \\"creamy\\"", "overall": 1.0, "summary": "Don\'t waste your money", '
        '"unixReviewTime": 1391040000, "reviewTime": "01 30, 2014"}\n',
        [event("A1YJEY40YUW4SE", "7806397051", "1391040000", "1")],
        "{'asin': '0205616461', 'description': \"As we age, we're\\nall `dry' \\x26 tired\", "
        "'title': \"Bio-Active "
        'Anti-Aging Serum (Firming Ultra-Hydrating) &amp; More", '
        "'imUrl': 'http://ecx.images-amazon.com/x.jpg', "
        "'salesRank': {'Health & Personal Care': 461765}, 'categories': [['Beauty', 'Skin Care'], ['Beauty', "
        "'Face']], 'related': {'also_bought': ['B1']}, 'brand': ''}\n{'asin': 'B2', 'price': 3.17}\n",
        [
            RawItem(
                "0205616461",
                (
                    "Bio-Active Anti-Aging Serum (Firming Ultra-Hydrating) & More",
                    "",
                    "Beauty, Skin Care, Face",
                    "As we age, we're all `dry' & tired",
                ),
            ),
            RawItem("B2", ("", "", "", "")),
        ],
    ),
    "amazon-2018": (
        '{"overall": 5.0, "vote": "2", "verified": true, "reviewTime": "07 3, 2015", "reviewerID": '
        '"A1J205ZK25TZ6W", "asin": "B00005N7P0", "style": {"Format:": " Kindle"}, '
        '"unixReviewTime": 1435881600}\n',
        [event("A1J205ZK25TZ6W", "B00005N7P0", "1435881600", "5")],
        '{"category": ["Grocery &amp; Gourmet Food", "Tea"], "tech1": "", '
        '"description": ["A <b>fine</b> tea.", '
        '"100&nbsp;g"], "fit": "", "title": "Green Tea", "also_buy": [], '
        '"brand": "by\\n    \\n    Twinings", '
        '"feature": [], "rank": [">#1"], "price": "$12.50", "asin": "B00005N7P0"}\n'
        '{"category": [], "description": [], "title": "var aPageStart = (new Date()).getTime();", '
        '"brand": null, '
        '"asin": "B2"}\n',
        [
            RawItem(
                "B00005N7P0",
                (
                    "Green Tea",
                    "by Twinings",
                    "Grocery & Gourmet Food, Tea",
                    "A <b>fine</b> tea. 100 g",
                ),
            ),
            RawItem("B2", ("", "", "", "")),
        ],
    ),
    "amazon-2023": (
        '{"rating": 5.0, "title": "Such a lovely scent", "text": "...", "images": [], "asin": "B00YQ6X8EO", '
        '"parent_asin": "B00YQ6X8E0", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", "timestamp": 1588687728923, '
        '"helpful_vote": 0, "verified_purchase": true}\n',
        [event("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B00YQ6X8E0", "1588687728.923", "5")],
        '{"main_category": "All Beauty", "title": "Howard \\ud83d\\ude00 LC0008", "average_rating": 4.8, '
        '"features": ["Clean", "Soft"], "description": [], "price": null, "store": "Howard Products", '
        '"categories": [], "details": {"Size": "1"}, "parent_asin": "B00YQ6X8E0", "bought_together": null}\n',
        [RawItem("B00YQ6X8E0", ("Howard 😀 LC0008", "Howard Products", "", "Clean Soft", ""))],
    ),
    "google-local": (
        '{"user_id": "1.18E+20", "name": "x", "time": 1597431662039, "rating": 5, "text": null, '
        '"pics": null, '
        '"resp": null, "gmap_id": "0x87ec2394c2cd9d2d:0xd1119cfbee0da6f3"}\n'
        '{"user_id": "101463350189962023774", "time": 1609909927056, "rating": null, '
        '"gmap_id": "0x87ec2394c2cd9d2d:0xd1119cfbee0da6f3"}\n',
        [
            event("1.18E+20", "0x87ec2394c2cd9d2d:0xd1119cfbee0da6f3", "1597431662.039", "5"),
            event("101463350189962023774", "0x87ec2394c2cd9d2d:0xd1119cfbee0da6f3", "1609909927.056"),
        ],
        '{"name": "Porter Pharmacy", "address": "Porter Pharmacy, 129 N Second St, Cochran, GA 31014", '
        '"gmap_id": "0x88f16e41928ff687:0x883dad4fd048e8f8", "description": null, "latitude": 32.3883, '
        '"category": ["Pharmacy", "Store"], "hours": [["Friday", "8AM\\u20136PM"]], '
        '"MISC": {"Service": ["In-store"]}}\n'
        '{"name": "Pit", "address": null, "gmap_id": "0x1:0x2", "description": "Dark &amp; deep.", '
        '"category": null}\n',
        [
            RawItem(
                "0x88f16e41928ff687:0x883dad4fd048e8f8",
                (
                    "Porter Pharmacy",
                    "Pharmacy, Store",
                    "",
                    "Porter Pharmacy, 129 N Second St, Cochran, GA 31014",
                ),
            ),
            RawItem("0x1:0x2", ("Pit", "", "Dark & deep.", "")),
        ],
    ),
    "yelp": (
        '{"review_id":"KU_O5udG6zpxOg-VcAEodg","user_id":"mh_-eMZ6K5RLWhZyISBhwA",'
        '"business_id":"XQfwVwDr-v0ZS3_CbbE5Xw",'
        '"stars":3.0,"useful":0,"text":"If you decide to eat here,\\n\\nbe aware",'
        '"date":"2018-07-07 22:09:11"}\n',
        [event("mh_-eMZ6K5RLWhZyISBhwA", "XQfwVwDr-v0ZS3_CbbE5Xw", "1531001351", "3")],
        '{"business_id":"MTSW4McQd7CbVtyjqoe9mw","name":"St Honore Pastries","address":"935 Race St",'
        '"city":"Philadelphia",'
        '"state":"PA","stars":4.0,"attributes":null,"categories":"Restaurants, Food, Bubble Tea",'
        '"hours":null}\n'
        '{"business_id":"B2","name":"Café","city":"","categories":null}\n',
        [
            RawItem(
                "MTSW4McQd7CbVtyjqoe9mw",
                ("St Honore Pastries", "Restaurants, Food, Bubble Tea", "Philadelphia"),
            ),
            RawItem("B2", ("Café", "", "")),
        ],
    ),
    "steam": (
        "{u'username': u'Chaos \"Syren\"', u'hours': 0.1, u'products': 41, u'product_id': u'725280', "
        "u'page_order': 0, "
        "u'date': u'2017-12-17', u'text': u'This wouldn\\u2019t do', u'early_access': False, u'page': 1}\n"
        "{u'user_id': u'76561198', u'username': u'\\ud83d\\ude00 Ann', u'product_id': u'328100', "
        "u'date': u'2017-08-02', u'text': u\"don't\"}\n",
        [event('Chaos "Syren"', "725280", "1513468800"), event("😀 Ann", "328100", "1501632000")],
        "{u'publisher': u'Kotoshiro', u'genres': [u'Action', u'Casual'], "
        "u'app_name': u'Lost Summoner Kitty', "
        "u'title': u'Lost Summoner Kitty', u'tags': [u'Strategy', u'Action'], u'price': 4.99, "
        "u'id': u'761140', "
        "u'developer': u'Kotoshiro'}\n"
        "{u'app_name': u'Log Challenge', u'tags': [u'Action'], u'id': u'773570', u'price': 2.99}\n",
        [
            RawItem("761140", ("Lost Summoner Kitty", "Action, Casual", "Strategy, Action", "Kotoshiro")),
            RawItem("773570", ("Log Challenge", "", "Action", "")),
        ],
    ),
    "mind": (
        "1\tU13740\t11/11/2019 9:05:58 AM\tN55189 N42782\tN55689-1 N35729-0\n"
        "2\tU91836\t11/12/2019 6:11:30 PM\t\tN20678-0 N39317-1 N58114-1\n"
        "3\tU91836\t11/12/2019 6:11:31 PM\tN1\tN20678-0\n",
        [
            event("U13740", "N55689", "1573463158"),
            event("U91836", "N39317", "1573582290"),
            event("U91836", "N58114", "1573582290"),
        ],
        'N55528\tlifestyle\troyals\tThe "Brands" Prince Charles Swears By\tShop the notebooks.\t'
        'https://assets.msn.com/x.html\t[{"Label": "Prince"}]\t[]\nN2\tsports\tnfl\tOops\t\t\t\t\n',
        [
            RawItem(
                "N55528",
                ('The "Brands" Prince Charles Swears By', "lifestyle", "royals", "Shop the notebooks."),
            ),
            RawItem("N2", ("Oops", "sports", "nfl", "")),
        ],
    ),
    "sequences": (
        "1 7 8 7\n2 9\n",
        [event("1", "7", "1"), event("1", "8", "2"), event("1", "7", "3"), event("2", "9", "4")],
        "",
        [],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_published_formats(tmp_path: Path, name: str):
    suffix = ".json" if name == "yelp" else ".json.gz"
    events, expected_events, items, expected_items = PUBLISHED[name]
    found = FORMATS[name]
    assert list(found.interactions(Tally(written(tmp_path, events, f"r{suffix}")))) == expected_events
    if not found.token:
        assert not items
        return
    assert list(found.items(Tally(written(tmp_path, items, f"i{suffix}")))) == expected_items
    assert len({text.column for text in found.texts} | {"item_id"}) == len(found.texts) + 1


def test_what_makes_an_interaction_malformed(tmp_path: Path):
    good = {"reviewerID": "u", "asin": "i", "unixReviewTime": 1, "overall": 5.0}
    changes: list[tuple[dict[str, object], str]] = [
        ({"reviewerID": None}, "line 1: 'reviewerID' is empty"),
        ({"asin": " "}, "'asin' is empty"),
        ({"unixReviewTime": float("nan")}, "'unixReviewTime' is empty"),
        ({"unixReviewTime": "soon"}, "time 'soon' is neither a Unix time nor a recognized date"),
        ({"unixReviewTime": float("inf")}, "time inf is neither"),
        ({"unixReviewTime": True}, "time True is neither"),
        ({"overall": "good"}, "'good' is not a number"),
        ({"asin": "a\tb"}, r"id 'a\tb' has a tab, a newline or another control character"),
        ({"asin": "a\n"}, "has a tab, a newline"),
        ({"asin": "a\0"}, "has a tab, a newline"),
        ({"asin": "a\ud83d"}, "has half a character"),
        ({"asin": ["a"]}, "['a'] is not a valid id"),
        ({"asin": True}, "True is not a valid id"),
    ]
    for change, message in changes:
        path = written(tmp_path, json.dumps({**good, **change}) + "\n" + json.dumps(good), "r.json")
        tally = Tally(path, max_bad=1)
        assert list(FORMATS["amazon-2018"].interactions(tally)) == [event("u", "i", "1", "5")]
        assert len(tally.examples) == 1 and message in tally.examples[0], tally.examples
    tally = Tally(written(tmp_path, '{"user": 1, "item": 2}\n', "r.json"), max_bad=1)
    assert list(FORMATS["amazon-2018"].interactions(tally)) == []
    assert tally.examples == ["line 1: 'reviewerID' is missing, the row has 'user, item'"]


def test_a_malformed_line_does_not_settle_the_unit(tmp_path: Path):
    good = {"reviewerID": "u", "asin": "i", "unixReviewTime": 10**12, "overall": 5.0}
    odd = [{**good, "unixReviewTime": 0, key: bad} for key, bad in (("asin", "a\tb"), ("overall", "x"))]
    odd.append({**good, "unixReviewTime": "soon"})
    path = written(tmp_path, "\n".join(json.dumps(line) for line in [*odd, good, *odd]), "r.json")
    tally = Tally(path, max_bad=1)
    assert list(FORMATS["amazon-2018"].interactions(tally)) == [event("u", "i", "1000000000", "5")]
    assert tally.malformed_count == 6 and tally.notes == ["timestamps read as milliseconds"]


@pytest.mark.parametrize("kind", formats.TABLE_KINDS)
def test_blanks_around_ids(tmp_path: Path, kind: str):
    path = tmp_path / f"x.{kind}"
    users = ["u1", " u1", "u1 ", "u 1", "\xa0u1", " "]
    lines = [{"user": user, "item": "i ", "time": str(n)} for n, user in enumerate(users)]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        __import__("pyarrow.parquet").parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(line) for line in lines))
    else:
        path.write_text("user, item, time\n" + "\n".join(", ".join(line.values()) for line in lines))
    found = formats.build_table_format(kind, "user", "item", "time", item_kind=kind, item_id="user")
    tally = Tally(path, max_bad=1)
    read = list(found.interactions(tally))
    assert [(user, item) for user, item, *_ in read] == [
        ("u1", "i"), ("u1", "i"), ("u1", "i"), ("u 1", "i"), ("u1", "i"),
    ]  # fmt: skip
    assert tally.malformed_count == 1  # no user but blanks
    first = "' i ' in line 2" if kind == "csv" else "'i ' in line 1"
    assert tally.notes[1:] == [f"blanks around ids were removed: 8, the first from {first}"]
    items = Tally(path, max_bad=1)
    assert [item.token for item in found.items(items)] == ["u1", "u1", "u1", "u 1", "u1"]
    assert items.notes[0].startswith("blanks around ids were removed: 3, the first from ' u1' in line ")


def test_the_wrong_format_is_an_error(tmp_path: Path):
    path = written(tmp_path, PUBLISHED["amazon-2023"][0], "r.json")
    with pytest.raises(
        ValueError, match=r"1 of 1 lines are malformed.*'reviewerID' is missing, the row has 'rat"
    ):
        list(FORMATS["amazon-2018"].interactions(Tally(path, max_bad=0.01)))


@pytest.mark.parametrize("kind", formats.TABLE_KINDS)
def test_tables(tmp_path: Path, kind: str):
    path = tmp_path / f"x.{kind}"
    lines = [
        {"who": "u1", "what": "a", "stars": 4.5, "when": "2020-01-01", "name": "A & B", "tags": "x"},
        {"who": "2", "what": "b", "stars": None, "when": "2020-01-01 00:00:01", "name": None, "tags": "y"},
    ]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        __import__("pyarrow.parquet").parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(line) for line in lines))
    else:
        cells = [lines[0].keys(), *(line.values() for line in lines)]
        path.write_text("\n".join(",".join("" if c is None else str(c) for c in row) for row in cells))
    found = formats.build_table_format(kind, "who", "what", "when", "stars", kind, "what", ["name", "tags"])
    assert list(found.interactions(Tally(path))) == [
        event("u1", "a", "1577836800", "4.5"),
        event("2", "b", "1577836801"),
    ]
    assert list(found.items(Tally(path))) == [RawItem("a", ("A & B", "x")), RawItem("b", ("", "y"))]
    assert formats.build_table_format(kind, "who", "what", "when").rating == ()
    ordered, tally = formats.build_table_format(kind, "who", "what"), Tally(path)
    assert list(ordered.interactions(tally)) == [event("u1", "a", "1"), event("2", "b", "2")]
    assert tally.notes == ["no time column: file order is used as time, 1, 2, 3, ..."]


def test_parquet_with_types(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    moment = datetime(2020, 1, 1, 0, 0, 0, 250_000, tzinfo=UTC)
    expected = "1577836800.25"
    for unit in ("ms", "us", "ns"):
        for zone in (None, "UTC"):
            times = pyarrow.array([moment.replace(tzinfo=None), None], pyarrow.timestamp(unit, zone))
            columns = {"u": pyarrow.array([7.0, 8.0]), "i": pyarrow.array(["a", "b"]).dictionary_encode()}
            parquet.write_table(pyarrow.table({**columns, "t": times}), tmp_path / "x.parquet")
            tally = Tally(tmp_path / "x.parquet", max_bad=1)
            assert list(formats.build_table_format("parquet", "u", "i", "t").interactions(tally)) == [
                event("7", "a", expected)
            ]
            assert tally.examples == ["line 2: 't' is empty"]
    dates = pyarrow.table({"u": [1], "i": [2], "t": [date(2020, 1, 1)]})
    parquet.write_table(dates, tmp_path / "x.parquet")
    found = formats.build_table_format("parquet", "u", "i", "t").interactions(Tally(tmp_path / "x.parquet"))
    assert list(found) == [event("1", "2", "1577836800")]


def test_every_format_has_its_example():
    assert set(PUBLISHED) == set(FORMATS)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) and entry.about for name, entry in FORMATS.items())
