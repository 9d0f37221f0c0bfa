"""The exported program, run where this package is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2rec.serving import export
from tests.test_session import L, V, events, recommender

CODE = """
import json, sys
sys.modules["m2rec"] = None
import torch
extra = {"items.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
ids = {token: i for i, token in enumerate(json.loads(extra["items.json"]))}
histories = json.loads(sys.argv[2])
lengths = torch.tensor([len(history) for history in histories])
items = torch.zeros(len(histories), int(sys.argv[3]), dtype=torch.int64)
for row, history in zip(items, histories):
    row[: len(history)] = torch.tensor([ids[token] for token in history])
print(json.dumps(program(items, lengths)[:, 1:].tolist()))
"""


@pytest.mark.parametrize(
    ("batch_size", "settings"),
    [
        (None, {"neighbors": True, "n_layers": 1}),
        (4, {"mixer": "attention", "filter": "none", "repeat_bias": False}),
    ],
)
def test_it_scores_as_the_model_without_the_package(tmp_path: Path, settings: dict, batch_size: int | None):
    """Of the batch size that was asked for, or of any."""
    model = recommender(whole_history=False, **settings)
    path, histories = tmp_path / "program.pt2", [events(n, seed=n) for n in (1, 5, L, 7)]
    model.export(path, batch_size)
    command = [sys.executable, "-c", CODE, str(path), json.dumps(histories), str(L)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout))
    torch.testing.assert_close(found, model.scores(histories)[:, 1:], rtol=1e-4, atol=1e-4)
    assert found.shape == (4, V - 1)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba", "attention"])
def test_batch_and_length_may_vary(mixer: str):
    """Of a program made by hand, up to the length of one chunk of the scan; S6 unrolls its length."""
    settings = {"mixer": mixer, "n_layers": 1, "filter": "none" if mixer == "attention" else "causal"}
    encoder = recommender(whole_history=False, **settings).model.encoder.requires_grad_(False).eval()
    table = encoder.item_table()
    program = export.ScoringModule(encoder.make_inference_copy(table), table)
    batch, fixed = torch.export.Dim("batch"), mixer == "mamba"
    items, lengths = torch.randint(1, V, (3, 5)), torch.tensor([5, 1, 4])
    of_items = {0: batch} if fixed else {0: batch, 1: torch.export.Dim("length", min=2, max=L)}
    exported = torch.export.export(program, (items, lengths), dynamic_shapes=(of_items, {0: batch}))
    for rows, length in ((1, 5), (9, 5)) if fixed else ((1, 2), (2, L), (9, 5)):
        items, lengths = torch.randint(1, V, (rows, length)), torch.randint(1, length + 1, (rows,))
        torch.testing.assert_close(exported.module()(items, lengths), program(items, lengths))


def test_a_program_that_differs_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    load = torch.export.load

    class Wrong:
        def __init__(self, program: torch.export.ExportedProgram) -> None:
            self.program = program

        def module(self):
            return lambda *inputs: self.program.module()(*inputs) + 0.01

    monkeypatch.setattr(export.torch.export, "load", lambda file: Wrong(load(file)))
    with pytest.raises(ValueError, match=r"export: the program differs from the model by 1\.\de-02"):
        recommender(whole_history=False, mixer="attention", filter="none", n_layers=1).export(
            tmp_path / "program.pt2"
        )
    assert not list(tmp_path.iterdir())


def test_batch_size(tmp_path: Path):
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match="batch_size: expected a whole number from 1"):
            recommender().export(tmp_path / "program.pt2", wrong)
