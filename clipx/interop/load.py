"""Loads models that open_clip or transformers wrote, from a folder or a weights file, and fits them
to the towers of a config."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import os
import pathlib
import re
from collections.abc import Collection

import jax
import numpy as np
from jaxtyping import Float

from clipx.errors import ConfigError
from clipx.interop import big_vision, named, weights
from clipx.interop.base import Format, read_json
from clipx.interop.formats import FORMATS
from clipx.interop.model import Model, shapes
from clipx.interop.open_clip_layout import CONFIG
from clipx.models.base import Tower
from clipx.models.transformer import stack_blocks
from clipx.types import PyTree

_HUB = re.compile(r"(?:hf-hub:|hf://)?([\w.-]+/[\w.-]+)")  # how people write a Hub's name


def load(path: str | os.PathLike, where: str = "config.init_from") -> Model:
    """The model at `path`: a folder as open_clip or transformers writes it, or a weights file.

    A weights file needs its config in the same folder or its model's name in front of it
    (`named.py`), except those that OpenAI published. Weights are safetensors files, torch files if
    torch is installed, or big_vision's `.npz`.

    Raises `ConfigError` at `where` for a missing path, an incomplete file or an architecture that
    clipx does not have.
    """
    name, path = named.split(os.fspath(path))
    file = pathlib.Path(path).expanduser()
    folder = file if file.is_dir() else file.parent
    if not file.exists():
        fix = download_hint(path) or named.hint(path)
        raise ConfigError(where, f"nothing at {path}", "a folder or a weights file", fix)
    given = {CONFIG: named.config(name, where)} if name else {}
    config = functools.cache(lambda n: given.get(n) or read_json(folder / n, where))
    if file.is_dir():
        described = [f for f in FORMATS if f.describes(config(f.config) or {})]
        names = (name for format_ in described for name in format_.weights_read)
        file = next((folder / n for n in names if (folder / n).is_file()), None)
        if file is None:
            raise _no_weights(folder, described, where)
    if file.suffix == big_vision.SUFFIX:
        return big_vision.read(file, where)
    arrays = weights.read(file, where)
    format_ = next((f for f in FORMATS if f.names(arrays)), FORMATS[0])
    try:
        read = format_.read(arrays, config, str(file))
        said = [named.note(name, given[CONFIG])] if name else []
        return dataclasses.replace(read, notes=(*read.notes, *said))
    except ConfigError as error:
        error.file = error.file or str(file)
        error.where = where if error.where in ("", where) else f"{where}: {error.where}"
        raise


def _no_weights(folder: pathlib.Path, described: list[Format], where: str) -> ConfigError:
    """The error for a folder without the files of a format. It names what to do, if that is
    plain."""
    names = sorted(p.name for p in folder.iterdir())
    listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "nothing in it"
    known = ", or ".join(f.expected for f in FORMATS)
    files = [folder / n for n in names if n.endswith(weights.SUFFIXES) and described]
    other = next((n for n in names if pathlib.Path(n).suffix in weights.UNREADABLE), "")
    fix = f"name the file: {files[0]}" if files else ""
    if other and not files:
        listed += f": {other} is {weights.UNREADABLE[pathlib.Path(other).suffix]}"
    if "snapshots" in names:  # a folder of the Hub's cache
        found = sorted(p for p in (folder / "snapshots").iterdir() if p.is_dir())
        fix = f"name the snapshot: {found[-1]}" if found else ""
    elif other and described and not files:
        fix = f"put the same model's {described[0].weights_read[0]} there"
    return ConfigError(where, f"{folder} with {listed}", known, fix)


def download_hint(name: str) -> str:
    """The command that downloads a model, if `name` is written like one of the Hub."""
    match = _HUB.fullmatch(name)
    if not match or name.endswith(weights.SUFFIXES) or name.startswith((".", "~")):
        return ""
    into = match[1].split("/")[1]
    return f"for a model of the Hub: hf download {match[1]} --local-dir {into}, then name {into}"


def fit(
    model: Model,
    image: Tower,
    text: Tower,
    *,
    mask_id: int | None = None,
    ignore: Collection[str] = (),
    faults: Collection[str] = (),
    where: str = "config.init_from",
    resized: list[str] | None = None,
) -> dict[str, PyTree]:
    """{"params": {"image": ..., "text": ...}, "batch_stats": ...} of `model`, in the layout of the
    towers `image` and `text`.

    Positional embeddings of another size are resized as open_clip does: bicubic for images, linear
    for texts. If `model` has no mask token, row `mask_id` of its token embedding becomes the mean
    of all rows. Low-rank adapters of the towers are not among the parts: they start anew.

    ignore: differences to accept, as patterns with wildcards such as "*": "image.activation" for a
    setting; "text.projection" for arrays, which are then left out; "text" for a complete tower.
    faults: further differences that the caller found, as "name: description". resized: gets a line
    about each array of another size.

    Raises one `ConfigError` at `where` that lists every difference that is not ignored.
    """
    params_by_tower: dict[str, PyTree] = {}
    batch_stats: dict[str, PyTree] = {}
    faults = list(faults)
    for name, tower in (("image", image), ("text", text)):
        if ignored(name, ignore):
            continue
        params = dict(model.params[name])
        if name == "text" and type(getattr(model, name)) is type(tower):
            _mask(params, tower, model.words.dropped, mask_id)
        params = fit_tower(name, getattr(model, name), params, tower, ignore, faults, resized)
        if params is None:
            continue
        params_by_tower[name] = params
        if name in model.batch_stats:
            batch_stats[name] = model.batch_stats[name]
    refuse(faults, ignore, where)
    return {"params": params_by_tower} | ({"batch_stats": batch_stats} if batch_stats else {})


def fit_tower(
    name: str,
    given: Tower,
    params: PyTree,
    tower: Tower,
    ignore: Collection[str],
    faults: list[str],
    resized: list[str] | None = None,
) -> PyTree | None:
    """The `params` of the tower `given`, without what is ignored, in the layout of `tower`; None
    for a tower of another kind. Appends to `faults` what differs, and to `resized` what is resized.

    name: "image" or "text". ignore: as for `fit`.
    """
    if type(given) is not type(tower):
        kinds = f"{type(given).__name__}, and {type(tower).__name__} in the config"
        faults.append(f"{name}: {kinds}")
        return None
    settings, params = given.unseen_settings, dict(params)
    faults += [
        f"{name}.{field}: {settings[field]!r}, and {value!r} in the config"
        for field, value in tower.unseen_settings.items()
        if settings[field] != value
    ]
    if change := _resize(params, tower):
        (resized if resized is not None else []).append(f"{name}.{change}")
    _compare(name, params, tower, faults)
    kept = {k: x for k, x in params.items() if not ignored(f"{name}.{k}", ignore)}
    stacked = stack_blocks(kept) if getattr(tower, "scan", False) else kept
    return jax.tree.map(np.asarray, stacked)


def refuse(faults: Collection[str], ignore: Collection[str], where: str) -> None:
    """Raises one `ConfigError` at `where` that lists the `faults`, "name: description", that
    `ignore` does not name."""
    names = [fault.split(":")[0] for fault in faults]
    left = [fault for name, fault in zip(names, faults) if not ignored(name, ignore)]
    if left:
        differing = dict.fromkeys(fault.split(":")[0] for fault in left)
        wanted, flags = ", ".join(map(repr, differing)), ",".join(differing)
        raise ConfigError(
            where,
            "another model than the config's:\n    " + "\n    ".join(left),
            "the model that the config describes",
            f"change the config, or accept the differences: config.init_ignore=({wanted},), or, of "
            f"clipx.evaluate, --init_ignore={flags}",
        )


def ignored(name: str, patterns: Collection[str]) -> bool:
    """Whether a pattern matches `name` or its tower, the part before the first dot."""
    return any(fnmatch.fnmatch(n, p) for n in (name, name.partition(".")[0]) for p in patterns)


def _compare(name: str, params: PyTree, tower: Tower, faults: list[str]) -> None:
    """Appends to `faults` each entry of a tower's parameters that is missing, unexpected or of
    another shape."""
    plain = tower.clone(lora_rank=0)
    plain = plain.clone(scan=False) if hasattr(plain, "scan") else plain
    expected = shapes(plain)["params"]  # pyright: ignore[reportArgumentType]  # modules hash
    for key in sorted(expected.keys() | params.keys()):
        a, b = (
            jax.tree_util.tree_flatten_with_path(tree.get(key, {}))[0]
            for tree in (params, expected)
        )
        given, wanted = ({jax.tree_util.keystr(p): x.shape for p, x in leaves} for leaves in (a, b))
        if given != wanted:
            path = min(k for k in given.keys() | wanted.keys() if given.get(k) != wanted.get(k))
            both = f"{given.get(path, 'nothing')}, and {wanted.get(path, 'nothing')}"
            faults.append(f"{name}.{key}: {both} in the config")


def _resize(params: PyTree, tower: Tower) -> str:
    """Resizes the positional embedding in `params` to the tower's size, if only the number of
    positions differs. Returns what was done; "" for nothing."""
    table = tower.position_table
    if table is None:
        return ""
    *parents, leaf = table.path
    for name in parents:
        if name not in params:
            return ""
        params[name] = params = dict(params[name])  # a copy: the model's own dict must not change
    rows, name = params[leaf], ".".join(table.path)
    if len(table.shape) == 1:
        if len(rows) == table.shape[0]:
            return ""
        params[leaf] = resize_line(rows, table.shape[0])
        return f"{name} from {len(rows)} to {table.shape[0]} positions"
    first, side = table.first, table.shape[0]
    old = round((len(rows) - first) ** 0.5)
    if old == side or len(rows) != first + old**2:
        return ""
    params[leaf] = resize_grid(rows, first, side)
    return f"{name} from {old} x {old} to {side} x {side} positions"


def _mask(params: PyTree, tower: Tower, given: int | None, wanted: int | None) -> None:
    """Deletes the mask's row of the token embedding, or inserts one, so that the number of rows is
    the tower's. An inserted row is the mean of all rows. given, wanted: the mask's id in the model
    and in the tower; None without a mask."""
    table = params["token_embedding"]
    if given is not None and wanted is None and len(table) == tower.vocab_size + 1:
        params["token_embedding"] = np.delete(table, given, axis=0)
    if given is None and wanted is not None and len(table) == tower.vocab_size - 1:
        params["token_embedding"] = np.insert(table, wanted, table.mean(axis=0), axis=0)


def resize_grid(rows: Float[np.ndarray, "n c"], first: int, side: int) -> Float[np.ndarray, "m c"]:
    """Positional embeddings of a square grid, resized to `side` x `side`: bicubic, with
    antialiasing. The `first` rows (the class token's) are kept (open_clip, resize_pos_embed)."""
    kept, grid = rows[:first], rows[first:]
    old = round(len(grid) ** 0.5)
    grid = grid.reshape(old, old, -1)
    grid = jax.image.resize(grid, (side, side, grid.shape[-1]), "cubic", antialias=True)
    return np.concatenate([kept, np.asarray(grid).reshape(side * side, -1)])


def resize_line(rows: Float[np.ndarray, "n c"], length: int) -> Float[np.ndarray, "m c"]:
    """Positional embeddings of a text, resized to `length` linearly (open_clip,
    resize_text_pos_embed)."""
    shape = (length, rows.shape[1])
    return np.asarray(jax.image.resize(rows, shape, "linear", antialias=False))
