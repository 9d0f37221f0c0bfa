"""Names of models on the Hugging Face hub: `hub:owner/name`, `hub:owner/name@revision`."""

import re
from pathlib import Path
from typing import NamedTuple, Self

from m2rec.errors import UserError

PREFIX = "hub:"
SOURCE_HELP = "run folder, runs/NAME, a folder that Recommender.save wrote, or hub:owner/name[@revision]"

_REPOSITORY = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")


class HubName(NamedTuple):
    """A repository of the hub, and its branch, tag or commit; empty for the newest commit."""

    repository: str
    revision: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The parts of `hub:owner/name@revision`, where `hub:` and `@revision` may be left out.

        Raises:
            ValueError: it has another form.
        """
        repository, at, revision = text.removeprefix(PREFIX).partition("@")
        if not _REPOSITORY.fullmatch(repository) or (at and not revision):
            raise UserError(
                f"hub: {text!r} is not a name; expected owner/name or owner/name@revision, "
                f"such as hub:anna/films@v1"
            )
        return cls(repository, revision)

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}{'@' if self.revision else ''}{self.revision}"


def parse_source(text: str) -> Path | str:
    """A command's argument: the name of a model on the hub as it is, anything else as a folder."""
    return text if is_hub_name(text) else Path(text)


def is_hub_name(source: str | Path) -> bool:
    """Whether this is a name on the hub; a `Path`, and text such as `./hub:films`, is a folder."""
    return isinstance(source, str) and source.startswith(PREFIX)
