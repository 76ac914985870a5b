"""`python -m clipx.evaluate --workdir=DIR`: runs the evals of a run, its own, a config's, or those
named: `--evals=zero_shot,linear_probe --data=source=folder,path=DIR`. With `--init_from=PATH` those
of a model that open_clip or transformers keep."""

from __future__ import annotations

import pathlib

from absl import flags

from clipx import cli
from clipx.config import files
from clipx.errors import ConfigError
from clipx.serving.evaluation import chosen, evaluate, evaluate_file
from clipx.training import pretrained
from clipx.training.checkpoint import read_json


def main(overrides: list[tuple[str, str]]) -> None:
    """Runs the chosen evals of the run or the model that the flags name."""
    path, workdir, config = flags.FLAGS.init_from, flags.FLAGS.workdir, {"evals": {}}
    step = flags.FLAGS.step
    if bool(path) == bool(workdir):
        found = "both" if path else "none"
        raise ConfigError("--workdir, --init_from", found, "a run, or a model from elsewhere")
    if path and (run := pretrained.workdir(path)):
        path, workdir, step = "", str(run[0]), run[1] or step
    if workdir:
        config = read_json(pathlib.Path(workdir).expanduser() / "config.json")
    if flags.FLAGS.config:
        config["evals"] = files.load(flags.FLAGS.config).get("evals", {})
    for key, text in overrides:
        if key.split(".")[0] != "evals":
            raise ConfigError(
                f"--config.{key}", text, "config.evals alone: the model is trained", "drop it"
            )
        files.override(config, key, text)
    config["evals"] = chosen(
        config["evals"],
        flags.FLAGS.evals,
        data=flags.FLAGS.data,
        train_data=flags.FLAGS.train_data,
    )
    if workdir:
        evaluate(workdir, step, config)
    else:
        evaluate_file(path, config["evals"], flags.FLAGS.init_ignore, flags.FLAGS.out)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("init_from", None, "Instead: a folder or file as config.init_from has it.")
    flags.DEFINE_list("init_ignore", [], "What of it may differ from clipx, with commas.")
    flags.DEFINE_string("out", "", "Folder of its results; default: `evaluation` beside it.")
    flags.DEFINE_string("config", None, "Config whose evals replace the run's own.")
    flags.DEFINE_string("evals", "", "Those of the evals, or new ones by evaluator, with commas.")
    flags.DEFINE_string("data", "", "The evals' data instead of their own: source=...,path=...")
    flags.DEFINE_string("train_data", "", "The same for what probes are trained on.")
    flags.DEFINE_string("step", "latest", "Which checkpoint: a step, latest or best.")
    cli.run(main, required=())
