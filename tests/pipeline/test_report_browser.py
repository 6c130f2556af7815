"""The pages in a real browser: on a phone nothing runs out of the page, and no label out of its drawing.

Slow, because a browser starts for each page, which takes seconds on a busy machine.
"""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.build import page
from pipeline.report.sweep import sweep_page
from tests.pipeline.reports import full_run, sweep

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (`apt-get install chromium`), which is not here"),
]
PHONE, DESKTOP = 390, 1280
AXES = {"an axis with quite a long name": [f"value number {i}" for i in range(10)], "b": list("wxyz")}
# Writes down how wide the page is, which labels stick out of their drawings by over a unit, and which overlap.
LOOK = """
<script>
const found = {width: document.documentElement.scrollWidth, window: window.innerWidth, out: [], over: [], labels: 0};
document.querySelectorAll('details').forEach(d => d.open = true);
found.opened = document.documentElement.scrollWidth;
document.querySelectorAll('svg[role=img]').forEach(svg => {
  const box = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')];
  const boxes = texts.map(t => t.getBoundingClientRect());
  found.labels += texts.length;
  texts.forEach((text, i) => {
    const b = boxes[i];
    const out = Math.max(box.left - b.left, b.right - box.right, box.top - b.top, b.bottom - box.bottom);
    if (out > 1.5) found.out.push(svg.ariaLabel + ': ' + text.textContent);
    for (let j = 0; j < i; j++) {
      const wide = Math.min(b.right, boxes[j].right) - Math.max(b.left, boxes[j].left);
      const high = Math.min(b.bottom, boxes[j].bottom) - Math.max(b.top, boxes[j].top);
      if (wide > 1 && high > 3) found.over.push(svg.ariaLabel + ': ' + text.textContent + ' | ' + texts[j].textContent);
    }
  });
});
parent.postMessage(JSON.stringify(found), '*');
</script>
"""
# Chromium's own window is never narrower than 500, so the page stands in a frame, which is a window to it.
FRAME = """<!doctype html><pre id="found"></pre>
<script>addEventListener('message', event => document.getElementById('found').textContent = event.data);</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>
"""


def looked_at(text: str, width: int, folder: Path) -> dict[str, Any]:
    """What the browser found."""
    assert CHROMIUM is not None
    (folder / "page.html").write_text(text.replace("</body>", LOOK + "</body>"))
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(match[1]))
    return found


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("which", ["run", "thirty layers", "sweep", "forty arms"])
def test_page_fits_its_window_and_labels_fit_their_drawings(which: str, width: int, tmp_path: Path) -> None:
    made = {
        "run": lambda: page(full_run()),
        "thirty layers": lambda: page(full_run(30)),
        "sweep": lambda: sweep_page(sweep()).html(),
        "forty arms": lambda: sweep_page(sweep(AXES)).html(),
    }
    found = looked_at(made[which](), width, tmp_path)
    assert found["window"] == width
    assert max(found["width"], found["opened"]) <= width
    assert found["labels"] > 20
    assert found["out"] == []
    assert found["over"] == []
