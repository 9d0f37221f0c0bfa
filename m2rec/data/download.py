"""Download the data sets that RecBole has a link for."""

import logging
import tempfile
from contextlib import suppress
from pathlib import Path

from m2rec.compat import extract_zip, rename_atomic_files
from m2rec.data.fetch import RemoteFile, fetch_file
from m2rec.errors import UserError
from m2rec.storage import lock_path

logger = logging.getLogger(__name__)


def download_dataset(name: str, folder: Path, url: str | None) -> None:
    """Download a data set into `folder`, atomically.

    What has arrived of the archive stays in .NAME.download beside `folder`. After a stop or a failure the
    next call asks for the rest of it.

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
        with lock_path(folder.parent):  # another process may download the same data set
            if not target.is_file():
                _download_files(name, url, folder)
    except Exception as error:  # RecBole, the network and the archive fail in many ways
        raise UserError(f"{missing}, and its download from {url} failed ({error}); {cure}") from error


def _download_files(name: str, url: str, folder: Path) -> None:
    """Download an archive and unpack it into `folder`, which must hold NAME.inter then."""
    kept = folder.with_name(f".{name}.download")
    archive = kept / url.rpartition("/")[2]
    try:
        fetch_file(RemoteFile(url), archive)
        _unpack_archive(name, archive, folder)
        archive.unlink()
    finally:
        with suppress(OSError):  # it has a part of the archive
            kept.rmdir()


def _unpack_archive(name: str, archive: Path, folder: Path) -> None:
    """Unpack an archive into `folder`, whole or not at all; one that can't be used is removed."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unpacked = Path(temporary) / name
        unpacked.mkdir()
        try:
            extract_zip(archive, unpacked)
            rename_atomic_files(unpacked, archive.stem, name)
            (unpacked / f"{name}.inter").stat()
        except Exception:
            archive.unlink()  # the next call fetches it anew
            raise
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster
            (folder / f"{name}.inter").stat()
