"""The published sizes of well-known data sets.

A data set that is a list of URLs loses rows over time. So a run reports how many of the published
rows its copy has.
"""

from __future__ import annotations

MANIFESTS = {
    "coco": 118_287,  # images of train2017, about five captions each
    "cc3m": 3_318_333,  # Sharma et al., ACL 2018, the training split
    "cc12m": 12_423_374,  # Changpinyo et al., CVPR 2021
    "yfcc15m_openai": 14_829_396,  # OpenAI's list, github.com/openai/CLIP data/yfcc100m.md
    "yfcc15m_declip": 15_388_848,  # DeCLIP's list; 6.64 M of its rows are in OpenAI's too
}


def describe(rows: int, fingerprint: str, name: str, manifest: str | None) -> str:
    """One line for the log: the number of rows, out of the published number if there is a
    manifest, and the fingerprint, as in "cc12m: 7.62 M of 12.42 M (61.3%), fingerprint ab12..."."""
    count = f"{name}: {rows:,} rows"
    if manifest:
        published = MANIFESTS[manifest]
        count = f"{manifest}: {_count(rows)} of {_count(published)} ({rows / published:.1%})"
    return f"{count}, fingerprint {fingerprint}"


def _count(rows: int) -> str:
    return f"{rows:,}" if rows < 1_000_000 else f"{rows / 1e6:.2f} M"
