"""One rank's part of a round's state: its weights, the round's first weights, what the method remembers.

A file holds shards of vectors as this rank has them, so it fits this number of ranks alone.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distributed_unlearn.engine.memory_plan import MemoryPlan
from distributed_unlearn.engine.oracle import ShardedOracle
from distributed_unlearn.engine.weights import ShardedWeights
from distributed_unlearn.provenance import hash_file


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.safetensors"


def save_round(
    folder: Path, rank: int, weights: ShardedWeights, start: torch.Tensor | None, oracle: ShardedOracle
) -> str:
    """Write this rank's file into an existing folder; its SHA-256 as it is read back. Not collective.

    Args:
        folder: on storage that all ranks and the driver share.
        rank: this rank.
        weights: the current ones; the fp32 master is kept [vector_numel].
        start: the master at the round's start; None where the base checkpoint has it.
        oracle: the round's, between two steps.
    """
    state = oracle.state_dict()
    tensors = {f"vector.{name}": vector for name, vector in state["vectors"].items()}
    tensors["master"] = weights.master
    if start is not None:
        tensors["start"] = start
    numbers = {"numbers": state["numbers"], "memory": None if oracle.memory is None else asdict(oracle.memory)}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path = _path(folder, rank)
    save_file(contiguous, path, metadata={"state": json.dumps(numbers)})
    return hash_file(path)


def restore_start(folder: Path, rank: int, weights: ShardedWeights) -> None:
    """Set the weights to those at the round's start, where the file has them. All ranks must call this."""
    with safe_open(_path(folder, rank), framework="pt") as reader:
        if "start" in reader.keys():  # noqa: SIM118 - a reader is no dictionary
            weights.set_master(reader.get_tensor("start").to(weights.master.device))


def load_round(folder: Path, rank: int, weights: ShardedWeights, oracle: ShardedOracle) -> None:
    """Set the weights and what the method remembers to the saved ones. All ranks must call this."""
    with safe_open(_path(folder, rank), framework="pt") as reader:
        numbers = json.loads(reader.metadata()["state"])
        names = [name for name in reader.keys() if name.startswith("vector.")]  # noqa: SIM118
        vectors = {name.removeprefix("vector."): reader.get_tensor(name) for name in names}
        weights.set_master(reader.get_tensor("master").to(weights.master.device))
    oracle.load_state_dict({"vectors": vectors, "numbers": numbers["numbers"]})
    if numbers["memory"] is not None:
        oracle.memory = MemoryPlan(**numbers["memory"])
