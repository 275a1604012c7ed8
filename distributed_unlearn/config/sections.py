"""The sections of a job file that say what is opened, read, trained, scored and written, and where it runs."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from distributed_unlearn.config.base import PathText, StrictModel

ModelTask = Literal["causal_lm", "sequence_classification", "image_classification"]


class LoraAdapter(StrictModel):
    """A new LoRA adapter on linear layers: `W x + (alpha / rank) B A x` with W frozen (Hu et al. 2022)."""

    name: Literal["lora"]
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0.0)
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(default="all-linear", min_length=1)
    """Last parts of the names of linear layers, e.g. `[q_proj, v_proj]`; all-linear: every one but the head."""
    seed: int = Field(default=0, ge=0)
    """Of A, which starts uniform; B starts at zero, so that the model starts as its base."""


class AdapterFolder(StrictModel):
    """A LoRA adapter to go on from."""

    path: str
    """Folder with adapter_config.json and adapter_model.safetensors, as peft writes it."""


def _adapter_kind(value: Any) -> str:
    if isinstance(value, AdapterFolder) or (isinstance(value, dict) and "path" in value):
        return "folder"
    return "lora"


AdapterConfig = Annotated[
    Annotated[LoraAdapter, Tag("lora")] | Annotated[AdapterFolder, Tag("folder")], Discriminator(_adapter_kind)
]


class ModelConfig(StrictModel):
    """Which checkpoint, opened as what, in which compute dtype, and which of its parameters the update may touch."""

    path: PathText
    """Folder or Hugging Face Hub name. Safetensors only; remote code is never run."""
    task: ModelTask = "causal_lm"
    """What the model predicts: the next token, or the class of a text or an image."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. Trainable weights always keep an fp32 master shard beside it; in unlearning, frozen ones are kept
    once, in the dtype of their files."""
    trainable: Literal["all"] | tuple[str, ...] = "all"
    """`all`, or shell patterns matched against parameter names, e.g. `["*.mlp.*", "*.norm.weight"]`; with an adapter
    all of the adapter's weights, or those of them that match. The vision tower of a multimodal model never is."""
    adapter: AdapterConfig | None = None
    """LoRA: train and unlearn an adapter on a frozen base. A new one, `{name: lora, rank: 8, alpha: 16,
    target_modules: [q_proj, v_proj]}`, or one to go on from, `{path: FOLDER}`."""


class ErasedConfig(StrictModel):
    """Records that earlier jobs erased from the checkpoint, for where its record cannot tell; ids may be unknown."""

    subjects: tuple[str, ...] = ()
    record_ids: tuple[str, ...] = ()
    ids_file: PathText | None = None

    @model_validator(mode="after")
    def _names_something(self) -> "ErasedConfig":
        if not (self.subjects or self.record_ids or self.ids_file):
            raise ValueError("an empty selection; name subjects, record_ids or ids_file, or remove data.erased")
        return self


class DataConfig(StrictModel):
    """The training records: anything that `datasets` loads, and how a row becomes prompt and answer."""

    path: PathText | tuple[PathText, ...]
    """File (jsonl, json, csv, parquet), several files, a folder of such files, or a Hub data set name; `sklearn:digits`
    for scikit-learn's images."""
    name: str | None = None
    """Hub data set configuration name."""
    split: str = "train"
    """A split of the data set, or a part of one: `train[:80%]`. Of files that are named, any name is all of them."""
    base_model: PathText | None = None
    """The checkpoint before it was trained on these records, folder or Hub name: where solver.method retrain starts and
    objective.target_from base_model looks."""
    columns: tuple[str, ...] | None = None
    """Names of the columns of a CSV file that has no first line of names."""
    format: Literal["question_answer", "text", "chat", "classification", "image"] = "question_answer"
    """`classification`: text and label columns; `image`: image and label columns (see model.task)."""
    id_field: str = "record_id"
    """Column with the record id; when the column is missing, ids are `row-0`, `row-1`, ..."""
    subject_field: str | None = "subject_id"
    question_field: str = "question"
    answer_field: str = "answer"
    text_field: str = "text"
    messages_field: str = "messages"
    image_field: str = "image"
    """Images, or arrays of numbers from 0 to 255: height x width, x 3 where they are coloured."""
    label_field: str = "label"
    label_names: tuple[str, ...] | None = None
    """Classification: the word that stands for class 0, 1, ...; without it the label column's own text is used by a
    causal LM, and the checkpoint's id2label by a classifier."""
    prompt_template: str = "Question: {prompt}\nAnswer:"
    """question_answer and classification: text before the answer; `{prompt}` is the question or the text."""
    max_length: int | None = Field(default=None, ge=8)
    """Tokens per record, prompt and answer; null means the model's context length."""
    too_long: Literal["refuse", "truncate", "drop"] = "refuse"
    """What happens to longer records. `drop` never drops a record that is named (forget, holdout): that is refused."""
    pad_token: str | None = None
    """A token of the vocabulary to pad with, for tokenizers that have none (Llama 3's); it is masked everywhere."""
    erased: ErasedConfig | None = None
    """Erased before: in no retain, holdout or training set. Beside what the checkpoint's own record tells, or in its
    place where that is lost."""

    @model_validator(mode="after")
    def _columns_differ(self) -> "DataConfig":
        if not self.path:
            raise ValueError("path without a file; name at least one")
        used = {
            "question_answer": ("question_field", "answer_field"),
            "text": ("text_field",),
            "chat": ("messages_field",),
            "classification": ("text_field", "label_field"),
            "image": ("image_field", "label_field"),
        }[self.format]
        ids = ("id_field", "subject_field") if "label_field" not in used else ("id_field",)
        columns = [str(getattr(self, name)) for name in (*used, *ids)]
        if len(set(columns)) < len(columns):
            raise ValueError(f"{', '.join((*used, *ids))} must name different columns")
        if self.label_names is not None and self.format not in ("classification", "image"):
            raise ValueError(f"label_names belongs to the formats classification and image, not to {self.format}")
        for name in ("label_names", "columns"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values) or not all(values)):
                raise ValueError(f"{name} must be names that are all different, and at least one")
        return self


