"""Run log, progress, tables, figures and page: what they write, and what they must never do."""

import dataclasses
import html
import io
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from browser import look_at, needs_browser
from rich.console import Console

from distributed_unlearn.records import RoundRecord, SetScores, StepRecord, Verdict
from distributed_unlearn.records.verdict import RetainVerdict
from distributed_unlearn.report import progress as progress_module
from distributed_unlearn.report.figures import comparison_pictures, draw_steps, find_retrained, steps_pictures
from distributed_unlearn.report.page import Summary, write_page
from distributed_unlearn.report.progress import RoundProgress, stage
from distributed_unlearn.report.run_log import RunLog
from distributed_unlearn.report.tables import MethodRow, comparison_table, facts_table, number

FIRST_ORDER = {
    name: None
    for name in ("alpha", "gamma", "cubic_coefficient", "smallest_ritz_value", "largest_ritz_value", "residual")
    + ("predicted_reduction", "actual_reduction", "acceptance_ratio")
}


def step_record(step: int, accepted: bool = True) -> StepRecord:
    return StepRecord(
        step=step,
        loss=3.0 / (step + 1),
        gradient_norm=1.0,
        alpha=0.2,
        gamma=10.0,
        cubic_coefficient=100.0,
        update_norm=0.2 if accepted else 0.0,
        smallest_ritz_value=-0.1,
        largest_ritz_value=3.0,
        residual=0.01,
        predicted_reduction=0.1,
        actual_reduction=0.08 if accepted else -5.0,
        acceptance_ratio=0.8 if accepted else -50.0,
        accepted=accepted,
        num_rejections=0 if accepted else 8,
        num_krylov_steps=3,
        num_products=3,
        result="CONVERGED",
        wall_seconds=1.5,
        terms={"forget_distance_nats_per_token": 1.0 / (step + 1)},
    )


def set_scores(accuracy: float) -> SetScores:
    return SetScores(num_records=40, num_answer_tokens=900, loss_nats_per_token=1.25, exact_memorisation=accuracy)


def all_sets(*accuracies: float) -> dict[str, SetScores]:
    return {name: set_scores(value) for name, value in zip(("forget", "retain", "holdout"), accuracies, strict=True)}


ROWS = [
    MethodRow("original", all_sets(1.0, 0.99, 0.4), 0.38, None, None),
    MethodRow("retrained model", all_sets(0.4, 0.99, 0.4), 1.0, 900.0, None, "reference"),
    MethodRow("scurenewton", all_sets(0.42, 0.97, 0.4), 0.96, 65.4, 1230, "[bold] <script>"),
]
STEPS = (step_record(0), step_record(1, accepted=False), step_record(2))
ROUND = RoundRecord(
    round_index=0,
    num_forget_records=40,
    num_retain_records=360,
    holdout_loss_nats_per_token=3.1,
    stop_reason="max_steps <u>&amp;",
    num_steps=3,
    num_products=9,
    update_norm=0.3,
    wall_seconds=12.0,
    steps=STEPS,
    before=ROWS[0].scores,
    after={**ROWS[2].scores, "forget_round_1": set_scores(0.41)},
    verdict=Verdict(None, RetainVerdict("kept", 360, 0.01, 0.02)),
    tug_of_war=0.96,
)


def console(terminal: bool = False) -> tuple[Console, io.StringIO]:
    buffer = io.StringIO()
    return Console(file=buffer, force_terminal=terminal, width=200, color_system=None), buffer


def shown(renderable: object) -> str:
    out, buffer = console()
    out.print(renderable)
    return buffer.getvalue()


def test_run_log_writes_json_lines_and_tensorboard(tmp_path):
    with RunLog(tmp_path / "run") as log:
        log.log("step", 0, dataclasses.asdict(step_record(0)))
        lines = log.path.read_text(encoding="utf-8").splitlines()  # flushed before close
        assert len(lines) == 1
        log.log("round", 0, {"after": {"forget": {"loss": 3.0}}, "reason": "patience"})
    first, second = (json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines())
    assert first["kind"] == "step" and first["step"] == 0 and first["elapsed_seconds"] >= 0.0
    assert first["values"] == dataclasses.asdict(step_record(0))
    assert "non_finite" not in first
    assert second["values"] == {"after": {"forget": {"loss": 3.0}}, "reason": "patience"}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"step/loss", "step/terms/forget_distance_nats_per_token", "round/after/forget/loss"} <= set(tags)
    assert events.Scalars("step/loss")[0].value == pytest.approx(3.0)
    assert "step/result" not in tags


def test_run_log_turns_non_finite_numbers_into_null_and_says_so(tmp_path):
    with RunLog(tmp_path) as log:
        log.log("step", 1, {"loss": math.nan, "terms": {"a": math.inf, "b": 1.0}, "list": [1.0, -math.inf]})
    text = log.path.read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    line = json.loads(text)
    assert line["values"] == {"loss": None, "terms": {"a": None, "b": 1.0}, "list": [1.0, None]}
    assert line["non_finite"] == {"loss": "nan", "terms.a": "inf", "list.1": "-inf"}


