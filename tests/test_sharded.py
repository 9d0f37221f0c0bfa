"""An item table that is shared out over processes: the same numbers as a whole one, and its memory once."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from m2rec import distributed, tensor_files
from m2rec.errors import UserError
from m2rec.nn import sharded_embedding
from m2rec.nn.encoder import Encoder
from m2rec.nn.sharded_embedding import ShardedEmbedding
from m2rec.run_folder import RunFolder
from m2rec.serving.recommender import Recommender
from m2rec.settings import ModelSettings
from m2rec.tensor_files import RowBlocks, open_tensors, read_tensors, write_tensors
from m2rec.training import checkpoint
from m2rec.training.configuration import build_config
from m2rec.training.ema import WeightEMA
from m2rec.training.lazy_adam import LazyAdam, expose_gradient_rows
from m2rec.training.sharding import clip_with_own_rows, load_weights, settle_shard_items, write_weights
from m2rec.training.sparse_updates import resolve_sparse_updates
from m2rec.training.trainer import RunTrainer
from run_mm import main
from tests.conftest import as_arguments, random_rows, small, write_inter
from tests.processes import run_together
from tests.test_checkpoint import outcome
from tests.test_distributed import run_in_two

Command = Callable[..., tuple[int, str, str]]

V, D = 43, 6  # V is no multiple of the processes
SETTINGS = ModelSettings(hidden_size=24, inner_size=16, head_dim=16, d_state=4, n_layers=1)


class Whole:
    """The reference: `nn.Embedding` in one process, and what each process asks of it."""

    def __init__(self, n: int) -> None:
        torch.manual_seed(3)
        self.embedding = nn.Embedding(V, D, padding_idx=0)
        self.generator_state = torch.get_rng_state()
        # the last process asks for nothing; others for the same items, for padding, and for some twice
        self.ids = [torch.randint(V, (rank + 2, 5)) for rank in range(n - 1)]
        self.ids[0][0] = torch.tensor([0, 7, 7, V - 1, 1])
        self.ids.append(torch.zeros(0, dtype=torch.long))
        self.slopes = [torch.randn(*ids.shape, D) for ids in self.ids]
        self.x = [torch.randn((0, 2, 1, 3)[rank], D) for rank in range(n)]  # for one process no row

    def compute_gradient(self) -> Tensor:
        """(V, D), of all processes' losses together."""
        self.embedding.zero_grad()
        losses = [
            (self.embedding(ids) * slope).sum() for ids, slope in zip(self.ids, self.slopes, strict=True)
        ]
        torch.stack(losses).sum().backward()
        assert self.embedding.weight.grad is not None
        return self.embedding.weight.grad


def compare_with_one_process(n: int) -> None:
    """Rows, gradients, scores, the norm of gradients and files, in one of n processes."""
    with distributed.join_process_group(torch.device("cpu")):
        whole, rank = Whole(n), distributed.process_rank()
        torch.manual_seed(3)
        sharded = ShardedEmbedding(V, D)
        own = slice(sharded.start, sharded.end)
        assert torch.equal(torch.get_rng_state(), whole.generator_state)
        assert torch.equal(sharded.rows.weight, whole.embedding.weight[own])

        rows = sharded(whole.ids[rank])
        assert torch.equal(rows, whole.embedding(whole.ids[rank]))
        (rows * whole.slopes[rank]).sum().backward()
        gradient, expected = sharded.rows.weight.grad, whole.compute_gradient()
        assert gradient is not None and gradient.is_sparse
        torch.testing.assert_close(gradient.to_dense(), expected[own])
        used = torch.cat([ids.flatten() for ids in whole.ids]).unique()
        used = used[(used > 0) & (used >= own.start) & (used < own.stop)]  # padding gets no gradient
        assert torch.equal(gradient.coalesce().indices()[0] + own.start, used)

        check_clipping(sharded, whole, own)
        scores = sharded.score_items(whole.x[rank], sharded.rows.weight.detach())
        torch.testing.assert_close(scores, whole.x[rank] @ whole.embedding.weight.detach().T)
        check_gathering(sharded, whole)
        check_scoring_without_rows(rank)


