"""Models by name: those of this project, and RecBole's sequential ones."""

import inspect
from typing import Any

from m2rec.compat import SequentialRecommender, sequential_recommender
from m2rec.errors import UserError
from m2rec.models.m2rec import M2Rec
from m2rec.models.popularity import Popularity
from m2rec.settings import PROPERTIES_FOLDER
from m2rec.yaml_values import suggest_spelling

# models of this project, which are not bound to one training row per target
_PROJECT_MODELS = (M2Rec, Popularity)


def find_model_class(name: str) -> type[SequentialRecommender]:
    """One of our models, or the RecBole sequential model of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    ours = {model.__name__: model for model in _PROJECT_MODELS}
    models: dict[str, type[SequentialRecommender]] = {**ours, **_list_recbole_models()}
    if name in models:
        return models[name]
    names = {*models, *(path.stem for path in (PROPERTIES_FOLDER / "model").glob("*.yaml"))}
    raise UserError(
        f"model: unknown model {name!r}{suggest_spelling(name, names)}; known: {', '.join(sorted(names))}"
    )


def _list_recbole_models() -> dict[str, Any]:
    return {
        name: member
        for name, member in inspect.getmembers(sequential_recommender, inspect.isclass)
        if issubclass(member, SequentialRecommender) and member is not SequentialRecommender
    }
