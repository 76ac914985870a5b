"""An export: a run's model as a folder that open_clip or transformers loads, and the proof that the
library says what clipx says."""

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

from clipx.errors import (
    ConfigError,
    MissingLibrary,
    NotExpressible,
    NotProven,
    RunError,
    install_hint,
)
from clipx.interop import card, formats, libraries, tokenizer, verify
from clipx.interop.base import Format
from clipx.interop.model import Model
from clipx.interop.rules import Arrays
from clipx.interop.verify import Proof
from clipx.objectives.base import Objective
from clipx.serving.tokenizer_files import tokenizer_files
from clipx.training import metrics, pretrained
from clipx.training.checkpoint import Checkpoints, read_json
from clipx.training.run import Run, restore
from clipx.types import TrainState


@dataclasses.dataclass(frozen=True)
class Options:
    """What is exported, and how."""

    format: str
    out: pathlib.Path
    step: str = ""  # a step, latest or best; empty: best if the run kept one, else latest
    with_heads: bool = False
    pt: bool = False  # torch's own file too
    verify: bool | None = None  # None: if the libraries are there
    license: str = "unknown"


@dataclasses.dataclass(frozen=True)
class Exported:
    """An export that was written."""

    out: pathlib.Path
    proof: Proof | None  # None if it was not verified
    unproven: str  # why it was not
    left_out: tuple[str, ...]  # names of the heads that training used and the folder lacks

    def __str__(self) -> str:
        """A few lines for whoever asked for it."""
        said = card.proof_lines(self.proof) if self.proof else [f"not verified: {self.unproven}"]
        if self.left_out:
            said.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join([f"  {line}" for line in said] + [f"written to {self.out}"])


def export(workdir: str | os.PathLike, options: Options) -> Exported:
    """Writes the folder `options.out` from a run's checkpoint.

    Raises `ConfigError` for a model that the format cannot express, for a folder that is there, or
    for a library that is missing and asked for; `RunError` for an export that is not proven. In
    none of these cases is a folder left behind.
    """
    out = options.out.expanduser().absolute()
    format_ = formats.named(options.format)
    if out.exists():
        raise ConfigError("--out", f"{out} is there already", "a folder that is not there yet")
    folder = pathlib.Path(workdir).expanduser().absolute()
    best = read_json(folder / "config.json")["train"]["best"]
    run, state = restore(folder, options.step or ("best" if best else "latest"))
    model, heads = pretrained.split(run.objective, run.tokenizer, state)
    job = _Job(run, state, model, heads, folder, format_, out, options)
    try:
        with _aside(out) as aside:
            proof, why = job.write(aside)
    except NotExpressible as error:
        expected = "a model that the format can express"
        raise ConfigError("--format", f"{options.format}: {error}", expected) from None
    except NotProven as error:
        raise RunError(f"the export is not what was trained, and was not kept: {error}") from None
    left_out = () if options.with_heads else tuple(_heads(heads))
    return Exported(out, proof, why, left_out)


