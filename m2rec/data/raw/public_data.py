"""The public data of the results tables: addresses, options, and what must come out."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from m2rec.data.fetch import RemoteFile
from m2rec.settings import PROPERTIES_FOLDER
from m2rec.yaml_values import read_yaml

PUBLIC_DATA_PATH = PROPERTIES_FOLDER / "public_data.yaml"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RawFile(_Entry):
    """A file to have in the folder of raw files."""

    url: str | None = None
    """None: there is no address that works without an account."""
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None
    unpack: tuple[str, ...] = ()
    """Members of an archive."""

    def to_remote(self) -> RemoteFile:
        """The file at its address."""
        assert self.url is not None
        checksums = {"md5": self.md5, "sha256": self.sha256}
        return RemoteFile(self.url, self.size, {name: digest for name, digest in checksums.items() if digest})


class PresetSource(_Entry):
    """One way to a data set."""

    files: dict[str, RawFile]
    interactions: str
    items: str | None = None
    options: dict[str, Any]
    """Of `PreparationOptions`, without files and names."""
    sha256: str | None = None
    """Of the resulting NAME.inter, or of a part of its rows."""
    min_item_count: int = 0
    """The part: rows of items with at least so many interactions."""
    note: str = ""


class Preset(_Entry):
    """A public data set, and what must come out."""

    about: str
    page: str
    terms: str
    sources: dict[str, PresetSource]
    users: int
    items: int
    interactions: int
    sequences_sha256: str | None = None
    """See `hash_sequences`."""


def read_presets(path: Path = PUBLIC_DATA_PATH) -> dict[str, Preset]:
    """The presets of the file of public data."""
    return {name: Preset(**values) for name, values in read_yaml(path).items()}
