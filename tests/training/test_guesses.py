"""Settings that were guessed are said, saved as if they had been set, and held to."""

import json

import pytest
from support.runs import small
from support.shards import pairs, shard

from clipx.data.base import Account, Guess, Skipped, fingerprint
from clipx.data.sources.mixture import Mixture
from clipx.data.sources.webdataset import WebDataset
from clipx.errors import ConfigError
from clipx.reporting.comparison import finished
from clipx.training import guesses, session
from clipx.training.checkpoint import Checkpoints
from clipx.training.run import assemble
from clipx.training.session import open_session
from clipx.training.workdir import refuse_other_config

COMPLETE = {
    "seed": 0,
    "data": {"source": "table", "image": "", "captions": [], "label": "kind"},
    "evals": {
        "a.b": {"limit": None, "data": {"source": "table", "image": ""}},
        "mixed": {"data": {"source": "mixture", "parts": {"x": {"source": "table"}}}},
        "voc": {"data": None},
    },
}
SAVED = {
    path: Guess(path, value, "why")
    for path, value in {
        "data.image": "path",
        "data.captions": ["title"],
        "data.label": "class",
        "evals.a.b.data.image": "file",
        "evals.mixed.data.parts.x.image": "picture",
        "evals.gone.data.image": "lost",
        "evals.voc.data.image": "none",
    }.items()
}


def test_saved_guesses_fill_what_is_open_and_nothing_else():
    filled = guesses.fill(COMPLETE, SAVED)
    expected = json.loads(json.dumps(COMPLETE))
    expected["data"] |= {"image": "path", "captions": ["title"]}
    expected["evals"]["a.b"]["data"]["image"] = "file"
    expected["evals"]["mixed"]["data"]["parts"]["x"]["image"] = "picture"
    assert filled == expected
    assert COMPLETE["data"]["image"] == ""


def test_another_guess_is_refused_with_both():
    given = {"data.image": SAVED["data.image"]}
    guesses.refuse_other(COMPLETE, given, given)
    explicit = {**COMPLETE, "data": {"source": "table", "image": "path"}}
    guesses.refuse_other(explicit, given, {})  # nothing is left to guess
    other = {"data.image": Guess("image", "photo", "the first of two")}
    for now, found in ((other, "'photo', guessed now: the first of two"), ({}, "no guess now")):
        with pytest.raises(ConfigError) as error:
            guesses.refuse_other(COMPLETE, given, now)
        assert error.value.where == "config.data.image" and error.value.found == found
        assert "'path'" in error.value.expected and "to 'path'" in error.value.fix


def test_an_eval_that_has_changed_may_guess_again():
    before = guesses.fill(COMPLETE, SAVED)
    changed = json.loads(json.dumps(COMPLETE))
    changed["evals"]["a.b"]["limit"] = 5
    kept = guesses.still(SAVED, changed, before)
    assert "evals.a.b.data.image" not in kept and "evals.gone.data.image" not in kept
    assert {"data.image", "evals.mixed.data.parts.x.image"} <= set(kept)


def test_guesses_and_accounts_of_parts_carry_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(WebDataset, "guesses", lambda self: (Guess("classes", ["a"], "one name"),))
    account = Account("members", 5, 3, (Skipped("links", 2, ("x", "y")),))
    monkeypatch.setattr(WebDataset, "account", lambda self: account)
    path = str(shard(tmp_path / "a.tar", 2))
    parts = {name: {"source": "webdataset", "path": path} for name in ("one", "two")}
    assert guesses.lines("data", Mixture({**parts, "drawn": {"source": "shapes"}})) == [
        "data.parts.one.classes = ['a']: one name",
        "data.parts.two.classes = ['a']: one name",
        "data: 4 of 10 members left out:",
        "  2: part one: links (x, y)",
        "  2: part two: links (x, y)",
    ]
    assert guesses.lines("data", Mixture({"drawn": {"source": "shapes"}})) == []


