"""Every night: clipx says what open_clip says, for each of open_clip's model configs, and
docs/released.md says which those are."""

import json
import os
import re
import subprocess
import sys

import pytest
from support import ROOT, survey
from support.libraries import with_open_clip

TABLE = (ROOT / "docs" / "released.md").read_text(encoding="utf-8")


@pytest.mark.slow
@with_open_clip
@pytest.mark.parametrize("family", survey.FAMILIES)
def test_a_family_opens_as_documented(family):
    names = [name for name in survey.names() if survey.family(name) == family]
    # as users compile, not as tests do: fast compilation sums in an order that is twice as far off
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "tests/support/survey.py", *map(re.escape, names)]
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()[:-1] if line[:1] == "{"]
    assert [row["config"] for row in rows] == names
    assert not [row for row in rows if row["verdict"] not in ("right", "refused")]
    assert all(row["reason"] for row in rows if row["verdict"] == "refused")
    line = next(x for x in survey.table(rows).splitlines() if x.startswith(f"| {family} |"))
    assert line in TABLE, "run: python tests/support/survey.py --table"


@pytest.mark.slow
def test_most_configs_open():
    """The table names at least 115 configs that open."""
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")]
    families = [line for line in rows if line.split(" | ")[0][2:] in survey.FAMILIES]
    assert sum(line.split(" | ")[1].count("`") // 2 for line in families) >= 115
