"""Entrypoint of a Ray job: `python jobs/demo.py [--short] --output FOLDER ...`, exit code of the command line."""

import sys

from distributed_unlearn.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
