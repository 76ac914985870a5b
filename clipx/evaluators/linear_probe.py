"""Linear probe: one linear layer over frozen features, trained on one set, tested on another."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from clipx.config import ConfigError
from clipx.evaluators.base import (
    Encode,
    Evaluator,
    Examples,
    labels_of,
    need_scikit_learn,
    rows_of,
)

_SGD_BATCH = 256
_SGD_RATE = 0.3


@dataclasses.dataclass(frozen=True)
class LinearProbe(Evaluator):
    """Accuracies between 0 and 1: `top1`, and `top5` with more than five classes. A class that
    scores the same as the right one counts as before it.

    Features are `backbone`, in evaluation mode, of centre crops, in training too.

    preset: "logistic" is scikit-learn's LogisticRegression, as CLIP's probe (Radford et al. 2021,
    appendix A.3): L-BFGS of at most 1000 iterations, its C the one of `costs` that is best on a
    held-out fifth of the training set (of equal ones the smallest, reported as `cost`), the last
    probe trained on all of it. CLIP gives it the features as they are; here each has mean 0 and
    variance 1 over the training set, so that one grid suits towers whose features differ in size.
    "imagenet" is VirTex's and CLIP-Lite's linear_clf.py: features as they are, weights from
    N(0, 0.01^2), cross-entropy, SGD with momentum 0.9 in batches of 256, no weight decay, a rate
    that falls from 0.3 by half a cosine over `epochs` passes (500,500 steps on ImageNet). Theirs
    crops and mirrors each training picture anew; here features are computed once.
    """

    examples: Examples
    train_examples: Examples
    preset: Literal["logistic", "imagenet"] = "logistic"
    costs: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of "logistic"
    epochs: int = 100  # of "imagenet"
    batch_size: int = 256  # of encoding

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"linear_probe.{name}", str(getattr(self, name)), "at least 1")
        if min(self.costs, default=0) <= 0:
            raise ConfigError(
                "linear_probe.costs", str(self.costs), "at least one number, all above 0"
            )
        if self.preset == "logistic":
            need_scikit_learn("linear_probe.preset")

    def __call__(self, encode: Encode) -> dict[str, float]:
        train, test = self._labels()
        seen, unseen = (
            rows_of(encode.image, examples.batches(self.batch_size), "backbone")
            for examples in (self.train_examples, self.examples)
        )
        classes = int(max(train.max(), test.max())) + 1
        found = {}
        if self.preset == "logistic":
            found["cost"] = choose_cost(seen, train, classes, self.costs)
            scores = logistic(seen, train, unseen, classes, found["cost"])
        else:
            scores = sgd(seen, train, unseen, classes, self.epochs)
        for k in (1, 5) if classes > 5 else (1,):
            found[f"top{k}"] = accuracy(scores, test, k)
        return found

    def _labels(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
        names = self.train_examples.classes, self.examples.classes
        if all(names) and tuple(names[0]) != tuple(names[1]):
            first = next((pair for pair in zip(*names) if pair[0] != pair[1]), ("", ""))
            raise ConfigError(
                "linear_probe.train_examples",
                f"{len(names[0])} classes, where the test set has {len(names[1])}"
                + (f", the first to differ {first[0]!r} and {first[1]!r}" if any(first) else ""),
                "the classes of the test set, in its order",
            )
        train = labels_of(self.train_examples, "linear_probe.train_examples")
        if len(np.unique(train)) < 2:
            raise ConfigError("linear_probe.train_examples", "one class", "at least two")
        return train, labels_of(self.examples, "linear_probe.examples")


def accuracy(scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], k: int) -> float:
    """The share of rows whose class is among the first k, after all that score the same."""
    own = scores[np.arange(len(labels)), labels][:, None]
    return float(np.mean(np.sum(~(scores < own), axis=1) <= k))


def choose_cost(
    features: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    costs: tuple[float, ...],
) -> float:
    """The C whose probe, trained on four fifths of the rows, is right most often on the fifth."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    held, rest = np.split(shuffled, [-(-len(labels) // 5)])
    if len(np.unique(labels[rest])) < 2:
        raise ConfigError(
            "linear_probe.train_examples",
            f"{len(labels)} examples",
            "enough for two classes in four fifths of them",
        )

    def right(cost: float) -> float:
        scores = logistic(features[rest], labels[rest], features[held], classes, cost)
        return accuracy(scores, labels[held], 1)

    return max(sorted(costs), key=right)  # of equal ones the first


def logistic(
    features: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    unseen: Float[np.ndarray, "m c"],
    classes: int,
    cost: float,
) -> Float[np.ndarray, "m k"]:
    """The scores of `unseen` rows; those of a class without a training row are -inf."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # float64: in float32 the line search gives up early
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=cost, max_iter=1000))
    with warnings.catch_warnings():  # the protocol's 1000 iterations end where they end
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(features.astype(np.float64), labels)
    found = probe.decision_function(unseen.astype(np.float64))
    scores = np.full((len(unseen), classes), -np.inf)
    scores[:, probe.classes_] = found if found.ndim == 2 else np.stack([-found, found], axis=1)
    return scores


def sgd(
    features: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    unseen: Float[np.ndarray, "m c"],
    classes: int,
    epochs: int,
) -> Float[np.ndarray, "m k"]:
    """The scores of `unseen` rows. Each epoch is a permutation of its own; rows from its start fill
    its last batch."""
    steps = -(-len(labels) // _SGD_BATCH)
    rate = optax.cosine_decay_schedule(_SGD_RATE, steps * epochs)  # cos^2 of a quarter turn
    optimizer = optax.sgd(rate, momentum=0.9)
    kernel = 0.01 * jax.random.normal(jax.random.key(0), (features.shape[1], classes))
    params = {"kernel": kernel, "bias": jnp.zeros(classes)}
    state, rng = optimizer.init(params), np.random.default_rng(0)
    data = jnp.asarray(features), jnp.asarray(labels, jnp.int32)
    for _ in range(epochs):
        rows = np.resize(rng.permutation(len(labels)), (steps, _SGD_BATCH))
        params, state = _epoch(optimizer, params, state, *data, rows)
    return np.asarray(unseen @ np.asarray(params["kernel"]) + np.asarray(params["bias"]))


@functools.partial(jax.jit, static_argnums=0)
def _epoch(optimizer, params, state, features, labels, rows):
    def loss(params, row):
        logits = features[row] @ params["kernel"] + params["bias"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels[row]).mean()

    def step(carry, row):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, row), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), rows)[0]
