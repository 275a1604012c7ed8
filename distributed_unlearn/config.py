"""The job file as frozen, strict pydantic models. Unknown keys are refused and no value is ever rewritten.

`load_job` reads the YAML, applies `section.key=value` overrides and turns every pydantic complaint into one
`ConfigError`. Nothing here looks at the file system beyond the job file itself, or at the machine.
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distributed_unlearn.errors import ConfigError


class StrictModel(BaseModel):
    """Base of all configuration models: frozen, unknown keys refused, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)


class ModelConfig(StrictModel):
    """Which checkpoint, in which compute dtype, and which of its parameters the update may touch."""

    path: str
    """Folder or Hugging Face Hub name. Safetensors only; remote code is never run."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. Trainable weights always keep an fp32 master shard beside it."""
    trainable: Literal["all"] | tuple[str, ...] = "all"
    """`all`, or shell patterns matched against parameter names, e.g. `["*.mlp.*", "*.norm.weight"]`."""


class DataConfig(StrictModel):
    """The training records: anything that `datasets` loads, and how a row becomes prompt and answer."""

    path: str
    """File (jsonl, json, csv, parquet), folder, or Hub data set name."""
    name: str | None = None
    """Hub data set configuration name."""
    split: str = "train"
    format: Literal["question_answer", "text", "chat", "classification"] = "question_answer"
    id_field: str = "record_id"
    """Column with the record id; when the column is missing, ids are `row-0`, `row-1`, ..."""
    subject_field: str | None = "subject_id"
    question_field: str = "question"
    answer_field: str = "answer"
    text_field: str = "text"
    messages_field: str = "messages"
    label_field: str = "label"
    label_names: tuple[str, ...] | None = None
    """Classification: the word that stands for class 0, 1, ...; without it the label column's own text is used."""
    prompt_template: str = "Question: {prompt}\nAnswer:"
    """question_answer and classification: text before the answer; `{prompt}` is the question or the text."""
    max_length: int | None = Field(default=None, ge=8)
    """Tokens per record, prompt and answer; null means the model's context length."""
    too_long: Literal["refuse", "truncate", "drop"] = "refuse"
    """What happens to longer records. `drop` never drops a record that is named (forget, holdout): that is refused."""
    pad_token: str | None = None
    """A token of the vocabulary to pad with, for tokenizers that have none (Llama 3's); it is masked everywhere."""


class SelectionConfig(StrictModel):
    """Names records: by subject, by id, by a file with one id a line, or (holdout only) all of another file."""

    subjects: tuple[str, ...] = ()
    record_ids: tuple[str, ...] = ()
    ids_file: str | None = None
    path: str | None = None
    name: str | None = None
    """Hub data set configuration name of `path`; data.name belongs to data.path alone."""
    split: str | None = None
    """Split of `path`, null: all of `train`; data.split belongs to data.path alone."""

    @model_validator(mode="after")
    def _names_something(self) -> "SelectionConfig":
        if self.path is None and (self.name is not None or self.split is not None):
            raise ValueError("name and split belong to path, which is not given; remove them")
        if not (self.subjects or self.record_ids or self.ids_file or self.path):
            raise ValueError("an empty selection; name subjects, record_ids, ids_file or (holdout only) path")
        return self


class ObjectiveConfig(StrictModel):
    """What is minimised. Each objective is defined in `distributed_unlearn.objectives`."""

    name: Literal["retain", "gradient_ascent", "graddiff", "npo", "simnpo", "holdout_matched"] = "holdout_matched"
    forget_weight: float = Field(default=1.0, ge=0.0)
    retain_weight: float = Field(default=1.0, ge=0.0)
    beta: float = Field(default=0.1, gt=0.0)
    """npo, simnpo: inverse temperature (0.1 in Zhang et al. 2024)."""
    penalty: Literal["huber", "squared"] = "huber"
    """holdout_matched: shape of the two-sided distance to the holdout loss."""
    huber_delta: float = Field(default=1.0, gt=0.0)
    """holdout_matched: nats per token at which the Huber penalty turns linear."""


