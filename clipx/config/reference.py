"""What each key of a config means, read from the code that declares it: the comment beside a field
or above it, or else what the class's docstring says of it.

`--help` prints it, and so do the tables of the documentation, which read this file without
importing clipx. It needs Python alone.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize


@functools.cache
def parsed(code: str) -> tuple[ast.Module, dict[int, tuple[str, bool]]]:
    """A module's tree, and its comments by line: the text, and whether it has the line alone."""
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type == tokenize.COMMENT
    }
    return ast.parse(code), comments


def meanings(code: str, cls: str) -> dict[str, str]:
    """What each annotated field of the class `cls` means; "" where the code does not say. code: the
    module's."""
    tree, comments = parsed(code)
    (node,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls]
    said = ast.get_docstring(node) or ""
    found = {}
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            name, last = field.target.id, field.end_lineno or field.lineno
            found[name] = _comment(comments, field.lineno, last) or _sentence(said, name)
    return found


def _comment(comments: dict[int, tuple[str, bool]], first: int, last: int) -> str:
    """What stands beside a field, or in the lines above it."""
    beside = [comments[i][0] for i in range(first, last + 1) if i in comments]
    above: list[str] = []
    while (line := comments.get(first - 1 - len(above))) and line[1]:
        above.insert(0, line[0])
    return re.sub(r" ?pyright: .*", "", " ".join([*above, *beside]))


def _sentence(docstring: str, name: str) -> str:
    """What a docstring says of a field, as "name: what it is." or "name, other: what they are."."""
    words = " ".join(docstring.split())
    pattern = rf"(?:^|[.:)] )(?:\w+, )*{name}(?:, \w+)*: (.+?)(?:\. (?=[A-Z]|\w+(?:, \w+)*: )|\.?$)"
    match = re.search(pattern, words)
    return match[1] if match else ""
