"""Live users: equal to a whole pass, in batches too, and what is saved comes back."""

import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from m2rec.nn.encoder import Encoder
from m2rec.nn.neighbors import Neighbors, NeighborTable
from m2rec.nn.states import name_tensors
from m2rec.serving import saved_model, session
from m2rec.serving.recommender import Recommendation, Recommender
from m2rec.settings import ModelSettings

V, L = 40, 12
TOKENS = ["[PAD]", *(f"i{k}" for k in range(1, V))]
KINDS = [
    {},
    {"mixer": "mamba"},
    {"filter": "residual"},
    {"filter": "none", "gate": "mean", "text_in_sequence": False, "repeat_bias": False},
    {"neighbors": True},
]


def recommender(seed: int = 0, whole_history: bool = True, **settings: object) -> Recommender:
    """An untrained network with text, whose repeat bias is not zero; with `neighbors`, random ones."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "inner_size": 32, "head_dim": 8, "d_state": 8}
    encoder = Encoder(ModelSettings(**{**sizes, **settings}), V, L, torch.randn(V, 6))
    if encoder.repeat_bias is not None:
        torch.nn.init.constant_(encoder.repeat_bias, 1.5)
    if encoder.settings.neighbors:
        encoder.neighbors = make_neighbors(V)
    about = {"titles": {"i3": "Tea"}, "text_mean": None, "text_basis": None, "text_source": {}}
    config = {"MAX_ITEM_LIST_LENGTH": L}
    return Recommender(
        saved_model.build_saved_model(encoder, TOKENS, counts=range(V), config=config, **about),
        whole_history=whole_history,
    )


def make_neighbors(n_items: int, width: int = 6) -> Neighbors:
    """Random ones of both kinds; some items have fewer than others, and padding none."""
    neighbors = Neighbors()
    for kind, weight in (("transitions", 3.0), ("text", 2.0)):
        ids = torch.randint(0, n_items, (n_items, width))
        ids[0] = 0
        neighbors[kind] = NeighborTable.build(ids, torch.rand(n_items, width) * (ids > 0))
        neighbors[kind].weight.fill_(weight)
    return neighbors


def events(n: int, seed: int = 0) -> list[str]:
    random = torch.Generator().manual_seed(seed)
    return [TOKENS[i] for i in torch.randint(1, V, (n,), generator=random).tolist()]


def assert_same(found: list[Recommendation], expected: list[Recommendation]):
    assert [r.item for r in found] == [r.item for r in expected]
    assert [r.score for r in found] == pytest.approx([r.score for r in expected], abs=1e-5)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_equal_to_a_whole_pass(settings: dict):
    """At every length, far beyond those in training, from an empty start or from a history."""
    model, history = recommender(**settings), events(600)
    live, late = model.session(), model.session(history[:590])
    for n, token in enumerate(history, 1):
        live.add(token)
        if n > 590:
            late.add(token)
        if n not in (1, 2, 5, L, L + 1, 300, 591, 600):
            continue
        for exclude_seen in (False, True):
            expected = model.recommend(history[:n], k=V, exclude_seen=exclude_seen)
            assert_same(live.recommend(V, exclude_seen), expected)
            if n > 590:
                assert_same(late.recommend(V, exclude_seen), expected)
    assert live.seen == list(dict.fromkeys(history))


def test_a_whole_history_is_more_than_its_end():
    history = events(3 * L)
    whole, end = recommender(), recommender(whole_history=False)
    assert not torch.allclose(whole.scores([history]), end.scores([history]))
    torch.testing.assert_close(whole.scores([history[-L:]]), end.scores([history]))


def test_many_users_at_once():
    """Users at different places, new ones among them, and one who stays away."""
    model = recommender()
    histories = [events(n, seed=n) for n in (0, 1, 30, 0, 7)]
    together = [model.session(history) for history in histories]
    for round_ in range(3):
        new = events(4, seed=100 + round_)
        model.add_events(together[:4], new)
        for history, token in zip(histories, new, strict=False):
            history.append(token)
    found = model.recommend_sessions(together, k=5)
    for live, ranked, history in zip(together, found, histories, strict=True):
        assert_same(ranked, model.recommend(history, k=5))
        assert live.seen == list(dict.fromkeys(history))


def test_one_users_state_does_not_hold_that_of_others():
    model = recommender()
    users = [model.session(["i1"]) for _ in range(50)]
    model.add_events(users, ["i2"] * 50)
    for user in (users[0], model.session(events(300))):
        tensors = [*name_tensors(user._state.states).values(), user._state.vector]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


def test_a_user_without_a_history_gets_what_is_popular(caplog: pytest.LogCaptureFixture):
    model = recommender()
    live = model.session()
    assert [r.item for r in live.recommend(3)] == ["i39", "i38", "i37"]
    assert live.recommend(3, candidates=["i3", "i5"], exclude=["i5"])[0]._asdict() == {
        "item": "i3", "score": 3.0, "title": "Tea",
    }  # fmt: skip
    assert "1 empty histories: recommended the most popular items" in caplog.text


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_saved_and_restored(settings: dict):
    model, history = recommender(**settings), events(20)
    live = model.session(history)
    data = live.to_bytes()
    again = recommender(**settings).restore_session(data)
    assert_same(again.recommend(V), live.recommend(V))
    again.add("i7")
    assert_same(again.recommend(V, exclude_seen=False), model.recommend([*history, "i7"], V, False))
    assert again.seen == list(dict.fromkeys([*history, "i7"]))
    assert model.restore_session(model.session().to_bytes()).seen == []


def test_saved_names_stay():
    """Sessions that older versions saved are read."""
    names = set(load(recommender().session(["i1"]).to_bytes()[32:]))
    states = {f"{layer}.{part}" for layer in (0, 1) for part in ("mixer0", "mixer1", "filter")}
    assert names == {"model", "tokens", "seen", "recent", "vector", *states}


def test_it_does_not_grow_with_the_history():
    model = recommender()
    sizes = [len(model.session(["i1", "i2"] * n).to_bytes()) for n in (1, 500)]
    assert sizes[0] == sizes[1]


def test_what_can_t_be_restored():
    model = recommender()
    data = model.session(["i1"]).to_bytes()
    for broken in (b"", b"no session", data[:-1], data[:40] + b"?" + data[41:]):
        with pytest.raises(ValueError, match="session: the data is damaged, or is not a saved session"):
            model.restore_session(broken)
    with pytest.raises(ValueError, match="saved with another model"):
        recommender(seed=1).restore_session(data)
    signed = b"signed by anybody"
    with pytest.raises(ValueError, match="session: the data is not a saved session"):
        model.restore_session(hashlib.sha256(signed).digest() + signed)
    memory = model.session(["i1"])._state
    memory.vector = memory.vector[:, :3]
    with pytest.raises(ValueError, match="not a saved session of this model"):
        model.restore_session(session.serialize_state(memory, model.model))
    memory = session.SessionState(seen=[V])
    with pytest.raises(ValueError, match="items that this model does not have"):
        model.restore_session(session.serialize_state(memory, replace(model.model, tokens=(*TOKENS, "more"))))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seen", torch.tensor([[1, 2]], dtype=torch.int32)),
        ("seen", torch.tensor(1, dtype=torch.int32)),
        ("seen", torch.tensor([1.0])),
        ("model", torch.tensor([1.0], dtype=torch.bfloat16)),
        ("tokens", torch.tensor([1])),
    ],
)
def test_tensors_of_another_kind(name: str, value: torch.Tensor):
    model = recommender()
    tensors = load(model.session(["i1"]).to_bytes()[32:])
    content = save({**tensors, name: value})
    with pytest.raises(ValueError, match="session: the data is not a saved session"):
        model.restore_session(hashlib.sha256(content).digest() + content)


def test_any_kind_of_bytes():
    model = recommender()
    data = model.session(["i1"]).to_bytes()
    for kind in (bytearray, memoryview):
        assert model.restore_session(kind(data)).seen == ["i1"]


def with_text(model: Recommender) -> Recommender:
    """As after training with text, so that items can be added."""
    return Recommender(replace(model.model, text_mean=torch.zeros(6), text_basis=torch.eye(6)))


def test_items_that_were_added_otherwise():
    """The same internal id can be another item elsewhere."""
    tea, coffee = with_text(recommender()), with_text(recommender())
    tea.add_items(["tea"], torch.ones(1, 6))
    coffee.add_items(["coffee"], torch.ones(1, 6))
    assert coffee.restore_session(tea.session(["i1"]).to_bytes()).seen == ["i1"]
    with pytest.raises(ValueError, match="items that this model does not have; add them first"):
        coffee.restore_session(tea.session(["i1", "tea"]).to_bytes())


def test_a_whole_long_history_in_a_batch():
    model = recommender()
    histories = [events(n, seed=n) for n in (L, 700, 3, L + 1)]
    for found, history in zip(model.recommend_batch(histories, 5), histories, strict=True):
        assert_same(found, model.session(history).recommend(5))


def test_a_session_outlives_new_items():
    model = recommender()
    live = model.session(["i1", "i2"])
    data, before = live.to_bytes(), live.recommend(V)
    model._ranker = replace(model._ranker, model=with_text(model).model)
    model.add_items(["new"], torch.randn(1, 6))
    after = live.recommend(V)
    assert_same([r for r in after if r.item != "new"], before)
    assert len(after) == len(before) + 1
    live.add("new")
    again = model.restore_session(data)
    again.add("new")
    assert_same(again.recommend(), live.recommend())


def test_mistakes_change_nothing():
    model = recommender()
    live, other = model.session(["i1"]), recommender().session(["i1"])
    before = live.recommend(V)
    for call, message in (
        (lambda: live.add("tea"), "unknown item 'tea'"),
        (lambda: model.add_events([live, live], ["i2", "i3"]), "the same session is given twice"),
        (lambda: model.add_events([live, other], ["i2", "i3"]), "a session belongs to another recommender"),
        (lambda: model.add_events([live], ["i2", "i3"]), "1 sessions, but 2 tokens"),
        (lambda: model.add_events([live, model.session()], ["i2", "tea"]), "unknown item 'tea'"),
        (lambda: model.session(["i1", "tea"]), "unknown item 'tea'"),
        (lambda: live.recommend(0), "k: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert_same(live.recommend(V), before)
    model.add_events([], [])
    assert model.recommend_sessions([]) == []
    assert model.session(["i1", "tea"], skip_unknown=True).seen == ["i1"]


@pytest.mark.parametrize(("key", "value"), [("mixer", "attention"), ("filter", "low_pass")])
def test_a_part_that_needs_the_whole_history(key: str, value: str):
    model = recommender(whole_history=False, **{key: value})
    with pytest.raises(ValueError, match=f"{key}: '{value}' needs the whole history at once"):
        model.session(["i1"])
    with pytest.raises(ValueError, match=f"{key}: '{value}' needs the whole history at once"):
        model.session()
