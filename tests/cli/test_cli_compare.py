"""`compare`, `report` and `check spectrum` on a tiny checkpoint: whole runs, a kill, what is refused, what is drawn."""

import json
from pathlib import Path

import pytest
import yaml
from browser import look_at, needs_browser
from command_line import assert_refused, call, succeed
from tiny_job import TinyJob

from distributed_unlearn.commands import compare as compare_command
from distributed_unlearn.records.comparison import read_comparison
from distributed_unlearn.records.spectrum import read_spectrum

pytestmark = pytest.mark.slow

NEVER = {"forget_matches_holdout": False}
SGD = {"method": "sgd", "learning_rate": 0.01, "gradient_batch": 6, "max_steps": 2, "stop": NEVER}
TOO_LARGE = {"method": "pinv_newton", "max_parameters": 10, "gradient_batch": 6, "curvature_batch": 4, "stop": NEVER}


def write(tiny: TinyJob, folder: Path, **changes: object) -> Path:
    job = yaml.safe_load(tiny.job.read_text())
    del job["output"], job["forget"]
    job["rounds"] = [{"subjects": ["person-0000"]}, {"subjects": ["person-0001"]}]
    job["train"] = {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2}
    tree = {
        "job": job,
        "methods": [
            {"label": "Cubic steps"},
            {"label": "SGD <fast>", "solver": SGD, "objective": {"name": "retain"}},
            {"label": "PINV", "solver": TOO_LARGE, "objective": {"name": "retain"}},
        ],
        "seeds": [0, 1],
        "noise_seeds": [5],
        "output": str(folder / "out"),
        **changes,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compared(tiny: TinyJob, tmp_path_factory) -> Path:
    """A comparison that was interrupted before its fourth cell, then run to its end; counts what was run when."""
    folder = tmp_path_factory.mktemp("compare")
    path = write(tiny, folder)
    real, ran = compare_command.run_session, []

    def counted(group, run, events):
        if len(ran) == 8:
            raise KeyboardInterrupt
        ran.append(Path(run.job.output).relative_to(folder / "out").as_posix())
        return real(group, run, events)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_command, "run_session", counted)
        with pytest.raises(KeyboardInterrupt):
            compare_command.run_compare(_config(path), _silent())
        (folder / "first.json").write_text(json.dumps(ran))
        ran.clear()
        compare_command.run_compare(_config(path), _silent())
        (folder / "second.json").write_text(json.dumps(ran))
        ran.clear()
        compare_command.run_compare(_config(path), _silent())
        assert ran == [], "everything was finished"
    return folder


def _config(path: Path):
    from distributed_unlearn.config.compare import load_compare

    return load_compare(path, [])


def _silent():
    import io

    from rich.console import Console

    return Console(file=io.StringIO(), width=110)


def test_a_killed_comparison_goes_on_where_it_was(compared):
    first, second = (json.loads((compared / f"{name}.json").read_text()) for name in ("first", "second"))
    # The original, two references, the same two with another seed; then the first seed of every method.
    assert [name.split("_")[0] for name in first[:5]] == ["models/original"] + 4 * ["models/retrained"]
    cells = [f"runs/{name}/seed_{seed}" for seed in (0, 1) for name in ("cubic-steps", "sgd-fast", "pinv")]
    assert first[5:] == cells[:3] and second == cells[3:]
    assert not list(compared.rglob(".result.json")), "what the next start would need, with a salt; all is written"


def test_a_comparison_holds_every_cell_and_its_distance_to_the_reference_of_its_round(compared):
    found = read_comparison(compared / "out")
    assert [(cell.label, cell.seed) for cell in found.cells] == [(n, s) for n in found.labels for s in (0, 1)]
    assert found.num_cells == 6 and found.num_rounds == 2
    assert found.reference(0) != found.reference(1) and found.original_tug_of_war is not None
    assert [r.seed for r in found.references] == [0, 0, 5, 5]
    assert all(r.tug_of_war is not None and r.tug_of_war <= 1.0 for r in found.references[2:])
    cells = {(cell.label, cell.seed): cell for cell in found.cells}
    assert "trainable parameters" in (cells["PINV", 0].failure or "") and not cells["PINV", 0].rounds
    for seed in (0, 1):
        rounds = cells["Cubic steps", seed].rounds
        # With a reference for each round the last one's is what the run itself was compared with.
        record = json.loads((compared / "out" / cells["Cubic steps", seed].folder / "record.json").read_text())
        assert rounds[1].tug_of_war == pytest.approx(record["rounds"][1]["tug_of_war"])
        assert rounds[0].tug_of_war is not None and record["rounds"][0]["tug_of_war"] is None
        assert record["config"]["solver"]["seed"] == seed and rounds[0].num_products > 0
    assert cells["SGD <fast>", 0].rounds[0].update_norm != cells["SGD <fast>", 1].rounds[0].update_norm


def test_the_last_line_is_one_object(compared, capsys):
    outcome = succeed(capsys, ["compare", str(compared / "compare.yaml")])
    line = json.loads(outcome.out.splitlines()[-1])
    assert set(line["methods"]) == {"Cubic steps", "SGD <fast>", "PINV"}
    assert line["methods"]["PINV"] == {
        "num_seeds": 0,
        "num_failures": 2,
        **dict.fromkeys(("tug_of_war", "tug_of_war_deviation", "update_norm", "wall_seconds", "num_products")),
    }
    assert line["methods"]["SGD <fast>"]["num_products"] == 0
    assert Path(line["report"]).is_file()


