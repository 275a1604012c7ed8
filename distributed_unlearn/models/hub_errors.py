"""Why a checkpoint's configuration or tokenizer cannot be had: the causes behind what transformers raises."""

import os
from collections.abc import Iterator

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.errors import ModelError


def unreadable(config: ModelConfig, what: str, error: Exception) -> ModelError:
    """The error to raise for `what` of the checkpoint, by its cause.

    transformers raises OSError or ValueError for everything; the cause is in the exceptions that the error came from
    and, for what it finds in config.json, in the words of its message.
    """
    name = f"model.path '{config.path}'"
    names = {type(cause).__name__ for cause in _chain(error)}
    text = str(error)
    if "GatedRepoError" in names:
        return ModelError(
            f"{name}, which is gated on the Hub",
            "a model that this user may download",
            "ask for access on its page on the Hub, then set HF_TOKEN to a token of that account",
        )
    if "RevisionNotFoundError" in names:
        return ModelError(f"{name} without revision '{config.revision}'", "a revision it has", "check model.revision")
    if "RepositoryNotFoundError" in names:
        return ModelError(
            f"{name}, which the Hub does not have or does not show",
            "a hub name, or a folder with a checkpoint",
            "check the path; for a private model set HF_TOKEN",
        )
    if names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        return _out_of_reach(name)
    if "trust_remote_code" in text or "contains custom code" in text:
        return ModelError(
            f"{name}, which needs code from its own repository",
            "an architecture of transformers itself; remote code is never run",
            "convert the checkpoint to a model type of transformers, or choose another model",
        )
    if "does not recognize this architecture" in text:
        return ModelError(
            f"{name}, whose model_type the installed transformers does not know",
            "a model type of transformers",
            "update transformers, or choose another model",
        )
    if "Should have a `model_type` key" in text:
        return ModelError(
            f"{name} without a config.json that names a model_type",
            "a folder with a Hugging Face checkpoint, or a hub name",
            "check the path",
        )
    remedy = "check the path" if what == "config.json" else "save the tokenizer into the checkpoint's folder"
    return ModelError(
        f"{name} without a readable {what} ({type(error).__name__})",
        f"a Hugging Face checkpoint with its {what}",
        remedy,
    )


def _out_of_reach(name: str) -> ModelError:
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        remedy = "unset HF_HUB_OFFLINE, download the model first, or give the path of a folder"
    else:
        remedy = "check the network (proxy, HF_ENDPOINT), download the model elsewhere, or give the path of a folder"
    return ModelError(f"{name}, which is not on this machine, and the Hub is out of reach", "one of the two", remedy)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
