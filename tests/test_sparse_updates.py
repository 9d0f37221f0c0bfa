"""Updates of single rows end where updates of all rows end, and cost nothing for rows that no step uses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m2rec.data.dataset import HistoryDataset
from m2rec.training import sparse_updates
from m2rec.training.configuration import build_config
from m2rec.training.ema import WeightEMA
from m2rec.training.lazy_adam import LazyAdam
from m2rec.training.run import Loaders, PreparedRun, load_data, prepare_run
from m2rec.training.sparse_updates import resolve_sparse_updates
from tests.conftest import as_arguments, random_rows, small, write_inter

Command = Callable[..., tuple[int, str, str]]

V, D, STEPS = 23, 3, 60


class Dense:
    """The reference: every step moves all rows, by PyTorch's optimiser and the plain average."""

    def __init__(self, weight: Tensor, decay: float) -> None:
        self.embedding = nn.Embedding.from_pretrained(weight.clone(), freeze=False)
        self.optimizer = torch.optim.AdamW(self.embedding.parameters(), lr=0.05, weight_decay=decay)
        self.ema = WeightEMA(self.embedding, 12)

    def step(self, gradient: Tensor) -> None:
        self.embedding.weight.grad = gradient
        self.optimizer.step()
        self.ema.update()

    @property
    def state(self) -> list[Tensor]:
        """Weight, average, moments."""
        moments = self.optimizer.state[self.embedding.weight]
        weight = self.embedding.weight.detach()
        return [weight, self.ema.averages["weight"], moments["exp_avg"], moments["exp_avg_sq"]]


class Lazy:
    """What is tested, on the same weight."""

    def __init__(self, dense: Dense) -> None:
        self.embedding = nn.Embedding.from_pretrained(dense.embedding.weight.detach().clone(), freeze=False)
        self.ema = WeightEMA(self.embedding, 12, self.embedding.weight)
        (group,) = dense.optimizer.param_groups
        average = self.ema.find_average(self.embedding.weight)
        self.optimizer = LazyAdam(self.embedding, group, average)

    def step(self, ids: Tensor, slope: Tensor) -> Tensor:
        """A step of the loss sum(slope * rows of ids); returns the rows that it has read."""
        self.embedding.weight.grad = None
        with self.optimizer.catch_up_when_read():
            rows = self.embedding(ids)
        read = rows.detach().clone()
        (rows * slope).sum().backward()
        self.optimizer.step(self.ema.update())
        return read

    @property
    def state(self) -> list[Tensor]:
        tensors = self.optimizer.state_tensors()
        average = self.ema.find_average(self.embedding.weight)
        return [self.embedding.weight.detach(), average, tensors["first"], tensors["second"]]


def make_pair(decay: float, dtype: torch.dtype = torch.float64) -> tuple[Dense, Lazy]:
    dense = Dense(torch.randn(V, D, dtype=dtype), decay)
    return dense, Lazy(dense)


def take_step(dense: Dense, lazy: Lazy, ids: Tensor, tolerance: float) -> None:
    """The same step of both; what it reads is compared."""
    slope = torch.randn(*ids.shape, D, dtype=dense.embedding.weight.dtype)
    expected = dense.embedding(ids).detach()
    read = lazy.step(ids, slope)
    torch.testing.assert_close(read, expected, atol=tolerance, rtol=tolerance)
    gradient = torch.zeros(V, D, dtype=slope.dtype)
    dense.step(gradient.index_add_(0, ids.flatten(), slope.flatten(0, -2)))


def draw_few_ids() -> Tensor:
    """(1, n) ids with some twice; small ones often, large ones seldom."""
    return (V * torch.rand(1, int(torch.randint(1, 5, ()))) ** 3).long()


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_rows_are_read_as_if_all_had_been_updated(decay: float):
    """Exactly so but for eps, 1e-8."""
    dense, lazy = make_pair(decay)
    for number in range(STEPS):
        take_step(dense, lazy, draw_few_ids(), 1e-7)
        if number in (0, 25):
            lazy.optimizer.catch_up_all()
            torch.testing.assert_close(lazy.state, dense.state, atol=1e-7, rtol=1e-7)
    behind = (lazy.embedding.weight - dense.embedding.weight).abs().amax(1) > 1e-3
    assert behind.any()  # there was something to catch up
    lazy.optimizer.catch_up_all()
    torch.testing.assert_close(lazy.state, dense.state, atol=1e-7, rtol=1e-7)


