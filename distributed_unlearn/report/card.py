"""The model card of a result: README.md in its folder."""


def model_card(base: str, summary: list[str]) -> str:
    """README.md of a result: what was measured, in counts and scalars; never ids or text of erased records."""
    lines = "\n".join(f"- {line}" for line in summary)
    return (
        "---\n"
        "library_name: transformers\n"
        "tags: [machine-unlearning]\n"
        "---\n\n"
        "# Checkpoint of an unlearning job\n\n"
        f"Derived from `{base}` by `distributed-unlearn`, which was asked to make it forget records. Below is what\n"
        "was measured. The records are not named here; `record.json` beside this folder holds salted hashes of their\n"
        "ids, the method, every step's scalars and the evaluation.\n\n"
        f"{lines}\n"
    )
