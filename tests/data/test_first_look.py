"""What is wrong with a whole set is said of the set, before anything compiles."""

import io
import tarfile

import pytest
from support.runs import small
from support.shards import shard

from clipx.data import first_look
from clipx.data.base import Example, Source
from clipx.data.config import DataConfig
from clipx.data.sources.mixture import Mixture
from clipx.data.sources.shapes import Shapes
from clipx.data.sources.webdataset import WebDataset
from clipx.errors import BadSample, DataError
from clipx.train import train
from clipx.training.session import Session


class Rows(Source):
    """Rows of which some are bad, without a caption, or both."""

    classes = ()

    def __init__(self, rows, bad=(), unlabelled=True, texts=("a",)):
        self.rows, self.bad, self.texts, self.seen = rows, set(bad), texts, []
        self.label = None if unlabelled else 1

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        self.seen.append(row)
        if row in self.bad:
            raise BadSample(f"key {row}", f"/data/{row}.jpg cannot be read (No such file)")
        return Example(b"", self.texts, row, f"key {row}", self.label)


CONFIG = DataConfig(source="")


@pytest.mark.parametrize(
    ("rows", "bad", "limit", "refused"),
    [
        (160, 159, 0.01, True),
        (160, 8, 0.01, True),
        (160, 5, 0.01, False),  # a few rows of a small set
        (48, 2, 0.0, False),
        (4, 3, 0.01, True),
        (4, 4, 1.0, True),
        (4, 3, 1.0, False),
        (1000, 10, 0.01, False),
        (1000, 11, 0.01, True),
        (0, 0, 0.01, False),
    ],
)
def test_more_bad_rows_than_a_run_allows(rows, bad, limit, refused):
    source = Rows(rows, bad=range(bad))
    config = DataConfig(source="", max_bad_fraction=limit)
    if not refused:
        return first_look.refuse_unusable(source, config)
    with pytest.raises(DataError) as error:
        first_look.refuse_unusable(source, config)
    said = (
        f"{bad} of {rows:,} rows looked at cannot be used, more than config.data.max_bad_fraction"
    )
    assert said in str(error.value) and "\n" not in str(error.value)
    assert f": {bad}: /data/0.jpg cannot be read (No such file), such as key 0" in str(error.value)


def test_a_sample_of_a_large_set_is_looked_at_with_room_for_chance():
    source = Rows(100_000)
    first_look.refuse_unusable(source, CONFIG)
    seen = sorted(source.seen)
    assert len(seen) == 1000 and (seen[0], seen[-1]) == (0, 99_999)
    source.bad = set(seen[:15])
    first_look.refuse_unusable(source, CONFIG)
    source.bad = set(seen[:30])
    with pytest.raises(DataError, match="30 of 1,000 rows looked at"):
        first_look.refuse_unusable(source, CONFIG)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (Rows(50, unlabelled=False, texts=()), "50: a label and no caption, such as key 0; a run"),
        (Rows(50, texts=()), "50: no caption, such as key 0"),
        (Rows(50, texts=("一只狗",)), "50: Chinese characters in the caption"),
    ],
)
def test_rows_without_a_caption_to_train_on(source, said):
    with pytest.raises(DataError) as error:
        first_look.refuse_unusable(source, DataConfig(source="", reject_cjk=True))
    assert said in str(error.value)


def test_evaluation_sets_of_another_kind():
    first_look.refuse_unfit("evals.a.data", Rows(9), "captions")
    first_look.refuse_unfit("evals.a.data", Rows(9), "")
    first_look.refuse_unfit("evals.a.data", Rows(9, bad=range(8)), "captions")
    with pytest.raises(DataError, match=r"evals.a.data: none of 9 .*the evaluator zero_shot"):
        first_look.refuse_unfit("evals.a.data", Rows(9, texts=()), "captions")
    with pytest.raises(DataError, match="9: no labels, such as key 0; .* the evaluator retrieval"):
        first_look.refuse_unfit("evals.a.data", Rows(9), "labels")
    with pytest.raises(DataError, match="none of 4 rows .*: 4: /data/0.jpg cannot be read"):
        first_look.refuse_unfit("evals.a.data", Rows(9, bad=range(4)), "", limit=4)


def test_a_glance_is_the_example_without_its_picture(tmp_path):
    path = str(shard(tmp_path / "a.tar", 4, **{"0002.jpg": b"", "0003.txt": b" "}))
    for source in (WebDataset(path), Mixture({"a": {"source": "webdataset", "path": path}})):
        assert source.glance(1) == source[1]._replace(image=b"")
        for row in (2, 3):
            for read in (source.glance, source.__getitem__):
                with pytest.raises(BadSample, match="empty caption|no bytes"):
                    read(row)
    drawn = Mixture({"a": {"source": "shapes", "size": 9}})
    for row in range(9):
        assert drawn.glance(row)._replace(image=b"") == drawn[row]._replace(image=b"")


def test_of_rows_that_are_made_a_few_are_looked_at(monkeypatch):
    seen = []
    drawn = Shapes(size=5000)
    monkeypatch.setattr(Shapes, "glance", lambda self, row: seen.append(row) or self[row])
    first_look.refuse_unusable(drawn, DataConfig("shapes"))
    assert len(seen) == 20 and max(seen) == 4999


def run_on(tmp_path, members, monkeypatch):
    """Trains on a tar of these members, in which nothing may compile."""
    monkeypatch.setattr(Session, "_compile", None)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    config = small(("train.total_steps", "2"), ("evals", "{}"), ("train.best", ""))
    config["data"] = {"source": "webdataset", "path": str(tmp_path / "x.tar")}
    with pytest.raises(DataError) as error:
        train(config, str(tmp_path / "run"))
    return str(error.value)


def test_a_run_without_captions_ends_before_it_compiles(tmp_path, monkeypatch):
    pictures = [(f"{i:03}.jpg", b"picture") for i in range(160)]
    said = run_on(tmp_path, [*pictures, ("000.txt", b"the only one")], monkeypatch)
    assert "159 of 160 rows looked at" in said and "x.tar/001" in said
    labels = [(f"{i:03}.cls", b"3") for i in range(160)]
    said = run_on(tmp_path, [*labels, *pictures], monkeypatch)
    assert "160: a label and no caption, such as x.tar/000; a run trains on captions" in said
    others = [(f"{i + 155:03}.txt", b"words") for i in range(160)]
    said = run_on(tmp_path, [*pictures, *others], monkeypatch)
    assert "155: no caption" in said and "155: no picture" in said
