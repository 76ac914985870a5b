"""`python -m clipx.dataset` reports the facts of a generated data set, and packs it losslessly."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex

import numpy as np
import pytest
from PIL import Image
from support import ROOT, commands
from support.runs import SMALL

from clipx import cli, dataset
from clipx.data.base import fingerprint
from clipx.data.sources.folder import Folder
from clipx.data.sources.table import Table
from clipx.data.sources.webdataset import WebDataset
from clipx.data.verify import script, token_counter, verify
from clipx.errors import ConfigError, DataError
from clipx.planning import feed_comparison, feed_speed
from clipx.training.workdir import read_json

CAPTIONS = [
    ("a red square", "a square"),
    ("a dog runs",),
    ("un café à Paris",),
    ("一只狗在草地上跑",),
    ("a dog runs",),
    ("собака бежит по траве",),
    ("كلب يجري على العشب",),
    ("broken",),
    ("a grey picture",),
]
BROKEN = 7


def encoded(seed: int, mode: str = "RGB", kind: str = "JPEG", size=(40, 30), **options) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Nine pictures and a table with their captions. Picture 7 cannot be decoded."""
    monkeypatch.setenv("CLIPX_CACHE", str(tmp_path / "cache"))
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [encoded(i) for i in range(len(CAPTIONS))]
    pictures[1] = encoded(1, kind="PNG", size=(64, 50))
    pictures[2] = encoded(2, exif=exif)
    pictures[5] = pictures[0]
    pictures[6] = encoded(6, "CMYK")
    pictures[BROKEN] = pictures[BROKEN][:60]
    pictures[8] = encoded(8, "L", kind="BMP")
    rows = ["filepath,caption"]
    (tmp_path / "set").mkdir()
    for i, (picture, captions) in enumerate(zip(pictures, CAPTIONS)):
        name = f"{i}.{'bmp' if i == 8 else 'png' if i == 1 else 'jpg'}"
        (tmp_path / "set" / name).write_bytes(picture)
        rows += [f"{name},{caption}" for caption in captions]
    (tmp_path / "set" / "captions.csv").write_text("\n".join(rows) + "\n", "utf-8")
    return tmp_path


def section(folder, **more):
    return {"data": {"source": "table", "path": str(folder / "set" / "captions.csv"), **more}}


def mixture(**parts):
    return {"data": {"source": "mixture", "parts": parts}}


def test_verify_reports_the_facts(folder, capsys):
    file = folder / "verify.json"
    assert dataset.verify(section(folder), str(file)) == cli.EXIT_CONFIG
    assert dataset.verify(section(folder, max_bad_fraction=0.2)) == 0
    said = capsys.readouterr().out
    report = read_json(file)["config.data"]
    (bad,) = report["bad"]
    assert report["rows"] == 9 and bad["row"] == BROKEN and bad["key"] == "7.jpg"
    assert "cannot be decoded" in bad["reason"] and bad["reason"] in said
    pictures, captions = report["pictures"], report["captions"]
    assert pictures["formats"] == {"JPEG": 6, "PNG": 1, "BMP": 1}
    assert pictures["modes"] == {"RGB": 6, "CMYK": 1, "L": 1}
    assert pictures["turned by EXIF"] == 1
    assert pictures["sizes"]["width"] | {"5 %": 0, "95 %": 0} == {
        "least": 40, "5 %": 0, "median": 40, "95 %": 0, "most": 64,
    }  # fmt: skip
    assert pictures["equal to an earlier one"] == 1 and pictures["equal"] == [["0.jpg", "5.jpg"]]
    assert captions["captions"] == 9 and captions["lengths"]["captions a picture"]["most"] == 2
    assert captions["scripts"] == {"Latin": 6, "CJK": 1, "Cyrillic": 1, "Arabic": 1}
    assert captions["most frequent"] == [{"caption": "a dog runs", "times": 2}]
    assert "1 of 9 rows cannot be used" in said and "0.jpg = 5.jpg" in said


