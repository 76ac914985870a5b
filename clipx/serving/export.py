"""Exports a run's model as a folder that open_clip, transformers or onnxruntime loads, and proves
that the library computes what clipx computes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from clipx.config import secrets
from clipx.errors import (
    ConfigError,
    MissingLibrary,
    NotExpressible,
    NotProven,
    RunError,
    install_hint,
)
from clipx.interop import card, formats, libraries, origin, tokenizer, verify
from clipx.interop.base import Format
from clipx.interop.model import Model
from clipx.interop.rules import Arrays
from clipx.interop.verify import Proof
from clipx.objectives.base import Objective
from clipx.serving.tokenizer_files import tokenizer_files
from clipx.training import metrics, pretrained
from clipx.training.checkpoint import Checkpoints
from clipx.training.metric_table import metric, spelled
from clipx.training.run import OpenRun, restore
from clipx.training.shown import working
from clipx.types import TrainState


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of an export."""

    format: str
    out: pathlib.Path
    step: str = ""  # a number, latest or best; empty: best if the run kept one, else latest
    with_heads: bool = False
    pt: bool = False  # also write torch's own file
    verify: bool | None = None  # None: if the libraries are installed
    license: str = "unknown"
    average: bool = False  # the averages of the parameters


@dataclasses.dataclass(frozen=True)
class Exported:
    """A finished export."""

    out: pathlib.Path
    proof: Proof | None  # None if the export was not verified
    unproven: str  # why it was not verified
    left_out: tuple[str, ...]  # names of training's heads that the folder lacks

    def __str__(self) -> str:
        """A few lines to print: the proof, what is left out, and the folder."""
        lines = card.proof_lines(self.proof) if self.proof else [f"not verified: {self.unproven}"]
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join([f"  {line}" for line in lines] + [f"written to {self.out}"])


def export(workdir: str | os.PathLike, options: Options) -> Exported:
    """Writes the folder `options.out` from a run's checkpoint.

    Raises `ConfigError` if the format cannot express the model, if the folder exists already, or if
    a library that the options need is missing. Raises `RunError` if verification fails. In none of
    these cases is a folder left behind.
    """
    out = options.out.expanduser().absolute()
    format_ = formats.named(options.format)
    if out.exists():
        raise ConfigError("--out", f"{out} is there already", "a folder that does not exist yet")
    if options.pt and not format_.torch_weights:
        raise ConfigError("--pt", f"--format={format_.name}", "a format with a torch file")
    folder = pathlib.Path(workdir).expanduser().absolute()
    run, state = restore(folder, options.step, average=options.average)
    model, heads = pretrained.split(run.objective, run.tokenizer, state, run.data.framing)
    job = _Job(run, state, model, heads, folder, format_, out, options)
    try:
        with _aside(out) as aside:
            proof, why = job.write(aside)
    except NotExpressible as error:
        expected = "a model that the format can express"
        raise ConfigError("--format", f"{options.format}: {error}", expected) from None
    except NotProven as error:
        raise RunError(
            f"the export differs from the trained model, and was not kept: {error}"
        ) from None
    left_out = () if options.with_heads else tuple(_heads(heads))
    return Exported(out, proof, why, left_out)


