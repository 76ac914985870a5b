"""What a search draws, what a trial is, and what cannot be searched."""

import pytest
from support.runs import small

from clipx.config import files
from clipx.errors import ConfigError
from clipx.planning import trials
from clipx.planning.trials import Search
from clipx.training.checked import checked

RANGES = {
    "optimizer.learning_rate": ("log", 1e-4, 1e-2),
    "objective.logit_scale_init": ("uniform", 1.0, 3.0),
    "train.batch_size": ("choice", 16, 32),
}


def test_trials_cover_the_ranges_and_more_keep_the_earlier_ones():
    drawn = trials.draw(RANGES, 9)
    assert drawn[0] == {} and len(drawn) == 9
    assert trials.draw(RANGES, 4) == drawn[:4] and trials.draw(RANGES, 1) == [{}]
    rates = sorted(one["optimizer.learning_rate"] for one in drawn[1:])
    assert 1e-4 <= rates[0] < 1e-3 < rates[-1] <= 1e-2  # even in its logarithm
    assert sum(rate < 1e-3 for rate in rates) == 4
    scales = [one["objective.logit_scale_init"] for one in drawn[1:]]
    assert 1 <= min(scales) < 1.7 and 2.3 < max(scales) <= 3
    assert {one["train.batch_size"] for one in drawn[1:]} == {16, 32}


def test_a_trial_is_short_and_scored_on_held_out_rows():
    config = small(("evals.zero_shot.data.size", "32"))
    changes = {"optimizer.learning_rate": 0.01, "train.total_epochs": 2}
    trial = trials.trial(config, changes, Search({}, share=0.5))
    assert trial["optimizer"]["learning_rate"] == 0.01
    assert trial["train"]["total_steps"] is None and trial["train"]["total_epochs"] == 1.0
    assert [*trial["evals"]] == ["retrieval"]
    assert trial["evals"]["retrieval"]["data"] == {"source": "auto", "path": ""}
    assert config["train"]["total_steps"] == 12 and len(config["evals"]) == 2  # unchanged


def test_what_would_read_test_rows_is_refused():
    search = Search({})
    shown = small()
    shown["evals"]["retrieval"]["data"] = {"source": "auto", "path": ""}
    with pytest.raises(ConfigError, match="on which the search chooses"):
        trials.trial(shown, {}, search)
    shown = small(("data.source", "webdataset"), ("data.path", "all/*.tar"))
    shown["evals"]["retrieval"]["data"] = {"source": "webdataset", "path": "all/*.tar"}
    with pytest.raises(ConfigError, match="the training data, 'all"):
        trials.trial(shown, {}, search)
    with pytest.raises(ConfigError, match="an eval of pairs: retrieval"):
        trials.trial(small(), {}, Search({}, metric="zero_shot/top1"))


@pytest.mark.parametrize(
    "ranges, found",
    [
        ({"c": {"seed": ("choice", 1)}}, "SEARCH.ranges.c\n"),
        ({"a": "b"}, "'b'"),
        ({"a": {}}, "key of the config"),
        ({"a": {"seed": ("log", 0, 1)}}, r"\('log', 0, 1\)"),
        ({"a": {"seed": ("uniform", 2, 1)}}, "uniform"),
        ({"a": {"seed": ("choice",)}}, "choice"),
        ({"a": {"seed": 3}}, "seed"),
    ],
)
def test_ranges_are_checked(ranges, found):
    with pytest.raises(ConfigError, match=found):
        trials.search({"ranges": ranges}, ("a", "b"))


def test_a_variant_may_take_the_choice_of_another():
    declared = {"ranges": {"a": {"seed": ("choice", 1)}, "b": "a"}}
    search = trials.search(declared, ("a", "b", "c"))
    assert [search.source(name) for name in "abc"] == ["a", "a", None]
    evals = {"retrieval": {}}
    assert search.better(evals, 0.3, 0.2) and not search.better(evals, 0.2, 0.2)
    assert Search({}, metric="retrieval/x_median_rank").better(evals, 1.0, 2.0)
    assert not search.better(evals, float("nan"), 0.2)


@pytest.mark.parametrize("name", [n for n in files.shipped() if files.declared(n, "SEARCH")])
def test_shipped_ranges_fit_their_configs(name):
    """Every drawn value binds, together with the others of its trial."""
    search = trials.search(files.declared(name, "SEARCH"), files.variants(name))
    for variant in [v for v, ranges in search.ranges.items() if isinstance(ranges, dict)][::3]:
        config = files.load(f"{name}:{variant}")
        for changes in trials.draw(search.ranges[variant], 4):
            checked(trials.trial(config, changes, search))
