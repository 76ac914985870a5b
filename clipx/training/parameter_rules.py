"""Per-parameter settings of the optimizer, by the parameter's path: rules, freezing, and the depth
of a layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.tree_util import KeyPath

from clipx.config.ranges import NonNegative, Number, Ordered, Share
from clipx.errors import ConfigError
from clipx.parallel.mesh import path_name
from clipx.types import PyTree

WHERE = "config.optimizer"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Settings of the parameters in whose path the regex `pattern` is found."""

    pattern: str
    learning_rate: NonNegative = 1.0  # factor of the schedule
    weight_decay: NonNegative = 1.0  # factor of the optimizer's weight decay
    # (least, most): the parameter stays within
    clamp: Annotated[tuple[Number, Number], Ordered()] | None = None
    horizon: Share = 1.0  # share of the run's steps after which the learning rate's decay ends
    optional: bool = False  # may be the first for no parameter, as in a config for many methods


# Weight decay is for matrices. Gains, biases, embeddings of a single token and the logit scalars
# have none, as in open_clip. The logit scale stays at most 100 (arXiv 2103.00020, section 2.5).
DEFAULT_RULES = (
    Rule(r"(^|/)logit_scale$", weight_decay=0.0, clamp=(0.0, 4.6051702)),
    Rule(r"(^|/)(bias|scale|logit_bias|class_embedding|probe)$", weight_decay=0.0),
    Rule(r".*"),
)


def claim(rules: tuple[Rule, ...], params: PyTree) -> PyTree:
    """The index of the first rule that matches each parameter, in the structure of `params`.

    Raises `ConfigError` for a parameter that no rule matches, and for a rule that is the first for
    no parameter and not `optional`. The default rules may have such a rule: an objective need not
    have a logit scale.
    """
    compiled = []
    for i, rule in enumerate(rules):
        try:
            compiled.append(re.compile(rule.pattern))
        except re.error as error:
            where = f"{WHERE}.rules[{i}].pattern"
            raise ConfigError(where, repr(rule.pattern), f"a regex: {error}") from None
    paths = []

    def first(path: KeyPath, _: Any) -> int:
        name = path_name(path)
        paths.append(name)
        for i, pattern in enumerate(compiled):
            if pattern.search(name):
                return i
        raise ConfigError(
            f"{WHERE}.rules",
            f"no rule for {name}",
            "a rule for every parameter",
            "add a last rule with the pattern '.*'",
        )

    claims = jax.tree_util.tree_map_with_path(first, params)
    if rules == DEFAULT_RULES:
        return claims
    unused = set(range(len(rules))) - set(jax.tree.leaves(claims))
    for i in sorted(i for i in unused if not rules[i].optional):
        matched = [p for p in paths if compiled[i].search(p)]
        found = (
            f"{rules[i].pattern!r} matches only parameters of earlier rules, such as {matched[0]}"
            if matched
            else f"{rules[i].pattern!r} matches no parameter"
        )
        raise ConfigError(
            f"{WHERE}.rules[{i}]",
            found,
            "a pattern that is the first to match some parameter",
            _some(paths),
        )
    return claims


def _some(paths: Sequence[str]) -> str:
    """A fix that shows some of the parameters' paths."""
    return "some of the parameters: " + ", ".join(paths[:: max(1, len(paths) // 6)])


def frozen(patterns: tuple[str, ...], params: PyTree) -> PyTree:
    """Whether each parameter is frozen, in the structure of `params`.

    Raises `ConfigError` for a pattern that is no regex or matches no parameter.
    """
    where, unused = f"{WHERE}.freeze", set(patterns)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(where, repr(pattern), f"a regex: {error}") from None
    paths = []

    def leaf(path: KeyPath, _: Any) -> bool:
        paths.append(path_name(path))
        matches = [p for p in patterns if re.search(p, paths[-1])]
        unused.difference_update(matches)
        return bool(matches)

    still = jax.tree_util.tree_map_with_path(leaf, params)
    if unused:
        raise ConfigError(
            where,
            f"{min(unused)!r} matches no parameter",
            "patterns that each match some parameter",
            _some(paths),
        )
    return still


def locked(
    patterns: tuple[str, ...], params: PyTree, without: Collection[str] = ()
) -> tuple[str, ...]:
    """The names of the towers of which all parameters are frozen, but for the entries `without`."""
    still = frozen(patterns, params)
    kept = {
        name: {k: v for k, v in still.get(name, {}).items() if k not in without}
        for name in ("image", "text")
    }
    towers = {name: jax.tree.leaves(tree) for name, tree in kept.items()}
    return tuple(name for name, leaves in towers.items() if leaves and all(leaves))


# a tower's entries before its blocks
_BELOW = re.compile(r"(_embedding|^ln_pre|^conv\d|^bn\d|^relative_bias)$")


def layer_factors(decay: float, params: PyTree) -> PyTree:
    """The factor of each parameter's learning rate, in the structure of `params`.

    It is `decay ** (blocks_above + 1)` in a block and before the blocks of a tower, and 1 after the
    blocks and outside of towers. For scanned blocks it is an array [layers, 1, ...].
    """

    def place(path: str) -> tuple[str, tuple[int, ...]] | None:
        """(tower, number of the block) of a parameter: (-1,) before the blocks; None after the
        blocks and outside of towers."""
        tower, _, rest = path.partition("/")
        if tower not in ("image", "text"):
            return None
        block = re.search(r"(?:^|/)(?:block|stage)_(\d+)(?:_(\d+))?/", rest)
        if block:
            return tower, tuple(int(n) for n in block.groups() if n)
        return (tower, (-1,)) if _BELOW.search(rest.partition("/")[0]) else None

    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = {path_name(path): x for path, x in leaves}
    blocks = sorted({at for at in map(place, paths) if at and at[1] != (-1,)})

    depth = {tower: sum(t == tower for t, _ in blocks) for tower in ("image", "text")}
    scanned = re.compile(r"^(image|text)/.*(^|/)blocks/")
    depth |= {m[1]: x.shape[0] for path, x in paths.items() if (m := scanned.search(path))}

    def factor(path: KeyPath, x: Any) -> float | np.ndarray:
        name = path_name(path)
        if m := scanned.search(name):
            layers = np.arange(depth[m[1]]).reshape(-1, *[1] * (len(x.shape) - 1))
            return (decay ** (depth[m[1]] - layers)).astype(np.float32)
        at = place(name)
        if at is None:
            return 1.0
        below = [block for block in blocks if block[0] == at[0] and block < at]
        return decay ** (depth[at[0]] + (at[1] == (-1,)) - len(below))

    return jax.tree_util.tree_map_with_path(factor, params)