@pytest.mark.parametrize("form", ["{}", "source=table,path={}"])
def test_verify_counts_the_pictures_of_a_test_set(folder, form, capsys):
    test = folder / "test"
    test.mkdir()
    (test / "new.jpg").write_bytes(encoded(99))
    (test / "old.jpg").write_bytes((folder / "set" / "3.jpg").read_bytes())
    (test / "small.jpg").write_bytes(encoded(4, size=(30, 23)))
    rows = "".join(f"{name}.jpg,a caption\n" for name in ("new", "old", "small"))
    (test / "captions.csv").write_text(f"filepath,caption\n{rows}")
    report = folder / "verify.json"
    wanted = form.format(test / "captions.csv")
    assert dataset.verify(section(folder, max_bad_fraction=0.2), str(report), wanted) == 0
    said = capsys.readouterr().out
    assert "2 of 3 test pictures are in the training set" in said
    assert "    old.jpg = 3.jpg" in said and "    small.jpg = 4.jpg" in said
    assert read_json(report)["against"]["equal bytes"]["count"] == 1


@pytest.mark.parametrize(
    ("tables", "asked", "advice"),
    [
        ({"a.csv": "caption", "b.csv": "caption"}, "2 things to read", 2),
        ({"a.csv": "title,description"}, "2 columns could be the caption", 3),
        ({"a.csv": "findings,impression"}, "2 columns could be the caption", 3),
    ],
)
@pytest.mark.parametrize("form", ["{}", "source=auto,path={}"])
def test_advice_about_a_test_set_works_when_it_is_obeyed(folder, form, tables, asked, advice):
    test, config = folder / "a test", section(folder, max_bad_fraction=0.2)
    test.mkdir()
    (test / "new.jpg").write_bytes(encoded(99))
    for name, columns in tables.items():
        cells = ",".join(f"{word} of a dog" for word in columns.split(","))
        (test / name).write_text(f"image,{columns}\nnew.jpg,{cells}\n")
    with pytest.raises(DataError, match=asked) as caught:
        dataset.verify(config, "", form.format(test))
    assert "--config" not in str(caught.value)
    words = shlex.split(str(caught.value).replace(";", " "))
    flags = [word.removeprefix("--against=") for word in words if word.startswith("--against=")]
    assert len(flags) == advice
    for flag in flags:
        assert dataset.verify(config, "", flag) == 0


@pytest.mark.parametrize(
    "text, name",
    [
        ("a dog", "Latin"),
        ("ｄｏｇ", "Latin"),
        ("שלום עולם hi", "Hebrew"),
        ("犬が走るよ", "Hiragana"),
        ("12, 34!", "no letters"),
        ("🐕🌳", "no letters"),
    ],
)
def test_scripts(text, name):
    assert script(text) == name


def test_tokens_are_counted_unless_the_tokenizer_must_be_trained(folder):
    merges = folder / "merges.txt"
    merges.write_text("#version: 0.2\nt h\n")
    tokenizer = {"name": "clip_bpe", "vocab_size": 515, "context": 8, "path": str(merges)}
    count = token_counter(tokenizer)
    report = verify(Table(section(folder)["data"]["path"]), count_tokens=count)
    assert report["captions"]["lengths"]["tokens"]["least"] == len("asquare") + 2
    trained = {"name": "sentencepiece", "vocab_size": 64, "context": 8}
    assert token_counter(trained) is None
    assert token_counter(None) is None


def digests(path):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.iterdir())}


def test_packed_shards_read_back(folder, capsys):
    config, output = section(folder), folder / "packed"
    dataset.pack(config, str(output), "3rows")
    said = capsys.readouterr().out
    assert "left out: row 7, 7.jpg: " in said and "8 rows in 3 shards" in said
    source, packed = Table(config["data"]["path"]), WebDataset(str(output / "*.tar"))
    rows = [row for row in range(9) if row != BROKEN]
    assert [packed[i].texts for i in range(8)] == [source[row].texts for row in rows]
    assert [packed[i].image for i in range(7)] == [source[row].image for row in rows[:7]]
    assert packed[7].image.startswith(b"\x89PNG")  # bmp is converted
    assert [key.split("/")[1] for key in list(packed.keys())] == [f"{row:09d}" for row in rows]
    about = read_json(output / "pack.json")
    assert about["rows"] == 8 and about["skipped"][0]["key"] == "7.jpg"
    assert about["fingerprint_of_source"] == fingerprint(source)
    dataset.pack(config, str(folder / "again"), "3rows")
    assert digests(folder / "again") == digests(output)
    with pytest.raises(DataError, match="not empty"):
        dataset.pack(config, str(output))
    assert sorted(p.name for p in folder.iterdir()) == ["again", "cache", "packed", "set"]


