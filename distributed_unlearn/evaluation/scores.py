"""Metrics of teacher-forced scores: memorisation, membership, distance to unseen records and to the retrained model."""

from collections.abc import Mapping

import numpy as np

from distributed_unlearn.data.encoding import TokenCorpus
from distributed_unlearn.evaluation.bench import Bench
from distributed_unlearn.evaluation.gather import AS_IT_IS, Condition, Subject
from distributed_unlearn.evaluation.metrics import catalogue
from distributed_unlearn.evaluation.metrics.membership import (
    AttackScores,
    mia_auc,
    min_k_plus_plus_scores,
    min_k_scores,
    priv_leak,
    zlib_scores,
)
from distributed_unlearn.evaluation.metrics.memorisation import (
    exact_memorisation,
    extraction_strength,
    mean_losses,
    normalised_probabilities,
)
from distributed_unlearn.evaluation.metrics.per_record import Floats, means
from distributed_unlearn.evaluation.metrics.two_samples import ks_two_samples
from distributed_unlearn.evaluation.rows import Drawn
from distributed_unlearn.evaluation.texts import compressed_sizes
from distributed_unlearn.records.evaluation import MetricRow
from distributed_unlearn.workers.survey import Survey

QUANTILES = tuple(round(0.02 * index, 2) for index in range(51))


