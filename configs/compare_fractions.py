"""CLIP and DeCLIP from 12.5, 25, 50 and 100 % of Flickr8k's training pairs, with the same towers
and as many epochs as compare_scratch.py, so that a quarter of the pairs is a quarter of the steps.
`declip_f25` sees the same 25 % as `clip_f25`. In the folder of a comparison of compare_scratch.py,
`clip` and `declip` are its runs, and the others take the values that its search has chosen.
"""

from clipx.configs import common, compare_scratch

_FRACTIONS = {"f12": 0.125, "f25": 0.25, "f50": 0.5}
_METHODS = ("clip", "declip")
VARIANTS = (*_METHODS, *(f"{method}_{name}" for method in _METHODS for name in _FRACTIONS))

SEARCH = {
    **compare_scratch.SEARCH,
    "ranges": {
        name: compare_scratch.SEARCH["ranges"][name] if name in _METHODS else name.partition("_")[0]
        for name in VARIANTS
    },
}
_PAIRS = {"f12": "an eighth", "f25": "a quarter", "f50": "half"}
CLAIMS = [
    claim
    for name, share in _PAIRS.items()
    for claim in (
        *common.claims(
            common.DECLIP,
            f"declip_{name}",
            "clip",
            "fractions of millions of pairs, all with one number of steps",
            retrieval__mean_recall=f"DeCLIP from {share} of the pairs retrieves better than CLIP "
            "from all",
            cifar10_zero_shot__top1=f"DeCLIP from {share} of the pairs classifies better zero-shot "
            "than CLIP from all",
        ),
        *common.claims(
            common.DECLIP,
            f"declip_{name}",
            f"clip_{name}",
            retrieval__mean_recall=f"both from {share} of the pairs, DeCLIP retrieves better",
        ),
    )
]


def get_config(variant=VARIANTS[0]):
    method, _, fraction = variant.partition("_")
    config = compare_scratch.get_config(method)
    if fraction:
        config.data.fraction = _FRACTIONS[fraction]
    return config