def test_every_row_in_every_step_is_adamw():
    dense, lazy = make_pair(0.7, torch.float32)
    for _ in range(STEPS):
        take_step(dense, lazy, torch.randperm(V)[None], 1e-6)
    torch.testing.assert_close(lazy.state, dense.state, atol=1e-6, rtol=1e-6)


def test_more_rows_than_a_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("m2rec.training.lazy_adam._BLOCK_ROWS", 2)
    dense, lazy = make_pair(0.7)
    for _ in range(20):
        take_step(dense, lazy, draw_few_ids(), 1e-7)
    lazy.optimizer.catch_up_all()
    torch.testing.assert_close(lazy.state, dense.state, atol=1e-7, rtol=1e-7)


def test_rows_of_gradients_from_other_processes_are_caught_up_too():
    dense, lazy = make_pair(0.7)
    for _ in range(STEPS):
        ids, rows = torch.randint(V, (2, 3)), torch.randn(2, 3, D, dtype=torch.float64)
        with lazy.optimizer.catch_up_when_read():
            lazy.embedding(ids[0])
        gradient = torch.sparse_coo_tensor(ids.view(1, -1), rows.view(-1, D), (V, D), check_invariants=False)
        lazy.embedding.weight.grad = gradient
        lazy.optimizer.step(lazy.ema.update())
        dense.step(gradient.to_dense())
    lazy.optimizer.catch_up_all()
    torch.testing.assert_close(lazy.state, dense.state, atol=1e-7, rtol=1e-7)


def test_a_state_that_is_restored_goes_on_to_the_same_digits():
    dense, lazy = make_pair(0.7)
    for number in range(30):
        take_step(dense, lazy, draw_few_ids(), 1e-7)
        if number == 11:
            lazy.optimizer.catch_up_all()
    other = Lazy(dense)
    other.optimizer.load_state_tensors({k: t.clone() for k, t in lazy.optimizer.state_tensors().items()})
    other.embedding.load_state_dict(lazy.embedding.state_dict())
    other.ema.load(lazy.ema.averages, lazy.ema.n_updates)
    for number in range(30):
        ids, slope = draw_few_ids(), torch.randn(D, dtype=torch.float64)
        assert torch.equal(other.step(ids, slope), lazy.step(ids, slope))
        if number == 20:
            lazy.optimizer.catch_up_all()
            other.optimizer.catch_up_all()
    assert all(
        map(torch.equal, other.optimizer.state_tensors().values(), lazy.optimizer.state_tensors().values())
    )
    assert all(map(torch.equal, other.state, lazy.state))


SAMPLED = {
    "text_vectors": "none", "loss_type": "sampled", "n_negatives": 5, "negatives_shared": 30, "epochs": 3,
    "train_batch_size": 4, "learning_rate": 0.003, "stopping_step": 99,
}  # fmt: skip


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A folder with the data set `toy` of 300 items, of which a step uses some."""
    write_inter(tmp_path / "data", "toy", random_rows(60, 300))
    return tmp_path / "data"


def prepare(data: Path, **others: Any) -> PreparedRun:
    values = small(data, **{**SAMPLED, "runs_dir": str(data / "runs"), **others})
    return prepare_run(build_config(values))


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"decay_per_epoch": 0.3, "average_epochs": 0.5},
        {"loss_type": "gBCE", "clip_grad_norm": {"max_norm": 0.1}, "average_epochs": 0.5},
        {"loss_type": "BPR", "rows": "prefix", "learner": "adamw", "eval_step": 2, "train_batch_size": 32},
    ],
    ids=lambda others: "-".join(others) or "adam",
)
def test_a_run_equals_one_that_updates_all_rows(wide: Path, others: dict[str, Any]):
    losses, weights, scores = [], [], []
    for is_sparse in (False, True):
        run = prepare(wide, sparse_updates=is_sparse, **others)
        run.train()
        losses.append(run.trainer.train_loss_dict)
        scores.append(run.trainer.best_valid_score)
        weights.append({**run.trainer.model.state_dict()})
        if run.trainer.ema is not None:
            weights[-1] |= {f"average of {k}": v for k, v in run.trainer.ema.averages.items()}
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert scores[1] == pytest.approx(scores[0], abs=0.02)  # a rank may change with the last digit
    torch.testing.assert_close(weights[1], weights[0], atol=1e-3, rtol=1e-3)


class WholeTableOperations(TorchDispatchMode):
    """Collects the operations that read or make a tensor of at least `size` values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            is_dense = isinstance(tensor, Tensor) and not tensor.is_sparse
            if is_dense and tensor.numel() >= self.size:
                self.names.add(func.overloadpacket.__name__)
        return result


