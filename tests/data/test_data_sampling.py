"""Minibatches depend on seed, round, step and role alone, and visit every record once an epoch."""

import numpy as np
import pytest

from distributed_unlearn.data.sampling import cut, draw, drawn, micro_batches, num_micro_batches, split_roles

POPULATION = np.arange(100, 130)


def test_same_arguments_same_draw_and_each_argument_matters():
    reference = draw(0, 0, 0, "forget", POPULATION, 10)
    assert np.array_equal(reference, draw(0, 0, 0, "forget", POPULATION, 10))
    for other in [(1, 0, 0, "forget"), (0, 1, 0, "forget"), (0, 0, 1, "forget"), (0, 0, 0, "retain"), (0, 0, 0, 3)]:
        assert not np.array_equal(reference, draw(*other, POPULATION, 10)), other


def test_draws_stay_what_they_are_over_versions():
    # Output of this very function with numpy 2.4: where it changes, earlier runs cannot be repeated.
    assert draw(3, 1, 2, "retain", np.arange(12), 5).tolist() == [1, 6, 3, 4, 9]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 5, 12, 40])
def test_cuts_over_ranks_are_the_draw(world_size, size):
    drawn = draw(0, 0, 4, "forget", POPULATION, size)
    parts = [cut(drawn, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), drawn)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("size", [1, 5, 10])
def test_epochs_visit_every_record_once_where_size_divides_the_population(size):
    steps_per_epoch = 30 // size
    for epoch in range(3):
        steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
        visited = np.concatenate([draw(5, 0, step, "retain", POPULATION, size) for step in steps])
        assert np.array_equal(np.sort(visited), POPULATION)


@pytest.mark.parametrize("size", [7, 11, 17, 29])
def test_wraps_hold_no_duplicates_and_miss_no_record(size):
    for step in range(40):
        drawn = draw(0, 0, step, "forget", POPULATION, size)
        assert len(drawn) == size == len(set(drawn.tolist())) and set(drawn) <= set(POPULATION)
    for epoch in range(5):
        steps = range(epoch * 30 // size, -(-(epoch + 1) * 30 // size))  # all steps that touch this epoch
        visited = np.concatenate([draw(0, 0, step, "forget", POPULATION, size) for step in steps])
        assert set(visited.tolist()) == set(POPULATION.tolist())


def test_epochs_differ():
    first = np.concatenate([draw(0, 0, step, "retain", POPULATION, 10) for step in range(3)])
    second = np.concatenate([draw(0, 0, step, "retain", POPULATION, 10) for step in range(3, 6)])
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("size", [30, 31, 1000])
def test_large_size_gives_everything_in_an_order_of_its_own(size):
    draws = [draw(0, 0, step, "retain", POPULATION, size) for step in range(3)]
    assert all(np.array_equal(np.sort(drawn), POPULATION) for drawn in draws)
    assert not np.array_equal(draws[0], draws[1]), "the head would always be the same"


def test_empty_population_and_empty_draw():
    assert len(draw(0, 0, 0, "forget", np.zeros(0, dtype=np.int64), 5)) == 0
    assert len(draw(0, 0, 3, "forget", POPULATION, 0)) == 0


def test_every_record_is_equally_likely():
    population = np.arange(6)
    counts = sum(np.bincount(draw(seed, 0, 0, "forget", population, 2), minlength=6) for seed in range(3000))
    # binomial with mean 1000 and standard deviation 26: five deviations
    assert np.abs(counts - 1000).max() < 130, counts


def test_micro_batches_are_as_many_on_every_rank():
    drawn = np.arange(11)
    number = num_micro_batches(11, world_size=4, micro_batch_size=2)
    assert number == 2
    pieces = [micro_batches(cut(drawn, rank, 4), 2, number) for rank in range(4)]
    assert [len(piece) for piece in pieces] == [2, 2, 2, 2]
    assert np.concatenate([part for piece in pieces for part in piece]).tolist() == drawn.tolist()
    fewer_than_ranks = [micro_batches(cut(np.arange(1), rank, 3), 8, num_micro_batches(1, 3, 8)) for rank in range(3)]
    assert [[len(part) for part in piece] for piece in fewer_than_ranks] == [[0], [0], [1]]
    assert num_micro_batches(0, 4, 2) == 0


@pytest.mark.parametrize("num_steps", [0, 1, 3, 7, 40])
@pytest.mark.parametrize("size", [0, 1, 4, 10, 30])
def test_the_records_that_will_be_drawn_are_known(num_steps, size):
    """What a round scores at its start: no record too few (it would have no constants), none that is never drawn."""
    population = np.arange(100, 110)
    seen = [draw(3, 2, step, "retain", population, size) for step in range(num_steps)]
    expected = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *seen]))
    assert drawn(3, 2, num_steps, "retain", population, size).tolist() == expected.tolist()


def test_roles_share_a_minibatch():
    assert split_roles(7, True, True) == (3, 4) and split_roles(1, True, True) == (1, 1)
    assert split_roles(7, True, False) == (7, 0) and split_roles(7, False, True) == (0, 7)
