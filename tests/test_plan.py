"""Predictions of a step: FLOPs, memory, and micro-batches that fit; and their place beside a run's
measurements."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from support import ROOT
from support.runs import SMALL, rows, small
from support.tpu import libtpu

from clipx.errors import ConfigError
from clipx.ops import flops
from clipx.parallel import chips
from clipx.parallel.mesh import MeshConfig, batch_sharding, make_mesh, replicated
from clipx.planning import estimate, gpu_model, plans
from clipx.train import train
from clipx.training import fit, session
from clipx.training.checkpoint import Checkpoints
from clipx.training.run import assemble

GIB = 2**30


def assembled(*overrides, devices=1):
    return assemble(small(*overrides), jax.devices()[:devices])


@pytest.fixture(scope="module")
def one():
    return assembled()


def found(**changes):
    """A prediction of a step that fits, unless `changes` say otherwise."""
    memory = {"parameters": GIB, "program": GIB // 4}
    values = dict(devices=2, device_kind="TPU v5 lite", batch=64, microbatches=1, memory=memory)
    values |= dict(peak=2 * GIB, limit=16 * GIB, flops=10**12, step_flops=10**12, seconds=0.1)
    return estimate.Prediction(**values | changes)


def count(f, *args):
    return flops.total(flops.products(jax.make_jaxpr(f)(*args)))


def test_products_are_counted():
    a, b = jnp.ones((2, 3, 5)), jnp.ones((2, 5, 7))
    product = 2 * 2 * 3 * 5 * 7
    assert count(jnp.matmul, a, b) == product
    assert count(jax.jit(jax.checkpoint(jnp.matmul)), a, b) == product
    assert count(lambda a, b: jax.lax.map(lambda _: a @ b, jnp.arange(4)), a, b) == 4 * product
    both = [lambda a: (a @ b) @ b.mT, lambda a: a]
    assert count(lambda i, a: jax.lax.switch(i, both, a), 0, a) == 2 * product
    picture, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 2, 9))
    convolution = jax.lax.conv_general_dilated(
        *(picture, kernel, (1, 1), "SAME"), None, None, ("NHWC", "HWIO", "NHWC"), 3
    )
    assert (
        count(
            lambda x, k: jax.lax.conv_general_dilated(
                *(x, k, (1, 1), "SAME"), None, None, ("NHWC", "HWIO", "NHWC"), 3
            ),
            *(picture, kernel),
        )
        == 2 * convolution.size * 3 * 3 * 2
    )


def test_useful_flops_do_not_depend_on_how(one):
    """Scanned layers, remat and micro-batches leave the useful FLOPs alone; computed FLOPs grow."""
    how = [(f"{tower}.{key}", value) for tower in ("image", "text")
           for key, value in (("scan", "True"), ("remat", "full"))]  # fmt: skip
    other = assembled(*how, ("train.microbatches", "2"))
    assert other.model_flops == one.model_flops
    assert 0.8 * one.model_flops < one.step_flops < 1.1 * one.model_flops
    assert other.step_flops > 1.2 * one.step_flops


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 27.5G of 15.75G hbm. "
        "Exceeded hbm capacity by 11.75G.",
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (27.50G) exceeds available HBM (15.75G). HLO module: x.",
    ],
)
def test_out_of_memory_is_read(one, message, monkeypatch):
    def refuse(run):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(type(one), "train_step", property(refuse))
    refused = estimate.predict(one)
    assert (refused.fits, refused.refused) == (False, True)
    assert (refused.peak, refused.limit) == (27.5 * GIB, 15.75 * GIB)
    assert "27.50 GiB of 15.75 GiB" in fit.describe_memory(refused)


def _refuses():
    raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure (hlo_instruction.cc:390)")


@pytest.mark.parametrize("text", [lambda: "HloModule m", _refuses], ids=["ours", "the compiler"])
def test_a_text_that_cannot_be_read_stops_nothing(text):
    told = estimate.time_of(text, found().chip)
    assert list(told) == ["notes"] and "no estimate of time" in told["notes"][0]
    assert estimate.short(found(seconds=None, **told))[-1] == told["notes"][0]


@libtpu
@pytest.mark.slow  # the compiler takes its time over a SparseCore
def test_a_program_for_sparse_cores_is_read():
    """`as_text` fails on it (libtpu 0.0.52); the compiler's own file does not."""
    mesh = make_mesh(MeshConfig(), chips.parse("v5p:2x2x1").devices())
    table = jax.ShapeDtypeStruct((49408, 512), jnp.float32, sharding=replicated(mesh))
    ids = jax.ShapeDtypeStruct((2048, 77), jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(lambda t, i: jnp.sum(t[i] ** 2))).lower(table, ids)
    _, text = estimate.compile_ahead(lowered)
    told = estimate.time_of(text, chips.chip("TPU v5"))
    assert told["cycles"] > 0 and told["seconds"] > 0
    assert "1 operation(s) that run on SparseCores" in told["notes"][0]


