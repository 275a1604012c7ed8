"""Programs that try the harness itself; no DeepSpeed, so that they start in a second or two."""

import os
import pickle
import time
from typing import Any

import torch

from tests.engine.ranks import Place, join_group


def sum_of_ranks(place: Place, arguments: float) -> tuple[int, float]:
    communicator = join_group(place)
    return place.rank, float(communicator.all_reduce_sum(torch.tensor([arguments + place.rank]))[0])


def one_rank_raises(place: Place, arguments: Any) -> None:
    communicator = join_group(place)
    communicator.barrier()
    if place.rank == 1:
        raise ValueError("rank one has had enough")
    communicator.barrier()


def one_rank_dies(place: Place, arguments: Any) -> None:
    if place.rank == 1:
        os.abort()
    time.sleep(600)


def fails_in_its_second_section(place: Place, arguments: Any) -> None:
    communicator = join_group(place)
    for name in ("first", "second"):
        communicator.barrier()  # as in real sections: nobody fails in one before everybody has finished the last
        if name == "second" and place.rank == 1:
            raise ValueError("rank one has had enough")
        with place.file("sections").open("ab") as file:
            pickle.dump((name, place.rank), file)


def sleeps(place: Place, arguments: Any) -> None:
    time.sleep(600)


def collectives(place: Place, arguments: Any) -> dict[str, Any]:
    """Every collective once, on values that tell the ranks apart."""
    communicator = join_group(place)
    own = torch.tensor([10.0 * place.rank, 10.0 * place.rank + 1])
    full = torch.arange(2.0 * place.world_size) * (place.rank + 1)
    values = own.clone()
    found = {
        "gathered": communicator.all_gather(own).tolist(),
        "scattered": communicator.reduce_scatter(full).tolist(),
        "moved": communicator.num_elements_moved,
        "sum": communicator.all_reduce_sum(values).tolist(),
        "maximum": communicator.all_reduce_max(values).tolist(),
        "untouched": torch.equal(values, own),
        "one is false": communicator.all_true(place.rank != 1),
        "all true": communicator.all_true(True),
        "objects": communicator.gather_objects({"rank": place.rank}),
    }
    communicator.barrier()
    return found
