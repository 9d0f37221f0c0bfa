"""Models by name: those of this project, one per file in this folder, and RecBole's sequential ones.

A class says with these attributes what RecBole's models lack:

    supports_dense_rows = True        # it trains on all positions of a history
    settings_class = ModelSettings    # it is made of M2Rec's parts, and these are its keys
    uses_text = True                  # it takes text vectors: `text_vectors` and `text_encoder` are its keys
    fixed_settings = {"epochs": 1}    # keys that can't have another value
    draws_negatives = True            # RecBole need not draw any
"""

import inspect
import pkgutil
from importlib import import_module
from types import ModuleType

from m2rec import models
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
    known = list_models(sequential_recommender)
    for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        known |= list_models(import_module(module.name))
    if name in known:
        return known[name]
    names = {*known, *(path.stem for path in (PROPERTIES_FOLDER / "model").glob("*.yaml"))}
    raise UserError(f"model: {describe_unknown(name, names, 'model')}; known: {', '.join(sorted(names))}")


def list_models(module: ModuleType) -> dict[str, Model]:
    """The models of a module, by name."""
    found = {}
    for name, member in inspect.getmembers(module, inspect.isclass):
        if issubclass(member, SequentialRecommender) and member is not SequentialRecommender:
            found[name] = member
    return found