class Scores:
    """Of the model as it is, or after something was done to it."""

    def __init__(self, bench: Bench, condition: Condition = AS_IT_IS) -> None:
        self._bench, self._condition = bench, condition
        self._sets = dict(bench.sets)
        if condition is not AS_IT_IS:
            del self._sets["retain"]
        if condition.relearned is not None:
            self._sets["forget"] = np.setdiff1d(self._sets["forget"], condition.relearned)
        self._surveys: dict[str, dict[str, Survey]] = {}
        """By model, then by set."""
        self._sizes: dict[str, np.ndarray] = {}

    def gather(self, subject: Subject) -> None:
        """Every set; after something was done the forget and the holdout set alone, without what was learned again."""
        self._surveys[subject.role] = {
            name: self._bench.survey(subject, name, indices, self._condition) for name, indices in self._sets.items()
        }

    def rows(self) -> list[MetricRow]:
        """All that are wanted."""
        if self._condition is not AS_IT_IS:
            return [*self._memorisation(("loss", "exact_memorisation")), *self._membership(("min_k",))]
        wanted, found = self._bench.wanted, []
        if "memorisation" in wanted:
            found += self._memorisation(None)
        if "membership" in wanted:
            found += self._membership(None)
        if "priv_leak" in wanted:
            found.append(self._priv_leak())
        if "holdout_distance" in wanted:
            found.append(self._holdout_distance())
        if "tug_of_war" in wanted:
            found.append(self._tug_of_war())
        if "divergence" in wanted:
            found += self._divergence()
        return found

    def loss_quantiles(self) -> dict[str, dict[str, tuple[float, ...]]]:
        """How the records' losses are spread, by model and set."""
        return {
            role: {
                name: tuple(float(x) for x in np.quantile(mean_losses(part.nll, part.num_tokens), QUANTILES))
                for name, part in surveys.items()
            }
            for role, surveys in self._surveys.items()
        }

    def _of_set(self, set_name: str) -> dict[str, Survey]:
        return {role: surveys[set_name] for role, surveys in self._surveys.items()}

    def _memorisation(self, names: tuple[str, ...] | None) -> list[MetricRow]:
        measures = {
            catalogue.LOSS: lambda s: mean_losses(s.nll, s.num_tokens),
            catalogue.PROBABILITY: lambda s: normalised_probabilities(s.nll, s.num_tokens),
            catalogue.EXACT_MEMORISATION: lambda s: exact_memorisation(s.hits, s.num_tokens),
        }
        if self._bench.is_language_model:
            measures[catalogue.EXTRACTION_STRENGTH] = lambda s: extraction_strength(s.hits, s.num_tokens)
        else:
            measures = {self._of_classes(metric): of for metric, of in measures.items()}
        return [
            self._bench.rows.of_means(
                metric,
                name,
                {role: measure(survey) for role, survey in self._of_set(name).items()},
                self._condition.words.strip(),
            )
            for metric, measure in measures.items()
            for name in self._sets
            if names is None or metric.name in names
        ]

    @staticmethod
    def _of_classes(metric: catalogue.MetricDefinition) -> catalogue.MetricDefinition:
        return {
            catalogue.LOSS: catalogue.CLASS_LOSS,
            catalogue.PROBABILITY: catalogue.CLASS_PROBABILITY,
            catalogue.EXACT_MEMORISATION: catalogue.ACCURACY,
        }[metric]

    def _attacks(self, role: str) -> dict[str, AttackScores]:
        """By set."""
        found = {}
        for name in ("forget", "holdout"):
            survey = self._surveys[role][name]
            nll, counts = survey.nll, survey.num_tokens
            plus = min_k_plus_plus_scores(nll, survey.entropy, survey.variance, counts)
            sizes = self._compressed(name)
            compressed = None if sizes is None else zlib_scores(nll, counts, sizes)
            found[name] = AttackScores(mean_losses(nll, counts), min_k_scores(nll, counts), plus, compressed, None)
        return found

    def _compressed(self, set_name: str) -> np.ndarray | None:
        """Bytes of the answers' compressed texts; None where records are not texts."""
        bench = self._bench
        if not bench.is_language_model or bench.tokenizer is None or not isinstance(bench.corpus, TokenCorpus):
            return None
        if set_name not in self._sizes:
            self._sizes[set_name] = compressed_sizes(bench.corpus, self._sets[set_name], bench.tokenizer)
        return self._sizes[set_name]

    def _membership(self, names: tuple[str, ...] | None) -> list[MetricRow]:
        if "holdout" not in self._sets:
            return []
        scores = {role: self._attacks(role) for role in self._surveys}
        # A record of one prediction has no lowest share of its tokens.
        possible = tuple(scores["model"]["forget"].named()) if self._bench.is_language_model else ("loss",)
        return [
            self._bench.rows.of_statistic(
                catalogue.MIA_AUC,
                "forget",
                _AucOf({role: {s: part.named()[attack] for s, part in sets.items()} for role, sets in scores.items()}),
                self._sizes_of("forget", "holdout"),
                self._condition.words.strip(),
                note="against the holdout set",
                suffix=attack,
            )
            for attack in possible
            if names is None or attack in names or not self._bench.is_language_model
        ]

    def _sizes_of(self, *names: str) -> dict[str, int]:
        return {name: len(self._sets[name]) for name in names}

    def _priv_leak(self) -> MetricRow:
        scores = {
            role: {name: min_k_scores(surveys[name].nll, surveys[name].num_tokens) for name in ("forget", "holdout")}
            for role, surveys in self._surveys.items()
        }
        auc, sizes = _AucOf(scores), self._sizes_of("forget", "holdout")
        reference = auc("retrained", {name: np.arange(size) for name, size in sizes.items()})
        return self._bench.rows.of_distance(
            catalogue.PRIV_LEAK,
            "forget",
            lambda role, drawn: priv_leak(auc(role, drawn), reference),
            sizes,
            note=f"min-40 %; the retrained model's AUC is {reference:.3f}",
        )

    def _holdout_distance(self) -> MetricRow:
        losses = {
            role: {name: mean_losses(part.nll, part.num_tokens) for name, part in surveys.items()}
            for role, surveys in self._surveys.items()
        }
        test = ks_two_samples(losses["model"]["forget"], losses["model"]["holdout"])
        return self._bench.rows.of_statistic(
            catalogue.HOLDOUT_DISTANCE,
            "forget",
            lambda role, drawn: _ks_distance(
                losses[role]["forget"][drawn["forget"]], losses[role]["holdout"][drawn["holdout"]]
            ),
            self._sizes_of("forget", "holdout"),
            note=f"log10 p = {test.log10_p:.2f}",
        )

    def _tug_of_war(self) -> MetricRow:
        hits = {
            role: {name: exact_memorisation(part.hits, part.num_tokens) for name, part in surveys.items()}
            for role, surveys in self._surveys.items()
        }

        def closeness(role: str, drawn: Drawn) -> float:
            gaps = [
                abs(float(hits[role][name][chosen].mean() - hits["retrained"][name][chosen].mean()))
                for name, chosen in drawn.items()
            ]
            return float(np.prod([1.0 - gap for gap in gaps]))

        accuracy = "exact memorisation" if self._bench.is_language_model else "accuracy"
        sizes = self._sizes_of("forget", "retain", "holdout")
        return self._bench.rows.of_distance(catalogue.TUG_OF_WAR, "all", closeness, sizes, note=f"by {accuracy}")

    def _divergence(self) -> list[MetricRow]:
        found = []
        for name in self._sets:
            values: Mapping[str, Floats] = {
                role: means(part.divergence, part.num_tokens)
                for role, part in self._of_set(name).items()
                if role != "retrained"
            }
            found.append(
                self._bench.rows.of_distance(
                    catalogue.JENSEN_SHANNON,
                    name,
                    lambda role, drawn, values=values, name=name: float(values[role][drawn[name]].mean()),  # type: ignore[misc]
                    self._sizes_of(name),
                )
            )
        return found


class _AucOf:
    """`mia_auc` of one attack, by model and of the records drawn."""

    def __init__(self, scores: Mapping[str, Mapping[str, Floats]]) -> None:
        self._scores = scores

    def __call__(self, role: str, drawn: Drawn) -> float:
        found = self._scores[role]
        return mia_auc(found["forget"][drawn["forget"]], found["holdout"][drawn["holdout"]])


def _ks_distance(first: Floats, second: Floats) -> float:
    """`sup |F_1 - F_2|` alone, without its p-value."""
    both, one, two = np.concatenate([first, second]), np.sort(first), np.sort(second)
    gaps = np.searchsorted(one, both, "right") / len(one) - np.searchsorted(two, both, "right") / len(two)
    return float(np.abs(gaps).max())
