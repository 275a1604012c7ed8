"""Questions with wrong answers that sound alike, as TOFU has them: read, encoded, and which records belong together."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from distributed_unlearn.data.corpus import TextRecord
from distributed_unlearn.data.encoding import EncodedCorpus, encode_records
from distributed_unlearn.errors import DataError


@dataclass(frozen=True)
class PerturbedFields:
    """Names of the columns."""

    question: str
    answer: str
    paraphrased: str | None
    """None: the plain answer is the right one (real authors, world facts)."""
    wrong: str


@dataclass(frozen=True, eq=False)
class PerturbedSet:
    """n questions; every answer of each is a record of the corpus."""

    corpus: EncodedCorpus
    record_ids: tuple[str | None, ...]
    """[n]: of the records that the questions are about, where the file says so."""
    answers: np.ndarray
    """int64 [n]: the plain answers."""
    right: np.ndarray
    """int64 [n]: the right answers, in other words where there are such."""
    wrong: np.ndarray
    """int64 [n, K]: wrong answers; -1 where a question has fewer."""

    def about(self, record_ids: frozenset[str], what: str) -> "PerturbedSet":
        """Only what is about these records; all, if the file has no ids.

        Raises:
            DataError: it is about others.
        """
        if all(name is None for name in self.record_ids):
            return self
        chosen = np.array([name in record_ids for name in self.record_ids])
        if not chosen.any():
            raise DataError(
                f"perturbed.{what} whose {len(chosen)} record ids are none of the {what} set's",
                f"wrong answers to questions of the {what} set",
                f"give the file that belongs to it, or leave perturbed.{what} out",
            )
        names = tuple(name for name, kept in zip(self.record_ids, chosen, strict=True) if kept)
        return PerturbedSet(self.corpus, names, self.answers[chosen], self.right[chosen], self.wrong[chosen])


@dataclass(frozen=True)
class _Question:
    record_id: str | None
    question: str
    answer: str
    right: str
    wrong: tuple[str, ...]


def load_perturbed(
    path: Path, fields: PerturbedFields, template: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PerturbedSet:
    """Read and encode a file of JSON lines.

    Args:
        path: The file.
        fields: Its columns.
        template: `data.prompt_template`.
        tokenizer: The model's.
        max_length: Tokens of a question with an answer.

    Raises:
        DataError: a file that cannot be read, or a line that lacks what it should have; without the text.
    """
    questions = [_question(line, number, path, fields) for number, line in enumerate(_lines(path), start=1)]
    if not questions:
        raise DataError(f"'{path}' without a line", "one question a line", "check the file")
    records: list[TextRecord] = []

    def add(question: _Question, answer: str) -> int:
        prompt = template.replace("{prompt}", question.question)
        records.append(TextRecord(f"{path.name}:{len(records)}", None, prompt, answer))
        return len(records) - 1

    most = max(len(question.wrong) for question in questions)
    answers, right, wrong = [], [], np.full((len(questions), most), -1, dtype=np.int64)
    for row, question in enumerate(questions):
        answers.append(add(question, question.answer))
        right.append(answers[-1] if question.right == question.answer else add(question, question.right))
        wrong[row, : len(question.wrong)] = [add(question, text) for text in question.wrong]
    corpus, _ = encode_records(records, tokenizer, max_length, "refuse", frozenset())
    return PerturbedSet(
        corpus, tuple(question.record_id for question in questions), np.array(answers), np.array(right), wrong
    )


def _lines(path: Path) -> list[str]:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"'{path}', which cannot be read ({type(error).__name__})",
            "a file of JSON lines in UTF-8",
            "check the path",
        ) from error
    return [line for line in text.split("\n") if line.strip()]


def _question(line: str, number: int, path: Path, fields: PerturbedFields) -> _Question:
    place = f"question {number} of '{path}'"
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise DataError(f"{place}, which is no JSON object", "an object on every line", "correct the line")
    texts = [fields.question, fields.answer, *([] if fields.paraphrased is None else [fields.paraphrased])]
    for name in texts:
        if not isinstance(tree.get(name), str) or not tree[name].strip():
            raise DataError(
                f"{place} without text in '{name}'",
                "a question, its answer" + (", and the answer in other words" if fields.paraphrased else ""),
                "complete the line, or name the column in perturbed.*_field",
            )
    wrong = tree.get(fields.wrong)
    wrong = [wrong] if isinstance(wrong, str) else wrong
    if not isinstance(wrong, list) or not wrong or not all(isinstance(text, str) and text.strip() for text in wrong):
        raise DataError(
            f"{place} without wrong answers in '{fields.wrong}', which the truth ratio compares with",
            "a list of at least one wrong answer",
            "complete the line, name the column in perturbed.wrong_field, or leave the truth ratio out",
        )
    record_id = tree.get("record_id")
    right = tree[fields.answer if fields.paraphrased is None else fields.paraphrased]
    return _Question(
        None if record_id is None else str(record_id), tree[fields.question], tree[fields.answer], right, tuple(wrong)
    )


def mean_losses_of(losses: Sequence[float] | np.ndarray, at: np.ndarray) -> np.ndarray:
    """`losses` by record at `at`, of any shape; NaN where `at` is -1."""
    found = np.asarray(losses, dtype=np.float64)[np.maximum(at, 0)]
    return np.where(at >= 0, found, np.nan)
