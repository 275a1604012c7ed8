"""Which cases, checks and trainings are run on how many ranks."""

import dataclasses
from pathlib import Path

from distributed_unlearn.data.encoding import EncodedCorpus
from distributed_unlearn.engine.check import CurvatureCheck
from tests.engine.cases import Case, Plan, Problem
from tests.families import FAMILIES

LLAMA, GEMMA, LORA = Problem(), Problem("gemma"), Problem("lora")
TOKEN = Problem(objective="token_matched")
ALTERNATIVES = Problem(objective="token_matched", options=(("retain", "kl"), ("alternatives_weight", 0.7)))
UNEVEN = Problem(gradient_batch=3, curvature_batch=2)  # on 4 ranks, two ranks have no record at all
SHARED = Problem(gradient_batch=12, curvature_batch=4)  # a third of either role: one graph for gradient and products
SHARED_TOKEN = dataclasses.replace(SHARED, objective="token_matched")
CASES = (
    Case(SHARED, 1, 0, 8, "cached"),
    Case(SHARED, 1, 3, 3, "recompute"),
    Case(SHARED, 2, 3, 3, "cached"),
    Case(SHARED_TOKEN, 2, 0, 8, "cached"),
    Case(SHARED_TOKEN, 4, 3, 1, "cached"),
    Case(LLAMA, 1, 0, 8, "recompute"),
    Case(LLAMA, 1, 0, 1, "cached"),
    Case(LLAMA, 1, 3, 3, "cached"),
    Case(GEMMA, 1, 3, 8, "recompute"),
    Case(LLAMA, 2, 0, 3, "recompute"),
    Case(LLAMA, 2, 1, 8, "cached"),
    Case(LLAMA, 2, 2, 1, "recompute"),
    Case(LLAMA, 2, 3, 1, "cached"),
    Case(LLAMA, 2, 3, 3, "recompute"),
    Case(LLAMA, 2, 3, 8, "recompute"),
    Case(Problem(objective="npo"), 2, 3, 3, "recompute"),
    Case(Problem(objective="retain"), 2, 1, 3, "recompute"),
    Case(TOKEN, 1, 0, 8, "cached"),
    Case(TOKEN, 2, 3, 1, "recompute"),
    Case(TOKEN, 2, 1, 3, "cached"),
    Case(ALTERNATIVES, 1, 3, 3, "recompute"),
    Case(ALTERNATIVES, 2, 0, 8, "cached"),
    Case(ALTERNATIVES, 2, 3, 3, "recompute"),
    Case(Problem("gemma", "undial", options=(("retain", "log_odds"),)), 2, 3, 3, "cached"),
    Case(Problem(objective="delete"), 2, 1, 8, "recompute"),
    Case(GEMMA, 2, 3, 3, "recompute"),
    Case(GEMMA, 2, 3, 8, "cached"),
    Case(LORA, 1, 0, 3, "cached"),
    Case(LORA, 1, 3, 8, "recompute"),
    Case(LORA, 2, 0, 8, "recompute"),
    Case(LORA, 2, 3, 3, "recompute"),
    Case(LORA, 2, 3, 8, "cached"),
    Case(LLAMA, 4, 0, 8, "recompute"),
    Case(TOKEN, 4, 3, 3, "recompute"),
    Case(LLAMA, 4, 3, 1, "recompute"),
    Case(LLAMA, 4, 3, 3, "cached"),
    Case(LLAMA, 4, 3, 8, "recompute"),
    Case(UNEVEN, 4, 0, 8, "recompute"),
    Case(UNEVEN, 4, 3, 1, "cached"),
    Case(UNEVEN, 4, 3, 3, "recompute"),
)
CHECKS = (
    *((family, "float32", CurvatureCheck()) for family in FAMILIES),
    ("llama", "float32", CurvatureCheck(mode="cached")),
    ("gemma", "float64", CurvatureCheck()),
    ("qwen2", "bfloat16", CurvatureCheck()),
    ("mistral", "float64", CurvatureCheck(product="gauss_newton", mode="cached")),
    ("gpt_neox", "float64", CurvatureCheck(reference="central_difference", batch_size=1)),
)


def plan_for(world_size: int, folder: Path, corpus: EncodedCorpus) -> Plan:
    """Everything that the tests want to know of this many ranks."""
    return Plan(
        folder=folder,
        corpus=corpus,
        cases=tuple(case for case in CASES if case.world_size == world_size),
        stages=(0, 3),
        export_stages=(3,) if world_size == 4 else (0, 3),
        checks=CHECKS if world_size == 2 else (),
        training_stages=() if world_size == 4 else (3, 2),  # stage 3 first: what it leaves behind must not matter
        refuses=world_size == 2,
        breaks_reductions=world_size == 2,
    )
