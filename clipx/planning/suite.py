"""What `python -m clipx.bench --against=torch,open_clip,faiss` measures.

Every section is a function that yields rows. Where clipx has a peer, both work in turns, each in a
process of its own, and what counts is the median of the ratios of neighbouring turns.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clipx.data.text.tokenizer_config import TokenizerConfig
from clipx.errors import DataError, install_hint
from clipx.interop.model import Words, make_model
from clipx.interop.open_clip import OpenClip
from clipx.planning import feed_comparison, starts, turns, works
from clipx.planning.rows import OURS, Row, Sizes, batch
from clipx.planning.turns import Side, Turn
from clipx.training.run import Run, assemble

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
PEERS = ("torch", "open_clip", "faiss")


def ours(
    work: str, options: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Side:
    """clipx's side of a comparison."""
    command = [sys.executable, "-m", "clipx.planning.works", work, json.dumps(options)]
    return Side(command, environment)


def peer(work: str, options: Mapping[str, Any]) -> Side:
    """The other side: a script of benchmarks/."""
    return Side([sys.executable, str(BENCHMARKS / "peers.py"), work, json.dumps(options)])


def _rows(
    section: str,
    sides: Mapping[str, Side],
    request: str,
    count: int,
    numbers: Mapping[str, tuple[str, Callable[[Turn], float]]],
) -> Iterator[Row]:
    """A row for each of `numbers`, {name: (unit, number of a turn)}, of the same turns."""
    with turns.started(sides) as (able, why):
        why = {side: _why(text) for side, text in why.items()}
        taken = turns.alternate(able, request, count)
        versions = {name: side.versions for name, side in able.items()}
    for name, (unit, number) in numbers.items():
        found = {side: [number(turn) for turn in list_] for side, list_ in taken.items()}
        yield Row(section, name, unit, found, why, versions)


def _why(reason: str) -> str:
    """Why a peer has no numbers, and what to do about it."""
    if not BENCHMARKS.is_dir():
        return "needs a checkout of clipx, which has the folder benchmarks/"
    return f"{reason.partition(': ')[2]}; {install_hint('peers')}"


def steps(sizes: Sizes, against: Sequence[str]) -> Iterator[Row]:
    """Seconds of a training step on noise, with its optimizer."""
    for step in sizes.steps:
        options = {"config": step.config, "overrides": step.overrides}
        sides = {OURS: ours("step", options)}
        if "open_clip" in against:
            run = assemble(works.config(step.config, step.overrides))
            sides["open_clip"] = peer("step", open_clip_options(run))
        seconds = {step.name: ("s", lambda turn, each=step.each: turn["seconds"] / each)}
        yield from _rows("step", sides, str(step.each), step.turns, seconds)


def words(run: Run) -> Words:
    """The ids of the run's tokenizer, without opening it."""
    ids = TokenizerConfig(**run.complete["tokenizer"])
    return Words(
        kind=ids.name,
        vocab_size=ids.size,
        context=ids.context,
        pad_id=ids.pad_id,
        sot_id=ids.sot_id,
        eot_id=ids.eot_id,
        plain=ids.name == "clip_bpe",
    )


def open_clip_options(run: Run) -> dict[str, Any]:
    """What open_clip needs to train the run's model as the run does: its own config of the model,
    the batch size, and the optimizer's numbers."""
    objective, optimizer = run.objective, run.config.optimizer
    model = make_model(
        objective.image,
        objective.text,
        {"params": {}},  # the config alone is asked for
        logit_scale=None,
        logit_bias=None,
        mean=objective.mean,
        std=objective.std,
        words=words(run),
    )
    names = ("learning_rate", "b1", "b2", "eps", "weight_decay", "clip_norm")
    return {
        "model_cfg": OpenClip().configs(model, "")["open_clip_config.json"]["model_cfg"],
        "batch": run.batch_size,
        **{name: getattr(optimizer, name) for name in names},
    }


def losses(sizes: Sizes, against: Sequence[str]) -> Iterator[Row]:
    """InfoNCE of unit rows and its gradients: seconds, and memory beside the rows themselves."""
    for rows, count, each in sizes.losses:
        options = {"rows": rows, "width": sizes.loss_width}
        sides = {OURS: ours("loss", options), "dense": ours("dense", options)}
        if "open_clip" in against:
            sides["open_clip"] = peer("loss", options)
        numbers = {
            f"{rows:,} rows": ("s", lambda turn, each=each: turn["seconds"] / each),
            f"{rows:,} rows, memory": ("MiB", lambda turn: turn["mib"]),
        }
        yield from _rows("loss", sides, str(each), count, numbers)


