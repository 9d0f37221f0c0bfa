"""The folder that is pushed to the hub: a saved model, its metrics and its model card.

It has no history of a user, no checkpoint, and no folder of the machine where the model was trained.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import yaml

from m2rec import __version__
from m2rec.errors import UserError
from m2rec.run_folder import RunFolder
from m2rec.serving.saved_model import SavedModel, write_saved_model
from m2rec.settings import MACHINE_KEYS, Role, collect_keys
from m2rec.storage import write_text

CARD_FILE = "README.md"

_FILES = RunFolder(Path())
MODEL_FILES = tuple(
    path.name
    for path in (
        _FILES.config_file,
        _FILES.items_file,
        _FILES.counts_file,
        _FILES.titles_file,
        _FILES.text_file,
        _FILES.metrics_file,
        _FILES.weights_file,
    )
)
"""All files that are fetched."""

_PRIVATE_KEYS = MACHINE_KEYS | collect_keys(Role.IGNORED) | {"preload_weight", "wandb_project"}
_FILE_KEYS = {"file", "text_vectors"}
_MODEL_KEYS = {"model", "text_encoder"}  # a name on the hub, or a folder
_NAME_ON_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LOCAL_PATH = re.compile(r"/[^/]|~\w*[/\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\")

_CARD_PROTOCOLS = ("test", "test_unseen", "test_new")
_COUNT_NAMES = {
    "users": "users",
    "items": "items",
    "interactions": "interactions",
    "train_targets": "targets in training",
    "valid_rows": "targets in validation",
    "test_rows": "targets in the test",
    "test_returning": "test targets that are in their user's history",
}
_TAGS = ["recommender-system", "sequential-recommendation", "mamba"]
_EXAMPLE_LENGTH = 3  # items of the history in the example


def write_published_folder(
    model: SavedModel, run: RunFolder | None, folder: Path, repository: str
) -> list[Path]:
    """Write all files that are pushed.

    Args:
        model: what is pushed.
        run: the folder with the metrics of the model, if there is one.
        folder: an empty folder.
        repository: owner/name on the hub.

    Returns:
        The files.

    Raises:
        ValueError: metrics.json is damaged.
    """
    files = RunFolder(folder)
    config = {key: value for key, value in hide_folders(model.config).items() if key not in _PRIVATE_KEYS}
    model = replace(model, config=config, text_source=hide_folders(model.text_source))
    write_saved_model(model, folder)
    metrics: dict[str, Any] = {}
    if run is not None:
        metrics = hide_folders(run.read_metrics())
        files.write_metrics(metrics)
    try:
        card = _format_card(model, metrics, repository)
    except (LookupError, TypeError, AttributeError, ValueError, jinja2.TemplateError) as error:
        raise UserError(f"{run and run.metrics_file} has unexpected content ({error})") from None
    write_text(folder / CARD_FILE, card)
    return sorted(folder.iterdir())


def hide_folders(value: Any, key: str = "") -> Any:
    """A value of JSON or YAML, in which each path of a file or folder is its last part.

    Args:
        value: any value; what is in a mapping or list is treated alike.
        key: of the value; some keys hold files, and some a folder or a name on the hub.
    """
    if isinstance(value, Mapping):
        return {name: hide_folders(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [hide_folders(entry, key) for entry in value]
    if not isinstance(value, str):
        return value
    is_folder = key in _MODEL_KEYS and not _NAME_ON_HUB.fullmatch(value)
    if key in _FILE_KEYS or is_folder or _LOCAL_PATH.match(value):
        return PurePosixPath(value.replace("\\", "/")).name
    return value


def _format_card(model: SavedModel, metrics: Mapping[str, Any], repository: str) -> str:
    """The model card: front matter for the hub, and text for people."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # it is Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _format_code
    n_items = len(model.tokens) - 1
    example = _choose_example(model)
    return environment.get_template("model_card.md.j2").render(
        front_matter=yaml.safe_dump(_build_front_matter(model, metrics), sort_keys=False, allow_unicode=True),
        repository=repository,
        name=repository.partition("/")[2],
        dataset=str(model.config.get("dataset", "")),
        n_items=n_items,
        n_titles=len(model.titles),
        n_added=n_items - metrics["data"]["items"] if metrics else 0,
        history=example,
        arguments=" ".join(map(shlex.quote, example)),
        text=model.text_source,
        metrics=metrics,
        protocols=_list_protocols(metrics),
        compared=_list_compared(metrics),
        counts={name: metrics["data"][key] for key, name in _COUNT_NAMES.items() if key in metrics["data"]}
        if metrics
        else {},
        version=__version__,
    )


def _choose_example(model: SavedModel) -> list[str]:
    """Item tokens of a history that shows how the model is used, items that many users know."""
    ids: Sequence[int] = model.popularity_order[:_EXAMPLE_LENGTH].tolist()
    return [model.tokens[item] for item in ids] or list(model.tokens[1 : 1 + _EXAMPLE_LENGTH])


def _list_protocols(metrics: Mapping[str, Any]) -> list[str]:
    """The protocols of the test; test_new only where it differs from test_unseen."""
    returning = metrics.get("data", {}).get("test_returning")
    return [name for name in _CARD_PROTOCOLS if metrics.get(name) and (name != "test_new" or returning)]


def _list_compared(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics of the model and of the baselines by name; empty without baselines."""
    baselines = metrics.get("baselines")
    return {metrics["model"]: metrics, **baselines} if baselines else {}


def _build_front_matter(model: SavedModel, metrics: Mapping[str, Any]) -> dict[str, Any]:
    matter: dict[str, Any] = {"library_name": "m2rec", "tags": _TAGS}
    if not metrics:
        return matter
    dataset = str(metrics["dataset"])
    results = []
    for protocol in _list_protocols(metrics):
        values = [
            {"type": name, "name": name.upper(), "value": value} for name, value in metrics[protocol].items()
        ]
        results.append(
            {
                "task": {"type": "sequential-recommendation", "name": "Next-item recommendation"},
                "dataset": {"type": dataset, "name": dataset, "config": protocol, "split": "test"},
                "metrics": values,
            }
        )
    return {**matter, "model-index": [{"name": str(metrics["model"]), "results": results}]}


def _format_code(value: object) -> str:
    """Text between backticks, on one line."""
    text = " ".join(str(value).replace("`", "'").split())
    return f"`{text}`"