def test_run_log_keeps_one_earlier_run_aside_and_never_mixes_two(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        with RunLog(tmp_path) as log:
            log.log("step", 0, {"loss": loss})
    with RunLog(tmp_path) as log:
        pass  # ended before its first line
    with RunLog(tmp_path) as log:
        log.log("step", 0, {"loss": 4.0})

    def losses(name):
        return [json.loads(line)["values"]["loss"] for line in (tmp_path / name).read_text("utf-8").splitlines()]

    assert losses("metrics.jsonl") == [4.0] and losses("metrics.previous.jsonl") == [3.0]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"tensorboard", "tensorboard.previous"}
    assert len(list((tmp_path / "tensorboard.previous").iterdir())) == 1


def test_run_log_refuses_objects_and_writes_nothing_then(tmp_path):
    with RunLog(tmp_path) as log:
        with pytest.raises(TypeError, match="cannot log object at 'a.b'"):
            log.log("step", 0, {"a": {"b": object()}})
    assert log.path.read_text(encoding="utf-8") == ""


def test_progress_prints_few_plain_lines_without_a_terminal():
    out, buffer = console()
    with RoundProgress(out, 12, "round 1") as bar:
        for step in range(12):
            bar.update(step_record(step, accepted=step != 4), {"retain loss": 0.02})
    lines = buffer.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [
        f"round 1: step {n} of 12" for n in (1, 5, 10, 12)
    ]  # the last one always shows
    assert "alpha 0.200" in lines[1] and "gamma 10.0" in lines[1] and "M 100" in lines[1]
    assert "forget distance 1.00" in lines[1] and "retain loss 0.0200" in lines[1] and "accepted yes" in lines[1]
    assert "accepted no after 8 rejected" in lines[2]


def test_progress_prints_after_ten_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    out, buffer = console()
    with RoundProgress(out, 12, "round 1") as bar:
        for step, moment in enumerate((1.0, 2.0, 11.5, 12.0)):
            now[0] = moment
            bar.update(step_record(step), {})
        assert [line.split()[3] for line in buffer.getvalue().splitlines()[1:]] == ["1", "3"]


def test_progress_shows_a_first_order_step_and_a_terminal_bar():
    out, buffer = console(terminal=True)
    with RoundProgress(out, 3, "round 1") as bar:
        bar.update(dataclasses.replace(step_record(0), terms={}, **FIRST_ORDER), {})
    last = buffer.getvalue()
    assert "step 1 of 3" in last and "loss 3.00" in last and "alpha" not in last


@pytest.mark.parametrize("terminal", [False, True])
def test_stage_says_how_long_and_whether_it_failed(terminal):
    out, buffer = console(terminal)
    with stage(out, "loading"):
        pass
    with pytest.raises(RuntimeError), stage(out, "saving"):
        raise RuntimeError
    assert re.search(r"loading: done in \d+\.\d s", buffer.getvalue())
    assert re.search(r"saving: failed in \d+\.\d s", buffer.getvalue())


def test_stage_takes_no_markup():
    out, buffer = console(terminal=True)
    with stage(out, "loading runs/[/a] [bold]b"):
        pass
    assert "loading runs/[/a] [bold]b: done in" in buffer.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (1230, "1,230"),
        (0.0, "0"),
        (0.03, "0.03000"),
        (1.0, "1.000"),
        (99999.0, "99999"),
        (1e-6, "1.000e-06"),
    ]
    + [(-2.5, "-2.500"), (math.nan, "nan"), (-math.inf, "-inf")],
)
def test_number(value, text):
    assert number(value) == text


def test_tables_show_every_quantity_and_take_no_markup():
    text = shown(comparison_table(ROWS, 110))
    for cell in ("retrained model", "0.970", "0.960", "65.4", "1,230", "[bold] <script>", "–"):
        assert cell in text
    assert "134.5 M" in shown(
        facts_table("Plan", ("quantity", "value", "why"), [("parameters", "134.5 M", "trainable")])
    )


def test_a_comparison_folds_on_a_narrow_terminal():
    out = Console(file=io.StringIO(), width=80, color_system=None)
    out.print(comparison_table(ROWS, out.width))
    text = out.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    lines = [line for line in text.splitlines() if "1.250 / " in line]
    assert len(lines) == 3 * len(ROWS)  # a line for each set of each method, none broken
    assert [line.split("│")[2].strip() for line in lines[:3]] == ["forget", "retain", "holdout"]
    assert "scurenewton [2]" in text and "[2] [bold] <script>" in text


