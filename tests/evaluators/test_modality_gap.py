from __future__ import annotations

import numpy as np
import pytest
from support import load_oracle
from support.pixels import Encode, Examples, unit

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.evaluators.modality_gap import ModalityGap

ORACLE = load_oracle("protoclip")
NAMES = {
    "modality_gap": "gap",
    "image_feature_std": "image_std",
    "text_feature_std": "text_std",
    "image_avg_self_similarity": "image_self_similarity",
    "text_avg_self_similarity": "text_self_similarity",
}


@pytest.mark.parametrize("chunk, batch_size", [(256, 256), (7, 64)])
def test_oracle(chunk, batch_size):
    """The features of the oracle's k-means: the first half as pictures, the second as texts."""
    i, j = np.meshgrid(np.arange(300), np.arange(8), indexing="ij")
    rows = unit(np.sin(0.37 * i**2 + 1.7 * j + 0.11 * i * j)).astype(np.float32)
    encode = Encode("unit", rows[:150], texts=rows[150:])
    found = ModalityGap(Examples([None] * 150), batch_size, chunk)(encode)
    assert {name: found[mine] for name, mine in NAMES.items()} == {
        name: pytest.approx(value, rel=1e-5) for name, value in ORACLE["analyze"]["metrics"].items()
    }
    assert set(found) == set(NAMES.values())


def test_a_model_that_diverged_has_no_gap():
    nan = np.full((3, 2), np.nan)
    found = ModalityGap(Examples([None] * 3))(Encode("unit", nan, texts=nan))
    assert set(found.values()) == {0}


@pytest.mark.parametrize(
    "examples, said",
    [
        (Examples([None] * 3, without_caption=1), "row 1 without a caption"),
        (Examples([None]), "1 examples"),
    ],
)
def test_errors_of_the_set(examples, said):
    with pytest.raises(ConfigError) as error:
        ModalityGap(examples)(Encode("unit", np.eye(3), texts=np.eye(3)))
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["batch_size", "chunk"])
def test_a_count_below_one_is_a_config_error(name):
    with pytest.raises(ConfigError, match=f"modality_gap.{name}"):
        bind(ModalityGap, {name: 0}, where="modality_gap", examples=None)