def test_classes_become_labels(folder):
    for name, seeds in (("cat", (0, 1)), ("dog", (2,))):
        (folder / "classes" / name).mkdir(parents=True)
        for seed in seeds:
            (folder / "classes" / name / f"{seed}.jpg").write_bytes(encoded(seed))
    config = {"data": {"source": "folder", "path": str(folder / "classes")}}
    dataset.pack(config, str(folder / "packed"))
    source, packed = Folder(str(folder / "classes")), WebDataset(str(folder / "packed" / "*.tar"))
    assert [e.label for e in map(packed.__getitem__, range(3))] == [0, 0, 1]
    assert [e.image for e in map(packed.__getitem__, range(3))] == [
        source[i].image for i in range(3)
    ]
    assert read_json(folder / "packed" / "pack.json")["classes"] == ["cat", "dog"]
    assert verify(source)["labels"] == {"cat": 2, "dog": 1}


def test_shards_are_not_larger_than_the_limit(folder):
    dataset.pack(section(folder), str(folder / "packed"), "20KB")
    sizes = [f.stat().st_size for f in (folder / "packed").glob("*.tar")]
    assert len(sizes) > 1 and max(sizes) <= 20_480


@pytest.mark.parametrize(
    "call",
    [
        lambda config: dataset.pack(config, "out", "many"),
        lambda config: dataset.pack(config, "out", "0rows"),
        lambda config: dataset.pack(mixture(a=config["data"]), "out"),
        lambda config: dataset.verify({}),
        lambda config: dataset.verify({"data": {"source": "tabel", "path": "x"}}),
        lambda config: dataset.show_fingerprint({"data": config["data"] | {"pth": "x"}}),
    ],
)  # fmt: skip
def test_wrong_arguments_are_config_errors(folder, call):
    with pytest.raises(ConfigError):
        call(section(folder))


def test_index_opens_every_source(folder, capsys):
    dataset.pack(section(folder), str(folder / "packed"), "3rows")
    shards = {"source": "webdataset", "path": str(folder / "packed" / "*.tar")}
    parts = {"a": shards | {"weight": 1.0}, "b": section(folder)["data"] | {"weight": 2.0}}
    config = mixture(**parts) | {"evals": {"retrieval": {"data": shards}}}
    capsys.readouterr()
    dataset.index(config)
    lines = capsys.readouterr().out.splitlines()
    guessed = [line for line in lines if line.startswith("data.parts.b.")]
    assert [line.split(" = ")[0] for line in guessed] == [
        f"data.parts.b.{key}" for key in ("image", "captions", "separator")
    ]
    lines = [line for line in lines if line not in guessed]
    assert lines[0].startswith("config.data.parts.a: webdataset, 8 rows in 3 shards")
    assert lines[1].startswith("config.data.parts.b: table, 9 rows")
    assert lines[2].startswith("config.evals.retrieval.data: webdataset, 8 rows in 3 shards")
    assert str(folder / "cache") in lines[3] and any((folder / "cache").rglob("*.npz"))


def test_fingerprint_shows_the_published_number_of_rows(folder, capsys):
    dataset.show_fingerprint(section(folder, manifest="coco"))
    digest = fingerprint(Table(section(folder)["data"]["path"]))
    assert capsys.readouterr().out == f"coco: 9 of 118,287 (0.0%), fingerprint {digest}\n"


