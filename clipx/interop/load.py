"""Towers from files: an open_clip folder, a Hugging Face CLIP or SigLIP folder, or a safetensors
file of either, and how they fit the towers of a config."""

from __future__ import annotations

import fnmatch
import json
import os
import pathlib
import zipfile
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from clipx.errors import ConfigError, MissingLibrary
from clipx.interop import base, huggingface, open_clip, proof
from clipx.interop.base import Model
from clipx.models.layers import Tower
from clipx.models.transformer import stack_blocks
from clipx.models.vit import ViT
from clipx.types import PyTree

_OPEN_CLIP_WEIGHTS = (
    *(open_clip.WEIGHTS, "open_clip_pytorch_model.safetensors", "model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_model.pt", "model.pt"),
)
_HUGGINGFACE_WEIGHTS = (huggingface.WEIGHTS, huggingface.WEIGHTS + ".index.json")
_HUGGINGFACE_WEIGHTS += ("pytorch_model.bin",)
_TORCH = (".pt", ".pth", ".bin")
# of a tower, what changes what it says; sizes show in the arrays
_MEANING = ("activation", "norm_eps", "heads", "pool", "pre_norm", "causal", "mask_padding")


def load(path: str | os.PathLike, where: str = "config.init_from") -> Model:
    """The model at `path`: a folder as open_clip or transformers writes it, or a file of weights,
    whose config stands beside it or, in open_clip's names, is read off the arrays as for OpenAI's.
    The files are safetensors, or torch's where torch is installed.

    Raises `ConfigError` for what is not there, is no such file, was cut short, or is of another
    architecture.
    """
    file = pathlib.Path(path).expanduser()
    folder = file if file.is_dir() else file.parent
    if not file.exists():
        raise ConfigError(where, f"nothing at {file}", "a folder or a file of weights")
    own = read_json(folder / open_clip.CONFIG, where)
    other = read_json(folder / huggingface.CONFIG, where) or {}
    if file.is_dir():
        names = _OPEN_CLIP_WEIGHTS if own else _HUGGINGFACE_WEIGHTS
        file = next((folder / n for n in names if (folder / n).is_file()), None)
        if file is None or (own is None and "model_type" not in other):
            raise ConfigError(
                where,
                f"{folder}, with {_listed(folder)}",
                f"{open_clip.CONFIG} and {open_clip.WEIGHTS}, or {huggingface.CONFIG} of CLIP or "
                f"SigLIP and {huggingface.WEIGHTS}",
            )
    arrays = _arrays(file, where)
    try:
        if "text_model.final_layer_norm.weight" in arrays:
            preprocessor = read_json(folder / huggingface.PREPROCESSOR, where)
            if preprocessor is None:
                both = read_json(folder / huggingface.PROCESSOR, where) or {}
                preprocessor = both.get("image_processor")
            return huggingface.from_huggingface(arrays, other, preprocessor)
        return open_clip.from_open_clip(arrays, own or _read_off(arrays, file, where), other)
    except ConfigError as error:
        error.file = error.file or str(file)
        error.where = error.where if error.where == where else f"{where}: {error.where}"
        raise


def read_json(path: pathlib.Path, where: str) -> dict[str, Any] | None:
    """What a file says; None where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(where, f"{path} ({error})", "a JSON file") from None


def _listed(folder: pathlib.Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "nothing in it"


def _arrays(file: pathlib.Path, where: str) -> base.Arrays:
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
        with jax.default_device(proof.cpu()):
            return {name: np.asarray(x) for name, x in load_file(file).items()}
    except (OSError, safetensors.SafetensorError) as error:
        found = f"{file} ({' '.join(str(error).split())})"
        raise ConfigError(where, found, "a whole safetensors file") from None


def _torch_arrays(file: pathlib.Path, where: str) -> base.Arrays:
    """Every array of a file of torch's: a state, a checkpoint of open_clip's training, or a whole
    model as OpenAI's are. Nothing else in it is run."""
    try:
        torch = proof.library("torch")
    except MissingLibrary as error:
        expected = "safetensors, or torch to read this with"
        raise ConfigError(where, f"{file}, and {error}", expected, "pip install torch") from None
    try:
        with proof.quiet():
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
    """Whether torch wrote a whole model, code included: an archive that has such."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def _read_off(arrays: Mapping[str, np.ndarray], file, where: str) -> dict[str, Any]:
    """open_clip's config of arrays without one, with heads of 64 channels as OpenAI's have and
    QuickGELU as they were trained with (open_clip, build_model_from_openai_state_dict)."""
    arrays = {name.removeprefix("text."): x for name, x in arrays.items()}
    if not {"visual.conv1.weight", "ln_final.weight", "text_projection"} <= arrays.keys():
        raise ConfigError(
            where, f"{file}, with {min(arrays, default='no arrays')}", "CLIP in open_clip's names"
        )

    def count(start: str, part: int) -> int:
        return len({name.split(".")[part] for name in arrays if name.startswith(start)})

    if "visual.proj" in arrays:
        width, _, patch, _ = arrays["visual.conv1.weight"].shape
        side = round((len(arrays["visual.positional_embedding"]) - 1) ** 0.5)
        layers = count("visual.transformer.resblocks.", 3)
        vision = {"layers": layers, "width": width, "patch_size": patch, "image_size": patch * side}
    else:
        stages = [count(f"visual.layer{i}.", 2) for i in (1, 2, 3, 4)]
        side = round((len(arrays["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
        width = len(arrays["visual.layer1.0.conv1.weight"])
        vision = {"layers": stages, "width": width, "image_size": 32 * side}
    words, width = arrays["token_embedding.weight"].shape
    text = {
        "context_length": len(arrays["positional_embedding"]),
        "vocab_size": words,
        "width": width,
        "heads": max(width // 64, 1),
        "layers": count("transformer.resblocks.", 2),
    }
    return {
        "embed_dim": arrays["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": vision,
        "text_cfg": text,
    }


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
    their layouts: positions resized where sizes differ (pictures' bicubic, texts' linear, as
    open_clip), and a row for `mask_id`, the mean of all, where the model's words have none.

    ignore: what may differ, by patterns as file names have them: "image.activation" for a field;
    "text.projection" for arrays, which are then left out; "text" for a whole tower. Every other
    difference, and what the caller has found (`faults`, "name: what"), is listed in one
    `ConfigError`.
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
        faults += [
            f"{name}.{field}: {_field(given, field)!r}, and {_field(tower, field)!r} in the config"
            for field in _MEANING
            if hasattr(tower, field) and _field(given, field) != _field(tower, field)
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
    """Whether a pattern names it, or the tower that it belongs to."""
    return any(fnmatch.fnmatch(n, p) for n in (name, name.partition(".")[0]) for p in patterns)


def _field(tower: Tower, name: str) -> Any:
    """A field, with what a tower's variant says of it; padding means nothing to a causal tower."""
    if name == "heads" and isinstance(getattr(tower, "shape", None), tuple):
        return tower.shape[2] if len(tower.shape) == 5 else tower.heads
    if name == "mask_padding" and getattr(tower, "causal", False):
        return False
    return getattr(tower, name)


