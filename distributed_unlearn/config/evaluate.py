"""An evaluation file: which checkpoint is measured, on which records, against what, and by which metrics."""

from typing import Literal

from pydantic import Field, model_validator

from distributed_unlearn.config.agreement import require_records_of_task
from distributed_unlearn.config.base import PathText, StrictModel
from distributed_unlearn.config.sections import ClusterConfig, DataConfig, ModelConfig, SelectionConfig

MetricGroup = Literal[
    "memorisation",
    "membership",
    "holdout_distance",
    "priv_leak",
    "tug_of_war",
    "divergence",
    "truth_ratio",
    "forget_quality",
    "model_utility",
    "rouge",
    "verbmem",
    "knowmem",
    "depth",
    "quantised",
    "relearned",
]
"""Metrics that stand or fall together by what they need."""


class PerturbedConfig(StrictModel):
    """Files of JSON lines with a question, its answer, and wrong answers that sound alike, as TOFU has them."""

    forget: PathText | None = None
    retain: PathText | None = None
    real_authors: PathText | None = None
    world_facts: PathText | None = None
    question_field: str = "question"
    answer_field: str = "answer"
    paraphrased_field: str = "paraphrased_answer"
    """The right answer in other words: of forget and retain, where the plain one was trained on."""
    wrong_field: str = "perturbed_answer"
    """A list of wrong answers."""
    mean: Literal["geometric", "arithmetic"] = "geometric"
    """Over the wrong answers' probabilities: geometric as in OpenUnlearning, arithmetic as in the TOFU paper."""


class GenerationConfig(StrictModel):
    """What the model writes by itself, always with the most likely token."""

    max_new_tokens: int = Field(default=200, ge=1)
    """For ROUGE-L recall."""
    verbatim_tokens: int = Field(default=128, ge=1)
    """Of these the first so many count for VerbMem."""
    knowledge_tokens: int = Field(default=32, ge=1)
    """For KnowMem."""
    num_examples: int = Field(default=3, ge=0)
    """Retain records that are shown before each question of KnowMem."""
    max_records_per_set: int | None = Field(default=None, ge=1)
    """Continue a seeded sample of this size of each larger set; null: every record."""


class DepthConfig(StrictModel):
    """A linear probe of every block's output."""

    ridge: float = Field(default=0.01, gt=0.0)
    """Weight of its penalty, a share of the mean variance of a hidden unit."""


class QuantiseConfig(StrictModel):
    """Round-to-nearest quantisation of all matrices outside the embeddings."""

    bits: int = Field(default=4, ge=2, le=8)
    group_size: int = Field(default=64, ge=2)


class RelearnConfig(StrictModel):
    """A little training on a few of the records that were forgotten; the others are then scored."""

    num_records: int = Field(default=5, ge=1)
    epochs: int = Field(default=5, ge=1)
    batch_size: int = Field(default=5, ge=1)
    learning_rate: float = Field(default=1e-5, gt=0.0, le=1.0)


class StressConfig(StrictModel):
    """What may bring forgotten records back."""

    quantise: QuantiseConfig | None = None
    relearn: RelearnConfig | None = None


class EvaluateConfig(StrictModel):
    """One evaluation file."""

    model: ModelConfig
    """The checkpoint that is measured: of a run of this program, or any other."""
    data: DataConfig
    forget: SelectionConfig
    holdout: SelectionConfig | None = None
    """Records that were never trained on."""
    retrained: PathText | None = None
    """A model trained without the forget set: what a perfect result is like."""
    retrained_again: PathText | None = None
    """The same with another seed: how far two perfect results lie apart (the noise floor)."""
    metrics: tuple[MetricGroup, ...] | None = None
    """null: all whose needs are given here, the others are listed with what they lack. One that is named and lacks
    something is refused."""
    perturbed: PerturbedConfig | None = None
    generation: GenerationConfig | None = None
    """null: the model writes nothing, which is by far the slowest part of an evaluation."""
    depth: DepthConfig | None = None
    stress: StressConfig = StressConfig()
    cluster: ClusterConfig = ClusterConfig()
    micro_batch_size: int = Field(default=16, ge=1)
    """Records that go through the model at once on one rank. Changes memory and speed, never a result."""
    max_records_per_set: int | None = Field(default=None, ge=1)
    """Measure on a seeded sample of this size of each larger set; null: on every record."""
    num_resamples: int = Field(default=1000, ge=100)
    """Of the bootstrap intervals."""
    cache: PathText | None = None
    """Folder of what was measured before, by content; null: `cache` in the output folder."""
    output: PathText

    @model_validator(mode="after")
    def _consistent(self) -> "EvaluateConfig":
        require_records_of_task(self.model, self.data, (self.forget, self.holdout))
        if self.retrained_again is not None and self.retrained is None:
            raise ValueError("retrained_again without retrained; the first of both is the reference, name it")
        if self.forget.path is not None:
            raise ValueError("forget selects among the records of data; path is for holdout only")
        if self.metrics is not None and not self.metrics:
            raise ValueError("metrics is empty; name at least one, or null for all that can be measured")
        if self.model.trainable != "all":
            raise ValueError("model.trainable has no meaning here: nothing is trained; remove it")
        return self
