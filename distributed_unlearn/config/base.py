"""What every section of a job file is: frozen, strict, finite; and what a path may be."""

from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST_NUMBER, LARGEST_WHOLE, SMALLEST_NUMBER = 1e38, 2**53, 1e-30
"""What numbers of a job may be: inside the range of float32, and whole ones exact in float64; 0 where it is allowed."""
_MAX_PATH_BYTES, _MAX_NAME_BYTES = 4095, 255


def _check_path(path: str) -> str:
    if not path.strip():
        raise ValueError("an empty path; name a file, a folder or a name on the Hub")
    sizes = [len(part.encode()) for part in path.split("/")]
    if len(path.encode()) > _MAX_PATH_BYTES or max(sizes) > _MAX_NAME_BYTES:
        raise ValueError(f"a path of {len(path)} characters, longer than a file system holds; shorten it")
    return path


PathText = Annotated[str, AfterValidator(_check_path)]
"""A path that a file system can hold, or a name on the Hub."""


def _takes_bool(annotation: Any) -> bool:
    return annotation is bool or any(_takes_bool(argument) for argument in get_args(annotation))


def _has_control_characters(value: object) -> bool:
    return isinstance(value, str) and any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029" for c in value)


class StrictModel(BaseModel):
    """Base of all configuration models: frozen, unknown keys refused, every number finite and none of them a boolean.

    Text is one line, so that an error that names it is one too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and not _takes_bool(cls.model_fields[info.field_name].annotation):
            raise ValueError("a boolean where a number or text belongs; quote it if it is text")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _within_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int | float) and abs(value) > (
            LARGEST_WHOLE if isinstance(value, int) else LARGEST_NUMBER
        ):
            raise ValueError(f"a number beyond {LARGEST_WHOLE if isinstance(value, int) else LARGEST_NUMBER:g}")
        if isinstance(value, float) and 0 < abs(value) < SMALLEST_NUMBER:
            raise ValueError(f"a number below {SMALLEST_NUMBER:g}; use 0 where it is allowed, or a larger one")
        parts = value if isinstance(value, tuple) else (value,)
        if info.field_name not in _FREE_TEXT and any(_has_control_characters(part) for part in parts):
            raise ValueError("a line break or another control character; write it on one line")
        return value


_FREE_TEXT = frozenset({"prompt_template", "pad_token", "record_ids", "subjects"})
"""Fields whose text may hold line breaks: no error shows them as they are."""