def _compare(name: str, params: PyTree, tower: Tower, faults: list[str]) -> None:
    """Adds a line for every entry of a tower that is missing, left over or of another shape."""
    expected = base.shapes(tower.clone(scan=False) if hasattr(tower, "scan") else tower)["params"]
    for key in sorted(expected.keys() | params.keys()):
        a, b = (
            jax.tree_util.tree_flatten_with_path(tree.get(key, {}))[0]
            for tree in (params, expected)
        )
        found, wanted = ({jax.tree_util.keystr(p): x.shape for p, x in leaves} for leaves in (a, b))
        if found != wanted:
            path = min(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
            shapes = f"{found.get(path, 'nothing')}, and {wanted.get(path, 'nothing')}"
            faults.append(f"{name}.{key}: {shapes} in the config")


def _resize(params: PyTree, tower: Tower) -> None:
    """Fits positions in place, where only their number differs."""
    if hasattr(tower, "image_size"):
        _resize_picture(params, tower)
    elif not hasattr(tower, "positions"):  # BERT's table, of which a text takes the first
        rows = params["positional_embedding"]
        if len(rows) != tower.context:
            params["positional_embedding"] = resize_line(rows, tower.context)


def _mask(params: PyTree, tower: Tower, given: int | None, wanted: int | None) -> None:
    """Takes the row of the mask out of the table of words, or puts one in, the mean of all."""
    table = params["token_embedding"]
    if given is not None and wanted is None and len(table) == tower.vocab_size + 1:
        params["token_embedding"] = np.delete(table, given, axis=0)
    if given is None and wanted is not None and len(table) == tower.vocab_size - 1:
        params["token_embedding"] = np.insert(table, wanted, table.mean(axis=0), axis=0)


def _resize_picture(params: PyTree, tower: Tower) -> None:
    """The positions of patches, or those of a modified ResNet's last map."""
    if isinstance(tower, ViT):
        first, side = int(tower.pool == "class"), tower.image_size // tower.shape[-1]
    elif tower.modified and "pool" in params:
        params["pool"] = params = dict(params["pool"])
        first, side = 1, tower.image_size // 2 ** (len(tower.shape[0]) + 1)
    else:
        return
    rows = params["positional_embedding"]
    old = round((len(rows) - first) ** 0.5)
    if old != side and len(rows) == first + old**2:
        params["positional_embedding"] = resize_grid(rows, first, side)


def resize_grid(rows: Float[np.ndarray, "n c"], first: int, side: int) -> Float[np.ndarray, "m c"]:
    """Positions of a square grid for one of `side` x `side`, bicubic with antialiasing; the `first`
    of them, a class token's, stay (open_clip, resize_pos_embed)."""
    kept, grid = rows[:first], rows[first:]
    old = round(len(grid) ** 0.5)
    grid = grid.reshape(old, old, -1)
    grid = jax.image.resize(grid, (side, side, grid.shape[-1]), "cubic", antialias=True)
    return np.concatenate([kept, np.asarray(grid).reshape(side * side, -1)])


def resize_line(rows: Float[np.ndarray, "n c"], length: int) -> Float[np.ndarray, "m c"]:
    """Positions of a text for one of another length, linear (open_clip, resize_text_pos_embed)."""
    shape = (length, rows.shape[1])
    return np.asarray(jax.image.resize(rows, shape, "linear", antialias=False))
