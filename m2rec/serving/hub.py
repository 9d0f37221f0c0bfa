"""Saved models on the Hugging Face hub, by names such as `hub:anna/films` and `hub:anna/films@v1`.

Only the files of a saved model are fetched, into the cache of huggingface_hub, and they are checked as those
of any folder. `m2rec.serving.published` has what is pushed. huggingface_hub is loaded where it is needed.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from m2rec import __version__
from m2rec.errors import UserError, format_one_line
from m2rec.run_folder import ITEMS_FILE, RunFolder
from m2rec.serving.hub_name import PREFIX, HubName
from m2rec.serving.published import CARD_FILE, MODEL_FILES, write_published_folder
from m2rec.serving.saved_model import SavedModel

logger = logging.getLogger(__name__)

_WITHOUT_MODEL = {".gitattributes", CARD_FILE}
"""What the hub itself writes into a new repository."""


def fetch_saved_model(text: str) -> Path:
    """Fetch the files of a saved model that the cache lacks; returns their folder in the cache.

    Without a network, the revision that was fetched last is used.

    Raises:
        ValueError: there is no such model, it may not be read, or it can't be fetched.
    """
    name = HubName.parse(text)
    with _ask_hub(name):
        from huggingface_hub import snapshot_download

        fetched = snapshot_download(
            name.repository,
            revision=name.revision or None,
            allow_patterns=list(MODEL_FILES),
            library_name="m2rec",
            library_version=__version__,
        )
    folder = Path(fetched)
    if not RunFolder(folder).config_file.is_file():
        raise UserError(f"hub: {name} is no model of m2rec: config.yaml is missing")
    logger.info("%s is commit %s", name, folder.name)
    return folder


def push_saved_model(model: SavedModel, run: RunFolder | None, text: str, private: bool) -> str:
    """Push a model in one commit; the repository is created if need be.

    Args:
        model: what is pushed.
        run: the folder with the metrics of the model, if there is one.
        text: owner/name.
        private: whether only its owner may read the repository.

    Returns:
        The name with the commit, for `Recommender.load`.

    Raises:
        ValueError: the repository holds something else, is public though `private` is asked for, or can't
            be written.
    """
    name = HubName.parse(text)
    if name.revision:
        raise UserError(f"hub: nothing is pushed to a revision; leave out @{name.revision}")
    with TemporaryDirectory() as folder:
        written = write_published_folder(model, run, Path(folder), name.repository)
        with _ask_hub(name):
            commit = _commit_files(name, written, private)
    return str(name._replace(revision=commit))


def _commit_files(name: HubName, paths: Sequence[Path], private: bool) -> str:
    """Commit these files, and delete those that only an earlier model had; returns the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="m2rec", library_version=__version__)
    api.create_repo(name.repository, private=private or None, exist_ok=True)
    info = api.model_info(name.repository)
    if private and not info.private:
        raise UserError(
            f"hub: {name} is public; make it private in its settings on the hub, or push it publicly"
        )
    present = {entry.rfilename for entry in info.siblings or ()}
    if present - _WITHOUT_MODEL and ITEMS_FILE not in present:
        raise UserError(f"hub: {name} holds something else than a model of m2rec; give another name")
    pushed = {path.name for path in paths}
    stale = present.intersection(MODEL_FILES) - pushed
    operations: list[Any] = [CommitOperationAdd(path.name, path) for path in paths]
    operations += [CommitOperationDelete(file) for file in sorted(stale)]
    commit = api.create_commit(name.repository, operations, commit_message=f"Model of m2rec {__version__}")
    return str(commit.oid)


@contextmanager
def _ask_hub(name: HubName) -> Iterator[None]:
    """Turn whatever goes wrong with the hub into one line with the cure; progress is for terminals only."""
    try:
        from huggingface_hub import utils
    except ImportError:
        raise UserError(f'hub: {name} needs huggingface_hub; run: pip install "m2rec[hub]"') from None
    shows_progress = not utils.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a network can fail in any way
        raise UserError(f"hub: {_describe_failure(error, name)}") from error
    finally:
        if shows_progress:
            utils.enable_progress_bars()


def _describe_failure(error: Exception, name: HubName) -> str:
    from huggingface_hub import constants, errors

    repository, said = f"{PREFIX}{name.repository}", format_one_line(error)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {name.revision!r}; give a branch, a tag or a commit of it"
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} asks for its owner's consent; request it on its page on the hub"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repository} does not exist or is private; check the name, or give a token that may read it: "
            f"set HF_TOKEN or run hf auth login"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repository} can't be reached while HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = format_one_line(error.__cause__ or error)
        cure = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "connect to the network"
        return f"{name} is not in the cache {constants.HF_HUB_CACHE}; {cure} once ({reason})"
    if isinstance(error, errors.HfHubHTTPError):
        said = " ".join((error.server_message or said).split())
        if error.response.status_code in (401, 403):
            return (
                f"{repository} can't be written without a token that may do so; "
                f"set HF_TOKEN or run hf auth login ({said})"
            )
        return f"{repository}: {constants.ENDPOINT} answered: {said}"
    if isinstance(error, ValueError | OSError):
        return f"{repository}: {said}"
    return f"{constants.ENDPOINT} can't be reached ({said}); check the network and HF_ENDPOINT"
