"""What the files around the code say of it is so."""

import re

from support import ROOT

import clipx


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_there_is_one_test_command():
    """README.md has it, for a new environment; other files have the same call of pytest."""
    whole = re.search(r"<!-- the test command -->\n```sh\n(.+)\n```\n", read("README.md"))[1]
    _, _, arguments = whole.partition(".venv/bin/python -m pytest")
    command = f"python -m pytest{arguments}"
    assert re.fullmatch(r"python -m pytest( -\S+ \w+)+", command)
    assert f"\n{command} " in read("CONTRIBUTING.md")
    assert f"run: {command} --splits 4 " in read(".github/workflows/check.yml")


def test_the_citation_is_of_this_version():
    assert f"\nversion: {clipx.__version__}\n" in read("CITATION.cff")


def test_extras_that_are_named_exist():
    declared = re.findall(r'^\s+"(\w+)": (?:\[|TESTED)', read("setup.py"), re.MULTILINE)
    assert {"cuda", "dev", "docs", "interop", "test"} <= set(declared)
    named = set()
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run", "launch/tpu_vm.sh"):
        for extras in re.findall(r"'\.\[([\w,]+)\]'", read(name)):
            named.update(extras.split(","))
    named.update(re.findall(r"--extra (\w+)", read(".ci/lock")))
    named.update(re.findall(r"extras: (\w+)", read(".github/workflows/check.yml")))
    assert {"dev", "docs", "test", "tpu"} <= named <= set(declared)