class StopConfig(StrictModel):
    """When a round ends before `max_steps`."""

    forget_matches_holdout: bool = True
    """Stop once the forget set is as hard as the holdout set and the retain loss is back where it was."""
    forget_tolerance_nats: float = Field(default=0.15, gt=0.0)
    """Allowed mean distance between a forget record's mean loss and the holdout loss, nats per token."""
    retain_tolerance_nats: float = Field(default=0.05, gt=0.0)
    """Allowed rise of the loss on a fixed sample of the retain set since the round began, nats per token."""
    patience: int = Field(default=2, ge=1)
    """Consecutive checks for which both must hold."""
    check_every_steps: int = Field(default=1, ge=1)
    """Steps between two checks; each scores the forget set once."""
    max_seconds: float | None = Field(default=None, gt=0.0)


class SolverConfig(StrictModel):
    """How the objective is minimised."""

    method: Literal["scurenewton", "adamw", "sgd"] = "scurenewton"
    inner: Literal["krylov", "gradient_descent"] = "krylov"
    max_krylov_steps: int = Field(default=3, ge=1, le=200)
    krylov_tolerance: float = Field(default=1e-2, ge=0.0)
    """Stop growing the Krylov space when the cubic model's residual over ||g|| is below this."""
    inner_steps: int = Field(default=10, ge=1)
    """gradient_descent: inner steps (5 to 10 in the paper)."""
    inner_learning_rate: float = Field(default=0.01, gt=0.0)
    """gradient_descent: eta of the paper."""
    perturbation: float = Field(default=1e-3, ge=0.0)
    """gradient_descent: sigma, the relative size of the random gradient perturbation against the hard case."""
    cubic_coefficient: float = Field(default=100.0, gt=0.0)
    """M of the cubic model (L in the paper), the first value when `adaptive`."""
    adaptive: bool = True
    """Accept or reject steps and adapt M (Cartis, Gould, Toint 2011). false: the paper's fixed coefficient."""
    adaptation: Literal["interpolated", "factor"] = "interpolated"
    """How M moves: by the model error that the trial showed, or by the two factors alone."""
    acceptance_threshold: float = Field(default=0.1, gt=0.0, lt=1.0)
    very_good_threshold: float = Field(default=0.7, gt=0.0, le=1.0)
    increase_factor: float = Field(default=4.0, gt=1.0)
    decrease_factor: float = Field(default=3.0, ge=1.0)
    max_rejections: int = Field(default=8, ge=0)
    gradient_batch: int = Field(default=48, ge=1)
    """Records per gradient minibatch; half forget, half retain, at least one of each, if the objective uses both."""
    curvature_batch: int = Field(default=16, ge=1)
    """Records per curvature minibatch, the head of the gradient minibatch."""
    max_steps: int = Field(default=30, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0.0, le=1e38)
    """adamw, sgd."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    seed: int = Field(default=0, ge=0)
    stop: StopConfig = StopConfig()

    @model_validator(mode="after")
    def _batches_fit(self) -> "SolverConfig":
        if self.method == "scurenewton" and self.curvature_batch > self.gradient_batch:
            raise ValueError("curvature_batch is larger than gradient_batch, of which it is the head; lower it")
        if self.very_good_threshold < self.acceptance_threshold:
            raise ValueError("very_good_threshold is below acceptance_threshold; raise it")
        return self


class CurvatureConfig(StrictModel):
    """Which product, and what is kept in memory between the products of one minibatch."""

    product: Literal["hessian", "gauss_newton"] = "hessian"
    mode: Literal["auto", "cached", "recompute"] = "auto"
    """auto: cached where the measured size of what it keeps fits `memory_budget_gib`, else recompute."""
    memory_budget_gib: float | None = Field(default=None, gt=0.0)
    """Per rank, for what cached mode keeps. null: half of what is free on the device at the first product."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Records that go through the model at once on one rank. Changes memory and speed, never a result."""


