"""From a global minibatch to this rank's micro-batches and their shares of the objective.

A minibatch is drawn globally, cut by rank and then into micro-batches; every sum is divided by counts of the
*global* minibatch. So neither the number of ranks nor the micro-batch size can change a result.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_unlearn.data.encoding import EncodedCorpus, TokenBatch, collate
from distributed_unlearn.data.sampling import cut, micro_batches, num_micro_batches
from distributed_unlearn.objectives.losses import correct_tokens, token_nll
from distributed_unlearn.objectives.objective import Objective
from distributed_unlearn.objectives.terms import MinibatchTotals, SequenceBatch
from distributed_unlearn.workers.messages import Indices


@dataclass(frozen=True)
class Minibatch:
    """Records of one global minibatch, by role."""

    forget: Indices
    retain: Indices

    def head(self, num_forget: int, num_retain: int) -> "Minibatch":
        """The first records of each role."""
        return Minibatch(self.forget[:num_forget], self.retain[:num_retain])


def minibatch_totals(corpus: EncodedCorpus, minibatch: Minibatch) -> MinibatchTotals:
    """Counts over the global minibatch, by which local sums are divided."""
    return MinibatchTotals(
        num_forget_records=len(minibatch.forget),
        num_retain_records=len(minibatch.retain),
        num_forget_tokens=int(corpus.num_answer_tokens(minibatch.forget).sum()),
        num_retain_tokens=int(corpus.num_answer_tokens(minibatch.retain).sum()),
    )


class MicroBatchLoss:
    """This rank's share of the objective on one micro-batch, as a function of the logits."""

    def __init__(
        self,
        tokens: TokenBatch,
        is_forget: Tensor,
        reference_nll: Tensor,
        objective: Objective,
        totals: MinibatchTotals,
    ) -> None:
        self._tokens, self._is_forget, self._reference = tokens, is_forget, reference_nll
        self._objective, self._totals = objective, totals
        self.terms: dict[str, Tensor] = {}
        """The objective's parts at the last call, local shares; tensors: reading a number waits for the device."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, T, V] -> scalar."""
        nll, num_tokens = token_nll(logits, self._tokens.input_ids, self._tokens.answer_mask)
        batch = SequenceBatch(nll, num_tokens, self._is_forget, self._reference)
        with torch.no_grad():
            self.terms = self._objective.terms(batch, self._totals)
        return self._objective(batch, self._totals)


@dataclass(frozen=True)
class MicroBatch:
    """Model inputs and loss of one micro-batch on this rank."""

    inputs: dict[str, Tensor]
    loss: MicroBatchLoss


def _to_device(tokens: TokenBatch, device: torch.device) -> TokenBatch:
    return TokenBatch(tokens.input_ids.to(device), tokens.attention_mask.to(device), tokens.answer_mask.to(device))


def _model_inputs(tokens: TokenBatch) -> dict[str, Tensor]:
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


def local_micro_batches(
    corpus: EncodedCorpus,
    minibatch: Minibatch,
    objective: Objective,
    reference_nll: dict[int, float],
    rank: int,
    world_size: int,
    micro_batch_size: int,
    device: torch.device,
) -> list[MicroBatch]:
    """This rank's micro-batches; the same number on every rank, some of them empty if need be."""
    totals = minibatch_totals(corpus, minibatch)
    parts = [(cut(minibatch.forget, r, world_size), cut(minibatch.retain, r, world_size)) for r in range(world_size)]
    count = max(1, *(-(-(len(forget) + len(retain)) // micro_batch_size) for forget, retain in parts))
    mine, num_forget = np.concatenate(parts[rank]), len(parts[rank][0])
    result = []
    for start, chosen in enumerate(micro_batches(mine, micro_batch_size, count)):
        positions = np.arange(len(chosen)) + start * micro_batch_size
        # An empty micro-batch still has one row (all padding), so that the rank can enter every collective.
        rows = max(len(chosen), 1)
        is_forget = torch.zeros(rows, dtype=torch.bool)
        is_forget[: len(chosen)] = torch.from_numpy(positions < num_forget)
        reference = torch.full((rows,), float("nan"), dtype=torch.float64)
        reference[: len(chosen)] = torch.tensor([reference_nll.get(int(i), float("nan")) for i in chosen])
        tokens = _to_device(collate(corpus, chosen), device)
        loss = MicroBatchLoss(tokens, is_forget.to(device), reference.to(device), objective, totals)
        result.append(MicroBatch(_model_inputs(tokens), loss))
    return result


class ScoringLoss:
    """A `LossOfLogits` that notes per-record scores and returns zero."""

    def __init__(self, tokens: TokenBatch) -> None:
        self._tokens = tokens
        self.nll = self.num_tokens = self.num_correct = torch.empty(0)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, T, V] -> zero."""
        ids, mask = self._tokens.input_ids, self._tokens.answer_mask
        self.nll, self.num_tokens = token_nll(logits, ids, mask)
        self.num_correct = correct_tokens(logits, ids, mask)
        return logits.new_zeros(())


def scoring_micro_batches(
    corpus: EncodedCorpus, indices: Indices, rank: int, world_size: int, micro_batch_size: int, device: torch.device
) -> list[tuple[Indices, dict[str, Tensor], ScoringLoss]]:
    """This rank's share of `indices`, records of similar length together; the same number on every rank."""
    lengths = corpus.offsets[indices + 1] - corpus.offsets[indices]
    ordered = indices[np.argsort(lengths, kind="stable")]
    count = num_micro_batches(len(ordered), world_size, micro_batch_size)
    result = []
    for chosen in micro_batches(ordered[rank::world_size], micro_batch_size, count):
        tokens = _to_device(collate(corpus, chosen), device)
        result.append((chosen, _model_inputs(tokens), ScoringLoss(tokens)))
    return result
