"""`clipx.bench`: its float64 reference is right, and it times the run's own step. Beside peers, it
works in turns with them, and says which are missing."""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT, commands
from support.runs import small

from clipx.errors import RunError
from clipx.parallel.mesh import MeshConfig, make_mesh
from clipx.planning import measure, results, suite, turns
from clipx.planning.rows import Row
from clipx.training.run import assemble


def test_the_dense_twin_is_its_own_gradient():
    a, b = np.random.default_rng(0).normal(size=(2, 6, 4))

    def mean(a):
        logits = 2.0 * a @ b.T
        lse = jax.nn.logsumexp(logits, 0) + jax.nn.logsumexp(logits, 1)
        return jnp.mean(0.5 * lse - jnp.diag(logits))

    with jax.enable_x64(True):
        value, gradient = measure.dense_info_nce(a, b, 2.0)
        np.testing.assert_allclose(value.mean(), mean(a), rtol=1e-12)
        np.testing.assert_allclose(gradient, jax.grad(mean)(a), rtol=1e-9, atol=1e-12)


def test_the_losses_of_these_devices_are_right():
    assert measure.check_losses(make_mesh(MeshConfig()), rows=64, width=16) < 1e-5


@pytest.mark.slow  # a training step is compiled to be timed
def test_steps_are_timed():
    run = assemble(small(), jax.devices()[:1])
    assert all(second > 0 for second in measure.time_steps(run, 2))


def test_texts_of_noise_end_once():
    run = assemble(small(("tokenizer.marks", "end")), jax.devices()[:1])
    text, end = np.asarray(measure.random_batch(run).text), run.objective.text.eot_id
    assert end == 1 and np.all((text == end) == (np.arange(text.shape[-1]) == text.shape[-1] - 1))
    assert len(np.unique(text)) > 20 and text.max() < run.objective.text.vocab_size


SERVER = """
import sys
from clipx.planning import turns
calls = []
def work(request):
    print("noise that is no answer")
    if request == "end":
        sys.exit("it broke")
    calls.append(request)
    return {"calls": len(calls), "who": sys.argv[1]}
turns.serve(work, {"library": "1.0"})
"""


def test_programs_take_turns(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = [sys.executable, str(script)]
    sides = {name: turns.Side([*start, name], environment) for name in ("a", "b")}
    sides["c"] = turns.Side([sys.executable, "-c", "import no_such_library"])
    with turns.started(sides) as (able, why):
        assert list(able) == ["a", "b"] and able["a"].versions == "library 1.0"
        assert "No module named 'no_such_library'" in why["c"]
        taken = turns.alternate(able, "x", 2)
        for name, list_ in taken.items():
            assert [(t["who"], t["calls"]) for t in list_] == [(name, 2), (name, 3)]
            assert all(t["seconds"] > 0 and t["cpu"] >= 0 for t in list_)
        assert {turn["calls"] for turn in turns.together(list(able.values()), "x")} == {4}
        with pytest.raises(turns.Missing, match=r"server.py: it broke"):
            able["b"].turn("end")


ROWS = {
    "step": [Row("step", "small", "s", {"clipx": [2.0, 3.0, 9.0], "open_clip": [4.0, 4.0, 9.0]})],
    "kmeans": [Row("kmeans", "big", "s", {"clipx": [1.0]}, {"faiss": "not installed; pip ..."})],
}


def test_the_table_shows_medians_ratios_and_what_is_missing(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "speed.md"
    page.write_text("before\n")
    report = results.report(ROWS, tmp_path)
    text = "\n".join(results.table(report))
    assert "| small | 3 s (2 to 9) | 4 s (4 to 9) | 0.75 |" in text
    assert "| big | 1 s | – | – |" in text and "faiss has no numbers: not installed; pip" in text
    with pytest.raises(RunError, match="no place for the table"):
        results.write(report, tmp_path)
    page.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    for _ in range(2):  # a second run of one section keeps the other
        json_file, _, history = results.write(report, tmp_path)
        report = {"step": report["step"]}
    assert page.read_text().startswith("before\n<") and page.read_text().endswith("->\nafter\n")
    assert text in page.read_text() and "old" not in page.read_text()
    assert list(json.loads(json_file.read_text())) == ["step", "kmeans"]
    assert history.read_text().count("step small 0.75 (open_clip)") == 2


def test_open_clip_gets_the_runs_own_sizes():
    config = small(("image.pool", "class"), ("optimizer.b2", "0.5"))
    options = suite.open_clip_options(assemble(config, jax.devices()[:1]))
    vision, text = options["model_cfg"]["vision_cfg"], options["model_cfg"]["text_cfg"]
    assert (vision["width"], vision["layers"], vision["head_width"]) == (32, 1, 16)
    assert (text["context_length"], text["vocab_size"], options["b2"]) == (20, 256, 0.5)


def test_wrong_flags_of_a_comparison_are_refused():
    for flag in ("--only=steps", "--against=tensorflow"):
        done = commands.run("bench", "--against=torch", flag)
        assert done.returncode == 2 and flag.partition("=")[0] in done.stderr
    assert "--against=PEERS" in commands.run("bench").stderr
    assert "one of the two" in commands.run("bench", "--against=torch", "--config=clip").stderr


@pytest.mark.slow  # starts a dozen processes
def test_the_whole_comparison_runs(tmp_path):
    file = tmp_path / "numbers.json"
    done = commands.run("bench", "--against=torch,open_clip,faiss", "--size=tiny", f"--json={file}")
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert list(report) == list(suite.SECTIONS)
    for name, section in report.items():
        for row in section["rows"]:
            sides = {**row["sides"], **row["missing"]}
            assert sides and all(x >= 0 for side in row["sides"].values() for x in side), name
            assert row["name"] in done.stdout
            for peer, why in row["missing"].items():
                assert "pip install" in why or "checkout" in why, (peer, why)