class ClusterConfig(StrictModel):
    """Where it runs."""

    backend: Literal["ray", "in_process"] = "ray"
    """in_process: one worker in this very process, without Ray (laptop, debugger, lone GPU)."""
    num_workers: int = Field(default=2, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 3
    address: str | None = None
    """`host:port` of a cluster's head, or `auto` for one on this machine. null or empty: RAY_ADDRESS (which a Ray job
    sets), else a new local Ray bound to 127.0.0.1."""
    use_gpu: Literal["auto", "always", "never"] = "auto"
    """A GPU for every worker; auto: if the cluster has any at the start. `always` waits for GPU nodes to join."""
    cpus_per_worker: int = Field(default=1, ge=1)
    placement_timeout_seconds: float = Field(default=600.0, gt=0.0)
    """How long a given cluster may take to have room (nodes may still join); a local Ray refuses at once."""
    collective_timeout_seconds: float = Field(default=1800.0, gt=0.0)
    """A collective that waits longer than this has lost a peer; ranks may load and write at different speeds."""
    call_timeout_seconds: float = Field(default=3600.0, gt=0.0)
    """A worker call that takes longer than this has hung."""

    @model_validator(mode="after")
    def _one_process(self) -> "ClusterConfig":
        if self.backend == "in_process" and self.num_workers != 1:
            raise ValueError("backend in_process has exactly one worker; set num_workers to 1 or backend to ray")
        return self


class EvaluationConfig(StrictModel):
    """What is scored before and after every round."""

    max_records_per_set: int | None = Field(default=None, ge=1)
    """Score a seeded sample of this size of each larger set; null scores every record."""


class SaveConfig(StrictModel):
    """How the result is written."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """null: the dtype of the checkpoint that was loaded; after training, the dtype that it was trained in."""
    max_shard_gib: float = Field(default=4.0, gt=0.0)
    fp32_master: bool = False
    """Also write the fp32 weights beside a lower-precision checkpoint, so that a later job can go on from them."""


class TrainConfig(StrictModel):
    """Fine-tuning instead of unlearning: accelerate + DeepSpeed inside the same workers."""

    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=16, ge=1)
    """Global records per optimiser step."""
    learning_rate: float = Field(default=1e-4, gt=0.0, le=1e38)
    weight_decay: float = Field(default=0.01, ge=0.0)
    warmup_share: float = Field(default=0.1, ge=0.0, lt=1.0)
    max_gradient_norm: float = Field(default=1.0, gt=0.0)
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage of the training itself; null: the cluster's. Stage 2 is faster than 3 for small models."""
    exclude_forget: bool = False
    """Leave out `forget`: trains the retrained reference. The holdout set is always left out."""

    def stage_in(self, cluster: ClusterConfig) -> int:
        """The training's own ZeRO stage, else the cluster's."""
        return cluster.zero_stage if self.zero_stage is None else self.zero_stage


class JobConfig(StrictModel):
    """One job file."""

    model: ModelConfig
    data: DataConfig
    forget: SelectionConfig | None = None
    rounds: tuple[SelectionConfig, ...] | None = None
    holdout: SelectionConfig | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    solver: SolverConfig = SolverConfig()
    curvature: CurvatureConfig = CurvatureConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    save: SaveConfig = SaveConfig()
    train: TrainConfig | None = None
    retrained: str | None = None
    """Checkpoint of a retrained reference; with it the evaluation reports the Tug-of-War."""
    output: str
    overwrite: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "JobConfig":
        if self.forget is not None and self.rounds is not None:
            raise ValueError("both forget and rounds are given; a single round is `forget`, several are `rounds`")
        if self.rounds is not None and not self.rounds:
            raise ValueError("rounds is empty; give at least one selection or null")
        for selection in (self.forget, *(self.rounds or ())):
            if selection is not None and selection.path is not None:
                raise ValueError("forget selects among the training records; path is for holdout only")
        if self.train is not None and self.train.exclude_forget and not self.forget_rounds:
            raise ValueError("train.exclude_forget without forget or rounds leaves nothing out; name what to leave out")
        needs_holdout = self.objective.name == "holdout_matched" or self.solver.stop.forget_matches_holdout
        if self.unlearns and needs_holdout and self.holdout is None:
            raise ValueError(
                "objective holdout_matched and solver.stop.forget_matches_holdout need a holdout selection; "
                "name records that were never trained on, or choose another objective and turn the stop off"
            )
        return self

    @property
    def unlearns(self) -> bool:
        """True when the job names something to forget and is not a training job."""
        return self.train is None and (self.forget is not None or self.rounds is not None)

    @property
    def forget_rounds(self) -> tuple[SelectionConfig, ...]:
        """The forget selection of every round, in order; one entry for a job with `forget`."""
        if self.rounds is not None:
            return self.rounds
        return () if self.forget is None else (self.forget,)


def _set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(
                f"override '{dotted}'", f"'{parent}' to be a section", "check the path against the job file"
            )
    tree[leaf] = value


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> None:
    """Set `section.key=value` pairs in `tree`, values read as YAML.

    Raises:
        ConfigError: an override without `=`, a path through something that is no section, or bad YAML.
    """
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not dotted:
            raise ConfigError(f"override '{override}'", "section.key=value", "write e.g. solver.max_steps=10")
        try:
            _set_dotted(tree, dotted, yaml.safe_load(text))
        except (yaml.YAMLError, ValueError) as error:
            # Without the value, which may hold ids of people.
            got = f"override '{dotted}=...' ({_problem(error)})"
            raise ConfigError(got, "a YAML value after '='", "quote the value") from error


def _problem(error: Exception) -> str:
    """What is wrong and in which line; yaml's own message quotes the line, which may hold ids of people."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"a value that cannot be read, {type(error).__name__}"  # e.g. a date with a 13th month
    line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
    return f"{line}{error.problem or type(error).__name__}"


def _refusal(error: ValidationError, source: str, root: str) -> ConfigError:
    complaints = []
    for item in error.errors(include_url=False, include_input=False):
        key = ".".join(str(part) for part in item["loc"]) or root
        known = "; this key does not exist" if item["type"] == "extra_forbidden" else ""
        complaints.append(f"{key}: {item['msg']}{known}")
    return ConfigError(
        f"{len(complaints)} problem(s) in {source}: " + " | ".join(complaints),
        "settings as README.md describes them",
        "correct the named keys",
    )


def parse_job(tree: dict[str, Any], source: str) -> JobConfig:
    """Validate a job given as nested dictionaries.

    Raises:
        ConfigError: every complaint of the validation, with the dotted key.
    """
    try:
        return JobConfig.model_validate(tree)
    except ValidationError as error:
        raise _refusal(error, source, "job") from error


def parse_cluster(tree: dict[str, Any]) -> ClusterConfig:
    """Validate cluster settings given on the command line.

    Raises:
        ConfigError: every complaint of the validation.
    """
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        raise _refusal(error, "the command line", "cluster") from error


def load_job(path: Path, overrides: list[str]) -> JobConfig:
    """Read a job file, apply overrides, validate.

    Raises:
        ConfigError: a file that is missing or cannot be read, bad YAML, or a refused key or value.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        got = f"job file '{path}', which cannot be read ({error.strerror})"
        raise ConfigError(got, "an existing YAML file", "check the path and its permissions") from error
    except (yaml.YAMLError, ValueError) as error:
        got = f"'{path}', which is not YAML ({_problem(error)})"
        raise ConfigError(got, "a YAML job file", "correct the syntax") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"'{path}' without sections", "a YAML mapping", "see README.md for an example job")
    apply_overrides(tree, overrides)
    return parse_job(tree, str(path))
