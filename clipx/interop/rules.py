"""Rules that convert arrays between clipx and a library: names, layouts and dtypes.

A rule works in both directions without loss: arrays that were read are written back to the bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from clipx.errors import ConfigError
from clipx.types import PyTree

Arrays = dict[str, np.ndarray]


class Rule(NamedTuple):
    """How some arrays of clipx become arrays of a library, and back."""

    ours: tuple[str, ...]  # paths in clipx, the keys of `Model.flat`
    theirs: tuple[str, ...]  # names in the library's file
    out: Callable[..., tuple[np.ndarray, ...]]  # (*ours) -> theirs
    back: Callable[..., tuple[np.ndarray, ...]]  # (*theirs) -> ours; a missing array is None


def write(rules: Iterable[Rule], arrays: Arrays) -> Arrays:
    """The library's arrays by name, contiguous, from clipx's `arrays` by path. Raises `ValueError`
    for an array that no rule takes."""
    left, written = dict(arrays), {}
    for rule in rules:
        made = rule.out(*(left.pop(path) for path in rule.ours))
        named = zip(rule.theirs, made, strict=True)
        written |= {name: np.ascontiguousarray(x) for name, x in named}
    if left:
        raise ValueError(f"no rule for {', '.join(sorted(left))}")
    return written


# Suffixes of arrays that a library computes but some of its versions store. They are never read and
# may be missing.
_NOT_LEARNED = ("num_batches_tracked", "position_ids", "attn_mask")
_NOT_LEARNED += ("input_resolution", "context_length", "vocab_size")  # in OpenAI's scripts


Shapes = Mapping[str, tuple[int, ...]]


def read(
    rules: Sequence[Rule],
    arrays: Mapping[str, np.ndarray],
    shapes: Callable[[], Shapes],
    where: str,
) -> PyTree:
    """{"params": ..., "batch_stats": ...} in float32, from a library's arrays by name.

    shapes: returns the shapes of clipx's arrays by path; called once all names are right. Raises
    `ConfigError` at `where` for the first array that is missing or that no rule reads, and for
    arrays of other shapes.
    """
    _check_names(rules, arrays, where)
    ours, wrong, expected = {}, [], shapes()
    for rule in rules:
        theirs = [arrays.get(name) for name in rule.theirs]
        theirs = [x if x is None else np.asarray(x, np.float32) for x in theirs]
        try:
            made = rule.back(*theirs)
        except (ValueError, IndexError):  # numpy's, of a shape that cannot be converted
            made = None
        if made is None or any(x.shape != expected[p] for p, x in zip(rule.ours, made)):
            if len(wrong) < _SHOWN:
                wrong += _other_shapes(rule, theirs, expected)
        else:
            ours |= dict(zip(rule.ours, made, strict=True))
    if wrong:
        raise ConfigError(
            where,
            "arrays of other shapes, among them\n    " + "\n    ".join(wrong[:_SHOWN]),
            "arrays of the model that its config describes",
            "use the config that belongs to this weights file",
        )
    return traverse_util.unflatten_dict(ours, sep="/")


def _check_names(rules: Sequence[Rule], arrays: Mapping[str, np.ndarray], where: str) -> None:
    named = {name for rule in rules for name in rule.theirs}
    missing = [n for rule in rules for n in rule.theirs if n not in arrays and not _computed(n)]
    if missing:
        raise ConfigError(
            where,
            f"no {missing[0]} among its {len(arrays)} arrays",
            "every array of the model that its config describes",
            "use a complete weights file, or the config that belongs to this one",
        )
    unread = [name for name in arrays if name not in named and not _computed(name)]
    if unread:
        raise ConfigError(
            where,
            f"{unread[0]}" + (f" and {len(unread) - 1} more" if len(unread) > 1 else ""),
            "only arrays of the model that its config describes",
            "use the config that belongs to this weights file",
        )


_SHOWN = 4  # arrays in an error


def _other_shapes(rule: Rule, theirs: list[np.ndarray | None], shapes: Shapes) -> list[str]:
    """A line for each of a rule's arrays whose shape is not the one that the config describes."""
    if sum(math.prod(shapes[path]) for path in rule.ours) > 2**24:  # too many to make
        ours = ", ".join(f"{path.partition('/')[2]} {shapes[path]}" for path in rule.ours)
        found = zip(rule.theirs, theirs, strict=True)
        given = [(name, x.shape) for name, x in found if x is not None]
        return [f"{name}: {shape} in the file, {ours} by the config" for name, shape in given]
    zero = np.float32(0)
    expected = rule.out(*(np.broadcast_to(zero, shapes[path]) for path in rule.ours))
    return [
        f"{name}: {x.shape} in the file, {other.shape} by the config"
        for name, x, other in zip(rule.theirs, theirs, expected, strict=True)
        if x is not None and x.shape != other.shape
    ]


def _computed(name: str) -> bool:
    return name.endswith(_NOT_LEARNED)


def same(ours: str, theirs: str) -> Rule:
    """An array that is equal in both."""
    return Rule((ours,), (theirs,), lambda x: (x,), lambda x: (x,))


def transposed(ours: str, theirs: str) -> Rule:
    """A dense kernel [in, out], in torch a weight [out, in]."""
    return Rule((ours,), (theirs,), lambda x: (x.T,), lambda x: (x.T,))


