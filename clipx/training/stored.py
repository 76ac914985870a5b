"""Runs that train on stored features of frozen towers: `config.data.features`, `image.cache` and
`text.cache`. What such a run may be, what its batches have, and whether features are its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from clipx.data.config import DataConfig
from clipx.data.features import FeatureRows
from clipx.data.framing import CENTRE, Framing
from clipx.data.text.tokenizers import Tokenizer
from clipx.errors import ConfigError, DataError
from clipx.models.base import HEAD, Tower
from clipx.objectives.base import Objective
from clipx.parallel.mesh import path_name
from clipx.types import Batch, PyTree, TrainState

TOWERS = ("image", "text")
FOLDER = "features"  # in a workdir
_LONG = 12  # digits of a digest


def towers(objective: Objective, data: DataConfig) -> tuple[str, ...]:
    """The towers whose features a run reads, not its pictures or captions."""
    named = {name: getattr(data.features, name) for name in TOWERS}
    return tuple(name for name in TOWERS if named[name] or getattr(objective, name).cache)


def setting(objective: Objective, data: DataConfig, name: str) -> str:
    """The key by which a run asks for stored features of a tower."""
    if getattr(data.features, name):
        return f"config.data.features.{name}"
    return f"config.{name}.cache"


def checked(objective: Objective, data: DataConfig) -> Objective:
    """`objective`, which has its locks. Raises `ConfigError` for a run that cannot train on stored
    features as it is asked to."""
    names = towers(objective, data)
    for name in names:
        where = setting(objective, data, name)
        if getattr(data.features, name) and getattr(objective, name).cache:
            raise ConfigError(
                f"config.{name}.cache", f"true, beside config.data.features.{name}", "one of both",
                f"config.{name}.cache=false",
            )  # fmt: skip
        if name not in objective.locked_features:
            raise ConfigError(
                where,
                f"features of the {name} tower, which is trained below its head",
                "a tower that is frozen below its head, so that its features stay what they are",
                f"config.optimizer.freeze={freeze(name)!r}",
            )
        refuse_mixture(data, where)
        for found, expected, fix in _faults(objective, data, name):
            raise ConfigError(where, found, expected, fix)
    return objective


def refuse_mixture(data: DataConfig, where: str) -> None:
    """Raises `ConfigError` at `where` for a mixture, which has some rows several times."""
    if data.source == "mixture":
        raise ConfigError(
            where, "a mixture, in which rows repeat", "a source without parts",
            "give one source a pattern or a list as its path",
        )  # fmt: skip


def freeze(name: str) -> tuple[str, ...]:
    """Patterns for `optimizer.freeze` that leave only a tower's head to train."""
    return (f"^{name}/(?!{HEAD[0]})",)  # with which all entries of the head begin


def _faults(objective: Objective, data: DataConfig, name: str) -> Any:
    """What a run asks for that stored features cannot give, as (found, expected, fix)."""
    method = type(objective).__name__
    views, plain = objective.views, f"leave {setting(objective, data, name)} out"
    mirrored = views.mirror_words and any(view.flip for view in views.pictures)
    if mirrored:
        yield (
            "stored features, while mirrored pictures swap left and right in their captions",
            "an augmentation without mirror_words", "config.objective.augmentation=center",
        )  # fmt: skip
    if name == "text":
        if objective.hides_words:
            yield (
                f"features of captions, while {method} hides words from the text tower",
                "an objective that reads whole captions", f"config.text.cache=false: {plain}"
                if objective.text.cache else plain,
            )  # fmt: skip
        if "augmented" in views.texts:
            yield (
                f"features of captions, while {method} changes words of each caption anew",
                "an objective that reads captions as they are", plain,
            )  # fmt: skip
        if data.reject_cjk:
            yield (
                "features of captions, with config.data.reject_cjk",
                "false: stored features have no characters", "config.data.reject_cjk=false",
            )  # fmt: skip
    elif objective.image.cache:
        yield from _crop_faults(objective, data.features.views)


