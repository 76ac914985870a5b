"""Renders the HTML templates of this folder, which share one style sheet."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, Any

from clipx.config import secrets
from clipx.errors import RunError
from clipx.training.metric_table import short

if TYPE_CHECKING:
    import jinja2


def render(template: str, **values: Any) -> str:
    """The page of a template as HTML. Values are escaped; lone surrogates, which UTF-8 cannot
    encode, become "?". Raises `RunError` without jinja2."""
    text = _environment().get_template(template).render(values)
    return text.encode("utf-8", "replace").decode()


def write_page(file: pathlib.Path, text: str) -> None:
    """Writes a page in one piece, without secrets. Raises `RunError` if it cannot be written."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(secrets.cut(text), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"cannot write {file}: {error.strerror}") from None


def _environment() -> jinja2.Environment:
    try:
        import jinja2
    except ImportError:
        raise RunError("pages need jinja2: pip install jinja2") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["short"] = short
    return environment
