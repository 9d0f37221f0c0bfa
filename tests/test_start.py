"""What is loaded, and so how long a start takes: an import that nothing needs is found here."""

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from m2rec.commands.main import COMMANDS
from tests.conftest import as_arguments, small

ROOT = Path(__file__).parent.parent
HEAVY = {"matplotlib", "pandas", "psutil", "recbole", "scipy", "sklearn", "torch", "transformers"}
SCRIPTS = ["run_mm.py", *sorted(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py"))]


def find_loaded(code: str) -> set[str]:
    """The modules that a fresh process has loaded after this code."""
    code = f"import sys\n{code}\nprint('\\nloaded', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def find_after_command(script: str, *arguments: str) -> set[str]:
    """The modules that a command has loaded when it ends."""
    return find_loaded(
        f"import runpy\nsys.argv = {[script, *arguments]!r}\n"
        f"try:\n    runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "import gc\nassert gc.isenabled()"
    )


def test_the_package_loads_nothing():
    assert not HEAVY & find_loaded("import m2rec")


def test_a_saved_model_ranks_with_pytorch_alone():
    loaded = find_loaded(
        "from m2rec.serving.recommender import Recommender\n"
        "model = Recommender.load('tests/old_runs/runs/finished')\n"
        "print(model.recommend(model.tokens[1:4], 3))"
    )
    assert HEAVY & loaded == {"torch"}
    assert not {"faiss", "optuna", "pyarrow", "sympy", "torch._dynamo"} & loaded


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_shown_at_once(script: str):
    allowed = {"pandas"} if "compare_commits" in script else set()
    assert HEAVY & find_after_command(script, "--help") <= allowed


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_of_m2rec_is_shown_at_once(arguments: list[str]):
    code = (
        "from m2rec.commands.main import main\n"
        f"try:\n    assert main({arguments!r}) == 0\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert not HEAVY & find_loaded(code)


def test_a_run_loads_only_what_it_uses(toy: Path):
    """Not the packages of RecBole's that it does not call, nor PyTorch's compiler."""
    keys = small(toy, epochs=1, baselines=True, runs_dir=str(toy.parent / "runs"))
    loaded = find_after_command("run_mm.py", "--config_files=config.yaml", *as_arguments(keys))
    assert HEAVY & loaded == {"pandas", "recbole", "torch"}
    assert not {"sympy", "tensorboard", "torch._dynamo"} & loaded


def test_garbage_is_collected_where_pytorch_was_loaded_before():
    from m2rec.commands.own_process import pause_garbage_collection

    before = gc.get_freeze_count()  # of what the tests have imported
    with pause_garbage_collection():
        assert gc.isenabled()
    assert gc.get_freeze_count() <= before


def test_what_recbole_calls_later_is_there():
    from recbole.data.dataset.dataset import coo_matrix
    from recbole.evaluator.metrics import mean_absolute_error, sk_auc
    from recbole.utils.utils import SummaryWriter
    from scipy import sparse
    from sklearn import metrics

    import m2rec.compat  # noqa: F401

    x, y = np.array([0.0, 0.25, 1.0]), np.array([0.0, 0.75, 1.0])
    assert sk_auc(x, y) == metrics.auc(x, y) and mean_absolute_error(x, y) == pytest.approx(0.5 / 3)
    cells = ([1, 2], ([0, 1], [1, 2]))
    assert (coo_matrix(cells, shape=(3, 3)).toarray() == sparse.coo_matrix(cells, shape=(3, 3))).all()
    assert SummaryWriter.__name__ in ("SummaryWriter", "call")


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad", "RMSprop"])
def test_optimizers_are_those_of_pytorch(name: str):
    """Three steps, then their state in a new optimizer, then three more."""
    from recbole.trainer import trainer

    from m2rec.compat import Trainer  # noqa: F401 - patches RecBole's trainer

    def train(optimizers: object) -> torch.Tensor:
        weights = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
        make = getattr(optimizers, name)
        optimizer = make([{"params": [weights], "lr": 0.05}], lr=0.1, weight_decay=0.01)
        for step in range(6):
            if step == 3:
                state, optimizer = optimizer.state_dict(), make([weights], lr=0.7)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            (weights**4).sum().backward()
            optimizer.step()
        return weights.detach()

    made = train(trainer.optim)
    assert isinstance(trainer.optim.Adam, type) and issubclass(trainer.optim.Adam, torch.optim.Adam)
    assert torch.equal(made, train(torch.optim))
