"""`python -m clipx.evaluate --workdir=DIR`: evaluates a trained run.

By default the run's own evals. `--config=FILE` takes the evals of a config instead, and
`--evals=zero_shot,linear_probe --data=source=folder,path=DIR` names evals and their data.
`--init_from=PATH` evaluates a model of open_clip or transformers in place of a run.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from clipx import cli
from clipx.config import files
from clipx.data.resolve import resolve
from clipx.errors import ConfigError
from clipx.serving.evaluation import chosen, evaluate, evaluate_file
from clipx.training import pretrained, recovery


def main(overrides: list[tuple[str, str]]) -> None:
    """Runs the chosen evals on the run or the model that the flags name."""
    path, workdir, config = flags.FLAGS.init_from, flags.FLAGS.workdir, {"evals": {}}
    step = flags.FLAGS.step
    if bool(path) == bool(workdir):
        found = "both flags" if path else "neither flag"
        raise ConfigError(
            "--workdir, --init_from",
            found,
            "one of the two: --workdir for a run, --init_from for a model of another library",
        )
    if path and (run := pretrained.workdir(path)):
        path, workdir, step = "", str(run[0]), run[1] or step
    if workdir:
        config = recovery.run_config(pathlib.Path(workdir).expanduser().absolute())
    if flags.FLAGS.config:
        config["evals"] = files.load(flags.FLAGS.config).get("evals", {})
    override(config, overrides)
    config["evals"] = chosen(
        config["evals"],
        flags.FLAGS.evals,
        data=flags.FLAGS.data,
        train_data=flags.FLAGS.train_data,
    )
    # Keys of the sources that --data names, such as --config.evals.retrieval.data.captions
    override(config, [(key, text) for key, text in overrides if _section(key) in config["evals"]])
    config["evals"] = resolve({"evals": config["evals"]})["evals"]
    if workdir:
        evaluate(workdir, step, config, average=flags.FLAGS.average)
    else:
        evaluate_file(path, config["evals"], flags.FLAGS.init_ignore, flags.FLAGS.out)


def override(config: dict[str, Any], overrides: list[tuple[str, str]]) -> None:
    """Applies the command line's overrides, of `evals` and of `data.path`: where the data lies now
    that a run has held rows out of. Raises `ConfigError` for any other."""
    for key, text in overrides:
        if key != "data.path" and key.split(".")[0] != "evals":
            raise ConfigError(
                f"--config.{key}",
                text,
                "an override of config.evals: the model is trained already",
                f"remove --config.{key}",
            )
        files.override(config, key, text)


def _section(key: str) -> str:
    """The eval that an override `evals.NAME...` is of; '' for another override."""
    first, _, rest = key.partition(".")
    return rest.partition(".")[0] if first == "evals" else ""


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string(
        "init_from", None, "In place of --workdir: a model, as config.init_from takes it."
    )
    flags.DEFINE_list(
        "init_ignore", [], "Differences of that model to accept, as config.init_ignore takes them."
    )
    flags.DEFINE_string(
        "out", "", "With --init_from: folder for the results; default: `evaluation` beside it."
    )
    flags.DEFINE_string("config", None, "Config whose evals replace the run's own.")
    flags.DEFINE_string("evals", "", "Evals to run: names in the config, or evaluators. Commas.")
    flags.DEFINE_string("data", "", "Data for these evals, as source=...,path=...")
    flags.DEFINE_string("train_data", "", "Data to train probes on, as source=...,path=...")
    flags.DEFINE_bool("average", False, "The averages that config.optimizer.average has kept.")
    flags.DEFINE_string("step", "latest", "The checkpoint: a step, latest or best.")

    cli.run(main, required=(), sections=("evals",))