@contextlib.contextmanager
def _aside(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder that is renamed to `out` at the end, and deleted if anything is raised."""
    aside = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
    except OSError as error:
        found = f"{out}: {error.strerror}"
        raise ConfigError("--out", found, "a folder that can be written") from None
    try:
        yield aside
        aside.rename(out)
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror}); nothing was kept") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _heads(arrays: Mapping[str, Any]) -> list[str]:
    """The names of the modules that the arrays belong to."""
    return sorted({name.split("/")[1] for name in arrays})


@dataclasses.dataclass(frozen=True)
class _Job:
    """One export: what is written, in which format and where."""

    run: Run
    state: TrainState
    model: Model
    heads: Arrays
    workdir: pathlib.Path
    format: Format
    out: pathlib.Path
    options: Options

    def write(self, aside: pathlib.Path) -> tuple[Proof | None, str]:
        """Writes all files into `aside`, verifies them, and returns the proof, or None and why
        there is none."""
        verified, why = self._verdict()
        try:
            self._write_model(aside)
            proof = None
            if verified:
                proof = verify.prove(self.format, aside, self.model, self.run.tokenizer)
            self.format.write_configs(self.model, aside, str(self.out))
        except MissingLibrary as error:
            raise _missing(error) from None
        if self.options.with_heads and self.heads:
            heads = {name: np.ascontiguousarray(x) for name, x in self.heads.items()}
            save_file(heads, aside / card.HEADS)
        text = card.card(self._facts(proof, why))
        (aside / "README.md").write_text(text, encoding="utf-8")
        return proof, why

    def _verdict(self) -> tuple[bool, str]:
        """Whether to verify, and if not, why."""
        if self.options.verify is False:
            return False, "--noverify"
        try:
            verify.needs(self.format, self.model)
        except MissingLibrary as error:
            if self.options.verify:
                raise _missing(error) from None
            return False, str(error)
        return True, ""

    def _write_model(self, aside: pathlib.Path) -> None:
        """The weights, the configs and the tokenizer."""
        arrays = self.format.write(self.model, aside, str(aside))
        if files := tokenizer_files(self.format, self.model, self.run.tokenizer):
            for name, data in files.items():
                data = data if isinstance(data, bytes) else data.encode("utf-8")
                (aside / name).write_bytes(data)
            saved = pretrained.without_mask(self.run.tokenizer.save())
            text = json.dumps(saved, indent=2) + "\n"
            (aside / tokenizer.CLIPX).write_text(text, encoding="utf-8")
        if self.options.pt:
            try:
                torch = libraries.require("torch")
            except MissingLibrary as error:
                expected = "torch, which writes its own file"
                raise ConfigError("--pt", str(error), expected, "pip install torch") from None
            tensors = {k: torch.from_numpy(np.array(x)) for k, x in arrays.items()}
            torch.save(tensors, aside / self.format.torch_weights)

    def _facts(self, proof: Proof | None, why: str) -> card.Facts:
        """What the card says of the run and of the proof."""
        run, step = self.run, int(self.state.step)
        checkpoints = Checkpoints(
            self.workdir, keep=run.config.train.keep, best=run.config.train.best
        )
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
            license=self.options.license,
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

    def _metrics(self, step: int) -> dict[str, float]:
        """What the run's evaluations gave at a step."""
        evals = tuple(f"{name}/" for name in self.run.complete["evals"])
        found: dict[str, float] = {}
        for row in metrics.read(self.workdir):
            if row["step"] == step:
                found |= {k: float(v) for k, v in row.items() if k.startswith(evals or "\0")}
        return found

    def _notes(self) -> list[str]:
        """What a user of the folder has to know."""
        model, notes = self.model, []
        if not _scores_by_cosine(self.run, self.state, model):
            notes.append(
                "The run scores a picture and a text by a head of its own. What is here are the "
                "two towers and the cosine of what they say, which is another score; "
                "`--with_heads` keeps the head."
            )
        for width in (model.image.output_width, model.text.output_width):
            if width < model.width:
                notes.append(
                    f"One tower says {width} channels; zeros fill them up to {model.width}."
                )
        notes += self.format.notes(model, str(self.out))
        if model.words.dropped is not None:
            notes.append("The embedding of the mask, which no text has, is left out.")
        if not self.format.has_tokenizer(model):
            rule = self.run.tokenizer.config.cleaning
            exact = rule in self.format.exact_cleaning
            but = "" if exact else " but for HTML entities and broken encodings"
            notes.append(
                f"Captions were cleaned by clipx's rule `{rule}` in training. The tokenizer here "
                f"does the same{but}."
            )
        return notes


def _missing(error: Exception) -> ConfigError:
    return ConfigError("--format", str(error), "what judges an export", install_hint("interop"))


def _scores_by_cosine(run: Run, state: TrainState, model: Model) -> bool:
    """Whether the objective's score of a pair is the cosine of what the towers say."""
    cls = type(run.objective)
    names = ("similarity", "encode_image", "encode_text")
    if all(getattr(cls, name) is getattr(Objective, name) for name in names):
        return True
    objective = run.objective.clone(image=model.image, text=model.text)
    own = {"params": state.params, "batch_stats": state.batch_stats}
    own = jax.tree.map(np.asarray, own)
    variables = {
        "params": {**own["params"], **model.params},
        "batch_stats": {**own["batch_stats"], **model.batch_stats},
    }

    def score(module, images, ids):
        return module.similarity(module.encode_image(images), module.encode_text(ids))

    images, ids = verify.pictures(model.image.image_size), run.tokenizer(verify.CAPTIONS)
    found = jax.jit(functools.partial(objective.apply, method=score))(
        variables, np.stack(images), ids
    )
    said = verify.ours(model, images, ids)
    cosines = verify.logits(said.image, said.text, 0, None)
    return np.allclose(found, cosines, rtol=0, atol=1e-3)
