"""Linear probes of hidden states: can the answers still be read from inside the model?

At every position that predicts an answer token each block's output h is noted. A ridge regression on the records that
the model should know maps [h, 1] to the one-hot token (a least-squares classifier; Alain and Bengio 2016 for the idea,
Belrose et al. 2023 for probes of next tokens); where its largest output on another record is the label, the answer
token could be read there. The regression is exact: `(X'X + ridge mean(diag) I)^-1 X'Y` in float64, X'X and X'Y summed
over records and ranks.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_unlearn.curvature.forward import evaluate_blocks
from distributed_unlearn.curvature.recording import Recording, first_of
from distributed_unlearn.curvature.trace import LossShare, trace_forward
from distributed_unlearn.data.batches import Corpus, PredictionBatch
from distributed_unlearn.engine.inputs import NotedLogits, scoring_micro_batches
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.errors import ModelError
from distributed_unlearn.objectives.constants import ragged_rows
from distributed_unlearn.workers.messages import Indices
from distributed_unlearn.workers.survey import ProbeHits, ProbeSpec


def probe(opened: OpenedModel, corpus: Corpus, spec: ProbeSpec) -> ProbeHits:
    """Fit a probe of every block and try it. All ranks must call this.

    Raises:
        ModelError: a model without blocks.
    """
    if not opened.segmented.blocks:
        raise ModelError(
            f"a model without blocks ({opened.segmented.fallback_reason})", "blocks to look into", "leave depth out"
        )
    weights = _fit(opened, corpus, spec)
    classes = torch.from_numpy(spec.classes).to(opened.communicator.device)
    parts: list[tuple[Indices, Indices, np.ndarray]] = []
    for chosen, batch, hidden in _hidden_states(opened, corpus, spec.tried_on, spec.micro_batch_size):
        found = [classes[(h @ w).argmax(1)] == batch.labels for h, w in zip(hidden, weights, strict=True)]
        parts.append((chosen, corpus.num_answer_tokens(chosen), torch.stack(found).cpu().numpy()))
    gathered = opened.communicator.gather_parts(parts)
    indices, counts = (np.concatenate([part[index] for part in gathered]) for index in (0, 1))
    order = np.argsort(indices, kind="stable")
    hits = np.concatenate([part[2] for part in gathered], axis=1)[:, ragged_rows(counts, order)]
    return ProbeHits(indices[order], counts[order], hits)


def _fit(opened: OpenedModel, corpus: Corpus, spec: ProbeSpec) -> list[Tensor]:
    """The probe of every block: [d + 1, K] each. All ranks must call this."""
    communicator = opened.communicator
    sums: list[tuple[Tensor, Tensor]] = []
    classes = torch.from_numpy(spec.classes).to(communicator.device)
    for _, batch, hidden in _hidden_states(opened, corpus, spec.fitted_on, spec.micro_batch_size):
        at = torch.searchsorted(classes, batch.labels).clamp_max(len(classes) - 1)
        known = classes[at] == batch.labels
        if not sums:
            sums = [(h.new_zeros(h.shape[1], h.shape[1]), h.new_zeros(h.shape[1], len(classes))) for h in hidden]
        for (square, cross), h in zip(sums, hidden, strict=True):
            square += h.T @ h
            cross.index_add_(1, at[known], h[known].T)
    weights = []
    for local_square, local_cross in sums:
        square, cross = communicator.all_reduce_sum(local_square), communicator.all_reduce_sum(local_cross)
        square.diagonal().add_(spec.ridge * square.diagonal().mean())
        weights.append(torch.linalg.solve(square, cross))
    return weights


def _hidden_states(
    opened: OpenedModel, corpus: Corpus, indices: Indices, micro_batch_size: int
) -> Iterator[tuple[Indices, PredictionBatch, list[Tensor]]]:
    """By micro-batch: its records, its batch, and by block [h, 1] at its predictions, float64 [N, d + 1].

    All ranks must call this and take everything from it.
    """
    communicator = opened.communicator
    for chosen in scoring_micro_batches(corpus, indices, communicator.rank, communicator.world_size, micro_batch_size):
        batch = corpus.batch(chosen).to(communicator.device)
        yield chosen, batch, _hidden_of(opened, batch)


def _hidden_of(opened: OpenedModel, batch: PredictionBatch) -> list[Tensor]:
    """One forward pass. All ranks must call this."""
    found: list[Tensor] = []
    share = LossShare(batch.inputs, NotedLogits(), batch.positions).in_dtype(opened.store.compute_dtype)
    with torch.no_grad():
        recording = Recording.start(opened.store, 1)

        def note(index: int) -> list[Any]:
            outputs = evaluate_blocks(opened.store, recording, index, forget=True)
            found.append(_rows(first_of(outputs[0]), batch))
            return outputs

        trace_forward(recording.traces, [share], opened.segmented, recording.root_leaves, note, lambda number: None)
    return found


def _rows(hidden: Tensor, batch: PredictionBatch) -> Tensor:
    """Hidden states [B, T, d] at the predictions, with a constant: float64 [N, d + 1]."""
    assert batch.positions is not None, "one prediction a record: there is no answer to read"
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.positions).double()
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
