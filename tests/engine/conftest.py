"""One set of ranks per world size for the whole session; every test looks at what they handed back."""

import pytest

from tests.engine.cases import compute_truth
from tests.engine.checkpoints import random_corpus, write_checkpoints
from tests.engine.compare import Results
from tests.engine.plans import plan_for
from tests.engine.ranks import run_on_ranks


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(folder)
    return folder


@pytest.fixture(scope="session")
def corpus():
    return random_corpus()


@pytest.fixture(scope="session")
def results(checkpoints, corpus, tmp_path_factory):
    """`results.of(world_size, section)`; the ranks start when they are first asked for."""

    def run(world_size, folder):
        plan = plan_for(world_size, checkpoints, corpus)
        return run_on_ranks("tests.engine.rank_programs:run_plan", world_size, folder, plan)

    return Results(tmp_path_factory.mktemp("ranks"), run)


@pytest.fixture(scope="session")
def truths(checkpoints, corpus):
    """`truths(problem, vector)`: computed once per problem; the vector is the same for all cases of one."""
    known = {}

    def truth(problem, vector):
        if problem not in known:
            known[problem] = compute_truth(checkpoints, corpus, problem, vector)
        return known[problem]

    return truth
