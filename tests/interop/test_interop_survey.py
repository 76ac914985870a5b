"""Every night: clipx says what open_clip says, for each of open_clip's model configs, and
docs/released.md says which those are."""

import pytest
from support import ROOT, survey
from support.libraries import with_open_clip

TABLE = (ROOT / "docs" / "released.md").read_text(encoding="utf-8")


@pytest.mark.slow
@with_open_clip
@pytest.mark.parametrize("family", survey.FAMILIES)
def test_a_family_opens_as_documented(family):
    names = [name for name in survey.names() if survey.family(name) == family]
    rows = [survey.compare(name) for name in names]
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