def test_tags_of_tensorboard_have_no_spaces(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path) as log:
        log.log("cubic steps", 0, {"forget distance": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["cubic_steps/forget_distance"]


def test_find_retrained():
    assert find_retrained(ROWS) is ROWS[1]
    assert find_retrained(ROWS[:1]) is None


def test_pictures_are_svg_with_text_and_differ_with_the_data():
    pictures = [*comparison_pictures(ROWS), *steps_pictures(STEPS)]
    assert [picture.name for picture in pictures[:2]] == ["memorisation", "closeness"]
    for picture in pictures:
        ElementTree.fromstring(picture.svg)  # well-formed
        assert "<text" in picture.svg and picture.title and picture.help.endswith(".")
        assert len({item.alternative for item in pictures}) == len(pictures)
    assert "scurenewton: forget 0.42, retain 0.97, holdout 0.40" in pictures[0].alternative
    assert "retrained model 1.00" in pictures[1].alternative
    assert comparison_pictures(ROWS)[0].svg == pictures[0].svg != comparison_pictures(ROWS[:1])[0].svg
    assert comparison_pictures([]) == []


def test_rejected_steps_carry_a_cross_and_only_finite_values_are_drawn():
    bad = dataclasses.replace(step_record(3), loss=math.nan, actual_reduction=-math.inf)
    lines = [line for figure in draw_steps([*STEPS, bad]) for line in figure.axes[0].lines]
    crosses = [line for line in lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert len(crosses) == 7  # loss, distance, alpha, gamma, M, predicted, actual; the applied length has none
    assert all(list(line.get_xdata()) == [2] for line in crosses)  # steps are counted from 1
    dots = [line for line in lines if line.get_marker() in ("o", "s")]
    assert len(dots) == 8 and all(2 not in line.get_xdata() for line in dots)
    assert all(math.isfinite(value) for line in lines for value in line.get_ydata())
    help = {picture.help for picture in steps_pictures(STEPS)}
    assert all("A cross is a step rejected for good (1 of 3)." in text for text in help)
    assert not any("cross" in picture.help for picture in steps_pictures(STEPS[:1]))


def test_a_length_that_was_not_measured_is_not_drawn():
    step = dataclasses.replace(step_record(0), update_norm=None, **FIRST_ORDER)
    assert [picture.name for picture in steps_pictures([step])] == ["objective", "forget_distance"]


@pytest.mark.filterwarnings("error")
def test_pictures_survive_missing_and_non_finite_values():
    bad = dataclasses.replace(step_record(3), loss=math.nan, actual_reduction=-math.inf, terms={})
    assert steps_pictures([*STEPS, bad]) and steps_pictures([dataclasses.replace(step_record(0), **FIRST_ORDER)])
    assert steps_pictures([]) == []
    rows = [dataclasses.replace(row, tug_of_war=None, scores={"forget": set_scores(0.5)}) for row in ROWS]
    assert [picture.name for picture in comparison_pictures(rows)] == ["memorisation"]


class _Checker(HTMLParser):
    """Collects tags, addresses and text, and checks that tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


SUMMARY = Summary("Title <b>", "one & <i>two</i>", ("NOT <u>forgotten",), False, (("Model", "a&b"), ("Date", "now")))


def _page(tmp_path, summary=SUMMARY):
    path = tmp_path / "new" / "report.html"
    write_page(path, summary, ROWS, comparison_pictures(ROWS), [(ROUND, steps_pictures(STEPS))])
    return path


def test_page_is_self_contained_balanced_and_escaped(tmp_path):
    source = _page(tmp_path).read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(source)
    assert checker.open == []
    assert len(checker.addresses) == 8
    assert all(address.startswith("data:image/svg+xml;base64,") for address in checker.addresses)
    assert not checker.tags & {"script", "b", "i", "u", "link", "iframe"}
    assert {"details", "table", "img", "dl", "figcaption"} <= checker.tags
    assert "http" not in source and "url(" not in source and "@import" not in source
    assert "prefers-color-scheme: dark" in source and 'class="verdict bad"' in source
    for text in (
        "Title <b>",
        "one & <i>two</i>",
        "NOT <u>forgotten",
        "a&b",
        "[bold] <script>",
        "max_steps <u>&amp;",
        "0.960",
        "3 steps",
        "CONVERGED",
    ):
        assert text in checker.text


def test_page_says_first_what_was_asked_and_what_came_of_it(tmp_path):
    source = _page(tmp_path).read_text(encoding="utf-8")
    order = [source.index(text) for text in ("<h1>", "one &amp;", "NOT &lt;u&gt;", "Model", "Comparison", "<figure>")]
    assert order == sorted(order) and source.index("<h2>Round 1") < source.index("<h2>Words")
    for word in ("nats", "memorised", "Tug-of-War", "holdout set", "alpha", "gamma", "<dt>M</dt>"):
        assert word in source[source.index("<h2>Words") :]
    assert all(f'alt="{html.escape(p.alternative)}"' in source for p in (*comparison_pictures(ROWS),))


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_a_phone_and_a_desk(width, tmp_path):
    """Nothing but the folded step table may be wider than the window."""
    look = look_at(_page(tmp_path), width, tmp_path)
    assert (look.inner_width, look.scroll_width, look.too_wide) == (width, width, [])
    assert look.row_display == ("block" if width == 390 else "table-row")
    assert (look.num_without_alternative, look.num_not_drawn, look.console) == (0, 0, [])
