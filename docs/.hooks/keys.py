"""A line `::keys clipx.training.schema.TrainConfig` becomes a table of the class's fields.

A field's meaning is the comment beside it or above it. The code is read as text, not imported.
"""

from __future__ import annotations

import ast
import functools
import io
import pathlib
import re
import tokenize

ROOT = pathlib.Path(__file__).parents[2]
# fields that the caller of a class gives, and a config does not, by package
GIVEN = {
    "clipx.objectives": {"image", "text", "locked"},
    "clipx.evaluators": {"examples", "train_examples", "pictures"},
}
# the same, where the class declares them: names, or a mapping from names to other sections
DECLARED = ("from_tokenizer", "filled")


def on_page_markdown(markdown: str, **_) -> str:
    return re.sub(r"^::keys ([\w.]+)$", lambda match: table(match[1]), markdown, flags=re.MULTILINE)


@functools.cache
def module(name: str) -> tuple[ast.Module, dict[int, tuple[str, bool]]]:
    """A module's tree, and its comments by line: the text, and whether it has the line alone."""
    text = (ROOT / f"{name.replace('.', '/')}.py").read_text()
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    return ast.parse(text), comments


def value_of(module_name: str, node: ast.expr) -> ast.expr:
    """The literal that a name stands for, in its module or where it is imported from."""
    if not isinstance(node, ast.Name):
        return node
    for other in module(module_name)[0].body:
        if isinstance(other, ast.Assign) and other.targets[0].id == node.id:
            return other.value
        if isinstance(other, ast.ImportFrom) and node.id in [a.name for a in other.names]:
            return value_of(other.module, node)
    raise LookupError(f"{node.id} in {module_name}")


def table(name: str) -> str:
    """The fields of a class as Markdown."""
    where, _, cls = name.rpartition(".")
    tree, comments = module(where)
    (node,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls]
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    given = set(GIVEN.get(where.rpartition(".")[0], ()))
    for field in fields:
        if field.target.id in DECLARED and field.value is not None:
            value = value_of(where, field.value)
            names = value.keys if isinstance(value, ast.Dict) else value.elts
            given |= {n.value for n in names}
    rows = []
    for field in fields:
        kind = ast.unparse(field.annotation)
        if field.target.id in given or field.target.id.startswith("_") or "ClassVar" in kind:
            continue
        default = "" if field.value is None else f"`{ast.unparse(field.value)}`"
        meaning = comment(comments, field.lineno, field.end_lineno)
        rows.append(f"| `{field.target.id}` | `{kind}` | {default} | {meaning} |")
    if not rows:
        raise LookupError(f"{name} has no keys of its own")
    return "\n".join(["| Key | Type | Default | Meaning |", "|---|---|---|---|", *rows])


def comment(comments: dict[int, tuple[str, bool]], first: int, last: int) -> str:
    """What stands beside a field, or in the lines above it."""
    beside = [comments[i][0] for i in range(first, last + 1) if i in comments]
    above: list[str] = []
    while (line := comments.get(first - 1 - len(above))) and line[1]:
        above.insert(0, line[0])
    return " ".join([*above, *beside]).replace("|", "\\|").replace("<", "&lt;")
