"""Text encoders of transformers (BERT and its kin) and of sentence-transformers."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from flax import traverse_util

from clipx.errors import ConfigError
from clipx.interop import bert_layout, load, rules, weights
from clipx.interop.base import read_json
from clipx.interop.encoders import modules, tokenizer
from clipx.interop.encoders.base import Encoder
from clipx.interop.huggingface import HuggingFace
from clipx.interop.huggingface_layout import CONFIG, HARMLESS
from clipx.interop.model import shapes
from clipx.interop.rules import Arrays
from clipx.interop.settings import Section, keys
from clipx.models.base import Tower
from clipx.models.bert import BERT
from clipx.types import PyTree

CONTEXT = 64  # tokens of a caption, unless the config says otherwise: few are longer
# what stands before the names of an encoder's own arrays, such as "bert."
_OWN = re.compile(r"((?:[^.]+\.)*?)embeddings\.word_embeddings\.")
# first parts of the names of heads, which an encoder does not have
_HEADS = keys(
    "cls lm_head classifier pre_classifier qa_outputs score vocab_transform vocab_layer_norm "
    "vocab_projector"
)
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")


class _Weights(NamedTuple):
    """The arrays of an encoder, opened only when they are asked for."""

    names: Callable[[], frozenset[str]]
    arrays: Callable[[], Arrays]


def describe(path: str, where: str = "config.text.init_from") -> Encoder:
    """The encoder in a folder of transformers or sentence-transformers, or in a weights file with
    its `config.json` beside it.

    A weights file alone is read as BERT, whose heads no array tells: a note says what is guessed.
    Weights are opened only there, and where torch files must tell whether they have a pooler.

    Raises `ConfigError` at `where` for anything else, and for settings that clipx does not have.
    Settings that it does not know are among the `differences`.
    """
    try:
        return _describe(path, where)
    except ConfigError as error:
        error.where = error.where if error.where.startswith(where) else f"{where}: {error.where}"
        raise


def _describe(path: str, where: str) -> Encoder:
    file = pathlib.Path(path).expanduser()
    if not file.exists():
        expected = "a folder of transformers or sentence-transformers, or a weights file"
        raise ConfigError(where, f"nothing at {file}", expected, load.download_hint(path))
    folder = file if file.is_dir() else file.parent
    named = None if file.is_dir() else file
    found = modules.read(folder, where)
    if found is None:
        return _transformers(folder, named, where)
    inner = folder / found.transformer
    config, differences = _config(inner, where)
    if config is None:
        raise ConfigError(where, f"{inner} without {CONFIG}", "a folder of sentence-transformers")
    kind, pad_id, fields = config
    notes: list[str] = []
    given, more = tokenizer.find(
        inner, kind, where, size=fields["vocab_size"], pad_id=pad_id, cleaning="strip", notes=notes
    )
    length = min(found.length or given.length, given.length, fields["positions"])
    tower = _tower(fields | found.fields, given.section, length)
    own = _open(named or _file(inner, where), where)
    dense = _dense(folder / found.dense, where) if found.dense else None
    return Encoder(
        layout="sentence-transformers",
        tower=tower,
        read=functools.partial(_read, tower, kind, pad_id, own, dense, where),
        tokenizer=given.section | {"context": tower.context},
        longest=length,
        notes=tuple(notes),
        differences=(*differences, *found.differences, *more),
    )


def _transformers(folder: pathlib.Path, named: pathlib.Path | None, where: str) -> Encoder:
    config, differences = _config(folder, where)
    file = named or _file(folder, where)
    own = _open(file, where)
    notes: list[str] = []
    kind, pad_id, fields = config or _guessed(own, file, notes, where)
    has_pooler = "pooler.dense.weight" in own.names()
    if kind == "bert" and has_pooler:
        fields["pool"] = "pooler"
    else:
        fields["pool"] = "mean"
        notes.append(
            f"text.pool=mean: transformers does not say how the tokens of a {kind} become one "
            "vector"
        )
    size = fields["vocab_size"]
    if any((folder / name).is_file() for name in tokenizer.FILES):
        given, more = tokenizer.find(
            folder, kind, where, size=size, pad_id=pad_id, cleaning="raw", notes=notes
        )
        section, length, differences = given.section, given.length, [*differences, *more]
    else:
        section, length = {}, fields["positions"]
        notes.append(f"{folder} has no tokenizer: config.tokenizer must give the model's own ids")
    length = min(length, fields["positions"])
    tower = _tower(fields, section, length)

    def adapted(wanted: Tower) -> Encoder:
        """With the pooling of a config's tower, and its heads where no config.json has them."""
        if not isinstance(wanted, BERT):
            return made(tower)
        if wanted.pool == "pooler" and not has_pooler:
            found = f"'pooler', and {file} has none"
            raise ConfigError("config.text.pool", found, "'cls', 'mean' or 'max'")
        heads = tower.heads if config else wanted.heads
        return made(tower.clone(pool=wanted.pool, heads=heads))

    def made(tower: BERT) -> Encoder:
        return Encoder(
            layout="transformers",
            tower=tower,
            read=functools.partial(_read, tower, kind, pad_id, own, None, where),
            tokenizer=section | {"context": tower.context} if section else {},
            longest=length,
            notes=tuple(notes),
            differences=tuple(differences),
            adapt=adapted,
        )

    return made(tower)


