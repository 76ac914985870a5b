"""Shards of image-caption pairs, and the config of a run that reads them."""

import io
import tarfile

import numpy as np
from PIL import Image

from support.runs import small


def jpeg(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def shard(path, count=48, **odd):
    """A tar of pairs. `odd` replaces the contents of members by name."""
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            for name, data in ((f"{i:04d}.jpg", jpeg(i)), (f"{i:04d}.txt", f"thing {i}".encode())):
                data = odd.get(name, data)
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def pairs(path, *overrides):
    config = small(("train.total_steps", "2"), *overrides)
    config["data"] = {"source": "webdataset", "path": str(path), "max_bad_fraction": 0.01}
    config["evals"] = {"retrieval": {"data": {"source": "webdataset", "path": str(path)}}}
    config["train"]["best"] = ""
    return config
