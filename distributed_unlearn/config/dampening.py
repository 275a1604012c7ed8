"""`ssd`: selective synaptic dampening, one change of the weights without an objective."""

from typing import Literal

from pydantic import Field

from distributed_unlearn.config.base import StrictModel


class SsdConfig(StrictModel):
    """Weights that matter far more to the forget set than to all data shrink (Foster, Schoepf, Brintrup 2024).

    No steps: one gradient of every record, then one change.
    """

    method: Literal["ssd"]
    selection_weighting: float = Field(default=10.0, gt=0.0)
    """alpha: a weight is dampened if the forget set's importance of it is more than this many times that of all data.
    No weight can be if this is at least (all records) / (records to forget), which is refused."""
    dampening_constant: float = Field(default=1.0, ge=0.0)
    """lambda: a chosen weight is multiplied by `min(lambda (all data's importance) / (the forget set's), 1)`."""
    max_retain_records: int | None = Field(default=None, ge=1)
    """Estimate all data's importance from a seeded sample of the retain set of this size; null: from all of it."""
    seed: int = Field(default=0, ge=0)
    """Of the sample."""
