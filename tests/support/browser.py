"""Pages in headless Chromium, where it is installed."""

import json
import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FOUND = next(filter(None, map(shutil.which, _NAMES)), None)
needed = pytest.mark.skipif(FOUND is None, reason="no Chromium is installed")
# The page in a frame of the wanted width: a window has a least width of its own
_FRAME = """<!doctype html><style>body{margin:0}iframe{border:0;display:block}</style>
<iframe id=page src="PAGE" width=WIDTH height=HEIGHT></iframe><script>
document.getElementById("page").onload = (event) => {
  const inner = event.target.contentWindow, page = inner.document;
  const blank = (e) => { const b = e.getBoundingClientRect(); return b.width < 9 || b.height < 9; };
  let drawings = 0, blankDrawings = 0;
  const look = () => {
    for (const svg of page.querySelectorAll("svg")) {
      if (svg.checkVisibility()) {
        drawings++;
        const paths = [...svg.querySelectorAll("path, image, use")];
        blankDrawings += blank(svg) || !paths.some((p) => !blank(p));
      }
    }
  };
  const choices = [...page.querySelectorAll("input[type=radio]")];
  if (choices.length) { for (const c of choices) { c.checked = true; look(); } } else { look(); }
  if (choices.length) choices[0].checked = true;
  const pictures = [...page.images].filter((i) => i.checkVisibility());
  const colour = inner.getComputedStyle(page.body).backgroundColor.match(/[0-9.]+/g).map(Number);
  document.title = JSON.stringify({
    overflow: page.documentElement.scrollWidth - inner.innerWidth,
    requests: inner.performance.getEntriesByType("resource").map((e) => e.name),
    pictures: pictures.length,
    blank_pictures: pictures.filter((i) => !i.naturalWidth || blank(i)).length,
    drawings: drawings, blank_drawings: blankDrawings, background: colour[0],
  });
};
</script>"""


class Seen(NamedTuple):
    """What a browser makes of a page."""

    errors: list[str]  # of the console
    requests: list[str]
    overflow: int  # pixels by which the page is wider than its window
    pictures: int  # that are visible
    blank_pictures: int
    drawings: int  # SVGs, of every panel that a choice shows
    blank_drawings: int
    background: float  # how red it is, of 255


def look(page, *, width=1200, height=2400, dark=False, screenshot=None) -> Seen:
    """Opens a page of the disk. screenshot: a .png to write too."""
    with tempfile.TemporaryDirectory(prefix="clipx-browser-") as folder:
        frame = pathlib.Path(folder, "frame.html")
        values = {"PAGE": pathlib.Path(page).absolute().as_uri(), "WIDTH": width, "HEIGHT": height}
        text = re.sub("PAGE|WIDTH|HEIGHT", lambda match: str(values[match[0]]), _FRAME)
        frame.write_text(text)
        arguments = [
            *(FOUND, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", "--allow-file-access-from-files"),
            *(f"--user-data-dir={folder}/profile", "--virtual-time-budget=8000"),
            *(f"--window-size={max(width, 500)},{height}",),
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        ]
        if screenshot:
            subprocess.run(
                [*arguments, f"--screenshot={screenshot}", frame.as_uri()],
                check=True, capture_output=True, timeout=120,
            )  # fmt: skip
        done = subprocess.run(
            [*arguments, "--dump-dom", frame.as_uri()],
            check=True, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    title = re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, (done.stdout[:500], done.stderr[-2000:])
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(errors, **json.loads(title[1].replace("&quot;", '"').replace("&amp;", "&")))
