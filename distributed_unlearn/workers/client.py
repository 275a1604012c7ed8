"""Typed calls to the workers: the one file where their methods are named as strings.

A group calls whatever it is told to; `Workers` says what there is to call, with which arguments and what comes back.
"""

from typing import Literal, TypeVar

from distributed_unlearn.config import ModelConfig, ModelTask, SaveConfig
from distributed_unlearn.data.batches import NamedCorpus
from distributed_unlearn.records import CurvatureMode, SurvivingUpdate
from distributed_unlearn.solvers.protocols import StepSpec, StepStart, Trial
from distributed_unlearn.workers.evidence import PredictionEvidence
from distributed_unlearn.workers.group import WorkerGroup
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

Answer = TypeVar("Answer")


class Workers:
    """The driver's side of a worker group. Every call blocks until all ranks have answered.

    Each method is the worker's method of the same name, which says what it does; the first failure of any rank ends
    all of them and is raised.
    """

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group

    @property
    def group(self) -> WorkerGroup:
        """The group behind the calls."""
        return self._group

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._group.world_size

    def _first(self, kind: type[Answer], method: str, *arguments: object) -> Answer:
        """Rank 0's answer to a call of all ranks."""
        answer = self._group.call_all(method, *arguments)[0]
        assert isinstance(answer, kind), f"{method} answered {type(answer).__name__}, not {kind.__name__}"
        return answer

    # -- model and data -----------------------------------------------------------------------------------

    def can_see(self, path: str, token: str) -> list[bool]:
        """Whether each rank reads `token` in the file `path`; in rank order."""
        return [bool(seen) for seen in self._group.call_all("can_see", path, token)]

    def set_corpus(self, corpus: NamedCorpus) -> None:
        """Hand every rank the corpus without its ids; it is put once where all of a node can read it."""
        self._group.call_all("set_corpus", self._group.share(corpus.without_ids()))

    def open_model(self, config: ModelConfig, dtype: str, zero_stage: int) -> ModelFacts:
        """Load a checkpoint into partitions; its weights become the ones that updates are measured from."""
        return self._first(ModelFacts, "open_model", config, dtype, zero_stage)

    def create_checkpoint(
        self, model_type: str, settings: ArchitectureSettings, folder: str, seed: int, task: ModelTask
    ) -> int:
        """Let rank 0 write a randomly initialised checkpoint; returns its number of parameters."""
        answer = self._group.call_rank_zero("create_checkpoint", model_type, settings, folder, seed, task)
        assert isinstance(answer, int)
        return answer

    def score(self, indices: Indices, micro_batch_size: int) -> RecordScores:
        """Teacher-forced scores of records at the current weights, sorted by index."""
        return self._first(RecordScores, "score", indices, micro_batch_size)

    def evidence(self, indices: Indices, micro_batch_size: int) -> PredictionEvidence:
        """Teacher-forced evidence of every prediction at the current weights, sorted by record."""
        return self._first(PredictionEvidence, "evidence", indices, micro_batch_size)

    # -- evaluation ---------------------------------------------------------------------------------------

    def keep_reference(self) -> None:
        """Keep the opened model's weights on the hosts, to compare models that are opened later."""
        self._group.call_all("keep_reference")

    def drop_reference(self) -> None:
        """Forget the reference."""
        self._group.call_all("drop_reference")

    def survey(self, indices: Indices, micro_batch_size: int, against_reference: bool) -> Survey:
        """What every prediction of some records is like, sorted by record."""
        return self._first(Survey, "survey", indices, micro_batch_size, against_reference)

    def generate(self, prompts: TokenRows, spec: GreedySpec) -> TokenRows:
        """Greedy continuations, in the order of the prompts."""
        return self._first(TokenRows, "generate", prompts, spec)

    def probe(self, spec: ProbeSpec) -> ProbeHits:
        """Linear probes of hidden states at the current weights."""
        return self._first(ProbeHits, "probe", spec)

    def quantise(self, bits: int, group_size: int) -> int:
        """Round the opened weights in place; returns how many."""
        return self._first(int, "quantise", bits, group_size)

    # -- rounds -------------------------------------------------------------------------------------------

    def begin_round(self, spec: RoundSpec) -> None:
        """Start a round from the current weights."""
        self._group.call_all("begin_round", spec)

    def save_round(self, folder: str) -> list[str]:
        """Write the round's weights and what its method remembers into `folder`; SHA-256 of every rank's file."""
        return [str(found) for found in self._group.call_all("save_round", folder)]

    def restore_round_start(self, folder: str) -> None:
        """Set the weights to those at the start of a saved round."""
        self._group.call_all("restore_round_start", folder)

    def load_round(self, folder: str) -> None:
        """Go on from a saved state; the round has begun."""
        self._group.call_all("load_round", folder)

    def curvature_mode(self) -> CurvatureMode:
        """How the round's products were computed."""
        return self._first(CurvatureMode, "curvature_mode")

    def round_update_norm(self) -> float:
        """`||w - w_start||` of the current round."""
        return self._first(float, "round_update_norm")

    def begin_dampening(self) -> None:
        """Start a round that dampens weights, from the current ones."""
        self._group.call_all("begin_dampening")

    def add_importance(self, role: Literal["forget", "retain"], indices: Indices) -> None:
        """Add squared gradients of some records to those of their role."""
        self._group.call_all("add_importance", role, indices)

    def dampen(self, spec: DampeningSpec) -> Dampened:
        """Change the weights by the importances that were added; drops them."""
        return self._first(Dampened, "dampen", spec)

    # -- results ------------------------------------------------------------------------------------------

    def export(self, folder: str, base: ModelConfig, save: SaveConfig) -> SurvivingUpdate:
        """Write a checkpoint into an existing folder, read it back and compare."""
        return self._first(SurvivingUpdate, "export", folder, base, save)

    # -- training -----------------------------------------------------------------------------------------

    def begin_training(self, spec: TrainingSpec) -> TrainingPlan:
        """Load a checkpoint and put what is trainable under the optimiser."""
        return self._first(TrainingPlan, "begin_training", spec)

    def begin_retraining(self, spec: TrainingSpec) -> TrainingPlan:
        """The same in the place of the open model, from whose weights updates go on being measured."""
        return self._first(TrainingPlan, "begin_retraining", spec)

    def train_step(self, step_index: int) -> float:
        """One optimiser step; its loss, nats per token of the global minibatch."""
        return self._first(float, "train_step", step_index)

    def finish_training(self) -> ModelFacts:
        """End the training and open the trained model for scoring and export."""
        return self._first(ModelFacts, "finish_training")

    def finish_retraining(self) -> ModelFacts:
        """End what `begin_retraining` began and open the trained model in the place of the other."""
        return self._first(ModelFacts, "finish_retraining")

    # -- checks -------------------------------------------------------------------------------------------

    def check_curvature(self, check: CurvatureCheck) -> CurvatureReport:
        """Compare gradient and product with an unsharded float64 reference."""
        return self._first(CurvatureReport, "check_curvature", check)


