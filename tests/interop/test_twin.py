"""A run of clipx and a loop of open_clip, from the same weights on the same batches, take the same
way: their losses stay within 1e-6 of each other for 60 steps."""

import sys

import jax
import numpy as np
import pytest
from support import ROOT
from support.libraries import with_open_clip
from support.runs import NO_EVALS, small

from clipx.interop.model import make_model
from clipx.interop.open_clip import OpenClip
from clipx.planning import suite
from clipx.training.initial import init
from clipx.training.run import assemble

STEPS = 60
CHANGES = [
    ("image.pool", "class"),
    ("text.dropout", "0.0"),
    ("tokenizer.context", "8"),
    ("tokenizer.vocab_size", "64"),
    ("train.total_steps", str(STEPS)),
    ("train.batch_size", "16"),
    ("optimizer.warmup_steps", "10"),
]


def batches(run):
    """Pictures and texts with padding, new ones for each step."""
    rng, text = np.random.default_rng(0), run.objective.text
    for _ in range(STEPS):
        rows, context = run.batch_size, text.context
        words = rng.integers(4, text.vocab_size, (rows, 1, context)).astype(np.int32)
        ends = rng.integers(2, context, (rows, 1, 1))
        place = np.arange(context)
        words = np.where(place == ends, text.eot_id, words)
        words = np.where(place > ends, text.pad_id, words).astype(np.int32)
        yield rng.integers(0, 256, run.batch.image.shape).astype(np.uint8), words


def ours(run, state):
    values = []
    for image, text in batches(run):
        rows = np.arange(len(image), dtype=np.int32)
        batch = run.batch.replace(image=image, text=text, row=rows, position=rows)
        state, metrics = run.train_step(state, batch)
        values.append(float(metrics["loss"]))
    return values


def theirs(run, state):
    import open_clip
    import torch
    from open_clip.loss import SigLipLoss

    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import peers
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    options = suite.open_clip_options(run)
    params = jax.tree.map(np.asarray, state.params)
    objective, bias = run.objective, params.get("logit_bias")
    weights = OpenClip().arrays(
        make_model(
            *(objective.image, objective.text, {"params": params}),
            logit_scale=params["logit_scale"],
            logit_bias=bias,
            mean=objective.mean,
            std=objective.std,
            words=suite.words(run),
        )
    )
    begin = {} if bias is None else {"init_logit_bias": float(bias)}
    model = open_clip.CLIP(**options["model_cfg"], **begin).train()
    model.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
    optimizer = peers.optimizer(model, options)
    loss = open_clip.ClipLoss() if bias is None else SigLipLoss()
    step = peers.train_step(model, optimizer, loss, options["clip_norm"])
    values, mean, std = [], np.float32(objective.mean), np.float32(objective.std)
    for number, (image, text) in enumerate(batches(run)):
        for group in optimizer.param_groups:
            group["lr"] = float(run.schedule(number))
        pixels = (np.float32(image[:, 0]) / 255 - mean) / std
        pixels = torch.tensor(pixels.transpose(0, 3, 1, 2))
        values.append(step(pixels.contiguous(), torch.tensor(text[:, 0]).long()))
    return values


@pytest.fixture
def one_thread():
    """PyTorch on one thread: with tiny products, threads that wait for each other cost the most."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@with_open_clip
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_run_and_a_loop_of_open_clip_take_the_same_way(name, one_thread):
    config = small(*NO_EVALS, *CHANGES, ("objective.name", name))
    run = assemble(config, jax.devices()[:1])
    state = init(run)
    other = theirs(run, state)  # before the state is donated
    np.testing.assert_allclose(ours(run, state), other, rtol=1e-6, atol=0)
    assert abs(other[0] - other[-1]) > 1e-3  # the weights have moved