def dense(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
    """A dense layer: its kernel and, with `bias`, its bias."""
    rules = [transposed(f"{ours}/kernel", f"{theirs}.weight")]
    return rules + [same(f"{ours}/bias", f"{theirs}.bias")] * bias


def pointwise(ours: str, theirs: str) -> list[Rule]:
    """A dense layer, in torch a convolution with a kernel of one pixel."""

    def out(x: np.ndarray) -> tuple[np.ndarray]:
        return (x.T[:, :, None, None],)

    def back(x: np.ndarray) -> tuple[np.ndarray]:
        return (x[:, :, 0, 0].T,)

    kernel = Rule((f"{ours}/kernel",), (f"{theirs}.weight",), out, back)
    return [kernel, same(f"{ours}/bias", f"{theirs}.bias")]


def norm(ours: str, theirs: str) -> list[Rule]:
    """Scale and bias of a normalisation layer."""
    return [same(f"{ours}/scale", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")]


def conv(ours: str, theirs: str) -> Rule:
    """A convolution kernel [h, w, in, out], in torch [out, in, h, w]."""
    return Rule(
        (f"{ours}/kernel",),
        (f"{theirs}.weight",),
        lambda x: (x.transpose(3, 2, 0, 1),),
        lambda x: (x.transpose(2, 3, 1, 0),),
    )


def batch_norm(tower: str, ours: str, theirs: str) -> list[Rule]:
    """A BatchNorm and its running statistics. tower: "image" or "text". torch also keeps a count of
    batches, which is written as 0 and never read."""
    stats = f"batch_stats/{tower}/{ours}"
    zero = np.zeros((), np.int64)
    count = Rule((), (f"{theirs}.num_batches_tracked",), lambda: (zero,), lambda _: ())
    return [
        *norm(f"params/{tower}/{ours}", theirs),
        same(f"{stats}/mean", f"{theirs}.running_mean"),
        same(f"{stats}/var", f"{theirs}.running_var"),
        count,
    ]


def heads_in(
    ours: tuple[str, ...],
    theirs: tuple[str, ...],
    heads: int,
    parts: tuple[int, ...],
    before: str = ".",
) -> list[Rule]:
    """The projections of an attention layer to queries, keys and values.

    ours: modules of clipx. Module i holds `parts[i]` projections in one kernel
    [c, parts, heads, head width]; with one projection the kernel has no axis of parts.
    theirs: names of torch's weights [rows, c]: one per projection, or one for all projections.
    before: the separator between such a name and "weight" or "bias".
    """

    def out(weight: bool, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = []
        for x, count in zip(arrays, parts):
            x = x.reshape(len(x) if weight else 1, count, -1)
            rows += list(x.transpose(1, 2, 0) if weight else x[0])
        return tuple(np.concatenate(part) for part in np.split(np.stack(rows), len(theirs)))

    def back(weight: bool, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = np.concatenate(arrays)
        rows = rows.reshape(sum(parts), -1, *rows.shape[1:])
        kernels, start = [], 0
        for count in parts:
            x = rows[start : start + count]
            x = x.transpose(2, 0, 1) if weight else x
            axes = (count,) * (count > 1)
            kernels.append(x.reshape(*x.shape[:1] * weight, *axes, heads, -1))
            start += count
        return tuple(kernels)

    def rule(leaf: str, ending: str, weight: bool) -> Rule:
        return Rule(
            tuple(f"{name}/{leaf}" for name in ours),
            tuple(name + ending for name in theirs),
            functools.partial(out, weight),
            functools.partial(back, weight),
        )

    return [rule("kernel", f"{before}weight", True), rule("bias", f"{before}bias", False)]


def heads_out(ours: str, theirs: str, heads: int) -> list[Rule]:
    """The output projection of an attention layer, in clipx a kernel [heads, head width, c]."""
    kernel = Rule(
        (f"{ours}/kernel",),
        (f"{theirs}.weight",),
        lambda x: (x.reshape(-1, x.shape[-1]).T,),
        lambda x: (x.T.reshape(heads, -1, len(x)),),
    )
    return [kernel, same(f"{ours}/bias", f"{theirs}.bias")]


def words(path: str, theirs: str, dropped: int | None) -> Rule:
    """The token embedding [vocabulary, c]. The library's has no row `dropped`."""

    def out(x: np.ndarray) -> tuple[np.ndarray]:
        return (x if dropped is None else np.delete(x, dropped, axis=0),)

    return Rule((path,), (theirs,), out, lambda x: (x,))


def constant(theirs: str, make: Callable[[], np.ndarray]) -> Rule:
    """An array that the library needs and clipx does not have. Its value changes no output."""
    return Rule((), (theirs,), lambda: (make(),), lambda _: ())


def scaled(rules: Iterable[Rule], factor: float) -> list[Rule]:
    """The same rules, with the library's arrays multiplied by `factor`."""
    if factor == 1:
        return list(rules)

    def times(function: Callable, by: float) -> Callable[..., tuple[np.ndarray, ...]]:
        return lambda *arrays: tuple(np.float32(by) * x for x in function(*arrays))

    return [
        rule._replace(out=times(rule.out, factor), back=times(rule.back, 1 / factor))
        for rule in rules
    ]


def identity(rows: int, columns: int) -> Callable[[], np.ndarray]:
    """Returns a function that makes a projection [rows, columns]: it copies its input and pads with
    zeros."""
    return lambda: np.eye(rows, columns, dtype=np.float32)
