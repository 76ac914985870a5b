"""Files of every kind that clipx reads, and damage to them as disks, tools and people do it."""

import codecs
import gzip
import io
import json
import pathlib
import re
import tarfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from clipx.config import files
from clipx.config.binding import bind
from clipx.data import pictures, row_arrays
from clipx.data.base import Example
from clipx.data.quarantine import Quarantine
from clipx.data.sources.auto import Auto
from clipx.data.sources.files import Files
from clipx.data.sources.folder import Folder
from clipx.data.sources.table import Table
from clipx.data.sources.webdataset import WebDataset
from clipx.data.text import tokenizers, vocabulary
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.data.text.wordnet import WordNet
from clipx.errors import BadSample
from clipx.evaluators.bias import Bias
from clipx.evaluators.grounding import Grounding
from clipx.evaluators.zero_shot import ZeroShot
from clipx.training import guesses, metrics, workdir
from support import ROOT
from support.pictures import encode, photo

JPEG = [encode(photo(20, 24, seed), "JPEG") for seed in range(6)]
NAMES = [f"{i:03d}" for i in range(6)]
_PICTURES = {f"{name}.jpg": data for name, data in zip(NAMES, JPEG)}
CAPTIONS = [f"a photo of thing {i}, on a table" for i in range(6)]


def rows(source) -> None:
    """Reads every row of a source as a run does: bad rows are counted there, and passed over."""
    assert len(source) < 1000
    list(source.keys())
    for row in range(len(source)):
        try:
            example = source[row]
            pictures.header(example)
            pictures.evaluation(example, 8)
        except BadSample as error:
            assert "\n" not in str(error)


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pairs() -> bytes:
    members = {}
    for i, name in enumerate(NAMES):
        members[f"{name}.jpg"] = JPEG[i]
        members[f"{name}.txt"] = CAPTIONS[i].encode()
        members[f"{name}.json"] = json.dumps({"caption": CAPTIONS[i], "width": 24}).encode()
        members[f"{name}.cls"] = str(i % 2).encode()
    return tar(members)


def lines(separator: str) -> bytes:
    head = ["image", "caption", "label"]
    body = [[f"{name}.jpg", CAPTIONS[i], str(i % 2)] for i, name in enumerate(NAMES)]
    quoted = [[f'"{cell}"' if "," in cell else cell for cell in row] for row in [head, *body]]
    return "".join(separator.join(row) + "\n" for row in quoted).encode()


def jsonl() -> bytes:
    entries = [{"image": f"{n}.jpg", "caption": [c, c[::-1]]} for n, c in zip(NAMES, CAPTIONS)]
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def parquet() -> bytes:
    out = io.BytesIO()
    table = {"image": [f"{name}.jpg" for name in NAMES], "caption": CAPTIONS}
    pyarrow.parquet.write_table(pyarrow.table(table), out)
    return out.getvalue()


