"""Replaces `source=auto` in a config by the source that reads what lies at its path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipx.config import binding
from clipx.data.contents import TEST, TRAIN
from clipx.data.discover import Found, discover
from clipx.data.sources.auto import Auto
from clipx.errors import DataError, at_key, in_section

_UNREAD = "webdataset"  # any source that has a path


def resolve(
    config: Mapping[str, Any],
    saved: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """A copy of a config in which every `source=auto` is the source that was found, with its
    settings. `say` gets a line about each, and errors name the flags of their section.

    saved: the complete config of the run that goes on; None for a new one. Where nothing is found
    any more, its source is taken. Raises `DataError` as `discover` does.
    """
    out = dict(config)
    before = dict(saved or {})
    if isinstance(config.get("data"), Mapping):
        out["data"] = _section(config["data"], before.get("data"), "data", TRAIN, say)
    if isinstance(config.get("evals"), Mapping):
        out["evals"] = {
            name: _eval(name, section, (before.get("evals") or {}).get(name), say)
            for name, section in config["evals"].items()
        }
    return out


def _eval(name: str, section: Any, before: Any, say: Callable[[str], None]) -> Any:
    if not isinstance(section, Mapping):
        return section
    out = dict(section)
    for key, wanted in (("data", TEST), ("train_data", TRAIN)):
        if isinstance(section.get(key), Mapping):
            known = (before or {}).get(key)
            out[key] = _section(section[key], known, f"evals.{name}.{key}", wanted, say)
    return out


def _section(
    section: Mapping[str, Any],
    before: Any,
    where: str,
    wanted: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The section of a source, with the source that was found. `before`: that of the run that goes
    on, if there is one."""
    out, before = dict(section), before if isinstance(before, Mapping) else {}
    if isinstance(out.get("parts"), Mapping):
        known = before.get("parts") or {}
        out["parts"] = {
            name: _section(part, known.get(name), f"{where}.parts.{name}", wanted, say)
            if isinstance(part, Mapping)
            else part
            for name, part in out["parts"].items()
        }
    if out.get("source") != "auto":
        return out
    if not out.get("path"):  # an eval that reads rows which the run holds out, and nothing here
        return {**out, "source": _UNREAD}
    rest = {k: v for k, v in out.items() if v is not None and k not in ("source", "path")}
    own = {key: value for key, value in out.items() if key in binding.fields(Auto)}
    given = binding.check(Auto, own, where=f"config.{where}")  # types alone
    try:
        found = discover(given.pop("path"), given, wanted)
    except DataError as error:
        if before.get("source") in (None, "auto"):
            said = in_section(str(error), where)
            raise DataError(at_key(said, f"config.{where}.path")) from None
        values = {k: before[k] for k in ("path", "where") if before.get(k)}
        found = Found(before["source"], values, "as before")
    say(found.line(where))
    return {**rest, "source": found.source, **found.values}
