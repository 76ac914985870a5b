"""What a run starts from: its tokenizer, and the state of step 0."""

from __future__ import annotations

from collections.abc import Callable

import jax

from clipx.data import loader
from clipx.data.base import Source
from clipx.data.text import tokenizers
from clipx.parallel import mesh as meshes
from clipx.training import encoders, notes, programs
from clipx.training.assemble import abstract_batch
from clipx.training.run import OpenRun, Run
from clipx.training.step import init_state
from clipx.types import PyTree, TrainState


def open_tokenizer(run: Run, source: Source) -> tokenizers.Tokenizer:
    """The run's tokenizer.

    The tokenizer of `config.init_from`, if it fits the config. Otherwise the config's own, trained
    on the captions of `source` if the config names no file.
    """
    config = run.config
    if config.init_from:
        from clipx.interop import load
        from clipx.training import pretrained

        if not load.ignored("text", config.init_ignore):
            given = pretrained.open_tokenizer(config.init_from)
            if tokenizer := pretrained.tokenizer_for(config.tokenizer, given):
                return tokenizer
    return tokenizers.build(config.tokenizer, loader.captions(source))


def init(
    run: Run,
    say: Callable[[str], None] = lambda line: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> TrainState:
    """The state of step 0, created in its shardings, with the pretrained weights that the config
    names. `say` gets lines about what was loaded, what is new and what was resized. `meanwhile` is
    called while the program that creates the state compiles.

    Raises `ConfigError` for weights that do not fit the config. For an `OpenRun` that includes a
    tokenizer other than the run's.
    """
    resized: list[str] = []
    entries = _from_files(run, resized)
    for line in notes.weights(run, entries.get("params", {}), resized):
        say(line)

    def create(pretrained: PyTree) -> TrainState:
        # pictures and captions, not stored features, so that whole towers are initialised
        batch = abstract_batch(run.objective, run.batch_size, run.mesh)
        return init_state(
            run.objective, run.optimizer, batch, seed=run.config.seed, pretrained=pretrained
        )

    opt_state = None
    if run.config.init_optimizer:
        from clipx.training.kept_optimizer import optimizer_state

        opt_state = optimizer_state(run)
    shardings = jax.tree.map(lambda x: x.sharding, run.state)
    kinds = {"params": shardings.params, "batch_stats": shardings.batch_stats}
    with jax.set_mesh(run.mesh):
        given = meshes.put_parts(entries, kinds)
        jitted = jax.jit(create, out_shardings=shardings)
        leaves, tree = jax.tree.flatten(given)
        key = ("init", run.program_key, tree, tuple((x.shape, x.dtype) for x in leaves))
        compiling = programs.kept(key, lambda: programs.compiling(jitted.lower(given)))
    meanwhile()
    state = compiling.result()(given)
    if opt_state is None:
        return state
    say(f"optimizer state from {run.config.init_from}; the schedule begins at step 0")
    return state.replace(opt_state=jax.tree.map(meshes.put, opt_state, shardings.opt_state))


def _from_files(run: Run, resized: list[str]) -> dict[str, PyTree]:
    """The parts of `params` and `batch_stats` that come from files. resized: gets a line about each
    array of another size. What reads models is only imported for them."""
    tokenizer = run.tokenizer if isinstance(run, OpenRun) else None
    if not run.config.init_from:
        return encoders.entries(run.objective, run.config, tokenizer, resized)
    from clipx.training import pretrained

    return pretrained.entries(run.objective, run.state.params, run.config, tokenizer, resized)
