"""Records of different lengths in one flat array of tokens: their lengths, right-padded rows, joining."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

SMALLEST_WIDTH = 8
"""Width of the batch that stands for no records."""


class PackedTokens:
    """Record `i` owns `tokens[offsets[i]:offsets[i + 1]]`; what corpora of tokens have in common."""

    tokens: np.ndarray
    """int32 [num_tokens]."""
    offsets: np.ndarray
    """int64 [num_records + 1]."""
    pad_token_id: int

    @property
    def num_records(self) -> int:
        """Number of records."""
        return len(self.offsets) - 1

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest record."""
        return int(np.diff(self.offsets).max(initial=1))

    @property
    def largest_token_id(self) -> int:
        """Of all records."""
        return int(self.tokens.max())

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens per record: int64, the shape of `indices`."""
        return self.offsets[indices + 1] - self.offsets[indices]

    def padded(self, indices: np.ndarray, pad_to_multiple: int) -> tuple[np.ndarray, np.ndarray]:
        """Records padded on the right to one width: a multiple of `pad_to_multiple`, or the longest record's length.

        The longest record fits into the model's context; a width rounded up beyond it need not, and positions that are
        learned end there.

        Args:
            indices: int64 [B], which records, in this order. Empty: one row of padding of length 1, so that a rank
                without records can still enter collectives.
            pad_to_multiple: At least 1. Fewer distinct shapes; never changes a result, the padding being masked.

        Returns:
            Token ids, int64 [B, T], and lengths, int64 [B].
        """
        assert pad_to_multiple >= 1
        lengths = self.lengths(indices) if len(indices) else np.array([1])
        widest = int(lengths.max()) if len(indices) else SMALLEST_WIDTH
        width = min(-(-widest // pad_to_multiple) * pad_to_multiple, self.longest)
        ids = np.full((len(lengths), width), self.pad_token_id, dtype=np.int64)
        for row, index in enumerate(indices):
            ids[row, : lengths[row]] = self.tokens[self.offsets[index] : self.offsets[index + 1]]
        return ids, lengths


def pack(records: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` and `offsets` of records given as token ids."""
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in records])]).astype(np.int64)
    return np.concatenate([np.asarray(ids, dtype=np.int32) for ids in records]), offsets


def join_packed(parts: Sequence[PackedTokens]) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` and `offsets` of all parts, one after the other; all of one tokenizer."""
    assert parts and len({part.pad_token_id for part in parts}) == 1, "corpora of different tokenizers"
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    shifted = [part.offsets[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
    return np.concatenate([part.tokens for part in parts]), np.concatenate([np.zeros(1, dtype=np.int64), *shifted])
