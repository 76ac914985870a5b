"""What test files share: no test file imports another."""

import json
import pathlib

TESTS = pathlib.Path(__file__).parents[1]
ROOT = TESTS.parent


def load_oracle(name: str) -> dict:
    """Numbers from a paper's own code; `oracles/README.md` says from which."""
    return json.loads((TESTS / "oracles" / f"{name}.json").read_text())
