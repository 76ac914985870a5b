"""`python -m clipx.export --workdir=DIR --format=open_clip --out=DIR`: a run as a folder that
open_clip or transformers loads, with the proof that they say what clipx says."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from safetensors.numpy import save_file

from clipx import cli
from clipx.data.text import vocabulary
from clipx.errors import ConfigError, MissingLibrary, NotExpressible, NotProven, RunError
from clipx.interop import base, card, guests, huggingface, open_clip, proof, tokenizer
from clipx.interop.base import Model
from clipx.models.bert import BERT
from clipx.objectives.base import Objective
from clipx.training import metrics, pretrained
from clipx.training.checkpoint import Checkpoints, read_json
from clipx.training.run import Run, restore
from clipx.types import TrainState

FORMATS = ("open_clip", "huggingface")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command was asked for."""

    format: str
    out: pathlib.Path
    step: str = ""  # a step, latest or best; empty: best where the run kept one, else latest
    with_heads: bool = False
    pt: bool = False  # torch's own file too
    verify: bool | None = None  # None: where the libraries are there
    license: str = "unknown"


def export(workdir: str | os.PathLike, options: Options) -> proof.Proof | None:
    """Writes the folder `options.out` and returns its proof, None where it was not verified.

    Raises `ConfigError` for a model that the format cannot express, for a folder that is there, or
    for a library that is missing and asked for; `RunError` for an export that is not proven. In
    none of these cases is a folder left behind.
    """
    out = options.out.expanduser().absolute()
    if options.format not in FORMATS:
        raise ConfigError("--format", repr(options.format), " or ".join(FORMATS))
    if out.exists():
        raise ConfigError("--out", f"{out} is there already", "a folder that is not there yet")
    folder = pathlib.Path(workdir).expanduser().absolute()
    best = read_json(folder / "config.json")["train"]["best"]
    run, state = restore(folder, options.step or ("best" if best else "latest"))
    model, heads = pretrained.split(run.objective, run.tokenizer, state)
    try:
        with _aside(out) as aside:
            found, why = _write(run, state, model, heads, folder, aside, out, options)
    except NotExpressible as error:
        expected = "a model that the format can express"
        raise ConfigError("--format", f"{options.format}: {error}", expected) from None
    except NotProven as error:
        raise RunError(f"the export is not what was trained, and was not kept: {error}") from None
    said = card.proof_lines(found) if found else [f"not verified: {why}"]
    left = f"left out: {', '.join(_tops(heads))}" if heads and not options.with_heads else ""
    print("\n".join(["  " + line for line in [*said, left] if line] + [f"written to {out}"]))
    return found


