"""A config is named by its file, or, if clipx ships it, by a name that works in any folder."""

import importlib
import os
import subprocess
import sys

import pytest
from support import ROOT, commands

from clipx import configs
from clipx.config import files
from clipx.config.files import find, load, shipped, variants
from clipx.errors import ConfigError

NAMES = shipped()


def fault(call, *args) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        call(*args)
    return error.value


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder that has nothing of clipx."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_those_that_are_shipped():
    listed = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))
    assert [name for name in listed if name not in ("common", "__init__")] == NAMES
    assert configs.FOLDER == ROOT / "configs"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_its_file(name, monkeypatch):
    """The same values, and so the same config.json, however a config is named."""
    variant = variants(name)[-1]
    assert variants(name) == variants(ROOT / "configs" / f"{name}.py")
    by_name = load(f"{name}:{variant}")
    assert by_name == load(f"{ROOT}/configs/{name}.py:{variant}")
    monkeypatch.chdir(ROOT)
    assert by_name == load(f"configs/{name}.py:{variant}")


def test_names_and_paths(elsewhere):
    (elsewhere / "clip.py").write_text("def get_config(variant=''): return {'mine': 1}")
    assert load("clip.py") == load("./clip.py") == {"mine": 1}
    assert "mine" not in load("clip") and find("clip") == ROOT / "configs" / "clip.py"


@pytest.mark.parametrize("name, near", [("clips", "clip"), ("quikstart", "quickstart")])
def test_an_unknown_name(name, near):
    error = fault(load, f"{name}:small")
    assert error.where == "--config" and error.found == f"no config named {name!r}"
    assert error.fix == f"did you mean {near!r}?"
    assert error.expected.endswith("one of " + ", ".join(NAMES))


def test_a_file_without_its_ending(elsewhere):
    (elsewhere / "my_own_run.py").touch()
    assert fault(find, "my_own_run").fix == "did you mean 'my_own_run.py'?"


def test_a_checkouts_path_in_another_folder():
    error = fault(find, "configs/clip.py")
    assert error.found == "no file 'configs/clip.py'"
    assert error.fix == "did you mean 'clip', which comes with clipx?"


def test_what_is_shared_is_no_config():
    assert "common" not in NAMES
    assert fault(load, "common").found.startswith("no config named")


def test_an_unknown_variant():
    error = fault(load, "clip:smal")
    assert error.found == "variant 'smal'" and error.fix == "did you mean 'small'?"
    assert error.file == str(ROOT / "configs" / "clip.py")


def test_a_config_of_ones_own_builds_on_shipped_ones(elsewhere):
    file = elsewhere / "mine.py"
    file.write_text(
        "from clipx.configs import common, declip\n"
        "def get_config(variant=''):\n"
        "    config = common.small({'name': 'clip'}, common.MEDIUM)\n"
        "    config.image.depth += declip.RN50['name'] == 'resnet'\n"
        "    return config\n"
    )
    assert load("mine.py")["image"]["depth"] == 1 + load("clip:medium")["image"]["depth"]


def test_a_config_leaves_shared_values_alone(elsewhere):
    """Of the next config that is loaded, however it changed them for its own."""
    before, modules = load("clip:small"), set(sys.modules)
    (elsewhere / "mine.py").write_text(
        "from clipx.configs import common\n"
        "import clipx.configs.declip\n"
        "common.SMALL['image']['depth'] += 1\n"
        "def get_config(variant=''): return common.small({'name': 'clip'})\n"
    )
    for _ in range(2):
        assert load("mine.py")["image"]["depth"] == before["image"]["depth"] + 1
    assert load("clip:small") == before
    assert set(sys.modules) == modules and hasattr(configs, "common") == (
        "clipx.configs.common" in modules
    )


def test_a_config_leaves_what_others_imported_alone(elsewhere):
    common = importlib.import_module("clipx.configs.common")
    depth = common.SMALL["image"]["depth"]
    (elsewhere / "mine.py").write_text(
        "from clipx.configs import common\n"
        "common.SMALL['image']['depth'] += 1\n"
        "def get_config(variant=''): return common.small({'name': 'clip'})\n"
    )
    try:
        for _ in range(2):
            assert load("mine.py")["image"]["depth"] == depth + 1
        assert configs.common is common is sys.modules["clipx.configs.common"]
        assert common.SMALL["image"]["depth"] == depth
    finally:
        del sys.modules["clipx.configs.common"], configs.common


@pytest.mark.parametrize("command", ["train", "compare", "dataset"])
def test_commands_take_names(elsewhere, command):
    """And refuse those that are none, in one block."""
    verb = ["verify"] if command == "dataset" else []
    workdir = ["--workdir=run"] if command != "dataset" else []
    done = commands.run(command, *verb, "--config=compare_delcip", *workdir, folder=elsewhere)
    assert done.returncode == 2
    assert "  found:    no config named 'compare_delcip'\n" in done.stderr
    assert "  fix:      did you mean 'compare_declip'?" in done.stderr
    assert "Traceback" not in done.stderr and not (elsewhere / "run").exists()


def test_imports_outside_a_config():
    code = "import clipx.configs.common as c; from clipx.configs import declip; print(c.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(ROOT / "configs" / "common.py"), done.stderr
    assert files.find("clip").is_file()
