"""Build a text-vector file; rebuild it only if an input or option changed, and log which.

What decides the vectors is kept in the file's metadata, with a fingerprint of it all.
"""

import hashlib
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
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
    interaction_items: Sequence[str] | None = None,
    force: bool = False,
) -> bool:
    """Encode the texts and write the file; whether there was anything to do.

    Finished batches of a language model are kept in `OUTPUT.partial`, from which a killed run resumes.

    Args:
        interaction_items: tokens of the items in the interactions; the log counts those without text.
        force: encode again even if the file is up to date, or is not a text-vector file.

    Raises:
        ValueError: see `TextEncoder.encode` and `LsaEncoder.encode`; none of `interaction_items` has
            text; `output` is another kind of file.
    """
    _check_text_coverage(interaction_items, items.tokens, "have text")
    fingerprint_fields = {
        **encoder.fingerprint_fields,
        "columns": shlex.join(items.columns),
        "template": items.template,
        "texts_sha256": items.sha256(),
    }
    if not force and is_up_to_date(output, fingerprint_fields):
        return False
    fingerprint = compute_text_fingerprint(fingerprint_fields)
    partial = PartialVectors(output.with_name(f"{output.name}.partial"), fingerprint)
    vectors = encoder.encode(items.texts, partial)
    extra_metadata = {**encoder.describe(), vector_file.ITEM_FILE_KEY: items.file_stamp}
    _write_with_provenance(output, items.tokens, vectors, fingerprint_fields, extra_metadata)
    partial.remove()
    return True


def import_text_vectors(
    output: Path, source: ImportedVectors, interaction_items: Sequence[str] | None = None, force: bool = False
) -> bool:
    """Write the file from vectors made elsewhere; whether there was anything to do.

    Raises:
        ValueError: see `ImportedVectors.read`; none of `interaction_items` has a vector; `output` is
            another kind of file.
    """
    if not force and is_up_to_date(output, source.fingerprint_fields):
        return False
    tokens, vectors = source.read()
    _check_text_coverage(interaction_items, tokens, "have a vector")
    _write_with_provenance(output, tokens, vectors, source.fingerprint_fields, {})
    return True


def compute_text_fingerprint(fields: Mapping[str, str]) -> str:
    """A hash of the fields that decide the vectors."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def is_up_to_date(output: Path, fingerprint_fields: Mapping[str, str]) -> bool:
    """Whether `output` has these vectors already; log it, or what differs.

    Raises:
        ValueError: there is a file that is not a text-vector file.
    """
    if not output.exists():
        return False
    try:
        metadata = vector_file.read_text_vectors(output).metadata
    except ValueError as error:
        raise UserError(f"force: needed to overwrite {output}, not a valid text-vector file") from error
    if metadata.get("fingerprint") == compute_text_fingerprint(fingerprint_fields):
        logger.info("%s is up to date", output)
        return True
    changes = "; ".join(list_changed_fields(metadata, fingerprint_fields))
    logger.info("rebuilding %s: %s", output, changes)
    return False


def list_changed_fields(metadata: Mapping[str, str], fingerprint_fields: Mapping[str, str]) -> list[str]:
    """The fields that differ from a file's metadata, such as `max_tokens '256' -> '128'`."""
    changes = []
    for key, value in fingerprint_fields.items():
        if key not in metadata:
            changes.append(f"{key} was not recorded")
        elif metadata[key] == value:
            continue
        elif key.endswith("_sha256"):
            changes.append(f"{key.removesuffix('_sha256')} changed")
        else:
            changes.append(f"{key} {metadata[key]!r} -> {value!r}")
    return changes


def _check_text_coverage(interaction_items: Sequence[str] | None, tokens: Sequence[str], what: str) -> None:
    """Log how many items of the interactions are among the tokens, and the first few that are not.

    Raises:
        ValueError: none of them is.
    """
    if not interaction_items:
        return
    known = set(tokens)
    missing = [item for item in interaction_items if item not in known]
    n_items = len(interaction_items)
    if len(missing) == n_items:
        raise UserError(
            f"none of the {n_items:,} items of the interactions {what} (theirs: "
            f"{list(interaction_items[:3])}, here: {list(tokens[:3])}); use the same tokens in both files"
        )
    logger.info(
        "%s of %s items of the interactions %s%s",
        f"{n_items - len(missing):,}",
        f"{n_items:,}",
        what,
        vector_file.format_missing_items(missing),
    )


def _write_with_provenance(
    output: Path,
    tokens: list[str],
    vectors: np.ndarray,
    fingerprint_fields: Mapping[str, str],
    extra_metadata: Mapping[str, str],
) -> None:
    """Write vectors (n, T) with what decides them and what else is recorded."""
    output.parent.mkdir(parents=True, exist_ok=True)
    n_zero = int((~vectors.any(axis=1)).sum())
    if n_zero:
        logger.warning("%s zero vectors; these items are treated as having no text", f"{n_zero:,}")
    metadata = {
        **fingerprint_fields,
        **extra_metadata,
        "date": datetime.now(UTC).date().isoformat(),
        "fingerprint": compute_text_fingerprint(fingerprint_fields),
    }
    vector_file.write_text_vectors(output, tokens, vectors, metadata)
    logger.info("%s: %s vectors, %s wide", output, f"{len(tokens):,}", vectors.shape[1])