def _crop_faults(objective: Objective, stored: int) -> Any:
    """The fault of so many stored crops (0: the centre alone) for the views of an objective."""
    method = type(objective).__name__
    views = objective.views.pictures
    random = [view for view in views if view.random]
    if random and not stored:
        center = ", or config.objective.augmentation=center" * (len(views) == 1)
        center += " with config.objective.crop_scale=None" * bool(center and objective.crop_scale)
        yield (
            f"features of the centre of each picture, while {method} asks for {len(random)} "
            "random view(s)",
            "stored crops, or an objective without random views",
            _MORE.format(len(views)) + center,
        )
    elif random and stored < len(views):
        yield (
            f"{stored} stored crop(s) of each picture, while {method} asks for {len(views)} views",
            f"at least {len(views)}", _MORE.format(len(views)),
        )  # fmt: skip
    elif stored and not random:
        yield (
            f"{stored} crops of each picture, while every view of {method} is its centre",
            "the centre alone", "config.data.features.views=0, or clipx.embed without --views",
        )  # fmt: skip


def check_crops(objective: Objective, stored: int, where: str) -> None:
    """Raises `ConfigError` at `where` for so many stored crops (0: the centre alone) that the views
    of an objective cannot be taken from them."""
    for found, expected, fix in _crop_faults(objective, stored):
        raise ConfigError(where, found, expected, fix)


_MORE = "config.data.features.views={0} with image.cache, or clipx.embed --views={0}"


def batch(objective: Objective, data: DataConfig, state: TrainState, pixels: Batch) -> Batch:
    """The abstract batch of a run: `pixels`, the one of pictures and captions, with the features
    that the run reads."""
    names, rows = towers(objective, data), len(pixels.row)
    sharding, extra = pixels.row.sharding, {}

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    for name in names:
        like = pixels.image if name == "image" else pixels.text
        count, tower = like.shape[1], getattr(objective, name)
        extra[f"{name}_features"] = array(jnp.float32, count, tower.backbone_width)
        if objective.reads_tokens:
            one = jax.ShapeDtypeStruct((1, *like.shape[2:]), like.dtype)
            tokens = features_of(objective, state, name, one)[1]
            extra[f"{name}_tokens"] = array(jnp.float32, count, *tokens.shape[1:])
    image = pixels.image
    if "image" in names:
        image = array(jnp.uint8, 0, *image.shape[2:])
    return pixels.replace(image=image, extra=extra)


def features_of(
    objective: Objective, state: TrainState, name: str, rows: jax.ShapeDtypeStruct
) -> tuple[Any, Any]:
    """The abstract (pooled features, tokens) of a tower for abstract rows."""

    def compute(params: PyTree, statistics: PyTree, rows: Any) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        return objective.apply(variables, name, rows, method="tower_features")

    return jax.eval_shape(compute, state.params, state.batch_stats, rows)


def digest(state: TrainState, name: str) -> str:
    """A digest of a tower's arrays below its head. All processes must call it."""
    found = hashlib.sha256()
    below = {k: v for k, v in state.params[name].items() if k not in HEAD}
    kept = {"params": below, "batch_stats": state.batch_stats.get(name, {})}
    for path, x in jax.tree_util.tree_flatten_with_path(kept)[0]:
        if jax.process_count() > 1:
            x = multihost_utils.process_allgather(x, tiled=True)
        values = np.ascontiguousarray(jax.device_get(x))
        found.update(f"{path_name(path)} {values.dtype} {values.shape}\n".encode())
        found.update(values.data)
    return found.hexdigest()[:_LONG]


def preprocessing(
    objective: Objective, name: str, tokenizer: Tokenizer, framing: Framing
) -> dict[str, Any]:
    """How rows reach a tower and what its arrays do not tell of it, as JSON has it."""
    tower: Tower = getattr(objective, name)
    about = {**tower.unseen_settings, "dtype": tower.dtype}
    if name == "image":
        about |= {"image_size": tower.image_size, "mean": objective.mean, "std": objective.std}
        if framing != CENTRE:  # which folders of older versions do not say
            about |= dataclasses.asdict(framing)
    else:
        about |= {"tokenizer": _tokenizer_digest(tokenizer), "context": tower.context}
    return json.loads(json.dumps(about))


def _tokenizer_digest(tokenizer: Tokenizer, *, path: bool = False) -> str:
    """A digest of what a tokenizer does. path: and of where it came from, as older versions had."""
    saved = tokenizer.save()
    if not path:
        saved["config"] = saved["config"] | {"path": None}
    return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()[:_LONG]


