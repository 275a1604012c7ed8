"""Sizes and settings of the demo, full and short. Measured choices, each with its reason."""

from dataclasses import dataclass

from distributed_unlearn.config import (
    CurvatureConfig,
    ObjectiveConfig,
    SCureNewtonConfig,
    SelectionConfig,
    StopConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class DemoSettings:
    """Everything the demo does, but not where."""

    num_subjects: int
    """People, the held-out ones included."""
    num_holdout_subjects: int
    num_forget_subjects: int
    records_per_subject: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    context_length: int
    train: TrainConfig
    solver: SCureNewtonConfig
    curvature: CurvatureConfig
    seed: int

    @property
    def forget(self) -> SelectionConfig:
        """The first people ask to be forgotten."""
        return SelectionConfig(subjects=tuple(f"person-{i:04d}" for i in range(self.num_forget_subjects)))

    @property
    def holdout(self) -> SelectionConfig:
        """The last people were never trained on."""
        first = self.num_subjects - self.num_holdout_subjects
        return SelectionConfig(subjects=tuple(f"person-{i:04d}" for i in range(first, self.num_subjects)))

    @property
    def architecture(self) -> dict[str, int | bool]:
        """Llama configuration: grouped-query attention, tied embeddings."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.hidden_size * 11 // 4,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": self.context_length,
            "tie_word_embeddings": True,
        }


@dataclass(frozen=True)
class Baseline:
    """A first-order method to compare with, at the unlearning's own wall time or a little more."""

    name: str
    folder: str
    objective: ObjectiveConfig
    learning_rate: float
    """5e-4 lies between the two best of 1e-4, 3e-4, 1e-3 and 3e-3 for token_matched on a model of this size."""

    @property
    def is_cubic_objective(self) -> bool:
        """Whether it minimises what the cubic steps minimise."""
        return self.objective == ObjectiveConfig()


def baselines() -> tuple[Baseline, ...]:
    """Fine-tuning on the retain set, NPO, and AdamW on the very objective of the cubic steps."""
    return (
        Baseline("fine-tune on retain (AdamW)", "fine_tuned", ObjectiveConfig(name="retain"), 5e-4),
        Baseline("NPO (AdamW)", "npo", ObjectiveConfig(name="npo"), 5e-4),
        Baseline("token_matched (AdamW)", "adamw", ObjectiveConfig(name="token_matched"), 5e-4),
    )


def demo_settings(seed: int, short: bool) -> DemoSettings:
    """The demo as shown in the README, or a much smaller one that takes the same path."""
    if short:
        return DemoSettings(
            num_subjects=14,
            num_holdout_subjects=2,
            num_forget_subjects=2,
            records_per_subject=5,
            vocab_size=600,
            hidden_size=64,
            num_layers=2,
            context_length=128,
            train=TrainConfig(epochs=12, batch_size=12, learning_rate=4e-3, zero_stage=2),
            solver=_solver(seed, max_steps=4, gradient_batch=16, curvature_batch=8),
            curvature=CurvatureConfig(micro_batch_size=8),
            seed=seed,
        )
    return DemoSettings(
        num_subjects=44,
        num_holdout_subjects=4,
        num_forget_subjects=3,
        records_per_subject=10,
        vocab_size=1500,
        hidden_size=128,
        num_layers=4,
        context_length=256,
        train=TrainConfig(epochs=28, batch_size=16, learning_rate=2e-3, zero_stage=2),
        solver=_solver(seed, max_steps=30, gradient_batch=48, curvature_batch=8),
        curvature=CurvatureConfig(micro_batch_size=24),
        seed=seed,
    )


def _solver(seed: int, max_steps: int, gradient_batch: int, curvature_batch: int) -> SCureNewtonConfig:
    return SCureNewtonConfig(
        gradient_batch=gradient_batch,
        curvature_batch=curvature_batch,  # a sixth of the gradient's: cheaper steps win over better products
        max_steps=max_steps,
        seed=seed,
        stop=StopConfig(retain_tolerance_nats=0.05),
    )
