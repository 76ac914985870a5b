"""The eight methods of compare_scratch.py at batches of 16 to 512, with the same number of pairs:
`clip_lite_b32` is CLIP-Lite at batch 32. The search tries learning rates, as each batch wants its
own. Batch 128 is compare_scratch.py's.
"""

from clipx.configs import common, compare_scratch

_BATCHES = (16, 32, 64, 256, 512)
_METHODS = tuple(compare_scratch.METHODS)
VARIANTS = (*(f"{method}_b{batch}" for method in _METHODS for batch in _BATCHES),)

SEARCH = {
    "ranges": {name: {"optimizer.learning_rate": ("log", 1e-4, 3e-3)} for name in VARIANTS},
    "metric": "retrieval/mean_recall",
    "share": 1 / 3,
}
CLAIMS = [
    *(
        claim
        for batch in (16, 32, 64)
        for claim in common.claims(
            common.CLIP_LITE,
            f"clip_lite_b{batch}",
            f"clip_b{batch}",
            common.LITE_SCALE,
            retrieval__mean_recall=f"at batch {batch}, CLIP-Lite retrieves better than CLIP",
            cifar10__top1=f"at batch {batch}, CLIP-Lite's features transfer better",
        )
    ),
    *(
        claim
        for method in _METHODS
        for claim in common.claims(
            "the batches of the methods' own recipes, 512 to 32,768",
            f"{method}_b512",
            f"{method}_b64",
            "more pairs, so that 512 of them are a small part of an epoch",
            retrieval__mean_recall=f"{method} retrieves better from batches of 512 than of 64",
        )
    ),
]


def get_config(variant=VARIANTS[0]):
    method, _, batch = variant.rpartition("_b")
    config = compare_scratch.get_config(method)
    config.train.batch_size = int(batch)
    if method == "protoclip":  # an episode stays about an epoch
        rows = config.objective.episode_size
        config.objective.episode_size = rows // int(batch) * int(batch)
    return config
