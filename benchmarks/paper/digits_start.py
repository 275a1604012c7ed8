"""Write what the digits comparisons start from: models with random weights, and which records are forgotten.

    python benchmarks/paper/digits_start.py runs/paper

Nothing is downloaded. Ids are those of scikit-learn's digits: a tenth of the 600 training records, drawn by the seed,
all at once and in five rounds; and as many of the records on which settings are chosen.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

NUM_TRAINING, NUM_FORGOTTEN, NUM_ROUNDS = 600, 60, 5


def write_ids(path: Path, indices: np.ndarray) -> None:
    path.write_text("".join(f"digit-{index:04d}\n" for index in sorted(indices)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write what the digits comparisons start from.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder
    if not (folder / "cnn").is_dir():
        script = Path(__file__).parents[2] / "jobs" / "digits_checkpoints.py"
        subprocess.run([sys.executable, script, folder, "--seed", str(arguments.seed)], check=True)
    generator = np.random.default_rng(arguments.seed)
    chosen = generator.permutation(NUM_TRAINING)[:NUM_FORGOTTEN]
    write_ids(folder / "forget_ids.txt", chosen)
    for index, part in enumerate(np.array_split(chosen, NUM_ROUNDS)):
        write_ids(folder / f"forget_ids_round_{index + 1}.txt", part)
    write_ids(folder / "settings_ids.txt", NUM_TRAINING + generator.permutation(NUM_TRAINING)[:NUM_FORGOTTEN])


if __name__ == "__main__":
    main()
