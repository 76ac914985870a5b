"""Each operation has the results and probabilities of textaugment's, and is reproducible."""

from __future__ import annotations

import collections
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from clipx.config import binding as configs
from clipx.data.text import augment as text_augment
from clipx.data.text import wordnet
from clipx.data.text.augment import TextAugment, TextAugmentConfig
from clipx.data.text.wordnet import WordNet
from clipx.errors import ConfigError, DataError

DRAWS = 4000
TYPES = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
SYNSETS = [
    ("noun", ["dog", "domestic_dog", "Canis_familiaris"]),
    ("noun", ["frank", "hot-dog", "dog"]),
    ("verb", ["chase", "dog"]),
    ("noun", ["goose"]),
    ("noun", ["1900s"]),
    ("noun", ["century", "1900s"]),
    ("adj", ["galore(ip)", "plenty"]),
    ("verb", ["run", "scat"]),
    ("noun", ["mouse", "shiner"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small WordNet in the format of wndb(5WN)."""
    path = tmp_path_factory.mktemp("wordnet")
    for part, kind in TYPES.items():
        data, index = "  1 a licence  \n", collections.defaultdict(list)
        for words in (words for p, words in SYNSETS if p == part):
            for word in words:
                index[word.partition("(")[0].lower()].append(len(data))
            members = " ".join(f"{word} 0" for word in words)
            data += f"{len(data):08d} 03 {kind} {len(words):02x} {members} 000 | said of it  \n"
        lines = [
            f"{lemma} {kind} {len(at)} 1 @ {len(at)} 0 {' '.join(f'{i:08d}' for i in at)}  \n"
            for lemma, at in sorted(index.items())
        ]
        (path / f"data.{part}").write_text(data)
        (path / f"index.{part}").write_text("  1 a licence  \n" + "".join(lines))
        (path / f"{part}.exc").write_text("geese goose\nmice mouse\n" if part == "noun" else "")
    return path


def augment(folder=None, **values) -> TextAugment:
    return TextAugment(TextAugmentConfig(wordnet=str(folder or ""), **values))


def outcomes(do: TextAugment, text: str) -> collections.Counter:
    rng = np.random.default_rng(0)
    return collections.Counter(do(text, rng) for _ in range(DRAWS))


def close(count: int, probability: float) -> bool:
    """Whether `count` of `DRAWS` is within four standard deviations of its expectation."""
    deviation = (probability * (1 - probability) / DRAWS) ** 0.5
    return abs(count / DRAWS - probability) <= 4 * deviation


def test_lemmas_of_a_word_and_of_its_forms(folder):
    net = WordNet(str(folder))
    dog = ["dog", "domestic_dog", "Canis_familiaris", "frank", "hot-dog", "chase"]
    assert net.lemmas("dog") == net.lemmas("DOG") == net.lemmas("dogs") == dog
    assert net.lemmas("geese") == ["goose"]  # irregular
    assert net.lemmas("mice") == ["mouse", "shiner"]
    assert net.lemmas("chasing") == ["chase", "dog"]  # ing -> e
    assert net.lemmas("galore") == ["galore", "plenty"]  # without the "(ip)" of the file
    assert net.lemmas("runs") == ["run", "scat"]
    for word in ("dog,", "cat", "", "s", "ing", "zzz", "!", "猫", "\ud83d"):
        assert net.lemmas(word) == []


def test_synonyms_are_normalised_and_exclude_the_word(folder):
    net = WordNet(str(folder))
    dog = ("canis familiaris", "chase", "domestic dog", "frank", "hot dog")
    assert text_augment.synonyms(net, "dog") == dog
    assert "dog" in text_augment.synonyms(net, "Dog")  # differs in case, so it counts as another
    assert text_augment.synonyms(net, "century") == ("s",)
    assert text_augment.synonyms(net, "goose") == ()
    assert text_augment.synonyms(net, "geese") == ("goose",)


def test_one_word_gets_a_synonym_at_all_its_occurrences(folder):
    do = augment(folder, operations=("synonym",))
    # stop words and words without synonyms never change; "dog," is not a word of WordNet
    counts = outcomes(do, "a dog and  a dog , dog,")
    assert set(counts) == {
        f"a {s} and a {s} , dog,"
        for s in ("canis familiaris", "chase", "domestic dog", "frank", "hot dog")
    }
    assert all(close(n, 1 / 5) for n in counts.values())
    counts = outcomes(do, "run zzz mouse run")  # samples distinct words, not positions
    assert set(counts) == {"scat zzz mouse scat", "run zzz shiner run"}
    assert close(counts["run zzz shiner run"], 1 / 2)
    assert set(outcomes(do, "the cat")) == {"the cat"}
    both = augment(folder, operations=("synonym",), count=2)
    assert set(outcomes(both, "run mouse")) == {"scat shiner"}


def test_swap():
    do = augment(operations=("swap",))
    counts = outcomes(do, "a b c")
    assert close(counts.pop("a b c"), 3**-3)  # all three samples of the second gave the first
    assert set(counts) == {"b a c", "c b a", "a c b"}
    assert all(close(n, (1 - 3**-3) / 3) for n in counts.values())
    assert set(outcomes(do, "alone")) == {"alone"}
    twice = outcomes(augment(operations=("swap",), count=2), "a b")
    assert close(twice["a b"], (1 / 8) ** 2 + (7 / 8) ** 2)


def test_deletion_keeps_nine_tenths_and_at_least_one():
    do = augment(operations=("delete",))
    counts = outcomes(do, "a b")
    assert close(counts["a b"], 0.81)
    assert close(counts["a"], 0.09 + 0.01 / 2)
    assert close(counts["b"], 0.09 + 0.01 / 2)
    assert set(outcomes(do, "alone")) == {"alone"}
    counts = outcomes(augment(operations=("delete",), probability=1.0), "a b c d")
    assert set(counts) == set("abcd")
    assert all(close(n, 1 / 4) for n in counts.values())


def test_insertion_is_before_a_word(folder):
    do = augment(folder, operations=("insert",))
    counts = outcomes(do, "the mouse")
    assert set(counts) == {"shiner the mouse", "the shiner mouse"}
    assert close(counts["shiner the mouse"], 1 / 2)
    assert set(outcomes(do, "the and")) == {"the and"}
    counts = outcomes(do, "cat mouse")
    assert close(counts["cat mouse"], 2**-9)  # all nine samples gave "cat", which has no synonym


def test_operations_are_equally_likely():
    counts = outcomes(augment(operations=("swap", "delete"), probability=1.0), "a b")
    assert close(counts["b a"], 1 / 2 * 7 / 8)
    assert close(counts["a b"], 1 / 2 * 1 / 8)
    assert close(counts["a"], 1 / 4)


def test_no_words_and_odd_words(folder):
    do = augment(folder, operations=("synonym", "swap", "delete", "insert"))
    rng = np.random.default_rng(0)
    for text in ("", "  ", "\n\t"):
        assert do(text, rng) == text
    for text in ("\u0000", "👨‍👩‍👧 مرحبا", "x" * 10_000, "( [ \\1 %s"):
        for _ in range(20):
            assert set(do(text, rng).split()) <= set(text.split())


def test_results_depend_only_on_the_generator(folder):
    do = augment(folder, operations=("synonym", "swap", "delete", "insert"))
    text = "a dog runs and geese chase the mouse"

    def run(do: TextAugment) -> list[str]:
        return [do(text, np.random.default_rng(seed)) for seed in range(200)]

    assert len(set(run(do))) > 20
    sent = pickle.dumps(do)
    assert len(sent) < 1000
    assert run(pickle.loads(sent)) == run(do)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, [augment(folder, operations=do.config.operations)] * 4)) == (
            [run(do)] * 4
        )


def test_where_wordnet_is_found(folder, tmp_path, monkeypatch):
    for name in ("WORDNET", "WNHOME", "NLTK_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORDNET", str(folder))
    assert WordNet().lemmas("mice") == ["mouse", "shiner"]
    assert WordNet(str(folder)).lemmas("mice")  # the config has precedence
    monkeypatch.delenv("WORDNET")
    (tmp_path / "dict").symlink_to(folder)
    monkeypatch.setenv("WNHOME", str(tmp_path))
    assert WordNet().lemmas("mice") == ["mouse", "shiner"]
    monkeypatch.delenv("WNHOME")
    (tmp_path / "corpora").mkdir()
    with zipfile.ZipFile(tmp_path / "corpora" / "wordnet.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"wordnet/{file.name}")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    assert tmp_path / "corpora" / "wordnet.zip" in list(wordnet.usual_folders())
    assert WordNet(str(tmp_path / "corpora" / "wordnet.zip")).lemmas("mice")


def test_synonyms_without_wordnet_are_a_config_error(tmp_path, monkeypatch):
    for name in ("WORDNET", "WNHOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(wordnet, "usual_folders", lambda: iter([tmp_path / "none"]))
    for operation in ("synonym", "insert"):
        with pytest.raises(ConfigError) as error:
            augment(operations=(operation,))
        assert error.value.where == "config.data.text_augment.wordnet"
        for way in (
            *("apt install wordnet-base", "pip install nltk", "nltk.downloader wordnet"),
            'operations=("swap", "delete")',
        ):
            assert way in str(error.value)
    augment(operations=("swap", "delete"))
    with pytest.raises(ConfigError, match="no WordNet in .*nothing_here.*, the value of wordnet"):
        augment(tmp_path / "nothing_here")
    monkeypatch.setenv("WORDNET", str(tmp_path))
    with pytest.raises(ConfigError, match=r"the value of \$WORDNET"):
        augment()


def test_damaged_files_are_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data.noun").write_bytes((folder / "data.noun").read_bytes()[3:])
    with pytest.raises(DataError, match=r"data\.noun has no synset at byte \d+"):
        WordNet(str(tmp_path)).lemmas("dog")
    (tmp_path / "junk.zip").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"junk\.zip: .*File is not a zip"):
        WordNet(str(tmp_path / "junk.zip"))


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"operations": []}, "operations"),
        ({"operations": ["synonym", "swop"]}, "operations[1]"),
        ({"probability": 1.5}, "probability"),
        ({"count": 0}, "count"),
    ],
)
def test_impossible_configs(values, where):
    with pytest.raises(ConfigError) as error:
        configs.bind(TextAugmentConfig, values, where="config.data.text_augment")
    assert error.value.where == f"config.data.text_augment.{where}"


def test_a_config_binds_from_its_dump():
    config = TextAugmentConfig(operations=("swap",), count=2)
    section = configs.dump(config)
    assert configs.bind(TextAugmentConfig, section, where="config.data.text_augment") == config


def test_the_stop_words_are_nltks():
    assert len(text_augment.STOP_WORDS) == 179
    assert {"the", "don't", "wouldn't", "ourselves", "y"} <= text_augment.STOP_WORDS
    assert not {"The", "cannot", "us", "would"} & text_augment.STOP_WORDS


def test_the_real_wordnet():
    try:
        net = WordNet()
    except ConfigError as error:
        pytest.skip(error.found)
    dogs = text_augment.synonyms(net, "dogs")
    assert {"canis familiaris", "domestic dog", "hot dog", "chase", "dog"} <= set(dogs)
    assert {"better", "good", "well", "improve"} <= set(net.lemmas("better"))
    assert net.lemmas("'hood") and net.lemmas("zyrian")  # the first and last line of nouns
    assert net.lemmas("galore") == ["galore", "abounding"]  # written galore(ip)
    assert text_augment.synonyms(net, "dog,") == ()
    for word in ("s", "ing", "er", "men"):  # removing the ending leaves an empty base form
        net.lemmas(word)
