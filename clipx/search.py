"""`python -m clipx.search --embeddings=FOLDER --text="a dog in the snow"`: finds pictures in a
folder that `clipx.embed --layout=clip_retrieval` has written, prints the best, and writes one page
that shows them.

Several `--text` and `--image=FILE` are searched at once. Every row is compared, so that the result
is exact. `--interactive` keeps the model in memory and asks for the next query: a text, or the path
of a picture.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import time
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags

from clipx import cli
from clipx.errors import ConfigError, DataError, RunError
from clipx.reporting import search_page
from clipx.serving.model import Model, load
from clipx.serving.search import Index, Query, queries


def search(
    index: Index, model: Model, asked: Sequence[Query], *, count: int, out: str
) -> list[str]:
    """Searches for the queries, writes the page `out` and returns the lines to print."""
    started = time.perf_counter()
    scores, rows = index.search(np.stack([query.embedding for query in asked]), count)
    seconds, results, lines = time.perf_counter() - started, [], []
    for query, line, found in zip(asked, scores, rows):
        hits = index.hits(line, found)
        results.append((query.title, query.picture, hits))
        lines.append(f"{query.title}")
        for rank, hit in enumerate(hits, 1):
            words = f"  {hit.caption}" * bool(hit.caption)
            lines.append(f"  {rank:3}  {hit.score:.3f}  {hit.key or hit.image_path}{words}")
    facts = [(f"{len(index):,}", "pictures searched"), (f"{seconds:.2g} s", "for all queries")]
    missing = search_page.write(out, index.folder, facts, results, index.picture)
    lines.append(f"{out}: a page of them" + f", {missing:,} without picture" * bool(missing))
    return lines


def ask() -> Iterator[str]:
    """What a person types, until an empty line or the end of the input."""
    while True:
        try:
            line = input("search for (a text, or a picture's path; nothing ends): ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def main(overrides: list[tuple[str, str]]) -> None:
    values = flags.FLAGS
    if overrides:
        raise ConfigError(f"--config.{overrides[0][0]}", "an override", "the model has its config")
    index = Index(values.embeddings)
    path = values.model or index.about.get("model", "")
    if not path:
        found = f"nothing, and {values.embeddings} does not name the model that made it"
        raise ConfigError("--model", found, "a workdir, or a model of another library")
    if not (values.text or values.image or values.interactive):
        raise ConfigError("--text, --image", "nothing", "what to search for", '--text="a dog"')
    step = values.step or (str(index.about.get("step") or "") if not values.model else "")
    model = load(path, step=step, init_ignore=values.init_ignore, batch_size=values.batch_size)
    index.refuse_other(model, path)
    options = {"count": values.top, "out": values.out}
    try:
        if values.text or values.image:
            asked = queries(model, values.text, values.image)
            print("\n".join(search(index, model, asked, **options)), flush=True)
        for line in ask() if values.interactive else ():
            texts, images = ([], [line]) if os.path.isfile(line) else ([line], [])
            try:
                asked = queries(model, texts, images)
            except DataError as error:
                print(error, flush=True)
                continue
            print("\n".join(search(index, model, asked, **options)), flush=True)
    except OSError as error:
        where = error.filename or shlex.quote(values.out)
        raise RunError(f"{pathlib.Path(where)}: {error.strerror or error}") from None


if __name__ == "__main__":
    flags.DEFINE_string("embeddings", None, "The folder that clipx.embed has written.")
    flags.DEFINE_multi_string("text", [], "A text to search for; may be given several times.")
    flags.DEFINE_multi_string("image", [], "A picture to search for; may be given several times.")
    flags.DEFINE_string("model", "", "The model; default: the one that made the embeddings.")
    flags.DEFINE_string("step", "", "The checkpoint of --model: a step, latest or best.")
    flags.DEFINE_list("init_ignore", [], "Differences to accept, as config.init_ignore takes them.")
    flags.DEFINE_integer("top", 12, "Pictures to show for each query.", lower_bound=1)
    flags.DEFINE_string("out", "search.html", "The page to write.")
    flags.DEFINE_bool("interactive", False, "Ask for further queries.")
    flags.DEFINE_integer("batch_size", 1, "Queries that the model reads at a time.", lower_bound=1)

    cli.run(main, required=("embeddings",))