def check_scoring_without_rows(rank: int) -> None:
    """One process scores; all others have no rows left, but items with a text part of the table."""
    vectors = torch.randn(V, 3, generator=torch.Generator().manual_seed(5))
    encoders = []
    for is_sharded in (False, True):
        torch.manual_seed(3)
        encoders.append(Encoder(SETTINGS, V, 5, vectors, is_sharded).eval())
    one, sharded = encoders
    if rank > 0:
        sharded.take_part_in_scoring()
        return
    items, x = torch.tensor([[1, 2], [V - 1, 0]]), torch.randn(2, SETTINGS.hidden_size)
    with torch.no_grad():
        sharded.prepare_step(items, [])
        scores = sharded.score_all_items(x, items)
        torch.testing.assert_close(scores, one.score_all_items(x, items))


def check_clipping(sharded: ShardedEmbedding, whole: Whole, own: slice) -> None:
    """The norm is that of all rows and of the parameters that all processes have."""
    common, expected = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    common.grad, expected.grad = torch.full((3,), 2.0), torch.full((3,), 2.0)
    clip_with_own_rows([common], expose_gradient_rows(sharded.rows.weight), max_norm=0.5)
    nn.utils.clip_grad_norm_([expected, whole.embedding.weight], max_norm=0.5)
    torch.testing.assert_close(common.grad, expected.grad)
    assert sharded.rows.weight.grad is not None and whole.embedding.weight.grad is not None
    torch.testing.assert_close(sharded.rows.weight.grad.to_dense(), whole.embedding.weight.grad[own])


def check_gathering(sharded: ShardedEmbedding, whole: Whole) -> None:
    sharded_embedding._BLOCK_ROWS = 4
    blocks, is_main = list(sharded.gather_blocks()), distributed.is_main_process()
    assert bool(blocks) == is_main and max(map(len, blocks), default=0) <= 4
    if is_main:
        assert torch.equal(torch.cat(blocks), whole.embedding.weight)
    before = sharded.rows.weight.detach().clone()
    sharded.scatter_rows(torch.cat(blocks) + 1 if is_main else None)
    assert torch.equal(sharded.rows.weight, before + 1)


def check_whole_network(folder: Path) -> None:
    """Initial values, files, and bytes of table, moments and average, over all processes."""
    with distributed.join_process_group(torch.device("cpu")):
        held, encoders = [], []
        for is_sharded in (False, True):
            torch.manual_seed(3)
            encoder = Encoder(SETTINGS, 20_011, 5, is_sharded=is_sharded)  # more than two blocks
            ema = WeightEMA(encoder, 9, encoder.own_embedding.weight)
            optimizer = torch.optim.AdamW(encoder.parameters())
            average = ema.find_average(encoder.own_embedding.weight)
            lazy = LazyAdam(encoder.own_embedding, optimizer.param_groups[0], average)
            state = lazy.state_tensors()
            held.append([encoder.own_embedding.weight, average, state["first"], state["second"]])
            encoders.append(encoder)
        one, sharded = encoders
        before = sharded.own_embedding.weight.detach().clone()
        own = torch.tensor([tensor.untyped_storage().nbytes() for tensor in held[1]])
        torch.distributed.all_reduce(own)
        assert own.tolist() == [tensor.untyped_storage().nbytes() for tensor in held[0]]
        files, is_main = RunFolder(folder), distributed.is_main_process()
        write_weights(files, sharded, {"epoch": "3"})
        if is_main:
            weights, metadata = files.read_weights()  # which compares the checksum
            assert metadata == {"epoch": "3"} and weights.keys() == one.state_dict().keys()
            assert all(torch.equal(weights[name], tensor) for name, tensor in one.state_dict().items())
            files.write_weights({name: tensor + 1 for name, tensor in weights.items()})
        load_weights(files, sharded)
        assert torch.equal(sharded.own_embedding.weight, before + 1)
        assert torch.equal(sharded.norm.weight, one.norm.weight + 1)


@pytest.mark.parametrize("n", [2, 4])
def test_rows_gradients_and_scores_are_those_of_one_process(tmp_path: Path, n: int):
    run_together(n, tmp_path, compare_with_one_process, n)


@pytest.mark.parametrize("n", [2, 4])
def test_the_memory_of_all_processes_is_that_of_one(tmp_path: Path, n: int):
    run_together(n, tmp_path, check_whole_network, tmp_path)


