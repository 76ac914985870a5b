"""Reads what `config.init_from` names, a workdir of clipx or a model of open_clip or transformers,
and checks that it fits a run."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from clipx.data.framing import CENTRE, Framing
from clipx.data.text import tokenizers
from clipx.data.text.tokenizer_config import OWN_MASK, TokenizerConfig
from clipx.data.text.tokenizers import Tokenizer
from clipx.errors import ConfigError, DataError
from clipx.interop import load, named, verify
from clipx.interop import tokenizer as files
from clipx.interop.base import read_json as load_json
from clipx.interop.formats import FORMATS
from clipx.interop.model import Model, Words, cpu, make_model
from clipx.objectives.base import Objective
from clipx.training import encoders, recovery
from clipx.training.model_sections import sections as sections
from clipx.training.run import restore
from clipx.training.schema import Config
from clipx.training.workdir import read_json
from clipx.types import PyTree, TrainState

WHERE = "config.init_from"
_SCALARS = ("logit_scale", "logit_bias")


def workdir(path: str) -> tuple[pathlib.Path, str] | None:
    """(workdir, step) if `path` is a workdir or one of its checkpoints; else None. The step is ""
    for a workdir."""
    folder = pathlib.Path(path).expanduser().absolute()
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        return folder.parents[1], folder.name
    return (folder, "") if (folder / "checkpoints").is_dir() else None


def split(
    objective: Objective, tokenizer: Tokenizer, state: TrainState, framing: Framing = CENTRE
) -> tuple[Model, dict[str, np.ndarray]]:
    """(the model in a run's state, all other arrays by path): heads, queues, prototypes, and the
    embedding of the mask token."""
    params = jax.tree.map(np.asarray, state.params)
    scale = params.get("logit_scale", _critics_scale(params))
    cap = getattr(objective, "logit_scale_cap", None)
    scale = scale if cap is None else min(scale, np.log(cap))
    model = make_model(
        objective.image,
        objective.text,
        {"params": params, "batch_stats": jax.tree.map(np.asarray, state.batch_stats)},
        logit_scale=np.float32(scale),
        logit_bias=np.float32(params["logit_bias"]) if "logit_bias" in params else None,
        mean=tuple(objective.mean),
        std=tuple(objective.std),
        words=words(tokenizer),
        resize=framing.resize,
        interpolation=framing.interpolation,
    )
    rest = {
        "params": {k: v for k, v in params.items() if k not in ("image", "text", *_SCALARS)},
        "batch_stats": {k: v for k, v in state.batch_stats.items() if k not in ("image", "text")},
        "memory": state.memory,
    }
    heads = traverse_util.flatten_dict({k: v for k, v in rest.items() if v}, sep="/")
    heads = {name: np.asarray(x) for name, x in heads.items()}
    mask_id = model.words.dropped
    if mask_id is not None:
        heads["params/mask_embedding"] = model.params["text"]["token_embedding"][mask_id]
    return model, heads


def _critics_scale(params: Mapping[str, Any]) -> np.ndarray | np.floating:
    """The log of the logit scale inside a head, such as a critic's; 0 if there is none."""
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    scales = [x for name, x in sorted(flat.items()) if name.endswith("/logit_scale")]
    return scales[0] if scales else np.float32(0)


def words(tokenizer: Tokenizer) -> Words:
    """The ids of a tokenizer, as an export needs them."""
    config = tokenizer.config
    ids = ("vocab_size", "context", "pad_id", "sot_id", "eot_id", "mask_id")
    plain = config.name == "clip_bpe" and config.cleaning == "clip"
    return Words(
        kind=config.name,
        **{name: getattr(config, name) for name in ids},
        plain=plain and files.is_openai(tokenizer.save()),
    )


def without_mask(saved: Mapping[str, Any]) -> dict[str, Any]:
    """`saved`, the result of `Tokenizer.save`, without the mask token, which no text contains."""
    config = dict(saved["config"])
    if config["mask"] and config["name"] not in OWN_MASK:
        config["vocab_size"] -= 1
    return {**saved, "config": {**config, "mask": False}}


def open_tokenizer(path: str) -> Tokenizer | None:
    """The tokenizer of the model at `path`; None if clipx cannot read it. Reads no weights.

    Raises `ConfigError` for a broken file.
    """
    given = _find_tokenizer(path)
    return given if isinstance(given, Tokenizer) else None


def _find_tokenizer(path: str) -> Tokenizer | str | None:
    """The tokenizer of the model at `path`, or what `_library_tokenizer` says in its place."""
    file = pathlib.Path(named.split(path)[1]).expanduser()
    saved = (file if file.is_dir() else file.parent) / files.CLIPX
    run = workdir(path)
    if run is None and not saved.is_file():
        return _library_tokenizer(saved.parent)
    try:
        return tokenizers.load(recovery.run_tokenizer(*run) if run else read_json(saved))
    except ConfigError as error:
        error.where = WHERE
        raise
    except DataError as error:
        raise ConfigError(WHERE, f"{saved} ({error})", "a tokenizer that clipx wrote") from None


def _library_tokenizer(folder: pathlib.Path) -> Tokenizer | str | None:
    """clipx's counterpart of the folder's own tokenizer, such as transformers' `SiglipTokenizer`; a
    sentence about a tokenizer that clipx does not have; None for CLIP's own vocabulary. Raises
    `ConfigError` for files for which the two would differ."""
    described = (f for f in FORMATS if f.describes(load_json(folder / f.config, WHERE) or {}))
    format_ = next(described, None)
    fields = None if format_ is None else format_.tokenizer_fields(folder, WHERE)
    if fields is None or isinstance(fields, str):
        return fields
    try:
        tokenizer = tokenizers.build(TokenizerConfig(**fields))
    except ConfigError as error:
        error.where = f"{WHERE}: {error.where}"
        raise
    if fields["name"] != "sentencepiece":
        return tokenizer
    # transformers puts U+2581 before every text; Google's models drop it again
    if tokenizer.body("\u2581 a a") != 2 * tokenizer.body("a"):
        found = "a SentencePiece model that keeps leading white space, or adds no dummy prefix"
        expected = "a model with nmt_nfkc normalisation and a dummy prefix, like Google's"
        raise ConfigError(f"{WHERE}: {files.PIECES}", found, expected)
    return tokenizer


def openai_tokenizer(model: Model) -> Tokenizer | None:
    """OpenAI's tokenizer, if the model has its vocabulary; else None."""
    if not model.words.plain or model.words.vocab_size != TokenizerConfig("clip_bpe").vocab_size:
        return None
    return tokenizers.build(TokenizerConfig("clip_bpe", context=model.words.context))


def tokenizer_for(config: TokenizerConfig, given: Tokenizer | None) -> Tokenizer | None:
    """`given` with the settings of `config`, if it can stand in for the tokenizer of `config`.

    It can if `config` would train a SentencePiece model with the same marks and vocabulary size.
    Otherwise returns None.
    """
    would_train = config.name == "sentencepiece" and not config.path
    if given is None or given.config.name != config.name or not would_train:
        return None
    sizes = _unmasked_size(config), _unmasked_size(given.config)
    if given.config.marks != config.marks or sizes[0] != sizes[1]:
        return None
    return tokenizers.load(given.save() | {"config": dataclasses.asdict(config)})


def _unmasked_size(config: TokenizerConfig) -> int:
    """The size of the vocabulary without the mask token."""
    assert config.vocab_size is not None  # always set once the config is built
    return config.vocab_size - config.mask


def open_model(path: str) -> tuple[Model, Tokenizer | None]:
    """(the model that `config.init_from` names, its tokenizer). The tokenizer is None if clipx
    cannot read it.

    Raises `ConfigError` for a model that cannot be read.
    """
    checkpoint = workdir(path)
    if checkpoint is None:
        model, given = load.load(path), _find_tokenizer(path)
        if jax.process_index() == 0:
            print("".join(f"{path}: {note}\n" for note in model.notes), end="", flush=True)
        if isinstance(given, str):
            differences = (*model.differences, f"tokenizer: the model's cannot be read: {given}")
            return dataclasses.replace(model, differences=differences), None
        if given is None:
            return model, openai_tokenizer(model)
        idle = {name: getattr(given.config, name) for name in model.text.idle_ids}
        return dataclasses.replace(model, words=words(given), text=model.text.clone(**idle)), given
    folder, step = checkpoint
    try:
        # a single process restores to the CPU: the devices hold the new run's state
        devices = jax.devices() if jax.process_count() > 1 else [cpu()]
        run, state = restore(folder, step, evals=False, devices=devices)
    except ConfigError as error:
        error.where = WHERE
        raise
    return split(run.objective, run.tokenizer, state, run.data.framing)[0], run.tokenizer


def entries(
    objective: Objective,
    params: PyTree,
    config: Config,
    tokenizer: Tokenizer | None,
    resized: list[str] | None = None,
) -> dict[str, PyTree]:
    """The parts of a run's `params` and `batch_stats` that come from files: `config.init_from`, and
    those that a tower names itself, where `config.init_ignore` leaves the tower out.

    params: the run's, abstract. tokenizer: the run's; None if it is not known yet. resized: as for
    `load.fit`. Raises `ConfigError` for a tower with two files, and for what `fit` refuses.
    """
    path, ignore = config.init_from, config.init_ignore
    named = [name for name in ("image", "text") if getattr(objective, name).init_from]
    if twice := [name for name in named if not load.ignored(name, ignore)]:
        found = f"{path!r}, while config.{twice[0]} names a file too"
        fix = f"config.init_ignore=('{twice[0]}',), to take the tower from its own file"
        raise ConfigError(WHERE, found, "one file for each tower", fix)
    model, given = open_model(path)
    about = (tokenizer, model, given, ignore, resized, Framing.of(config.data))
    parts = fit(objective, params, config.tokenizer, *about)
    own = encoders.entries(objective, config, tokenizer, resized)
    return {kind: parts.get(kind, {}) | own.get(kind, {}) for kind in parts.keys() | own.keys()}


def fit(
    objective: Objective,
    params: PyTree,
    config: TokenizerConfig,
    tokenizer: Tokenizer | None,
    model: Model,
    given: Tokenizer | None,
    ignore: Collection[str],
    resized: list[str] | None = None,
    framing: Framing = CENTRE,
) -> dict[str, PyTree]:
    """The parts of a run's `params` and `batch_stats` that come from `model`: both towers, and
    `logit_scale` and `logit_bias`. Heads are not taken.

    params: the run's, abstract. tokenizer, given: the run's and the model's; None if not known.
    Raises `ConfigError` that lists all differences that `ignore` does not name (see `load.fit`).
    """
    faults = [x for x in model.differences if not x.startswith("tokenizer:")]
    for name in ("mean", "std"):
        a, b = getattr(model, name), getattr(objective, name)
        if not np.allclose(a, b, rtol=0, atol=1e-6):
            faults.append(f"{name}: {tuple(a)} in the model, {tuple(b)} in config.objective")
    if (model.resize, model.interpolation) != (framing.resize, framing.interpolation):
        faults.append(
            f"preprocessing: {model.resize}, {model.interpolation} in the model, {framing.resize}, "
            f"{framing.interpolation} in config.data.resize and config.data.interpolation"
        )
    for name in _SCALARS:
        a, b = getattr(model, name) is not None, name in params
        if a != b:
            there = {True: "present", False: "absent"}
            faults.append(f"{name}: {there[a]} in the model, {there[b]} in the config's objective")
    if not load.ignored("text", ignore):
        faults += [x for x in model.differences if x.startswith("tokenizer:")]
        faults += _token_faults(model, config, tokenizer, given)
    mask_id = config.mask_id if config.name not in OWN_MASK else None
    towers, options = (objective.image, objective.text), {"ignore": ignore, "faults": faults}
    parts = load.fit(model, *towers, mask_id=mask_id, resized=resized, **options)
    for name in _SCALARS:
        value = getattr(model, name)
        if name in params and value is not None and not load.ignored(name, ignore):
            parts["params"][name] = np.asarray(value, np.float32)
    return parts


def _token_faults(
    model: Model, config: TokenizerConfig, tokenizer: Tokenizer | None, given: Tokenizer | None
) -> list[str]:
    """One line for each reason why the model and the run give texts different token ids."""
    theirs, faults = model.words.without_mask(), []
    if theirs.kind != config.name:
        return [f"tokenizer.name: {theirs.kind!r} in the model, {config.name!r} in the config"]
    mask_id = config.mask_id if config.name not in OWN_MASK else None
    end = config.eot_id - (mask_id is not None and mask_id < config.eot_id)
    if theirs.eot_id != end:
        faults.append(f"tokenizer.eot_id: {theirs.eot_id} in the model, {end} in the config")
    if given is None or tokenizer is None:
        return faults
    differ = [n for n in ("marks", "cleaning") if getattr(given.config, n) != getattr(config, n)]
    for name in differ:
        a, b = getattr(given.config, name), getattr(config, name)
        faults.append(f"tokenizer.{name}: {a!r} in the model, {b!r} in the config")
    if not differ and any(given.body(text) != tokenizer.body(text) for text in verify.CAPTIONS):
        where = f" (the model's: config.tokenizer.path={given.config.path})"
        faults.append(
            "tokenizer: the model and the run split the same captions into other tokens"
            + where * bool(given.config.path)
        )
    return faults
