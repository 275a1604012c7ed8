"""One self-contained HTML page about a run: no script, nothing loaded from elsewhere, every text escaped."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from distributed_unlearn.errors import DataError
from distributed_unlearn.records import RoundRecord
from distributed_unlearn.report.tables import (
    ROUND_HEADER,
    MethodRow,
    comparison_cells,
    round_cells,
    round_summary,
    step_cells,
)

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff; --line: #d0d0d0; --soft: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --line: #3c4046; --soft: #202329; }
}
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; }
th { background: var(--soft); }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; padding: 6px; box-sizing: border-box; }
figure { margin: 1.5rem 0; }
figcaption, .note { font-size: 0.85rem; opacity: 0.8; }
summary { cursor: pointer; margin: 0.8rem 0; }
"""

LEGEND = (
    "Loss in nats per answer token, memorised as the share of answer tokens that the model predicts under teacher "
    "forcing; both are means over records. ToW (Tug-of-War) is the product over the three sets of 1 minus the distance "
    "in memorisation to the retrained model: 1 means indistinguishable. Products are curvature-vector products."
)


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    lines = []
    for cells in body:
        opening = ['<td class="text">' if name in ("note", "result") else "<td>" for name in header]
        tagged = (f"{tag}{html.escape(cell)}</td>" for tag, cell in zip(opening, cells, strict=True))
        lines.append(f"<tr>{''.join(tagged)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _image(path: Path) -> str:
    if path.suffix.lower() != ".png" or not path.is_file():
        raise DataError(f"image '{path}'", "an existing PNG file", "draw the figure before the page")
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    caption = html.escape(path.stem.replace("_", " ").replace("-", " "))
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def _round(record: RoundRecord) -> str:
    parts = [f"<h2>Round {record.round_index + 1}</h2>", f"<p>{html.escape(round_summary(record))}</p>"]
    parts.append(_table(ROUND_HEADER, round_cells(record)))
    if record.steps:
        header, body = step_cells(record.steps)
        parts.append(f"<details><summary>{len(record.steps)} steps</summary>{_table(header, body)}</details>")
    return "\n".join(parts)


def write_page(
    path: Path,
    title: str,
    paragraphs: Sequence[str],
    rows: Sequence[MethodRow],
    rounds: Sequence[RoundRecord],
    images: Sequence[Path],
) -> None:
    """Write the report: paragraphs, comparison table, figures, then each round with its steps folded away.

    Args:
        path: The HTML file; its folder is created.
        title: Heading and window title.
        paragraphs: Plain text, escaped like everything else; numbers and ids, never text of records.
        rows: Methods to compare; without any the table is left out.
        rounds: The rounds, in order.
        images: PNG files, embedded; the file name is the caption.

    Raises:
        DataError: an image is missing or no PNG.
    """
    escaped = html.escape(title)
    parts = ["<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">']
    parts.append('<meta name="viewport" content="width=device-width, initial-scale=1">')
    parts.append(f"<title>{escaped}</title><style>{STYLE}</style></head><body><main><h1>{escaped}</h1>")
    parts += [f"<p>{html.escape(text)}</p>" for text in paragraphs]
    if rows:
        parts += ["<h2>Comparison</h2>", _table(*comparison_cells(rows)), f'<p class="note">{html.escape(LEGEND)}</p>']
    parts += [_image(image) for image in images]
    parts += [_round(record) for record in rounds]
    parts.append("</main></body></html>\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
