"""A certificate as one HTML page: no script, nothing loaded from elsewhere, every value escaped.

The page is for reading; what is signed is the statement in the envelope beside it, whose hash the page names.
"""

import html
from collections.abc import Mapping
from typing import Any

from distributed_unlearn.report.page import STYLE

_OUTCOMES = {
    "deleted": "The records that this request names were erased from the model.",
    "exempted": "The request was not carried out: the operator is exempt.",
    "not_found": "Nothing that this request names was in the training data.",
    None: "The request was withdrawn.",
}

_EXPOSURE = {
    "extraction_strength": "share of an answer that the model completes by itself",
    "extraction_strength_holdout": "the same of records that it never saw",
    "membership_auc": "membership inference by loss, area under the curve (0.5: cannot tell)",
}


def certificate_page(statement: Mapping[str, Any], envelope_sha256: str) -> str:
    """The page of a statement that `certificate.make_statement` made."""
    predicate = statement["predicate"]
    request, answer, erasure = predicate["request"], predicate["answer"], predicate["round"]
    title = f"Erasure certificate: request {request['number']}"
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main><h1>{_text(title)}</h1>",
        f"<p><strong>{_text(_OUTCOMES.get(answer['outcome'], answer['outcome']))}</strong></p>",
    ]
    if predicate["approximate"]:
        parts.append(f"<p>{_text(predicate['approximate'])}</p>")
    asked = {
        "asked": f"{request['num_ids']} id(s), {request['num_erased_records']} record(s) erased",
        "received": request["received_at"],
        "due": request["due_at"],
        "answered": answer["answered_at"],
        "outcome": answer["outcome"] or answer["state"],
        "reason": answer["reason"],
        "ledger": f"{predicate['ledger']['id']}, entry {predicate['ledger']['entry']}",
        "hash of that entry": predicate["ledger"]["sha256"],
        "hash of the envelope": envelope_sha256,
    }
    parts += ["<h2>Request</h2>", _table(asked)]
    if erasure is not None:
        parts += _round_parts(erasure)
    parts.append("</main></body></html>\n")
    return "\n".join(parts)


def _round_parts(erasure: Mapping[str, Any]) -> list[str]:
    solver = erasure["settings"].get("solver") or {}
    facts = {
        "round": f"{erasure['number']}, from {'the first model' if erasure['parent'] is None else erasure['parent']}",
        "began": erasure["started_at"],
        "ended": erasure["ended_at"],
        "method": solver.get("method"),
        "objective": (erasure["settings"].get("objective") or {}).get("name"),
        "records erased, retained": f"{erasure['num_forget_records']}, {erasure['num_retain_records']}",
        "steps, curvature products": f"{erasure['num_steps']}, {erasure['num_products']}",
        "update norm": erasure["update_norm"],
        "alpha (first, last, largest)": _range_text(erasure["alpha"]),
        "gamma (first, last, largest)": _range_text(erasure["gamma"]),
        "ended because": erasure["stop_reason"],
        "hash of the record": erasure["record_sha256"],
    }
    parts = ["<h2>Round</h2>", _table(facts), "<h2>Measurements</h2>", _scores(erasure["scores"])]
    if erasure.get("exposure") is not None:
        parts += ["<h2>Extraction and membership</h2>", _table(_estimates(erasure["exposure"]))]
    if erasure["verdict"] is not None:
        parts += ["<h2>Verdict</h2>", _table(_flat(erasure["verdict"]))]
    for name, files in (("before", erasure["weights_before"]), ("after", erasure["weights_after"])):
        if files:
            parts += [f"<h2>Weights {name}, SHA-256</h2>", _table(files)]
    parts += ["<h2>Settings</h2>", _table(_flat(erasure["settings"]))]
    return parts


def _scores(scores: Mapping[str, Any]) -> str:
    """One row for each set and measure: before and after."""
    rows = []
    for name in {**(scores["before"] or {}), **(scores["after"] or {})}:
        before, after = (_flat((scores[when] or {}).get(name) or {}) for when in ("before", "after"))
        rows += [(f"{name}: {key}", before.get(key), after.get(key)) for key in {**before, **after}]
    body = "".join(f"<tr><td>{_text(n)}</td><td>{_text(b)}</td><td>{_text(a)}</td></tr>" for n, b, a in rows)
    head = '<tr><th scope="col">set: measure</th><th scope="col">before</th><th scope="col">after</th></tr>'
    return f'<div class="wide"><table>{head}{body}</table></div>'


def _estimates(exposure: Mapping[str, Any]) -> dict[str, str | None]:
    """A row for each attack: the number, its 95 % interval, on how many records."""
    found = {}
    for key, value in exposure.items():
        text = None
        if value is not None:
            interval = "no interval" if value["low"] is None else f"{value['low']:.3f} to {value['high']:.3f}"
            text = f"{value['value']:.3f} ({interval}; {value['num_records']} records)"
        found[_EXPOSURE[key]] = text
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, list):
            value = {str(index + 1): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{name}, "))
        else:
            found[name] = value
    return found


def _range_text(value: Mapping[str, float] | None) -> str | None:
    return None if value is None else ", ".join(f"{value[key]:.4g}" for key in ("first", "last", "largest"))


def _table(rows: Mapping[str, Any]) -> str:
    body = "".join(
        f'<tr><td>{_text(name)}</td><td class="text">{_text(value)}</td></tr>' for name, value in rows.items()
    )
    return f'<div class="wide"><table>{body}</table></div>'


def _text(value: object) -> str:
    if value is None:
        return "not measured"
    return html.escape(f"{value:.6g}" if isinstance(value, float) else str(value))
