"""What happens to records that are longer than the model takes: refused, cut or left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distributed_unlearn.data.corpus import TextRecord
from distributed_unlearn.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """One record's tokens; the first `prompt_length` are given."""

    token_ids: list[int]
    prompt_length: int


def check_too_long(
    records: Sequence[TextRecord],
    encoded: Sequence[Encoded],
    long: Sequence[int],
    max_length: int,
    too_long: Literal["refuse", "truncate", "drop"],
    protected_ids: frozenset[str],
) -> None:
    """Raise a `DataError` unless the policy may be applied to the records `long`."""
    if too_long == "refuse":
        longest = max(len(encoded[index].token_ids) for index in long)
        raise DataError(
            f"{len(long)} of {len(records)} records longer than {max_length} tokens, the longest {longest}, "
            f"e.g. {some_ids([records[index].record_id for index in long])}",
            f"at most {max_length} tokens of prompt and answer",
            "raise data.max_length (up to the model's context length), or set data.too_long to truncate, which cuts "
            "the answer's end, or to drop, which leaves the records out unless they are to be forgotten",
        )
    if too_long == "truncate":
        bare = [
            records[index].record_id
            for index in long
            if encoded[index].prompt_length >= max_length
            or (records[index].shortenable is not None and len(encoded[index].token_ids) > max_length)
        ]
        if bare:
            raise DataError(
                f"{len(bare)} record(s) whose prompt alone fills {max_length} tokens, e.g. {some_ids(bare)}",
                "room for at least one answer token",
                "raise data.max_length, shorten the prompts or set data.too_long to drop",
            )
    if too_long == "drop":
        wanted = [records[index].record_id for index in long if records[index].record_id in protected_ids]
        if wanted:
            raise DataError(
                f"{len(wanted)} record(s) to be forgotten that are longer than {max_length} tokens, "
                f"e.g. {some_ids(wanted)}",
                "every record to be forgotten in the data",
                "raise data.max_length or set data.too_long to truncate",
            )


def some_ids(record_ids: Sequence[str]) -> str:
    """The first five ids, for an error."""
    return ", ".join(repr(record_id) for record_id in record_ids[:5])
