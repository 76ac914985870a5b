"""A line `::keys clipx.training.schema.TrainConfig` becomes a table of the class's fields.

A field's meaning is what clipx/config/reference.py reads from the code, as `--help` does. The code
is read as text, not imported, except for that file and clipx/config/ranges.py, which need Python
alone.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import pathlib
import re
import sys
import typing
from typing import Annotated, Any

ROOT = pathlib.Path(__file__).parents[2]
# fields that the caller of a class gives, and a config does not, by package
GIVEN = {
    "clipx.objectives": {"image", "text", "locked", "locked_features"},
    "clipx.evaluators": {"examples", "train_examples", "pictures"},
}
# the same, where the class declares them: names, or a mapping from names to other sections
DECLARED = ("from_tokenizer", "filled")


def _alone(name: str) -> Any:
    """The module clipx/config/<name>.py, without the packages above it."""
    file = ROOT / "clipx" / "config" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"clipx_config_{name}", file)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


RANGES = vars(_alone("ranges"))
reference = _alone("reference")


def on_page_markdown(markdown: str, **_) -> str:
    return re.sub(r"^::keys ([\w.]+)$", lambda match: table(match[1]), markdown, flags=re.MULTILINE)


@functools.cache
def code(name: str) -> str:
    return (ROOT / f"{name.replace('.', '/')}.py").read_text()


def module(name: str) -> ast.Module:
    return reference.parsed(code(name))[0]


def value_of(module_name: str, node: ast.expr) -> ast.expr:
    """The literal that a name stands for, in its module or where it is imported from."""
    if not isinstance(node, ast.Name):
        return node
    for other in module(module_name).body:
        if isinstance(other, ast.Assign) and other.targets[0].id == node.id:
            return other.value
        if isinstance(other, ast.ImportFrom) and node.id in [a.name for a in other.names]:
            return value_of(other.module, node)
    raise LookupError(f"{node.id} in {module_name}")


def table(name: str) -> str:
    """The fields of a class as Markdown."""
    where, _, cls = name.rpartition(".")
    (node,) = [n for n in module(where).body if isinstance(n, ast.ClassDef) and n.name == cls]
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    given = set(GIVEN.get(where.rpartition(".")[0], ()))
    for field in fields:
        if field.target.id in DECLARED and field.value is not None:
            value = value_of(where, field.value)
            names = value.keys if isinstance(value, ast.Dict) else value.elts
            given |= {n.value for n in names}
    rows, said = [], reference.meanings(code(where), cls)
    for field in fields:
        kind = ast.unparse(field.annotation)
        if field.target.id in given or field.target.id.startswith("_") or "ClassVar" in kind:
            continue
        default = "" if field.value is None else f"`{ast.unparse(field.value)}`"
        meaning = said[field.target.id].replace("|", "\\|").replace("<", "&lt;")
        kind, allowed = declared(where, field.annotation)
        rows.append(f"| `{field.target.id}` | `{kind}` | {allowed} | {default} | {meaning} |")
    if not rows:
        raise LookupError(f"{name} has no keys of its own")
    return "\n".join(["| Key | Type | Range | Default | Meaning |", "|---|---|---|---|---|", *rows])


def declared(module_name: str, annotation: ast.expr) -> tuple[str, str]:
    """(a field's type without its ranges, the ranges in words)."""
    words: list[str] = []

    class Plain(ast.NodeTransformer):
        """Replaces the names of ranges by types, and collects what they say."""

        def visit_Name(self, node: ast.Name) -> ast.expr:
            if typing.get_origin(RANGES.get(node.id)) in (Annotated, tuple):
                return self.visit(spelled(RANGES[node.id], words))
            own = [n.value for n in module(module_name).body if assigns(n, node.id)]
            return self.visit(own[0]) if own and "Annotated" in ast.unparse(own[0]) else node

        def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
            if ast.unparse(node.value) != "Annotated":
                return self.generic_visit(node)
            base, *rules = node.slice.elts
            base = self.visit(base)
            words.extend(str(eval(ast.unparse(rule), dict(RANGES))) for rule in rules)
            return base

    kind = ast.unparse(Plain().visit(ast.parse(ast.unparse(annotation), mode="eval").body))
    return kind, "; ".join(dict.fromkeys(words))


def assigns(node: ast.stmt, name: str) -> bool:
    """Whether `node` is `name = ...`."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [t.id for t in targets if isinstance(t, ast.Name)] == [name]


def spelled(hint: Any, words: list[str]) -> ast.expr:
    """The type `hint` of clipx/config/ranges.py as an expression. Adds its ranges to `words`."""
    if typing.get_origin(hint) is Annotated:
        base = spelled(hint.__origin__, words)
        words.extend(map(str, hint.__metadata__))
        return base
    if args := typing.get_args(hint):
        inner = ", ".join(ast.unparse(spelled(arg, words)) for arg in args)
        return ast.parse(f"{hint.__origin__.__name__}[{inner}]", mode="eval").body
    return ast.parse(hint.__name__, mode="eval").body
