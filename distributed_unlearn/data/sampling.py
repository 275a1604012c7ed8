"""Global minibatches: a pure function of seed, round, step and role, cut by rank only afterwards."""

import hashlib

import numpy as np


def draw(seed: int, round_index: int, step: int, role: str | int, population: np.ndarray, size: int) -> np.ndarray:
    """Records of one global minibatch, drawn epoch by epoch without replacement.

    The population's permutations of epoch 0, 1, ... are laid end to end; step `k` reads from item `k * size` on.
    Where it runs from one permutation into the next it skips records that it already has and reads on, so no
    record occurs twice in a minibatch and each epoch still visits every record. The random stream of an epoch
    depends on (seed, round_index, role, epoch) alone: never on the number of ranks.

    Args:
        seed: Of the job, any integer >= 0.
        round_index: >= 0.
        step: >= 0.
        role: What the minibatch is for, e.g. "forget"; roles draw independently of each other.
        population: int64 [num_records], distinct indices, always in the same order.
        size: Records wanted, >= 0.

    Returns:
        int64 [min(size, num_records)]. A size of the whole population or more gives all of it, in another order
        at every step, so that the head of a minibatch is not always the same.
    """
    assert seed >= 0 and round_index >= 0 and step >= 0 and size >= 0
    population = np.asarray(population, dtype=np.int64)
    num_records = len(population)
    if size >= num_records:
        return population[_permutation(seed, round_index, role, step, num_records)]
    epoch, start = divmod(step * size, num_records)
    order = _permutation(seed, round_index, role, epoch, num_records)[start : start + size]
    if len(order) < size:
        following = _permutation(seed, round_index, role, epoch + 1, num_records)
        fresh = following[~np.isin(following, order)]
        order = np.concatenate([order, fresh[: size - len(order)]])
    return population[order]


def split_roles(size: int, uses_forget: bool, uses_retain: bool) -> tuple[int, int]:
    """How many of a minibatch's `size` records are forget and how many retain records: half each where both are used.

    At least one of each then, so a minibatch of one record becomes two.
    """
    if uses_forget and uses_retain:
        return max(1, size // 2), max(1, size - size // 2)
    return (size, 0) if uses_forget else (0, size)


def drawn(
    seed: int, round_index: int, num_steps: int, role: str | int, population: np.ndarray, size: int
) -> np.ndarray:
    """Records that `draw` gives in any of the steps 0 to `num_steps - 1`: sorted, distinct; int64.

    All of the population once two epochs are read: the first of them visits every record.
    """
    population = np.asarray(population, dtype=np.int64)
    num_records = len(population)
    if size == 0 or num_steps == 0 or num_steps * size >= 2 * num_records:
        return np.unique(population) if size and num_steps else np.empty(0, dtype=np.int64)
    steps = [draw(seed, round_index, step, role, population, size) for step in range(num_steps)]
    return np.unique(np.concatenate(steps))


def cut(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The part of a global minibatch that belongs to `rank`: contiguous, sizes differing by one at most.

    The parts of rank 0, 1, ... laid end to end are `indices` again, whatever `world_size` is.
    """
    assert 0 <= rank < world_size
    num_records = len(indices)
    return indices[rank * num_records // world_size : (rank + 1) * num_records // world_size]


def num_micro_batches(num_records: int, world_size: int, micro_batch_size: int) -> int:
    """Micro-batches that every rank runs for a global minibatch of `num_records`: those of the fullest rank."""
    assert num_records >= 0 and world_size >= 1 and micro_batch_size >= 1
    fullest = -(-num_records // world_size)
    return -(-fullest // micro_batch_size)


def micro_batches(indices: np.ndarray, micro_batch_size: int, num_micro_batches: int) -> list[np.ndarray]:
    """One rank's records in pieces of `micro_batch_size`, padded with empty pieces to `num_micro_batches`.

    Every rank gets the same number of pieces, since each of them is a collective.
    """
    assert len(indices) <= micro_batch_size * num_micro_batches, "more records than the micro-batches can hold"
    return [indices[start * micro_batch_size : (start + 1) * micro_batch_size] for start in range(num_micro_batches)]


def _permutation(seed: int, round_index: int, role: str | int, epoch: int, num_records: int) -> np.ndarray:
    """Order of the records in one epoch: int64 [num_records].

    Sorts raw 64-bit words instead of calling `Generator.permutation`: numpy keeps the raw stream of a bit
    generator from version to version, the methods built on it not.
    """
    digest = hashlib.blake2b(f"{seed}/{round_index}/{role!r}/{epoch}".encode(), digest_size=16).digest()
    bits = np.random.Philox(np.random.SeedSequence(int.from_bytes(digest, "little")))
    return np.argsort(bits.random_raw(num_records), kind="stable")
