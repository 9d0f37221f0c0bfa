"""RecBole's sequential models in this project's harness: which train, and what the others need."""

import re
from pathlib import Path

import pytest

from m2rec.compat import sequential_recommender
from m2rec.models.registry import list_models
from m2rec.training.configuration import build_config
from m2rec.training.run import run_experiment
from tests.conftest import write_inter

ROOT = Path(__file__).parent.parent
MODELS = sorted(list_models(sequential_recommender))
COLUMNS = ["user_id", "item_id", "timestamp"]
FEATURES = {"load_col": {"inter": COLUMNS, "item": ["item_id", "class"]}}
VECTORS = {
    "load_col": {"inter": COLUMNS, "ent": ["ent_id", "ent_emb"]},
    "preload_weight": {"ent_id": "ent_emb"},
    "alias_of_item_id": ["ent_id"],
}
# as docs/migration.md names them, in the order in which they are tried
NEEDS: dict[str, dict[str, object]] = {
    "interactions only": {},
    "item features": FEATURES,
    "vectors of the items": VECTORS,
}
NOT_TRAINED = "not trained here"


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """30 users who go on from item to item of 20, with a class and a vector for each."""
    rows = [(f"u{u}", f"i{(u + k) % 20}", 1000 * u + k) for u in range(30) for k in range(5 + u % 4)]
    folder = write_inter(tmp_path, "chain", rows).parent
    items = "".join(f"i{k}\ta k{k % 3}\n" for k in range(20))
    (folder / "chain.item").write_text("item_id:token\tclass:token_seq\n" + items)
    vectors = "".join(f"i{k}\t{' '.join(['0.5'] * 64)}\n" for k in range(20))
    (folder / "chain.ent").write_text("ent_id:token\tent_emb:float_seq\n" + vectors)
    return tmp_path


def train(data_path: Path, model: str, **others: object) -> dict[str, float]:
    """One epoch; returns the metrics of the test."""
    values = {
        "model": model, "dataset": "chain", "data_path": str(data_path), "epochs": 1, "topk": [5, 10],
        "MAX_ITEM_LIST_LENGTH": 8, "gpu_id": "", "report": False, "runs_dir": str(data_path / "runs"),
        **({"reranker_CAN_NUM": 10} if model.endswith("CPR") else {}), **others,
    }  # fmt: skip
    return run_experiment(build_config(values)).metrics["test"]


def documented() -> dict[str, str]:
    """What docs/migration.md says of each model."""
    text = (ROOT / "docs" / "migration.md").read_text()
    table = text.partition("| needs | models |")[2].partition("\n\n")[0]
    lines = re.findall(r"^\| ([^|:]+)[^|]*\| ([^|]+) \|$", table, re.M)
    return {model: need.strip() for need, models in lines for model in models.split(", ") if need[0] != "-"}


def find_need(data_path: Path, model: str) -> str:
    """The first of NEEDS with which the model trains."""
    for need, keys in NEEDS.items():
        try:
            train(data_path, model, **keys)
        except ValueError as error:
            assert str(error).startswith(f"model: {model} "), error  # said, not met half-way
            assert "DEBUG" not in str(error)
        else:
            return need
    return NOT_TRAINED


def test_every_model_stands_in_the_table():
    assert sorted(documented()) == MODELS


@pytest.mark.slow
def test_every_model_needs_what_the_table_says(chain: Path):
    assert {model: find_need(chain, model) for model in MODELS} == documented()


@pytest.mark.parametrize("model", ["DIEN", "GCSAN", "TransRec"])
def test_a_model_of_interactions_alone_trains(chain: Path, model: str):
    """DIEN with negative histories of its own; the others' loss has the shape (1,)."""
    assert 0 <= train(chain, model)["ndcg@10"] <= 1


def test_a_model_of_item_features_trains(chain: Path):
    assert train(chain, "GRU4RecF", **FEATURES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"model": "SASRecF"},
            "SASRecF needs item features (selected_features: ['class']), and 'class' is not",
        ),
        (
            {"model": "FDSA", **FEATURES, "selected_features": ["class", "price"]},
            "and 'price' is not loaded; add item: [item_id, class, price] to load_col",
        ),
        ({"model": "GRU4RecKG"}, "model: GRU4RecKG needs vectors of the items in a file .ent"),
        ({"model": "GRU4RecKG", **VECTORS, "alias_of_item_id": []}, "alias_of_item_id: [ent_id]"),
        ({"model": "KSR", **VECTORS}, "model: KSR needs a knowledge graph, which is not supported"),
        ({"model": "S3Rec", **FEATURES}, "model: S3Rec is trained in two stages"),
    ],
)
def test_what_a_model_needs_is_said(given: dict[str, object], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_config(given)


def test_a_model_that_ranks_the_best_again_needs_enough_items(chain: Path):
    with pytest.raises(ValueError, match="reranker_CAN_NUM: 100 is more than the 20 items"):
        train(chain, "SASRecCPR", reranker_CAN_NUM=100)


def test_dien_gets_other_items_than_the_users_own(chain: Path):
    from m2rec.training.run import load_data

    values = {"model": "DIEN", "dataset": "chain", "data_path": str(chain), "MAX_ITEM_LIST_LENGTH": 8}
    _, (train_rows, _, _) = load_data(build_config(values))
    rows = train_rows.dataset.inter_feat
    own, others = rows["item_id_list"], rows["neg_item_id_list"]
    assert own.shape == others.shape and ((own > 0) == (others > 0)).all()
    assert (own != others)[own > 0].all() and others.max() <= 20
