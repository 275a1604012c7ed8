"""What was measured before, kept by content: the same models, records and settings are never measured twice.

An entry's name is the hash of everything that it depends on, the evaluator's version included, so that nothing can be
stale. Arrays of numbers alone are kept: no ids, no text, no distributions.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from distributed_unlearn.data.batches import Corpus
from distributed_unlearn.files import write_bytes

EVALUATOR_VERSION = 1
"""Raised whenever a number comes out differently for the same model and records."""
_RECORDS_AT_ONCE = 256


def content_key(kind: str, parts: Mapping[str, object]) -> str:
    """SHA-256 over what an entry depends on; `parts` as JSON can hold it."""
    tree = {"evaluator": EVALUATOR_VERSION, "kind": kind, **parts}
    return hashlib.sha256(json.dumps(tree, sort_keys=True, allow_nan=False).encode()).hexdigest()


def corpus_hash(corpus: Corpus, indices: np.ndarray) -> str:
    """SHA-256 over what some records look like to a model: its inputs and what is to be predicted, in this order."""
    digest = hashlib.sha256()
    for start in range(0, len(indices), _RECORDS_AT_ONCE):
        batch = corpus.batch(indices[start : start + _RECORDS_AT_ONCE])
        for name, tensor in sorted(batch.inputs.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        for tensor in (batch.labels, batch.record):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class EvidenceCache:
    """A folder of entries; a damaged one counts as absent."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.num_hits = folder, 0

    def read(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of an entry by name; None where there is none."""
        try:
            with np.load(self._path(key), allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        self.num_hits += 1
        return found

    def write(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep an entry; complete or absent, whatever happens meanwhile."""
        self._folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        write_bytes(self._path(key), buffer.getvalue())

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.npz"
