"""`demo --service`: the story that it tells is what happened, and it can be checked afterwards."""

import io
import json

import pytest
from rich.console import Console

from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.demo.service import run_service_demo
from distributed_unlearn.demo.settings import demo_settings
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.requests import list_requests
from distributed_unlearn.service.rounds_book import list_rounds

ALONE = ClusterConfig(backend="in_process", num_workers=1, zero_stage=0, use_gpu="never")


@pytest.mark.slow
def test_two_rounds_are_committed_one_is_rolled_back_and_the_papers_verify(tmp_path):
    settings, folder, text = demo_settings(0, short=True), tmp_path / "demo", io.StringIO()
    told = run_service_demo(settings, ALONE, folder, False, Console(file=text, width=110))
    ledger = open_ledger(str(folder / "service" / "ledger.db"))
    states = [entry.state.value for entry in list_rounds(ledger)]
    summary = json.loads(text.getvalue().splitlines()[-1])
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["as_told"] == told == (states == ["committed", "rolled_back", "committed"]), text.getvalue()
    assert told, text.getvalue()
    assert [request.state.value for request in list_requests(ledger)] == ["erased"] * 3
    assert "round 2 is rolled back: " in text.getvalue() and "the published model is the same" in text.getvalue()
    assert text.getvalue().count(".json verifies: deleted in round") == 3
    with pytest.raises(ConfigError, match="with an earlier demo"):
        run_service_demo(settings, ALONE, folder, False, Console(file=text))