def array(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(photo(30, 40)).save(out, kind)
    return out.getvalue()


def wordpieces() -> bytes:
    marks = {i: mark for mark, i in vocabulary.WORDPIECE_MARKS.items()}
    return "".join(marks.get(i, f"w{i}") + "\n" for i in range(120)).encode()


MERGES = b"#version: 0.2\n" + b"".join(f"{c} {d}\n".encode() for c, d in ("th", "an", "in", "er"))
ABOUT = {"fingerprint": "f", "rows": 6}


def prompts() -> bytes:
    lists = "classes = [\n    'cat',\n    'dog',\n]\n\ntemplates = [\n    'a photo of a {}.',\n]\n"
    return f"# Prompts\n\n## STL10\n\n```bash\n{lists}```\n".encode()


def tokenize(name: str, path: pathlib.Path, size: int) -> None:
    tokenizer = tokenizers.build(bind(TokenizerConfig, {"name": name, "path": str(path)} | (
        {"vocab_size": size} if size else {})))  # fmt: skip
    tokenizer(CAPTIONS)
    tokenizers.load(tokenizer.save())


def look_up(path: pathlib.Path) -> None:
    words = WordNet(str(path.parent))
    for word in ("dog", "dogs", "dogges", "cat"):
        words.lemmas(word)


def look(path: pathlib.Path) -> None:
    example = Example(path.read_bytes(), (), 0, path.name)
    try:
        pictures.header(example)
        pictures.evaluation(example, 8)
        draws = np.full((2, 10, 4), 0.5)
        out = np.empty((2, 8, 8, 3), np.uint8)
        pictures.views(example, ((0.1, 1.0),) * 2, draws, (True, False), out)
    except BadSample as error:
        assert "\n" not in str(error)


class Kind(NamedTuple):
    """A kind of file, and what reads it."""

    name: str  # of the file
    data: Callable[[], bytes]
    read: Callable[[pathlib.Path], object]
    beside: dict[str, bytes] = {}  # files that stay as they are


def arrow() -> bytes:
    out = io.BytesIO()
    pictures = [{"bytes": data, "path": name} for data, name in zip(JPEG, _PICTURES)]
    table = pyarrow.table({"image": pictures, "captions": [[c, c[::-1]] for c in CAPTIONS]})
    with pyarrow.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    return out.getvalue()


def embedded() -> bytes:
    out = io.BytesIO()
    pictures = [{"bytes": data, "path": name} for data, name in zip(JPEG, _PICTURES)]
    table = pyarrow.table({"image": pictures, "caption": CAPTIONS, "label": [0, 1] * 3})
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def coco() -> bytes:
    images = [{"id": i, "file_name": name} for i, name in enumerate(_PICTURES)]
    captions = [{"id": 9 + i, "image_id": i, "caption": c} for i, c in enumerate(CAPTIONS)]
    return json.dumps({"images": images, "annotations": captions}).encode()


def sentencepiece() -> bytes:
    return vocabulary.train_sentencepiece(CAPTIONS * 4, 60, "bpe")


def wordnet() -> dict[str, bytes]:
    """A WordNet of one noun."""
    synset = b"00000000 05 n 02 dog 0 hound 0 000 | an animal\n"
    files = {f"{kind}.{part}": b"" for kind in ("index", "data") for part in _PARTS}
    files |= {f"{part}.exc": b"" for part in _PARTS} | {"noun.exc": b"dogges dog\n"}
    return files | {"index.noun": b"dog n 1 0 1 1 00000000  \n", "data.noun": synset}


def run_config() -> bytes:
    return json.dumps(files.load(str(ROOT / "configs" / "quickstart.py"))).encode()


def saved_tokenizer() -> bytes:
    return json.dumps(tokenizers.build(TokenizerConfig("clip_bpe")).save()).encode()


def table_lines(entry: Callable[[int], dict]) -> bytes:
    return "".join(json.dumps(entry(i)) + "\n" for i in range(6)).encode()


def guessed() -> bytes:
    one = {"value": "caption", "reason": "the only column of texts"}
    return json.dumps({"config.data.captions": one}).encode()


def annotations(**entry) -> Callable[[], bytes]:
    return lambda: json.dumps(
        [{"image": "000.jpg", **entry}, {"image": "001.jpg", **entry}]
    ).encode()


_TEXTS = {f"{name}.txt": text.encode() for name, text in zip(NAMES[2:], CAPTIONS)}
_PARTS = ("noun", "verb", "adj", "adv")
KINDS = (
    Kind("pairs.tar", pairs, lambda p: rows(WebDataset(str(p)))),
    Kind("kept.tar", pairs, lambda p: rows(WebDataset(str(p), truncated="keep"))),
    Kind("rows.csv", lambda: lines(","), lambda p: rows(Table(str(p))), _PICTURES),
    Kind("rows.tsv", lambda: lines("\t"), lambda p: rows(Table(str(p), label="label")), _PICTURES),
    Kind("rows.txt", lambda: lines("|"), lambda p: rows(Table(str(p))), _PICTURES),
    Kind("rows.jsonl", jsonl, lambda p: rows(Table(str(p))), _PICTURES),
    Kind("rows.parquet", parquet, lambda p: rows(Table(str(p))), _PICTURES),
    Kind(
        "classes.tar",
        lambda: tar({f"val/{'ab'[i % 2]}/{n}.jpg": JPEG[i] for i, n in enumerate(NAMES)}),
        lambda p: rows(Folder(str(p))),
    ),
    Kind(
        "names.json",
        lambda: b'{"a": "an ape", "b": "a bee"}',
        lambda p: rows(Folder(str(p.parent), str(p))),
        {f"{'ab'[i % 2]}/{name}.jpg": JPEG[i] for i, name in enumerate(NAMES)},
    ),
    *(
        Kind(f"picture.{kind.lower()}", lambda kind=kind: picture(kind), look)
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
    ),
    Kind("merges.txt", lambda: MERGES, lambda p: tokenize("clip_bpe", p, 518)),
    Kind("merges.txt.gz", lambda: gzip.compress(MERGES), lambda p: tokenize("clip_bpe", p, 518)),
    Kind("vocab.txt", wordpieces, lambda p: tokenize("wordpiece", p, 120)),
    Kind(
        "teacher.npy",
        lambda: array(np.ones((6, 4), np.float32)),
        lambda p: row_arrays.open_teacher(str(p), rows=6, fingerprint="f", width=4),
        {"teacher.json": json.dumps(ABOUT).encode()},
    ),
    Kind(
        "clusters.json",
        lambda: json.dumps(ABOUT).encode(),
        lambda p: row_arrays.open_clusters(str(p.with_suffix(".npy")), rows=6, fingerprint="f"),
        {"clusters.npy": array(np.zeros(6, np.int32))},
    ),
    Kind("any.tar", pairs, lambda p: rows(Auto(str(p)))),
    Kind("any.csv", lambda: lines(","), lambda p: rows(Auto(str(p))), _PICTURES),
    *(
        Kind(name, lambda data=data: data, lambda p: rows(Files(str(p.parent))), _PICTURES | _TEXTS)
        for name, data in (
            ("000.json", json.dumps({"caption": CAPTIONS[0]}).encode()),
            ("001.txt", "\n".join(CAPTIONS).encode()),
        )
    ),
    Kind("rows.arrow", arrow, lambda p: rows(Table(str(p)))),
    Kind("pictures.parquet", embedded, lambda p: rows(Table(str(p), label="label"))),
    Kind("coco.json", coco, lambda p: rows(Table(str(p))), _PICTURES),
    Kind("words.model", sentencepiece, lambda p: tokenize("sentencepiece", p, 60)),
    Kind("tokenizer.json", saved_tokenizer, lambda p: tokenizers.load(workdir.read_json(p))),
    *(
        Kind(name, lambda name=name: wordnet()[name], look_up, wordnet())
        for name in ("index.noun", "data.noun", "noun.exc")
    ),
    Kind("config.json", run_config, lambda p: workdir.read_config(p.parent)),
    Kind("guesses.json", guessed, lambda p: guesses.read(p.parent)),
    Kind(
        "metrics.jsonl",
        lambda: table_lines(lambda i: {"step": i, "loss": 1.5, "grad_norm": "NaN"}),
        lambda p: metrics.read(p.parent),
    ),
    Kind(
        "quarantine.jsonl",
        lambda: table_lines(lambda i: {"step": i, "row": i, "key": "k", "reason": "no caption"}),
        Quarantine,
    ),
    Kind("classes.txt", lambda: b"cat\ndog\nfowl\n", lambda p: ZeroShot(None, str(p))),
    Kind("classes.json", lambda: b'["cat", "dog"]', lambda p: ZeroShot(None, str(p))),
    Kind(
        "templates.txt",
        lambda: b"a photo of a {}.\na {}\n",
        lambda p: ZeroShot(None, ("cat", "dog"), str(p)),
    ),
    Kind("prompts.md", prompts, lambda p: ZeroShot(None, preset="stl10", lists=str(p))),
    Kind(
        "groups.json",
        lambda: json.dumps([{"image": f"00{i}.jpg", "group": "ab"[i]} for i in range(2)]).encode(),
        lambda p: Bias(pictures.Pictures(8), str(p.parent), str(p), ("a cook",)),
        _PICTURES,
    ),
    Kind(
        "boxes.json",
        annotations(image_id=1, box=[1, 2, 3, 4], expression="the man", split="val"),
        lambda p: Grounding(pictures.Pictures(8), None, str(p.parent), str(p), splits=("val",)),
        _PICTURES,
    ),
)


def damaged(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """The bytes after one to three accidents, and their names."""
    names = []
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        accident = ACCIDENTS[rng.integers(len(ACCIDENTS))]
        data = accident(data, rng)
        names.append(accident.__name__)
    return data, ", ".join(names)


def _at(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    """Two places in the bytes, in order."""
    start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    return start, stop


def flip(data, rng):
    out = bytearray(data)
    for place in rng.integers(0, max(len(out), 1), int(rng.choice([1, 4, 32]))):
        if out:
            out[place] ^= int(rng.integers(1, 256))
    return bytes(out)


def cut(data, rng):
    return data[: rng.integers(0, len(data) + 1)]


def lose(data, rng):
    start, stop = _at(data, rng)
    return data[:start] + data[stop:]


def repeat(data, rng):
    start, stop = _at(data, rng)
    return data[:stop] + data[start:]


def twice(data, rng):
    return data + data


def zero(data, rng):
    start, stop = _at(data, rng)
    return data[:start] + bytes(stop - start) + data[stop:]


def noise(data, rng):
    start, _ = _at(data, rng)
    return data[:start] + rng.bytes(int(rng.choice([1, 7, 600]))) + data[start:]


def empty(data, rng):
    return b""


def ends(data, rng):
    return data.replace(b"\n", [b"\r\n", b"\r", b"\n\n", b"\0\n"][rng.integers(4)])


def mark(data, rng):
    return [codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE][rng.integers(3)] + data


def wide(data, rng):
    code = ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp500"][rng.integers(5)]
    return data.decode("latin-1").encode(code, "replace")


def mark_up(data, rng):
    """A character that has a meaning somewhere."""
    start, _ = _at(data, rng)
    return data[:start] + _MEANING[rng.integers(len(_MEANING))] + data[start:]


def huge(data, rng):
    """Another number where one stands."""
    places = list(re.finditer(rb"\d+", data[:100_000]))
    if not places:
        return data
    place = places[rng.integers(len(places))]
    number = _NUMBERS[rng.integers(len(_NUMBERS))]
    return data[: place.start()] + number + data[place.end() :]


def value(data, rng):
    """Another value in JSON."""
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        return data
    odd = (None, [], {}, "", 3, [None], {"x": 1}, "\ud800", True, -1, 1e30, [[1]])
    node, entry = parsed, odd[rng.integers(len(odd))]
    while isinstance(node, (dict, list)) and node:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = list(keys)[rng.integers(len(node))]
        if rng.random() < 0.5 or not isinstance(node[key], (dict, list)):
            node[key] = entry
            return json.dumps(parsed).encode()
        node = node[key]
    return json.dumps(entry).encode()


_MEANING = (b'"', b"'", b"\\", b",", b"\t", b"[", b"}", b"{}", b"#", b"[" * 50_000, b"\x1a")
_NUMBERS = (b"-1", b"0", b"9" * 30, b"1e999", b"NaN", b"null", b'""', b"9" * 5000)
ACCIDENTS = (
    *(flip, cut, lose, repeat, twice, zero, noise, empty),
    *(ends, mark, wide, mark_up, huge, value),
)
