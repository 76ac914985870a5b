"""Linear probe: one linear layer over frozen features, trained on one set, tested on another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from clipx.config.ranges import Count, Positive
from clipx.errors import ConfigError
from clipx.evaluators.base import (
    ACCURACIES,
    Encode,
    Evaluator,
    Examples,
    accuracies,
    chance_of,
    rows_of,
    split_labels,
)
from clipx.types import Metric, PyTree

CHUNK = 16384  # rows whose logits of all classes are in memory at once
_ITERATIONS = 1000  # upper limit, as in CLIP
_GRADIENT = 1e-6  # largest gradient of the mean loss that ends the fit; scikit-learn: 1e-4
_PATIENCE = 20  # iterations without a smaller gradient: the limit of float32


class Sgd(NamedTuple):
    """SGD with momentum 0.9 on the mean cross-entropy; half a cosine from `rate` down to 0."""

    features: Literal["backbone", "raw"]
    rate: float
    batch: int
    epochs: int
    decay: float  # weight decay of weights and bias, added to the gradient
    by_epoch: bool  # the learning rate changes per epoch, not per step
    shuffled: bool  # False: the same row order in every epoch
    filled: bool  # fill the last batch with the epoch's first rows; False: it is smaller
    keeps_best: bool  # also report the best epoch, chosen on the test set


_SGD = {
    "clip_lite": Sgd("backbone", 0.3, 256, 100, 0.0, False, True, True, False),
    "slip": Sgd("backbone", 0.05, 128, 90, 0.0, True, True, False, True),
    "protoclip": Sgd("raw", 0.1, 1024, 100, 1e-6, True, False, False, True),
}
_PROTOCLIP_COST = 0.316


@dataclasses.dataclass(frozen=True)
class LinearProbe(Evaluator):
    """Accuracies between 0 and 1: `top1`, `top5` (with more than five classes), `mean_per_class`. A
    class that ties with the right one is ranked before it.

    Features are computed once, from centre crops in evaluation mode, for training too. Presets
    marked with * stand for code that crops and mirrors each training picture anew.

    preset: the protocol to follow.
      "logistic": CLIP's probe (Radford et al. 2021, appendix A.3) on `backbone` features, by L-BFGS
      of at most 1000 iterations. C is the best of `costs` on a held-out fifth of the training set,
      the smallest of equally good ones; it is reported as `cost`. The final probe trains on the
      complete training set. CLIP uses the features as they are. Here each has mean 0 and variance 1
      over the training set, so that one grid of `costs` suits towers of different feature scales.
      "protoclip_logistic": ProtoCLIP's linear_eval.py with scikit-learn, on `raw` features (after
      the projection, not normalised), C = 0.316.
    The other presets train weights from N(0, 0.01^2) by SGD and report the last epoch as `top1`:
      "clip_lite"*: linear_clf.py of VirTex and CLIP-Lite on `backbone`, learning rate 0.3, batches
      of 256, 100 epochs (500,500 steps on ImageNet).
      "slip"*: SLIP's main_linear.py on `backbone`, learning rate 0.05, batches of 128, 90 epochs
      (DeCLIP's own code has no probe).
      "protoclip": linear_eval.py as published, on `raw` features, learning rate 0.1, batches of
      1024, weight decay 1e-6, 100 epochs, rows never shuffled.
    The code of SLIP and ProtoCLIP reports the epoch that is best on the test set; `best_on_test` is
    that number, to compare with theirs. SLIP looks only at every tenth epoch.
    All presets but "logistic" use the features as they are.

    epochs: of the presets with SGD; None: the preset's own.

    Both logistic presets minimise scikit-learn's objective, on the device and in float32.
    """

    metrics = {
        **{
            name: dataclasses.replace(metric, benchmark=f"lp_{metric.benchmark}")
            for name, metric in ACCURACIES.items()
        },
        "cost": Metric(),
        "best_on_test": Metric("more", "percent"),
    }
    task = "linear_probe"
    needs = "labels"

    examples: Examples
    train_examples: Examples
    preset: Literal["logistic", "protoclip_logistic", "clip_lite", "slip", "protoclip"] = "logistic"
    costs: tuple[Positive, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of "logistic"
    epochs: Count | None = None
    batch_size: Count = 256  # of encoding

    def __post_init__(self):
        if not self.costs:
            raise ConfigError("linear_probe.costs", "none", "at least one number")

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "training pictures": len(self.train_examples)}

    def chance(self) -> dict[str, float]:
        return chance_of(len(self.examples.classes))

    def __call__(self, encode: Encode) -> dict[str, float]:
        train, test = split_labels(self.train_examples, self.examples, "linear_probe")
        recipe = _SGD.get(self.preset)
        field = recipe.features if recipe else "backbone" if self.preset == "logistic" else "raw"
        train_features, test_features = (
            rows_of(encode.image, examples.batches(self.batch_size), field)
            for examples in (self.train_examples, self.examples)
        )
        classes = int(max(train.max(), test.max())) + 1
        if self.preset == "logistic":
            cost = choose_cost(train_features, train, classes, self.costs)
            scores = logistic(train_features, train, test_features, classes, cost)
            return accuracies(scores, test) | {"cost": cost}
        if recipe is None:
            features = train_features, train, test_features
            scores = logistic(*features, classes, _PROTOCLIP_COST, standardise=False)
            return accuracies(scores, test)
        if self.epochs:
            recipe = recipe._replace(epochs=self.epochs)
        metrics, best = {}, 0.0
        for epoch, probe in enumerate(sgd(train_features, train, classes, recipe), 1):
            if recipe.keeps_best or epoch == recipe.epochs:
                metrics = accuracies(_scores(probe, test_features), test)
                best = max(best, metrics["top1"])
        return metrics | ({"best_on_test": best} if recipe.keeps_best else {})


class Probe(NamedTuple):
    kernel: Float[Array, "c k"]
    bias: Float[Array, " k"]


def _scores(probe: Probe, features: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n k"]:
    return features @ np.asarray(probe.kernel) + np.asarray(probe.bias)


def choose_cost(
    features: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    costs: tuple[Positive, ...],
) -> float:
    """The C whose probe, trained on four fifths of the rows, has the best top-1 accuracy on the
    held-out fifth. Raises `ConfigError` if the four fifths have fewer than two classes."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    held, rest = np.split(shuffled, [-(-len(labels) // 5)])
    if len(np.unique(labels[rest])) < 2:
        raise ConfigError(
            "linear_probe.train_examples",
            f"{len(labels)} examples",
            "enough examples for two classes in four fifths of them",
        )

    def accuracy(cost: float) -> float:
        scores = logistic(features[rest], labels[rest], features[held], classes, cost)
        return accuracies(scores, labels[held])["top1"]

    return max(sorted(costs), key=accuracy)  # the smallest of equally good ones


def logistic(
    features: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    unseen: Float[np.ndarray, "m c"],
    classes: int,
    cost: float,
    *,
    standardise: bool = True,
) -> Float[np.ndarray, "m k"]:
    """The scores of the `unseen` rows, -inf for classes without a training row.

    The objective is that of scikit-learn's LogisticRegression(C=cost, max_iter=1000): the mean
    cross-entropy of a softmax over the classes with training rows, plus 1 / (2 C n) times the
    squared weights for n rows; the bias is not penalised. With two classes scikit-learn has one
    weight vector, which is the difference of the two here; doubling the penalty makes both equal.
    """
    if standardise:
        mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
        same = std <= np.finfo(np.float32).eps * np.abs(mean)  # constant columns are not scaled
        features, unseen = ((x - mean) / np.where(same, 1, std) for x in (features, unseen))
    known, targets = np.unique(labels, return_inverse=True)
    strength = (2 if len(known) == 2 else 1) / (cost * len(labels))
    # tiles of rows with one shape; rows that pad the last tile have weight 0
    tiles = -(-len(labels) // CHUNK)
    rows = -(-len(labels) // tiles)
    padding = tiles * rows - len(labels)
    x, y, w = (
        jnp.asarray(np.pad(a, [(0, padding), *[(0, 0)] * (a.ndim - 1)]).reshape(tiles, rows, -1))
        for a in (features.astype(np.float32), targets.astype(np.int32), np.ones(len(labels), "f"))
    )
    probe = _lbfgs(x, y[..., 0], w[..., 0] / len(labels), strength, len(known))
    scores = np.full((len(unseen), classes), -np.inf, np.float32)
    scores[:, known] = _scores(probe, unseen.astype(np.float32))
    return scores


@functools.partial(jax.jit, static_argnames="classes")
def _lbfgs(
    x: Float[Array, "t r c"],
    y: Int[Array, "t r"],
    w: Float[Array, "t r"],
    strength: float,
    classes: int,
) -> Probe:
    optimizer = optax.lbfgs()

    def loss(probe: Probe) -> Float[Array, ""]:
        @jax.checkpoint  # holds the logits of one tile at a time, in the gradient too
        def tile(total: Float[Array, ""], rows: tuple[Array, Array, Array]):
            x, y, w = rows
            logits = jnp.matmul(x, probe.kernel, precision="highest") + probe.bias
            per_row = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
            return total + jnp.sum(w * per_row), None

        total = jax.lax.scan(tile, jnp.zeros(()), (x, y, w))[0]
        return total + strength / 2 * jnp.sum(jnp.square(probe.kernel))

    def step(carry: tuple) -> tuple:
        probe, state, count, least, since = carry
        value, grad = optax.value_and_grad_from_state(loss)(probe, state=state)
        updates, state = optimizer.update(grad, state, probe, value=value, grad=grad, value_fn=loss)
        slope = jax.tree.leaves(optax.tree.get(state, "grad"))
        largest = jnp.max(jnp.array([jnp.max(jnp.abs(x)) for x in slope]))
        since = jnp.where(largest < least, 0, since + 1)
        probe = optax.apply_updates(probe, updates)
        return probe, state, count + 1, jnp.minimum(largest, least), since

    def going(carry: tuple) -> Bool[Array, ""]:
        *_, count, least, since = carry
        return (count < _ITERATIONS) & (least > _GRADIENT) & (since < _PATIENCE)

    probe = Probe(jnp.zeros((x.shape[-1], classes)), jnp.zeros(classes))
    start = (probe, optimizer.init(probe), 0, jnp.inf, 0)
    return jax.lax.while_loop(going, step, start)[0]


def sgd(
    features: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    recipe: Sgd,
) -> Iterator[Probe]:
    """Trains a probe by `recipe` and yields it after each epoch."""
    steps = -(-len(labels) // recipe.batch)
    period = steps if recipe.by_epoch else 1  # steps at one learning rate
    cosine = optax.cosine_decay_schedule(recipe.rate, steps * recipe.epochs // period)
    optimizer = optax.chain(
        optax.add_decayed_weights(recipe.decay),
        optax.sgd(
            lambda step: cosine(step // period),  # pyright: ignore[reportOperatorIssue]
            momentum=0.9,
        ),
    )
    kernel = 0.01 * jax.random.normal(jax.random.key(0), (features.shape[1], classes))
    probe = Probe(kernel, jnp.zeros(classes))
    state, rng = optimizer.init(probe), np.random.default_rng(0)
    data = jnp.asarray(features), jnp.asarray(labels, jnp.int32)
    order = np.arange(len(labels))
    counted = np.arange(steps * recipe.batch).reshape(steps, -1) < len(labels)
    if recipe.filled:
        counted[:] = True
    for _ in range(recipe.epochs):
        if recipe.shuffled:
            order = rng.permutation(len(labels))
        rows = np.resize(order, (steps, recipe.batch))
        probe, state = _epoch(optimizer, probe, state, *data, rows, counted)
        yield probe


@functools.partial(jax.jit, static_argnums=0)
def _epoch(
    optimizer: optax.GradientTransformation,
    probe: Probe,
    state: PyTree,
    features: Float[Array, "n c"],
    labels: Int[Array, " n"],
    rows: Int[Array, "s b"],
    counted: Bool[Array, "s b"],
) -> tuple[Probe, PyTree]:
    """The probe and the optimizer state after s steps on these rows. Only `counted` rows enter the
    mean loss."""

    def loss(probe: Probe, row: Int[Array, " b"], counted: Bool[Array, " b"]) -> Float[Array, ""]:
        logits = features[row] @ probe.kernel + probe.bias
        per_row = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels[row])
        return jnp.mean(per_row, where=counted)

    def step(carry: tuple[Probe, PyTree], batch: tuple[Array, Array]) -> tuple[Any, None]:
        probe, state = carry
        updates, state = optimizer.update(jax.grad(loss)(probe, *batch), state, probe)
        return (optax.apply_updates(probe, updates), state), None

    return jax.lax.scan(step, (probe, state), (rows, counted))[0]
