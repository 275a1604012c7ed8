"""Whether two checkpoints can be compared record by record: a retrained reference must be the same kind of model."""

from pathlib import Path

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.errors import ModelError
from distributed_unlearn.files import expand_home
from distributed_unlearn.models.checkpoint import load_model_config
from distributed_unlearn.models.processor import load_tokenizer

_SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_labels")
"""What of a configuration says which architecture it is; where a configuration lacks one, both must."""


def require_comparable(model: ModelConfig, reference: ModelConfig, pad_token: str | None) -> None:
    """Refuse a retrained reference of another architecture or with another tokenizer: no number could be compared.

    Args:
        model: The checkpoint that the job opens.
        reference: The retrained model.
        pad_token: `data.pad_token`.

    Raises:
        ModelError: it is of another kind, or cannot be read.
    """
    mine, its = load_model_config(model), load_model_config(reference)
    for name in _SHAPE:
        values = getattr(mine, name, None), getattr(its, name, None)
        if values[0] != values[1]:
            raise ModelError(
                f"a retrained reference '{reference.path}' with {name} {values[1]}; '{model.path}' has {values[0]}",
                "a reference that was trained as the model was, without what is to be forgotten",
                "train the reference from the same base, or remove retrained",
            )
    folder = Path(expand_home(reference.path))
    if model.task == "image_classification" or (folder.is_dir() and not (folder / "tokenizer.json").exists()):
        return  # records are tokenised once, by the model's own
    if load_tokenizer(model, pad_token).get_vocab() != load_tokenizer(reference, pad_token).get_vocab():
        raise ModelError(
            f"a retrained reference '{reference.path}' with another tokenizer than '{model.path}'",
            "a reference that was trained as the model was, without what is to be forgotten",
            "train the reference from the same base, or remove retrained",
        )
