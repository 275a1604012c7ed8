"""Makes tiny runs quick where their pictures are not looked at."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Half of a tiny run goes into drawing, most of the rest into searching the test process for garbage."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distributed_unlearn.report.drawing._svg", lambda figure: "<svg/>")
        yield
    gc.unfreeze()
