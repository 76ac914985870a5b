"""A trained model for scripts and notebooks: what `clipx.load` returns."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import scipy.special
from jaxtyping import Float, UInt8
from PIL import Image

from clipx.data.pictures import Pictures
from clipx.data.text.tokenizers import Tokenizer
from clipx.errors import ConfigError, DataError
from clipx.evaluators.zero_shot import TEMPLATES, check_templates, ensemble
from clipx.parallel import mesh as meshes
from clipx.serving.evaluation import open_foreign
from clipx.training import pretrained
from clipx.training.encode import padded
from clipx.training.run import OpenRun, restore
from clipx.types import Device, Encoded, TrainState

OneImage: TypeAlias = "str | os.PathLike | Image.Image | np.ndarray"
Images: TypeAlias = "OneImage | Iterable[OneImage]"
_ARGUMENTS = {  # of `load`, by the config keys and flags that errors name
    "config.init_from": "path",
    "--init_from": "path",
    "--workdir": "path",
    "config.init_ignore": "init_ignore",
    "--step": "step",
}


class Model:
    """A trained model: images and texts in, NumPy arrays out.

    Images are file paths, Pillow images or uint8 arrays [h, w, 3]; one of them, a list of them
    (kinds may be mixed), or one array [n, h, w, 3]. Each goes through the evaluation transform: the
    shorter side is resized (bicubic), the centre is cut out. Texts are one string or a list of
    strings, cut to the tokenizer's context.

    Every call is padded to batches of `batch_size` rows, so a loop over calls of different sizes
    compiles each tower once.

    Attributes:
        config: the run's complete config, as config.json has it.
        tokenizer: `tokenizer(strings)` gives int32 ids [n, context].
        objective: the Linen module of the method.
        variables: its {"params", "batch_stats"}.
        step: the training step of the weights; None for weights of another library.
        batch_size: rows that each program takes, a multiple of the devices.
        image_size: pixels of a picture's side.
        framing: how a picture of any shape becomes that square.
        inner_product: whether `similarity` is the inner product of `encode_image` and
            `encode_text`. False for FILIP's tokens and for CLIP-Lite's critics other than "dot".
    """

    def __init__(self, run: OpenRun, state: TrainState, *, batch_size: int, step: int | None):
        if batch_size < 1:
            raise ConfigError("clipx.load: batch_size", str(batch_size), "at least 1")
        self.config: dict[str, Any] = run.complete
        self.tokenizer: Tokenizer = run.tokenizer
        self.objective = run.objective
        self.variables = {"params": state.params, "batch_stats": state.batch_stats}
        self.step = step
        self.inner_product = self.objective.compares == ("unit",)
        self._encode = run.encode(state, rows=batch_size)
        assert self._encode.rows is not None
        self._rows = self._encode.rows
        self.batch_size: int = self._rows
        self.image_size: int = run.objective.image.image_size
        self.framing = run.data.framing
        self._pictures = Pictures(run.objective.image.image_size, self.framing)
        self._devices = f"{run.mesh.devices.size} {run.mesh.devices.flat[0].platform} device(s)"
        with jax.set_mesh(run.mesh):
            scale = self.objective.apply(self.variables, method="similarity_scale")
        self._scale = float(np.asarray(scale))

    def __repr__(self) -> str:
        names = (self.config[part]["name"] for part in ("objective", "image", "text"))
        parameters = sum(x.size for x in jax.tree.leaves(self.variables["params"]))
        step = "" if self.step is None else f", step {self.step:,}"
        return (
            f"<clipx model {' '.join(names)}, images {self._pictures.image_size} px, "
            f"{parameters / 1e6:,.1f} M parameters{step}, on {self._devices}>"
        )

    def encode_image(self, images: Images) -> Float[np.ndarray, "n d"]:
        """Embeddings of the images: float32 rows of length 1.

        Warns where the method does not compare these rows by inner product (`inner_product`).
        Raises `DataError` for a file that is missing or holds no image, and for an array that is
        not uint8.
        """
        batches = list(self._encoded_images(images, ("unit",)))
        return self._unit(jax.tree.map(lambda *rows: np.concatenate(rows), *batches))

    @functools.cached_property
    def width(self) -> int:
        """Numbers of an embedding."""
        return np.asarray(self._encoded_texts("", ("unit",)).unit).shape[1]

    @functools.cached_property
    def digest(self) -> str:
        """A digest of the weights and of the tokenizer: equal ones give equal embeddings."""
        found = hashlib.sha256(json.dumps(self.tokenizer.save(), sort_keys=True).encode())
        for path, x in jax.tree_util.tree_flatten_with_path(self.variables)[0]:
            values = np.ascontiguousarray(jax.device_get(x))
            found.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}\n".encode())
            found.update(values.data)
        return found.hexdigest()[:16]

    def encode_pixels(self, pixels: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"]:
        """As `encode_image`, of pictures that have the evaluation transform behind them."""
        return np.asarray(self._encode.image(pixels, ("unit",)).unit, np.float32)

    def encode_text(self, texts: str | Iterable[str]) -> Float[np.ndarray, "n d"]:
        """Embeddings of the texts: float32 rows of length 1.

        Warns where the method does not compare these rows by inner product (`inner_product`).
        """
        return self._unit(self._encoded_texts(texts, ("unit",)))

    def similarity(
        self, images: Images, texts: str | Iterable[str]
    ) -> Float[np.ndarray, "images texts"]:
        """The method's own score of every image with every text, float32, without its temperature:
        the cosine of both embeddings, FILIP's mean of token similarities, or a critic's output."""
        encoded = self._encoded_texts(texts)
        rows = [self._scores(batch, encoded) for batch in self._encoded_images(images)]
        return np.concatenate(rows)

    def classify(
        self,
        images: Images,
        names: Sequence[str],
        templates: str | Sequence[str] = TEMPLATES,
    ) -> Float[np.ndarray, "images names"]:
        """Probability of each class name for each image, float32; rows sum to 1.

        templates: sentences with {} where the name goes; several are one classifier, as in the
        `zero_shot` evaluator. The probabilities are the softmax over names of the similarity times
        the learned scale; the most probable class is the one that `zero_shot` predicts.
        """
        names, templates = _strings(names, "names"), _strings(templates, "templates")
        for what, given in (("names", names), ("templates", templates)):
            if not given:
                raise ConfigError(f"clipx.load(...).classify: {what}", "none", "at least one")
        check_templates(templates, "clipx.load(...).classify: templates")
        members = ensemble(self._encode.text, names, templates, self._rows)
        rows = [
            sum(self._scores(batch, member) for member in members) / len(members)
            for batch in self._encoded_images(images)
        ]
        return scipy.special.softmax(self._scale * np.concatenate(rows), axis=1).astype(np.float32)

    def _unit(self, encoded: Encoded) -> Float[np.ndarray, "n d"]:
        if not self.inner_product:
            warnings.warn(
                f"{type(self.objective).__name__} does not compare these embeddings by inner "
                "product; use model.similarity or model.classify to score pairs",
                stacklevel=3,
            )
        return np.asarray(encoded.unit, np.float32)

    def _encoded_images(self, images: Images, fields: tuple[str, ...] = ()) -> Iterator[Encoded]:
        """What the image tower gives, a batch at a time; one batch of no rows for no images."""
        listed = _images(images)
        if not listed:
            blank = np.zeros((1, *(self._pictures.image_size,) * 2, 3), np.uint8)
            yield jax.tree.map(lambda x: x[:0], self._encode.image(blank, fields))
        for pixels in self._pictures(listed, self._rows):
            yield self._encode.image(pixels, fields)

    def _encoded_texts(self, texts: str | Iterable[str], fields: tuple[str, ...] = ()) -> Encoded:
        listed = _strings(texts, "texts")
        if listed:
            return self._encode.text(listed, fields)
        return jax.tree.map(lambda x: x[:0], self._encode.text([""], fields))

    def _scores(self, images: Encoded, texts: Encoded) -> Float[np.ndarray, "i t"]:
        """`similarity` of encoded rows, without a program for every number of them."""
        if self.inner_product:
            return np.asarray(images.unit, np.float32) @ np.asarray(texts.unit, np.float32).T
        n, m = (len(jax.tree.leaves(x)[0]) for x in (images, texts))
        scores, size = np.empty((n, m), np.float32), self._rows

        def part(encoded: Encoded, start: int) -> Encoded:
            return jax.tree.map(lambda x: padded(x[start : start + size], size), encoded)

        for i in range(0, n, size):
            for j in range(0, m, size):
                tile = scores[i : i + size, j : j + size]
                full = self._encode.similarity(part(images, i), part(texts, j))
                tile[...] = full[: tile.shape[0], : tile.shape[1]]
        return scores


_SINGLE = (str, os.PathLike, Image.Image, np.ndarray)


def _images(images: Images) -> list[OneImage]:
    """A list of single images."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if hasattr(images, "__array__"):
        array = np.asarray(images)
        return list(array) if array.ndim == 4 else [array]
    return [x if isinstance(x, _SINGLE) else _checked(x) for x in images]


