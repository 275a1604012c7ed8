"""One rank's program: what the driver can ask of it, nothing else.

A worker holds at most one opened model, one corpus, one round and one training. Every method is collective
unless it says otherwise: all ranks must call the same methods in the same order. The step oracle's methods
are reached through `oracle_call`.
"""

import gc
import logging
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import transformers
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from distributed_unlearn.config import ModelConfig, ModelTask, SaveConfig
from distributed_unlearn.data.batches import Corpus
from distributed_unlearn.engine.check import check_curvature
from distributed_unlearn.engine.communicator import Communicator, RankSpec, connect, open_store
from distributed_unlearn.engine.create import create_checkpoint
from distributed_unlearn.engine.dampening import Dampening
from distributed_unlearn.engine.evidence import gather_evidence, score_records
from distributed_unlearn.engine.export import export_model
from distributed_unlearn.engine.generate import generate
from distributed_unlearn.engine.kept_weights import KeptWeights
from distributed_unlearn.engine.model import OpenedModel, adopt_model, open_model
from distributed_unlearn.engine.oracle import ShardedOracle
from distributed_unlearn.engine.partitions import load_model, prepare_deepspeed
from distributed_unlearn.engine.probe import probe
from distributed_unlearn.engine.quantise import quantise
from distributed_unlearn.engine.round_state import load_round, restore_start, save_round
from distributed_unlearn.engine.survey import gather_survey
from distributed_unlearn.engine.training import Trainer
from distributed_unlearn.models.adapters import InsertedAdapter
from distributed_unlearn.models.families import family_of
from distributed_unlearn.models.trainable import trainable_parameters
from distributed_unlearn.records import CurvatureMode, SurvivingUpdate
from distributed_unlearn.workers.evidence import PredictionEvidence
from distributed_unlearn.workers.messages import (
    ArchitectureSettings,
    CurvatureCheck,
    CurvatureReport,
    Dampened,
    DampeningSpec,
    Indices,
    ModelFacts,
    RecordScores,
    RoundSpec,
    TrainingPlan,
    TrainingSpec,
)
from distributed_unlearn.workers.survey import GreedySpec, ProbeHits, ProbeSpec, Survey, TokenRows