def test_other_errors_are_not_memory(one, monkeypatch):
    def fail(run):
        raise jax.errors.JaxRuntimeError("INTERNAL: no luck")

    monkeypatch.setattr(type(one), "train_step", property(fail))
    with pytest.raises(jax.errors.JaxRuntimeError):
        estimate.predict(one)


@pytest.mark.parametrize(
    "most, trials", [(40, [1]), (16, [1, 4, 2]), (9, [1, 4, 2]), (3, [1, 16, 8])]
)
def test_fewest_micro_batches(one, most, trials):
    """Of a step that needs 32 GiB in one micro-batch, and 2 GiB in 16."""
    tried = []

    def estimate(run):
        tried.append(run.microbatches)
        return found(peak=32 * GIB // run.microbatches, limit=most * GIB)

    run, _ = fit.fewest(one, plans.fits, estimate=estimate)
    assert run.microbatches == run.complete["train"]["microbatches"]
    assert run.microbatches == next(n for n in fit.counts(one) if 32 / n + 0.25 <= most)
    assert tried == trials


def test_no_number_fits(one):
    assert fit.fewest(one, plans.fits, estimate=lambda run: found(peak=20 * GIB)) is None


@pytest.mark.slow  # trains twice; the choice itself is tested beside
def test_a_run_takes_what_fits_and_goes_on_with_it(tmp_path, capsys, monkeypatch):
    """First on devices that hold a quarter of the temporaries, then on larger ones."""
    monkeypatch.setattr(
        fit, "measure", lambda run: found(peak=16 * GIB // run.microbatches, limit=5 * GIB)
    )
    config = small(("train.microbatches", "auto"), ("train.total_steps", "2"))
    assert train(config, str(tmp_path), jax.devices()[:1]) == 0
    said = capsys.readouterr().out
    assert "train.microbatches=auto: 4\n" in said and "a step: 1 TFLOP, 4.25 GiB of 5.00" in said
    assert json.loads((tmp_path / "config.json").read_text())["train"]["microbatches"] == 4
    logged = [row for row in rows(tmp_path) if "loss" in row]
    assert logged[0]["predicted/memory_gib"] == 4.25
    assert logged[0]["step_seconds"] > 0 and logged[0]["mfu"] > 0
    monkeypatch.setattr(fit, "measure", lambda run: found())
    saved = Checkpoints(tmp_path).restore_run(2)
    for devices, number in ((1, "4, as before"), (2, "1 (4 before, on another mesh)")):
        assert session.resolve_microbatches(assemble(config, jax.devices()[:devices]), saved)
        assert f"train.microbatches=auto: {number}\n" in capsys.readouterr().out


def test_a_step_of_this_machine(one):
    """A step compiled for this machine has a known memory and no predicted time."""
    told = estimate.predict(one)
    assert told.fits and told.need > sum(fit.held(one).values())
    assert told.seconds is None and told.predicted_mfu is None and told.collectives is None
    assert fit.logged(told).keys() == {"predicted/memory_gib"}
    assert len(estimate.short(told)) == 1


def test_auto_never_splits_batch_norm(monkeypatch):
    """Its statistics would be per micro-batch, so the devices' memory would change the run."""
    resnet = {"name": "resnet", "variant": "resnet18", "blocks": [1, 1], "width": 4}
    config = small(("train.microbatches", "auto"))
    config["image"] = {**resnet, "image_size": 16, "embed_dim": 16, "dtype": "float32"}
    run = assemble(config, jax.devices()[:1])
    monkeypatch.setattr(fit, "measure", lambda run: found(peak=20 * GIB))
    with pytest.raises(ConfigError, match="config.train.microbatches"):
        fit.fitted(run)
    monkeypatch.setattr(fit, "measure", lambda run: found())
    assert fit.fitted(run).config.train.microbatches == 1


def test_a_step_must_fit_on_every_process(monkeypatch):
    monkeypatch.setattr(fit, "measure", lambda run: found())
    run = assembled(("train.microbatches", "auto"))
    assert fit.fitted(run).config.train.microbatches == 1
    with pytest.raises(ConfigError, match="does not fit even with 32 micro-batches"):
        fit.fitted(run, agreed=lambda fits: False)


@libtpu
def test_a_step_compiled_for_a_tpu(monkeypatch):
    where = chips.parse("v5e:2x2")
    run, told = plans.plan(small(), where)
    assert told.fits and told.devices == 4 and 0 < told.predicted_mfu < 1
    assert told.peak >= sum(fit.held(run).values()) > 0
    assert any(kind == "all-reduce" for kind, *_ in told.collectives)
    report = "\n".join(plans.describe("quickstart", where, run, told, price=1.5))
    expected = (plans.COMPILED, "fits: ", "FLOP useful", "all-reduce of 4 chips", "not validated")
    for part in (*expected, "of it products ", "image/"):
        assert part in report, report
    assert sum(share.total for share in told.layers) == pytest.approx(1)


@pytest.mark.slow  # the command is run on a GPU topology
def test_gpus_are_modelled():
    """Activations scale with a GPU's rows in one micro-batch; micro-batches are recomputed."""
    four, eight = (chips.parse(name) for name in ("h100:1x4", "h100:1x8"))
    runs = [assemble(small(), jax.devices()[: where.size]) for where in (four, eight)]
    less, more = (gpu_model.predict(run, where) for run, where in zip(runs, (four, eight)))
    assert less.analytic and less.fits and less.flops == more.flops
    assert less.memory["activations"] == 2 * more.memory["activations"] > 0
    cut = gpu_model.predict(runs[1].with_microbatches(4), eight)
    assert cut.memory["activations"] == more.memory["activations"] // 4
    assert cut.step_flops > more.step_flops


@pytest.mark.slow  # compiles in a process of its own; plans and their tables are tested beside
def test_the_command(tmp_path):
    """Two topologies make a table and a JSON file; one that does not fit makes exit code 1."""
    sizes = [*SMALL, ("train.batch_size", str(2**23))]
    done = subprocess.run(
        [sys.executable, "-m", "clipx.plan", "--config=configs/quickstart.py", "--price=2,3",
         "--topology=h100:1x1,h200:4x8", f"--json={tmp_path / 'plan.json'}",
         *(f"--config.{path}={text}" for path, text in sizes)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert plans.MODELLED in done.stdout and plans.COMPILED not in done.stdout
    assert "does not fit" in done.stdout and "fits: " in done.stdout
    assert "| configs/quickstart.py | h200:4x8 (model) | 8,388,608 |" in done.stdout
    told = json.loads((tmp_path / "plan.json").read_text())
    assert [row["fits"] for row in told] == [False, True]


def test_search_finds_the_fewest_micro_batches_or_the_largest_batch(monkeypatch):
    where = chips.parse("h100:1x1")

    def estimate(run, where):
        sizes = {"batch": run.batch_size, "microbatches": run.microbatches}
        return found(**sizes, peak=run.batch_size * GIB // run.microbatches)

    monkeypatch.setattr(gpu_model, "predict", estimate)
    monkeypatch.setattr(plans, "_recompute", lambda *_: None)
    for batch, expected in ((64, "fit: 8, 8.25"), (4, "doubling: 8 at 1 micro-batch(es), 8.25")):
        config = small(("train.batch_size", str(batch)))
        run, told = plans.plan(config, where)
        assert expected in plans.search(config, where, run, told)[2]


@pytest.mark.parametrize("dots, best", [(4, "dots"), (50, "full")])
def test_search_first_finds_what_to_recompute(dots, best, monkeypatch):
    """The fastest `remat` that fits; with the keys that it prints, the plan fits."""
    where, seconds = chips.parse("h100:1x1"), {"none": 0.1, "dots": 0.2, "full": 0.3}

    def estimate(run, where):
        kind = run.objective.image.remat
        assert kind == run.objective.text.remat
        peak = {"none": 100, "dots": dots, "full": 3}[kind]
        return found(peak=peak * GIB, seconds=seconds[kind])

    monkeypatch.setattr(gpu_model, "predict", estimate)
    _, told, line = plans.search(small(), where, *plans.plan(small(), where))
    assert told.fits
    assert line.endswith(f"--config.image.remat={best} --config.text.remat={best}"), line
    obeyed = small(("image.remat", best), ("text.remat", best))
    assert plans.plan(obeyed, where)[1] == told