def _checked(image: Any) -> np.ndarray:
    if not hasattr(image, "__array__"):
        raise DataError(
            f"an image of type {type(image).__name__}, expected a path, a Pillow image or a uint8 "
            "array [h, w, 3]"
        )
    return np.asarray(image)


def _strings(texts: str | Iterable[str], what: str) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(texts)
    for text in listed:
        if not isinstance(text, str):
            raise DataError(f"{what}: {text!r} of type {type(text).__name__}, expected strings")
    return listed


def load(
    path: str | os.PathLike,
    *,
    step: str | int = "",
    init_ignore: Sequence[str] = (),
    batch_size: int = 32,
    devices: Sequence[Device] | None = None,
    mesh: Mapping[str, int] | None = None,
    average: bool = False,
) -> Model:
    """The trained model at `path`: a workdir, one of its checkpoints (`workdir/checkpoints/600`),
    or a folder or file of open_clip's or Hugging Face's CLIP or SigLIP.

    Raises `ConfigError` for a path that holds no model, or one that clipx cannot express.

    Args:
        path: the workdir, checkpoint, folder or file.
        step: the checkpoint of a workdir: a number, "latest" or "best". Default: the best if the
            run chose one by `train.best`, else the latest.
        init_ignore: differences between another library's model and clipx to accept, as in
            `config.init_ignore`. The error that refuses a model lists them.
        batch_size: rows that each device program takes; smaller calls are padded to it. 1 answers
            a single query fastest, hundreds encode a collection fastest.
        devices: the devices to use. Default: those of an enclosing `jax.set_mesh(...)`, else all.
        mesh: axis sizes as in `config.mesh`; `{"fsdp": 4}` splits parameters over 4 devices.
            Default: those of an enclosing `jax.set_mesh(...)`, else data-parallel.
        average: the averages of the parameters, of a run with `optimizer.average`.
    """
    if devices is None and mesh is None and (active := meshes.active_axes()):
        devices, mesh = active
    with _named_arguments():
        workdir = pretrained.workdir(os.fspath(path))
        if workdir is None:
            if step:
                raise ConfigError("--step", str(step), "none: this is no workdir of clipx")
            run, state = open_foreign(os.fspath(path), {}, init_ignore, devices=devices, mesh=mesh)
            return Model(run, state, batch_size=batch_size, step=None)
        folder, named = workdir
        options: dict[str, Any] = {"devices": devices, "mesh": mesh, "average": average}
        run, state = restore(folder, step or named, evals=False, **options)
        return Model(run, state, batch_size=batch_size, step=int(state.step))


@contextlib.contextmanager
def _named_arguments() -> Iterator[None]:
    """Lets errors name the arguments of `load` where they name flags and config keys."""
    try:
        yield
    except ConfigError as error:
        for name, argument in _ARGUMENTS.items():
            error.where = error.where.replace(name, f"clipx.load: {argument}")
            error.fix = error.fix.replace("--step=latest", "step='latest'").replace(name, argument)
        raise
