"""The pages tell the truth about the files: every file is in README's tree, and every path that a page cites exists."""

import pytest

from tests.readme_tree import BEGIN, END, ROOT, cited_paths, first_sentence, known_words, rewritten, tracked

README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "distributed_unlearn"
"""Pages may name a file of the package by its path in it."""
PAGES = [path for path in tracked() if path.endswith(".md")]
MADE_BY_RUNS = ("runs/", "data/tofu/", "folder/")


def test_the_tree_is_up_to_date():
    assert rewritten(README) == README, "run: python -m tests.readme_tree"


def test_every_file_in_the_tree_says_what_it_is():
    silent = [path for path, words in known_words(README).items() if not words]
    assert silent == []


@pytest.mark.parametrize("page", PAGES)
def test_every_cited_path_exists(page):
    folder = (ROOT / page).parent
    cited = cited_paths((ROOT / page).read_text(encoding="utf-8"))
    missing = [
        path
        for path in sorted(cited)
        if not path.startswith(MADE_BY_RUNS) and not any((at / path).exists() for at in (folder, ROOT, PACKAGE))
    ]
    assert missing == []


def test_a_page_with_a_wrong_path_is_caught():
    assert cited_paths("see [x](docs/gone.md#part) and `tests/gone.py`, not `a/b`") == {"docs/gone.md", "tests/gone.py"}


def test_words_of_files_without_docstring_are_kept(tmp_path):
    assert known_words(f"x {BEGIN}Makefile   two commands\na/  -- about\n  b.txt   kept\n{END}") == {
        "Makefile": "two commands",
        "a/b.txt": "kept",
    }
    (tmp_path / "m.py").write_text('"""One line.\n\nMore."""\n')
    assert first_sentence(tmp_path / "m.py") == "One line"
