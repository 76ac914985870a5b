"""Malformed files of every kind that clipx reads, each made from a number, and what comes of them.

    python -m support.hostile FIRST LAST FOLDER

reads the files FIRST to LAST in a process of its own, in FOLDER alone, and appends a line of JSON
for each to FOLDER/outcomes.jsonl: loaded, refused (in a few lines), traceback, hang, code run, or
file outside. A process that dies leaves no line for the file that killed it.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save

from clipx.errors import BadSample, ConfigError, DataError, MissingLibrary
from clipx.interop import huggingface, libraries, load, open_clip, weights
from clipx.interop.encoders import image, text
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.training import pretrained
from support import damage, encoders, torch_files, towers
from support.malice import MARK, hostile

SECONDS = 20  # in which a small file is read


class Kind(NamedTuple):
    """A file to be changed, the files beside it, and what reads them."""

    name: str
    data: bytes
    read: Callable[[pathlib.Path], object]
    beside: dict[str, bytes] = {}


class TooSlow(BaseException):
    """Nothing that reads a file may catch it."""


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _encoder(describe, folder: pathlib.Path) -> None:
    found = describe(str(folder))
    found.read()


def _model(folder: pathlib.Path) -> None:
    load.load(folder)
    pretrained.open_tokenizer(str(folder))


def _folders(scratch: pathlib.Path):
    """(name, folder, reader) of models as other libraries keep them."""
    words, fields = towers.few_words()
    clip = towers.model(
        ViT(**towers.VIT, **towers.BOTH), TextTransformer(**fields, **towers.BOTH), words
    )
    for format_ in (open_clip.OpenClip(), huggingface.HuggingFace()):
        folder = scratch / type(format_).__name__
        folder.mkdir(parents=True)
        format_.write(clip, folder, str(folder))
        yield folder, _model
    index = scratch / "parts"
    shutil.copytree(scratch / "HuggingFace", index)
    (index / "model.safetensors").rename(index / "model-00001-of-00001.safetensors")
    names = weights.names(index / "model-00001-of-00001.safetensors", "-")
    parts = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (index / "model.safetensors.index.json").write_text(json.dumps(parts))
    yield index, _model
    tower = encoders.bert_tower("bert", pool="mean", dense_width=12, normalize=True)
    params = encoders.write_bert(scratch / "sentences", "bert", tower)
    encoders.write_modules(scratch / "sentences", tower, params)
    encoders.write_tokenizer(scratch / "sentences", "bert")
    yield scratch / "sentences", functools.partial(_encoder, text.describe)
    for name, config in (
        ("timm", {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3}}),
        ("dino", {"model_type": "dinov2", "hidden_size": 32, "num_attention_heads": 2}),
    ):
        (scratch / name).mkdir()
        (scratch / name / "config.json").write_text(json.dumps(config))
        (scratch / name / "model.safetensors").write_bytes(save({"x": np.zeros(3)}))
        yield scratch / name, functools.partial(_encoder, image.describe)


@functools.cache
def kinds() -> tuple[Kind, ...]:
    """Every kind: rows, pictures, vocabularies, run files, models."""
    with contextlib.suppress(MissingLibrary):
        libraries.require("torch")  # now: it takes seconds, which no file is to blame for
    made = [Kind(k.name, k.data(), k.read, k.beside) for k in damage.KINDS]
    scratch = pathlib.Path("kinds")
    for folder, read in _folders(scratch):
        files = _contents(folder)
        for name in files:
            if name.endswith((".json", ".txt", ".safetensors")):
                rest = {other: data for other, data in files.items() if other != name}
                made.append(Kind(name, files[name], functools.partial(_above, name, read), rest))
    state = b"}(" + torch_files.text("visual.x") + torch_files.tensor() + b"u"
    script = torch_files.module("M", visual=torch_files.module("V", x=torch_files.tensor()))
    for name, value, is_script in (("script.pt", script, True), ("state.pt", state, False)):
        data = torch_files.write(scratch / name, value, is_script).read_bytes()
        made.append(Kind(name, data, lambda p: weights.read(p, "config.init_from")))
    shutil.rmtree(scratch)
    return tuple(made)


def _above(name: str, read: Callable, file: pathlib.Path) -> object:
    """Reads the folder of a model that has the file `name` somewhere."""
    return read(file.parents[name.count("/")])


def make(number: int) -> tuple[Kind, bytes, str]:
    """(kind, content of its file, what was done to it) of a number: half by accident, half by
    somebody who means harm."""
    kind, rng = kinds()[number % len(kinds())], np.random.default_rng(number)
    if (number // len(kinds())) % 2:
        return kind, *hostile(kind.name, kind.data, rng)
    return kind, *damage.damaged(kind.data, rng)


_watched: list[str] = []  # what reading the present file did beside reading
_reading: list[pathlib.Path] = []  # the folder of the file that is read now; empty between files
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen",
         "pty.spawn", "pickle.find_class", "socket.connect", "socket.getaddrinfo")  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_WRITES = ("os.mkdir", "os.rename", "os.symlink", "os.link", "os.remove", "os.truncate")


def _hook(event: str, given: tuple) -> None:
    if not _reading:
        return
    if event in _RUNS:
        _watched.append(f"code run: {event} {given!r:.100}")
    elif event in _WRITES or (event == "open" and given[2] & _WRITING):
        if isinstance(given[0], int) or os.fsdecode(given[0]) == os.devnull:
            return
        path = pathlib.Path(os.fsdecode(given[0])).resolve()
        programs = os.environ.get("JAX_COMPILATION_CACHE_DIR")  # JAX's own, of a tower that is read
        if programs and path.is_relative_to(pathlib.Path(programs).resolve()):
            return
        if not path.is_relative_to(_reading[0]):
            _watched.append(f"file outside: {event} {given!r:.100}")


@functools.cache
def _watch() -> None:
    sys.addaudithook(_hook)


def outcome(number: int, folder: pathlib.Path) -> tuple[str, str]:
    """(what comes of file `number`, what was done to it and what went wrong). The file is written
    into `folder`, which is the working directory."""
    kind, data, how = make(number)
    said = f"{number}: {kind.name}, {how}"
    at = folder / "read"
    shutil.rmtree(at, ignore_errors=True)
    for name, content in (kind.beside | {kind.name: data}).items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(content)
    _watch()
    _watched.clear()
    _reading.append(folder.resolve())
    signal.alarm(SECONDS)
    try:
        kind.read(at / kind.name)
        found = "loaded"
    except (ConfigError, DataError, BadSample) as error:
        found = "refused" if len(str(error).splitlines()) <= 40 else "traceback"
    except TooSlow:
        found = "hang"
    except BaseException as error:
        found, said = "traceback", f"{said}: {type(error).__name__}: {error!s:.200}"
    finally:
        signal.alarm(0)
        _reading.clear()
    if (folder / MARK).exists():
        _watched.append("code run: the mark is there")
    if _watched:
        found, said = _watched[0].partition(":")[0], f"{said}: {_watched[0]}"
    return found, said


@contextlib.contextmanager
def timed():
    """Context in which a file that is read for too long raises `TooSlow`."""

    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def main(first: int, last: int, folder: pathlib.Path) -> None:
    os.chdir(folder)
    kinds()
    with timed(), open("outcomes.jsonl", "a", buffering=1) as out:
        for number in range(first, last):
            out.write(json.dumps([number, *outcome(number, folder)]) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]).resolve())
