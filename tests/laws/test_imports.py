"""Rules for imports: packages import only from lower floors, and some libraries only in certain
files. Files and functions stay short."""

import ast
import fnmatch
import functools
import os
import subprocess
import sys

import pytest
from support import ROOT


def files_of(folder: str) -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.py"))


FILES, TESTS = files_of("clipx"), files_of("tests")
SOURCES = FILES + TESTS + files_of("configs")
FLOORS = (
    ("types", "errors", "config", "configs"),
    ("losses", "models", "ops", "parallel"),
    ("objectives", "data", "evaluators", "interop"),
    ("training",),
    ("planning", "reporting", "serving"),
    (
        *("cli", "train", "evaluate", "export", "plan", "dataset"),
        *("report", "compare", "teacher", "embed", "search", "doctor", "bench"),
    ),
)
SHARED = {"compare": ("cli", "train")}  # what a command may import; all others only cli
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
COMMANDS = tuple(f"clipx/{name}.py" for name in FLOORS[-1])
# Names, and the only files that may use them. `*` in a pattern crosses folders.
ONLY = {
    # models/attention.py maps a kernel over rows and heads: the partitioner cannot look into it. No
    # rows meet there, so collectives stay forbidden in that file.
    "jax.shard_map": ("clipx/losses/*", "clipx/ops/kmeans.py", "clipx/models/attention.py"),
    "jax.experimental.pallas": ("clipx/models/attention.py", "clipx/losses/token_kernel.py"),
    "jax.experimental.shard_map": (),
    "jax.sharding.Mesh": ("clipx/parallel/mesh.py", "clipx/training/run.py"),
    "jax.sharding.NamedSharding": ("clipx/parallel/mesh.py", "clipx/training/run.py"),
    "jax.make_mesh": ("clipx/parallel/mesh.py", "clipx/training/run.py"),
    **{
        f"jax.lax.{name}": ("clipx/losses/*", "clipx/ops/kmeans.py")
        for name in (
            *("all_gather", "all_to_all", "axis_index", "pmax", "pmean", "pmin", "ppermute"),
            *("pshuffle", "psum", "psum_scatter", "pvary", "ragged_all_to_all"),
        )
    },
    "grain": ("clipx/data/*",),
    "tensorflow_datasets": ("clipx/data/*",),
    "orbax": ("clipx/training/orbax_files.py", "clipx/parallel/processes.py"),
    "torch": (),
    "jax._src": (),
    # grain reads an absl flag: the loader marks flags as parsed if no command has done so
    "absl": (*COMMANDS, "clipx/data/loader.py"),
}


@functools.cache
def names(file: str, text: str | None = None) -> set[str]:
    """Every dotted name that a file imports or uses through an import, such as `jax.lax.psum`."""
    tree = ast.parse((ROOT / file).read_text() if text is None else text, file)
    found, alias = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                found.add(item.name)
                top = item.name.partition(".")[0]
                alias[item.asname or top] = item.name if item.asname else top
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: a relative import"
            for item in node.names:
                found.add(f"{node.module}.{item.name}")
                alias[item.asname or item.name] = f"{node.module}.{item.name}"
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in alias:
            found.add(".".join([alias[node.id], *reversed(parts)]))
    return found


def is_part(name: str, whole: str) -> bool:
    return name == whole or name.startswith(whole + ".")


def room(file: str) -> str:
    """`losses` for clipx/losses/contrastive.py, `train` for clipx/train.py."""
    return file.removeprefix("clipx/").removesuffix(".py").split("/")[0]


def broken(file: str, text: str | None = None) -> list[str]:
    """The violations of the rules by the imports of a file."""
    faults, own = [], room(file)
    for name in sorted(names(file, text)):
        for what, allowed in ONLY.items():
            if is_part(name, what) and not any(fnmatch.fnmatch(file, a) for a in allowed):
                faults.append(f"{name}: {what} is for {', '.join(allowed) or 'nobody'}")
        if not name.startswith("clipx.") or own == "__init__":
            continue
        other = name.split(".")[1]
        if other not in FLOOR:
            faults.append(f"{name}: no such room")
        elif FLOOR[other] > FLOOR[own]:
            faults.append(f"{name}: floor {FLOOR[other]}, from floor {FLOOR[own]}")
        elif 0 < FLOOR[own] == FLOOR[other] and other not in (own, *SHARED.get(own, ("cli",))):
            faults.append(f"{name}: {own} and {other} are on one floor")
    return faults


def test_few_files_lie_loose():
    loose = [file for file in FILES if file.count("/") == 1]
    assert len(loose) <= 16, loose


