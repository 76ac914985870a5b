"""`clipx.load`: one model for workdirs, checkpoints and other libraries' folders, from images and
strings to arrays."""

import functools
import re
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from PIL import Image
from support import ROOT, exports, tiny
from support.runs import small

import clipx
from clipx.errors import ConfigError, DataError
from clipx.evaluators.zero_shot import ZeroShot
from clipx.serving.export import Options, export
from clipx.training import encode
from clipx.training.run import restore
from clipx.training.step import row_keys

TEXTS = ["two men riding horses", "a dog with a red ball", "the quick brown fox"]
METHODS = {
    "clip": {},
    "clip_lite:concat": {"critic": "concat"},
    "filip": {"token_width": 6, "top_k": 3, "evaluation": "both_tokens"},
}
NO_PRODUCT = {"clip_lite:concat", "filip"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A function from a method to a workdir with random weights."""
    made = {}

    def workdir(method):
        if method not in made:
            name = method.partition(":")[0]
            config = small(("image.pool", "class"), ("train.best", "")) | {
                "objective": {"name": name, **METHODS[method]},
                "optimizer": {"learning_rate": 1e-3, "rules": [{"pattern": ".*"}]},
                "evals": {},
            }
            config["tokenizer"] |= {"mask": name == "filip"}
            made[method] = exports.save(tmp_path_factory.mktemp("run"), config)
        return made[method]

    return workdir


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Files of five images of different sizes."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for i in range(5):
        pixels = rng.integers(0, 256, (20 + 3 * i, 30 - 4 * i, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_a_model_gives_what_evaluators_see(method, workdir, images):
    device = jax.devices()[:1]
    model = clipx.load(workdir(method), batch_size=8, devices=device)
    run, state = restore(workdir(method), devices=device)
    reference = run.encode(state, rows=None if method == "clip" else 8)  # else one program for both
    pixels = np.concatenate(list(model._pictures(images, 8)))
    seen, read = reference.image(pixels), reference.text(TEXTS)
    expected = reference.similarity(seen, read)
    scores = model.similarity(images, TEXTS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        a, b = model.encode_image(images), model.encode_text(TEXTS)
    assert len(said) == (2 if method in NO_PRODUCT else 0)
    assert model.inner_product == (method not in NO_PRODUCT)
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(a, reference.image(pixels, ("unit",)).unit, rtol=1e-5, atol=1e-6)
    if model.inner_product:
        np.testing.assert_allclose(a @ b.T, scores, rtol=1e-5, atol=1e-6)

    templates = ["a photo of {}", "{} in the rain"]
    chances = model.classify(images, TEXTS, templates)
    np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-5)
    evaluator = ZeroShot(examples=Labelled(pixels, chances.argmax(1)), classes=tuple(TEXTS),
                         templates=tuple(templates))  # fmt: skip
    assert evaluator(reference)["top1"] == pytest.approx(1)
    one = model.classify(images, TEXTS, templates[0])
    logits = np.log(one) / model._scale
    alone = model.similarity(images, [templates[0].format(text) for text in TEXTS])
    np.testing.assert_allclose(logits - logits[:, :1], alone - alone[:, :1], rtol=1e-3, atol=1e-4)


class Labelled:
    """Images in memory with labels, as an evaluator reads them."""

    classes = ()

    def __init__(self, pixels, labels):
        self.pixels, self.labels = pixels, labels

    def __len__(self):
        return len(self.labels)

    def texts(self, row):
        return ()

    def label(self, row):
        return int(self.labels[row])

    def batches(self, size):
        yield self.pixels


@pytest.mark.parametrize(
    "name, path",
    [
        ("clip", "logit_scale"),
        ("clip_lite", "image_text/logit_scale"),
        ("filip", "late_interaction/logit_scale"),
    ],
)
def test_scales_are_those_of_the_losses(name, path):
    variables = tiny.variables(name)
    parameter = functools.reduce(lambda tree, key: tree[key], path.split("/"), variables["params"])
    scale = tiny.objective(name).apply(variables, method="similarity_scale")
    assert scale == pytest.approx(np.exp(parameter))


def test_a_critic_of_both_sides_gives_logits(workdir):
    assert clipx.load(workdir("clip_lite:concat"), devices=jax.devices()[:1])._scale == 1


@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_every_objective_has_a_scale(name):
    module = tiny.objective(name)

    def scale(batch):
        keys = row_keys(0, jax.numpy.int32(0), tiny.ROWS)
        variables = module.init(jax.random.key(0), batch, keys, module.init_memory())
        return module.apply(variables, method="similarity_scale")

    assert jax.eval_shape(scale, tiny.batch(module)).shape == ()


def test_every_kind_of_image_is_one(workdir, images):
    model = clipx.load(workdir("clip"), batch_size=8, devices=jax.devices()[:1])
    expected = model.encode_image(images)
    opened = [Image.open(path) for path in images]
    arrays = [np.asarray(image) for image in opened]
    mixed = [str(images[0]), opened[1], arrays[2], jax.numpy.asarray(arrays[3]), images[4]]
    for same in (opened, arrays, mixed, iter(images)):
        np.testing.assert_array_equal(model.encode_image(same), expected)
    for one in (images[0], str(images[0]), opened[0], arrays[0]):
        np.testing.assert_array_equal(model.encode_image(one), expected[:1])
    stacked = np.stack([arrays[0]] * 3)
    np.testing.assert_array_equal(model.encode_image(stacked), expected[[0, 0, 0]])
    grey = Image.fromarray(arrays[0][..., 0])
    np.testing.assert_array_equal(
        model.encode_image([grey, np.asarray(grey), np.asarray(grey)[..., None]]),
        model.encode_image([grey.convert("RGB")] * 3),
    )
    np.testing.assert_array_equal(model.encode_text(TEXTS[0]), model.encode_text(TEXTS)[:1])
    assert model.encode_image([]).shape == (0, expected.shape[1])
    assert model.encode_text([]).shape == (0, expected.shape[1])
    assert model.similarity([], TEXTS).shape == (0, 3)
    assert model.classify([], TEXTS).shape == (0, 3)
    assert model.tokenizer(TEXTS).shape == (3, model.config["tokenizer"]["context"])
    assert "clip" in repr(model) and "step 3" in repr(model)


@pytest.mark.parametrize("method", ["clip", "filip"])
def test_calls_of_any_size_share_one_program(method, workdir, images):
    model = clipx.load(workdir(method), batch_size=8, devices=jax.devices()[:1])
    pixels = np.asarray(Image.open(images[0]))

    def everything(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.encode_image([pixels] * count)
            model.encode_text(TEXTS[:1] * count)
        model.similarity([pixels] * count, TEXTS[:1] * (count + 1))
        model.classify([pixels] * count, [f"name {i}" for i in range(count)])

    everything(3)
    programs = [encode._encode_rows, encode._similarity]
    before = [f._cache_size() for f in programs]
    for count in (1, 2, 5, 7, 8, 9, 17):
        everything(count)
    assert [f._cache_size() for f in programs] == before


def test_a_checkpoint_an_export_and_a_mesh_are_the_same_model(workdir, images, tmp_path):
    folder = workdir("clip")
    one = {"devices": jax.devices()[:1], "batch_size": 8}
    expected = clipx.load(folder, **one).similarity(images, TEXTS)
    same = [clipx.load(folder / "checkpoints" / "3", **one), clipx.load(folder, step=3, **one)]
    export(folder, Options("open_clip", tmp_path / "open_clip", verify=False))
    foreign = clipx.load(tmp_path / "open_clip", **one)
    assert foreign.step is None and foreign.config["objective"]["name"] == "clip"
    same += [foreign, clipx.load(folder, mesh={"data": 2, "fsdp": 4})]
    with jax.set_mesh(jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])):
        same.append(clipx.load(folder))
        assert "4 cpu" in repr(same[-1])
        np.testing.assert_allclose(same[-1].similarity(images, TEXTS), expected, atol=1e-5)
    for model in same:
        np.testing.assert_allclose(model.similarity(images, TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["workdir", "open_clip"])
def test_the_lines_of_the_readme(kind, workdir, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = workdir("clip")
    if kind == "open_clip":
        export(path, Options("open_clip", tmp_path / "open_clip", verify=False))
        path = tmp_path / "open_clip"
    *lines, last = code.replace("runs/quickstart", str(path)).strip().splitlines()
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec("\n".join(lines), names)
    chances = eval(last, names)
    assert chances.shape == (1, 3) and str(path) in "\n".join(lines)
    np.testing.assert_allclose(chances.sum(), 1, rtol=1e-5)


def test_what_cannot_be_is_refused(workdir, images, tmp_path):
    model = clipx.load(workdir("clip"), batch_size=8)
    with pytest.raises(ConfigError, match="clipx.load: path(.*\n)+.*nothing at"):
        clipx.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="clipx.load: step"):
        clipx.load(workdir("clip"), step=5)
    with pytest.raises(ConfigError, match="clipx.load: batch_size"):
        clipx.load(workdir("clip"), batch_size=0)
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match="axes model"):
        clipx.load(workdir("clip"))
    with pytest.raises(DataError, match="none.png"):
        model.encode_image([images[0], tmp_path / "none.png"])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="text.png.*cannot be decoded"):
        model.encode_image(tmp_path / "text.png")
    with pytest.raises(DataError, match=r"float32 \[4, 4, 3\], expected uint8"):
        model.encode_image(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(DataError, match="type int, expected a path"):
        model.encode_image([3])
    with pytest.raises(DataError, match="texts: 3 of type int"):
        model.encode_text([3])
    with pytest.raises(ConfigError, match="templates(.*\n)+.*{} where the class name goes"):
        model.classify(images, TEXTS, "a photo")
    with pytest.raises(ConfigError, match="names"):
        model.classify(images, [])


def test_importing_clipx_imports_nothing_heavy():
    code = (
        "import sys, clipx\n"
        "assert not {'jax', 'numpy', 'flax', 'grain'} & set(sys.modules)\n"
        "assert not hasattr(clipx, 'nothing')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
