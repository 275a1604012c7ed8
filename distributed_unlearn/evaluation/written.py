"""Metrics of what the model writes by itself, and of questions with wrong answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from distributed_unlearn.config import GenerationConfig, PerturbedConfig
from distributed_unlearn.data.encoding import TokenCorpus
from distributed_unlearn.data.perturbed import PerturbedFields, PerturbedSet, load_perturbed, mean_losses_of
from distributed_unlearn.evaluation.bench import Bench
from distributed_unlearn.evaluation.gather import Subject
from distributed_unlearn.evaluation.metrics import catalogue
from distributed_unlearn.evaluation.metrics.memorisation import mean_losses
from distributed_unlearn.evaluation.metrics.per_record import Floats
from distributed_unlearn.evaluation.metrics.truth import (
    choice_probabilities,
    forget_quality,
    forget_truth_scores,
    model_utility,
    retain_truth_scores,
    truth_ratios,
)
from distributed_unlearn.evaluation.rows import plain_row
from distributed_unlearn.evaluation.texts import (
    Continuations,
    answer_scores,
    continuations,
    knowledge_prompts,
    knowledge_scores,
)
from distributed_unlearn.models.processor import Tokenizer
from distributed_unlearn.records.evaluation import MetricRow
from distributed_unlearn.workers.survey import GreedySpec

PerturbedName = Literal["forget", "retain", "real_authors", "world_facts"]


def _sample(indices: np.ndarray, most: int | None) -> np.ndarray:
    """At most so many of them, the same ones every time, sorted."""
    if most is None or len(indices) <= most:
        return indices
    return np.sort(np.random.default_rng(0).choice(indices, most, replace=False))


class Writing:
    """Greedy continuations, scored; of one evaluation."""

    def __init__(self, bench: Bench, settings: GenerationConfig) -> None:
        assert bench.tokenizer is not None
        self._bench, self._settings, self._tokenizer = bench, settings, bench.tokenizer

    def answers(self, subject: Subject, corpus: TokenCorpus, indices: np.ndarray, what: str) -> dict[str, np.ndarray]:
        """`recall` and `verbatim` of some records, in their order."""
        wanted, settings = continuations(corpus, indices, self._tokenizer), self._settings
        return self._bench.gatherer.continued(
            subject,
            wanted.prompts,
            self._greedy(max(settings.max_new_tokens, settings.verbatim_tokens)),
            {
                "kind": "answers",
                "recall": settings.max_new_tokens,
                "verbatim": settings.verbatim_tokens,
                **self._references(wanted),
            },
            lambda written: answer_scores(
                wanted, written, settings.max_new_tokens, settings.verbatim_tokens, self._tokenizer
            ),
            f"continuing {what}",
        )

    def knowledge(self, subject: Subject, corpus: TokenCorpus, indices: np.ndarray, what: str) -> Floats:
        """F1 of short answers after some examples."""
        settings, limit = self._settings, self._bench.context_length
        examples = _sample(self._bench.sets["retain"], settings.num_examples)
        room = None if limit is None else limit - settings.knowledge_tokens
        wanted = knowledge_prompts(corpus, indices, examples, self._tokenizer, room)
        return self._bench.gatherer.continued(
            subject,
            wanted.prompts,
            self._greedy(settings.knowledge_tokens),
            {"kind": "knowledge", **self._references(wanted)},
            lambda written: knowledge_scores(wanted, written, self._tokenizer),
            f"asking {what}",
        )["f1"]

    def _greedy(self, max_new_tokens: int) -> GreedySpec:
        stop, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        stops = () if stop is None else (int(stop),)
        return GreedySpec(max_new_tokens, stops, int(pad), self._bench.config.micro_batch_size)

    @staticmethod
    def _references(wanted: Continuations) -> dict[str, object]:
        return {"references": list(wanted.references)}


class Written:
    """ROUGE-L recall, VerbMem and KnowMem."""

    def __init__(self, bench: Bench, writing: Writing, most: int | None) -> None:
        assert isinstance(bench.corpus, TokenCorpus)
        self._bench, self._writing, self._corpus = bench, writing, bench.corpus
        self._sets = {name: _sample(indices, most) for name, indices in bench.sets.items()}
        self._answers: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        self._knowledge: dict[str, dict[str, Floats]] = {}

    def gather(self, subject: Subject) -> None:
        """Every set, continued and asked."""
        if self._bench.wanted & {"rouge", "verbmem"}:
            self._answers[subject.role] = {
                name: self._writing.answers(subject, self._corpus, indices, name)
                for name, indices in self._sets.items()
            }
        if "knowmem" in self._bench.wanted:
            self._knowledge[subject.role] = {
                name: self._writing.knowledge(subject, self._corpus, indices, name)
                for name, indices in self._sets.items()
            }

    def rows(self) -> list[MetricRow]:
        """By metric and set."""
        found = []
        for group, metric, key in (
            ("rouge", catalogue.ROUGE_RECALL, "recall"),
            ("verbmem", catalogue.VERBMEM, "verbatim"),
        ):
            if group in self._bench.wanted:
                for name in self._sets:
                    values = {role: sets[name][key] for role, sets in self._answers.items()}
                    found.append(self._bench.rows.of_means(metric, name, values))
        if "knowmem" in self._bench.wanted:
            for name in self._sets:
                values = {role: sets[name] for role, sets in self._knowledge.items()}
                found.append(self._bench.rows.of_means(catalogue.KNOWMEM, name, values))
        return found


@dataclass(frozen=True, eq=False)
class _Asked:
    """What one model makes of one file of questions: [n] each."""

    answer_losses: Floats
    right_losses: Floats
    wrong_losses: Floats
    """[n, K]."""
    recalls: Floats | None


def load_perturbed_sets(
    bench_sets: Mapping[str, frozenset[str]],
    config: PerturbedConfig,
    template: str,
    tokenizer: Tokenizer,
    max_length: int,
) -> dict[PerturbedName, PerturbedSet]:
    """The files that are named, each about the set that it belongs to.

    Raises:
        DataError: see `load_perturbed` and `PerturbedSet.about`.
    """
    found: dict[PerturbedName, PerturbedSet] = {}
    named: tuple[tuple[PerturbedName, str | None], ...] = (
        ("forget", config.forget),
        ("retain", config.retain),
        ("real_authors", config.real_authors),
        ("world_facts", config.world_facts),
    )
    for name, path in named:
        if path is None:
            continue
        paraphrased = config.paraphrased_field if name in bench_sets else None
        fields = PerturbedFields(config.question_field, config.answer_field, paraphrased, config.wrong_field)
        loaded = load_perturbed(Path(path), fields, template, tokenizer, max_length)
        found[name] = loaded.about(bench_sets[name], name) if name in bench_sets else loaded
    return found


class Perturbed:
    """Truth ratio, forget quality and model utility."""

    def __init__(self, bench: Bench, sets: Mapping[PerturbedName, PerturbedSet], writing: Writing | None) -> None:
        assert bench.config.perturbed is not None
        self._bench, self._sets, self._writing = bench, sets, writing
        self._mean = bench.config.perturbed.mean
        self._asked: dict[str, dict[PerturbedName, _Asked]] = {}

    def gather(self, subject: Subject) -> None:
        """Every file."""
        self._asked[subject.role] = {name: self._ask(subject, name, part) for name, part in self._sets.items()}

    def _ask(self, subject: Subject, name: PerturbedName, part: PerturbedSet) -> _Asked:
        needed = np.unique(np.concatenate([part.answers, part.right, part.wrong[part.wrong >= 0]]))
        survey = self._bench.gatherer.survey(subject, part.corpus, needed, f"wrong answers of {name}")
        losses = np.full(part.corpus.num_records, np.nan)
        losses[needed] = mean_losses(survey.nll, survey.num_tokens)
        writes = "model_utility" in self._bench.wanted and name != "forget" and self._writing is not None
        recalls = None
        if writes and self._writing is not None:
            recalls = self._writing.answers(subject, part.corpus, part.answers, name)["recall"]
        return _Asked(losses[part.answers], losses[part.right], mean_losses_of(losses, part.wrong), recalls)

    def _ratios(self, asked: _Asked) -> Floats:
        return truth_ratios(asked.right_losses, asked.wrong_losses, self._mean)

    def rows(self) -> list[MetricRow]:
        """By metric and set."""
        found, note = [], f"{self._mean} mean over wrong answers"
        if "truth_ratio" in self._bench.wanted:
            for name in self._sets:
                metric = catalogue.TRUTH_RATIO if name == "forget" else catalogue.KEPT_TRUTH_RATIO
                values = {role: self._truth(name, sets[name]) for role, sets in self._asked.items()}
                found.append(self._bench.rows.of_means(metric, name, values, note=note))
            for name in ("real_authors", "world_facts"):
                if name in self._sets:
                    chosen = {role: self._probability(name, sets[name]) for role, sets in self._asked.items()}
                    found.append(self._bench.rows.of_means(catalogue.CHOICE_PROBABILITY, name, chosen))
        if "forget_quality" in self._bench.wanted:
            found.append(self._forget_quality(note))
        if "model_utility" in self._bench.wanted:
            values_of = {role: self._utility(role) for role in self._asked}
            retrained, again = values_of.get("retrained"), values_of.get("retrained_again")
            noise = None if retrained is None or again is None else abs(retrained - again)
            row = plain_row(catalogue.MODEL_UTILITY, "all", values_of["model"], None, retrained, noise, note=note)
            found.append(row)
        return found

    def _truth(self, name: PerturbedName, asked: _Asked) -> Floats:
        ratios = self._ratios(asked)
        return forget_truth_scores(ratios) if name == "forget" else retain_truth_scores(ratios)

    @staticmethod
    def _probability(name: PerturbedName, asked: _Asked) -> Floats:
        if name == "retain":
            return np.exp(-asked.answer_losses)
        return choice_probabilities(asked.answer_losses, asked.wrong_losses)

    def _forget_quality(self, note: str) -> MetricRow:
        ratios = {role: self._ratios(sets["forget"]) for role, sets in self._asked.items()}
        test = forget_quality(ratios["model"], ratios["retrained"])
        again = ratios.get("retrained_again")
        noise = None if again is None else forget_quality(again, ratios["retrained"]).p_value
        words = (
            f"D = {test.distance:.3f}, log10 p = {test.log10_p:.2f}, n = {test.num_first}, where log10 p is at least "
            f"{test.log10_smallest_p:.2f}; {note}"
        )
        return plain_row(
            catalogue.FORGET_QUALITY, "forget", test.p_value, None, None, noise, test.num_first, note=words
        )

    def _utility(self, role: str) -> float:
        measures = {}
        for name, asked in self._asked[role].items():
            if name != "forget" and asked.recalls is not None:
                measures[name] = {
                    "probability": float(self._probability(name, asked).mean()),
                    "rouge_l": float(asked.recalls.mean()),
                    "truth_ratio": float(self._truth(name, asked).mean()),
                }
        return model_utility(measures)  # type: ignore[arg-type]
