"""The exported program, run where this package is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2rec import export
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


@pytest.mark.parametrize("settings", [{}, {"mixer": "attention", "filter": "none", "repeat_bias": False}])
def test_it_scores_as_the_model_without_the_package(tmp_path: Path, settings: dict):
    model = recommender(whole_history=False, **settings)
    path, histories = tmp_path / "program.pt2", [events(n, seed=n) for n in (1, 5, L)]
    model.export(path, batch_size=3)
    command = [sys.executable, "-c", CODE, str(path), json.dumps(histories), str(L)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout))
    torch.testing.assert_close(found, model.scores(histories)[:, 1:], rtol=1e-4, atol=1e-4)
    assert found.shape == (3, V - 1)


def test_a_program_that_differs_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    load = torch.export.load

    class Wrong:
        def __init__(self, program: torch.export.ExportedProgram) -> None:
            self.program = program

        def module(self):
            return lambda *inputs: self.program.module()(*inputs) + 0.01

    monkeypatch.setattr(export.torch.export, "load", lambda file: Wrong(load(file)))
    with pytest.raises(ValueError, match=r"export: the program differs from the model by 1\.\de-02"):
        recommender().export(tmp_path / "program.pt2")
    assert not list(tmp_path.iterdir())


def test_batch_size(tmp_path: Path):
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match="batch_size: expected a whole number from 1"):
            recommender().export(tmp_path / "program.pt2", wrong)
