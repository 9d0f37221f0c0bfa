"""M2Rec on RecBole's data: losses, predictions, learning, determinism."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m2rec.compat import data_preparation, init_seed
from m2rec.data.dataset import HistoryDataset
from m2rec.data.histories import shift_targets
from m2rec.models.m2rec import M2Rec
from m2rec.training.configuration import build_config
from tests.conftest import random_rows, small, write_inter

FORMS = {
    "dense": {},
    "prefix": {"rows": "prefix"},
    "sampled": {"loss_type": "sampled", "n_negatives": 8},
    "sampled-popularity": {"loss_type": "sampled", "n_negatives": 8, "negative_sampling": "popularity"},
    "gbce": {"loss_type": "gBCE", "n_negatives": 8},
    "bpr": {"loss_type": "BPR"},
    "bpr-prefix": {"loss_type": "BPR", "rows": "prefix"},
    "mamba": {"mixer": "mamba"},
    "attention": {"mixer": "attention"},
    "low-pass": {"filter": "low_pass", "rows": "prefix"},
    "reference": {"scan_backend": "reference", "mixer": "mamba"},
}


def made(data_path: Path, **others: Any) -> tuple[M2Rec, list[Any]]:
    config = build_config(small(data_path, **others))
    init_seed(config["seed"], True)
    loaders = data_preparation(config, HistoryDataset(config))
    return M2Rec(config, loaders[0].dataset), list(loaders)


def train(
    model: M2Rec, batches: Any, steps: int, learning_rate: float = 0.01, amp: bool = False
) -> list[float]:
    """Losses of plain Adam steps, batch after batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses: list[float] = []
    while len(losses) < steps:
        for batch in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = model.calculate_loss(batch)
            assert loss.dtype == torch.float32
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses[:steps]


def test_shifted_targets():
    items = torch.tensor([[4, 5, 6, 0], [7, 0, 0, 0], [1, 2, 3, 9]])
    targets = shift_targets(items, torch.tensor([3, 1, 4]), torch.tensor([8, 8, 8]))
    assert targets.tolist() == [[5, 6, 8, 0], [8, 0, 0, 0], [2, 3, 9, 8]]


@pytest.mark.parametrize("form", FORMS)
def test_it_learns(toy: Path, form: str):
    model, (batches, _, _) = made(toy, dropout_prob=0, **FORMS[form])
    losses = train(model, [batches.dataset.inter_feat], 20, learning_rate=0.03)
    assert torch.isfinite(torch.tensor(losses)).all()
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("form", FORMS)
def test_predict_is_a_column_of_full_sort_predict(toy: Path, form: str):
    model, (_, _, test) = made(toy, **FORMS[form])
    model.eval()
    if model.encoder.repeat_bias is not None:
        model.encoder.repeat_bias.data.fill_(3.0)
    interaction = test.dataset.inter_feat
    scores = model.full_sort_predict(interaction)
    assert scores.shape == (len(interaction), model.n_items)
    columns = scores.gather(1, interaction["item_id"][:, None])[:, 0]
    assert torch.allclose(model.predict(interaction), columns, atol=1e-5)


def test_evaluation_ranks_with_the_weights_of_now(toy: Path):
    model, (batches, _, _) = made(toy)
    rows = batches.dataset.inter_feat

    def compare_scores() -> None:
        with torch.no_grad():
            history = rows[model.ITEM_SEQ]
            expected = model.encoder.score_all_items(model(history, rows[model.ITEM_SEQ_LEN]), history)
            found = model.full_sort_predict(rows)
        torch.testing.assert_close(found[:, 1:], expected[:, 1:], atol=1e-5, rtol=1e-5)

    for _ in range(2):
        train(model.train(), [rows], 2)
        model.eval()
        compare_scores()
        with torch.no_grad():
            model.encoder.norm.weight *= 2  # as weights are replaced within an evaluation
        compare_scores()
        model.calculate_loss(rows).backward()
        torch.optim.Adam(model.parameters(), fused=True).step()  # does not count as a change of a tensor
        compare_scores()


def test_evaluation_runs_a_forward_of_ones_own(toy: Path):
    model, (batches, _, _) = made(toy)
    rows = batches.dataset.inter_feat
    model.eval()
    with torch.no_grad():
        plain = model.full_sort_predict(rows)
        model.register_forward_hook(lambda module, given, x: 2 * x)
        assert not torch.allclose(model.full_sort_predict(rows)[:, 1:], plain[:, 1:])


