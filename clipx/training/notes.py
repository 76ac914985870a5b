"""What a run says when it starts: its sizes, what its weights and its vocabulary are, and what its
model cannot become."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from clipx.config import secrets
from clipx.data import manifests
from clipx.errors import listed
from clipx.parallel import mesh as meshes
from clipx.training.run import OpenRun, Run
from clipx.types import PyTree


def describe(run: OpenRun, fingerprint: str) -> list[str]:
    """Lines that a run prints when it starts: model, devices, data, and length in steps, epochs and
    examples."""
    batch, steps = run.batch_size, run.steps
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(run.state.params))
    devices = collections.Counter(d.device_kind for d in run.mesh.devices.flat)
    kinds = ", ".join(f"{count} x {kind}" for kind, count in devices.items())
    axes = ", ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    return [
        f"{run.complete['objective']['name']}: {parameters:,} parameters on {kinds} ({axes}), "
        f"{jax.process_count()} process(es)",
        *meshes.describe_whole(run.mesh, run.state.params),
        manifests.describe(run.rows, fingerprint, run.data.source, run.data.manifest),
        f"{steps:,} steps = {steps / run.steps_per_epoch:,.2f} epochs = {steps * batch:,} examples "
        f"at batch {batch:,}, {run.steps_per_epoch:,} steps an epoch",
        *(
            f"{key}: its password or signature is stored nowhere; name it by a variable, such as "
            "https://$LOGIN@host/..., if config.json shall be enough to open it"
            for key in secrets.hidden_keys(run.complete)
        ),
    ]


def weights(run: Run, loaded: PyTree, resized: Sequence[str]) -> list[str]:
    """Lines about the weights that a run starts from; [] if all of them are new.

    loaded: the parts of `params` that come from files. resized: lines about arrays that had another
    size in their file.
    """
    if not loaded:
        return []
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(dict(run.state.params), sep="/"))
    taken = traverse_util.flatten_dict(dict(loaded), sep="/").keys() & flat.keys()
    sizes = {name: math.prod(array.shape) for name, array in flat.items()}
    count, total = sum(sizes[name] for name in taken), sum(sizes.values())
    new = _modules({name: size for name, size in sizes.items() if name not in taken})
    paths = [run.config.init_from, run.objective.image.init_from, run.objective.text.init_from]
    return [
        f"weights from {', '.join(dict.fromkeys(filter(None, paths)))}: {count:,} of {total:,} "
        f"parameters loaded, {total - count:,} new"
        + (f" ({listed(new)})" if new else "")
        + (f"; resized: {', '.join(resized)}" if resized else "")
    ]


def _modules(sizes: Mapping[str, int]) -> list[str]:
    """The modules of parameters by their first two names, as "text/proj 12,345"."""
    modules: dict[str, int] = {}
    for name, size in sizes.items():
        module = "/".join(name.split("/")[:2])
        modules[module] = modules.get(module, 0) + size
    return [f"{module} {size:,}" for module, size in modules.items()]


def of_run(run: OpenRun, *, new: bool) -> list[str]:
    """Lines about a run that starts or, if it is not `new`, goes on."""
    lines = [*_pieces(run), *_export(run)] if new else []
    if start := run.config.train.extended_from:
        lines.append(f"extended at step {start:,}: the schedule begins there anew")
    return lines


def _pieces(run: OpenRun) -> list[str]:
    """A line if the captions gave fewer pieces of words than the config asks for."""
    config, pieces = run.config.tokenizer, run.tokenizer.pieces
    wanted = run.tokenizer.vocab_size - config.mask
    if pieces is None or pieces >= wanted or config.path:
        return []
    return [
        f"the captions gave {pieces:,} pieces for a vocabulary of {wanted:,}: the other rows of "
        f"the token embedding stay unused; config.tokenizer.vocab_size={pieces + config.mask} "
        "leaves them out"
    ]


# what transformers' SiglipModel has, and nothing else
_SIGLIP = {
    "image": {"pool": "attention", "pre_norm": False, "embed_dim": 0},
    "text": {"pool": "last", "causal": False, "mask_padding": False},
}


def _export(run: OpenRun) -> list[str]:
    """A line if transformers has no class for a run with SigLIP's loss."""
    if "logit_bias" not in run.state.params:
        return []
    other = [
        f"config.{name}.{key}={value}"
        for name, settings in _SIGLIP.items()
        for key, value in settings.items()
        if getattr(getattr(run.objective, name), key, None) != value
    ]
    if not other:
        return []
    needs = ", ".join(other)
    return [
        f"transformers' SiglipModel will not take this model (it needs {needs}); open_clip does"
    ]