def train(
    arguments: list[str], expected: tuple[int, ...] = (0,), stop_at: int = 0, minutes: str = ""
) -> None:
    """run_mm.py in one of several processes.

    Args:
        arguments: of the command.
        expected: exit statuses.
        stop_at: the step in which the last process is asked to stop; 0 for none.
        minutes: between checkpoints by the clock of the last process alone.
    """
    step, done = RunTrainer._train_step, [0]

    def count_step(self: RunTrainer, *batch: Any) -> Tensor:
        done[0] += 1
        if done[0] == stop_at and distributed.process_rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *batch)

    RunTrainer._train_step = count_step  # type: ignore[method-assign]
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    own = [f"--checkpoint_minutes={minutes}"] if minutes and is_last else []
    assert main([*arguments, *own]) in expected


SAMPLED = {
    "loss_type": "sampled", "n_negatives": 5, "negatives_shared": 30, "train_batch_size": 29,
    "learning_rate": 0.003, "decay_per_epoch": 0.2, "average_epochs": 0.5,
    "clip_grad_norm": "{max_norm: 0.5}", "eval_batch_size": 4,
}  # fmt: skip


@pytest.fixture
def values(toy: Path, write_vectors: Callable[..., Path]) -> dict[str, Any]:
    """43 rows of training: the last batch has a single one, with items that the steps before did not use."""
    write_inter(toy, "toy", random_rows(n_users=31, n_items=200))
    write_vectors(toy, "toy", [f"i{k}" for k in range(180)])
    return small(toy, id_dropout=0.3, **{**SAMPLED, "train_batch_size": 7, "learning_rate": 0.03})


def find_run(runs: Path) -> Path:
    (folder,) = runs.iterdir()
    return folder


@pytest.mark.parametrize("n", [2, 4])
def test_a_run_equals_one_with_whole_tables(values: dict[str, Any], tmp_path: Path, n: int):
    outcomes, insights = [], []
    for key in ({"sparse_updates": True}, {"shard_items": True}):
        runs = tmp_path / str(len(outcomes))
        run_together(n, tmp_path, train, as_arguments({**values, **key, "runs_dir": runs}))
        outcomes.append(outcome(find_run(runs)))
        insights.append(json.loads((find_run(runs) / "insights.json").read_text()))
        assert not list(runs.glob("*/checkpoint*"))
    whole, sharded = outcomes
    for part in ("valid", "test", "test_unseen"):
        assert sharded[0][part] == pytest.approx(whole[0][part], abs=1e-5)
    losses = [[float(row["loss"]) for row in rows] for _, rows, *_ in outcomes]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert sharded[2] == whole[2]
    torch.testing.assert_close(sharded[3], whole[3], atol=1e-4, rtol=1e-4)
    for name, recommended in insights[0]["gate"]["by_layer"].items():
        assert insights[1]["gate"]["by_layer"][name] == pytest.approx(recommended, abs=1e-3)
    assert insights[1]["examples"] == insights[0]["examples"]


def test_two_processes_shard_and_one_process_reads_the_run(command: Command, toy: Path, tmp_path: Path):
    runs = tmp_path / "runs"
    values = small(toy, **SAMPLED, text_vectors="none", epochs=1, shard_items=True, runs_dir=runs)
    err, _ = run_in_two(tmp_path, *as_arguments(values))
    assert re.search("10 and 11 rows of the ID embedding in 2 processes", err)
    weights = load_file(find_run(runs) / "model.safetensors")
    assert weights["encoder.id_embedding.weight"].shape == (21, 16)
    metrics = json.loads((find_run(runs) / "metrics.json").read_text())
    assert metrics["parameters"] == sum(t.numel() for name, t in weights.items() if "encoder." in name)
    assert len(Recommender.load(find_run(runs)).recommend(["i1", "i2"], k=3)) == 3
    status, _, err = command(*as_arguments(values))
    assert status == 0 and "shard_items: no effect, a single process holds all rows" in err


def test_stopped_and_resumed_is_as_never_stopped(command: Command, values: dict[str, Any], tmp_path: Path):
    """Four steps an epoch; the second process is asked to stop in the second of the second epoch.

    In the run that is never stopped only the second process's clock says that a checkpoint is due.
    """
    values |= {"shard_items": True, "train_batch_size": 12, "valid_users": 7}
    whole, stopped = (as_arguments({**values, "runs_dir": tmp_path / name}) for name in ("whole", "stopped"))
    run_together(2, tmp_path, train, whole, (0,), 0, "1e-9")
    statuses = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # of that process, of the other
    run_together(2, tmp_path, train, stopped, statuses, 6)
    folder = find_run(tmp_path / "stopped")
    shards = [f"checkpoint-0-2.{rank}-of-2.safetensors" for rank in (1, 2)]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == shards
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    cure = "has its ID embedding in 2 part(s) and is resumed in 1; start 2 process(es), as at first"
    assert status == 2 and cure in err and "Traceback" not in err
    (folder / "checkpoint-9-9.1-of-2.safetensors").write_text("of a checkpoint that was never finished")
    run_together(2, tmp_path, train, [f"--resume={folder}"])
    one, other = outcome(find_run(tmp_path / "whole")), outcome(folder)
    assert other[:3] == one[:3]
    assert all(torch.equal(other[3][name], tensor) for name, tensor in one[3].items())
    assert not list(folder.glob("checkpoint*"))


