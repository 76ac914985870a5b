"""Archives of torch that are written by hand, instruction by instruction, and hostile ones."""

import pathlib
import pickle
import struct
import zipfile

import numpy as np

TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data


def tensor(shape=(2, 3), strides=(3, 1), offset=0, record="0", kind="Float") -> bytes:
    def numbers(values) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(record)
    storage += text("cpu") + number(6) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        TENSOR + b"(" + storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89"
        + hooks + b"tR"
    )  # fmt: skip


def module(name: str, **fields: bytes) -> bytes:
    state = b"".join(text(key) + value for key, value in fields.items())
    return f"c__torch__\n{name}\n".encode() + b")\x81}(" + state + b"ub"


def write(file: pathlib.Path, value: bytes, script: bool, how=zipfile.ZIP_STORED) -> pathlib.Path:
    """An archive of torch, of one pickle and one record of six floats."""
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + value + b".")
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data/0", np.arange(6, dtype=np.float32).tobytes())
        if script:
            archive.writestr("a/constants.pkl", b"\x80\x02).")
    return file


def nested(levels: int) -> bytes:
    """Tuples within tuples as the key of a dict, whose hash would end the process."""
    return b"})" + b"\x85" * levels + b"Ns"


def shared(levels: int) -> bytes:
    """Modules within each other, each of which holds the one below it twice."""
    value = module("M", weight=tensor())
    for i in range(levels):
        value = module(f"M{i}", a=value + b"q" + bytes([i]), b=b"h" + bytes([i]))
    return value


HOSTILE = {
    "deep": (nested(300_000), "levels deep"),
    "no end": (b"(" * 1000, "a damaged pickle"),
    "far memo": (b"Nr\xff\xff\xff\xff" + b"0", "POP"),
    "call": (b"cos\nsystem\n" + b"(" + text("touch mark") + b"tR", "os.system"),
    "inst": (b"(" + text("touch mark") + b"ios\nsystem\n", "INST"),
    "newer": (b"\x8c\x02os\x8c\x06system\x93" + text("x") + b"\x85R", "SHORT_BINUNICODE"),
}
SCRIPTS = {
    "shared": (shared(45), "more than 100,000 fields"),
    "deep": (shared(60), "modules more than 50 levels deep"),
    "outside": (module("M", visual=tensor((7,), (1,))), "in 6 stored numbers"),
    "offset": (module("M", visual=tensor(offset=1)), "in 6 stored numbers"),
    "negative": (module("M", visual=tensor(strides=(-3, 1))), "not made of numbers"),
    "record": (module("M", visual=tensor(record="../../x")), "data/../../x"),
    "quantized": (module("M", visual=tensor(kind="QInt8")), "torch.QInt8Storage"),
    "state": (b"c__torch__\nM\n)\x81" + tensor() + b"\x85b", "__torch__.M, which only code"),
    "expanded": (
        module("M", visual=module("V", weight=tensor((10**7, 10**6), (0, 0)))),
        "10,000,000,000,000 numbers in",
    ),
}
