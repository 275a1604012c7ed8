"""Kills of drivers: at every fault point, before every change to a file, at random instants; and of who asks."""

import random
from collections.abc import Callable
from pathlib import Path

from chaos_arena import Arena, Counts
from chaos_processes import Plan, reading

ASK_EVERY = 4
"""One more request arrives after so many kills."""


def _campaign(arena: Arena, target: str, plans: Callable[[int], Plan], most: int, until_survived: bool) -> None:
    """Kill one pass after the other; a pass is what a supervisor starts again."""
    with reading(arena.root / "current", arena.folder) as reader:
        arena.known.add(reader.process)
        arena.ask()
        arena.ask()
        for number in range(most):
            ended = arena.one_pass(plans(number))
            arena.counts.restarts += 1
            if ended.killed:
                arena.killed(target)
            elif ended.code != 0:
                arena.wrong(f"{target} {number}: a pass ended with {ended.code}: {ended.log[-600:]}")
            elif until_survived:
                break
            if number % ASK_EVERY == 0 and not until_survived:
                arena.ask()
        arena.settle()
        arena.tally(reader.end())
        arena.known.discard(reader.process)


def fault_points(folder: Path, counts: Counts, step: int, most: int) -> None:
    """Pass n is killed at its fault point `n * step`, until one has no such point: it lived."""
    _campaign(Arena(folder, counts), "driver, fault points", lambda n: Plan(fault_point=n * step), most, True)


def file_writes(folder: Path, counts: Counts, step: int, most: int) -> None:
    """The same, before every file that is opened for writing, renamed or removed, and every folder made or removed."""
    _campaign(Arena(folder, counts), "driver, file writes", lambda n: Plan(file_write=n * step), most, True)


def random_instants(folder: Path, counts: Counts, seed: int, most: int, seconds: float) -> None:
    """Any time in a pass: between writes, inside one, in a product."""
    generator = random.Random(seed)

    def plan(number: int) -> Plan:
        return Plan(seconds=generator.uniform(0.0, seconds))

    _campaign(Arena(folder, counts), "driver, random instants", plan, most, False)


def askers(folder: Path, counts: Counts, most: int) -> None:
    """`request add` is killed at each of its fault points; who asks again with the same external id is there once."""
    arena = Arena(folder, counts)
    with reading(arena.root / "current", arena.folder) as reader:
        arena.known.add(reader.process)
        for number in range(most):
            if not arena.ask(Plan(fault_point=number)).killed:
                break
            arena.killed("request add, fault points")
        else:
            arena.ask()
        arena.settle()
        arena.tally(reader.end())
        arena.known.discard(reader.process)
