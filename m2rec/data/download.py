"""Download the data sets that RecBole has a link for."""

import logging
import tempfile
from pathlib import Path

from m2rec.compat import extract_zip, rename_atomic_files
from m2rec.data.fetch import RemoteFile, fetch_file
from m2rec.errors import UserError

logger = logging.getLogger(__name__)


def download_dataset(name: str, folder: Path, url: str | None) -> None:
    """Download a data set into `folder`, atomically.

    Raises:
        ValueError: there is no link, or the download failed.
    """
    target = folder / f"{name}.inter"
    missing = f"dataset: {name!r} not found: there is no {target}"
    cure = "put the file there or set data_path"
    if url is None:
        raise UserError(f"{missing}, and RecBole has no download of that name; {cure}")
    logger.info("%s does not exist; downloading %s", target, url)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unpacked = _download_files(name, url, Path(temporary))
            try:
                unpacked.rename(folder)
            except OSError:  # another process was faster
                target.stat()
    except Exception as error:  # RecBole, the network and the archive fail in many ways
        raise UserError(f"{missing}, and its download from {url} failed ({error}); {cure}") from error


def _download_files(name: str, url: str, temporary: Path) -> Path:
    """Download and unpack an archive; returns the folder that holds NAME.inter."""
    unpacked = temporary / name
    unpacked.mkdir()
    archive = temporary / url.rpartition("/")[2]
    fetch_file(RemoteFile(url), archive)
    extract_zip(archive, unpacked)
    rename_atomic_files(unpacked, archive.stem, name)
    (unpacked / f"{name}.inter").stat()
    return unpacked
