"""What somebody writes into a file who means harm: code, bombs, lies about sizes, and paths that
lead away."""

import functools
import gzip
import io
import json
import os
import pathlib
import struct
import tarfile

import numpy as np

from support import torch_files

MARK = "code_was_run"  # a file that is there afterwards
CODE = f"touch {MARK}"
_ODD = (None, [], {}, "", 3, -1, True, 1e308, [None], {"x": 1}, [[1]], "../../x", "/etc/passwd")


def hostile(name: str, data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """(a file as somebody makes it who means harm, what was done to it). name: of the file, whose
    ending tells what it is."""
    maker = _pick(rng, _MAKERS.get(name.rpartition(".")[2], [_spliced]))
    return maker(data, rng), maker.__name__.strip("_")


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _shape(data: bytes, rng) -> bytes:
    """JSON of another shape."""
    parsed = json.loads(data)
    node, odd = parsed, _pick(rng, _ODD)
    while isinstance(node, dict | list) and node:
        key = _pick(rng, list(node) if isinstance(node, dict) else range(len(node)))
        if rng.random() < 0.4 or not isinstance(node[key], dict | list):
            node[key] = odd
            return json.dumps(parsed).encode()
        node = node[key]
    return json.dumps(odd).encode()


def _deep(data: bytes, rng) -> bytes:
    return _pick(rng, (b"[", b'{"a":', b'[{"a":')) * 100_000


def _long(data: bytes, rng) -> bytes:
    """A word of megabytes."""
    at = int(rng.integers(len(data) + 1))
    return data[:at] + _pick(rng, (b"x", b"9", b" ", b"\xf0\x9f\x98\x80")) * 2_000_000 + data[at:]


def _spliced(data: bytes, rng) -> bytes:
    """Paths, URLs, commands and formulas in place of a word."""
    words = data.split(b" ") if b" " in data else data.split(b",")
    evil = (
        *(b"../../../../etc/passwd", b"/dev/zero", b"/dev/stdin", b"file:///dev/zero"),
        *(f"|{CODE}".encode(), f"$({CODE})".encode(), b"pipe:", b"http://127.0.0.1:1/a.jpg"),
        *(b"${PATH}", b"{0.__class__}", b"%s%s%n", b"=cmd|' /C calc'!A0", b"\0", b"a" * 100_000),
    )
    words[int(rng.integers(len(words)))] = _pick(rng, evil)
    return b" ".join(words)


def _safetensors(data: bytes, rng) -> bytes:
    """Headers that lie about what follows."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = _pick(rng, [key for key in header if key != "__metadata__"])
    entry, kind = header[name], int(rng.integers(8))
    if kind == 0:
        return struct.pack("<Q", int(_pick(rng, (10**10, 2**63, 2**64 - 1, 0, 3)))) + data[8:]
    if kind == 1:
        return struct.pack("<Q", 10**6) + b"[" * 10**6
    if kind == 2:
        entry["shape"] = _pick(rng, ([2**62, 4], [-1, -1], [10**15], [], [0], ["x"], [1] * 100))
    if kind == 3:
        entry["data_offsets"] = _pick(rng, ([0, 2**63], [-1, 4], [8, 0], [0], "x", [0, 4]))
    if kind == 4:
        entry["dtype"] = _pick(rng, ("F4", "F8_E4M3", "O", "I2", "C64", "", 3, "BOOL"))
    if kind == 5:
        header["../../x"] = header.pop(name)
    if kind == 6:
        header = {str(i): entry for i in range(20_000)}
    if kind == 7:
        header["__metadata__"] = _pick(rng, _ODD)
    text_ = json.dumps(header).encode()
    return struct.pack("<Q", len(text_)) + text_ + data[8 + size :]


def _npy(data: bytes, rng) -> bytes:
    """Headers that hold code, pickles or absurd shapes."""
    out = io.BytesIO()
    if rng.random() < 0.3:
        np.save(out, np.array([_Evil()], object), allow_pickle=True)
        return out.getvalue()
    code = f"__import__('os').system('{CODE}')"
    descr = _pick(rng, ("'<f4'", "'|O'", f"[('a', '<f4', ({2**40},))]", code))
    shapes = ("(6, 4)", f"({10**15},)", f"({2**62}, 4)", "(-6, -4)", "(6, 4, 0)", "(1,) * 10**9")
    shape = _pick(rng, shapes)
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data[128:]


class _Evil:
    def __reduce__(self):
        return os.system, (CODE,)


def _pickle(data: bytes, rng) -> bytes:
    """Archives of torch whose pickle calls, recurses or shares."""
    known = torch_files.HOSTILE | torch_files.SCRIPTS
    value, script = known[_pick(rng, sorted(known))][0], bool(rng.integers(2))
    if rng.random() < 0.3:
        value = f"cos\nsystem\n(X{chr(len(CODE))}\0\0\0{CODE}tR".encode()
    file = torch_files.write(pathlib.Path("made.pt"), value, script)
    made = file.read_bytes()
    file.unlink()
    return made if rng.random() < 0.7 else value


def _bomb(data: bytes, rng) -> bytes:
    return _compressed(int(_pick(rng, (26, 28))))


@functools.cache
def _compressed(bits: int) -> bytes:
    return gzip.compress(bytes(1 << bits))


def _tar(data: bytes, rng) -> bytes:
    """Members that are links, devices, outside, negative or huge."""
    info = tarfile.TarInfo(_pick(rng, ("../../x.jpg", "/tmp/x.jpg", "000.jpg", "a/../b.txt")))
    info.type = _pick(rng, (b"0", b"1", b"2", b"3", b"4", b"6", b"L", b"K", b"x", b"S", b"V"))
    info.linkname, info.size = _pick(rng, ("/etc/passwd", "../../x", "000.jpg")), 0
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if rng.random() < 0.5:
        size = int(_pick(rng, (-512, -(2**40), 2**62, 10**12)))
        field = (256**12 + size if size < 0 else size) % 256**12
        block[124:136] = b"\xff" * 4 + field.to_bytes(12, "big")[4:] if size < 0 else (
            b"\x80" + size.to_bytes(11, "big"))  # fmt: skip
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
    at = 512 * int(rng.integers(len(data) // 512))
    return data[:at] + bytes(block) + data[at:]


def _picture(data: bytes, rng) -> bytes:
    """Other formats under a picture's name, and sizes that fill the memory."""
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 60_000, 60_000) + b"\x08\2\0\0\0"
    return _pick(
        rng,
        (
            f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%{CODE}) (w) file\n".encode(),
            b"%PDF-1.4\n",
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
            png + bytes(200),
            b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(100),
            b"BM" + bytes(12) + struct.pack("<Iii", 40, 2**31 - 1, -(2**31)) + bytes(60),
            b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 400,
            b"push graphic-context\nimage over 0,0 0,0 'ephemeral:/tmp/x'\n",
        ),
    )  # fmt: skip


_JSON = [_shape, _shape, _shape, _deep, _long]
_MAKERS = {
    "json": _JSON,
    "jsonl": [_spliced, _deep, _long],
    "safetensors": [_safetensors],
    "npy": [_npy],
    "pt": [_pickle],
    "gz": [_bomb, _long],
    "txt": [_spliced, _long, _bomb],
    "model": [_long, _deep],
    "tar": [_tar],
    "csv": [_spliced, _long],
    "tsv": [_spliced, _long],
    **dict.fromkeys(("jpeg", "png", "webp", "gif", "tiff", "bmp"), [_picture]),
}