def test_a_part_of_another_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    files = RunFolder(tmp_path)
    numbers = {"moment": "3-7", "random": {}}
    write_tensors(files.name_shard("3-7", 0, 2), {"a": torch.ones(2)}, {"numbers": json.dumps(numbers)})
    assert torch.equal(checkpoint._read_shard(files, "3-7")[0]["a"], torch.ones(2))
    files.name_shard("3-7", 0, 2).rename(files.name_shard("4-0", 0, 2))
    with pytest.raises(checkpoint.CannotResume, match="is of another checkpoint, 3-7; start a new run"):
        checkpoint._read_shard(files, "4-0")
    assert read_tensors(files.list_shards()[0])


def test_a_tensor_in_blocks_is_written_as_a_whole_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensor_files, "_BLOCK_BYTES", 50)  # two rows
    table = torch.randn(7, 5)
    others = {"bytes": torch.arange(3).byte(), "yes": torch.tensor(True), "half": torch.ones(2, 2).bfloat16(),
              "none": torch.zeros(0, 3), "numbers": torch.arange(4), "t": torch.randn(3, 2).T}  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write_tensors(whole, {"table": table, **others}, {"a": "b"})
    write_tensors(parts, {"table": RowBlocks((7, 5), table.dtype, table.split(3)), **others}, {"a": "b"})
    (one, about), (other, about_other) = read_tensors(whole), read_tensors(parts)
    assert about_other == about == {"a": "b"} and other.keys() == one.keys()
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    with safe_open(whole, "pt") as a, safe_open(parts, "pt") as b:
        assert a.metadata() == b.metadata()
    for path in (whole, parts):
        with open_tensors(path) as (file, metadata):
            assert torch.equal(file.get_slice("table")[2:4], table[2:4]) and metadata == {"a": "b"}
    content = bytearray(parts.read_bytes())
    content[-9] ^= 1
    parts.write_bytes(content)
    with pytest.raises(UserError, match="is corrupt: the checksum does not match"), open_tensors(parts):
        pass


def build_sharded(data: Path, monkeypatch: pytest.MonkeyPatch, **others: Any) -> Any:
    """The config of a run that has two processes."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    return build_config(small(data, **{"shard_items": True, "loss_type": "sampled", **others}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"neighbors": True},
            "shard_items: True needs neighbors: false, as they compare whole item tables; ",
        ),
        (
            {"sparse_updates": False},
            "shard_items: True needs sparse_updates: true or auto, not False; or set",
        ),
        ({"loss_type": "CE"}, "shard_items: True needs a loss over some items and this is loss_type: CE: "),
        ({"learner": "sgd"}, "shard_items: True needs learner: adam or adamw, not sgd; or set shard_items"),
    ],
)
def test_a_key_that_is_in_the_way_is_named(
    toy: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
):
    config = build_sharded(toy, monkeypatch, **values)
    with pytest.raises(UserError, match=re.escape(message)):
        settle_shard_items(config)
        resolve_sparse_updates(config, 20, is_resumed=False)


def test_it_implies_sparse_updates_and_the_rule_leaves_neighbors_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_inter(tmp_path, "toy", random_rows())
    assert "neighbors" in build_config(small(tmp_path, auto=True)).open_keys
    config = build_sharded(tmp_path, monkeypatch, auto=True)
    settle_shard_items(config)
    assert "neighbors" not in config.open_keys and not config["neighbors"]
    choice = resolve_sparse_updates(config, 20, is_resumed=False)
    assert choice == (True, "named by shard_items")


def test_the_recipe_of_a_data_set_is_taken_without_neighbors(monkeypatch: pytest.MonkeyPatch):
    recipe = {"dataset": "ml-100k", "loss_type": "sampled"}
    assert build_config(recipe)["neighbors"]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    config = build_config({**recipe, "shard_items": True})
    settle_shard_items(config)
    assert not config["neighbors"]
