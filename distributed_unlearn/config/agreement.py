"""What sections of a job or an evaluation must agree on."""

from collections.abc import Sequence

from distributed_unlearn.config.sections import DataConfig, ModelConfig, SelectionConfig


def require_records_of_task(model: ModelConfig, data: DataConfig, selections: Sequence[SelectionConfig | None]) -> None:
    """Records and selections are of the kind that the model predicts.

    Raises:
        ValueError: they are not.
    """
    task = model.task
    wanted = {"sequence_classification": "classification", "image_classification": "image"}.get(task)
    if wanted is not None and data.format != wanted:
        raise ValueError(f"data.format {data.format} with model.task {task}, which needs data.format {wanted}")
    if wanted is None and data.format == "image":
        raise ValueError("data.format image needs model.task image_classification")
    if wanted is not None and "prompt_template" in data.model_fields_set:
        raise ValueError(f"data.prompt_template has no meaning with model.task {task}; remove it")
    if wanted is None and any(selection is not None and selection.classes for selection in selections):
        raise ValueError("classes select records of a classifier; set model.task, or select in another way")
