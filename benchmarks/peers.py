"""What `python -m clipx.bench --against=torch,open_clip,faiss` compares clipx with.

    python benchmarks/peers.py step|loss|kmeans|start OPTIONS

OPTIONS is JSON. Each is a process of its own, which works in turns with clipx
(clipx/planning/turns.py); the loader of PyTorch is in torch_loader.py. The step is that of
open_clip's trainer on a CPU: its model, loss and parameter groups, PyTorch's AdamW in its fused
form, which is its fastest, in float32 on all cores.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from clipx.errors import MissingLibrary
from clipx.interop import libraries
from clipx.parallel import memory
from clipx.planning import turns


def optimizer(model, options):
    """AdamW with the two groups of open_clip's trainer: what is decayed, and the rest."""
    torch = libraries.require("torch")
    named = list(model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "logit_scale" in n]
    ids = {id(p) for p in plain}
    decayed = [p for _, p in named if id(p) not in ids]
    groups = [{"params": plain, "weight_decay": 0.0}]
    groups += [{"params": decayed, "weight_decay": options["weight_decay"]}]
    return torch.optim.AdamW(
        groups,
        lr=options["learning_rate"],
        betas=(options["b1"], options["b2"]),
        eps=options["eps"],
        fused=True,
    )


def train_step(model, optimizer, loss, clip_norm, bfloat16=False):
    """A function (pictures, texts) -> the value of the loss, after one step of open_clip's trainer.
    bfloat16: with its mixed precision `amp_bf16`."""
    torch = libraries.require("torch")
    kind = next(model.parameters()).device.type

    def step(images, texts) -> float:
        optimizer.zero_grad()
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=bfloat16):
            value = loss(*model(images, texts))
        value.backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm, norm_type=2.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.605170185988092)
        return float(value.detach())

    return step


def step(options: dict[str, Any]) -> Callable[[str], dict]:
    """A turn is as many training steps as the request says. Further options: `device`, `bfloat16`
    and `compile`, for GPUs."""
    torch, open_clip = libraries.require("torch"), libraries.require("open_clip")
    torch.manual_seed(0)
    device = options.get("device", "cpu")
    model = open_clip.CLIP(**options["model_cfg"]).train().to(device)
    batch, side = options["batch"], options["model_cfg"]["vision_cfg"]["image_size"]
    words = options["model_cfg"]["text_cfg"]
    images = torch.randn(batch, 3, side, side).to(device)
    texts = torch.randint(1, words["vocab_size"] - 1, (batch, words["context_length"]))
    texts[:, -1] = words["vocab_size"] - 1  # the highest id ends a text
    texts = texts.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    adamw = optimizer(model, options)
    run = torch.compile(model) if options.get("compile") else model
    numbers = options.get("clip_norm"), bool(options.get("bfloat16"))
    take = train_step(run, adamw, open_clip.ClipLoss(), *numbers)

    def turn(request: str) -> dict:
        for _ in range(int(request)):
            take(images, texts)
        return {"parameters": parameters}

    return turn


def loss(options: dict[str, Any]) -> Callable[[str], dict]:
    """A turn is the loss of random unit rows and its gradients, as often as the request says."""
    torch, open_clip = libraries.require("torch"), libraries.require("open_clip")
    rows = [torch.randn(options["rows"], options["width"]) for _ in range(2)]
    pair = [(x / x.norm(dim=1, keepdim=True)).requires_grad_() for x in rows]
    scale, info_nce = torch.tensor(14.3, requires_grad=True), open_clip.ClipLoss()
    turns.reset_peak()
    before = turns.memory()

    def turn(request: str) -> dict:
        for _ in range(int(request)):
            info_nce(*pair, scale).backward()
            for x in (*pair, scale):
                x.grad = None
        return {"mib": turns.peak_memory() - before}

    return turn


def kmeans(options: dict[str, Any]) -> Callable[[str], dict]:
    """A turn is a fit of the rows in the file `options["rows"]`, and their last assignment."""
    import faiss
    import numpy as np

    x, iterations = np.load(options["rows"]), options["iterations"]

    def turn(request: str) -> dict:
        fit = dict(niter=iterations, min_points_per_centroid=1, max_points_per_centroid=len(x))
        model = faiss.Kmeans(x.shape[1], options["clusters"], **fit)
        model.train(x)
        inertia = float(model.index.search(x, 1)[0].sum())
        return {"inertia": inertia, "iterations": len(model.obj)}

    return turn


WORKS = {"step": step, "loss": loss, "kmeans": kmeans}
LIBRARIES = {"step": ("torch", "open_clip_torch"), "loss": ("torch", "open_clip_torch")}
LIBRARIES["kmeans"] = ("faiss-cpu",)


def main() -> None:
    memory.keep_pages()  # of all sides: what is compared is not their allocators
    name, options = sys.argv[1], json.loads(sys.argv[2])
    try:
        work = WORKS[name](options)
    except (ImportError, MissingLibrary) as error:
        sys.exit(str(error))
    turns.serve(work, {n: importlib.metadata.version(n) for n in LIBRARIES[name]})


if __name__ == "__main__":
    main()
