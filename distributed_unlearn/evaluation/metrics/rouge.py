"""ROUGE-L (Lin 2004) of continuations against references, with stemming: what `rouge_score` computes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distributed_unlearn.evaluation.metrics.per_record import Floats
from distributed_unlearn.evaluation.metrics.stemming import stem

_OTHERS = re.compile(r"[^a-z0-9]+")
_STEMMED_FROM = 4
"""Letters from which on a word is stemmed."""


@dataclass(frozen=True)
class RougeL:
    """Longest common subsequence of words over the lengths of both texts; all 0 where they share no word."""

    precision: float
    recall: float
    f1: float


def words_of(text: str) -> list[str]:
    """Stemmed words of the letters a to z and digits, in lower case.

    Everything else separates words, as in the usual implementation: of a text in another script nothing is left.
    """
    words = _OTHERS.sub(" ", text.lower()).split()
    return [stem(word) if len(word) >= _STEMMED_FROM else word for word in words]


def rouge_l(reference: str, candidate: str) -> RougeL:
    """Precision, recall and F1 of the candidate's words."""
    wanted, given = words_of(reference), words_of(candidate)
    if not wanted or not given:
        return RougeL(0.0, 0.0, 0.0)
    common = longest_common_subsequence(wanted, given)
    precision, recall = common / len(given), common / len(wanted)
    f1 = 2 * precision * recall / (precision + recall) if common else 0.0
    return RougeL(precision, recall, f1)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, in O(len(first) len(second))."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for index, other in enumerate(second, start=1):
            diagonal, row[index] = row[index], diagonal + 1 if word == other else max(row[index], row[index - 1])
    return row[-1]


def rouge_l_recalls(references: Sequence[str], candidates: Sequence[str]) -> Floats:
    """Recall of each record's continuation, [n]: TOFU's ROUGE."""
    return np.array([rouge_l(r, c).recall for r, c in zip(references, candidates, strict=True)])


def rouge_l_f1s(references: Sequence[str], candidates: Sequence[str]) -> Floats:
    """F1 of each record's continuation, [n]: MUSE's VerbMem and KnowMem (Shi et al. 2024, arXiv 2407.06460)."""
    return np.array([rouge_l(r, c).f1 for r, c in zip(references, candidates, strict=True)])


def cut_at_blank_line(answer: str) -> str:
    """What comes before the first blank line: where a few-shot answer ends and the next question would begin."""
    return answer.strip().split("\n\n")[0].strip()
