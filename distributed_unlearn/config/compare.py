"""The file of a comparison: one base job, the methods that are tried on it, and the seeds of each."""

import re
from pathlib import Path

from pydantic import Field, model_validator

from distributed_unlearn.config.base import PathText, StrictModel
from distributed_unlearn.config.job import JobConfig
from distributed_unlearn.config.load import apply_overrides, read_tree, validated
from distributed_unlearn.config.methods import SCureNewtonConfig, StopConfig
from distributed_unlearn.config.objective import ObjectiveConfig
from distributed_unlearn.config.published import NamedObjectiveConfig
from distributed_unlearn.config.retraining import RetrainConfig
from distributed_unlearn.config.sections import CurvatureConfig
from distributed_unlearn.config.solver import SolverConfig


class ComparedMethod(StrictModel):
    """One method: the sections of the base job that it replaces, whole."""

    label: str = Field(min_length=1, max_length=60)
    """Its name in tables and figures."""
    solver: SolverConfig | None = None
    """null: the base job's. Its `seed` is set by the comparison."""
    objective: ObjectiveConfig | None = None
    """null: that of a method which is named after one, else the base job's."""
    curvature: CurvatureConfig | None = None

    @property
    def slug(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")


class CompareConfig(StrictModel):
    """A comparison of methods on one base job.

    With `job.train` the original is trained from `job.model` on everything but the holdout, and for every round a
    reference without what was to be forgotten until then. Without it `job.model` is the original, and `job.retrained`,
    where it is given, the reference of the last round.
    """

    job: JobConfig
    """The base job; its `output`, `overwrite` and `resume` are the comparison's business."""
    methods: tuple[ComparedMethod, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Of the unlearning: what each method is run with. The training has that of the base job's solver."""
    noise_seeds: tuple[int, ...] = ()
    """Seeds with which the references are trained once more: how far two retrained models are from each other is how
    near to one of them a method can come."""
    output: PathText
    models: PathText | None = None
    """Where original and references are kept, by a hash of what they are made from; null: `models` in `output`.
    Several comparisons may share it."""

    @model_validator(mode="after")
    def _consistent(self) -> "CompareConfig":
        base = self.job
        if not base.forget_rounds:
            raise ValueError("a base job without forget or rounds; say what the methods are to forget")
        if base.train is not None and base.retrained is not None:
            raise ValueError("job.train and job.retrained: the references are trained; remove one of them")
        if base.train is not None and base.train.exclude_forget:
            raise ValueError("job.train.exclude_forget is set for the references alone; remove it")
        if base.train is None and self.noise_seeds:
            raise ValueError("noise_seeds without job.train: nothing says how to train another reference")
        if base.evaluation.max_records_per_set is not None:
            raise ValueError("job.evaluation.max_records_per_set: models are compared on whole sets; remove it")
        slugs = [method.slug for method in self.methods]
        if len(set(slugs)) < len(slugs) or not all(slugs):
            raise ValueError("methods must have labels with letters or digits that are all different")
        if any(len(set(seeds)) < len(seeds) or min(seeds, default=0) < 0 for seeds in (self.seeds, self.noise_seeds)):
            raise ValueError("seeds must be different whole numbers from 0")
        if base.solver.seed in self.noise_seeds:
            raise ValueError(f"noise_seeds names {base.solver.seed}, with which the references are trained already")
        for method in self.methods:
            self.unlearning(method, self.seeds[0], "original", None, self.output)
        return self

    @property
    def num_rounds(self) -> int:
        """Rounds of every method."""
        return len(self.job.forget_rounds)

    def training(self, seed: int, rounds_left_out: int, output: str) -> JobConfig:
        """The training of the original (0), or of the reference after so many rounds, from `job.model`."""
        base = self.job
        assert base.train is not None
        left_out = base.forget_rounds[:rounds_left_out]
        return JobConfig.model_validate(
            dict(base)
            | {
                "train": base.train.model_copy(update={"exclude_forget": rounds_left_out > 0}),
                "forget": left_out[0] if len(left_out) == 1 else None,
                "rounds": left_out if len(left_out) > 1 else None,
                # Not the base job's: what a model was trained with shall not depend on how it will unlearn.
                "objective": ObjectiveConfig(name="retain"),
                "solver": SCureNewtonConfig(seed=seed, stop=StopConfig(forget_matches_holdout=False)),
                "output": output,
                "overwrite": True,
                "resume": False,
            }
        )

    def unlearning(
        self, method: ComparedMethod, seed: int, original: str, reference: str | None, output: str
    ) -> JobConfig:
        """A method's job from the checkpoint `original`, compared with `reference` where there is one."""
        base, model, data = self.job, self.job.model, self.job.data
        solver = (base.solver if method.solver is None else method.solver).model_copy(update={"seed": seed})
        objective = base.objective if method.objective is None else method.objective
        if method.objective is None and isinstance(solver, NamedObjectiveConfig):
            objective = ObjectiveConfig(name=solver.objective_name)
        if isinstance(solver, RetrainConfig):
            objective = ObjectiveConfig()
            if base.train is not None and data.base_model is None:
                data = data.model_copy(update={"base_model": model.path})  # what the original was trained from
        if base.train is not None:  # an adapter's folder opens on its base by itself
            model = model.model_copy(update={"path": original, "revision": None, "adapter": None})
        return JobConfig.model_validate(
            dict(base)
            | {
                "model": model,
                "data": data,
                "train": None,
                "objective": objective,
                "solver": solver,
                "curvature": base.curvature if method.curvature is None else method.curvature,
                "retrained": base.retrained if base.train is None else reference,
                "output": output,
                "overwrite": True,
            }
        )


def load_compare(path: Path, overrides: list[str]) -> CompareConfig:
    """Read the file of a comparison, apply overrides, validate. `job` is a mapping, or the path of a job file.

    Raises:
        ConfigError: a file that is missing or cannot be read, bad YAML, or a refused key or value.
    """
    tree = read_tree(path, [], "comparison")
    if isinstance(tree.get("job"), str):
        tree["job"] = read_tree(Path(tree["job"]).expanduser(), [], "job file")
    apply_overrides(tree, overrides)
    if isinstance(tree.get("job"), dict) and "output" in tree:
        tree["job"] = {**tree["job"], "output": tree["output"]}
    return validated(CompareConfig, tree, str(path), "comparison")