class SelectionConfig(StrictModel):
    """Names records: by subject, id, class, a file with one id a line, or (holdout only) all of another file."""

    subjects: tuple[str, ...] = ()
    record_ids: tuple[str, ...] = ()
    ids_file: PathText | None = None
    classes: tuple[int | str, ...] = ()
    """Classifiers: the records of these classes, by number from 0 or by name; of `forget` those not held out."""
    path: PathText | None = None
    name: str | None = None
    """Hub data set configuration name of `path`; data.name belongs to data.path alone."""
    split: str | None = None
    """Split of `path`, null: all of `train`; data.split belongs to data.path alone."""

    @model_validator(mode="after")
    def _names_something(self) -> "SelectionConfig":
        if self.path is None and (self.name is not None or self.split is not None):
            raise ValueError("name and split belong to path, which is not given; remove them")
        if not (self.subjects or self.record_ids or self.ids_file or self.classes or self.path):
            raise ValueError("an empty selection; name subjects, record_ids, ids_file, classes or (holdout only) path")
        return self


class CurvatureConfig(StrictModel):
    """Which product, and what is kept in memory between the products of one minibatch."""

    product: Literal["hessian", "gauss_newton"] = "gauss_newton"
    mode: Literal["auto", "cached", "recompute"] = "auto"
    """auto: cached where the measured size of what it keeps fits `memory_budget_gib`, else recompute."""
    memory_budget_gib: float | None = Field(default=None, gt=0.0)
    """Per rank, for what cached mode keeps. null: half of what is free on the device at the first product."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Records that go through the model at once on one rank. Changes memory and speed, never a result."""

    @property
    def scoring_batch(self) -> int:
        """Records that go through the model at once where nothing is differentiated."""
        return 2 * self.micro_batch_size


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
    gpus_per_worker: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of a GPU for every worker, where GPUs are used. Below 1 workers may share one, which NCCL refuses: their
    collectives go through the host (gloo), without training and at zero_stage 0 to 2. For trying things out."""
    cpus_per_worker: int = Field(default=1, ge=1)
    log_format: Literal["text", "json"] = "text"
    """json: driver and workers log to stderr in lines of JSON with their rank; Ray keeps those of the workers in the
    logs of its session."""
    placement_timeout_seconds: float = Field(default=600.0, gt=0.0, le=1e7)
    """How long a given cluster may take to have room (nodes may still join); a local Ray refuses at once."""
    collective_timeout_seconds: float = Field(default=1800.0, gt=0.0, le=1e7)
    """A collective that waits longer than this has lost a peer; ranks may load and write at different speeds."""
    call_timeout_seconds: float = Field(default=3600.0, gt=0.0, le=1e7)
    """A worker call that takes longer than this has hung."""
    max_restarts: int = Field(default=3, ge=0, le=1000)
    """How often a round goes on by itself, on new workers in a new place, after some were lost with their node, killed
    or fell silent. From its last state (save.state_every_steps, save.state_every_seconds), if it has saved one since
    it began or was restarted: what fails twice at the same step ends the run, as does an error that a worker raised."""

    @model_validator(mode="after")
    def _one_process(self) -> "ClusterConfig":
        if self.backend == "in_process" and self.num_workers != 1:
            raise ValueError("backend in_process has exactly one worker; set num_workers to 1 or backend to ray")
        if self.gpus_per_worker < 1 and self.use_gpu != "never" and self.zero_stage == 3:
            raise ValueError("workers that share a GPU cannot partition weights; set zero_stage to 0, 1 or 2")
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
    state_every_seconds: float | None = Field(default=600.0, gt=0.0)
    """Save the state of a round after the first step that ends this long after the last save; null: never."""
    state_every_steps: int | None = Field(default=None, ge=1)
    """Save it after every so many steps, too. It holds the fp32 weights (at most twice) and the method's vectors."""
    adapter: Literal["adapter", "merged"] = "adapter"
    """With model.adapter. adapter: the adapter alone, which peft opens on its base, in float32 unless `dtype` says
    otherwise. merged: a plain checkpoint with the base's names, in which the adapter is added to the base's weights."""


class TrainingSettings(StrictModel):
    """How a model is fine-tuned: accelerate + DeepSpeed inside the workers.

    Without dropout, layer drop, router noise or batch statistics, whatever the model's configuration asks for: a result
    depends on neither the number of workers nor the micro-batch.
    """

    epochs: int = Field(default=3, ge=1)
    """How often each record is seen, exactly."""
    batch_size: int = Field(default=16, ge=1)
    """Global records per optimiser step; what is left of an epoch makes a smaller last step."""
    learning_rate: float = Field(default=1e-4, gt=0.0, le=1e38)
    weight_decay: float = Field(default=0.01, ge=0.0)
    warmup_share: float = Field(default=0.1, ge=0.0, lt=1.0)
    max_gradient_norm: float = Field(default=1.0, gt=0.0)
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage of the training itself; null: the cluster's. Stage 2 is faster than 3 for small models."""

    def stage_in(self, cluster: ClusterConfig) -> int:
        """The training's own ZeRO stage, else the cluster's."""
        return cluster.zero_stage if self.zero_stage is None else self.zero_stage


class TrainConfig(TrainingSettings):
    """Fine-tuning instead of unlearning."""

    exclude_forget: bool = False
    """Leave out `forget`: trains the retrained reference. The holdout set is always left out."""
