"""The slow truth of losses: from all logits of whole sequences to one number a record."""

import torch
from torch import Tensor
from torch.nn import functional


def _predicting_positions(logits: Tensor, input_ids: Tensor, answer_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] that predict the N answer tokens, those tokens [N], and their flat positions in [B * T].

    Selecting before the softmax keeps every vocabulary-wide temporary at [N, V] instead of [B, T, V]; answers
    are short and vocabularies wide.
    """
    num_vocabulary = logits.shape[-1]
    # Token t is predicted at t - 1; a roll of the flat index would let record b's first token leak into b - 1.
    predicted = torch.zeros_like(answer_mask)
    predicted[:, 1:] = answer_mask[:, 1:]
    positions = predicted.reshape(-1).nonzero().squeeze(1)
    selected = logits.reshape(-1, num_vocabulary).index_select(0, positions - 1)
    return selected, input_ids.reshape(-1).index_select(0, positions), positions


def _check_shapes(logits: Tensor, input_ids: Tensor, answer_mask: Tensor) -> None:
    assert answer_mask.dtype == torch.bool, f"answer_mask is {answer_mask.dtype}, not bool"
    assert logits.shape[:-1] == input_ids.shape == answer_mask.shape, (
        f"logits {tuple(logits.shape)}, input_ids {tuple(input_ids.shape)}, answer_mask {tuple(answer_mask.shape)}"
    )


def token_nll(logits: Tensor, input_ids: Tensor, answer_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each record's summed answer loss and its number of answer tokens.

    `nll[b] = sum over t >= 1 with answer_mask[b, t] of -log softmax(logits[b, t - 1])[input_ids[b, t]]`,
    a sum, not a mean. Column 0 of `answer_mask` has no prediction and is ignored. Twice differentiable, with
    forward-mode derivatives too; the result depends on `logits` even where no position is an answer.

    Args:
        logits: [B, T, V], any floating dtype.
        input_ids: [B, T], int64.
        answer_mask: [B, T], bool; True where the token at t belongs to the answer.

    Returns:
        `nll` [B] in nats, float32 or wider (float64 stays float64), and `num_tokens` [B], int64.
    """
    _check_shapes(logits, input_ids, answer_mask)
    selected, labels, positions = _predicting_positions(logits, input_ids, answer_mask)
    # Sums over a 100k-word vocabulary are not done in half precision.
    wide = selected.to(torch.promote_types(selected.dtype, torch.float32))
    losses = functional.cross_entropy(wide, labels, reduction="none")
    # Positions are unique, so this scatter is deterministic on every device.
    scattered = losses.new_zeros(answer_mask.numel()).index_add(0, positions, losses)
    return scattered.view(answer_mask.shape).sum(1), answer_mask[:, 1:].sum(1)


def correct_tokens(logits: Tensor, input_ids: Tensor, answer_mask: Tensor) -> Tensor:
    """Number of answer tokens per record that the teacher-forced argmax gets right.

    Args:
        logits: [B, T, V], any floating dtype.
        input_ids: [B, T], int64.
        answer_mask: [B, T], bool; column 0 is ignored.

    Returns:
        [B], int64.
    """
    _check_shapes(logits, input_ids, answer_mask)
    selected, labels, positions = _predicting_positions(logits.detach(), input_ids, answer_mask)
    hits = torch.zeros_like(input_ids).reshape(-1)
    hits[positions] = (selected.argmax(-1) == labels).to(hits.dtype)
    return hits.view(input_ids.shape).sum(1)
