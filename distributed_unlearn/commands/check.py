"""`check curvature`: is the sharded product the Hessian? Table, then one JSON line, then a verdict."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console

from distributed_unlearn.cluster.open import open_group
from distributed_unlearn.commands.console_events import say_statistics, warn_of_fallback
from distributed_unlearn.config import AdapterFolder, ClusterConfig, LoraAdapter, ModelConfig, ModelTask
from distributed_unlearn.errors import CheckFailedError
from distributed_unlearn.files import expand_home
from distributed_unlearn.models.fit import check_checkpoint
from distributed_unlearn.report.tables import facts_table, number
from distributed_unlearn.workers.client import Workers
from distributed_unlearn.workers.messages import CurvatureCheck

Dtype = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted relative errors."""

    gradient: float
    hvp: float
    symmetry: float


def tolerance_for(dtype: Dtype, reference: str) -> Tolerance:
    """Tolerances by dtype, from what was measured on SmolLM2-135M.

    float64 products agree to about 1e-15 (a chain of a few thousand roundings of 1e-16); float32 ones to
    8e-5 (the same chain at 6e-8); bfloat16 ones to 0.1. Each bound leaves a factor of ten or, for bfloat16,
    two. Central differences in float64 are themselves good to about 1e-8.
    """
    if dtype == "float64":
        return Tolerance(1e-10, 1e-6 if reference == "central_difference" else 1e-10, 1e-10)
    if dtype == "float32":
        return Tolerance(1e-3, 1e-3, 1e-3)
    return Tolerance(0.25, 0.25, 0.25)


def model_to_check(path: str, task: ModelTask, adapter: str | None, dtype: Dtype) -> ModelConfig:
    """What the command line names: a model, and with `adapter` the folder of one or `lora`, a new one of rank 8."""
    chosen: LoraAdapter | AdapterFolder | None = None
    if adapter is not None:
        chosen = LoraAdapter(name="lora") if adapter == "lora" else AdapterFolder(path=expand_home(adapter))
    # Double precision is for checks only, so it is no dtype of a job's model section.
    compute: Literal["float32", "bfloat16"] = "bfloat16" if dtype == "bfloat16" else "float32"
    return ModelConfig(path=expand_home(path), task=task, dtype=compute, adapter=chosen)


def run_curvature_check(
    model: ModelConfig, dtype: Dtype, cluster: ClusterConfig, check: CurvatureCheck, console: Console
) -> None:
    """Run the check on a worker group.

    Raises:
        CheckFailedError: an error above its tolerance, or not a number.
        UserError: the model cannot be loaded, the workers cannot be placed.
    """
    check_checkpoint(model, cluster.zero_stage)
    with open_group(cluster) as group:
        workers = Workers(group)
        facts = workers.open_model(model, dtype, cluster.zero_stage)
        report = workers.check_curvature(check)
    warn_of_fallback(console, facts.segment_fallback)
    say_statistics(console, facts.num_batch_norms)
    tolerance = tolerance_for(dtype, report.reference)
    bounds = {
        "gradient_relative_error": tolerance.gradient,
        "hvp_relative_error": tolerance.hvp,
        "symmetry_error": tolerance.symmetry,
    }
    values = asdict(report)
    rows = [_row(name, value, bounds) for name, value in values.items()]
    console.print(facts_table("Curvature check", ("quantity", "value", "tolerance"), rows))
    failed = [name for name, bound in bounds.items() if not values[name] <= bound]  # NaN fails too
    line = {**values, "dtype": dtype, "zero_stage": cluster.zero_stage, "tolerances": bounds, "passed": not failed}
    console.print(json.dumps(line), markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise CheckFailedError(
            ", ".join(f"{name} {values[name]:.3g}" for name in failed),
            ", ".join(f"at most {bounds[name]:g}" for name in failed),
            "use float32 rather than bfloat16; else this architecture breaks the products: please report it",
        )


def _row(name: str, value: float | int | str, bounds: dict[str, float]) -> tuple[str, str, str]:
    text = value if isinstance(value, str) else number(value)
    return name, text, f"at most {bounds[name]:g}" if name in bounds else ""