def test_dense_loss_is_the_prefix_loss_of_all_targets(tmp_path: Path):
    """Histories shorter than a window: the same targets with the same histories, so the same mean."""
    write_inter(tmp_path, "toy", random_rows(longest=9))
    losses = []
    for rows in ("dense", "prefix"):
        model, (train_data, _, _) = made(tmp_path, rows=rows, dropout_prob=0)
        model.encoder.repeat_bias.data.fill_(3.0)
        losses.append(model.eval().calculate_loss(train_data.dataset.inter_feat).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_overfits_eight_users(tmp_path: Path):
    rows = [(f"u{u}", f"i{(7 * u + k * (u + 1)) % 40}", k) for u in range(8) for k in range(10)]
    write_inter(tmp_path, "toy", rows)
    model, (batches, _, _) = made(tmp_path, dropout_prob=0, hidden_size=32, topk=[10])
    # first items of a history can't be told apart
    assert train(model, batches, 60, learning_rate=0.03)[-1] < 0.35
    interaction = batches.dataset.inter_feat
    best = model.eval().full_sort_predict(interaction)[:, 1:].argmax(1) + 1
    assert torch.equal(best, interaction["item_id"])


@pytest.mark.parametrize("loss_type", ["CE", "sampled", "gBCE", "BPR"])
@pytest.mark.parametrize("again", [False, True])
def test_it_learns_whether_items_come_back(tmp_path: Path, again: bool, loss_type: str):
    """Users who go round three items of forty raise what they have had, users who never do lower it."""
    step = (lambda u, k: u + k % 3) if again else (lambda u, k: u + k)
    write_inter(
        tmp_path, "toy", [(f"u{u}", f"i{step(7 * u, k) % 40}", k) for u in range(40) for k in range(9)]
    )
    model, (batches, _, test) = made(tmp_path, dropout_prob=0, loss_type=loss_type, n_negatives=20)
    train(model, batches, 30, learning_rate=0.05)
    bias = model.encoder.repeat_bias.item()
    assert bias > 0.1 if again else bias < -0.1
    rows = test.dataset.inter_feat
    scores = model.eval().full_sort_predict(rows)
    with_bias = scores.gather(1, rows["item_id_list"][:, :1])
    model.encoder.repeat_bias = None
    without = model.full_sort_predict(rows).gather(1, rows["item_id_list"][:, :1])
    assert torch.allclose(with_bias - without, torch.tensor(bias), atol=1e-4)


def test_same_seed_same_digits(toy: Path):
    runs = []
    for _ in range(2):
        model, (batches, _, _) = made(toy)
        runs.append((train(model, batches, 5), [p.clone() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    other = made(toy, seed=1)
    assert train(other[0], other[1][0], 5) != runs[0][0]


GOLDEN = {
    "mamba2": [2.998273, 2.951639, 2.913533, 2.871461, 2.824059],
    "mamba": [2.996938, 2.954049, 2.921999, 2.888686, 2.851456],
}


@pytest.mark.parametrize("mixer", GOLDEN)
def test_golden_losses(toy: Path, mixer: str):
    """Five steps as they were when the model was last changed on purpose."""
    model, (batches, _, _) = made(toy, mixer=mixer, dropout_prob=0, shuffle=False)
    assert train(model, batches, 5) == pytest.approx(GOLDEN[mixer], rel=1e-4)


def test_scores_that_are_not_finite_are_an_error(toy: Path):
    model, (_, _, test) = made(toy)
    model.encoder.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="scores are NaN or infinite"):
        model.full_sort_predict(test.dataset.inter_feat)


def test_text_is_stored_with_the_model(write_vectors: Callable[..., Path], toy: Path):
    path = write_vectors(toy, "toy", [f"i{k}" for k in range(15)])
    model, _ = made(toy, text_vectors=str(path), text_whitening="none")
    state = model.state_dict()
    assert state["encoder.vectors"].shape == (model.n_items, 8)
    assert state["text_mean"].shape == (8,) and state["text_basis"].shape == (8, 8)
    without, _ = made(toy, text_vectors="none")
    assert "encoder.vectors" not in without.state_dict()


def test_each_item_gets_the_vector_of_its_token(write_vectors: Callable[..., Path], toy: Path):
    """Whatever internal ids RecBole gives: raw vectors compared through the data set's tokens."""
    from m2rec.text import vector_file

    path = write_vectors(toy, "toy", [f"i{k}" for k in range(19, -1, -1)])
    tokens, raw, _ = vector_file.read_text_vectors(path)
    model, loaders = made(toy, text_vectors="auto", text_whitening="none")
    names = loaders[0].dataset.field2id_token["item_id"]
    expected = torch.stack([raw[tokens.index(str(name))] for name in names[1:]])
    expected = expected - expected.mean(0)
    cosine = torch.nn.functional.cosine_similarity(model.encoder.vectors[1:], expected)
    assert torch.allclose(cosine, torch.ones(20), atol=1e-5)


def test_text_off_in_both_places_reads_no_file(toy: Path):
    model, _ = made(toy, text_vectors="gone", text_in_sequence=False, text_in_table=False)
    assert model.encoder.vectors is None


def test_works_as_a_plain_recbole_model(toy: Path):
    """On RecBole's own data set class it trains the last position of prefix rows."""
    from m2rec.compat import SequentialDataset

    config = build_config(small(toy))
    loader = data_preparation(config, SequentialDataset(config))[0]
    model = M2Rec(config, loader.dataset)
    assert not model.dense
    losses = train(model, [loader.dataset.inter_feat], 30)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("form", ["dense", "sampled", "gbce", "bpr", "mamba", "attention"])
def test_bfloat16_training_follows_float32(toy: Path, form: str):
    """Under autocast the encoder computes in bfloat16, the loss in float32; both learn alike."""
    losses = []
    for amp in (False, True):
        model, (batches, _, _) = made(toy, dropout_prob=0, **FORMS[form])
        torch.manual_seed(4)
        losses.append(train(model, [batches.dataset.inter_feat], 20, amp=amp))
    assert losses[1] != losses[0]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.05 * losses[0][0]
