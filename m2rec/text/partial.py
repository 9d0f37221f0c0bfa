"""Resumable cache of encoded texts: safetensors files in a folder, named by the encoding's fingerprint."""

import shutil
from pathlib import Path

import numpy as np
import torch

from m2rec.errors import UserError
from m2rec.tensor_files import read_tensors, write_tensors


class PartialVectors:
    """Finished rows of one encoding, beside those of encodings with another fingerprint."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self._prefix = fingerprint[:16]

    def restore(self, vectors: np.ndarray) -> list[int]:
        """Copy the finished rows into `vectors` (n, T) and return their numbers; skip damaged files."""
        finished: list[int] = []
        for path in sorted(self.folder.glob(f"{self._prefix}-*.safetensors")):
            try:
                tensors, _ = read_tensors(path)
            except UserError:
                continue
            rows = tensors["rows"].tolist()
            vectors[rows] = tensors["vectors"].numpy()
            finished += rows
        return finished

    def append(self, rows: list[int], vectors: np.ndarray) -> None:
        """Write vectors (k, T) of the rows (k,), which are on the disk when this returns."""
        if self.folder.is_file():  # a cache of an earlier version
            self.folder.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {"rows": torch.tensor(rows), "vectors": torch.from_numpy(vectors)}
        write_tensors(self.folder / f"{self._prefix}-{rows[0]:09}.safetensors", tensors)

    def remove(self) -> None:
        """Delete the cache, once the text-vector file is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
