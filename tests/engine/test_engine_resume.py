"""A round that goes on from what every rank saved ends, bit for bit, as one that was never interrupted."""

import dataclasses

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (1, 3), (2, 0), (2, 3), (4, 0), (4, 3)])
def test_steps_after_a_restart_are_those_without(world_size, stage, results):
    for rank in results.of(world_size, f"resumed {stage}"):
        assert torch.equal(*rank["start"])
        (whole, norm), (resumed, norm_resumed) = rank["whole"], rank["resumed"]
        assert torch.equal(whole, resumed) and norm == norm_resumed > 0
        assert not torch.equal(whole, rank["start"][0])
        first, second = ([dataclasses.replace(r, wall_seconds=0.0) for r in part] for part in rank["records"])
        assert first == second
