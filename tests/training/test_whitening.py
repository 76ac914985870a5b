"""`head_init="cca"`: towers whose projections start from canonical correlations."""

import re

import jax
import numpy as np
import pytest
from support.runs import NO_EVALS, small

from clipx.data import pictures
from clipx.errors import ConfigError
from clipx.models.layers import unit
from clipx.ops import cca
from clipx.parallel.mesh import path_name
from clipx.training import whitening
from clipx.training.run import assemble
from clipx.training.session import open_session

CCA = [(f"{tower}.{key}", value) for tower in ("image", "text") for key, value in (
    ("head_init", "cca"), ("dtype", "float32"), ("embed_dim", "8"),
)]  # fmt: skip
MORE = [*NO_EVALS, *CCA, ("data.size", "160"), ("train.cca_rows", "150")]


def test_a_run_starts_from_the_analysis(tmp_path, capsys):
    """The cosines of its first state, on any mesh, are those of the canonical coordinates times the
    roots of the correlations; of the tower without a bias, of features without the mean's
    direction."""
    more = [("image.projection_bias", "true"), ("text.projection_bias", "false")]
    more += [("optimizer.lookahead", "{}"), ("mesh.fsdp", "2"), ("image.head", "mlp")]
    session = open_session(small(*MORE, *more), str(tmp_path))
    run, source = session.run, session.data.source
    state = whitening.start(run, session.data, session._start()[0], print)
    said = re.search(r"correlations of 150 rows: 8 dimensions, (\S+),", capsys.readouterr().out)
    encode = run.encode(state)
    rows = [source[i] for i in np.linspace(0, 159, 150).astype(int)]
    captions = [text for row in rows for text in row.texts]
    first = np.cumsum([0, *(len(row.texts) for row in rows)])[:-1]
    fields = ("backbone", "unit")
    image = encode.image(np.stack([pictures.evaluation(row, 16) for row in rows]), fields)
    text = encode.text(captions, fields)
    means = [text.backbone[i : i + len(row.texts)].mean(0) for i, row in zip(first, rows)]
    found = cca.fit(image.backbone, np.stack(means), dim=8)
    assert said and said[1] == f"{found.correlations[0]:.2f}"
    x, y = image.backbone.astype(np.float64), text.backbone.astype(np.float64)
    x, mean = x - found.x_mean, found.y_mean
    y = y - np.outer(y @ mean, mean) / (mean @ mean)
    weight = np.sqrt(found.correlations)
    expected = unit(x @ found.x_kernel * weight) @ unit(y @ found.y_kernel * weight).T
    np.testing.assert_allclose(image.unit @ text.unit.T, expected, atol=2e-3)
    # the optimizer's slow weights are copies of these projections
    slow = [
        x for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "slow" in path_name(path) and path_name(path).endswith("image/projection/kernel")
    ]  # fmt: skip
    assert len(slow) == 1
    np.testing.assert_array_equal(slow[0], state.params["image"]["projection"]["kernel"])


def test_captions_of_a_row_are_averaged():
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.testing.assert_array_equal(
        whitening._means(rows, np.array([1, 0, 3, 2])), [[0, 1], [0, 0], [4, 5], [9, 10]]
    )


@pytest.mark.parametrize(
    "change, where, fix",
    [
        (("text.head_init", "random"), "text.head_init", "config.text.head_init=cca"),
        (("text.width", "4"), "image.embed_dim", "config.image.embed_dim=4 and"),
        (("text.embed_dim", "4"), "text.embed_dim", "config.text.embed_dim=8"),
    ],
)
def test_refused(change, where, fix):
    with pytest.raises(ConfigError) as error:
        assemble(small(*MORE, change))
    assert error.value.where == f"config.{where}" and error.value.fix.startswith(fix)
