"""One self-contained HTML page about a run: no script, nothing loaded from elsewhere, every text escaped.

First what was asked, the verdict and the circumstances; then the comparison, pictures, each round, and the words.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_unlearn.records import RoundRecord
from distributed_unlearn.report.drawing import Picture
from distributed_unlearn.report.glossary import GLOSSARY
from distributed_unlearn.report.tables import (
    ROUND_HEADER,
    MethodRow,
    comparison_cells,
    number,
    round_cells,
    round_summary,
    step_cells,
)

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff; --line: #d0d0d0; --soft: #f4f4f4;
        --good: #006b4f; --bad: #a33b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --line: #3c4046; --soft: #202329; --good: #4fc79f; --bad: #ff9d66; }
}
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { line-height: 1.2; }
.verdict { border-left: 6px solid var(--line); background: var(--soft); padding: 0.6rem 1rem; margin: 1rem 0; }
.verdict p { margin: 0.3rem 0; }
.good { border-color: var(--good); }
.bad { border-color: var(--bad); }
.verdict p:first-child { font-size: 1.15rem; font-weight: 600; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; }
dt { font-weight: 600; }
dd { margin: 0; }
.glossary dd { margin: 0 0 0.6rem 0; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
tbody th { font-weight: 600; }
th:first-child, td.text, th.text { text-align: left; white-space: normal; }
td.text { min-width: 9rem; }
thead th { background: var(--soft); white-space: normal; vertical-align: bottom; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.5rem;
            margin-top: 1.2rem; }
.pictures figure { margin: 0; }
img { width: 100%; max-width: 27rem; height: auto; background: #ffffff; border-radius: 6px; padding: 6px;
      box-sizing: border-box; }
figcaption, .note { font-size: 0.9rem; }
figcaption strong { display: block; }
summary { cursor: pointer; margin: 0.8rem 0; }
@media (max-width: 46rem) {
  body { margin: 1rem auto; }
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: 0.5rem; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, tr, td, tbody th { display: block; }
  tr { border-bottom: 1px solid var(--line); padding: 0.5rem 0; }
  td, tbody th { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: 0.1rem 0; }
  td { white-space: normal; }
  td:empty { display: none; }
  td::before { content: attr(data-label); font-weight: 400; opacity: 0.85; text-align: left; }
}
"""

LEGEND = "Losses in nats per answer token. The words are explained at the end."


@dataclass(frozen=True)
class Summary:
    """What a page says first. Plain text: numbers and ids of sets, never text of records."""

    title: str
    asked: str
    """What was to be forgotten and what kept, in a sentence."""
    verdict: tuple[str, ...]
    """Sentences, the most important first."""
    is_good: bool | None
    """None: nothing was judged."""
    facts: tuple[tuple[str, str], ...]
    """Model, date, method, who is compared with what: label and text."""


_TEXT = ' class="text"'


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table that turns into one card a row where the screen is narrow; the first cell is the row's heading.

    Columns without any text are left out.
    """
    kept = [column for column in range(len(header)) if column == 0 or any(cells[column] for cells in body)]
    header, body = [header[column] for column in kept], [[cells[column] for column in kept] for cells in body]
    texts = ("note", "result")
    head = "".join(f'<th scope="col"{_TEXT if name in texts else ""}>{html.escape(name)}</th>' for name in header)
    lines = []
    for first, *cells in body:
        tagged = [f'<th scope="row">{html.escape(first)}</th>']
        for name, cell in zip(header[1:], cells, strict=True):
            tagged.append(
                f'<td{_TEXT if name in texts else ""} data-label="{html.escape(name)}">{html.escape(cell)}</td>'
            )
        lines.append(f"<tr>{''.join(tagged)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.svg.encode("utf-8")).decode("ascii")
    caption = f"<strong>{html.escape(picture.title)}</strong>{html.escape(picture.help)}"
    source = f'src="data:image/svg+xml;base64,{data}" alt="{html.escape(picture.alternative)}"'
    return f"<figure><img {source}><figcaption>{caption}</figcaption></figure>"


def _pictures(pictures: Sequence[Picture]) -> str:
    return f'<div class="pictures">{"".join(map(_picture, pictures))}</div>' if pictures else ""


def _definitions(kind: str, pairs: Sequence[tuple[str, str]]) -> str:
    parts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in pairs)
    return f'<dl class="{kind}">{parts}</dl>'


def _round(record: RoundRecord, pictures: Sequence[Picture]) -> str:
    parts = [f"<h2>Round {record.round_index + 1}</h2>", f"<p>{html.escape(round_summary(record))}</p>"]
    parts += [_table(ROUND_HEADER, round_cells(record)), _pictures(pictures)]
    if record.steps:
        header, body = step_cells(record.steps)
        parts.append(f"<details><summary>{len(record.steps)} steps</summary>{_table(header, body)}</details>")
    return "\n".join(part for part in parts if part)


def write_page(
    path: Path,
    summary: Summary,
    rows: Sequence[MethodRow],
    pictures: Sequence[Picture],
    rounds: Sequence[tuple[RoundRecord, Sequence[Picture]]],
) -> None:
    """Write the report.

    Args:
        path: The HTML file; its folder is created.
        summary: What stands first.
        rows: Methods to compare; without any the table is left out.
        pictures: Of the comparison.
        rounds: The rounds, in order, each with its pictures; its steps are folded away.
    """
    parts = []
    if rows:
        parts += ["<h2>Comparison</h2>", _table(*comparison_cells(rows)), f'<p class="note">{html.escape(LEGEND)}</p>']
    parts.append(_pictures(pictures))
    parts += [_round(record, drawn) for record, drawn in rounds]
    _write(path, summary, parts)


@dataclass(frozen=True)
class Section:
    """A part of a page that compares runs."""

    title: str
    note: str
    """What its table and pictures show, in a sentence or two."""
    header: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    """Of its table; without rows there is none."""
    pictures: tuple[Picture, ...]


_MOST_ROWS = 60
"""Of the numbers behind a picture that stand in the page; longer ones are in their file alone."""


def write_sections(path: Path, summary: Summary, sections: Sequence[Section]) -> None:
    """Write a page of sections, each with a note, a table and pictures whose numbers are folded away beneath them."""
    parts = []
    for section in sections:
        parts += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.note)}</p>"]
        if section.body:
            parts.append(_table(section.header, section.body))
        parts.append(_pictures(section.pictures))
        for picture in section.pictures:
            if 0 < len(picture.rows) <= _MOST_ROWS:
                body = [[number(cell) if not isinstance(cell, str) else cell for cell in row] for row in picture.rows]
                heading = html.escape(f"The numbers: {picture.title}")
                parts.append(f"<details><summary>{heading}</summary>{_table(picture.header, body)}</details>")
    _write(path, summary, parts)


def _write(path: Path, summary: Summary, middle: Sequence[str]) -> None:
    title = html.escape(summary.title)
    kind = {None: "verdict", True: "verdict good", False: "verdict bad"}[summary.is_good]
    parts = ["<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">']
    parts.append('<meta name="viewport" content="width=device-width, initial-scale=1">')
    parts.append(f"<title>{title}</title><style>{STYLE}</style></head><body><main><h1>{title}</h1>")
    parts.append(f"<p>{html.escape(summary.asked)}</p>")
    if summary.verdict:
        sentences = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in summary.verdict)
        parts.append(f'<div class="{kind}">{sentences}</div>')
    parts.append(_definitions("facts", summary.facts))
    parts += middle
    parts += ["<h2>Words</h2>", _definitions("glossary", GLOSSARY), "</main></body></html>\n"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")
