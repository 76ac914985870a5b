"""Where weights that a run started from come from, and under which licence, for its model card."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from clipx.config import reading, secrets
from clipx.interop import named

_LICENSE = re.compile(r"^license(?:_name)?: *[\"']?([^\"'\n#]+)", re.MULTILINE)
_PARTS = {"": "Both towers", "image": "The image tower", "text": "The text tower"}


def origins(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(a sentence, the licence; "" if unknown) for each file that a run's config starts from.

    The licence is what the front matter of the folder's `README.md` says, as the Hub has it.
    """
    found = []
    for part, subject in _PARTS.items():
        section = config.get(part) if part else config
        path = section.get("init_from") if isinstance(section, Mapping) else ""
        if not path:
            continue
        given = license_of(path)
        stated = (
            f", whose licence is {given}" if given else ", whose licence its folder does not say"
        )
        verb = "start" if subject.startswith("Both") else "starts"
        found.append((f"{subject} {verb} from `{secrets.cut(path)}`{stated}.", given))
    return found


def license_of(path: str) -> str:
    """The licence of the folder of `path`, in the Hub's words; "" if no `README.md` says it."""
    file = pathlib.Path(named.split(path)[1]).expanduser()
    try:
        text = reading.read_text((file if file.is_dir() else file.parent) / "README.md")
    except (OSError, UnicodeDecodeError):
        return ""
    head = text.partition("---")[2].partition("\n---")[0] if text.startswith("---") else ""
    names = [m[1].strip() for m in _LICENSE.finditer(head)]
    return next((name for name in names if name != "other"), "")
