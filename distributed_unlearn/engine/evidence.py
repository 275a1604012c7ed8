"""Teacher-forced scores of records at the current weights, over all ranks."""

import numpy as np

from distributed_unlearn.curvature.linearisation import Linearisation
from distributed_unlearn.data.encoding import EncodedCorpus
from distributed_unlearn.engine.inputs import scoring_micro_batches
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.workers.messages import Indices, RecordScores


def score_records(opened: OpenedModel, corpus: EncodedCorpus, indices: Indices, micro_batch_size: int) -> RecordScores:
    """Score every record once, whatever the number of ranks; sorted by index. All ranks must call this."""
    communicator = opened.communicator
    parts = []
    for chosen, inputs, loss in scoring_micro_batches(
        corpus, indices, communicator.rank, communicator.world_size, micro_batch_size, communicator.device
    ):
        Linearisation(opened.segmented, opened.store, inputs, loss).loss()
        count = len(chosen)  # an empty micro-batch has one dummy row
        parts.append(
            (
                chosen,
                loss.nll[:count].double().cpu().numpy(),
                loss.num_tokens[:count].cpu().numpy(),
                loss.num_correct[:count].cpu().numpy(),
            )
        )
    gathered = [part for rank_parts in communicator.gather_objects(parts) for part in rank_parts]  # type: ignore[attr-defined]
    if not gathered:
        empty = np.empty(0, dtype=np.int64)
        return RecordScores(empty, empty.astype(np.float64), empty, empty)
    columns = [np.concatenate(column) for column in zip(*gathered, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return RecordScores(*(column[order] for column in columns))
