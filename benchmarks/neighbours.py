"""`python benchmarks/neighbours.py --workdir=RUN --data='train-*.tar'`: how good the neighbours are
that a run's text tower finds among other captions, by a measure that it was not trained on.

The measure is the cosine of weighted word counts. For 500 captions and queues of several lengths,
drawn from the data's other images, it prints the mean cosine of the best caption there is, of the
one that is nearest in the run's own space, and of a random one. The scale: the mean of two captions
of one image.
"""

from __future__ import annotations

import argparse
import glob
import json
import tarfile

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

import clipx

QUERIES, LENGTHS = 500, (256, 1024, 6000)


def captions(pattern: str) -> list[list[str]]:
    """The captions of each image of the tar shards."""
    found = []
    for path in sorted(glob.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json") and (file := tar.extractfile(member)):
                    found.append(json.load(file)["captions"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--data", required=True, help="tar shards of images and captions")
    args = parser.parse_args()
    images = captions(args.data)
    texts = [text for image in images for text in image]
    image_of = np.repeat(np.arange(len(images)), [len(image) for image in images])
    first = np.searchsorted(image_of, np.arange(len(images)))  # caption of each image
    counts = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    rng = np.random.default_rng(0)
    asked = rng.choice(len(images), QUERIES, replace=False)
    queue = rng.choice(len(texts), max(LENGTHS), replace=False)
    words = (counts[first[asked]] @ counts[queue].T).toarray()
    model = clipx.load(args.workdir)
    space = model.encode_text([texts[i] for i in first[asked]])
    space = space @ model.encode_text([texts[i] for i in queue]).T
    foreign = image_of[queue] != asked[:, None]
    pairs = counts[first[asked]].multiply(counts[first[asked] + 1]).sum(axis=1)
    print(f"two captions of one image: {pairs.mean():.2f}\n")
    print(
        "| queue | best caption | nearest in the run's space | random caption |\n|---|---|---|---|"
    )
    for length in LENGTHS:
        near, good = words[:, :length], foreign[:, :length]
        picked = np.argmax(np.where(good, space[:, :length], -np.inf), axis=1)
        means = (
            np.max(near, axis=1, where=good, initial=0).mean(),
            near[np.arange(QUERIES), picked].mean(),
            near[good].mean(),
        )
        print(f"| {length:,} | " + " | ".join(f"{x:.2f}" for x in means) + " |")


if __name__ == "__main__":
    main()
