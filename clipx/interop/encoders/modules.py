"""The modules of a sentence-transformers folder, which pool an encoder's tokens."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, TypedDict

from clipx.config import reading
from clipx.errors import ConfigError
from clipx.interop.base import read_json
from clipx.interop.settings import Section, keys

FILE, SETTINGS = "modules.json", "config_sentence_transformers.json"
# files with the settings of the encoder, which old versions named after its kind
_ENCODER = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "xlm-roberta")
)
_POOLS = {  # flags of old versions, and the names that `pooling_mode` has for them
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_HAVE = ("cls", "max", "mean")
_SENTENCE = "sentence_embedding"
_KINDS = ("Transformer", "Pooling", "Dense", "Normalize")  # in this order, the last two if any


class _Module(TypedDict):
    """An entry of `modules.json`."""

    idx: int
    type: str
    path: str


@dataclasses.dataclass(frozen=True)
class Modules:
    """What the modules say beside the encoder's own `config.json`."""

    transformer: str  # folder of the encoder, relative to that of the modules
    fields: dict[str, Any]  # of `BERT`: pool, dense layer, normalisation
    dense: str = ""  # folder of the dense layer
    length: int | None = None  # most tokens of a text
    differences: tuple[str, ...] = ()


def read(folder: pathlib.Path, where: str) -> Modules | None:
    """The modules of a folder; None without `modules.json`.

    Raises `ConfigError` at `where` for modules that no tower of clipx has, in kind or order.
    """
    listed = _listed(folder / FILE, where)
    if listed is None:
        return None
    kinds = [kind for kind, _ in listed]
    names = ", ".join(kinds)
    if kinds[:2] != ["Transformer", "Pooling"] or kinds != [k for k in _KINDS if k in kinds]:
        expected = "Transformer, Pooling, then a Dense and a Normalize, or one of them, or none"
        raise ConfigError(where, f"{folder / FILE} with {names or 'no modules'}", expected)
    paths = dict(listed)
    length, differences = _encoder(folder / paths["Transformer"], where)
    fields = _pooling(folder / paths["Pooling"], differences, where)
    if "Dense" in paths:
        fields |= _dense(folder / paths["Dense"], differences, where)
    if "Normalize" in paths:
        fields["normalize"] = True
        _normalize(folder / paths["Normalize"], differences, where)
    _prompts(folder, differences, where)
    dense = paths.get("Dense", "")
    return Modules(paths["Transformer"], fields, dense, length, tuple(differences))


def _listed(file: pathlib.Path, where: str) -> list[tuple[str, str]] | None:
    """(kind, folder) of each module. sentence-transformers has had several paths for one kind, and
    all end with its name. Dropout does nothing to a trained model."""
    entries: list[_Module] | None = read_json(file, where, list[_Module])
    if entries is None:
        return None
    found = [(entry["type"], entry["path"]) for entry in sorted(entries, key=lambda e: e["idx"])]
    for kind, path in found:
        try:
            reading.inside(file.parent, path)
        except ValueError as error:
            raise ConfigError(where, f"{file}: {error}", "folders beside it") from None
        last = kind.rpartition(".")[2]
        if not kind.startswith("sentence_transformers.") or last not in (*_KINDS, "Dropout"):
            known = ", ".join(_KINDS)
            raise ConfigError(where, f"{file} with {kind}", f"modules of the kinds {known}")
    named = [(kind.rpartition(".")[2], path) for kind, path in found]
    return [(kind, path) for kind, path in named if kind != "Dropout"]


def _section(file: pathlib.Path, where: str, harmless: str = "") -> Section:
    """The settings of a file; none without it."""
    return Section(read_json(file, where) or {}, str(file), file.name, keys(harmless))


def _unread(section: Section) -> list[str]:
    return section.unread("text.settings")


def _encoder(folder: pathlib.Path, where: str) -> tuple[int | None, list[str]]:
    """(most tokens of a text, differences)."""
    name = next((name for name in _ENCODER if (folder / name).is_file()), _ENCODER[0])
    section = _section(folder / name, where, "model_args tokenizer_args config_args unpad_inputs")
    section.one_of("transformer_task", ("feature-extraction",), "feature-extraction")
    section.one_of("module_output_name", ("token_embeddings",), "token_embeddings")
    usual = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    differences = []
    if (modality := section.get("modality_config", usual)) != usual:
        differences.append(f"text.settings.{name}.modality_config: {modality!r} in the model")
    length = section.get("max_seq_length")
    length = None if length is None else section.whole("max_seq_length", least=3, most=2**16)
    if section.flag("do_lower_case", False, null=False):
        differences.append(
            f"text.settings.{name}.do_lower_case: true in the model: put lower case into the "
            "normalizer of tokenizer.json"
        )
    return length, differences + _unread(section)


def _pooling(folder: pathlib.Path, differences: list[str], where: str) -> dict[str, Any]:
    section = _section(
        folder / "config.json", where, "word_embedding_dimension embedding_dimension include_prompt"
    )
    chosen = [name for key, name in _POOLS.items() if section.flag(key, False, null=False)]
    mode = section.get("pooling_mode", chosen or ["mean"])
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in _HAVE:
        shown = " and ".join(map(str, modes))
        raise ConfigError(where, f"{section.where} with {shown}", f"one of {', '.join(_HAVE)}")
    differences += _unread(section)
    return {"pool": modes[0]}


def _dense(folder: pathlib.Path, differences: list[str], where: str) -> dict[str, Any]:
    section = _section(folder / "config.json", where, "in_features")
    _between_sentences(section)
    activation = str(section.get("activation_function", "torch.nn.modules.activation.Tanh"))
    last = activation.rpartition(".")[2].lower()
    if not activation.startswith("torch.nn.") or last not in ("tanh", "identity"):
        found = f"{section.where} with {activation}"
        raise ConfigError(where, found, "torch.nn's Tanh or Identity")
    section.one_of("use_residual", (False,), False)
    fields = {
        "dense_width": section.size("out_features"),
        "dense_bias": section.flag("bias", True),
        "dense_activation": last,
    }
    differences += _unread(section)
    return fields


def _normalize(folder: pathlib.Path, differences: list[str], where: str) -> None:
    section = _section(folder / "config.json", where)
    _between_sentences(section)
    differences += _unread(section)


def _between_sentences(section: Section) -> None:
    """Raises `ConfigError` for a module that acts on something else than the sentence's vector."""
    section.one_of("module_input_name", (_SENTENCE,), _SENTENCE)
    section.one_of("module_output_name", (_SENTENCE,), _SENTENCE)


def _prompts(folder: pathlib.Path, differences: list[str], where: str) -> None:
    """A prompt that the library puts before every text."""
    values = read_json(folder / SETTINGS, where) or {}
    name, prompts = values.get("default_prompt_name"), values.get("prompts") or {}
    prompt = prompts.get(name) if isinstance(prompts, dict) and name else None
    if prompt:
        differences.append(f"text.prompt: {prompt!r} before every text in the model, none in clipx")