def features(rows: int, width: int) -> np.ndarray:
    """Unit rows around 200 centres, with variances that fall as those of a network's features do.
    No fit converges on them, and so stops, before its last iteration."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, width), np.float32)[rng.integers(0, 200, rows)]
    x = (x + rng.standard_normal((rows, width), np.float32)) / np.sqrt(np.arange(1, width + 1))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def kmeans(sizes: Sizes, against: Sequence[str]) -> Iterator[Row]:
    """Seconds of a fit of `features`, its last assignment included, and the inertia it ends at."""
    for rows, width, clusters, iterations, count in sizes.kmeans:
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            np.save(file, features(rows, width))
            file.flush()
            options = {"rows": file.name, "clusters": clusters, "iterations": iterations}
            sides = {OURS: ours("kmeans", options)}
            if "faiss" in against:
                sides["faiss"] = peer("kmeans", options)
            name = f"{rows:,} x {width}, k = {clusters:,}, {iterations} iterations"
            numbers = {
                name: ("s", lambda turn: turn["seconds"]),
                f"{name}, inertia": ("", lambda turn: turn["inertia"]),
            }
            yield from _rows("kmeans", sides, "1", count, numbers)


def feed(sizes: Sizes, against: Sequence[str]) -> Iterator[Row]:
    """Images per second of CPU time that a loader prepares, beside PyTorch's DataLoader."""
    if "torch" not in against:
        return
    rounds, passes, files = sizes.feed
    try:
        found = feed_comparison.against(
            BENCHMARKS / "torch_loader.py", rounds=rounds, passes=passes, files=files
        )
    except DataError as error:
        yield Row("feed", "loaders", "images/s a core", {}, {"torch": str(error)})
        return
    for name, mine, theirs in found.rows:
        sides = {OURS: [s.per_core for s in mine], "torch": [s.per_core for s in theirs]}
        yield Row("feed", name, "images/s a core", sides, versions={"torch": found.versions})


def start(sizes: Sizes, against: Sequence[str]) -> Iterator[Row]:
    """Seconds from the command to the first step, and of imports."""
    for kind, seconds in starts.starts(sizes.start, sizes.starts).items():
        yield Row("start", f"{sizes.start.name} to its first step, {kind}", "s", {OURS: seconds})
    modules = {"clipx.train": OURS}
    if "open_clip" in against:
        modules["open_clip"] = "open_clip"
    found, failed = starts.imports(list(modules), 2 * sizes.starts - 1)
    sides = {modules[module]: seconds for module, seconds in found.items()}
    missing = {modules[module]: _why(reason) for module, reason in failed.items()}
    yield Row("start", "import", "s", sides, missing)


