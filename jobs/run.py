"""Entrypoint of a Ray job: `python jobs/run.py JOB.yaml [section.key=value ...]`, exit code of the command line."""

import sys

from distributed_unlearn.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
