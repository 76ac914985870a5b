"""The model card (README.md) of an export, for the Hugging Face Hub, with code that uses its
heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from clipx.interop.base import Format
from clipx.interop.verify import COSINE, RELATIVE, Proof

HEADS = "heads.safetensors"

_LAYERS = '''import numpy as np
from safetensors.numpy import load_file

heads = load_file("{file}")
params = lambda name: heads.get(f"params/{{name}}", 0.0)


def dense(name, x):
    return x @ params(f"{{name}}/kernel") + params(f"{{name}}/bias")


def layer_norm(name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * params(f"{{name}}/scale") + params(f"{{name}}/bias")


def batch_norm(name, x):
    mean, var = heads[f"batch_stats/{{name}}/mean"], heads[f"batch_stats/{{name}}/var"]
    return (x - mean) / np.sqrt(var + 1e-5) * params(f"{{name}}/scale") + params(f"{{name}}/bias")


def relu(x):
    return np.maximum(x, 0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def mlp(name, x):
    """Dense layers with a ReLU in between; a layer may be followed by a BatchNorm."""
    count = sum(f"params/{{name}}/fc_{{i}}/kernel" in heads for i in range(9))
    for i in range(count):
        x = dense(f"{{name}}/fc_{{i}}", x)
        if f"params/{{name}}/norm_{{i}}/scale" in heads:
            x = batch_norm(f"{{name}}/norm_{{i}}", x)
        x = relu(x) if i < count - 1 else x
    return x'''
# code for each kind of head, keyed by an array that only this kind has
_HEADS = {
    "params/image_text/left/fc/kernel": '''def side(name, x):
    hidden = relu(batch_norm(f"{name}/norm", dense(f"{name}/fc", x)))
    return unit(
        layer_norm(f"{name}/ln", dense(f"{name}/proj", hidden) + dense(f"{name}/shortcut", x))
    )


def score(image, text):
    """The critic's score of every image with every text, from features before normalisation."""
    image = side("image_text/left", image[:, : len(heads["params/image_text/left/fc/kernel"])])
    text = side("image_text/right", text[:, : len(heads["params/image_text/right/fc/kernel"])])
    return np.exp(params("image_text/logit_scale")) * image @ text.T''',
    "params/image_text/top/fc/kernel": '''def score(image, text):
    """The critic's score of every image with every text, from features before normalisation."""
    image = image[:, : len(heads["params/image_text/left/kernel"])]
    text = text[:, : len(heads["params/image_text/right/kernel"])]
    pairs = dense("image_text/left", image)[:, None] + dense("image_text/right", text)
    return dense("image_text/top/out", relu(dense("image_text/top/fc", relu(pairs))))[..., 0]''',
    "params/heads/mlp/fc_0/kernel": '''def project(side, x):
    """Unit vectors in the space of the prototypes, from features before normalisation. side: 0 for
    images, 1 for texts. The prototypes are `memory/centroids/...`, if the run kept them."""
    both = {name: x for name, x in heads.items() if "/heads/mlp/" in name}
    heads.update({name: x[side] for name, x in both.items()})
    x = unit(mlp("heads/mlp", x))
    heads.update(both)
    return x''',
    "params/late_interaction/image/fc/kernel": '''def image_tokens(x):
    """Unit vectors of an image's tokens, as they leave the last block (no norm, no projection)."""
    return unit(dense("late_interaction/image/fc", x))


def text_tokens(x):
    """Unit vectors of a text's tokens up to its end mark, after the last norm."""
    return unit(dense("late_interaction/text/fc", x))''',
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card says about a run and its export."""

    format: Format
    folder: str  # path in the code that loads the export
    name: str  # title of the card
    method: str  # name of the objective
    license: str
    towers: str
    data: str
    seen: str  # samples seen in training
    metrics: Mapping[str, str]  # their values as people read them
    proof: Proof | None
    unproven: str  # why there is no proof
    left_out: Collection[str]  # names of the heads
    with_heads: bool
    heads: Collection[str]  # names of all arrays of the heads
    notes: Collection[str]


def card(facts: Facts) -> str:
    """The text of README.md."""
    sections = [
        _header(facts),
        f"# {facts.name}\n\nTrained with clipx by {facts.method}, and exported to "
        f"{facts.format.library}'s format.",
        _list({"Towers": facts.towers, "Data": facts.data, "Samples seen": facts.seen}),
        "## Load it\n\n" + _code(facts.format.loading.format(folder=facts.folder)),
        *([_further(facts.folder)] if facts.format.readable else []),
        *(["## Notes\n\n" + "\n".join(f"- {x}" for x in facts.notes)] if facts.notes else []),
        "## Metrics\n\n" + _metrics(facts.metrics),
        "## Verification of the export\n\n" + _proof(facts),
        "## Heads\n\n" + _heads(facts),
    ]
    return "\n\n".join(sections) + "\n"


def _further(folder: str) -> str:
    return (
        f"To train it further with clipx, use `--config.init_from={folder}`. To evaluate it, "
        f"run `python -m clipx.evaluate --init_from={folder}`."
    )


def _header(facts: Facts) -> str:
    tags = ["clip", "clipx", facts.method.replace("_", "-")]
    return "\n".join(
        [
            "---",
            f"license: {facts.license}",
            f"library_name: {facts.format.library}",
            "pipeline_tag: zero-shot-image-classification",
            "tags:",
            *(f"- {tag}" for tag in dict.fromkeys(tags)),
            "---",
        ]
    )


def _list(items: Mapping[str, str]) -> str:
    return "\n".join(f"- **{name}**: {text}" for name, text in items.items())


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _metrics(metrics: Mapping[str, str]) -> str:
    if not metrics:
        return "The run was not evaluated at this step."
    rows = [f"| {name} | {value} |" for name, value in sorted(metrics.items())]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def proof_lines(proof: Proof) -> list[str]:
    """The figures of a proof, one per line."""
    lines = [
        f"least cosine of an image: {proof.image_cosine:.9f} (must exceed {COSINE})",
        f"least cosine of a caption: {proof.text_cosine:.9f} (must exceed {COSINE})",
        f"largest difference of logits, relative to the largest logit: {proof.logits:.2g} "
        f"(must be below {RELATIVE:g})",
    ]
    if proof.odd:
        captions = ", ".join(repr(x) for x in proof.odd)
        lines.append(f"captions with other token ids than in training: {captions}")
    return lines


def _proof(facts: Facts) -> str:
    if facts.proof is None:
        return f"Not verified: {facts.unproven}."
    lines = "\n".join(f"- {line}" for line in proof_lines(facts.proof))
    return (
        f"Loaded by {facts.proof.library} and compared with clipx in float32, on fixed random "
        f"images and fixed captions, through the library's own preprocessing and tokenizer:\n\n"
        f"{lines}"
    )


def _heads(facts: Facts) -> str:
    if not facts.left_out:
        return "Training used only the two towers."
    names = ", ".join(f"`{name}`" for name in sorted(facts.left_out))
    if not facts.with_heads:
        return f"Training also used these heads, which are not exported: {names}."
    functions = [text for key, text in _HEADS.items() if key in facts.heads]
    code = "\n\n\n".join([_LAYERS.format(file=HEADS), *functions])
    arrays = "\n".join(f"- `{name}`" for name in sorted(facts.heads))
    return (
        f"Training also used these heads, which `{HEADS}` keeps: {names}. NumPy is enough to use "
        f"them:\n\n{_code(code)}\n\n<details><summary>All arrays</summary>\n\n{arrays}\n\n"
        "</details>"
    )