@contextlib.contextmanager
def _aside(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder beside `out`, renamed to `out` at the end, or deleted if anything raises."""
    aside = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
    except OSError as error:
        fault = f"{out}: {error.strerror}"
        raise ConfigError("--out", fault, "a folder that can be written") from None
    try:
        yield aside
        aside.rename(out)
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror}); nothing was kept") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _heads(arrays: Mapping[str, Any]) -> list[str]:
    """The names of the head modules that own these arrays, sorted."""
    return sorted({name.split("/")[1] for name in arrays})


@dataclasses.dataclass(frozen=True)
class _Job:
    """One export in progress."""

    run: OpenRun
    state: TrainState
    model: Model
    heads: Arrays
    workdir: pathlib.Path
    format: Format
    out: pathlib.Path
    options: Options

    def write(self, aside: pathlib.Path) -> tuple[Proof | None, str]:
        """Writes all files into `aside` and verifies them. Returns (the proof or None, why there is
        none)."""
        verified, why = self._verdict()
        try:
            self._write_model(aside)
            proof = None
            if verified:
                with working("comparing with the library"):
                    proof = verify.prove(self.format, aside, self.model, self.run.tokenizer)
            self.format.write_configs(self.model, aside, str(self.out))
        except MissingLibrary as error:
            raise self._missing(error) from None
        if self.options.with_heads and self.heads:
            heads = {name: np.ascontiguousarray(x) for name, x in self.heads.items()}
            save_file(heads, aside / card.HEADS)
        text = secrets.cut(card.card(self._facts(proof, why)))
        (aside / "README.md").write_text(text, encoding="utf-8")
        return proof, why

    def _verdict(self) -> tuple[bool, str]:
        """Returns (whether to verify, why not). Raises `ConfigError` if `--verify` needs a library
        that is missing."""
        if self.options.verify is False:
            return False, "--noverify"
        try:
            verify.needs(self.format, self.model)
        except MissingLibrary as error:
            if self.options.verify:
                raise self._missing(error) from None
            return False, str(error)
        return True, ""

    def _missing(self, error: Exception) -> ConfigError:
        expected = "the libraries that write and verify an export"
        return ConfigError("--format", str(error), expected, install_hint(self.format.extra))

    def _write_model(self, aside: pathlib.Path) -> None:
        """Writes the weights and the tokenizer into `aside`."""
        arrays = self.format.write(self.model, aside, str(aside))
        if files := tokenizer_files(self.format, self.model, self.run.tokenizer):
            for name, data in files.items():
                data = data if isinstance(data, bytes) else data.encode("utf-8")
                (aside / name).write_bytes(data)
            saved = secrets.cut_all(pretrained.without_mask(self.run.tokenizer.save()))
            text = json.dumps(saved, indent=2) + "\n"
            (aside / tokenizer.CLIPX).write_text(text, encoding="utf-8")
        if self.options.pt:
            try:
                torch = libraries.require("torch")
            except MissingLibrary as error:
                expected = "torch, which writes that file"
                raise ConfigError("--pt", str(error), expected, "pip install torch") from None
            tensors = {k: torch.from_numpy(np.array(x)) for k, x in arrays.items()}
            torch.save(tensors, aside / self.format.torch_weights)

    def _facts(self, proof: Proof | None, why: str) -> card.Facts:
        """The values that the model card needs."""
        run, step = self.run, int(self.state.step)
        checkpoints = Checkpoints(self.workdir)
        saved = checkpoints.restore_run(step)
        checkpoints.close()
        image, text = run.complete["image"], run.complete["text"]
        layers = f" of {text['depth']} layers" if "depth" in text else ""
        arrays = self.model.flat.items()
        count = sum(x.size for name, x in arrays if name.startswith("params/"))
        return card.Facts(
            format=self.format,
            folder=self.out.name,
            name=self.out.name,
            method=run.complete["objective"]["name"],
            license=self._license(),
            towers=f"{image.get('variant', image['name'])} at {image['image_size']} px and "
            f"{text['name']}{layers}, {count:,} parameters",
            data=f"{run.rows:,} rows of `{run.complete['data']['source']}`, fingerprint "
            f"`{saved['fingerprint']}`",
            seen=f"{step * run.batch_size:,} ({step:,} steps at batch {run.batch_size:,})",
            metrics=self._metrics(step),
            proof=proof,
            unproven=why,
            left_out=_heads(self.heads),
            with_heads=self.options.with_heads,
            heads=tuple(self.heads),
            notes=self._notes(),
        )

    def _license(self) -> str:
        """The licence that the user names; else that of the weights that the run started from."""
        given = {name for _, name in origin.origins(self.run.complete) if name}
        told = self.options.license
        return given.pop() if told == "unknown" and len(given) == 1 else told

    def _metrics(self, step: int) -> dict[str, str]:
        """The metrics of the run's evaluations at a step, as people read them."""
        known = self.run.complete["evals"]
        evals = tuple(f"{name}/" for name in self.run.complete["evals"])
        values: dict[str, float] = {}
        for row in metrics.read(self.workdir):
            if row["step"] == step:
                values |= {k: float(v) for k, v in row.items() if k.startswith(evals or "\0")}
        return {key: spelled(metric(key, known), value) for key, value in values.items()}

    def _notes(self) -> list[str]:
        """Notes for users of the folder, for the model card."""
        model = self.model
        notes = [sentence for sentence, _ in origin.origins(self.run.complete)]
        if not _scores_by_cosine(self.run, self.state, model):
            notes.append(
                "The run scores a picture and a text by a head of its own. Without it the two "
                "towers give the cosine of their embeddings, which is a different score. The flag "
                "`--with_heads` of the export keeps the head."
            )
        for width in (model.image.output_width, model.text.output_width):
            if width < model.width:
                notes.append(
                    f"One tower has {width} output channels; zeros fill them up to {model.width}."
                )
        notes += self.format.notes(model, str(self.out))
        if model.words.dropped is not None:
            notes.append(
                "The embedding of the mask token is left out, because no text contains it."
            )
        if not self.format.has_tokenizer(model):
            rule = self.run.tokenizer.config.cleaning
            exact = rule in self.format.exact_cleaning
            but = "" if exact else ", except for HTML entities and broken encodings"
            notes.append(
                f"Captions were cleaned by clipx's rule `{rule}` in training. The tokenizer here "
                f"does the same{but}."
            )
        return notes


def _scores_by_cosine(run: OpenRun, state: TrainState, model: Model) -> bool:
    """Whether the objective scores a pair by the cosine of the towers' embeddings."""
    cls = type(run.objective)
    names = ("similarity", "encode_image", "encode_text")
    if all(getattr(cls, name) is getattr(Objective, name) for name in names):
        return True
    objective = run.objective.clone(image=model.image, text=model.text)
    trained = {"params": state.params, "batch_stats": state.batch_stats}
    trained = jax.tree.map(np.asarray, trained)
    variables = {
        "params": {**trained["params"], **model.params},
        "batch_stats": {**trained["batch_stats"], **model.batch_stats},
    }

    def score(module: Objective, images: jax.Array, ids: jax.Array) -> jax.Array:
        return module.similarity(module.encode_image(images), module.encode_text(ids))

    images, ids = verify.pictures(model.image.image_size), run.tokenizer(verify.CAPTIONS)
    scores = jax.jit(functools.partial(objective.apply, method=score))(
        variables, np.stack(images), ids
    )
    embeddings = verify.ours(model, images, ids)
    cosines = verify.logits(embeddings.image, embeddings.text, 0, None)
    return np.allclose(scores, cosines, rtol=0, atol=1e-3)
