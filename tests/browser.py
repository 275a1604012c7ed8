"""Looks at a page in a real headless browser, where the machine has one."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH: pages were not looked at")

_PROBE = (
    "<script>onload = () => { const wide = [...document.querySelectorAll('body *')].filter(e => "
    "e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('details, thead'));"
    "document.title = JSON.stringify([innerWidth, document.documentElement.scrollWidth,"
    "wide.map(e => e.outerHTML.slice(0, 80)), getComputedStyle(document.querySelector('tbody tr')).display,"
    "[...document.images].filter(i => !i.alt).length, [...document.images].filter(i => !i.naturalWidth).length]);"
    "}</script>"
)


@dataclass(frozen=True)
class Look:
    """What a page looks like in a window of some width."""

    inner_width: int
    scroll_width: int
    too_wide: list[str]
    """Elements that stick out, what is folded away aside."""
    row_display: str
    """Of the first table's first row: `block` where rows are cards."""
    num_without_alternative: int
    num_not_drawn: int
    """Pictures that the browser could not show."""
    console: list[str]
    """Everything that the page wrote to the console."""


def look_at(page: Path, width: int, scratch: Path) -> Look:
    """Open a page in a window of this width."""
    assert BROWSER is not None
    copy = scratch / "page.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</main>", f"</main>{_PROBE}"), encoding="utf-8")
    frame = scratch / "frame.html"  # a headless window is at least 500 wide; a frame has any width
    frame.write_text(
        f'<iframe src="{copy.as_uri()}" width="{width}" height="900" style="border:0"></iframe><script>onload = () =>'
        " setTimeout(() => document.title = frames[0].document.title, 100)</script>"
    )
    options = ("headless", "no-sandbox", "disable-gpu", "allow-file-access-from-files", "hide-scrollbars")
    command = [BROWSER, *(f"--{option}" for option in options), "--enable-logging=stderr"]
    command += ["--virtual-time-budget=3000", f"--user-data-dir={scratch / 'profile'}", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None, done.stdout[-500:] + done.stderr[-500:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Look(*json.loads(html.unescape(found.group(1))), console)
