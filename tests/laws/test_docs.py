"""The pages say what is so: commands parse, configs bind, paths and keys exist, Python runs.

Every command of a ```sh block is parsed against the flags that its module defines, and its config
is bound with its overrides. What cannot be checked so has a mark, `<!-- needs: ... -->`, on the
line before the block. A ```python block runs; one with a title is a file, which another test runs.
"""

import ast
import dataclasses
import functools
import importlib
import itertools
import pathlib
import pkgutil
import re
import shlex

import jax
import numpy as np
import pytest
from PIL import Image
from support import ROOT, exports, laws
from support.runs import small

from clipx import cli, dataset
from clipx.config import binding, files
from clipx.data.base import Source
from clipx.data.config import DataConfig
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.errors import ConfigError
from clipx.interop import formats
from clipx.models.base import Tower
from clipx.objectives.base import Objective
from clipx.parallel import chips
from clipx.parallel.mesh import MeshConfig
from clipx.serving import evaluation
from clipx.serving.export import Options, export
from clipx.training import assemble, checks, schema
from clipx.training.optimizer import OptimizerConfig
from clipx.training.session import open_session

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Which test runs the command, or the functions that its few lines call.
RUN_BY = {
    "train": "tests/parallel/test_processes.py",
    "evaluate": "tests/test_train.py",
    "export": "tests/test_export.py",
    "report": "tests/test_report.py",
    "compare": "tests/test_compare.py",
    "dataset": "tests/test_dataset.py",
    "teacher": "tests/test_teacher.py",
    "embed": "tests/test_embed.py",
    "search": "tests/test_search.py",
    "plan": "tests/test_plan.py",
    "doctor": "tests/test_doctor.py",
    "bench": "tests/test_bench.py",
}
BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>.+?) -->\n)?^```(?P<kind>\w+)(?P<info>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    kind: str
    title: str  # of a file; "" for others
    needs: str  # what a test machine has not; "" for what is checked
    code: str


@functools.cache
def blocks() -> tuple[Block, ...]:
    return tuple(
        Block(
            page.relative_to(ROOT).as_posix(),
            match["kind"],
            (re.findall(r'title="(.+?)"', match["info"]) or [""])[0],
            match["needs"] or "",
            match["code"],
        )
        for page in PAGES
        for match in BLOCK.finditer(page.read_text())
    )


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block, as words: one a line, more with a quote or a backslash."""
    found, line = [], ""
    for part in code.replace("\\\n", " ").splitlines():
        line = f"{line}\n{part}" if line else part
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an open quote
            continue
        line = ""
        for chained, own in itertools.groupby(words, lambda word: word in ("&&", ";", "|")):
            found += [] if chained else [list(own)]
    assert not line, line
    return found


def inline(page: pathlib.Path) -> list[list[str]]:
    """Commands in the text and in tables; "..." stands for what is left out."""
    text = BLOCK.sub("", page.read_text())
    spans = re.findall(r"`((?:python -m clipx\.\w|launch/[\w.]+ |sbatch )[^`]+)`", text)
    return [[word for word in shlex.split(span) if word != "..."] for span in spans]


@functools.cache
def flags_of(name: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The flags that a command defines, by name, with their kind; and those it requires."""
    found, required = {}, ()
    for node in ast.walk(ast.parse((ROOT / "clipx" / f"{name}.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr.startswith("DEFINE_"):
                found[node.args[0].value] = node.func.attr.removeprefix("DEFINE_")
            for keyword in node.keywords:
                if keyword.arg == "required":
                    required = ast.literal_eval(keyword.value)
    return found, required


def bound(spec: str, overrides) -> None:
    """Raises `ConfigError` for a config that does not bind; nothing is traced or opened."""
    config = binding.bind(schema.Config, cli.load_config(spec, overrides))
    objective, sections = assemble.bind_objective(config)
    data, _ = schema.data_section(config.data)
    checks.check_episodes(config.train, data, objective, sections["objective"]["name"])
    for name, section in config.evals.items():
        schema.EvalSpec.check(name, section)


def check_clipx(name: str, words: list[str]) -> None:
    assert name in RUN_BY and pathlib.Path(ROOT, RUN_BY[name]).is_file()
    known, required = flags_of(name)
    if name == "dataset":
        assert words and words[0] in dataset.COMMANDS, words
        words = words[1:]
    words, overrides = cli.take_overrides(words)
    given = {}
    for word in words:
        flag, equals, value = word.removeprefix("--").partition("=")
        if not equals and known.get(flag.removeprefix("no")) == "bool":
            flag, value = flag.removeprefix("no"), "true"
        if flag == "help":  # every command has it
            continue
        assert word.startswith("--") and flag in known and (value or equals), word
        given[flag] = value
    if "..." in given.values() or "--help" in words:
        return
    assert set(required) <= set(given) or not words, (required, words)
    for spec in filter(None, given.get("config", "").split(",")):
        if name == "compare":
            variants = files.variants(spec)
            assert set(filter(None, given.get("variants", "").split(","))) <= {*variants}
            spec = f"{spec}:{variants[0]}"
        bound(spec, overrides)
    for topology in filter(None, given.get("topology", "").split(",")):
        chips.parse(topology)
    if "format" in given:
        known = (*formats.FORMATS, *formats.WRITTEN)
        assert given["format"] in (*(f.name for f in known), "flat")  # docs/extend.md's
    if name == "evaluate" and "data" in given and "alignment" not in given["evals"]:
        sources = {key: given.get(key, "") for key in ("data", "train_data")}
        for eval_, section in evaluation.chosen({}, given["evals"], **sources).items():
            schema.EvalSpec.check(eval_, section)


def check_script(path: str, words: list[str], rest: list[str]) -> None:
    """`rest`: what the script passes on to `clipx.train`."""
    text = (ROOT / path).read_text()
    for word in words:
        flag = word.partition("=")[0]
        assert not flag.startswith("--") or re.search(rf"{flag}\b", text), (path, word)
    if rest:
        check_clipx("train", rest)


def check_install(words: list[str]) -> None:
    """clipx itself, from a checkout or by its distribution, with extras that it has."""
    packages = [word for word in words if not word.startswith("-")]
    (found,) = (re.fullmatch(r"(?:\.|clipx-jax)(?:\[(.+)\])?", package) for package in packages)
    known = re.findall(r'^ +"(\w+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert found and set(filter(None, (found[1] or "").split(","))) <= {*known}, words


def check(words: list[str]) -> None:
    """Fails for a command that would not be understood, and for one that nothing here knows."""
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    split = words.index("--") if "--" in words else len(words)
    words, rest = [words[0].removeprefix(".venv/bin/"), *words[1:split]], words[split + 1 :]
    if words[0] == "sbatch":
        script = next(i for i, word in enumerate(words) if word.startswith("launch/"))
        check_script(words[script], [], [w for w in words[script + 1 :] if w != "--doctor"])
    elif words[0].startswith("launch/"):
        check_script(words[0], words[1:], rest)
    elif words[:2] == ["python", "-m"] and words[2].startswith("clipx."):
        check_clipx(words[2].removeprefix("clipx."), words[3:])
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / w).exists() for w in words[3:] if w.startswith("tests"))
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        check_script(words[1], words[2:], [])
    elif words[:2] == ["pip", "install"]:
        check_install(words[2:])
    elif words != ["python3", "-m", "venv", ".venv"] and words != [".", ".venv/bin/activate"]:
        raise AssertionError(f"{words}: what checks it? `<!-- needs: ... -->` where nothing can")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands(page):
    name = page.relative_to(ROOT).as_posix()
    for block in blocks():
        if block.page == name and block.kind == "sh" and not block.needs:
            for words in commands(block.code):
                check(words)
    for words in inline(page):
        check(words)


def test_wrong_commands_are_seen():
    for wrong in (
        "python -m clipx.train --config=clip:small --workdir=a --confg=b",
        "python -m clipx.train --config=clip:small --workdir=a --config.train.batch=3",
        "python -m clipx.train --config=clip:small",
        "python -m clipx.dataset veryfi --config=clip:small",
        "python -m clipx.evaluate --workdir=a --evals=retrieval --data=source=nowhere",
        "launch/local.sh --process=4 -- --config=clip:small --workdir=a",
        "pip install something",
        "pip install -e '.[none]'",
        "rm -rf runs",
    ):
        with pytest.raises((AssertionError, ConfigError)):
            check(shlex.split(wrong))


def test_every_command_is_run_by_a_test():
    for name, file in RUN_BY.items():
        text = (ROOT / file).read_text()
        own = {"evaluate": "serving.evaluation", "report": "reporting", "bench": "clipx.planning"}
        assert own.get(name, name) in text, (name, file)


NAMES = r"((?:`\w+`(?:, | and )?)+)"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_paths_and_what_is_in_them(page):
    text = page.read_text()
    roots = "clipx|tests|configs|launch|benchmarks|notebooks"
    for path in re.findall(rf"`((?:{roots})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    pairs = [
        (path, names) for names, path in re.findall(rf"{NAMES} (?:in|of) `(\w+/[\w/]+\.py)`", text)
    ]
    pairs += re.findall(rf"`(clipx/[\w/]+\.py)`: {NAMES}", text)
    for path, names in pairs:
        for name in re.findall(r"\w+", names.replace(" and ", " ")):
            assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), (path, name)


def test_pictures_name_files_that_are_there():
    for picture in (ROOT / "docs" / "pictures").glob("*.svg"):
        for path in re.findall(
            r"\b((?:\w+/)+\w+\.py|cli\.py|types\.py|errors\.py)", picture.read_text()
        ):
            assert (ROOT / "clipx" / path).exists() or (ROOT / path).exists(), (picture.name, path)


def subclasses(package: str, base: type) -> list[type]:
    folder = importlib.import_module(f"clipx.{package}").__path__
    found = []
    for module in pkgutil.iter_modules(folder):
        try:
            found.append(binding.find(package, module.name, base))
        except ConfigError:  # a file of another kind
            continue
    return found


@functools.cache
def keys() -> dict[str, set[str]]:
    """The keys of each section of a config, those of all classes that it may name."""
    classes = {
        "train": [schema.TrainConfig],
        "optimizer": [OptimizerConfig],
        "mesh": [MeshConfig],
        "tokenizer": [TokenizerConfig],
        "data": [DataConfig, *subclasses("data.sources", Source)],
        "objective": subclasses("objectives", Objective),
        "image": subclasses("models", Tower),
        "text": subclasses("models", Tower),
    }
    found = {
        name: {f for cls in all_ for f in binding.fields(cls)} for name, all_ in classes.items()
    }
    for name in ("objective", "image", "text"):
        found[name].add("name")
    return found


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_config_keys(page):
    spans = re.findall(r"`(?:--)?(?:config\.)?(\w+)\.(\w+)(?:[.=\[:][^`]*)?`", page.read_text())
    ends = ("py", "md", "json", "jsonl", "html", "model", "sh", "sbatch", "npy", "txt", "module")
    for section, key in spans:
        if section in keys() and key not in ends:
            assert key in keys()[section], f"{section}.{key}"


def test_the_readme_is_short():
    """At most 700 words, as `wc -w` counts them: code, tables and marks count too."""
    assert len((ROOT / "README.md").read_text().split()) <= 700


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that has what the examples name: a run, and two images."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 32), colour).save(f"{name}.png")
    return tmp_path


# README.md's block is run by tests/test_load.py, on a workdir and on an open_clip folder
PYTHON = sorted({b.page for b in blocks() if b.kind == "python"} - {"README.md"})


@pytest.mark.parametrize("page", PYTHON)
def test_python(page, folder):
    """The blocks of a page, in one namespace. Those that open a run find one, not trained."""
    code = [
        b.code for b in blocks() if (b.page, b.kind, b.title, b.needs) == (page, "python", "", "")
    ]
    if any("runs/quickstart" in part for part in code):
        config = small(("train.best", ""))
        exports.save(folder / "runs" / "quickstart", config, devices=jax.devices()[:1])
    names: dict = {}
    for number, part in enumerate(code):
        exec(compile(part, f"{page}:{number}", "exec"), names)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The files of docs/extend.md, where their packages find them."""
    for block in blocks():
        if block.page == "docs/extend.md" and block.title:
            file = tmp_path / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.code)
    for package in ("objectives", "models", "data.sources", "evaluators", "interop"):
        module = importlib.import_module(f"clipx.{package}")
        own = str(tmp_path / "clipx" / package.replace(".", "/"))
        monkeypatch.setattr(module, "__path__", [*module.__path__, own])
    return tmp_path


@pytest.mark.slow  # trains with them
def test_the_examples_of_extend_work_together(written, monkeypatch):
    """Trained on the source with the objective and the tower, evaluated, exported and proven."""
    pictures = written / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        pixels = rng.integers(0, 256, (20, 16, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"a_dog_and_{'abcdefghijklmnop'[i]}_cats.png")
    source = {"source": "file_names", "path": str(pictures)}
    config = small(("train.batch_size", "8"), ("train.total_steps", "2"), ("train.best", ""))
    config |= {
        "objective": {"name": "max_hinge", "margin": 0.3},
        "text": {"name": "bag_of_words", "width": 24, "embed_dim": 16, "dtype": "float32"},
        "data": source,
        "evals": {"alignment": {"data": source}},
    }
    config["tokenizer"] |= {"vocab_size": 40}
    session = open_session(config, str(written / "run"), jax.devices()[:1])
    _, finished = session.train()
    assert finished
    last = (written / "run" / "metrics.jsonl").read_text()
    assert '"alignment/alignment"' in last and '"chance_loss": 0.6' in last
    flat = importlib.import_module("clipx.interop.flat").Flat()
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, flat))
    done = export(written / "run", Options("flat", written / "flat", verify=True))
    assert done.proof is not None and (written / "flat" / "README.md").exists()


VARIANT = "max_hinge:margin=0.3"  # of an objective: on towers that compile in no time


def test_the_example_of_an_objective_keeps_its_rows_apart(written):
    laws.check_rows(VARIANT)


@pytest.mark.slow
def test_the_example_of_an_objective_is_the_same_on_a_mesh(written):
    laws.check_topology_and_slices(VARIANT, "float32", 1e-5)


def test_the_example_of_a_config(written):
    bound(str(written / "configs" / "max_hinge.py"), [])