def _config(
    folder: pathlib.Path, where: str
) -> tuple[tuple[str, int, dict[str, Any]] | None, list[str]]:
    """(what `bert_layout.read_config` gives; None without a `config.json`, settings of the file
    that are not known)."""
    values = read_json(folder / CONFIG, where)
    if values is None:
        return None, []
    section = Section(values, str(folder / CONFIG), harmless=HARMLESS | bert_layout.HARMLESS)
    found = bert_layout.read_config(section, where)
    return found, section.unread("text.settings")


def _tower(fields: dict[str, Any], section: dict[str, Any], length: int) -> BERT:
    """The tower, for texts of `CONTEXT` tokens unless the file allows fewer."""
    context = min(length, CONTEXT)
    ids = section.get("ids")
    marks = {"eot_id": ids["end"], "pad_id": ids["pad"]} if ids else {}
    return BERT(**fields, **marks, context=context, embed_dim=0, dtype="float32")


def _file(folder: pathlib.Path, where: str) -> pathlib.Path:
    names = HuggingFace.weights_read
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        listed = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing in it"
        raise ConfigError(where, f"{folder} with {listed}", f"{names[0]} or {names[2]}")
    return file


def _open(file: pathlib.Path, where: str) -> _Weights:
    @functools.cache
    def arrays() -> Arrays:
        """Without heads, under the names that transformers gives to the encoder alone."""
        plain = weights.read(file, where, _OWN)
        named = {_current(name): x for name, x in plain.items()}
        return {name: x for name, x in named.items() if name.split(".")[0] not in _HEADS}

    def names() -> frozenset[str]:
        if file.suffix != ".safetensors":
            return frozenset(arrays())
        listed = weights.names(file, where)
        prefix = next((m[1] for name in listed if (m := _OWN.match(name))), "")
        return frozenset(_current(name.removeprefix(prefix)) for name in listed)

    return _Weights(names, arrays)


def _current(name: str) -> str:
    """A name without the "gamma" and "beta" of old files."""
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))


def _dense(folder: pathlib.Path, where: str) -> _Weights:
    """The dense layer's arrays."""
    file = _file(folder, where)

    def arrays() -> Arrays:
        found = weights.read(file, where, re.compile(r"()linear\."))
        return {f"dense.{name}": x for name, x in found.items()}

    return _Weights(lambda: frozenset(arrays()), arrays)


def _read(
    tower: BERT, kind: str, pad_id: int, own: _Weights, dense: _Weights | None, where: str
) -> tuple[PyTree, PyTree]:
    """(params, batch statistics) of the tower in float32."""
    arrays = dict(own.arrays())
    if tower.pool != "pooler":
        arrays = {name: x for name, x in arrays.items() if not name.startswith("pooler.")}
    layout = bert_layout.layout(tower, kind, "params", pad_id=pad_id)
    if dense is not None:
        arrays |= dense.arrays()
        layout += rules.dense("params/dense", "dense.linear", bias=tower.dense_bias)

    def expected() -> dict[str, tuple[int, ...]]:
        tree = shapes(tower)["params"]  # pyright: ignore[reportArgumentType]  # modules hash
        flat: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")  # pyright: ignore[reportAssignmentType]
        return {f"params/{path}": x.shape for path, x in flat.items()}

    return rules.read(layout, arrays, expected, where)["params"], {}


def _guessed(
    own: _Weights, file: pathlib.Path, notes: list[str], where: str
) -> tuple[str, int, dict[str, Any]]:
    """What `_config` gives, from the arrays of a BERT alone."""
    arrays = own.arrays()

    def shape(name: str) -> tuple[int, ...]:
        if name not in arrays:
            expected = f"a BERT's weights; for others, their {CONFIG} beside the file"
            raise ConfigError(where, f"{file} without {name}, and no {CONFIG}", expected)
        return arrays[name].shape

    vocab_size, width = shape("embeddings.word_embeddings.weight")
    segments = shape("embeddings.token_type_embeddings.weight")[0]
    if segments == 1:
        found = f"{file} with one segment type, as RoBERTa has, and no {CONFIG}"
        raise ConfigError(where, found, f"the model's {CONFIG} beside the file")
    hidden = shape("encoder.layer.0.intermediate.dense.weight")[0]
    heads = width // 64 if width % 64 == 0 else 1
    notes.append(f"{file.name} has no {CONFIG}: {heads} heads, as BERT has at width {width}")
    return (
        "bert",
        0,
        {
            "vocab_size": vocab_size,
            "positions": shape("embeddings.position_embeddings.weight")[0],
            "segments": segments,
            "width": width,
            "depth": _depth(arrays),
            "heads": heads,
            "mlp_ratio": hidden / width,
        },
    )


def _depth(names: Iterable[str]) -> int:
    return 1 + max(int(m[1]) for name in names if (m := _LAYER.match(name)))
