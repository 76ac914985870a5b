"""The data that a flag names: a path, or a source as `source=folder,path=DIR`."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from clipx.data.base import Source, expand_user
from clipx.data.contents import Folder
from clipx.data.resolve import resolve
from clipx.data.tables.cells import PICTURE_ENDS
from clipx.errors import DataError
from clipx.serving.evaluation import section
from clipx.training.schema import SourceSpec


def sections(
    text: str, flag: str, say: Callable[[str], None] = print, *, alone: bool = False
) -> dict[str, Any]:
    """The config section of the source that the `flag` names. `say` gets a line about what was
    found at a path.

    alone: a folder of pictures without captions is data too. Raises `DataError`, and `ConfigError`
    for a text that is neither a path nor a source; both name the flag.
    """
    values = {"source": "auto", "path": text}
    if text.startswith("source="):
        values = section(text, flag)
    key = flag.removeprefix("--")

    def told(line: str) -> None:
        say(line.replace(f"evals.{key}.data", flag))

    try:
        return resolve({"evals": {key: {"data": values}}}, say=told)["evals"][key]["data"]
    except DataError as error:
        if alone and (found := _pictures_alone(values)):
            say(f"{flag} = files: {found}, without captions")
            return {"source": "files", "path": values["path"], "without_captions": True}
        raise DataError(with_flag(str(error), flag, values)) from None


def opened(values: Mapping[str, Any], flag: str) -> Source:
    """The source of a section, open. Errors name the `flag`."""
    given = dict(values)
    try:
        return SourceSpec.check(given, given.pop("source"), flag).open()
    except DataError as error:
        raise DataError(with_flag(str(error), flag, values)) from None


def with_flag(message: str, flag: str, values: Mapping[str, Any]) -> str:
    """The message of a source with the flag in place of the config's. values: what is known of the
    source."""
    name = flag.removeprefix("--")
    key = rf"--config\.(?:evals\.{name}\.)?data\."
    message = re.sub(rf"{key}source=(\S+) {key}", rf"{flag}=source=\1,", message)
    message = re.sub(rf"{key}path=", f"{flag}=", message)
    message = message.replace(f"config.evals.{name}.data.path: ", f"{flag}: ")
    known = shlex.quote(",".join(f"{name}={value}" for name, value in values.items()))
    return re.sub(key, lambda _: f"{flag}={known},", message)


def _pictures_alone(values: Mapping[str, Any]) -> str:
    """How many pictures a folder holds, in words; "" if its path is no folder or has none."""
    path = values["path"]
    if values["source"] != "auto" or not isinstance(path, str):
        return ""
    root = expand_user(path)
    if not os.path.isdir(root):
        return ""
    count = len(Folder.of(root, most=None).ending(PICTURE_ENDS))
    return f"{count:,} pictures in {path}" if count else ""
