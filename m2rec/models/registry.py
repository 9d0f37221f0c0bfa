"""Models by name: those of this project, one per file in this folder, and RecBole's sequential ones.

A class says with these attributes what RecBole's models lack:

    supports_dense_rows = True        # it trains on all positions of a history
    settings_class = ModelSettings    # it is made of M2Rec's parts, and these are its keys
    fixed_settings = {"epochs": 1}    # keys that can't have another value
    draws_negatives = True            # RecBole need not draw any
"""

import inspect
import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType

from m2rec.compat import SequentialRecommender, sequential_recommender
from m2rec.errors import UserError
from m2rec.settings import PROPERTIES_FOLDER
from m2rec.yaml_values import describe_unknown

Model = type[SequentialRecommender]


def find_model_class(name: str) -> Model:
    """One of our models, or the RecBole sequential model of that name.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    models = list_models(sequential_recommender)
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        models |= list_models(import_module(f"{__package__}.{module.name}"))
    if name in models:
        return models[name]
    names = {*models, *(path.stem for path in (PROPERTIES_FOLDER / "model").glob("*.yaml"))}
    raise UserError(f"model: {describe_unknown(name, names, 'model')}; known: {', '.join(sorted(names))}")


def list_models(module: ModuleType) -> dict[str, Model]:
    """The models of a module, by name."""
    models = {}
    for name, member in inspect.getmembers(module, inspect.isclass):
        if issubclass(member, SequentialRecommender) and member is not SequentialRecommender:
            models[name] = member
    return models
