"""Low-rank adapters: at the start and merged they change nothing else, in every layout, and what is
frozen beside them costs nothing."""

import jax
import numpy as np
import pytest
from flax import traverse_util
from support.exports import CLASS, save
from support.runs import small

from clipx.errors import ConfigError
from clipx.models.bert import BERT
from clipx.models.resnet import ResNet
from clipx.models.text import TextTransformer
from clipx.models.transformer import merge_adapters, stack_blocks, unstack_blocks
from clipx.ops import flops
from clipx.parallel.mesh import partition_spec, path_name
from clipx.training import pretrained
from clipx.training.initial import init
from clipx.training.run import assemble, restore, with_data

SMALL = {"width": 16, "depth": 1, "heads": 2, "embed_dim": 8, "dtype": "float32"}
IDS = np.arange(18).reshape(2, 9)
TOWERS = {
    "scanned": TextTransformer(
        vocab_size=40, context=9, eot_id=39, scan=True, remat="dots", **SMALL
    ),
    "bert": BERT(vocab_size=200, context=9, positions=12, dropout=0.0, **SMALL),
}


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


@pytest.mark.parametrize("name", [pytest.param("scanned", marks=pytest.mark.slow), "bert"])
def test_they_start_as_nothing_and_merge(name):
    """Every kernel of attention and MLP has an adapter, which starts as zero, and the merged tower
    has the output of the adapted one. Unscanned, the other parameters start at the same bits."""
    plain, tower = TOWERS[name], TOWERS[name].clone(lora_rank=3, lora_alpha=6.0)
    given, params = (jax.jit(t.init)(jax.random.key(0), IDS)["params"] for t in (plain, tower))
    adapters = {k: v for k, v in flat(params).items() if "lora_" in k}
    kept = {k: v for k, v in flat(params).items() if k not in adapters}
    layers = {k.rpartition("/")[0] for k in kept if "/attn/" in k or "/mlp/" in k}
    assert {k.rpartition("/")[0] for k in adapters} == layers
    assert all(np.any(x) == k.endswith("lora_a") for k, x in adapters.items())
    assert kept.keys() == flat(given).keys()
    if name != "scanned":
        jax.tree.map(np.testing.assert_array_equal, kept, flat(given))

    noise = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype("f4"), params)
    merged = merge_adapters(unstack_blocks(jax.tree.map(np.asarray, moved)), tower.lora)
    assert not any("lora_" in k for k in flat(merged))
    merged = stack_blocks(merged) if name == "scanned" else merged
    start = traverse_util.unflatten_dict(kept, sep="/")

    @jax.jit
    def units(with_adapters, without):
        rows = [tower.apply({"params": p}, IDS).unit for p in with_adapters]
        return rows, [plain.apply({"params": p}, IDS).unit for p in without]

    (same, adapted), (expected, together) = units((params, moved), (start, merged))
    np.testing.assert_allclose(same, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(together, adapted, rtol=1e-4, atol=1e-5)
    assert np.abs(adapted - same).max() > 0.01


FROZEN = ("^(image|text)/(?!.*lora_|projection)",)


def lora_run(*overrides, freeze=FROZEN):
    more = [("text.dropout", "0.0"), ("optimizer.warmup_steps", "0"), ("evals", "{}")]
    more += [(f"{tower}.lora_rank", "2") for tower in ("image", "text")]
    more += [("train.best", ""), ("optimizer.freeze", repr(freeze))]
    return small(CLASS, *more, *overrides)


def test_a_frozen_base_costs_no_gradient_and_no_moments():
    """Kernels: a product forward and one back to the input, none for their own gradient."""
    run, whole = (assemble(lora_run(freeze=f), jax.devices()[:1]) for f in (FROZEN, ()))
    moments = {path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(run.state.opt_state)}
    assert any("qkv/lora_a" in name for name in moments)
    assert not any(name.endswith(("qkv/kernel", "fc/bias")) for name in moments)

    def rows(tower):  # of a step, in the layers of a tower's blocks
        tokens = {"image": 16 // 8, "text": run.objective.text.context}  # patches are 8 pixels
        return run.batch_size * (tokens["text"] if tower == "text" else tokens["image"] ** 2 + 1)

    saved = 0
    for tower in ("image", "text"):
        for path, x in flat(run.state.params[tower]).items():
            kernel = path.endswith("kernel") and ("/attn/" in path or "/mlp/" in path)
            saved += 2 * rows(tower) * x.size if kernel else 0
    patches = run.state.params["image"]["patch_embedding"]["kernel"].size
    saved += 2 * run.batch_size * 4 * patches
    # of the first layer of each tower the gradient of its input is not needed either: at most that
    least, most = saved, saved * 1.35
    assert least <= whole.step_flops - run.step_flops <= most


def test_below_a_head_that_trains_there_is_no_backward_pass():
    """Towers that are frozen below their heads: a step costs their forward pass, and the heads and
    the loss as before."""
    heads = r"^(image|text)/(?!projection)"
    config = {"image.head": "mlp", "text.head": "mlp", "image.head_width": "24"}
    more = [*config.items(), *((f"{tower}.lora_rank", "0") for tower in ("image", "text"))]
    run, whole = (
        assemble(lora_run(*more, freeze=freeze), jax.devices()[:1]) for freeze in ((heads,), ())
    )
    assert run.objective.locked_features == ("image", "text")

    def forward(tower, rows):
        example = jax.ShapeDtypeStruct((run.batch_size, *rows.shape[2:]), rows.dtype)
        if rows.ndim == 5:
            example = example.update(dtype=np.float32)
        params = jax.eval_shape(tower.headless.init, jax.random.key(0), example)
        jaxpr = jax.make_jaxpr(tower.headless.apply)(params, example)
        return flops.total(flops.products(jaxpr))

    below = forward(run.objective.image, run.batch.image) + forward(
        run.objective.text, run.batch.text
    )
    # training them costs two more products for each, but for the first layers' inputs
    assert 1.5 * below < whole.step_flops - run.step_flops <= 2 * below
    names = {path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(run.state.opt_state)}
    moments = [name for name in names if "/image/" in name or "/text/" in name]
    assert moments and all("/projection" in name for name in moments)


@pytest.mark.slow  # compiles two steps; `test_mesh` has the shardings
@pytest.mark.parametrize("scan", ["false", "true"])
def test_steps_are_the_same_on_meshes(scan, tmp_path):
    """Heads and MLP split over `tensor`: the parameters after two steps."""
    more = [(f"{tower}.scan", scan) for tower in ("image", "text")]
    mesh = [("mesh.tensor", "2"), ("mesh.fsdp", "2"), ("mesh.data", "2")]
    paths = (
        save(tmp_path / "one", lora_run(*more), steps=2),
        save(tmp_path / "eight", lora_run(*more, *mesh), steps=2, devices=jax.devices()),
    )
    one, eight = (restore(path, devices=jax.devices()[:1])[1].params for path in paths)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(eight)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=path_name(path))


def test_tensor_parallelism_splits_what_it_splits_of_kernels():
    """The side of an adapter that has the heads or the hidden width."""
    sizes = {"tensor": 2}
    for layer, a, b in (
        ("attn/qkv", (None, None), (None, None, "tensor", None)),
        ("attn/out", ("tensor", None, None), (None, None)),
        ("mlp/fc", (None, None), (None, "tensor")),
        ("mlp/proj", ("tensor", None), (None, None)),
    ):
        for name, spec in (("lora_a", a), ("lora_b", b)):
            found = partition_spec(f"image/block_0/{layer}/{name}", (4,) * len(spec), sizes)
            assert tuple(found) == spec, (layer, name)


def test_a_model_is_merged(tmp_path):
    """What is exported, and what another run starts from: with adapters of its own, which are new,
    and with scanned blocks, it starts at the same outputs."""
    workdir = save(tmp_path / "run", lora_run())
    run, state = restore(workdir, devices=jax.devices()[:1])
    model, tokenizer = pretrained.open_model(str(workdir))
    assert model.image.lora is None and not any("lora_" in k for k in model.flat)
    scan = [(f"{tower}.scan", "true") for tower in ("image", "text")]
    other = assemble(lora_run(*scan, ("init_from", str(workdir))), jax.devices()[:1])
    other = with_data(other, 256, tokenizer)
    begun = init(other)
    blocks = begun.params["image"]["transformer"]["blocks"]
    assert np.any(blocks["mlp"]["fc"]["lora_a"]) and not np.any(blocks["mlp"]["fc"]["lora_b"])
    for given, mine in ((state, model.params), (begun, model.params)):
        kernels = (p["image"]["transformer"] for p in (given.params, mine))
        a, b = (unstack_blocks(x)["block_0"]["attn"]["qkv"]["kernel"] for x in kernels)
        assert np.array_equal(a, b) == (given is begun)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    before, after = (r.encode(s).image(pictures).unit for r, s in ((run, state), (other, begun)))
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-5)


def test_refused_without_such_layers():
    with pytest.raises(ConfigError, match="ResNet.lora_rank") as error:
        ResNet(variant="resnet18", image_size=32, lora_rank=4)
    assert "a tower without attention and MLPs" in error.value.found
