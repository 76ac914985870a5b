"""docs/your_pictures.md: each of its commands runs as it stands there, one after the other."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import ROOT

PAGE = ROOT / "docs" / "your_pictures.md"
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 200)}


def commands():
    """The page's commands, without those that install."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words[:2] == ["python", "-m"] and words[2] != "venv"]


def draw(folder):
    """300 pictures and `pairs.csv`, two captions for each."""
    rng, lines = np.random.default_rng(0), ["image,caption"]
    (folder / "pictures").mkdir()
    for i in range(300):
        name = list(COLOURS)[i % 3]
        pixels = rng.integers(0, 256, (72, 80, 3)) // 4 + np.array(COLOURS[name]) // 2
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "pictures" / f"{i:03d}.jpg")
        words = " ".join(rng.choice(["small", "soft", "bright", "noisy", "plain", "old"], 3))
        lines += [
            f"pictures/{i:03d}.jpg,a {words} picture in {name}",
            f"pictures/{i:03d}.jpg,{name}",
        ]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")


def test_the_page_names_files_that_its_commands_make():
    used = {word.partition("=")[2] for words in commands() for word in words if "=" in word}
    assert {"pairs.csv", "runs/own", "runs/fast", "found"} <= used and len(commands()) == 10


@pytest.mark.slow
def test_each_command_as_it_stands(tmp_path):
    draw(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for _, *words in commands():
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-3000:])
    for name in ("runs/own/report.html", "compared.html", "search.html", "exported/README.md"):
        assert pathlib.Path(tmp_path, name).is_file(), name
    assert "extended at step" in (tmp_path / "runs" / "own" / "report.html").read_text()
