"""Models from files: a folder as a library writes it, or a file of weights of its names; and how
such a model fits the towers of a config."""

from __future__ import annotations

import fnmatch
import functools
import os
import pathlib
import zipfile
from collections.abc import Collection

import jax
import numpy as np
from jaxtyping import Float

from clipx.errors import ConfigError, MissingLibrary
from clipx.interop import libraries
from clipx.interop.base import read_json
from clipx.interop.formats import FORMATS
from clipx.interop.model import Model, cpu, shapes
from clipx.interop.rules import Arrays
from clipx.models.layers import Tower
from clipx.models.transformer import stack_blocks
from clipx.types import PyTree

_TORCH = (".pt", ".pth", ".bin")


def load(path: str | os.PathLike, where: str = "config.init_from") -> Model:
    """The model at `path`: a folder as open_clip or transformers writes it, or a file of weights.

    A file's config lies beside it. OpenAI's files, with open_clip's names, need none. Weights are
    safetensors, or torch's if torch is installed. Raises `ConfigError` at `where` for a path that
    is not there, and for a file that is not whole or of another architecture.
    """
    file = pathlib.Path(path).expanduser()
    folder = file if file.is_dir() else file.parent
    if not file.exists():
        raise ConfigError(where, f"nothing at {file}", "a folder or a file of weights")
    config = functools.cache(lambda name: read_json(folder / name, where))
    described = [f for f in FORMATS if f.describes(config(f.config) or {})]
    if file.is_dir():
        names = described[0].weights_read if described else ()
        file = next((folder / n for n in names if (folder / n).is_file()), None)
        if file is None:
            expected = ", or ".join(f.expected for f in FORMATS)
            raise ConfigError(where, f"{folder}, with {_listed(folder)}", expected)
    arrays = _arrays(file, where)
    format_ = next((f for f in FORMATS if f.names(arrays)), FORMATS[0])
    try:
        return format_.read(arrays, config, str(file))
    except ConfigError as error:
        error.file = error.file or str(file)
        error.where = where if error.where in ("", where) else f"{where}: {error.where}"
        raise


