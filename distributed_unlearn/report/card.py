"""The model card of a result: README.md in its folder."""


def model_card(base: str, summary: list[str]) -> str:
    """README.md of a result: what was done, in counts and scalars; never ids or text of erased records."""
    lines = "\n".join(f"- {line}" for line in summary)
    return (
        "---\n"
        "library_name: transformers\n"
        "tags: [machine-unlearning]\n"
        "---\n\n"
        "# Unlearned checkpoint\n\n"
        f"Derived from `{base}` by `distributed-unlearn`: records were erased with cubic-regularised Newton steps\n"
        "(arXiv 2406.14507) or the first-order method named below. Erased records are not named here; `record.json`\n"
        "holds their salted hashes, every step's scalars and the evaluation.\n\n"
        f"{lines}\n"
    )
