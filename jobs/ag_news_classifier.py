"""Write what the AG-News recipes start from: a sequence classifier on a language model, records, ids to forget.

    python jobs/ag_news_classifier.py runs/smollm2 PATH/test.csv runs/ag_news       # --overwrite replaces the model

The first argument is a causal language model (a folder or a hub name), the second AG-News as it is published: a CSV
file without a header, with class 1 to 4, title and description in a row. Writes `model` (the language model with a new,
random layer from its last hidden state to four classes), `records.jsonl` (--num-records of them, drawn by --seed, then
a fifth as many that are never trained on) and `forget_ids.txt` (a twentieth of the former). A text is the headline, of
11 tokens in the mean; with `--text all` the description follows it (56 tokens).
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distributed_unlearn.errors import ConfigError
from distributed_unlearn.files import complete_folder, refuse_existing

NAMES = ("World", "Sports", "Business", "Sci/Tech")


def write_records(source: Path, folder: Path, num_records: int, with_description: bool, seed: int) -> None:
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(rows))[: num_records + num_records // 5]
    lines = []
    for index in chosen:
        number, title, description = rows[index]
        text = f"{title}. {description}" if with_description else title
        record = {"record_id": f"ag-{index:04d}", "text": text, "label": NAMES[int(number) - 1]}
        lines.append(json.dumps(record) + "\n")
    (folder / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    forget = sorted(chosen[:num_records][generator.permutation(num_records)[: num_records // 20]])
    (folder / "forget_ids.txt").touch(mode=0o600)  # who asked to be forgotten is for nobody else
    (folder / "forget_ids.txt").write_text("".join(f"ag-{index:04d}\n" for index in forget), encoding="utf-8")


def write_model(base: str, folder: Path, overwrite: bool, seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(seed)
    names = dict(enumerate(NAMES))
    model = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, id2label=names, label2id={name: number for number, name in names.items()}
    )
    model.config.pad_token_id = tokenizer.pad_token_id  # a decoder finds the end of a text by it
    with complete_folder(folder / "model", overwrite) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the checkpoint and records of the AG-News recipes.")
    parser.add_argument("base", help="a causal language model: folder or hub name")
    parser.add_argument("source", type=Path, help="AG-News as a CSV file without a header")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-records", type=int, default=2000)
    parser.add_argument("--text", choices=["headline", "all"], default="headline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace the model if it exists")
    arguments = parser.parse_args()
    try:
        refuse_existing(arguments.folder / "model", arguments.overwrite)
    except ConfigError as error:
        raise SystemExit(f"{error.got}: choose another folder or give --overwrite") from None
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_records(arguments.source, arguments.folder, arguments.num_records, arguments.text == "all", arguments.seed)
    write_model(arguments.base, arguments.folder, arguments.overwrite, arguments.seed)


if __name__ == "__main__":
    main()
