"""`clipx.embed --layout=clip_retrieval` and `clipx.search`: pictures of any source to a folder that
clip-retrieval and autofaiss read, and from a query to a page."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image
from support import commands, exports
from support.runs import small

from clipx.errors import ConfigError, DataError, Interrupted
from clipx.reporting import search_page
from clipx.serving import given_source
from clipx.serving.embeddings import Embeddings, Shard
from clipx.serving.model import load
from clipx.serving.search import Index, queries

pq = pytest.importorskip("pyarrow.parquet")
ROWS = 23


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    config = small(("image.pool", "class"), ("train.best", ""), ("evals", "{}"))
    return exports.save(tmp_path_factory.mktemp("run"), config)


@pytest.fixture(scope="module")
def model(workdir):
    return load(workdir, batch_size=8)


def picture(i):
    return np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of pictures in two folders, of which number 5 is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(ROWS):
        file = folder / ("b" if i % 2 else "") / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(picture(i)).save(file)
    (folder / "b" / "05.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """The same pictures as tar shards with captions; the third row has none."""
    file = tmp_path_factory.mktemp("tars") / "pairs.tar"
    with tarfile.open(file, "w") as tar:
        for i in range(ROWS):
            encoded = io.BytesIO()
            Image.fromarray(picture(i)).save(encoded, "PNG")
            members = {f"{i:02d}.png": encoded.getvalue(), f"{i:02d}.txt": f"picture {i}".encode()}
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file


def job(model, path, out, said=None, **options):
    section = given_source.sections(str(path), "--data", lambda line: None, alone=True)
    source = given_source.opened(section, "--data")
    tell = (said if said is not None else []).append
    return Embeddings(model, "PATH", source, section, out, tell=tell, **options)


@pytest.fixture(scope="module")
def written(model, tars, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert job(model, tars, out).write() == ROWS
    return out


def test_a_folder_of_pictures(model, folder, tmp_path):
    """Arrays and table have a row for each good picture; the bad one is named."""
    said = []
    assert job(model, folder, tmp_path, said).write() == ROWS - 1
    assert "b/05: " in said[0] and "1 bad row(s) left out" in said[-1]
    assert "b/05" in (tmp_path / "quarantine_0.jsonl").read_text()
    array = np.load(tmp_path / "img_emb" / "img_emb_0.npy")
    table = pq.read_table(tmp_path / "metadata" / "metadata_0.parquet").to_pydict()
    assert array.dtype == np.float16 and array.shape == (ROWS - 1, model.width)
    assert not (tmp_path / "text_emb").exists()
    names = [path.removeprefix(f"{folder}/").removesuffix(".png") for path in table["image_path"]]
    assert names == table["key"] and "b/05" not in names
    expected = model.encode_image([picture(int(name[-2:])) for name in names])
    np.testing.assert_allclose(array, expected, atol=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "embeddings_0.json", "img_emb", "metadata", "quarantine_0.jsonl",
    ]  # fmt: skip


def test_a_stopped_call_goes_on(model, tars, written, tmp_path):
    """The bytes are those of a call that was not stopped."""
    asked, said = iter([False, True]), []
    with pytest.raises(Interrupted):
        job(model, tars, tmp_path, stop=lambda: next(asked)).write()
    assert not (tmp_path / "img_emb").exists()
    assert job(model, tars, tmp_path, said).write() == ROWS
    assert said[0] == f"going on after 16 of {ROWS} rows"
    for name in ("img_emb/img_emb_0.npy", "text_emb/text_emb_0.npy"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()
    table = pq.read_table(tmp_path / "metadata" / "metadata_0.parquet")
    assert table.equals(pq.read_table(written / "metadata" / "metadata_0.parquet"))
    assert table.column("caption").to_pylist() == [f"picture {i}" for i in range(ROWS)]


def test_a_finished_folder_is_kept_and_another_is_refused(model, tars, folder, written):
    before = (written / "img_emb" / "img_emb_0.npy").stat().st_mtime_ns
    assert job(model, tars, written).write() == ROWS
    assert (written / "img_emb" / "img_emb_0.npy").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="embeddings of another data"):
        job(model, folder, written).write()


def test_shards_are_one_index(model, tars, written, tmp_path):
    for number in range(3):
        job(model, tars, tmp_path, shard=Shard(number, 3)).write()
    assert len(list((tmp_path / "img_emb").iterdir())) == 3
    whole, parts = Index(str(written)), Index(str(tmp_path))
    asked = queries(model, ["picture 3", "x"], [])
    embedded = np.stack([query.embedding for query in asked])
    for a, b in zip(whole.search(embedded, 9), parts.search(embedded, 9)):
        np.testing.assert_array_equal(a, b)
    assert parts.hits(*(x[0] for x in parts.search(embedded, ROWS))) == whole.hits(
        *(x[0] for x in whole.search(embedded, ROWS))
    )
    np.testing.assert_array_equal(parts.picture(11), picture(11))


@pytest.mark.parametrize("tile", [1, 7, 1000])
def test_search_is_exact_in_tiles(written, tile):
    """Equal scores are in order of their rows."""
    index = Index(str(written), tile)
    array = np.load(written / "img_emb" / "img_emb_0.npy").astype(np.float32)
    given = np.concatenate([np.eye(index.width, dtype=np.float32)[:2], 0 * array[:1], array[4:5]])
    scores, rows = index.search(given, 5)
    full = given @ array.T
    expected = np.argsort(-full, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(full, expected, 1), rtol=1e-6)
    assert rows[2].tolist() == [0, 1, 2, 3, 4] and rows[3][0] == 4
    assert index.search(given, 99)[1].shape == (4, ROWS)


def test_a_picture_finds_itself(model, written, tmp_path):
    file = tmp_path / "asked.png"
    Image.fromarray(picture(7)).save(file)
    (query,) = queries(model, [], [str(file)])
    index = Index(str(written))
    (scores,), (rows,) = index.search(query.embedding[None], 3)
    best = index.hits(scores, rows)[0]
    assert (best.key, best.caption) == ("pairs.tar/07", "picture 7") and best.score > 0.99
    np.testing.assert_array_equal(query.picture, picture(7))
    with pytest.raises(DataError):
        (tmp_path / "no.png").write_bytes(b"x")
        queries(model, [], [str(tmp_path / "no.png")])


def test_the_page_stands_alone(written, tmp_path):
    """Pictures are in the page, captions are escaped, and a picture that is gone is counted."""
    index = Index(str(written))
    hits = index.hits(np.array([0.5, 0.25]), np.array([3, 4]))
    hits[1] = hits[1]._replace(caption="<b>&")
    results = [("a <dog>", None, hits), ("b", picture(1), hits)]
    gone = lambda row: None if row == 4 else index.picture(row)  # noqa: E731
    assert search_page.write(str(tmp_path / "p.html"), written, [("23", "x")], results, gone) == 1
    page = (tmp_path / "p.html").read_text()
    assert "a &lt;dog&gt;" in page and "&lt;b&gt;&amp;" in page and "script" not in page
    assert set(re.findall('src="(.{5})', page)) == {"data:"}
    assert page.count("the picture is not where it was") == 2


def test_what_is_no_folder_of_embeddings(model, written, tmp_path):
    with pytest.raises(ConfigError, match="0 file.s. in img_emb"):
        Index(str(tmp_path))
    other = load_other(tmp_path)
    with pytest.raises(ConfigError, match="--model.*\n.*found.*\n.*the model of the embeddings"):
        Index(str(written)).refuse_other(other, "OTHER")
    Index(str(written)).refuse_other(model, "PATH")


def load_other(tmp_path):
    config = small(("image.pool", "class"), ("train.best", ""), ("evals", "{}"))
    return load(exports.save(tmp_path / "other", config, seed=1))


def test_the_commands(workdir, folder, tmp_path, monkeypatch):
    out, page = str(tmp_path / "out"), str(tmp_path / "page.html")
    done = commands.run(
        *("embed", "--layout=clip_retrieval", f"--model={workdir}", f"--data={folder}"),
        *(f"--out={out}", "--batch_size=8"),
    )
    assert done.returncode == 0, done.stderr
    assert f"files: {ROWS} pictures in {folder}, without captions" in done.stdout
    assert json.loads((tmp_path / "out" / "embeddings_0.json").read_text())["written"] == ROWS - 1
    typed = iter([str(folder / "04.png"), "red", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    done = commands.run(
        "search", f"--embeddings={out}", "--text=a dog", f"--out={page}", "--top=3", "--interactive"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "a dog", f"{page}: a page of them", str(folder / "04.png"),
        f"{page}: a page of them", "red", f"{page}: a page of them",
    ]  # fmt: skip
    assert re.match(r"  +1  1\.000  04$", lines[6])
    for arguments, found in (
        (("search", f"--embeddings={out}"), "--text, --image"),
        (("search", f"--embeddings={tmp_path}", "--text=x"), "--embeddings"),
        (("embed", "--layout=clip_retrieval", f"--out={out}", "--model=x"), "--data"),
        (("embed", f"--out={out}", "--config=clip"), "--tower"),
        (("embed", "--layout=clip_retrieval", f"--out={out}", "--model=x", "--data=y",
          "--shard=3/3"), "--shard"),
    ):  # fmt: skip
        done = commands.run(*arguments)
        assert done.returncode == 2 and f"config error at {found}" in done.stderr, done.stderr
