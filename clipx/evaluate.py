"""`python -m clipx.evaluate --workdir=DIR`: runs the evals of a run, its own or a config's."""

from __future__ import annotations

import pathlib

import jax
from absl import flags

from clipx import cli
from clipx import config as configs
from clipx.checkpoint import prepare_workdir, read_json, write_json
from clipx.config import ConfigError
from clipx.run import restore


def table(results: dict[str, float]) -> list[str]:
    """Lines of aligned names and values."""
    width = max(map(len, results))
    return [f"  {name:{width}}  {value:.4f}" for name, value in results.items()]


def evaluate(workdir: str, step: str, config: dict) -> dict[str, float]:
    """The metrics of every eval of `config`, by `<eval>/<metric>`, at the step of a workdir; also
    written to `evaluation_<step>.json` there."""
    run, state = restore(workdir, step, config=config)
    if not run.evals:
        raise ConfigError(
            "config.evals", "nothing", "at least one eval", "--config=FILE with evals"
        )
    results, encode = {}, run.encode(state)
    for name, evaluator in run.evaluators().items():
        found = evaluator(encode)
        results |= {f"{name}/{key}": float(value) for key, value in found.items()}
    if jax.process_index() == 0:
        at = int(state.step)
        path = prepare_workdir(workdir) / f"evaluation_{at}.json"
        write_json(path, {"step": at, "evals": run.complete["evals"], "metrics": results})
        print(f"step {at:,} of {workdir}")
        print("\n".join(table(results)))
        print(f"written to {path}")
    return results


def main(overrides: list[tuple[str, str]]) -> None:
    config = read_json(pathlib.Path(flags.FLAGS.workdir).expanduser() / "config.json")
    if flags.FLAGS.config:
        config["evals"] = configs.load(flags.FLAGS.config).get("evals", {})
    for path, text in overrides:
        if path.split(".")[0] != "evals":
            raise ConfigError(
                f"--config.{path}", text, "config.evals alone: the model is trained", "drop it"
            )
        configs.override(config, path, text)
    evaluate(flags.FLAGS.workdir, flags.FLAGS.step, config)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("config", None, "Config file whose evals replace the run's own.")
    flags.DEFINE_string("step", "latest", "Which checkpoint: a step, latest or best.")
    cli.run(main, required=("workdir",))