def test_a_report_has_every_figure_as_data(compared, capsys):
    out = compared / "report"
    outcome = succeed(capsys, ["report", str(compared / "out"), "--output", str(out), "--overwrite"])
    line = json.loads(outcome.out.splitlines()[-1])
    wanted = {"performance_tug_of_war", "performance_forget", "alpha", "gamma", "update_norm", "seconds", "products"}
    wanted |= {"losses_forget", "losses_retain", "losses_holdout"}
    assert wanted <= set(line["pictures"])
    comparison = read_comparison(compared / "out")
    for name in line["pictures"]:
        tree = json.loads((out / "data" / f"{name}.json").read_text())
        csv_lines = (out / "data" / f"{name}.csv").read_text().splitlines()
        assert csv_lines[0].split(",") == tree["header"] and len(csv_lines) == len(tree["rows"]) + 1 > 1
        assert "<svg" in (out / "pictures" / f"{name}.svg").read_text()
    rows = json.loads((out / "data" / "performance_tug_of_war.json").read_text())["rows"]
    (last,) = [row for row in rows if row[0] == "Cubic steps" and row[1] == 2]
    values = [cell.rounds[1].tug_of_war for cell in comparison.of("Cubic steps")]
    assert last[2] == pytest.approx(sum(values) / 2) and last[4:] == [min(values), max(values)]
    gammas = json.loads((out / "data" / "gamma.json").read_text())["rows"]
    assert {row[0] for row in gammas} == {"Cubic steps"} and {row[1] for row in gammas} == {1, 2}
    models = {row[0] for row in json.loads((out / "data" / "losses_forget.json").read_text())["rows"]}
    assert models == {"original", "retrained", "Cubic steps", "SGD <fast>"}


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_is_readable_on_a_phone_and_a_desk(compared, width, tmp_path):
    look = look_at(compared / "out" / "report" / "report.html", width, tmp_path)
    assert (look.inner_width, look.scroll_width, look.too_wide) == (width, width, [])
    assert (look.num_without_alternative, look.num_not_drawn, look.console) == (0, 0, [])


def test_spectra_of_a_training_end_at_what_the_training_writes(tiny: TinyJob, tmp_path, capsys):
    """An epoch's model is trained anew up to there: the last one is the checkpoint that the job itself writes."""
    base = ["forget=null", "train={epochs: 2, batch_size: 6, learning_rate: 0.01}", "model.trainable=['*norm*']"]
    trained = tmp_path / "trained"
    succeed(capsys, tiny.run(trained, *base))
    output = tmp_path / "along"
    command = ["check", "spectrum", str(tiny.job), f"output={output}", *base, "--epochs", "0,2"]
    line = json.loads(succeed(capsys, command).out.splitlines()[-1])
    along = read_spectrum(output)
    assert (line["method"], along.num_records, [p.epoch for p in along.points]) == ("exact", 12, [0, 2])
    assert all(p.num_products == along.dimension == len(p.eigenvalues) for p in along.points)
    other = ["forget=null", f"model.path={trained / 'checkpoint'}", "model.trainable=['*norm*']"]
    again = tmp_path / "again"
    succeed(capsys, ["check", "spectrum", str(tiny.job), f"output={again}", *other])
    (point,) = read_spectrum(again).points
    assert point.eigenvalues == pytest.approx(along.points[1].eigenvalues, abs=1e-4 * max(point.eigenvalues))
    assert point.eigenvalues != pytest.approx(along.points[0].eigenvalues, abs=1e-4 * max(point.eigenvalues))
    # Few Lanczos steps from a random start: the largest eigenvalue agrees.
    lanczos = tmp_path / "lanczos"
    options = ["--exact-up-to", "0", "--probes", "2", "--lanczos-steps", "30"]
    succeed(capsys, ["check", "spectrum", str(tiny.job), f"output={lanczos}", *other, *options])
    found = read_spectrum(lanczos)
    assert found.method == "lanczos" and found.points[0].num_products == 60
    assert found.points[0].eigenvalues[-1] == pytest.approx(point.eigenvalues[-1], rel=1e-3)
    names = succeed(capsys, ["report", str(output), str(lanczos), "--output", str(tmp_path / "r")]).out
    assert set(json.loads(names.splitlines()[-1])["pictures"]) == {"spectrum_1", "spectrum_1_rank", "spectrum_2"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": [{"label": "a b"}, {"label": "A-b"}]}, "labels with letters or digits that are all different"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"noise_seeds": [0]}, "noise_seeds names 0"),
        ({"sedes": [1]}, "sedes"),
        ({"methods": [{"label": "a", "solver": {"method": "sgd", "cubic_coefficient": 1.0}}]}, "cubic_coefficient"),
        ({"methods": [{"label": "a", "objective": {"name": "token_matched"}, "solver": {"method": "sgd"}}]}, None),
    ],
)
def test_a_wrong_comparison_is_refused_before_anything_starts(changes, sentence, tiny: TinyJob, tmp_path, capsys):
    path = write(tiny, tmp_path, **changes)
    if sentence is None:  # no mistake: the base job has a holdout set
        _config(path)
        return
    assert_refused(call(capsys, ["compare", str(path)]), 3, "configuration", sentence)
    assert not (tmp_path / "out").exists()


def test_a_report_of_nothing_is_refused(tiny: TinyJob, tmp_path, capsys):
    assert_refused(
        call(capsys, ["report", str(tmp_path)]), 4, "data", "without record.json, comparison.json or spectrum.json"
    )
    assert_refused(call(capsys, ["report", str(tmp_path / "no")]), 3, "configuration", "which is no folder")
    epochs = ["check", "spectrum", str(tiny.job), f"output={tmp_path / 'o'}", "--epochs"]
    assert_refused(call(capsys, [*epochs, "1,x"]), 3, "configuration", "--epochs 1,x")
    assert_refused(call(capsys, [*epochs, "1"]), 3, "configuration", "epochs for a job without a train section")