def crops(objective: Objective, views: int) -> list[dict[str, Any]]:
    """How the stored views of a picture are made, as JSON has it: crop i is made by entry i,
    counted round. Empty for views=0, the centre alone."""
    if not views:
        return []
    made = [
        {**dataclasses.asdict(view.photometry), "scale": view.scale, "flip": view.flip}
        for view in objective.views.pictures
    ]
    return json.loads(json.dumps(made))


def refuse_other(
    objective: Objective,
    tokenizer: Tokenizer,
    data: DataConfig,
    name: str,
    features: FeatureRows,
) -> None:
    """Raises `ConfigError` unless stored features are what the run would compute, but for the
    weights, which only its state tells."""
    where, about, method = f"config.data.features.{name}", features.about, type(objective).__name__
    again = f"write them with `python -m clipx.embed --tower={name}` and this run's config"
    if about["tower"] != name:
        raise ConfigError(
            where, f"{features.folder}: features of the {about['tower']} tower",
            f"features of the {name} tower", again,
        )  # fmt: skip
    ours = preprocessing(objective, name, tokenizer, data.framing)
    made = dict(about["preprocessing"])
    if name == "text" and made.get("tokenizer") == _tokenizer_digest(tokenizer, path=True):
        made["tokenizer"] = ours["tokenizer"]
    for key in sorted(ours.keys() | made.keys()):
        theirs = made.get(key)
        if theirs != ours.get(key):
            raise ConfigError(
                where, f"{features.folder}: features made with {key}={theirs}",
                f"{key}={ours.get(key)}, as this run has it", again,
            )  # fmt: skip
    if objective.reads_tokens and not about["tokens"]:
        raise ConfigError(
            where, f"{features.folder}: no token features, which {method} compares",
            "features with those of tokens", f"{again} and --tokens",
        )  # fmt: skip
    if name == "text":
        return
    for found, expected, fix in _crop_faults(objective, about["views"]):
        raise ConfigError(where, f"{features.folder}: {found}", expected, fix)
    stored, asked = about["crops"], crops(objective, about["views"])
    if any(stored[i % len(stored)] != asked[i % len(asked)] for i in range(about["views"])):
        raise ConfigError(
            where, f"{features.folder}: crops made with {stored}", f"{asked}, as {method} has them",
            again,
        )  # fmt: skip


def refuse_other_weights(state: TrainState, name: str, features: FeatureRows) -> None:
    """Raises `ConfigError` unless stored features are of the weights of the run's frozen tower."""
    found = digest(state, name)
    if found != features.about["weights"]:
        raise ConfigError(
            f"config.data.features.{name}",
            f"{features.folder}: features of weights {features.about['weights']}",
            f"those of this run's {name} tower, {found}",
            f"the init_from that they were made with, or `python -m clipx.embed --tower={name}` "
            "with this run's config",
        )


def open_features(
    data: DataConfig, rows: Any, fingerprint: str, complete: Callable[[], str]
) -> dict[str, FeatureRows]:
    """The stored features that `config.data.features` names, for the rows that a run trains on.

    rows: those of the data set, in the run's order; None: all. fingerprint: of these rows.
    complete: the fingerprint of the data set. Raises `DataError` for features of other data.
    """
    found: dict[str, FeatureRows] = {}
    for name in TOWERS:
        folder = getattr(data.features, name)
        if not folder:
            continue
        features = FeatureRows(folder)
        made_for = features.about["fingerprint"]
        if made_for == fingerprint:
            found[name] = features
        elif rows is not None and made_for == complete():
            found[name] = FeatureRows(folder, rows)
        else:
            raise DataError(
                f"config.data.features.{name}={folder}: made for other data, with fingerprint "
                f"{made_for}, expected {fingerprint if rows is None else complete()}, that of this "
                f"run's data; write them again with `python -m clipx.embed --tower={name}` and "
                "this run's config"
            )
    return found


def describe(features: Mapping[str, FeatureRows]) -> list[str]:
    """A line for each tower whose features are stored."""
    return [
        f"{name} tower: frozen, {x.width} stored features a row from {x.folder}"
        + (f", {x.views} view(s)" if name == "image" else "")
        for name, x in features.items()
    ]
