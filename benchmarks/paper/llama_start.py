"""Write what the Llama comparisons start from: the demo's records, tokenizer and untrained model.

python benchmarks/paper/llama_start.py runs/paper/people
"""

import sys
from pathlib import Path

from distributed_unlearn.cluster.open import open_group
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.demo.run import create_initial
from distributed_unlearn.demo.settings import demo_settings
from distributed_unlearn.workers.client import Workers


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with open_group(ClusterConfig(backend="in_process", num_workers=1)) as group:
        create_initial(demo_settings(seed=0, short=False), Workers(group), folder)


if __name__ == "__main__":
    main()