def growth(sizes: Sizes, against: Sequence[str]) -> Iterator[Row]:
    """Images a second by batch size, and by the number of processes that share this machine."""
    step = sizes.growth

    def measured(name: str, rows: int, processes: int) -> Row:
        options = {"config": step.config, "overrides": (*step.overrides, *batch(rows))}
        sides = [ours("step", options, env) for env in starts.environments(processes)]
        with turns.side_by_side(sides):
            return Row("growth", name, "images/s", {OURS: starts.rates(sides, step, rows)})

    for rows in sizes.batches:
        yield measured(f"{step.name}, batch {rows}", rows, 1)
    rows = max(sizes.batches[-1] // 2, max(sizes.processes))
    for processes in sizes.processes:
        yield measured(f"{step.name}, batch {rows}, {processes} process(es)", rows, processes)


SECTIONS: dict[str, Callable[[Sizes, Sequence[str]], Iterator[Row]]] = {
    "step": steps,
    "loss": losses,
    "kmeans": kmeans,
    "feed": feed,
    "start": start,
    "growth": growth,
}


# What was tried for the numbers above, what was expected, and what came (two cores, shared with
# other work; CPU seconds of pairs in turns):
#
# - Pages. Expected: a fifth less CPU time, as with an allocator that keeps what is freed. Came: a
#   sixth (quickstart, 80 steps: 45.0 to 37.8 s; in the kernel 8.5 to 1.2). Thresholds alone change
#   nothing: threads other than the first have arenas that cannot hold blocks above 64 MiB, and
#   malloc maps those whatever M_MMAP_MAX says. One arena is what helps (clipx/parallel/memory.py).
# - Another length. As expected nothing is compiled again: warm-up and decay are arguments.
# - A warm start of `small`: 0.66 of the time (five pairs in turns), so 6.2 to 4.1 s. In parts:
#   Orbax, ftfy and readers of models imported where they are used: import 0.75 of the time, as
#   measured; what is left is JAX (two thirds), Flax and optax, so that a goal of 0.8 s is out of
#   reach where JAX alone takes as long. All blocks of a transformer as calls of one function, norms
#   in three operations a parameter rather than six and computed once, a choice without a function:
#   tracing of the step 1.5 to 0.8 s, half as expected, but lowering, which has a third fewer lines,
#   takes as long. Programs load in threads while Python traces the next one, and Grain is imported
#   meanwhile: 1.2 s less. Captions for the tokenizer without drawing the pictures: 0.4 s less.
#   Left, in shares of CPU time: imports a fifth, tracing the initialisation a tenth, tracing and
#   lowering the step a fifth, loading both programs a third, the first step a tenth.
# - A cold start: no less (0.98). Both programs now compile at the same time, expected to save the
#   shorter one's 4 s; but two threads on this machine's two cores take 1.4 times the CPU time of
#   one, as cores that share their units do. LLVM is half of it, XLA's passes a fifth, the emitters
#   of fusions a tenth. Tried without gain: levels 1 and 2 of optimization (a tenth less, within the
#   noise; level 0 halves it, and doubles the step), other splits of the modules (1, 2, 8, 64),
#   without fusion emitters (three times as long), the parameters' 49 draws as 23 for several keys
#   each (98 loops become 16, and the compile time stays).
# - One view: 0.80 of the CPU time, two views 0.87 (seven pairs): 3.1 and 8.0 times the images of
#   PyTorch's loader (five rounds) where it was 2.3 and 6.8. A picture's 1.4 ms were 0.46 decoding,
#   0.6 averaging areas with factors that are no whole numbers, 0.12 the shuffle (0.013 with 6,000
#   rows and more rather than 256), 0.05 the header. Bicubic after a blur of 3x3 takes 0.25 to 0.3
#   ms. A batch is written by the threads that load it, and was copied before.
# - Blocks computed once (`clipx.models.cpu.hold`). The profile of ViT-B/32 showed 2 of 6 seconds in
#   transposed copies of gradients, of 0.1 s each where a copy takes 2 ms: fused with the sums of
#   all later blocks. Barriers are dropped before XLA fuses; a condition that it cannot decide is
#   not. Step of ViT-B/32: 5.9 to 4.4 s. `small` has too few blocks to gain. `scan=True`, whose loop
#   stores what it carries, takes 5.1 s: it copies each layer's weights and residuals.
# - Gradients of kernels as x' dy (`clipx.models.cpu.product`), where JAX's rule transposes dy' x
#   within AdamW's loop: ViT-B/32 4.4 to 4.15 s, `small` a tenth less.
# - 1x1 convolutions as products (`clipx.models.cpu.convolution`): RN50 4.3 to 3.1 s.
# - What was left then, at 0.92 (`medium`) to 1.07 (RN50) of open_clip's time: products run at 195
#   to 205 GFLOP/s alone, as MKL's do (107 on one core), and are 85 % of ViT-B/32's step, 80 % of
#   RN50's. In `small` the products take 60 % of the operations' time, attention among 17 and 24
#   tokens 10 % (6 to 15 GFLOP/s), sums for biases 5 %, GELU and its gradient 5 %; no other takes 2.
# - Attention with each head of each row as a row of its own. Expected: a quarter faster among 17
#   tokens. Came: as fast alone and an eighth slower in the step among 17 and 24, 0.55 to 0.8 of the
#   time among 50 and 77, with gradients: ViT-B/32's step 0.96 of the time (six pairs). Heads in one
#   product with a mask of blocks: twice the time.
# - Steps after the changes for starts, in turns with the tree before them, on another machine whose
#   products run at 110 to 130 GFLOP/s: RN50 0.97 (five rounds of three trees, each within 0.95 to
#   1.20), so that they cost nothing. That RN50 took 1.33 of open_clip's time there and 1.07 here is
#   the machine: its gradients of 3x3 kernels were a third of the step's time, at 31 GFLOP/s.
# - Gradients of 3x3 kernels as nine products (`clipx.models.cpu.convolution`). Expected: 1.2 of 6.8
#   s less. Came: 1.3 of 7.5 s less, 0.81 of the time (four rounds); 1.06 of open_clip's. Written
#   as a product over three axes it transposes each part first: half of the gain is lost. Columns
#   (nine parts in one array) are as fast and need nine times the memory. What is left of RN50, in
#   seconds of threads that sum to 6.2: 3x3 convolutions and their gradients to pictures 1.4 (73
#   GFLOP/s, oneDNN's 110), their kernels' 0.4, other products 2.5, BatchNorm's sums 0.5.
# - Two processes on one machine: 108 to 134 images/s where one does 560 to 610, and both wait four
#   fifths of the time: one all-reduce of 100 gradients takes 0.7 s of a step of 1.1 s. gloo reduces
#   them one by one, and each waits for the other process, some milliseconds after a pause: a
#   hundred of these sizes alone take 60 ms back to back, 120 to 180 ms after a pause of 0.3 s, 180
#   to 420 ms after products, and 9 ms as one array. Neither TCP's congestion control (bbr, cubic),
#   nor a core for each process, nor malloc makes it faster. XLA's partitioner adds these sums, so
#   that clipx cannot gather them in one array before.
# - `recall_at_1` on logged steps alone. Not tried: at batch 128 its product is 0.02 % of the FLOPs
#   of the step.
