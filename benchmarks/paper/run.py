"""Run comparisons of the paper, one after the other; what is finished is not run again.

    python benchmarks/paper/run.py cnn_sample cnn_class cnn_sample_rounds cnn_class_rounds

Each prints its table and writes `benchmarks/results/NAME.json`: methods by round, settings, versions, hardware, seeds
and seconds. The files of this folder say what each comparison is. `spectrum` measures Figure 1 along the training of
the CNN; `python -m distributed_unlearn report FOLDER...` draws what is in `runs/paper/NAME`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from distributed_unlearn.cli import main as command_line
from distributed_unlearn.records import to_json
from distributed_unlearn.records.comparison import read_comparison
from distributed_unlearn.records.spectrum import read_spectrum
from distributed_unlearn.report.comparison import method_summaries

HERE, RUNS = Path(__file__).parent, Path("runs/paper")
FIVE_CLASSES = [
    "job.forget=null",
    "job.rounds=[{classes: [3]}, {classes: [8]}, {classes: [1]}, {classes: [5]}, {classes: [7]}]",
]
FIVE_FILES = [f"{{ids_file: {RUNS}/forget_ids_round_{index}.txt}}" for index in range(1, 6)]
FIVE_PEOPLE = [f"{{subjects: [person-{index:04d}]}}" for index in range(5)]
FIVE_AUTHORS = [f"{{subjects: [author-{index:03d}]}}" for index in range(5)]


def rounds(selections: list[str]) -> list[str]:
    """One round for each selection, in the place of all at once."""
    return ["job.forget=null", f"job.rounds=[{', '.join(selections)}]"]


def tofu(file: str) -> list[str]:
    """The Llama comparison on the first forty authors of TOFU."""
    return [
        f"job.data={{path: {file}, split: 'train[:800]'}}",
        "job.holdout={subjects: [author-036, author-037, author-038, author-039]}",
        "job.forget={subjects: [author-000, author-001, author-002, author-003, author-004]}",
    ]


def comparisons(file: str, model: str) -> dict[str, tuple[str, list[str]]]:
    """By name the file of a comparison and what is set otherwise in it."""
    return {
        "cnn_settings": ("cnn_digits_settings.yaml", []),
        "cnn_settings_class": ("cnn_digits_settings.yaml", ["job.forget={classes: [5]}"]),
        "cnn_sample": ("cnn_digits.yaml", []),
        "cnn_class": ("cnn_digits.yaml", ["job.forget={classes: [3]}"]),
        "cnn_sample_rounds": ("cnn_digits.yaml", rounds(FIVE_FILES)),
        "cnn_class_rounds": ("cnn_digits.yaml", FIVE_CLASSES),
        "resnet18_rounds": ("resnet18_digits.yaml", []),
        "llama_people": ("llama.yaml", []),
        "llama_people_rounds": ("llama.yaml", rounds(FIVE_PEOPLE)),
        "llama_tofu": ("llama.yaml", tofu(file)),
        "llama_tofu_rounds": ("llama.yaml", [*tofu(file), *rounds(FIVE_AUTHORS)]),
        "smollm2_tofu": ("smollm2_tofu.yaml", [f"job.data.path={file}", f"job.model.path={model}"]),
    }


def prepare(names: list[str]) -> None:
    """Write what the comparisons start from."""
    subprocess.run([sys.executable, HERE / "digits_start.py", RUNS], check=True)
    if any(name.startswith("llama") for name in names) and not (RUNS / "people" / "initial").is_dir():
        subprocess.run([sys.executable, HERE / "llama_start.py", RUNS / "people"], check=True)


LONG = ("loss_quantiles", "eigenvalues", "shares")
"""What figures are drawn from stays in the run's folder."""


def brief(tree: Any) -> Any:
    """A JSON tree without its long lists."""
    if isinstance(tree, dict):
        return {key: brief(value) for key, value in tree.items() if key not in LONG}
    return [brief(item) for item in tree] if isinstance(tree, list) else tree


def write_result(name: str, tree: Any) -> None:
    """A result in a file of its own."""
    target = HERE.parent / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(brief(to_json(tree)), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def measure_spectrum() -> int:
    """The retain Hessian's spectrum along the training of the CNN."""
    keys = (
        "model: {path: runs/paper/cnn, task: image_classification}",
        "curvature: {product: hessian, micro_batch_size: 300}",
    )
    job = "\n".join(
        (
            *keys,
            'data: {path: "sklearn:digits", split: "train[:600]", format: image}',
            "train: {epochs: 15, batch_size: 50, learning_rate: 1.0e-2}",
            "cluster: {backend: in_process, num_workers: 1, zero_stage: 0}",
            "output: runs/paper/spectrum\n",
        )
    )
    (RUNS / "spectrum.yaml").write_text(job, encoding="utf-8")
    code = command_line(["check", "spectrum", str(RUNS / "spectrum.yaml"), "--epochs", "0,1,5,15"])
    if code == 0:
        write_result("cnn_spectrum", read_spectrum(RUNS / "spectrum"))
    return code


def main() -> int:
    known = comparisons("data/tofu/full.jsonl", "HuggingFaceTB/SmolLM2-135M-Instruct")
    parser = argparse.ArgumentParser(description="Run comparisons of the paper.")
    parser.add_argument(
        "names", nargs="+", choices=[*known, "spectrum"], metavar="NAME", help=", ".join([*known, "spectrum"])
    )
    parser.add_argument("--tofu", default="data/tofu/full.jsonl", help="TOFU with record and subject ids")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    prepare(arguments.names)
    for name in arguments.names:
        if name == "spectrum":
            code = measure_spectrum()
        else:
            file, changes = comparisons(arguments.tofu, arguments.model)[name]
            code = command_line(["compare", str(HERE / file), *changes, f"output={RUNS / name}"])
            if code == 0:  # means and spreads beside it
                found = read_comparison(RUNS / name)
                write_result(name, {"comparison": found, "summary": method_summaries(found)})
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