def _listed(folder: pathlib.Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "nothing in it"


def _arrays(file: pathlib.Path, where: str) -> Arrays:
    """Every array of a file, or of the files that an index names."""
    if file.suffix in _TORCH:
        return _torch_arrays(file, where)
    if file.suffix == ".json":
        index = (read_json(file, where) or {}).get("weight_map", {})
        parts = [_arrays(file.parent / name, where) for name in sorted(set(index.values()))]
        return {name: x for part in parts for name, x in part.items()}
    import safetensors
    from safetensors.flax import load_file  # which knows bfloat16, as NumPy's does not

    try:
        with jax.default_device(cpu()):
            return {name: np.asarray(x) for name, x in load_file(file).items()}
    except (OSError, safetensors.SafetensorError) as error:
        found = f"{file} ({' '.join(str(error).split())})"
        raise ConfigError(where, found, "a whole safetensors file") from None


def _torch_arrays(file: pathlib.Path, where: str) -> Arrays:
    """Every array of torch's file: a state dict, a checkpoint of open_clip's training, or a whole
    model as OpenAI's are. No other code in the file is run."""
    try:
        torch = libraries.require("torch")
    except MissingLibrary as error:
        expected = "safetensors, or torch to read this with"
        raise ConfigError(where, f"{file}, and {error}", expected, "pip install torch") from None
    try:
        with libraries.quiet():
            if _is_script(file):
                found = torch.jit.load(file, map_location="cpu").state_dict()
            else:
                found = torch.load(file, map_location="cpu", weights_only=True)
        found = found.get("state_dict", found)
        return {
            name.removeprefix("module."): x.float().numpy()
            for name, x in found.items()
            if torch.is_tensor(x)
        }
    except Exception as error:
        found = f"{file} ({' '.join(str(error).split())[:200]})"
        raise ConfigError(where, found, "a whole file of torch's with arrays alone") from None


def _is_script(file: pathlib.Path) -> bool:
    """Whether torch wrote a whole model with its code, as OpenAI's files are."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def fit(
    model: Model,
    image: Tower,
    text: Tower,
    *,
    mask_id: int | None = None,
    ignore: Collection[str] = (),
    faults: Collection[str] = (),
    where: str = "config.init_from",
) -> dict[str, PyTree]:
    """{"params": {"image": ..., "text": ...}, "batch_stats": ...} of `model` for these towers, in
    their layouts.

    Positions are resized if sizes differ: of pictures bicubic, of texts linear, as open_clip does.
    If the model's words have no mask, the row of `mask_id` is the mean of all rows.

    ignore: what may differ, as patterns of file names: "image.activation" for a setting;
    "text.projection" for arrays, which are then left out; "text" for a whole tower.
    faults: differences that the caller has found, as "name: what". Raises one `ConfigError` at
    `where` that lists all differences but the ignored ones.
    """
    found: dict[str, PyTree] = {"params": {}}
    faults = list(faults)
    for name, tower in (("image", image), ("text", text)):
        if ignored(name, ignore):
            continue
        given = getattr(model, name)
        if type(given) is not type(tower):
            kinds = f"{type(given).__name__}, and {type(tower).__name__} in the config"
            faults.append(f"{name}: {kinds}")
            continue
        own = given.unseen_settings
        faults += [
            f"{name}.{field}: {own[field]!r}, and {value!r} in the config"
            for field, value in tower.unseen_settings.items()
            if own[field] != value
        ]
        params = dict(model.params[name])
        _resize(params, tower)
        if name == "text":
            _mask(params, tower, model.words.dropped, mask_id)
        _compare(name, params, tower, faults)
        kept = {k: x for k, x in params.items() if not ignored(f"{name}.{k}", ignore)}
        stacked = stack_blocks(kept) if getattr(tower, "scan", False) else kept
        found["params"][name] = jax.tree.map(np.asarray, stacked)
        if name in model.batch_stats:
            found.setdefault("batch_stats", {})[name] = model.batch_stats[name]
    names = [fault.split(":")[0] for fault in faults]
    left = [fault for name, fault in zip(names, faults) if not ignored(name, ignore)]
    if left:
        wanted = ", ".join(dict.fromkeys(repr(fault.split(":")[0]) for fault in left))
        raise ConfigError(
            where,
            "another model than the config's:\n    " + "\n    ".join(left),
            "the same model",
            f"change the config, or name what may differ: config.init_ignore=({wanted},)",
        )
    return found


def ignored(name: str, patterns: Collection[str]) -> bool:
    """Whether a pattern matches `name` or its tower, the part before the first dot."""
    return any(fnmatch.fnmatch(n, p) for n in (name, name.partition(".")[0]) for p in patterns)


def _compare(name: str, params: PyTree, tower: Tower, faults: list[str]) -> None:
    """Adds a fault for each entry of a tower that is missing, left over or of another shape."""
    expected = shapes(tower.clone(scan=False) if hasattr(tower, "scan") else tower)["params"]
    for key in sorted(expected.keys() | params.keys()):
        a, b = (
            jax.tree_util.tree_flatten_with_path(tree.get(key, {}))[0]
            for tree in (params, expected)
        )
        found, wanted = ({jax.tree_util.keystr(p): x.shape for p, x in leaves} for leaves in (a, b))
        if found != wanted:
            path = min(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
            both = f"{found.get(path, 'nothing')}, and {wanted.get(path, 'nothing')}"
            faults.append(f"{name}.{key}: {both} in the config")


def _resize(params: PyTree, tower: Tower) -> None:
    """Replaces the positions in `params` by ones of the tower's size, if only their number
    differs."""
    table = tower.position_table
    if table is None:
        return
    *parents, leaf = table.path
    for name in parents:
        if name not in params:
            return
        params[name] = params = dict(params[name])  # the model's own dict stays as it is
    rows = params[leaf]
    if len(table.shape) == 1:
        if len(rows) != table.shape[0]:
            params[leaf] = resize_line(rows, table.shape[0])
        return
    first, side = table.first, table.shape[0]
    old = round((len(rows) - first) ** 0.5)
    if old != side and len(rows) == first + old**2:
        params[leaf] = resize_grid(rows, first, side)


def _mask(params: PyTree, tower: Tower, given: int | None, wanted: int | None) -> None:
    """Deletes the row of the mask in the table of words, or inserts one, the mean of all rows."""
    table = params["token_embedding"]
    if given is not None and wanted is None and len(table) == tower.vocab_size + 1:
        params["token_embedding"] = np.delete(table, given, axis=0)
    if given is None and wanted is not None and len(table) == tower.vocab_size - 1:
        params["token_embedding"] = np.insert(table, wanted, table.mean(axis=0), axis=0)


def resize_grid(rows: Float[np.ndarray, "n c"], first: int, side: int) -> Float[np.ndarray, "m c"]:
    """Positions of a square grid, resized to `side` x `side`: bicubic, with antialiasing. The
    `first` rows, a class token's, stay as they are (open_clip, resize_pos_embed)."""
    kept, grid = rows[:first], rows[first:]
    old = round(len(grid) ** 0.5)
    grid = grid.reshape(old, old, -1)
    grid = jax.image.resize(grid, (side, side, grid.shape[-1]), "cubic", antialias=True)
    return np.concatenate([kept, np.asarray(grid).reshape(side * side, -1)])


def resize_line(rows: Float[np.ndarray, "n c"], length: int) -> Float[np.ndarray, "m c"]:
    """Positions of a text, resized to `length`: linear (open_clip, resize_text_pos_embed)."""
    shape = (length, rows.shape[1])
    return np.asarray(jax.image.resize(rows, shape, "linear", antialias=False))
