"""`retrain`: the reference as a method, exact unlearning by training anew."""

from typing import Literal

from pydantic import Field

from distributed_unlearn.config.sections import TrainingSettings


class RetrainConfig(TrainingSettings):
    """Train `data.base_model` on the retain set of every round, with the settings of a fine-tuning.

    Exact: nothing of what is asked to be forgotten enters. There is no objective and no rule that ends it early.
    """

    method: Literal["retrain"]
    seed: int = Field(default=0, ge=0)
    """Of the order of records; the fine-tuning job's seed gives what that job with `train.exclude_forget` gives."""
