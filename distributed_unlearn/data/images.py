"""Labelled images: from any source that `datasets` loads, or scikit-learn's digits, to an array of model inputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from distributed_unlearn.config import DataConfig
from distributed_unlearn.data.batches import PredictionBatch
from distributed_unlearn.data.classes import Labels, class_number
from distributed_unlearn.data.corpus import identities, open_table, refuse_duplicates
from distributed_unlearn.errors import DataError
from distributed_unlearn.models.image_processor import ImagePreparation

DIGITS = "sklearn:digits"
"""The path that stands for scikit-learn's digits: 1,797 grey images of 8 x 8 pixels in ten classes, no download."""
IMAGES_PER_CALL = 256
"""Images prepared at once: bounds what is in memory beside the prepared array."""
MODES = {1: "L", 3: "RGB"}
"""Pillow's name of an image of so many channels with 8 bits each."""


@dataclass(frozen=True, eq=False)
class ImageCorpus:
    """Prepared images with their classes; a `Corpus`. All in memory, four bytes a value."""

    values: np.ndarray
    """float32 [num_records, channels, height, width]."""
    classes: np.ndarray
    """int64 [num_records]."""

    def __post_init__(self) -> None:
        assert len(self.values) == len(self.classes) and self.values.ndim == 4

    @property
    def num_records(self) -> int:
        """Number of records."""
        return len(self.classes)

    @property
    def largest_token_id(self) -> None:
        """Images are not tokens."""
        return None

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """All alike."""
        return np.ones(np.shape(indices), dtype=np.int64)

    def num_answer_tokens(self, indices: np.ndarray) -> np.ndarray:
        """One prediction a record."""
        return np.ones(np.shape(indices), dtype=np.int64)

    def batch(self, indices: np.ndarray) -> PredictionBatch:
        """See `Corpus.batch`; the row of no records is a black image."""
        indices = np.asarray(indices, dtype=np.int64)
        values = self.values[indices] if len(indices) else np.zeros((1, *self.values.shape[1:]), dtype=np.float32)
        rows = torch.arange(len(indices))
        return PredictionBatch(
            inputs={"pixel_values": torch.from_numpy(values)},
            positions=rows,
            labels=torch.from_numpy(self.classes[indices]),
            record=rows,
            num_rows=len(values),
        )


@dataclass(frozen=True)
class _Row:
    record_id: str
    subject_id: str | None
    label: str
    """As the data spells it."""
    image: Any


def load_images(
    config: DataConfig, preparation: ImagePreparation, class_names: tuple[str, ...]
) -> tuple[np.ndarray, Labels]:
    """Read, check and prepare every image of `config.path`, in file order.

    Args:
        config: Where the images are; `image_field` holds images (of `datasets`) or arrays of numbers from 0 to 255.
            The path `sklearn:digits` is scikit-learn's, with ids `digit-0000` to `digit-1796`; `split` cuts it too.
        preparation: What the checkpoint wants.
        class_names: The model's classes.

    Returns:
        float32 [num_records, channels, height, width] and the labels.

    Raises:
        DataError: data that cannot be read, an image of another mode or size than the model's, a label outside the
            classes, or an id that occurs twice.
    """
    prepared: list[np.ndarray] = []
    ids: list[tuple[str, str | None]] = []
    numbers: list[int] = []
    waiting: list[np.ndarray] = []
    size = None if preparation.processor is not None else preparation.size
    for row in (
        _digit_rows(config)
        if isinstance(config.path, str) and config.path.startswith("sklearn:")
        else _table_rows(config)
    ):
        pixels = _pixels(row, preparation.num_channels, config.image_field)
        if preparation.processor is None:
            size = pixels.shape[:2] if size is None else size
            _refuse_size(pixels.shape[:2], size, row.record_id)
        waiting.append(pixels)
        ids.append((row.record_id, row.subject_id))
        numbers.append(class_number(row.label, class_names, row.record_id))
        if len(waiting) == IMAGES_PER_CALL:
            prepared.append(_prepare(waiting, preparation, ids))
            waiting = []
    if waiting:
        prepared.append(_prepare(waiting, preparation, ids))
    refuse_duplicates([record_id for record_id, _ in ids])
    if len({part.shape[1:] for part in prepared}) != 1:
        raise _mixed_sizes()
    labels = Labels(np.array(numbers, dtype=np.int64), tuple(i for i, _ in ids), tuple(s for _, s in ids), class_names)
    return np.concatenate(prepared), labels


