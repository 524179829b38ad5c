"""A page in a real browser without a window: what it looks like, and where it has put things."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from PIL import Image


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")

#: Chromium makes no window narrower than this; a phone's page lies in a frame within it.
NARROWEST = 500

#: Where the page has put things. Text in matplotlib's drawings is shapes, in groups whose ids begin with text_.
MEASURE = """
const page = document.getElementById('page').contentDocument;
const box = (e) => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
const boxes = (selector) => [...page.querySelectorAll(selector)].map(box);
const found = {
  width: page.documentElement.scrollWidth,
  blocks: [...page.body.children].map(box),
  drawings: [...page.querySelectorAll('svg')].map((svg) => ({
    box: box(svg),
    frame: box(svg.parentElement),
    texts: [...svg.querySelectorAll('g[id^="text_"]')].map(box).filter((b) => b[2] > b[0] && b[3] > b[1]),
  })),
};
const written = document.createElement('pre');
written.id = 'found';
written.textContent = JSON.stringify(found);
document.body.appendChild(written);
"""


def _run(page: Path, width: int, folder: Path, *options: str) -> str:
    """Open the page in a frame of that width."""
    framed = folder / "framed.html"
    inner = html.escape(page.read_text(encoding="utf-8"), quote=True)
    framed.write_text(
        '<!DOCTYPE html><body style="margin:0">'
        f'<iframe id="page" style="border:0" width="{width}" height="3000" srcdoc="{inner}"></iframe>'
        f"<script>window.onload = () => {{ {MEASURE} }}</script>",
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, NARROWEST)},3000",
            *options, framed.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


def measured(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """Where things are: boxes of left, top, right, bottom in pixels."""
    dom = _run(page, width, folder, "--dump-dom")
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-500:]
    return dict(json.loads(html.unescape(found[1])))


def screenshot(page: Path, width: int, folder: Path) -> Image.Image:
    """What one sees, in grey."""
    picture = folder / "screenshot.png"
    _run(page, width, folder, f"--screenshot={picture}")
    with Image.open(picture) as image:
        return image.convert("L").crop((0, 0, width, image.height))
