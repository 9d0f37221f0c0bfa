"""Item text or imported vectors -> a text-vector file that says what made it, once and no more.

What decides the vectors is kept in the file's metadata, with a fingerprint of it all. The same
command does nothing when the file is there; another one says what differs.
"""

import hashlib
import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from m2rec.data.item_file import ItemTexts
from m2rec.errors import UserError
from m2rec.text import vector_file
from m2rec.text.imported import ImportedVectors
from m2rec.text.language_model import TextEncoder
from m2rec.text.lsa import LsaEncoder
from m2rec.text.partial import PartialVectors

logger = logging.getLogger(__name__)


def build_text_vectors(
    output: Path,
    items: ItemTexts,
    encoder: TextEncoder | LsaEncoder,
    known: Sequence[str] | None = None,
    force: bool = False,
) -> bool:
    """Encode the texts and write the file; whether there was anything to do.

    Finished batches of a language model are kept in `OUTPUT.partial`, from which a run that was
    killed goes on.

    Args:
        known: tokens of the items that the interactions have; the log says which have no text.
        force: encode again even if the file is up to date, or is something else.

    Raises:
        ValueError: see `TextEncoder.encode` and `LsaEncoder.encode`; none of the known items has text;
            `output` is another kind of file.
    """
    _check_text_coverage(known, items.tokens, "have text")
    decisive = {
        **encoder.fingerprint_fields,
        "columns": shlex.join(items.columns),
        "template": items.template,
        "texts_sha256": items.sha256(),
    }
    if not force and is_up_to_date(output, decisive):
        return False
    if isinstance(encoder, LsaEncoder):
        _write_with_provenance(
            output, items.tokens, encoder.encode(items.texts), decisive, encoder.versions()
        )
        return True
    about = encoder.describe()  # loads the model, which must not fail with a partial file open
    with _open_partial_file(output, compute_text_fingerprint(decisive)) as partial:
        vectors = encoder.encode(items.texts, partial)
        _write_with_provenance(output, items.tokens, vectors, decisive, about)
    return True


def import_text_vectors(
    output: Path, source: ImportedVectors, known: Sequence[str] | None = None, force: bool = False
) -> bool:
    """Write the file from vectors made elsewhere; whether there was anything to do.

    Raises:
        ValueError: see `ImportedVectors.read`; none of the known items has a vector; `output` is another
            kind of file.
    """
    if not force and is_up_to_date(output, source.fingerprint_fields):
        return False
    tokens, vectors = source.read()
    _check_text_coverage(known, tokens, "have a vector")
    _write_with_provenance(output, tokens, vectors, source.fingerprint_fields, {})
    return True


def compute_text_fingerprint(decisive: Mapping[str, str]) -> str:
    """A hash of what decides the vectors."""
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def is_up_to_date(output: Path, decisive: Mapping[str, str]) -> bool:
    """Whether `output` has these vectors already; the log says so, or what differs.

    Raises:
        ValueError: there is a file that holds no text vectors.
    """
    if not output.exists():
        return False
    try:
        _, _, recorded = vector_file.read_text_vectors(output)
    except ValueError as error:
        raise UserError(f"{error}; --force overwrites it") from None
    if recorded.get("fingerprint") == compute_text_fingerprint(decisive):
        logger.info("%s is up to date, nothing to do; --force makes it again", output)
        return True
    logger.info("%s is made again: %s", output, "; ".join(list_changed_fields(recorded, decisive)))
    return False


def list_changed_fields(recorded: Mapping[str, str], decisive: Mapping[str, str]) -> list[str]:
    """What decides the vectors now and did not then, such as `max_tokens 256 -> 128`."""
    found = []
    for key, value in decisive.items():
        if key not in recorded:
            found.append(f"{key} was not recorded")
        elif recorded[key] != value:
            change = "" if key.endswith("sha256") else f" {recorded[key]!r} -> {value!r}"
            found.append(f"{key.removesuffix('_sha256')}{change or ' changed'}")
    return found


def _check_text_coverage(known: Sequence[str] | None, tokens: Sequence[str], what: str) -> None:
    """How many of the known items are among the tokens, and the first few that are not.

    Raises:
        ValueError: none of them is.
    """
    if not known:
        return
    there = set(tokens)
    without = [item for item in known if item not in there]
    if len(without) == len(known):
        raise UserError(
            f"none of the {len(known):,} items of the interactions {what} (theirs: {list(known[:3])}, here: "
            f"{list(tokens[:3])}); use the same tokens in both files"
        )
    logger.info(
        "%s of %s items of the interactions %s%s",
        f"{len(known) - len(without):,}", f"{len(known):,}", what,
        vector_file.format_missing_items(without),
    )  # fmt: skip


@contextmanager
def _open_partial_file(output: Path, mark: str) -> Iterator[PartialVectors]:
    """The file beside the output where finished batches are kept, removed once all is well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with PartialVectors(output.with_name(f"{output.name}.partial"), mark) as partial:
        yield partial
        partial.remove()


def _write_with_provenance(
    output: Path,
    tokens: list[str],
    vectors: np.ndarray,
    decisive: Mapping[str, str],
    besides: Mapping[str, str],
) -> None:
    """Write vectors (n, T) with all that is known of them: what decides them, and what else is recorded."""
    output.parent.mkdir(parents=True, exist_ok=True)
    silent = int((~vectors.any(axis=1)).sum())
    if silent:
        logger.warning("%s vectors are zero and count as no text", f"{silent:,}")
    about = {
        **decisive,
        **besides,
        "date": datetime.now(UTC).date().isoformat(),
        "fingerprint": compute_text_fingerprint(decisive),
    }
    vector_file.write_text_vectors(output, tokens, vectors, about)
    logger.info("%s: %s vectors, %s wide", output, f"{len(tokens):,}", vectors.shape[1])