class RemoteOracle:
    """`StepOracle` over a worker group: every call goes to all ranks, rank 0's floats come back."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group

    def begin_step(self, step_index: int, spec: StepSpec) -> StepStart:
        """See `StepOracle.begin_step`."""
        start = self._call("begin_step", step_index, spec)
        assert isinstance(start, StepStart)
        return start

    def advance(self, *values: float) -> tuple[float, ...]:
        """See `StepOracle.advance`."""
        found = self._call("advance", *values)
        assert isinstance(found, tuple)
        return found

    def candidate(self, *values: float) -> Trial:
        """See `StepOracle.candidate`."""
        trial = self._call("candidate", *values)
        assert isinstance(trial, Trial)
        return trial

    def measure_whole(self) -> Trial:
        """See `StepOracle.measure_whole`."""
        trial = self._call("measure_whole")
        assert isinstance(trial, Trial)
        return trial

    def abandon(self) -> None:
        """See `StepOracle.abandon`."""
        self._call("abandon")

    def undo(self) -> None:
        """See `StepOracle.undo`."""
        self._call("undo")

    def accept(self) -> None:
        """See `StepOracle.accept`."""
        self._call("accept")

    def _call(self, method: str, *arguments: object) -> object:
        return self._group.call_all("oracle_call", method, *arguments)[0]