N_ITEMS = 100_000


def load_with_many_items(config: Any) -> tuple[HistoryDataset, Loaders]:
    """The data, as if it had N_ITEMS items."""
    dataset, loaders = load_data(config)
    for part in (dataset, *(loader.dataset for loader in loaders)):
        part.field2id_token[config["ITEM_ID_FIELD"]] = range(N_ITEMS)
    return dataset, loaders


def collect_whole_table_operations(data: Path, is_sparse: bool) -> set[str]:
    """Those of a training step that is not the first."""
    values = small(
        data, **SAMPLED, sparse_updates=is_sparse, average_epochs=0.5, clip_grad_norm={"max_norm": 1},
        learner="adamw", weight_decay=0.1, negative_sampling="popularity", runs_dir=str(data / "runs"),
    )  # fmt: skip
    run = prepare_run(build_config(values), load=load_with_many_items)
    trainer, train = run.trainer, run.loaders.train
    trainer._prepare_fit(train)
    trainer.model.train()
    batches = iter(train)
    trainer._train_step(next(batches), train.dataset.is_dense)
    with WholeTableOperations(N_ITEMS - 1) as seen:
        trainer._train_step(next(batches), train.dataset.is_dense)
    return seen.names


def test_no_operation_of_a_step_goes_through_all_rows(toy: Path):
    rows_alone = {"embedding", "index", "index_select", "index_copy_", "index_put_", "searchsorted"}
    assert collect_whole_table_operations(toy, True) <= rows_alone | {"detach", "_index_put_impl_"}
    others = collect_whole_table_operations(toy, False) - rows_alone
    assert {"embedding_dense_backward", "_fused_adamw_", "_foreach_lerp_"} <= others


@pytest.mark.parametrize(
    ("values", "n_items", "expected"),
    [
        ({"loss_type": "sampled"}, 500_000, (True, "auto: 500,000 items, at least 500,000")),
        ({"loss_type": "BPR"}, 499_999, (False, "auto: 499,999 items, fewer than 500,000")),
        (
            {"loss_type": "CE"},
            10**6,
            (False, "auto: they need a loss over some items and this is loss_type: CE"),
        ),
        ({"loss_type": "gBCE", "learner": "sgd"}, 10**6, (False, "auto: they need learner: adam or adamw")),
        ({"loss_type": "gBCE", "weight_decay": 0.1}, 10**6, (False, "auto: they need decoupled decay")),
        ({"loss_type": "gBCE", "decay_per_epoch": 0.1}, 10**6, (True, "auto: 1,000,000 items")),
        ({"loss_type": "gBCE", "sparse_updates": False}, 10**6, (False, "named by sparse_updates")),
        ({"loss_type": "gBCE", "sparse_updates": True}, 9, (True, "named by sparse_updates")),
    ],
)
def test_auto_is_for_large_catalogues(
    toy: Path, values: dict[str, Any], n_items: int, expected: tuple[bool, str]
):
    choice = resolve_sparse_updates(build_config(small(toy, **values)), n_items, is_resumed=False)
    assert choice.is_sparse == expected[0] and choice.reason.startswith(expected[1])


def test_a_run_from_before_the_key_stays_as_it_was(toy: Path):
    config = build_config(small(toy, loss_type="sampled"))
    assert not resolve_sparse_updates(config, 10**7, is_resumed=True).is_sparse


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "loss_type: CE: set one of sampled, gBCE, BPR; or set sparse_updates: false"),
        ({"loss_type": "BPR", "learner": "rmsprop"}, "needs learner: adam or adamw, not rmsprop; or set"),
        (
            {"loss_type": "BPR", "weight_decay": 0.2},
            "weight_decay: 0.2 is an L2 term of learner: adam: set learner",
        ),
    ],
)
def test_a_key_that_is_in_the_way_is_named(command: Command, toy: Path, values: dict[str, Any], message: str):
    status, _, err = command(*as_arguments(small(toy, sparse_updates=True, **values)))
    assert status == 2 and message in err and "Traceback" not in err


def test_the_run_stores_the_answer(toy: Path, monkeypatch: pytest.MonkeyPatch):
    assert prepare(toy).trainer.files.read_config()["sparse_updates"] is False
    monkeypatch.setattr(sparse_updates, "MIN_ITEMS", 20)
    run = prepare(toy)
    assert run.trainer.files.read_config()["sparse_updates"] is True
    run.train()
    assert not run.trainer.model.encoder.id_embedding._forward_pre_hooks  # which would slow evaluation down