@contextlib.contextmanager
def _aside(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder that becomes `out` at the end, and goes if anything is raised before."""
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


def _tops(heads: Mapping[str, Any]) -> list[str]:
    """The names of what the arrays belong to."""
    return sorted({name.split("/")[1] for name in heads})


def _write(run, state, model, heads, workdir, aside, out, options):
    """Everything but the rename, and the proof: (proof or None, why there is none)."""
    verify, why = _verdict(model, options)
    try:
        _write_model(run, model, aside, str(aside), options)
        found = proof.prove(options.format, aside, model, run.tokenizer) if verify else None
        _write_config(model, aside, str(out), options)
    except MissingLibrary as error:
        raise _missing(error) from None
    if options.with_heads and heads:
        save_file({k: np.ascontiguousarray(x) for k, x in heads.items()}, aside / card.HEADS)
    facts = _facts(run, state, model, heads, workdir, out, options)
    facts = dataclasses.replace(facts, proof=found, unproven=why)
    (aside / "README.md").write_text(card.card(facts), encoding="utf-8")
    return found, why


def _missing(error: Exception) -> ConfigError:
    return ConfigError(
        "--format", str(error), "what judges an export", "pip install 'clipx[interop]'"
    )


def _verdict(model: Model, options: Options) -> tuple[bool, str]:
    """Whether to verify, and if not, why."""
    if options.verify is False:
        return False, "--noverify"
    try:
        borrowed = isinstance(model.text, BERT) or not model.words.plain
        proof.needs(options.format, tokenizer=borrowed)
    except MissingLibrary as error:
        if options.verify:
            raise _missing(error) from None
        return False, str(error)
    return True, ""


def _write_model(run: Run, model: Model, aside, folder: str, options: Options) -> None:
    """The weights, the configs and the tokenizer."""
    if options.format == "open_clip":
        arrays, _ = open_clip.to_open_clip(model)
        save_file(arrays, aside / open_clip.WEIGHTS)
    else:
        arrays, config, preprocessor = huggingface.to_huggingface(model)
        save_file(arrays, aside / huggingface.WEIGHTS, metadata={"format": "pt"})
        _dump(aside / huggingface.CONFIG, config)
        _dump(aside / huggingface.PREPROCESSOR, preprocessor)
    _write_config(model, aside, folder, options)
    if files := _tokenizer_files(run, model, options.format):
        for name, data in files.items():
            data = data if isinstance(data, bytes) else data.encode("utf-8")
            (aside / name).write_bytes(data)
        _dump(aside / tokenizer.CLIPX, pretrained.without_mask(run.tokenizer.save()))
    if options.pt:
        try:
            torch = proof.library("torch")
        except MissingLibrary as error:
            expected = "torch, which writes its own file"
            raise ConfigError("--pt", str(error), expected, "pip install torch") from None
        names = {"open_clip": "open_clip_pytorch_model.bin", "huggingface": "pytorch_model.bin"}
        tensors = {k: torch.from_numpy(np.array(x)) for k, x in arrays.items()}
        torch.save(tensors, aside / names[options.format])


def _write_config(model: Model, aside, folder: str, options: Options) -> None:
    """open_clip's configs, which name the folder where a tower is made after a file in it."""
    if options.format == "open_clip":
        _dump(aside / open_clip.CONFIG, open_clip.describe(model, folder))
        if config := guests.config(model):
            _dump(aside / "config.json", config)


def _dump(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tokenizer_files(run: Run, model: Model, format_: str) -> dict[str, str | bytes]:
    """The tokenizer, unless it is open_clip's own."""
    words, config = model.words.without_mask(), run.tokenizer.config
    if words.plain and format_ == "open_clip":
        return {}
    saved = run.tokenizer.save()
    siglip = format_ == "huggingface" and model.image.pool == "attention"
    if siglip and config.marks == "end" and config.cleaning == "siglip":
        return tokenizer.siglip_files(base64.b64decode(saved["payload"]), words.context)
    if words.kind == "clip_bpe":
        merges = _merges(saved)
        core = vocabulary.byte_pairs(merges)
        if config.cleaning == "clip":
            return tokenizer.clip_files(merges, core.get_vocab(), words.context)
    elif words.kind == "wordpiece":
        core = vocabulary.word_pieces(tokenizer.unpacked(saved))
    else:
        core = tokenizer.sentencepiece(base64.b64decode(saved["payload"]))
    return tokenizer.files(core, words, config.cleaning, attention_mask=not siglip)


def _merges(saved: Mapping[str, Any]) -> str:
    """The merges of a CLIP tokenizer: its own, or OpenAI's from open_clip, which carries them."""
    if saved["payload"]:
        return tokenizer.unpacked(saved)
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        raise ConfigError(
            "config.tokenizer.path",
            "nothing, and instant_clip_tokenizer does not give its merges",
            "a file of CLIP's merges, to write a tokenizer for transformers",
            "pip install 'clipx[interop]', whose open_clip carries it",
        )
    path = pathlib.Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    return vocabulary.read_merges(str(path), 49408, 2)


def _facts(run, state, model: Model, heads, workdir, out, options: Options) -> card.Facts:
    step = int(state.step)
    best = run.config.train.best
    checkpoints = Checkpoints(workdir, keep=run.config.train.keep, best=best)
    saved = checkpoints.restore_run(step)
    checkpoints.close()
    image, text = run.complete["image"], run.complete["text"]
    evals = tuple(f"{name}/" for name in run.complete["evals"])
    found: dict[str, float] = {}
    for row in metrics.read(workdir):
        if row["step"] == step:
            found |= {k: float(v) for k, v in row.items() if k.startswith(evals or "\0")}
    count = sum(x.size for name, x in model.flat.items() if name.startswith("params/"))
    return card.Facts(
        format=options.format,
        folder=out.name,
        name=out.name,
        method=run.complete["objective"]["name"],
        license=options.license,
        towers=f"{image.get('variant', image['name'])} at {image['image_size']} px and "
        f"{text['name']} of {text['depth']} layers, {count:,} parameters",
        data=f"{run.rows:,} rows of `{run.complete['data']['source']}`, fingerprint "
        f"`{saved['fingerprint']}`",
        seen=f"{step * run.batch_size:,} ({step:,} steps at batch {run.batch_size:,})",
        metrics=found,
        proof=None,
        unproven="",
        left_out=_tops(heads),
        with_heads=options.with_heads,
        heads=tuple(heads),
        notes=_notes(run, state, model, options, out),
    )


def _notes(run: Run, state: TrainState, model: Model, options: Options, out) -> list[str]:
    """What somebody who loads the folder should not have to find out."""
    notes = []
    if not _scores_by_cosine(run, state, model):
        notes.append(
            "The run scores a picture and a text by a head of its own. What is here are the two "
            "towers and the cosine of what they say, which is another score; `--with_heads` keeps "
            "the head."
        )
    narrow = [t for t in (model.image, model.text) if base.out_width(t) < model.width]
    for tower in narrow:
        notes.append(
            f"One tower says {base.out_width(tower)} channels; zeros fill them up to {model.width}."
        )
    if options.format == "open_clip" and guests.config(model):
        notes.append(
            f"`open_clip_config.json` names this folder as `{out}`, since timm and transformers "
            "are not told where open_clip was loaded from. After a move set `timm_model_name` to "
            "`local-dir:FOLDER` and `hf_model_name` to `FOLDER`; after an upload to "
            "`hf-hub:USER/NAME` and `USER/NAME`."
        )
    if options.format == "huggingface":
        notes.append('Texts are padded to the context: `padding="max_length"`.')
    if model.words.dropped is not None:
        notes.append("The embedding of the mask, which no text has, is left out.")
    cleaning = run.tokenizer.config.cleaning
    if options.format == "huggingface" or not model.words.plain:
        same = options.format == "huggingface" and cleaning == "siglip"
        but = "" if same else " but for HTML entities and broken encodings"
        notes.append(
            f"Captions were cleaned by clipx's rule `{cleaning}` in training. The tokenizer here "
            f"does the same{but}."
        )
    return notes


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

    images, ids = proof.pictures(model.image.image_size), run.tokenizer(proof.CAPTIONS)
    found = jax.jit(functools.partial(objective.apply, method=score))(
        variables, np.stack(images), ids
    )
    said = proof.ours(model, images, ids)
    cosines = proof.logits(said.image, said.text, 0, None)
    return np.allclose(found, cosines, rtol=0, atol=1e-3)


def main(overrides: list[tuple[str, str]]) -> None:
    if overrides:
        raise ConfigError(f"--config.{overrides[0][0]}", overrides[0][1], "nothing: it is trained")
    values = flags.FLAGS
    options = Options(
        format=values.format,
        out=pathlib.Path(values.out),
        step=values.step,
        with_heads=values.with_heads,
        pt=values.pt,
        verify=values.verify,
        license=values.license,
    )
    export(values.workdir, options)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("format", None, "open_clip or huggingface.")
    flags.DEFINE_string("out", None, "Folder to write, which must not be there.")
    flags.DEFINE_string("step", "", "A step, latest or best; default: best where a run keeps one.")
    flags.DEFINE_bool("with_heads", False, "Keep the heads of training beside the model.")
    flags.DEFINE_bool("pt", False, "Write torch's own file too; needs torch.")
    flags.DEFINE_bool("verify", None, "Compare with the library; default: if it is installed.")
    flags.DEFINE_string("license", "unknown", "The card's licence, in the Hub's words.")
    cli.run(main, required=("workdir", "format", "out"))
