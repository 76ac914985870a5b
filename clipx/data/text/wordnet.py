"""WordNet's words and their synonyms, read where they lie: nothing is loaded but what is asked.

The files are Princeton's (wndb(5WN)): an `index` of sorted lines a part of speech, of which a line
is found by bisection; the `data` that it points into by byte; and the irregular forms in `.exc`.
"""

from __future__ import annotations

import mmap
import os
import pathlib
import sys
import zipfile
from collections.abc import Iterator

from clipx.errors import ConfigError, DataError

INSTALL = (
    "apt install wordnet-base, or pip install nltk and python -m nltk.downloader wordnet, "
    "or name its folder in config.data.text_augment.wordnet"
)
# endings and what stands for them in a base form, tried one at a time (morphy(7WN))
_ENDINGS = {
    "noun": ("s:", "ses:s", "ves:f", "xes:x", "zes:z", "ches:ch", "shes:sh", "men:man", "ies:y"),
    "verb": ("s:", "ies:y", "es:e", "es:", "ed:e", "ed:", "ing:e", "ing:"),
    "adj": ("er:", "est:", "er:e", "est:e"),
    "adv": (),
}
_FILES = [f"{kind}.{part}" for kind in ("index", "data") for part in _ENDINGS]
_FILES += [f"{part}.exc" for part in _ENDINGS]


def _contents(path: pathlib.Path) -> dict[str, bytes | mmap.mmap] | None:
    """WordNet's files by name, from a folder or a zip file (which is read whole, 30 MB); None where
    they are not all there."""
    try:
        if all((path / name).is_file() for name in _FILES):
            return {name: _map(path / name) for name in _FILES}
        if path.suffix == ".zip" and path.is_file():
            with zipfile.ZipFile(path) as archive:
                members = {name.rpartition("/")[2]: name for name in archive.namelist()}
                if members.keys() >= set(_FILES):
                    return {name: archive.read(members[name]) for name in _FILES}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: WordNet cannot be read ({error})") from None
    return None


def _map(file: pathlib.Path) -> bytes | mmap.mmap:
    if not file.stat().st_size:  # which cannot be mapped
        return b""
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def usual_folders() -> Iterator[pathlib.Path]:
    """Where WordNet is when nobody says so: Debian's folder, then those that NLTK searches."""
    yield pathlib.Path("/usr/share/wordnet")
    roots = [*filter(None, os.environ.get("NLTK_DATA", "").split(os.pathsep)), "~/nltk_data"]
    roots += [f"{sys.prefix}/{at}nltk_data" for at in ("", "share/", "lib/")]
    roots += [f"/usr/{at}nltk_data" for at in ("share/", "local/share/", "lib/", "local/lib/")]
    for root in roots:
        for name in ("wordnet", "wordnet.zip"):
            yield pathlib.Path(root).expanduser() / "corpora" / name


class WordNet:
    """The WordNet at `path`, else at $WORDNET or $WNHOME, else where Debian or NLTK puts it.

    The files are mapped, so that processes share them; it may be asked from many threads.
    Raises `ConfigError` where there is none, `DataError` where it is damaged.
    """

    def __init__(self, path: str = ""):
        said = {"wordnet": path} | {f"${n}": os.environ.get(n) for n in ("WORDNET", "WNHOME")}
        who, where = next(((k, v) for k, v in said.items() if v), ("", ""))
        home = pathlib.Path(where).expanduser()
        places = [home, home / "dict"] if where else list(usual_folders())
        files = next(filter(None, map(_contents, places)), None)
        if files is None:
            found = f"no WordNet in {where!r}, as {who} says" if where else "WordNet is nowhere"
            raise ConfigError(
                "config.data.text_augment.wordnet",
                found,
                f"a folder or zip with {', '.join(_FILES[:2])}, ..., {_FILES[-1]}",
                f'{INSTALL}; operations=("swap", "delete") need none',
            )
        self._files = files
        self._irregular = {part: _exceptions(files[f"{part}.exc"]) for part in _ENDINGS}

    def lemmas(self, word: str) -> list[str]:
        """The lemma names of all synsets of `word`, in their order, each once, with WordNet's `_`
        and `-`. A form stands for all its base forms; no synset: empty."""
        names = {}
        for part in _ENDINGS:
            for form in self._base_forms(word.lower(), part):
                for offset in self._synsets(form, part):
                    names |= dict.fromkeys(self._synset(offset, part))
        return list(names)

    def _base_forms(self, word: str, part: str) -> list[str]:
        """`word` and what it may be a form of, in the index or not."""
        forms = self._irregular[part].get(word)
        if forms is None:
            rules = (rule.split(":") for rule in _ENDINGS[part])
            forms = [word.removesuffix(old) + new for old, new in rules if word.endswith(old)]
        return [form for form in dict.fromkeys([word, *forms]) if form]  # "ing" is a word, "" none

    def _synsets(self, form: str, part: str) -> list[int]:
        """The synsets of one line of the index: lemma, part, how many, how many pointers, these,
        two counts, the offsets."""
        line = _line(self._files[f"index.{part}"], form.encode("utf-8", "replace")).split()
        return [int(offset) for offset in line[-int(line[2]) :]] if line else []

    def _synset(self, offset: int, part: str) -> list[str]:
        """The words of the synset at a byte of the data: offset, file, type, how many words
        (hexadecimal), then each with its sense; an adjective's place may follow it: `galore(ip)`.
        """
        data = self._files[f"data.{part}"]
        fields = data[offset : data.find(b"\n", offset)].split()
        if not fields or fields[0] != b"%08d" % offset:
            raise DataError(
                f"WordNet's data.{part} has no synset at byte {offset}: it does not belong to "
                f"index.{part}, or is damaged"
            )
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        return [word.partition(b"(")[0].decode("utf-8", "replace") for word in words]


def _exceptions(data: bytes | mmap.mmap) -> dict[str, list[str]]:
    lines = (line.split() for line in bytes(data).decode("utf-8", "replace").splitlines())
    return {line[0]: line[1:] for line in lines if line}


def _line(data: bytes | mmap.mmap, word: bytes) -> bytes:
    """The line of a sorted file that starts with `word` and a space; b'' if none does."""
    low, high = 0, len(data)
    while low < high:  # both are starts of lines
        start = data.rfind(b"\n", low, (low + high) // 2) + 1 or low
        end = data.find(b"\n", start)
        line = data[start : end if end >= 0 else len(data)]
        first = line.partition(b" ")[0]
        if first == word:
            return line
        if first < word:
            low = start + len(line) + 1
        else:
            high = start
    return b""
