"""Verdicts on claims: paired by seed, with a 95 % interval."""

import numpy as np
import pytest
from scipy import stats

from clipx.config import files
from clipx.errors import ConfigError
from clipx.reporting import claims
from clipx.reporting.claims import Claim
from clipx.reporting.comparison import Result

EVALS = {"retrieval": {}, "modality_gap": {}}
CLAIM = Claim("b beats a", "a paper", "retrieval/mean_recall", "b", "a", "more pairs")


def judged(better, worse, claim=CLAIM):
    scores = {
        name: {seed: {claim.metric: x} for seed, x in values.items()}
        for name, values in (("b", better), ("a", worse))
    }
    return claims.judged(claim, scores, EVALS)


def test_a_difference_that_all_seeds_show():
    told = judged({0: 0.30, 1: 0.36, 2: 0.33}, {0: 0.20, 1: 0.25, 2: 0.24, 7: 0.9})
    differences = [0.10, 0.11, 0.09]
    low, high = stats.t.interval(0.95, 2, np.mean(differences), stats.sem(differences))
    assert told.verdict == "holds" and told.seeds == 3
    assert told.difference == f"+10.0 ({100 * low:+.1f} to {100 * high:+.1f})"
    assert told.better == "33.0 (30.0 to 36.0)" and told.worse == "23.0 (20.0 to 25.0)"
    other = judged({0: 0.20, 1: 0.25, 2: 0.24}, {0: 0.30, 1: 0.36, 2: 0.33})
    assert other.verdict == "does not hold at this scale"


@pytest.mark.parametrize(
    "better, worse, why",
    [
        ({0: 0.3, 1: 0.2, 2: 0.4}, {0: 0.2, 1: 0.3, 2: 0.3}, "the interval includes zero"),
        ({0: 0.3, 1: 0.3}, {0: 0.2, 1: 0.2}, "2 seeds"),
        ({0: 0.3, 5: 0.3}, {0: 0.2, 1: 0.2}, "one seed"),
        ({0: 0.2, 1: 0.2, 2: 0.2}, {0: 0.2, 1: 0.2, 2: 0.2}, "the interval includes zero"),
        ({}, {0: 0.2}, "no seed has both numbers"),
    ],
)
def test_what_cannot_be_told(better, worse, why):
    told = judged(better, worse)
    assert (told.verdict, told.why) == ("cannot be told", why)
    line = claims.table([told])[3]
    assert line.endswith(f"| cannot be told: {why}. Would tell: more pairs |")


def test_less_may_be_better():
    claim = Claim("", "", "retrieval/image_to_text_median_rank", "b", "a")
    ranks = {0: 10.0, 1: 11.0, 2: 12.0}, {0: 20.0, 1: 21.5, 2: 22.0}
    assert judged(*ranks, claim).verdict == "holds"
    assert judged(*ranks[::-1], claim).verdict == "does not hold at this scale"


def test_verdicts_of_runs():
    def run(seed, recall):
        return Result(seed, {"retrieval/mean_recall": recall}, EVALS, pairs=384)

    runs = {
        "b": [run(seed, 0.3 + seed / 100) for seed in range(3)],
        "a": [run(seed, 0.2 + seed / 90) for seed in range(3)],
    }
    (told,) = claims.verdicts([CLAIM], runs)
    assert told.verdict == "holds"
    assert claims.table([]) == [] and claims.table([told])[-1] == claims.RULE


def test_claims_are_checked():
    entry = {"claim": "", "source": "", "metric": "retrieval/mean_recall", "better": "b"}
    with pytest.raises(ConfigError, match=r"CLAIMS\[0\].worse"):
        claims.claims([entry], ("a", "b"))
    with pytest.raises(ConfigError, match="'c'"):
        claims.claims([{**entry, "worse": "c"}], ("a", "b"))


@pytest.mark.parametrize("name", [n for n in files.shipped() if n.startswith("compare_")])
def test_shipped_claims_name_metrics_of_their_config(name):
    found = claims.claims(files.declared(name, "CLAIMS"), files.variants(name))
    named = {variant for claim in found for variant in (claim.better, claim.worse)}
    evals = {variant: files.load(f"{name}:{variant}")["evals"] for variant in named}
    for claim in found:
        eval_ = claim.metric.partition("/")[0]
        assert eval_ in evals[claim.better] and eval_ in evals[claim.worse]