@pytest.fixture
def workdir(tmp_path):
    """A workdir of a run that guessed `data.classes`, and its config."""
    config = small()
    config["data"] = {"source": "webdataset", "path": "a.tar"}
    guessed = {"data.classes": Guess("classes", ["a"], "the only name")}
    complete = guesses.put(assemble(config).complete, guessed)
    (tmp_path / "config.json").write_text(json.dumps(complete))
    (tmp_path / guesses.FILE).write_text(json.dumps(guesses.dump(guessed)))
    (tmp_path / "report.html").touch()
    return tmp_path, config


def test_a_run_of_guessed_settings_is_no_other_run(workdir):
    folder, config = workdir
    assert guesses.read(folder)["data.classes"].value == ["a"]
    assert guesses.read(folder / "none") == {}
    assert finished(folder, config)
    config["data"]["classes"] = ("a",)
    assert finished(folder, config)
    assert assemble(json.loads((folder / "config.json").read_text())).source.values["classes"] == (
        "a",
    )
    config["data"]["classes"] = ("b",)
    with pytest.raises(ConfigError, match=r"classes: \['a'\] -> \['b'\]"):
        finished(folder, config)
    config["data"]["classes"] = ()
    (folder / guesses.FILE).unlink()  # as if the value had been set
    with pytest.raises(ConfigError, match=r"classes: \['a'\] -> \[\]"):
        refuse_other_config(folder, assemble(config).complete)


def test_a_run_says_saves_and_keeps_its_guesses(tmp_path, monkeypatch, capsys):
    guessed = [Guess("classes", ["a"], "the only name")]
    monkeypatch.setattr(WebDataset, "guesses", lambda self: () if self.classes else tuple(guessed))
    config = pairs(shard(tmp_path / "a.tar"))
    open_session(config, str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "data.classes = ['a']: the only name" in said
    assert "evals.retrieval.data.classes = ['a']: the only name" in said
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["classes"] == saved["evals"]["retrieval"]["data"]["classes"] == ["a"]
    monkeypatch.setattr(Checkpoints, "newest_proven", lambda self: 1)  # as if it had been trained
    tokenizer = (tmp_path / "run" / "tokenizer.json").read_text()
    run = {"rows": 48, "fingerprint": fingerprint(WebDataset(config["data"]["path"]))}
    run |= {"config": saved, "tokenizer": json.loads(tokenizer)}
    monkeypatch.setattr(Checkpoints, "restore_run", lambda self, step: run)
    for classes in ((), ("a",)):
        config["data"]["classes"] = classes
        session = open_session(config, str(tmp_path / "run"))
        assert session.run.complete == saved
    assert (tmp_path / "run" / "tokenizer.json").read_text() == tokenizer
    config["data"]["classes"] = ()
    guessed[0] = Guess("classes", ["b"], "another name")
    with pytest.raises(ConfigError, match=r"found: +\['b'\], guessed now"):
        open_session(config, str(tmp_path / "run"))


def test_a_source_that_is_found_is_saved_as_if_it_had_been_set(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    config = pairs(shard(tmp_path / "set" / "train-0.tar"))
    shard(tmp_path / "set" / "test-0.tar")
    for section in (config["data"], config["evals"]["retrieval"]["data"]):
        section |= {"source": "auto", "path": str(tmp_path / "set")}
    session = open_session(config, str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "data.source=auto: 1 tar shard in" in said and "data.source=webdataset" in said
    text = (tmp_path / "run" / "config.json").read_text()
    saved = json.loads(text)
    assert saved == session.run.complete and '"source": "auto"' not in text
    assert saved["data"]["path"] == str(tmp_path / "set" / "train-0.tar")
    assert saved["evals"]["retrieval"]["data"]["path"] == str(tmp_path / "set" / "test-0.tar")
    assert assemble(saved).complete == saved
    assert open_session(config, str(tmp_path / "run")).run.complete == saved


def test_a_wrong_config_is_refused_before_anybody_looks_at_its_paths(tmp_path, monkeypatch):
    def look(*_):
        raise AssertionError("looked")

    config = small()
    config["data"] = {"source": "auto", "path": str(tmp_path)}
    config["optimizer"]["learning_rat"] = 1.0
    monkeypatch.setattr(session, "resolve", look)
    with pytest.raises(ConfigError, match="learning_rat"):
        open_session(config, str(tmp_path / "run"))
