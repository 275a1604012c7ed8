"""One evaluation on an open worker group: what is refused before anything is loaded, then an `EvaluationRecord`."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from distributed_unlearn.config import EvaluateConfig, MetricGroup, ModelConfig
from distributed_unlearn.data.perturbed import PerturbedSet
from distributed_unlearn.data.prepare import PreparedData, prepare_data
from distributed_unlearn.errors import DataError, ModelError
from distributed_unlearn.evaluation.bench import Bench, Part
from distributed_unlearn.evaluation.cache import EVALUATOR_VERSION, EvidenceCache, content_key
from distributed_unlearn.evaluation.depth import Depth
from distributed_unlearn.evaluation.gather import Condition, Gatherer, Subject
from distributed_unlearn.evaluation.needs import wanted_metrics
from distributed_unlearn.evaluation.scores import Scores
from distributed_unlearn.evaluation.watch import Watch
from distributed_unlearn.evaluation.written import Perturbed, PerturbedName, Writing, Written, load_perturbed_sets
from distributed_unlearn.files import expand_home
from distributed_unlearn.models.base_of_adapter import opened_as, reference_model
from distributed_unlearn.models.checkpoint import find_commit, load_model_config
from distributed_unlearn.models.families import family_of
from distributed_unlearn.models.fit import check_checkpoint
from distributed_unlearn.models.processor import Tokenizer, context_length, load_tokenizer
from distributed_unlearn.models.reference import require_comparable
from distributed_unlearn.provenance import hash_folder, package_versions
from distributed_unlearn.records.evaluation import EvaluatedModel, EvaluationRecord, NotMeasured
from distributed_unlearn.workers.client import Workers
from distributed_unlearn.workers.group import WorkerGroup


@dataclass(frozen=True, eq=False)
class PreparedEvaluation:
    """An evaluation whose records are read and whose checkpoints are hashed; nothing has been started."""

    config: EvaluateConfig
    wanted: frozenset[MetricGroup]
    not_measured: tuple[NotMeasured, ...]
    subjects: tuple[Subject, ...]
    data: PreparedData
    sets: dict[str, np.ndarray]
    perturbed: dict[PerturbedName, PerturbedSet]
    tokenizer: Tokenizer | None
    context_length: int | None


def prepare_evaluation(config: EvaluateConfig) -> PreparedEvaluation:
    """Everything that can be refused before a weight is loaded; reads the records.

    Raises:
        ConfigError: a metric that is named and lacks something.
        ModelError: a checkpoint that cannot be opened, or a reference that cannot be compared with.
        DataError: records, selections or wrong answers that are not what they should be.
    """
    wanted, not_measured = wanted_metrics(config)
    models = {"model": config.model}
    for role, path in (("retrained", config.retrained), ("retrained_again", config.retrained_again)):
        if path is not None:
            models[role] = reference_model(config.model, path)
    for role, model in models.items():
        check_checkpoint(model, config.cluster.zero_stage)
        if role != "model":
            require_comparable(config.model, model, config.data.pad_token)
            _require_one_kind(config.model, model)
    data = prepare_data(config.model, config.data, (config.forget,), config.holdout)
    sets = _sets(config, data)
    hf_config = load_model_config(config.model)
    is_text = config.model.task != "image_classification"
    tokenizer = load_tokenizer(config.model, config.data.pad_token) if is_text else None
    perturbed = _perturbed(config, data, sets, tokenizer, hf_config)
    _require_records(config, wanted, sets)
    subjects = tuple(Subject(role, model, checkpoint_hash(model)) for role, model in models.items())
    length = family_of(config.model.task).context_length(hf_config)
    return PreparedEvaluation(config, wanted, not_measured, subjects, data, sets, perturbed, tokenizer, length)


def _require_one_kind(model: ModelConfig, reference: ModelConfig) -> None:
    """Refuse to compare an adapter with a whole model, or adapters on different bases, weight by weight."""
    mine, its = opened_as(model), opened_as(reference)
    if (mine.adapter is None) != (its.adapter is None) or (mine.adapter is not None and mine.path != its.path):
        raise ModelError(
            f"a retrained reference '{reference.path}' that is opened otherwise than '{model.path}'",
            "two whole models, or two adapters on one base",
            "merge the adapters into their base (save.adapter merged)",
        )


def _sets(config: EvaluateConfig, data: PreparedData) -> dict[str, np.ndarray]:
    """Sorted records by set; of larger ones a sample, the same for every model and in every evaluation."""
    partition = data.partition
    found = {"forget": partition.forget_rounds[0], "retain": partition.retain(0), "holdout": partition.holdout}
    most, generator = config.max_records_per_set, np.random.default_rng(0)
    return {
        name: indices if most is None or len(indices) <= most else np.sort(generator.choice(indices, most, False))
        for name, indices in found.items()
        if len(indices)
    }


def _perturbed(
    config: EvaluateConfig,
    data: PreparedData,
    sets: dict[str, np.ndarray],
    tokenizer: Tokenizer | None,
    hf_config: object,
) -> dict[PerturbedName, PerturbedSet]:
    if config.perturbed is None or config.model.task != "causal_lm":
        return {}
    assert tokenizer is not None
    ids = {name: frozenset(data.corpus.record_ids[index] for index in sets[name]) for name in ("forget", "retain")}
    length = context_length(hf_config, config.data.max_length)
    return load_perturbed_sets(ids, config.perturbed, config.data.prompt_template, tokenizer, length)


def _require_records(config: EvaluateConfig, wanted: frozenset[MetricGroup], sets: dict[str, np.ndarray]) -> None:
    relearn = config.stress.relearn
    if "relearned" in wanted and relearn is not None and relearn.num_records >= len(sets["forget"]):
        raise DataError(
            f"stress.relearn of {relearn.num_records} record(s) and a forget set of {len(sets['forget'])}",
            "forget records that are left to be scored",
            "lower stress.relearn.num_records",
        )


def checkpoint_hash(config: ModelConfig) -> str:
    """SHA-256 over a checkpoint's files, tokenizer included, and an adapter's base; of a hub model over its commit."""
    opened = opened_as(config)
    parts: dict[str, object] = {"task": config.task}
    paths = {config.path, opened.path, *([] if opened.adapter is None else [getattr(opened.adapter, "path", "")])}
    for number, path in enumerate(sorted(path for path in paths if path)):
        folder = Path(expand_home(path))
        if folder.is_dir():
            suffixes = (".safetensors", ".json", ".jinja", ".model")
            found = hash_folder(folder, suffixes, below=False)
            parts[str(number)] = {name: value for name, value in found.items() if name != "unlearning.json"}
        else:
            commit = find_commit(config.model_copy(update={"path": path, "adapter": None}))
            parts[str(number)] = [path, commit or config.revision]
    return content_key("checkpoint", parts)


def evaluate(group: WorkerGroup, prepared: PreparedEvaluation, cache_folder: Path, watch: Watch) -> EvaluationRecord:
    """Measure a prepared evaluation; every part that the cache has is taken from there.

    Raises:
        UserError: anything that the user can act on; what was measured until then is in the cache.
    """
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    bench = _bench(Workers(group), prepared, cache_folder, watch)
    scores, depth = Scores(bench), _depth(bench)
    parts = _parts(bench, prepared, scores, depth)
    # The reference first: it is kept on the hosts while the others are compared with it.
    for subject in sorted(bench.subjects, key=lambda subject: subject.role != "retrained"):
        for part in parts:
            part.gather(subject)
    bench.gatherer.end()
    rows = tuple(row for part in parts for row in part.rows())
    models = {s.role: EvaluatedModel(s.config.path, s.sha256) for s in bench.subjects}
    return EvaluationRecord(
        started_at=started,
        config=_without_ids(prepared.config),
        versions=package_versions(),
        evaluator_version=EVALUATOR_VERSION,
        model=models["model"],
        retrained=models.get("retrained"),
        retrained_again=models.get("retrained_again"),
        num_records={name: len(indices) for name, indices in bench.sets.items()},
        rows=rows,
        not_measured=prepared.not_measured,
        loss_quantiles=scores.loss_quantiles(),
        depth_by_block=None if depth is None else depth.by_block(),
        wall_seconds=time.monotonic() - clock,
        num_cached=bench.gatherer.num_cached,
    )


def _bench(workers: Workers, prepared: PreparedEvaluation, cache_folder: Path, watch: Watch) -> Bench:
    config = prepared.config
    gatherer = Gatherer(workers, EvidenceCache(cache_folder), config.cluster.zero_stage, config.micro_batch_size, watch)
    return Bench(
        config,
        prepared.wanted,
        prepared.subjects,
        prepared.data.corpus,
        prepared.sets,
        prepared.tokenizer,
        prepared.context_length,
        gatherer,
    )


def _depth(bench: Bench) -> Depth | None:
    settings = bench.config.depth
    return Depth(bench, settings) if settings is not None and "depth" in bench.wanted else None


def _parts(bench: Bench, prepared: PreparedEvaluation, scores: Scores, depth: Depth | None) -> list[Part]:
    """In the order in which they are measured: the model as it is first."""
    config = bench.config
    writing = None if config.generation is None or not bench.is_language_model else Writing(bench, config.generation)
    found: list[Part] = [scores]
    if bench.wanted & {"truth_ratio", "forget_quality", "model_utility"}:
        found.append(Perturbed(bench, prepared.perturbed, writing))
    if writing is not None and config.generation is not None and bench.wanted & {"rouge", "verbmem", "knowmem"}:
        found.append(Written(bench, writing, config.generation.max_records_per_set))
    if depth is not None:
        found.append(depth)
    if "quantised" in bench.wanted:
        found.append(Scores(bench, Condition(quantise=config.stress.quantise)))
    if "relearned" in bench.wanted and config.stress.relearn is not None:
        chosen = np.random.default_rng(0).choice(bench.sets["forget"], config.stress.relearn.num_records, False)
        found.append(Scores(bench, Condition(relearn=config.stress.relearn, relearned=np.sort(chosen))))
    return found


def _without_ids(config: EvaluateConfig) -> dict[str, object]:
    """The resolved file; who is to be forgotten or held out is said by kind alone."""
    tree: dict[str, object] = config.model_dump(mode="json")
    for name in ("forget", "holdout"):
        section = tree[name]
        if isinstance(section, dict):
            tree[name] = {key: "given" for key, value in section.items() if value}
    return tree
