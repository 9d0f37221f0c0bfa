"""The rows of NAME.inter as bytes, a batch at a time."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m2rec.data.raw.batches import InteractionBatch


def format_header(has_rating: bool) -> bytes:
    """The first line."""
    columns = ["user_id:token", "item_id:token", *(["rating:float"] if has_rating else []), "timestamp:float"]
    return ("\t".join(columns) + "\n").encode()


def format_rows(batch: InteractionBatch, has_rating: bool) -> pa.Buffer:
    """A line for each interaction."""
    columns = [batch.users.dictionary_decode(), batch.items.dictionary_decode()]
    if has_rating:
        columns.append(batch.ratings.dictionary_decode())
    last = pc.binary_join_element_wise(batch.times, "", "\n")
    lines = pc.binary_join_element_wise(*columns, last, "\t")
    _, offsets, text = lines.buffers()
    if not len(lines):
        return pa.py_buffer(b"")
    start, end = np.frombuffer(offsets, dtype=np.int32)[[lines.offset, lines.offset + len(lines)]]
    return text.slice(int(start), int(end - start))
