"""Interactions from the cache are those that are read and sorted anew, whatever happens to the file."""

import errno
import logging
import multiprocessing
import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2rec.compat import data_preparation
from m2rec.data.dataset import HistoryDataset
from m2rec.data.interaction_cache import find_cache_file, read_cache, write_cache
from m2rec.training.configuration import RunConfig, build_config
from m2rec.training.provenance import hash_training_data
from tests.conftest import random_rows, small, write_inter


@pytest.fixture(autouse=True)
def _keep_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2rec.data.interaction_cache.MIN_BYTES", 0)


def load(config: RunConfig) -> tuple[HistoryDataset, list[Any]]:
    dataset = HistoryDataset(config)
    return dataset, list(data_preparation(config, dataset))


def assert_same_data(config: RunConfig, other: RunConfig) -> None:
    (ours, our_loaders), (expected, expected_loaders) = load(config), load(other)
    assert (ours.counts, ours.gap_quartiles) == (expected.counts, expected.gap_quartiles)
    assert (ours.n_tied, ours.ascending_ties) == (expected.n_tied, expected.ascending_ties)
    for name in ("field2type", "field2source", "field2seqlen"):
        assert getattr(ours, name) == getattr(expected, name)
    for column, tokens in expected.field2id_token.items():
        assert ours.field2id_token[column].tolist() == tokens.tolist()
        assert ours.field2token_id[column] == expected.field2token_id[column]
    for our_loader, loader in zip(our_loaders, expected_loaders, strict=True):
        rows, expected_rows = our_loader.dataset.inter_feat, loader.dataset.inter_feat
        assert rows.columns == expected_rows.columns
        for column in rows.columns:
            assert torch.equal(rows[column], expected_rows[column])
    assert hash_training_data(ours, our_loaders) == hash_training_data(expected, expected_loaders)


def find_files(data_path: Path) -> list[Path]:
    return sorted((data_path / "toy").glob("toy.cache-*"))


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"rows": "prefix", "MAX_ITEM_LIST_LENGTH": 3},
        {"time_order": "recbole"},
        {"ties": "shuffled"},
        {"split": "global_time"},
        {"user_inter_num_interval": "[4,inf)", "item_inter_num_interval": "[3,inf)", "rm_dup_inter": "last"},
        {"val_interval": {"timestamp": "[2,inf)"}},
        {"normalize_field": ["timestamp"]},
    ],
    ids=str,
)
def test_a_second_start_has_the_same_data(toy: Path, others: dict[str, Any]):
    plain = build_config(small(toy, data_cache=False, **others))
    kept = build_config(small(toy, **others))
    assert_same_data(kept, plain)
    (file,) = find_files(toy)
    before = file.stat().st_ino  # a file that is made again is another one
    assert_same_data(kept, plain)
    assert [file] == find_files(toy) and file.stat().st_ino == before


def test_columns_beside_items_are_kept(tmp_path: Path):
    rows = [(*row, f"c{row[2] % 3}", row[2] / 7) for row in random_rows()]
    header = "user_id:token\titem_id:token\ttimestamp:float\tkind:token\trating:float"
    write_inter(tmp_path, "toy", rows, header)
    plain = build_config(small(tmp_path, data_cache=False, load_col={"inter": "*"}))
    kept = build_config(small(tmp_path, load_col={"inter": "*"}))
    assert_same_data(kept, plain)
    assert_same_data(kept, plain)
    assert len(find_files(tmp_path)) == 1


def test_a_label_from_a_threshold_is_a_number(tmp_path: Path):
    rows = [(*row, i % 5) for i, row in enumerate(random_rows())]
    header = "user_id:token\titem_id:token\ttimestamp:float\trating:float"
    write_inter(tmp_path, "toy", rows, header)
    config = build_config(small(tmp_path, load_col={"inter": "*"}, threshold={"rating": 3}))
    for _ in range(2):
        rows = load(config)[1][0].dataset.inter_feat
        assert rows["label"].dtype == rows["label_list"].dtype == torch.float32