def quiet_libraries() -> None:
    """Keep the libraries' chatter and progress bars out of our own output."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("DeepSpeed", "deepspeed", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Worker:
    """One rank."""

    def __init__(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        quiet_libraries()
        self._store: dist.Store | None = None
        self._communicator: Communicator | None = None
        self._opened: OpenedModel | None = None
        self._corpus: Corpus | None = None
        self._oracle: ShardedOracle | None = None
        self._dampening: Dampening | None = None
        self._initial: torch.Tensor | None = None
        self._round_start: torch.Tensor | None = None
        self._reference: KeptWeights | None = None
        self._trainer: Trainer | None = None
        self._trained: tuple[TrainingSpec, InsertedAdapter | None] | None = None

    # -- group --------------------------------------------------------------------------------------------

    def open_rendezvous(self, host: str, timeout_seconds: float) -> int:
        """Rank 0 only: open the store and return its port."""
        self._store, port = open_store(host, timeout_seconds)
        return port

    def connect(self, spec: RankSpec, host: str, port: int, timeout_seconds: float, use_gpu: bool) -> None:
        """Join the group of all ranks."""
        self._communicator = connect(spec, host, port, self._store, timeout_seconds, use_gpu)
        prepare_deepspeed(use_gpu)

    def can_see(self, path: str, token: str) -> bool:
        """Whether this rank reads `token` in the file `path`: whether it shares storage with the driver."""
        try:
            return Path(path).read_text(encoding="utf-8").strip() == token
        except OSError:
            return False

    @property
    def communicator(self) -> Communicator:
        """The group, once connected."""
        assert self._communicator is not None, "not connected"
        return self._communicator

    @property
    def opened(self) -> OpenedModel:
        """The model, once opened."""
        assert self._opened is not None, "no model is open"
        return self._opened

    # -- model and data -----------------------------------------------------------------------------------

    def open_model(self, config: ModelConfig, dtype: str, zero_stage: int) -> ModelFacts:
        """Load a checkpoint into partitions; its weights become the ones that updates are measured from."""
        self.close_model()
        self._opened = open_model(config, getattr(torch, dtype), zero_stage, self.communicator)
        self._initial = self.opened.weights.master.detach().cpu().clone()
        return self.opened.facts()

    def close_model(self) -> None:
        """Drop the model and everything that hangs on it; not collective."""
        self._opened = self._oracle = self._initial = self._round_start = self._trainer = self._dampening = None
        unset_hf_deepspeed_config()  # a training that failed leaves transformers in ZeRO-3 mode
        gc.collect()

    def create_checkpoint(
        self, model_type: str, settings: ArchitectureSettings, folder: str, seed: int, task: ModelTask = "causal_lm"
    ) -> int:
        """Write a randomly initialised checkpoint; rank 0 only, not collective."""
        return create_checkpoint(family_of(task), model_type, settings, folder, seed)

    def set_corpus(self, corpus: Corpus) -> None:
        """Use this corpus from now on; not collective."""
        self._corpus = corpus

    def score(self, indices: Indices, micro_batch_size: int) -> RecordScores | None:
        """Teacher-forced scores of records; rank 0 returns them."""
        assert self._corpus is not None
        scores = score_records(self.opened, self._corpus, indices, micro_batch_size)
        return scores if self.communicator.rank == 0 else None

    def evidence(self, indices: Indices, micro_batch_size: int) -> PredictionEvidence | None:
        """Teacher-forced evidence of every prediction of some records; rank 0 returns it."""
        assert self._corpus is not None
        found = gather_evidence(self.opened, self._corpus, indices, micro_batch_size)
        return found if self.communicator.rank == 0 else None

    # -- evaluation ---------------------------------------------------------------------------------------

    def keep_reference(self) -> None:
        """Keep the opened model's weights on the host, to compare models that are opened later; not collective."""
        self._reference = KeptWeights(self.opened)

    def drop_reference(self) -> None:
        """Forget the reference; not collective."""
        self._reference = None

    def survey(self, indices: Indices, micro_batch_size: int, against_reference: bool) -> Survey | None:
        """What every prediction of some records is like; rank 0 returns it."""
        assert self._corpus is not None and (self._reference is not None or not against_reference)
        reference = self._reference if against_reference else None
        found = gather_survey(self.opened, self._corpus, indices, micro_batch_size, reference)
        return found if self.communicator.rank == 0 else None

    def generate(self, prompts: TokenRows, spec: GreedySpec) -> TokenRows | None:
        """Greedy continuations; rank 0 returns them."""
        found = generate(self.opened, prompts, spec)
        return found if self.communicator.rank == 0 else None

    def probe(self, spec: ProbeSpec) -> ProbeHits | None:
        """Linear probes of hidden states; rank 0 returns where they were right."""
        assert self._corpus is not None
        found = probe(self.opened, self._corpus, spec)
        return found if self.communicator.rank == 0 else None

    def quantise(self, bits: int, group_size: int) -> int:
        """Round the opened weights in place; how many."""
        return quantise(self.opened, bits, group_size)

    # -- rounds -------------------------------------------------------------------------------------------

    def begin_round(self, spec: RoundSpec) -> None:
        """Start a round from the current weights."""
        assert self._corpus is not None
        self._oracle = None  # the graphs of the round before go before those of this one come
        self._oracle = ShardedOracle(self.opened, self._corpus, spec)
        self._round_start = self.opened.weights.master.detach().cpu().clone()

    def oracle_call(self, method: str, *arguments: object) -> object:
        """A method of the round's `StepOracle`, by name."""
        assert self._oracle is not None, "no round has begun"
        return getattr(self._oracle, method)(*arguments)

    def curvature_mode(self) -> CurvatureMode:
        """How the round's products were computed; not collective."""
        assert self._oracle is not None
        return CurvatureMode(self._oracle.cached, self._oracle.cached_bytes / 2**30)

    def save_round(self, folder: str) -> str:
        """Write this rank's part of the round's state into an existing folder; its SHA-256. Not collective."""
        assert self._oracle is not None and self._round_start is not None
        start = self._round_start if self._oracle.round_index else None  # the first round's is in the base checkpoint
        return save_round(Path(folder), self.communicator.rank, self.opened.weights, start, self._oracle)

    def restore_round_start(self, folder: str) -> None:
        """Set the weights to those at the start of the saved round."""
        restore_start(Path(folder), self.communicator.rank, self.opened.weights)

    def load_round(self, folder: str) -> None:
        """Go on from the saved state; the round has begun."""
        assert self._oracle is not None
        load_round(Path(folder), self.communicator.rank, self.opened.weights, self._oracle)

    def round_update_norm(self) -> float:
        """`||w - w_start||` of the current round."""
        assert self._round_start is not None
        weights = self.opened.weights.master
        return self.opened.space.norm(weights - self._round_start.to(weights.device))

    def begin_dampening(self) -> None:
        """Start a round that dampens weights, from the current ones."""
        assert self._corpus is not None
        self._oracle = None
        self._dampening = Dampening(self.opened, self._corpus)
        self._round_start = self.opened.weights.master.detach().cpu().clone()

    def add_importance(self, role: Literal["forget", "retain"], indices: Indices) -> None:
        """Add squared gradients of some records to those of their role."""
        assert self._dampening is not None, "no dampening has begun"
        self._dampening.add(role, indices)

    def dampen(self, spec: DampeningSpec) -> Dampened:
        """Change the weights by the importances that were added, and drop those.

        Raises:
            NumericalError: an importance that is not finite; no weight was changed.
        """
        assert self._dampening is not None, "no dampening has begun"
        dampening, self._dampening = self._dampening, None
        return dampening.dampen(spec)

    # -- results ------------------------------------------------------------------------------------------

    def export(self, folder: str, base: ModelConfig, save: SaveConfig) -> SurvivingUpdate:
        """Write weights, configuration and the base's tokenizer into an existing folder; read back and compare."""
        assert self._initial is not None
        return export_model(self.opened, Path(folder), base, save, self._initial)

    # -- training -----------------------------------------------------------------------------------------

    def begin_training(self, spec: TrainingSpec) -> TrainingPlan:
        """Load a checkpoint and put what is trainable under DeepSpeed's optimiser.

        Raises:
            ModelError: not loadable, or a trainable pattern that matches nothing.
        """
        assert self._corpus is not None
        self.close_model()
        config, dtype = spec.model, getattr(torch, spec.model.dtype)
        model, adapter = load_model(config, dtype, spec.zero_stage, self.communicator.device, dtype)
        self._trained = spec, adapter
        names = trainable_parameters(model, family_of(config.task), config.trainable, adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        self._trainer = Trainer(model, self._corpus, spec, self.communicator)
        return self._trainer.plan

    def begin_retraining(self, spec: TrainingSpec) -> TrainingPlan:
        """As `begin_training`, in the place of the open model, from whose weights updates go on being measured.

        Raises:
            ModelError: see `begin_training`.
        """
        initial, start = self._initial, self.opened.weights.master.detach().cpu().clone()
        plan = self.begin_training(spec)
        self._initial, self._round_start = initial, start
        return plan

    def train_step(self, step_index: int) -> float:
        """One optimiser step; its loss, nats per token."""
        assert self._trainer is not None
        return self._trainer.step(step_index)

    def finish_training(self) -> ModelFacts:
        """End the training and open the trained model for scoring and export."""
        self._adopt_trained("all")
        self._initial = self.opened.weights.master.detach().cpu().clone()
        return self.opened.facts()

    def finish_retraining(self) -> ModelFacts:
        """End a training that `begin_retraining` began and open the trained model in the place of the other."""
        assert self._trained is not None and self._initial is not None
        self._adopt_trained(self._trained[0].model.trainable)
        assert self._initial.shape == self.opened.weights.master.shape, "a base model of another architecture"
        return self.opened.facts()

    def _adopt_trained(self, trainable: str | tuple[str, ...]) -> None:
        assert self._trainer is not None and self._trained is not None
        model, self._trainer = self._trainer.finish(), None
        (spec, adapter), dtype = self._trained, next(model.parameters()).dtype
        family = family_of(spec.model.task)
        self._opened = adopt_model(model, family, adapter, trainable, dtype, dtype, spec.zero_stage, self.communicator)

    # -- checks -------------------------------------------------------------------------------------------

    def check_curvature(self, check: CurvatureCheck) -> CurvatureReport | None:
        """Compare gradient and product with an unsharded float64 reference; rank 0 returns the report."""
        return check_curvature(self.opened, check)