def _prepare(
    images: Sequence[np.ndarray], preparation: ImagePreparation, ids: Sequence[tuple[str, str | None]]
) -> np.ndarray:
    try:
        values = preparation(images)
    except ValueError:  # numpy's refusal to stack what the processor left at different sizes
        raise _mixed_sizes() from None
    _refuse_size(values.shape[2:], preparation.size or values.shape[2:], ids[-1][0])
    if not np.isfinite(values).all():
        raise DataError("images with NaN or infinite values after preparation", "finite values", "check image_std")
    return values


def _mixed_sizes() -> DataError:
    return DataError(
        "images of different sizes, which the checkpoint's image processor does not resize",
        "images that all have one size in the end",
        "resize the images, or set do_resize and size in the checkpoint's preprocessor_config.json",
    )


def _refuse_size(found: tuple[int, ...], wanted: tuple[int, ...], record_id: str) -> None:
    if tuple(found) != tuple(wanted):
        raise DataError(
            f"an image of {found[0]} x {found[1]} pixels in record '{record_id}'",
            f"{wanted[0]} x {wanted[1]} pixels (height x width), the size of the model or of the other images",
            "resize the image, or put a preprocessor_config.json that resizes into the checkpoint",
        )


def _pixels(row: _Row, num_channels: int, column: str) -> np.ndarray:
    """uint8 [H, W, num_channels]."""
    if isinstance(row.image, Image.Image):
        mode = row.image.mode
        if mode != MODES.get(num_channels):
            raise DataError(
                f"an image of mode {mode} in record '{row.record_id}'",
                f"mode {MODES.get(num_channels)}, {num_channels} channel(s) of 8 bits, as the model reads",
                f"convert the images, e.g. with Pillow: image.convert('{MODES.get(num_channels)}')",
            )
        values = np.asarray(row.image)
    else:
        values = _array(row, column)
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[2] != num_channels or min(values.shape[:2]) < 1:
        shape = " x ".join(map(str, values.shape))
        raise DataError(
            f"an image array of shape {shape} in record '{row.record_id}'",
            f"height x width{'' if num_channels == 1 else f' x {num_channels}'}, as the model reads",
            "transpose or convert the images",
        )
    return values


def _array(row: _Row, column: str) -> np.ndarray:
    """Whole numbers from 0 to 255 as uint8."""
    try:
        values = np.asarray(row.image)
    except ValueError:  # rows of different lengths
        values = np.asarray(None)
    whole = values.dtype.kind in "iu" or (values.dtype.kind == "f" and bool((values == np.round(values)).all()))
    if not whole or values.size == 0 or values.min() < 0 or values.max() > 255:
        raise DataError(
            f"{type(row.image).__name__} in column '{column}' of record '{row.record_id}'",
            "an image, or an array of whole numbers from 0 to 255",
            "correct or remove the record, or name another column in data.image_field",
        )
    return values.astype(np.uint8)


def _table_rows(config: DataConfig) -> Iterator[_Row]:
    with open_table(config) as table:
        names = table.class_names(config.label_field)
        identify = identities(config, table)
        for index, row in enumerate(table):
            identity = identify(row, index)
            label = row.get(config.label_field)
            if label is None or isinstance(label, bool | float):
                raise DataError(
                    f"{type(label).__name__} in column '{config.label_field}' of record '{identity.record_id}'",
                    "a label that is text or a whole number",
                    "correct or remove the record, or name another column in data.label_field",
                )
            spelt = names[label] if names is not None else str(label)
            yield _Row(identity.record_id, identity.subject_id, spelt, row.get(config.image_field))


def _digit_rows(config: DataConfig) -> Iterator[_Row]:
    """scikit-learn's digits (Alpaydin and Kaynak 1998), whose 17 grey levels are spread over 0 to 255."""
    if config.path != DIGITS:
        raise DataError(f"data.path '{config.path}'", f"'{DIGITS}', the one source of this kind", "correct data.path")
    from sklearn.datasets import load_digits  # takes a second, and most jobs never read it

    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    for index in _indices_of_split(config.split, len(levels)):
        yield _Row(f"digit-{index:04d}", None, str(digits.target[index]), levels[index])


def _indices_of_split(split: str, num_records: int) -> Iterator[int]:
    """Of the splits that `datasets` understands (`train[:80%]`, `train[1500:]`): which records they hold."""
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": num_records})
    except (ValueError, AssertionError):
        raise DataError(f"data.split '{split}'", "e.g. train or train[:1500]", "correct data.split") from None
    for part in parts:
        start = 0 if part.from_ is None else part.from_
        stop = num_records if part.to is None else part.to
        yield from range(start, stop)