def test_gaps_are_those_of_the_file(toy: Path):
    plain = HistoryDataset(build_config(small(toy)))
    plain.build()
    changed = HistoryDataset(build_config(small(toy, normalize_field=["timestamp"])))
    changed.build()
    assert plain.gap_quartiles is not None and plain.gap_quartiles == changed.gap_quartiles


def test_too_short_histories_are_a_mistake_with_the_file_of_another_split(tmp_path: Path):
    rows = [(f"u{u}", f"i{(u + j) % 7}", 100 * j + u) for u in range(40) for j in range(2)]
    write_inter(tmp_path, "toy", rows)
    load(build_config(small(tmp_path, split="global_time")))
    assert len(find_files(tmp_path)) == 1
    with pytest.raises(ValueError, match=r"no user in 'toy' has three interactions \(the most is 2; 40 "):
        load(build_config(small(tmp_path)))


def test_what_was_said_is_said_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [*random_rows(), ("", "i1", 5), (" blank", "i1", 6)]
    write_inter(tmp_path, "toy", rows)
    config = build_config(small(tmp_path))
    said = []
    for _ in range(2):
        caplog.clear()
        load(config)
        said.append([record.getMessage() for record in caplog.records if record.levelno == logging.WARNING])
    assert said[0] == said[1] and "1 of " in said[0][1] and "blanks around" in said[0][0]


def test_changed_data_replaces_the_file_and_changed_keys_add_one(toy: Path):
    config = build_config(small(toy))
    load(config)
    (first,) = find_files(toy)
    load(build_config(small(toy, ties="shuffled")))
    assert len(find_files(toy)) == 2 and first in find_files(toy)
    write_inter(toy, "toy", [*random_rows(), ("u1", "i1", 10_000)])
    assert_same_data(config, build_config(small(toy, data_cache=False)))
    (second,) = find_files(toy)
    assert second != first


def test_the_file_of_earlier_data_is_removed_whatever_the_name(tmp_path: Path):
    config = build_config(small(tmp_path, "to[y]"))
    for n_users in (30, 31):
        write_inter(tmp_path, "to[y]", random_rows(n_users))
        load(config)
    assert len([path for path in (tmp_path / "to[y]").iterdir() if path.suffix == ".arrow"]) == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other"])
def test_a_damaged_file_is_noticed_and_made_again(toy: Path, damage: str, caplog: pytest.LogCaptureFixture):
    config, plain = build_config(small(toy)), build_config(small(toy, data_cache=False))
    load(config)
    (file,) = find_files(toy)
    content = file.read_bytes()
    middle = len(content) // 2
    damaged = {
        "empty": b"",
        "cut": content[:middle],
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "other": b"something else" * 10,
    }
    file.write_bytes(damaged[damage])
    assert_same_data(config, plain)
    assert f"data_cache: {file} is damaged" in caplog.text
    assert file.read_bytes() == content
    caplog.clear()
    assert_same_data(config, plain)
    assert "is damaged" not in caplog.text


