"""An install hint is a command that works: with this Python, and as clipx was installed."""

import importlib.metadata
import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from support import ROOT

from clipx import errors
from clipx.errors import DataError, install_hint, optional


class Installed:
    """A distribution as importlib.metadata shows it."""

    def __init__(self, origin=None, wheel="Wheel-Version: 1.0"):
        self.files = {"WHEEL": wheel, "direct_url.json": origin and json.dumps(origin)}

    def read_text(self, name):
        return self.files[name]


def editable(folder: str) -> Installed:
    url = pathlib.PurePosixPath(folder).as_uri()
    return Installed({"url": url, "dir_info": {"editable": True}})


EGG_INFO = Installed(wheel=None)  # what `pip install -e` leaves in a checkout
WHEEL = Installed()
LOCAL_WHEEL = Installed({"url": "file:///tmp/clipx_jax-1-py3-none-any.whl", "archive_info": {}})
COPY = Installed({"url": "file:///home/me/clipx", "dir_info": {}})  # `pip install .`


@pytest.fixture
def pip(monkeypatch):
    """This Python has pip, which is the one on the PATH."""
    found = str(pathlib.Path(sys.executable).with_name("pip"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: found)


@pytest.fixture
def installed(monkeypatch, pip):
    """A function that says which distributions are installed."""

    def set_to(*found):
        monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: iter(found))

    return set_to


@pytest.mark.parametrize("found", [WHEEL, LOCAL_WHEEL, COPY], ids=["index", "wheel", "copy"])
def test_a_wheel_is_named_by_its_distribution(installed, found):
    installed(found)
    assert install_hint("cuda") == "pip install 'clipx-jax[cuda]'"
    assert install_hint("cuda", "remote") == "pip install 'clipx-jax[cuda,remote]'"
    assert install_hint("tpu", upgrade=True) == "pip install --upgrade 'clipx-jax[tpu]'"
    installed(EGG_INFO, found)  # a wheel that is asked in a checkout's folder
    assert install_hint("cuda") == "pip install 'clipx-jax[cuda]'"


def test_an_editable_checkout_is_named_by_its_folder(installed):
    installed(editable("/home/me/clipx"))
    assert install_hint("cuda") == "pip install -e '/home/me/clipx[cuda]'"
    assert install_hint("a", upgrade=True) == "pip install --upgrade -e '/home/me/clipx[a]'"
    installed(EGG_INFO, editable("/a b/it's $HOME/é"))
    assert shlex.split(install_hint("eval")) == [
        *("pip", "install", "-e", "/a b/it's $HOME/é[eval]"),
    ]


@pytest.mark.parametrize("found", [(), (EGG_INFO,)], ids=["nothing", "egg-info"])
def test_a_checkout_that_is_not_installed(installed, monkeypatch, tmp_path, found):
    installed(*found)
    assert install_hint("eval") == f"pip install -e {shlex.quote(f'{ROOT}[eval]')}"
    copied = tmp_path / "a b" / "clipx" / "errors.py"  # a folder on PYTHONPATH without setup.py
    monkeypatch.setattr(errors, "__file__", str(copied))
    assert install_hint("eval") == "pip install 'clipx-jax[eval]'"
    copied.parents[1].mkdir()
    (copied.parents[1] / "setup.py").touch()
    assert install_hint("eval") == f"pip install -e '{tmp_path}/a b[eval]'"


def test_the_command_installs_for_this_python(installed, monkeypatch):
    installed(WHEEL)
    for found in ("/usr/bin/pip", None):
        monkeypatch.setattr(shutil, "which", lambda name, found=found: found)
        expected = shlex.join([sys.executable, "-m", "pip", "install", "clipx-jax[cuda]"])
        assert install_hint("cuda") == expected
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # made by uv
    expected = shlex.join(["uv", "pip", "install", "--python", sys.executable, "clipx-jax[cuda]"])
    assert install_hint("cuda") == expected


def test_an_optional_package_that_is_missing(installed):
    installed(WHEEL)
    with pytest.raises(DataError) as caught, optional("parquet", DataError, "t.parquet: needs it"):
        import not_there  # noqa: F401
    assert str(caught.value) == (
        "t.parquet: needs it (No module named 'not_there'); pip install 'clipx-jax[parquet]'"
    )
    with pytest.raises(ValueError, match="its own"), optional("parquet", DataError, ""):
        raise ValueError("its own")


def test_extras_of_hints_exist():
    """Every extra that a hint in the code names is one that setup.py declares."""
    named = set()
    for file in (ROOT / "clipx").rglob("*.py"):
        for call in re.findall(r"\b(?:install_hint|optional)\(([^)]*)", file.read_text()):
            named.update(re.findall(r"""^["'](\w+)["']""", call))
    declared = re.findall(r'^\s+"(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert {"cuda", "eval", "interop", "parquet", "tfds", "tpu"} <= named <= set(declared)


def test_no_hint_names_the_other_project():
    """The name `clipx` on the index is not this project: installing it fetches a stranger's code.
    A folder of that name, or a place in a file, is fine."""
    extra, alone = r"(?<![/\w])clip[x]\[\w", r"pip install (-\S+ )*[\"']?clipx(?![-\w/.])"
    wrong = re.compile(f"{extra}|{alone}")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
    )
    names = listed.stdout.decode().split("\0")[:-1]
    if listed.returncode:  # a copy without its history
        names = [p.relative_to(ROOT) for top in ("clipx", "tests") for p in (ROOT / top).rglob("*")]
    for name in names:
        file = ROOT / name
        if file.suffix in (".xz", ".png") or not file.is_file():
            continue
        lines = file.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if wrong.search(line)] == [], name