def small(folder):
    """The quickstart's towers on the generated data set."""
    config = cli.load_config(
        str(ROOT / "configs" / "quickstart.py"), [*SMALL, ("tokenizer.vocab_size", "60")]
    )
    config["data"] = section(folder)["data"]
    config["objective"]["augmentation"] = "mocov2"
    return config


def test_a_preview_shows_what_the_model_sees(folder, capsys):
    output = folder / "preview.html"
    dataset.preview(small(folder), str(output), rows=9)
    text = output.read_text("utf-8")
    assert text.count("<article>") == 9 and text.count('alt="view 1"') == 9
    assert 'class="used" dir="auto">كلب يجري على العشب<' in text
    assert "replaces the unusable row 7.jpg: the picture" in text
    assert "colours jittered (80%)" in text and "blurred (50%)" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)  # self-contained
    assert "9 rows of 9" in capsys.readouterr().out


def test_the_feed_is_timed(folder, capsys):
    dataset.time_feed(small(folder), steps=2, images_per_second=1e9)
    said = capsys.readouterr().out
    for stage in ("read", "decode", "crop, 1 view", "tokenise", "transfer", "photometry", "whole"):
        assert re.search(rf"^{stage}.* \d+\.\d\d\d", said, re.MULTILINE), stage
    assert re.search(r"input-bound: needs about [\d]+ cores for this model, and has \d+", said)


@pytest.mark.parametrize(
    "wanted, said",
    [
        (None, "one core feeds 100 images/s; "),
        (150, "not input-bound: needs about 2 cores for this model, and has 2"),
        (201, "input-bound: needs about 3 cores for this model, and has 2"),
    ],
)
def test_the_verdict(wanted, said):
    assert feed_speed.verdict(100, wanted, 2).startswith(said)


@pytest.mark.slow  # times passes over the data
def test_another_loader_is_compared(folder):
    script = folder / "other.py"
    script.write_text(
        "import json, sys\n"
        "print(json.dumps({'ready': True, 'other': '1.0'}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    spent = {'two\\n': 64.0, 'one\\n': 32.0}[line]\n"
        "    print(json.dumps({'seconds': spent, 'cpu': spent}), flush=True)\n"
    )
    found = feed_comparison.against(script, passes=64, files=64, rounds=2)
    assert found.versions == "other 1.0" and found.files == 64 and 10 < found.kilobytes < 60
    for (_, own, other), rate in zip(found.rows, (1.0, 2.0)):
        assert [(speed.per_core, speed.wall) for speed in other] == [(rate, rate)] * 2
        assert all(speed.per_core > 0 for speed in own)
    assert "| two views, as DeCLIP | " in "\n".join(feed_comparison.markdown(found))


def test_another_loader_that_cannot_run_is_reported_in_one_line(folder):
    with pytest.raises(DataError, match="a checkout of clipx"):
        feed_comparison.against(folder / "nowhere.py")
    script = folder / "broken.py"
    script.write_text("import no_such_package\n")
    with pytest.raises(DataError, match="No module named 'no_such_package'"):
        feed_comparison.against(script, files=8)


def test_the_error_for_an_unknown_command_lists_all_commands(capsys):
    for argv in (["dataset", "veryfi"], ["dataset"], ["dataset", "--config=x"]):
        with pytest.raises(SystemExit) as ended:
            dataset.take_command(argv)
        assert ended.value.code == cli.EXIT_CONFIG
        (line,) = capsys.readouterr().err.splitlines()
        assert all(name in line for name in dataset.COMMANDS)
    argv = ["dataset", "verify", "--config=x"]
    assert dataset.take_command(argv) == "verify" and argv == ["dataset", "--config=x"]


def test_the_command_line(folder):
    done = commands.run(
        "dataset", "verify", "--config=configs/quickstart.py",
        f"--config.data={section(folder)['data']}", f"--output={folder / 'v.json'}",
    )  # fmt: skip
    assert done.returncode == cli.EXIT_CONFIG, done.stderr
    assert "9 rows, 1 of them bad (11.11%)" in done.stdout
    assert json.loads((folder / "v.json").read_text())["config.data"]["rows"] == 9
