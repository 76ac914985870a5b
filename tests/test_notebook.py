"""The notebook runs as it is saved, and it is saved with its outputs."""

import json
import math
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from support import ROOT
from support.exports import CLASS, save
from support.runs import small

NOTEBOOK = ROOT / "notebooks" / "losses.ipynb"
PICTURES = 4
DEFAULT = 'WORKDIR = ""'


def cells():
    all_cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in all_cells if cell["cell_type"] == "code"]


def execute(workdir: str = "") -> dict:
    """Runs the cells in this process without a display, and returns the variables they define."""
    shown, names = 0, {}
    sources = ["".join(cell["source"]) for cell in cells()]
    assert DEFAULT in sources[0]
    sources[0] = sources[0].replace(DEFAULT, f"WORKDIR = {workdir!r}")
    with matplotlib.rc_context({"backend": "agg"}):
        for number, source in enumerate(sources):
            exec(compile(source, f"{NOTEBOOK.name}:{number}", "exec"), names)
            shown += len(plt.get_fignums())
            plt.close("all")
    assert shown == PICTURES
    values, rows = names["values"], names["run"].batch_size
    assert len(values) == 8
    assert all(np.isfinite(each).all() and each.shape == (rows,) for each in values.values())
    assert len(names["captions"]) == names["clusters"].counts.sum() == 8 * rows
    assert (names["out"] / "open_clip_model.safetensors").is_file()
    names["scratch"].cleanup()
    return names


@pytest.mark.slow
@pytest.mark.interop  # the last cell needs open_clip
def test_its_cells_run_on_a_workdir(tmp_path):
    execute(str(save(tmp_path / "run", small(CLASS, ("train.best", "")))))


@pytest.mark.slow  # half a minute, mostly to compile the training step
def test_it_trains_without_one():
    names = execute()
    losses = [row["loss"] for row in names["rows"]]
    assert len(losses) == 10 and losses[-1] < 0.9 * math.log(64)
    assert names["values"]["InfoNCE"].mean() < math.log(64)
    assert names["values"]["SimSiam"].mean() < -0.5


def test_it_is_saved_with_its_pictures_and_without_local_paths():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 700_000
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    for output in outputs:
        assert output.get("name", "stdout") == "stdout"
        text = "".join(output.get("text", ""))
        assert not re.search(r"(^|[\s'\"(=])(/[\w.-]+){2,}|site-packages|[A-Z]:\\|\x1b", text), text
