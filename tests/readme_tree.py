"""README's tree: a line for every tracked file, from its own first sentence. `python -m tests.readme_tree` writes it.

A Python file says what it is in its docstring; what has none keeps the words that the tree gave it before.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- tree -->\n```\n", "```\n<!-- /tree -->"
WIDTH = 31


def tracked() -> list[str]:
    """Every file that git knows, but for empty package markers."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    paths = sorted(path for path in done.stdout.splitlines() if (ROOT / path).is_file())
    return [path for path in paths if not path.endswith("__init__.py")]


def first_sentence(path: Path) -> str:
    """The first line of a module's docstring without its full stop; empty where there is none."""
    if path.suffix != ".py" or not path.exists():
        return ""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n", 1)[0].rstrip(".")


def known_words(readme: str) -> dict[str, str]:
    """What the tree says now, by path."""
    found, folder = {}, ""
    for line in readme.split(BEGIN, 1)[1].split(END, 1)[0].splitlines():
        if line and not line.startswith(" ") and line.split("  ")[0].endswith("/"):
            folder = line.split("  ")[0]
        else:
            name, _, words = line.strip().partition(" ")
            found[(folder if line.startswith(" ") else "") + name] = words.strip()
    return found


def tree(readme: str) -> str:
    """The tree as it should be."""
    words, lines, folder = known_words(readme), [], ""
    for path in sorted(tracked(), key=lambda path: (path.rpartition("/")[0], path)):
        parent = path.rpartition("/")[0]
        if parent and parent != folder:
            folder = parent
            about = first_sentence(ROOT / parent / "__init__.py")
            lines.append(f"{parent}/  -- {about}" if about else f"{parent}/")
        name = path.rpartition("/")[2]
        indented = f"  {name}" if parent else name
        said = first_sentence(ROOT / path) or words.get(path, "")
        lines.append(f"{indented:<{WIDTH - 1}} {said}".rstrip())
    return "\n".join(lines) + "\n"


def rewritten(readme: str) -> str:
    """README with its tree brought up to date."""
    before, rest = readme.split(BEGIN, 1)
    return before + BEGIN + tree(readme) + END + rest.split(END, 1)[1]


def cited_paths(text: str) -> set[str]:
    """Paths of this repository that a text cites: links, and `folder/file` in backquotes with a known suffix."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    quoted = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|yaml|sh|txt|toml))`", text)
    return {path.removeprefix("./") for path in (*links, *quoted)}


if __name__ == "__main__":
    target = ROOT / "README.md"
    target.write_text(rewritten(target.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
