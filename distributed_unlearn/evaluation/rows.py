"""Rows of an evaluation from numbers by model and record: a value, its interval, the retrained model's, the noise."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distributed_unlearn.evaluation.metrics.catalogue import MetricDefinition
from distributed_unlearn.evaluation.metrics.intervals import (
    Interval,
    bootstrap_interval,
    mean_interval,
    noise_floor,
)
from distributed_unlearn.evaluation.metrics.per_record import Floats
from distributed_unlearn.records.evaluation import MetricRow

Drawn = Mapping[str, NDArray[np.int64]]
"""By set, which of its records were drawn, with repeats."""
Statistic = Callable[[str, Drawn], float]
"""Of a model (by its role), of the records drawn."""


@dataclass(frozen=True)
class RowMaker:
    """Makes rows; `roles` are the models that were measured, `model` always."""

    roles: tuple[str, ...]
    num_resamples: int

    def of_means(
        self,
        metric: MetricDefinition,
        set_name: str,
        by_role: Mapping[str, Floats],
        condition: str = "",
        note: str = "",
    ) -> MetricRow:
        """The mean over records of one number each, [n] by model."""
        ours = by_role["model"]
        means = {role: float(values.mean()) for role, values in by_role.items()}
        interval = mean_interval(ours, num_resamples=self.num_resamples)
        return self._row(metric, set_name, means, interval, len(ours), condition, note)

    def of_statistic(
        self,
        metric: MetricDefinition,
        set_name: str,
        statistic: Statistic,
        sizes: Mapping[str, int],
        condition: str = "",
        note: str = "",
        suffix: str = "",
    ) -> MetricRow:
        """A number of all records of one or several sets, for every model."""
        everything = {name: np.arange(size) for name, size in sizes.items()}
        values = {role: statistic(role, everything) for role in self.roles}
        interval = bootstrap_interval(lambda drawn: statistic("model", drawn), sizes, num_resamples=self.num_resamples)
        return self._row(metric, set_name, values, interval, sum(sizes.values()), condition, note, suffix)

    def of_distance(
        self,
        metric: MetricDefinition,
        set_name: str,
        statistic: Statistic,
        sizes: Mapping[str, int],
        note: str = "",
    ) -> MetricRow:
        """A number that compares with the retrained model; its noise floor is the second retrained model's."""
        everything = {name: np.arange(size) for name, size in sizes.items()}
        interval = bootstrap_interval(lambda drawn: statistic("model", drawn), sizes, num_resamples=self.num_resamples)
        noise = statistic("retrained_again", everything) if "retrained_again" in self.roles else None
        return plain_row(
            metric, set_name, statistic("model", everything), interval, None, noise, sum(sizes.values()), note=note
        )

    def _row(
        self,
        metric: MetricDefinition,
        set_name: str,
        values: Mapping[str, float],
        interval: Interval | None,
        num_records: int,
        condition: str,
        note: str,
        suffix: str = "",
    ) -> MetricRow:
        retrained, again = values.get("retrained"), values.get("retrained_again")
        noise = None if retrained is None or again is None else noise_floor(retrained, again)
        return plain_row(
            metric, set_name, values["model"], interval, retrained, noise, num_records, condition, note, suffix
        )


def plain_row(
    metric: MetricDefinition,
    set_name: str,
    value: float,
    interval: Interval | None = None,
    retrained: float | None = None,
    noise: float | None = None,
    num_records: int | None = None,
    condition: str = "",
    note: str = "",
    suffix: str = "",
) -> MetricRow:
    """A row of numbers that are known; `suffix` tells apart metrics of one definition, as the attacks."""
    return MetricRow(
        name=metric.name + (f"_{suffix}" if suffix else ""),
        title=metric.title + (f", {suffix.replace('_', '-')}" if suffix else ""),
        sentence=metric.sentence,
        better=metric.better,
        unit=metric.unit,
        set_name=set_name,
        value=value,
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        retrained=retrained,
        noise_floor=noise,
        num_records=num_records,
        condition=condition,
        note=note,
    )
