"""How many pairs the sets that people train on had when they were published.

Sets of addresses rot, so a copy has fewer; a run says how many of how many it has.
"""

from __future__ import annotations

MANIFESTS = {
    "coco": 118_287,  # pictures of train2017, about five captions each
    "cc3m": 3_318_333,  # Sharma et al., ACL 2018, the training split
    "cc12m": 12_423_374,  # Changpinyo et al., CVPR 2021
    "yfcc15m_openai": 14_829_396,  # OpenAI's list, github.com/openai/CLIP data/yfcc100m.md
    "yfcc15m_declip": 15_388_848,  # DeCLIP's list; 6.64 M of it are in OpenAI's
}


def describe(rows: int, fingerprint: str, name: str, manifest: str | None) -> str:
    """Which rows these are: how many, of how many where a manifest is named, and their
    fingerprint, as "cc12m: 7.62 M of 12.42 M, fingerprint ab12..."."""
    count = f"{name}: {rows:,} rows"
    if manifest:
        whole = MANIFESTS[manifest]
        count = f"{manifest}: {_count(rows)} of {_count(whole)} ({rows / whole:.1%})"
    return f"{count}, fingerprint {fingerprint}"


def _count(rows: int) -> str:
    return f"{rows:,}" if rows < 1_000_000 else f"{rows / 1e6:.2f} M"
