"""What each key of a config means, read from the code that declares it: the comment beside a field
or above it, or else what the class's docstring says of it, or what the name means everywhere.

`--help` prints it, and so do the tables of the documentation, which read this file without
importing clipx. It needs Python alone.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize

# fields that mean the same in every class, where a class does not say it again
_NAMES = {
    "activation": "of the MLPs",
    "augmentation": "of the colours of every image view",
    "batch_size": "rows that are encoded at a time",
    "blocks": "blocks of each stage",
    "causal": "a token attends to those before it alone",
    "compat": "what a paper's own code does otherwise",
    "contrast_clean_caption": "contrast the caption with no word hidden",
    "contrastive_weight": "of the contrastive loss of pictures and captions",
    "dense_activation": "of the layer behind the pooling",
    "dense_bias": "of the layer behind the pooling",
    "depth": "blocks; of an EfficientNet, times its own",
    "dropout": "of attention's and the MLPs' outputs, in training",
    "groups": "parts of the batch whose rows meet, as on so many devices",
    "head_dim": "channels that the head gives",
    "head_width": "of the head's hidden layers",
    "heads": "attention heads",
    "k": "how many: prototypes of an episode, or updates between two of the slow weights",
    "late_interaction_weight": "of the loss that compares tokens",
    "logit_bias_init": "the first bias of the logits",
    "logit_scale_cap": "the largest scale of the logits; None: no limit",
    "logit_scale_init": "logarithm of the first scale of the logits",
    "mask_padding": "nothing attends to padding",
    "mask_rate": "share of the words that are hidden",
    "masked_lm_weight": "of the loss of hidden words",
    "mean": "of RGB in 0..1",
    "mlp_ratio": "width of an MLP over that of the tower",
    "neighbour_direction": "of the loss with nearest neighbours",
    "neighbour_weight": "of the loss with nearest neighbours",
    "norm_eps": "added to the variance of a norm",
    "padding": "of convolutions, as which library has it",
    "pool": "what stands for the whole: a token, attention or the mean",
    "prior_weight": "of the loss of the priors",
    "projection_dim": "channels of the space of the prototypes",
    "projection_hidden": "channels of the heads' hidden layers",
    "prototype_weight": "of the loss of the prototypes",
    "queue_size": "captions that the queue of neighbours holds",
    "registers": "further tokens beside the class token",
    "remat": "what the backward pass computes again to save memory",
    "restarts": "starts of k-means, of which the best is kept",
    "scan": "one program for all blocks: compiles faster",
    "second_text": "the second text of a row",
    "simsiam_weight": "of SimSiam's loss of two views",
    "ssl_augmentation": "of the two views of the self-supervised loss",
    "ssl_weight": "of the self-supervised loss",
    "std": "of RGB in 0..1",
    "teacher_width": "channels of the external teacher's rows",
    "token_width": "channels of the compared tokens",
    "top_k": "tokens of another row among which a token looks for its match; None: all",
    "variant": "the published size whose numbers the other keys leave open",
    "width": "channels; of a CNN, of its stem or times its own",
}


@functools.cache
def parsed(code: str) -> tuple[ast.Module, dict[int, tuple[str, bool]]]:
    """A module's tree, and its comments by line: the text, and whether it has the line alone."""
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type == tokenize.COMMENT
    }
    return ast.parse(code), comments


def meanings(code: str, cls: str) -> dict[str, str]:
    """What each annotated field of the class `cls` means; "" where the code does not say. code: the
    module's."""
    tree, comments = parsed(code)
    (node,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls]
    said = ast.get_docstring(node) or ""
    found = {}
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            name, last = field.target.id, field.end_lineno or field.lineno
            found[name] = _comment(comments, field.lineno, last) or _sentence(said, name)
            found[name] = found[name] or _NAMES.get(name, "")
    return found


def _comment(comments: dict[int, tuple[str, bool]], first: int, last: int) -> str:
    """What stands beside a field, or in the lines above it."""
    beside = [comments[i][0] for i in range(first, last + 1) if i in comments]
    above: list[str] = []
    while (line := comments.get(first - 1 - len(above))) and line[1]:
        above.insert(0, line[0])
    return re.sub(r" ?pyright: .*", "", " ".join([*above, *beside]))


def _sentence(docstring: str, name: str) -> str:
    """What a docstring says of a field, as "name: what it is." or "name, other: what they are."."""
    words = " ".join(docstring.split())
    pattern = rf"(?:^|[.:)] )(?:\w+, )*{name}(?:, \w+)*: (.+?)(?:\. (?=[A-Z]|\w+(?:, \w+)*: )|\.?$)"
    match = re.search(pattern, words)
    return match[1] if match else ""