def test_no_file_and_no_function_is_long():
    long, functions = [], (ast.FunctionDef, ast.AsyncFunctionDef)
    for file in FILES:
        text = (ROOT / file).read_text()
        if text.count("\n") > 350:
            long.append(file)
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, functions)]
        long += [f"{file}: {n.name}" for n in nodes if n.end_lineno - n.lineno >= 80]
    assert not long


def test_rules():
    assert [file for file in FILES if room(file) not in {*FLOOR, "__init__"}] == []
    assert {file: faults for file in FILES if (faults := broken(file))} == {}


@pytest.mark.parametrize(
    "file, text",
    [
        ("clipx/losses/x.py", "from clipx.objectives.base import Objective"),
        ("clipx/data/x.py", "from clipx.training import run"),
        ("clipx/data/x.py", "import clipx.evaluators.base"),
        ("clipx/objectives/x.py", "import jax\ndef f(x): return jax.lax.psum(x, 'data')"),
        ("clipx/objectives/x.py", "from jax import lax as l\ny = l.all_gather(1, 'data')"),
        ("clipx/training/step.py", "import jax\nf = jax.shard_map(f)"),
        ("clipx/training/step.py", "import jax.sharding as s\nm = s.Mesh(1, ('a',))"),
        ("clipx/training/step.py", "from jax.sharding import NamedSharding"),
        ("clipx/training/run.py", "def f():\n    import grain.python"),
        ("clipx/training/run.py", "import orbax.checkpoint as ocp"),
        ("clipx/training/checkpoint.py", "import orbax.checkpoint as ocp"),
        ("clipx/training/checkpoint.py", "import torch"),
        ("clipx/training/run.py", "from absl import flags"),
        ("clipx/losses/x.py", "from jax._src import core"),
        ("clipx/training/step.py", "import clipx.attic"),
        ("clipx/training/loop.py", "from clipx.planning import estimate"),
        ("clipx/reporting/page.py", "def f():\n    from clipx.serving import export"),
        ("clipx/report.py", "from clipx import train"),
    ],
)
def test_broken_rules_are_seen(file, text):
    assert len(broken(file, text)) >= 1


def taken_from_tests(file: str, text: str | None = None) -> list[str]:
    """Names that a file imports from test files. Only `support` may be shared."""
    parts = {name: name.split(".") for name in names(file, text)}
    return sorted(
        name
        for name, (top, *rest) in parts.items()
        if top in ("tests", "conftest") or top.startswith("test_")
    )


def test_no_test_imports_another():
    assert {file: taken for file in TESTS if (taken := taken_from_tests(file))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "from test_train import small",
        "import test_laws",
        "def f():\n    from tests.losses.test_siamese import ORACLE",
        "import conftest",
    ],
)
def test_imports_of_tests_are_seen(text):
    assert taken_from_tests("tests/test_x.py", text)


def test_folders_have_one_order():
    """The imports between modules have no cycle."""
    inside = {}
    modules = {file.removesuffix(".py").replace("/", "."): file for file in FILES}
    for module, file in modules.items():
        if not file.endswith("__init__.py"):
            used = names(file)
            below = {m for m in modules if any(is_part(name, m) for name in used)}
            inside[module] = below - {module}
    while inside:
        lowest = {m for m, below in inside.items() if not below & set(inside)}
        assert lowest, f"an import cycle among {sorted(inside)}"
        inside = {m: below for m, below in inside.items() if m not in lowest}


def test_compiles():
    for file in SOURCES:
        compile((ROOT / file).read_text(), file, "exec")


def test_data_needs_no_jax():
    """Data workers need no JAX: clipx.data imports without it, and does not import it."""
    modules = [
        file.removesuffix(".py").replace("/", ".")
        for file in FILES
        if file.startswith("clipx/data/") and not file.endswith("__init__.py")
    ]
    assert "clipx.data.loader" in modules
    code = (
        "import importlib, sys\n"
        "sys.modules['jax'] = None\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "loaded = [m for m in sys.modules if m.split('.')[0] in ('jaxlib', 'flax', 'optax')]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_commands_start_without_what_few_runs_need():
    """Importing the trainer takes little longer than importing JAX, Flax and optax: what reads and
    writes files of models and checkpoints, and what loads rows, is imported when it is used."""
    late = ("orbax", "grain", "ftfy", "safetensors", "tensorflow_datasets", "clipx.interop")
    code = (
        "import sys, clipx.train\n"
        f"loaded = [m for m in sys.modules if any((m + '.').startswith(x + '.') for x in {late})]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
