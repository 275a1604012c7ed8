"""The `StepOracle` on shards: a `VectorOracle` over ZeRO partitions."""

import torch

from distributed_unlearn.config import RmuConfig
from distributed_unlearn.data.batches import Corpus
from distributed_unlearn.engine.decay import decay_mask
from distributed_unlearn.engine.memory_plan import MemoryPlan
from distributed_unlearn.engine.minibatch import MinibatchObjective
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.engine.partial_model import up_to_block
from distributed_unlearn.solvers.oracle import OracleState, VectorOracle
from distributed_unlearn.workers.messages import RoundSpec

_LAST_SEEN = "last_seen_log_odds"


class ShardedOracle(VectorOracle):
    """One round's step oracle on this rank's shards. Every call of a step is collective, see `VectorOracle`."""

    def __init__(self, opened: OpenedModel, corpus: Corpus, spec: RoundSpec) -> None:
        self._round_index = spec.round_index
        seen = opened
        if isinstance(spec.solver, RmuConfig):
            seen = up_to_block(opened, spec.solver.layer_of(len(opened.segmented.blocks)))
        self._minibatch = MinibatchObjective(seen, corpus, spec)
        super().__init__(
            space=opened.space,
            objective=self._minibatch,
            weights=opened.weights,
            seed=spec.solver.seed * 1_000_003 + spec.round_index,
            decays=lambda: decay_mask(opened),
        )

    def state_dict(self) -> OracleState:
        """See `VectorOracle.state_dict`; with the log-odds that targets were ranked by, the same on every rank."""
        state = super().state_dict()
        if self._minibatch.last_seen is not None:
            state["vectors"][_LAST_SEEN] = torch.from_numpy(self._minibatch.last_seen.values)
        return state

    def load_state_dict(self, state: OracleState) -> None:
        """See `VectorOracle.load_state_dict`."""
        vectors = dict(state["vectors"])
        if self._minibatch.last_seen is not None:
            self._minibatch.last_seen.values = vectors.pop(_LAST_SEEN).cpu().numpy().copy()
        super().load_state_dict({"vectors": vectors, "numbers": state["numbers"]})

    @property
    def round_index(self) -> int:
        """From 0."""
        return self._round_index

    @property
    def memory(self) -> MemoryPlan | None:
        """What passes keep; None before the first of them."""
        return self._minibatch.memory

    @memory.setter
    def memory(self, plan: MemoryPlan) -> None:
        """Keep what another oracle of this round has kept: results may differ by rounding with what is kept."""
        self._minibatch.memory = plan

    @property
    def cached(self) -> bool | None:
        """Whether products keep their graphs; None before the first gradient and where there are no products."""
        memory = self._minibatch.memory
        return None if memory is None or memory.product_group == 0 else memory.cached

    @property
    def cached_bytes(self) -> int:
        """What cached mode keeps, or would keep, on the largest rank; 0 where there are no products."""
        return 0 if self._minibatch.memory is None else self._minibatch.memory.cached_bytes