def test_a_full_disk_costs_the_cache_only(toy: Path, caplog: pytest.LogCaptureFixture):
    config, plain = build_config(small(toy)), build_config(small(toy, data_cache=False))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit is an OSError
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        load(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "can't be written" in caplog.text and "data_cache: false" in caplog.text
    assert sorted(path.name for path in (toy / "toy").iterdir()) == ["toy.inter"]
    assert_same_data(config, plain)
    assert len(find_files(toy)) == 1


def _write_often(data_path: Path) -> None:
    config = build_config(small(data_path))
    for _ in range(5):
        for file in find_files(data_path):
            file.unlink(missing_ok=True)
        load(config)


def test_processes_may_write_it_at_once(toy: Path):
    context = multiprocessing.get_context("fork")  # with the small MIN_BYTES
    processes = [context.Process(target=_write_often, args=(toy,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    (file,) = find_files(toy)
    assert read_cache(file) is not None
    assert_same_data(build_config(small(toy)), build_config(small(toy, data_cache=False)))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists a process's maps there")
def test_it_is_mapped_and_not_copied(toy: Path):
    config = build_config(small(toy))
    load(config)
    dataset, _ = load(config)
    assert dataset.histories is not None
    address = dataset.histories.items.ctypes.data
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(find_files(toy)[0].name):
            start, _, end = line.split()[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    assert any(start <= address < end for start, end in ranges)


@pytest.mark.parametrize(
    "others",
    [
        {"data_cache": False},
        {"load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]}},
    ],
)
def test_what_is_not_kept(toy: Path, others: dict[str, Any]):
    (toy / "toy" / "toy.item").write_text("item_id:token\ni1\n")
    assert find_cache_file(build_config(small(toy, **others))) is None


def test_the_three_last_used_files_are_kept(toy: Path, caplog: pytest.LogCaptureFixture):
    """The one that was used longest ago is removed, whenever it was made."""
    caplog.set_level(logging.INFO)
    configs = []
    for first in (1, 2, 3, 4, 5):
        configs.append(build_config(small(toy, val_interval={"timestamp": f"[{first},inf)"})))
    load(configs[0])
    found = [find_files(toy)[0]]
    for config in configs[1:3]:
        load(config)
        found += set(find_files(toy)) - set(found)
    for age, file in enumerate(found):  # as if all were old, the first one the oldest
        os.utime(file, (10 + age, 10 + age))
    load(configs[0])  # so now the second one is
    load(configs[3])
    assert set(found) - set(find_files(toy)) == {found[1]} and len(find_files(toy)) == 3
    assert f"{found[1]} is removed: the 3 last used ones are kept" in caplog.text
    load(configs[4])
    assert found[2] not in find_files(toy) and found[0] in find_files(toy)


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps a file that is mapped")
def test_a_file_that_is_removed_stays_where_it_is_mapped(toy: Path):
    config = build_config(small(toy))
    load(config)
    dataset, _ = load(config)
    assert dataset.histories is not None
    items = dataset.histories.items.tolist()
    for file in find_files(toy):
        file.unlink()
    assert dataset.histories.items.tolist() == items == load(config)[0].histories.items.tolist()


def test_a_file_without_the_right_to_read_it_is_not_damaged(toy: Path, caplog: pytest.LogCaptureFixture):
    config, plain = build_config(small(toy)), build_config(small(toy, data_cache=False))
    load(config)
    (file,) = find_files(toy)

    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2rec.data.interaction_cache.pa.memory_map", refuse)
        assert_same_data(config, plain)
    assert f"{file} can't be read (" in caplog.text and "Permission denied" in caplog.text
    assert "change the permissions" in caplog.text and "damaged" not in caplog.text


def test_ids_have_four_bytes_and_rows_eight(toy: Path):
    """Whether they are read or from the cache."""
    config = build_config(small(toy, rows="prefix"))
    for _ in range(2):
        dataset, loaders = load(config)
        histories = dataset.histories
        assert histories is not None and dataset.row_targets is not None
        arrays = [histories.owner, histories.items, histories.start, histories.end, dataset.row_targets]
        arrays += [histories.split.train_stop, *histories.split.targets.values()]
        assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
        rows = loaders[0].dataset.inter_feat
        for some in (rows, rows[[0, 1]], rows[:2]):
            types = {name: some[name].dtype for name in rows.columns}
            ids = ("user_id", "item_id", "item_id_list", "item_length")
            assert {types.pop(name) for name in ids} == {torch.int64}
            assert set(types.values()) == {torch.float32}


def test_a_file_of_another_version_is_made_again(toy: Path, caplog: pytest.LogCaptureFixture):
    """One with ids of 8 bytes, under the name that the file has now."""
    caplog.set_level(logging.INFO)
    config, plain = build_config(small(toy)), build_config(small(toy, data_cache=False))
    load(config)
    (file,) = find_files(toy)
    content, prepared = file.read_bytes(), read_cache(file)
    assert prepared is not None
    for name in ("user_id", "item_id"):
        prepared.columns[name] = prepared.columns[name].astype(np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2rec.data.interaction_cache._VERSION", 1)
        write_cache(file, prepared)
    assert read_cache(file) is None and "of another version" in caplog.text
    assert_same_data(config, plain)
    assert file.read_bytes() == content


def test_small_files_are_read_anew(toy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("m2rec.data.interaction_cache.MIN_BYTES", 1 << 24)
    load(build_config(small(toy)))
    assert not find_files(toy)
