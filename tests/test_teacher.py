"""`clipx.teacher`: its rows are those of the captions, and no run takes them for other data."""

from __future__ import annotations

import concurrent.futures
import json
import pickle
import re
import sys

import numpy as np
import pytest
from support import commands
from support.loaders import build_loader
from support.pictures import TOKENIZER, Pictures, encode, photo

from clipx import teacher
from clipx.data import row_arrays as files
from clipx.data.base import fingerprint
from clipx.data.order import Subset, chosen, order
from clipx.data.pairs import paired
from clipx.data.sources.table import Table
from clipx.errors import ConfigError, DataError, install_hint
from clipx.models.heads import next_row
from clipx.ops import pca
from clipx.serving import teacher_features, teacher_rows

ROWS = 30
THINGS = ("dog", "cat", "boat")
PLACES = ("beach", "street", "field", "river", "roof")
NOWHERE = 7  # the row whose picture is missing


def captions(row: int) -> list[str]:
    """One caption for even rows, two for odd ones, of which the second is the longer."""
    first = f"A {THINGS[row % 3]} on the {PLACES[row % 5]}"
    return [first] if row % 2 == 0 else [first, f"{first}, one of {row} of them, seen from afar"]


@pytest.fixture
def config(tmp_path):
    """A config of thirty pictures in a table, one of which is missing."""
    lines = ["image,caption"]
    for row in range(ROWS):
        if row != NOWHERE:
            (tmp_path / f"{row}.jpg").write_bytes(encode(photo(16, 16, row)))
        lines += [f'{row}.jpg,"{caption}"' for caption in captions(row)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    return {"data": {"source": "table", "path": str(tmp_path / "pairs.csv")}}


def make(config, tmp_path, name="teacher", **options):
    """The array that the command writes."""
    out = str(tmp_path / f"{name}.npy")
    teacher.make(config, out, **{"dim": 4, **options})
    return np.load(out)


def digest(config):
    return fingerprint(Table(config["data"]["path"]))


def drawn(rows=200, width=12, seed=0):
    """Random rows with unequal variance per direction, far from the origin."""
    rng = np.random.default_rng(seed)
    return (5 + rng.normal(size=(rows, width)) * 0.7 ** np.arange(width)).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_components_are_those_of_the_whole_and_have_one_sign():
    x = drawn()
    wide = x.astype(np.float64)
    _, values, vectors = np.linalg.svd(wide - wide.mean(0), full_matrices=False)
    found = pca.fit(lambda: [x], 5)
    np.testing.assert_allclose(np.abs(np.sum(found.components * vectors[:5].T, 0)), 1, atol=1e-5)
    np.testing.assert_allclose(found.explained, np.sum(values[:5] ** 2) / np.sum(values**2), 1e-5)
    assert np.all(found.components.max(0) == np.abs(found.components).max(0))
    projected = np.asarray(pca.project(found, x))
    np.testing.assert_allclose(projected.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(projected, (wide - wide.mean(0)) @ found.components, atol=1e-4)
    in_tiles = pca.fit(lambda: iter((x[:7], x[7:150], x[150:])), 5)
    np.testing.assert_allclose(in_tiles.components, found.components, atol=1e-5)


@pytest.mark.parametrize(
    "x, d, said",
    [
        (drawn(5), 5, "5 components of 5 rows"),
        (drawn(), 13, "13 components of 200 rows of 12 numbers"),
        (np.ones((9, 3), np.float32), 2, "9 identical rows"),
    ],
)
def test_components_that_cannot_be(x, d, said):
    with pytest.raises(ConfigError, match=said):
        pca.fit(lambda: [x], d)


def test_a_users_rows_are_normalised_and_cut(config, tmp_path, capsys):
    given = drawn(ROWS)
    given[3] = 0
    np.save(tmp_path / "own.npy", given)
    found = make(config, tmp_path, features=str(tmp_path / "own.npy"))
    rest = np.delete(np.arange(ROWS), 3)
    x = unit(given[rest].astype(np.float64))
    _, _, vectors = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(
        np.abs(found[rest]), np.abs((x - x.mean(0)) @ vectors[:4].T), atol=1e-5
    )
    assert found.dtype == np.float32 and not found[3].any()
    about = json.loads((tmp_path / "teacher.json").read_text())
    assert about["fingerprint"] == digest(config) and about["rows"] == ROWS
    assert about["width"] == 4 and about["without"] == 1 and 0.5 < about["explained_variance"] < 1
    assert f"{ROWS} rows, 1 of them without features" in capsys.readouterr().out
    opened = files.open_teacher(
        str(tmp_path / "teacher.npy"), rows=ROWS, width=4, fingerprint=digest(config)
    )
    assert isinstance(opened, np.memmap) and np.array_equal(opened, found)


def test_rows_beyond_the_bound_do_not_shape_the_components(config, tmp_path, monkeypatch):
    given = drawn(ROWS)
    np.save(tmp_path / "own.npy", given)
    monkeypatch.setattr(teacher_rows, "FIT_ROWS", 20)
    monkeypatch.setattr(teacher_rows, "TILE", 8)
    found = make(config, tmp_path, features=str(tmp_path / "own.npy"))
    kept = np.random.default_rng(0).permutation(ROWS)[:20]
    few = pca.fit(lambda: [unit(given[np.sort(kept)])], 4)
    np.testing.assert_allclose(found, pca.project(few, unit(given)), atol=1e-5)
    monkeypatch.setattr(teacher_rows, "FIT_ROWS", ROWS)
    assert np.abs(make(config, tmp_path, "all", features=str(tmp_path / "own.npy")) - found).max()


@pytest.mark.parametrize(
    "array, said",
    [
        (drawn(ROWS - 1), r"\(29, 12\), expected floating-point numbers \[30, any\]"),
        (drawn(ROWS)[:, 0], "float32 of shape"),
        (np.zeros((ROWS, 4), int), "int64 of shape"),
        (np.where(np.arange(ROWS)[:, None] == 5, np.nan, drawn(ROWS)), "row 5 is not finite"),
    ],
)
def test_a_users_rows_that_do_not_fit_are_refused(config, tmp_path, array, said):
    np.save(tmp_path / "own.npy", array)
    with pytest.raises(DataError, match=said):
        make(config, tmp_path, features=str(tmp_path / "own.npy"))
    assert not list(tmp_path.glob("*teacher*"))


def test_word_counts_tell_things_and_places_apart(config, tmp_path):
    found = make(config, tmp_path, model="tfidf")
    assert found.shape == (ROWS, 4) and not found[NOWHERE].any()
    same = np.array([[i % 15 == j % 15 for j in range(ROWS)] for i in range(ROWS)])
    same[NOWHERE] = same[:, NOWHERE] = False
    distance = np.linalg.norm(found[:, None] - found[None], axis=-1)
    first = make({"data": config["data"] | {"caption": "first"}}, tmp_path, "first", model="tfidf")
    apart = np.linalg.norm(first[:, None] - first[None], axis=-1)
    assert apart[same].max() < 1e-5 < distance[same].max()  # second captions differ
    assert json.loads((tmp_path / "first.json").read_text())["captions"] == "first"
    tiles = teacher_features.word_counts(Table(config["data"]["path"]), True)
    x = tiles(0, ROWS)
    used = np.arange(ROWS) != NOWHERE
    np.testing.assert_allclose(np.linalg.norm(x[used], axis=1), 1, rtol=1e-5)
    assert np.array_equal(tiles(4, 9), x[4:9])


def test_word_counts_need_words(config, tmp_path):
    lines = ["image,caption", *(f"{row}.jpg,the same" for row in range(ROWS))]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match="no words to tell them apart by"):
        make(config, tmp_path, model="tfidf")


# ------------------------------------------------------------------------------ language models


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A folder with an untrained RoBERTa and its tokenizer."""
    pytest.importorskip("torch", reason="a language model needs torch")
    transformers = pytest.importorskip("transformers", reason="a language model needs transformers")
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing

    folder = tmp_path_factory.mktemp("roberta")
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer()
    words = [text for row in range(ROWS) for text in captions(row)]
    bpe.train_from_iterator(words, vocab_size=300, special_tokens=marks, show_progress=False)
    bpe._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, model_max_length=90, **dict(zip(names, marks))
    )
    tokenizer.save_pretrained(folder)
    transformers.set_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=100, pad_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(folder)
    return folder


def by_hand(roberta, text, faulty):
    """The unit feature of one caption, alone in its batch. faulty: padded as by ProtoCLIP."""
    import torch
    from transformers import AutoTokenizer, RobertaModel

    ids = AutoTokenizer.from_pretrained(roberta)(text)["input_ids"]
    assert ids[0] == 0 and ids[-1] == 2
    if faulty:
        ids = (ids + [0] * 77)[:77]
    elif len(ids) > 77:
        ids = [*ids[:76], 2]
    with torch.no_grad():
        states = RobertaModel.from_pretrained(roberta).eval()(torch.tensor([ids]))[0][0]
    mean = states.mean(0).numpy()
    return mean / np.linalg.norm(mean)


LONG = "a dog " * 60


@pytest.mark.slow  # the import of transformers alone
@pytest.mark.parametrize("padding", ["mask", "zero"])
def test_a_caption_is_the_mean_of_its_tokens(roberta, padding):
    texts = [captions(1)[1], LONG, captions(2)[0], captions(4)[0]]
    found = teacher_features.TextModel(str(roberta), padding, 2, "")(texts)
    expected = [by_hand(roberta, text, padding == "zero") for text in texts]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert found.dtype == np.float32
    other = teacher_features.TextModel(
        str(roberta), "mask" if padding == "zero" else "zero", 4, ""
    )(texts)
    assert np.abs(found - other).max() > 1e-2


@pytest.mark.slow  # the import of transformers alone
def test_a_row_is_the_mean_of_its_captions(config, tmp_path, roberta):
    model = teacher_features.TextModel(str(roberta), "mask", 64, "")
    rows = np.stack([model(captions(row)).mean(0) for row in range(ROWS)])
    rows[NOWHERE] = 0
    used = np.arange(ROWS) != NOWHERE
    expected = pca.fit(lambda: [rows[used]], 4)
    found = make(config, tmp_path, model=str(roberta), batch_size=16)
    np.testing.assert_allclose(found, pca.project(expected, rows) * used[:, None], atol=1e-5)
    about = json.loads((tmp_path / "teacher.json").read_text())
    assert about["model"] == str(roberta) and about["padding"] == "mask"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow  # the import of transformers alone
def test_a_model_that_is_not_there_is_one_line(roberta, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("/no/such/folder", str(tmp_path / "empty")):
        with pytest.raises(ConfigError, match="a folder with a Hugging Face text") as error:
            teacher_features.TextModel(name, "mask", 4, "")
        assert name in str(error.value) and len(str(error.value)) < 600
    with pytest.raises(ConfigError, match="--device"):
        teacher_features.TextModel(str(roberta), "mask", 4, "abacus")


@pytest.mark.slow  # the import of transformers alone
def test_missing_weights_are_not_drawn_at_random(roberta, tmp_path):
    from safetensors.numpy import load_file, save_file

    for file in roberta.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: x for name, x in weights.items() if "attention.self.query" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"without encoder\.layer\.0\.attention\.self\.query"):
        teacher_features.TextModel(str(tmp_path), "mask", 4, "")


def test_without_its_packages_a_model_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=re.escape(install_hint("teacher"))):
        teacher_features.TextModel("roberta-large", "mask", 4, "")


def test_a_command_that_was_stopped_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_features, "BLOCK", 8)
    source, aside = Table(config["data"]["path"]), tmp_path / ".t.raw.npy"
    about = {"model": "x", "fingerprint": "f", "rows": ROWS}
    seen = []

    def encode(texts):
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append(texts)
        return unit(np.array([[len(t), t.count("o"), 3] for t in texts], np.float32))

    stop_at = 3  # the first call finds the width
    with pytest.raises(KeyboardInterrupt):
        teacher_features.embedded(source, False, encode, aside, about)
    part = tmp_path / "..t.raw.npy.part"
    part.write_bytes(part.read_bytes() + b"half a row")
    stop_at, before = None, len(seen)
    found = teacher_features.embedded(source, False, encode, aside, about)(0, ROWS)
    assert seen[before + 1][0] == captions(16)[0]
    whole = teacher_features.embedded(source, False, encode, tmp_path / ".u.raw.npy", about)(
        0, ROWS
    )
    assert np.array_equal(found, whole) and not found[NOWHERE].any()
    before = len(seen)
    again = teacher_features.embedded(source, False, encode, aside, about)(0, ROWS)
    assert np.array_equal(again, whole) and len(seen) == before + 1  # only the width was asked
    before = len(seen)
    teacher_features.embedded(source, False, encode, aside, {**about, "model": "another"})
    assert seen[before + 1][0] == captions(0)[0]  # features of another model are not kept


# --------------------------------------------------------------------------------- files on disk


def written(tmp_path, array=None, **about):
    array = np.zeros((ROWS, 4), np.float32) if array is None else array
    about = {"fingerprint": "ab12", "rows": len(array), **about}
    with files.create(str(tmp_path / "t.npy"), array.dtype, array.shape, about) as write:
        for row in array:
            write(row[None])
    return tmp_path / "t.npy"


def open_it(path, rows=ROWS, width=4, fingerprint="ab12"):
    return files.open_teacher(str(path), rows=rows, width=width, fingerprint=fingerprint)


def test_what_is_written_is_read(tmp_path, monkeypatch):
    x = drawn(ROWS, 4)
    monkeypatch.setenv("TEACHERS", str(tmp_path))
    written(tmp_path, x)
    assert np.array_equal(open_it("$TEACHERS/t.npy"), x)
    assert np.array_equal(open_it("$TEACHERS/t.npy", width=None), x)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: f.unlink(), "no such file"),
        (lambda f: f.write_bytes(f.read_bytes()[:-9]), "not a complete .npy file"),
        (lambda f: f.write_bytes(b"12345"), "not a complete .npy file"),
        (lambda f: f.with_suffix(".json").unlink(), "only it says for which data t.npy was"),
        (lambda f: f.with_suffix(".json").write_text("{"), "cannot be read"),
        (lambda f: f.with_suffix(".json").write_text("[]"), "an object {.fingerprint.: a text"),
        (lambda f: np.save(f, np.zeros((ROWS, 4))), "float64 of shape .*, expected a teacher's"),
        (lambda f: np.save(f, np.zeros(ROWS, np.int32)), "int32 of shape"),
        (lambda f: np.save(f, np.zeros((9, 4), np.float32)), "9 rows, 30 by its json"),
        (lambda f: np.save(f, np.full((ROWS, 4), np.nan, "f")), "row 0 is not finite"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_in_a_line(tmp_path, spoil, said):
    file = written(tmp_path)
    spoil(file)
    with pytest.raises(DataError, match=said) as error:
        open_it(file)
    assert "\n" not in str(error.value)


def test_a_teacher_of_other_data_is_refused(tmp_path):
    file = written(tmp_path)
    with pytest.raises(DataError, match="ab12.*cd34"):
        open_it(file, fingerprint="cd34")
    with pytest.raises(DataError, match="30 rows, 30 by its json file, expected the 31 rows"):
        open_it(file, rows=31)
    with pytest.raises(DataError, match="4 numbers per row, expected 6; .*--dim=6"):
        open_it(file, width=6)


def test_an_interrupted_write_leaves_no_file(tmp_path):
    created = files.create(str(tmp_path / "t.npy"), np.float32, (2, 1), {})
    with pytest.raises(KeyboardInterrupt), created as write:
        write(np.zeros((1, 1)))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "one of --model, --features, --teacher"),
        ({"model": "tfidf", "teacher": "x.npy"}, "--model and --teacher"),
        ({"teacher": "x.npy"}, "--clusters"),
        ({"model": "tfidf", "out": "teacher"}, "ends in .npy"),
        ({"model": "tfidf", "out": "no/teacher.npy"}, "no folder"),
        ({"model": "tfidf", "dim": 40}, "40 components"),
        ({"model": "tfidf", "clusters": 40}, "at most as many as rows: 29"),
    ],
)
def test_wrong_flags(config, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        teacher.make(config, **{"out": "teacher.npy", "dim": 4, **options})
    assert said in str(error.value)
    assert not list(tmp_path.glob("*teacher*"))


def test_a_file_is_overwritten_only_if_asked(config, tmp_path):
    make(config, tmp_path, model="tfidf")
    with pytest.raises(ConfigError, match=r"(?s)which exists.*--overwrite"):
        make(config, tmp_path, model="tfidf", dim=3)
    assert make(config, tmp_path, model="tfidf", dim=3, overwrite=True).shape == (ROWS, 3)
    assert files.describe(str(tmp_path / "teacher.npy"))["width"] == 3


def test_a_mixture_is_refused(config, tmp_path):
    parts = {"a": config["data"], "b": config["data"]}
    with pytest.raises(ConfigError, match="a mixture|'mixture'"):
        make({"data": {"source": "mixture", "parts": parts}}, tmp_path, model="tfidf")


# ---------------------------------------------------------------------- clusters, and their pairs


def test_clusters_are_those_of_the_captions(config, tmp_path):
    config = {"data": config["data"] | {"caption": "first"}}
    make(config, tmp_path, model="tfidf", dim=6)
    given = {"teacher": str(tmp_path / "teacher.npy"), "clusters": 15}
    found = make(config, tmp_path, "clusters", **given)
    assert found.dtype == np.int32 and found[NOWHERE] == -1 and found.max() < 15
    for row in range(15):
        if row != NOWHERE and row + 15 != NOWHERE:
            assert found[row] == found[row + 15]
    assert np.array_equal(
        found, make(config, tmp_path, "at_once", model="tfidf", dim=6, clusters=15)
    )
    path, about = str(tmp_path / "clusters.npy"), files.describe(str(tmp_path / "clusters.npy"))
    assert about["clusters"] == 15 and about["model"] == "tfidf" and about["without"] == 1
    opened = files.open_clusters(path, rows=ROWS, fingerprint=digest(config))
    assert np.array_equal(opened, found)
    with pytest.raises(DataError, match=r"expected clusters, int32 \[rows\]"):
        files.open_clusters(given["teacher"], rows=ROWS, fingerprint=digest(config))
    with pytest.raises(DataError, match="made for other data"):
        files.open_clusters(path, rows=ROWS, fingerprint="ab12")


@pytest.mark.parametrize("rows, clusters", [(40, 4), (41, 5), (30, 30), (7, 1), (1, 1), (60, 21)])
def test_neighbours_share_a_cluster(rows, clusters):
    of = np.random.default_rng(rows).integers(clusters, size=rows).astype(np.int32) - 1
    found = paired(of, np.random.default_rng(1))
    assert sorted(found) == list(range(rows))
    pairs = of[found[: rows // 2 * 2]].reshape(-1, 2)
    odd = sum(np.sum(of == c) % 2 for c in np.unique(of))
    assert np.sum(pairs[:, 0] != pairs[:, 1]) == odd // 2


def test_partners_and_their_places_change_from_epoch_to_epoch():
    of = np.arange(200, dtype=np.int32) % 5
    at = order(200, 3, of)
    epochs = [[at(epoch, i) for i in range(200)] for epoch in range(4)]
    partners = [{frozenset(e[i : i + 2]) for i in range(0, 200, 2)} for e in epochs]
    for epoch in range(1, 4):
        assert len(partners[0] & partners[epoch]) < 20
        assert np.mean(np.equal(epochs[0], epochs[epoch])) < 0.1
    again = pickle.loads(pickle.dumps(at))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for epoch in (2, 0, 3):  # in any order, from any process and thread
            assert list(pool.map(lambda i, e=epoch: again(e, i), range(200))) == epochs[epoch]
    assert [order(200, 4, of)(0, i) for i in range(200)] != epochs[0]


def loader(**changes):
    source = changes.pop("source", Pictures())
    return build_loader(source, TOKENIZER, batch_size=12, image_size=8, **changes)


def test_half_of_the_negatives_of_clip_lite_are_partners():
    of = (np.arange(len(Pictures())) % 6).astype(np.int32)
    batches = list(loader(clusters=of).batches(0, 4))
    rows = np.concatenate([batch["row"] for batch in batches])
    assert len(set(rows.tolist())) == len(rows) == 48
    hard = random = 0
    for batch in batches:
        own = of[batch["row"]]
        same = own == np.asarray(next_row(own))  # the negative caption of each picture
        hard, random = hard + np.mean(same[::2]) / 4, random + np.mean(same[1::2]) / 4
        assert np.array_equal(same[::2], np.asarray(own == next_row(own, 3))[::2])
    assert hard > 0.9 and random < 0.5


def test_a_share_of_the_rows_has_pairs_of_its_own():
    of = (np.arange(len(Pictures())) % 6).astype(np.int32)
    kept = chosen(len(of), 0.6)
    shared = loader(source=Subset(Pictures(), kept), clusters=of[kept])
    (batch,) = shared.batches(0, 1)
    assert set(batch["row"].tolist()) <= set(kept.tolist())
    own = of[batch["row"]].reshape(-1, 2)
    assert np.mean(own[:, 0] == own[:, 1]) >= 0.5


def test_the_command_line(config, tmp_path):
    np.save(tmp_path / "own.npy", drawn(ROWS))
    done = commands.run(
        "teacher", "--config=configs/quickstart.py", "--dim=3",
        f"--config.data={config['data']}", f"--features={tmp_path / 'own.npy'}",
        f"--out={tmp_path / 'teacher.npy'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"30 rows, fingerprint {digest(config)}" in done.stdout
    assert files.describe(str(tmp_path / "teacher.npy"))["width"] == 3
