"""What each metric needs, said before anything is loaded: a missing need is refused or listed, never replaced."""

from collections.abc import Callable
from typing import get_args

from distributed_unlearn.config import EvaluateConfig, MetricGroup
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.records.evaluation import NotMeasured

_Need = tuple[str, Callable[[EvaluateConfig], bool]]
"""What is missing where it does not hold."""
_HOLDOUT: _Need = ("a holdout set of records that were never trained on (`holdout`)", lambda c: c.holdout is not None)
_RETRAINED: _Need = ("a retrained reference (`retrained`)", lambda c: c.retrained is not None)
_LANGUAGE: _Need = ("a causal language model (`model.task`)", lambda c: c.model.task == "causal_lm")
_GENERATION: _Need = ("generation switched on (`generation`)", lambda c: c.generation is not None)
_QUESTIONS: _Need = (
    "records of questions and answers (`data.format question_answer`)",
    lambda c: c.data.format == "question_answer",
)
_WRONG: _Need = (
    "files of paraphrased and wrong answers (`perturbed`)",
    lambda c: c.perturbed is not None and any((c.perturbed.forget, *_utility_files(c))),
)
_WRONG_FORGET: _Need = (
    "wrong answers for the forget set (`perturbed.forget`)",
    lambda c: c.perturbed is not None and c.perturbed.forget is not None,
)
_WRONG_UTILITY: _Need = (
    "wrong answers for retain set, real authors and world facts (`perturbed.retain`, `real_authors`, `world_facts`)",
    lambda c: all(_utility_files(c)),
)
_DEPTH: _Need = ("the section `depth`", lambda c: c.depth is not None)
_QUANTISE: _Need = ("the section `stress.quantise`", lambda c: c.stress.quantise is not None)
_RELEARN: _Need = ("the section `stress.relearn`", lambda c: c.stress.relearn is not None)
_NEEDS: dict[MetricGroup, tuple[_Need, ...]] = {
    "memorisation": (),
    "membership": (_HOLDOUT,),
    "holdout_distance": (_HOLDOUT,),
    "priv_leak": (_LANGUAGE, _HOLDOUT, _RETRAINED),
    "tug_of_war": (_HOLDOUT, _RETRAINED),
    "divergence": (_RETRAINED,),
    "truth_ratio": (_LANGUAGE, _WRONG),
    "forget_quality": (_LANGUAGE, _WRONG_FORGET, _RETRAINED),
    "model_utility": (_LANGUAGE, _WRONG_UTILITY, _GENERATION),
    "rouge": (_LANGUAGE, _GENERATION, _QUESTIONS),
    "verbmem": (_LANGUAGE, _GENERATION),
    "knowmem": (_LANGUAGE, _GENERATION, _QUESTIONS),
    "depth": (_LANGUAGE, _DEPTH, _HOLDOUT),
    "quantised": (_QUANTISE,),
    "relearned": (_RELEARN,),
}


def _utility_files(config: EvaluateConfig) -> tuple[str | None, ...]:
    found = config.perturbed
    return (None,) * 3 if found is None else (found.retain, found.real_authors, found.world_facts)


def wanted_metrics(config: EvaluateConfig) -> tuple[frozenset[MetricGroup], tuple[NotMeasured, ...]]:
    """Which metrics are measured; and which are not, with what they lack.

    Raises:
        ConfigError: a metric that is named in the file and lacks something.
    """
    wanted, lacking = [], []
    names: tuple[MetricGroup, ...] = config.metrics or get_args(MetricGroup)
    for name in names:
        missing = [what for what, holds in _NEEDS[name] if not holds(config)]
        if not missing:
            wanted.append(name)
            continue
        if config.metrics is not None:
            raise ConfigError(
                f"the metric {name} without {missing[0]}",
                "everything that a named metric needs",
                "give it, or take the metric out of metrics",
            )
        lacking.append(NotMeasured(name, f"needs {' and '.join(missing)}"))
    lacking.append(NotMeasured("gibberish", "needs a detector of meaningless text, which no package here brings along"))
    return frozenset(wanted), tuple(lacking)
