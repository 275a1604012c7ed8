"""How a checkpoint wants its images: its own image processor, else size and normalisation from its configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoImageProcessor
from transformers.utils import cached_file

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.errors import ModelError
from distributed_unlearn.files import expand_home
from distributed_unlearn.models.hub_errors import unreadable

PROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class ImagePreparation:
    """From pixels to what the model reads."""

    num_channels: int
    """1: grey images, 3: RGB."""
    size: tuple[int, int] | None
    """Height and width that the model reads; None where any will do, as long as it is the same for all."""
    processor: Any | None
    """The checkpoint's image processor; with one, images may have any size, if it resizes them."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """One number a channel, on pixels in [0, 1]; read where there is no processor."""

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images uint8 [H, W, num_channels] -> float32 [N, num_channels, height, width].

        Without a processor `(x / 255 - mean) / std`; all images must then have one size.
        """
        if self.processor is None:
            stacked = np.stack(images).astype(np.float32) / 255
            normalised = (stacked - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
            return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))
        output = self.processor(images=list(images), return_tensors="np", input_data_format="channels_last")
        return np.asarray(output["pixel_values"], dtype=np.float32)


def load_image_preparation(config: ModelConfig, hf_config: Any) -> ImagePreparation:
    """How the checkpoint's images are prepared: by its `preprocessor_config.json`, else by its `config.json`.

    Of the configuration are read: num_channels (3 where it is not given), image_size, image_mean and image_std
    (0 and 1 where they are not given).

    Raises:
        ModelError: an image processor that cannot be loaded, or a mean or deviation that does not fit the channels.
    """
    num_channels = int(getattr(hf_config, "num_channels", 3))
    size = getattr(hf_config, "image_size", None)
    height_width = (size, size) if isinstance(size, int) else None if size is None else (int(size[0]), int(size[1]))
    mean, std = (getattr(hf_config, name, None) for name in ("image_mean", "image_std"))
    mean = (0.0,) * num_channels if mean is None else tuple(mean)
    std = (1.0,) * num_channels if std is None else tuple(std)
    if len(mean) != num_channels or len(std) != num_channels or min(std) <= 0:
        raise ModelError(
            f"a checkpoint with {len(mean)} image_mean and {len(std)} image_std for {num_channels} channel(s)",
            "one number a channel, the deviations positive",
            "correct its config.json",
        )
    return ImagePreparation(num_channels, height_width, _load_processor(config), mean, std)


def save_image_processor(path: str, revision: str | None, folder: Path) -> None:
    """Write the image processor of the checkpoint at `path` into `folder`; nothing where it has none.

    Raises:
        ModelError: it cannot be loaded.
    """
    processor = _load_processor(ModelConfig(path=path, revision=revision))
    if processor is not None:
        processor.save_pretrained(folder)


def _load_processor(config: ModelConfig) -> Any | None:
    path = expand_home(config.path)
    try:
        found = cached_file(path, PROCESSOR_FILE, revision=config.revision, _raise_exceptions_for_missing_entries=False)
        if found is None:
            return None
        # The pillow backend always: torchvision's, where it is installed, resizes a little differently.
        return AutoImageProcessor.from_pretrained(
            path, revision=config.revision, trust_remote_code=False, backend="pil"
        )
    except (OSError, ValueError, ImportError) as error:
        raise unreadable(config, PROCESSOR_FILE, error) from error
