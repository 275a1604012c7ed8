"""Whether two checkpoints can be compared record by record: a retrained reference must be the same kind of model."""

from pathlib import Path
from typing import Literal

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.errors import ModelError
from distributed_unlearn.files import expand_home
from distributed_unlearn.models.checkpoint import load_model_config
from distributed_unlearn.models.processor import load_tokenizer

_SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_labels")
"""What of a configuration says which architecture it is; where a configuration lacks one, both must."""

_WORDS = {
    "retrained": (
        "a retrained reference",
        "a reference that was trained as the model was, without what is to be forgotten",
        "train the reference from the same base, or remove retrained",
    ),
    "data.base_model": (
        "a base model",
        "the checkpoint that was fine-tuned to give the model",
        "correct data.base_model",
    ),
}
"""What a mismatch is called, what was expected and what to do, by the key that names the checkpoint."""


def require_comparable(
    model: ModelConfig,
    reference: ModelConfig,
    pad_token: str | None,
    key: Literal["retrained", "data.base_model"] = "retrained",
) -> None:
    """Refuse a reference of another architecture or with another tokenizer: no number could be compared.

    Args:
        model: The checkpoint that the job opens.
        reference: The retrained model, or where its training starts.
        pad_token: `data.pad_token`.
        key: Of the job, which names it.

    Raises:
        ModelError: it is of another kind, or cannot be read.
    """
    what, expected, remedy = _WORDS[key]
    mine, its = load_model_config(model), load_model_config(reference)
    for name in _SHAPE:
        values = getattr(mine, name, None), getattr(its, name, None)
        if values[0] != values[1]:
            raise ModelError(
                f"{what} '{reference.path}' with {name} {values[1]}; '{model.path}' has {values[0]}",
                expected,
                remedy,
            )
    folder = Path(expand_home(reference.path))
    if model.task == "image_classification" or (folder.is_dir() and not (folder / "tokenizer.json").exists()):
        return  # records are tokenised once, by the model's own
    if load_tokenizer(model, pad_token).get_vocab() != load_tokenizer(reference, pad_token).get_vocab():
        raise ModelError(
            f"{what} '{reference.path}' with another tokenizer than '{model.path}'",
            expected,
            remedy,
        )
