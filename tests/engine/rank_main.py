"""One rank's process: `python -m tests.engine.rank_main module:function RANK WORLD_SIZE FOLDER`."""

import importlib
import os
import pickle
import sys
import traceback
from pathlib import Path

from tests.engine.ranks import Place


def main() -> None:
    program, rank, world_size, folder = sys.argv[1:]
    place = Place(int(rank), int(world_size), Path(folder))
    module, function = program.split(":")
    try:
        arguments = pickle.loads((place.folder / "arguments").read_bytes())
        result = getattr(importlib.import_module(module), function)(place, arguments)
        place.file("result").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: tearing down a process group whose peers are gone may wait for them.
    os._exit(code)


if __name__ == "__main__":
    main()
