"""Synonyms from the files of WordNet, without loading all of them.

The format is Princeton's (wndb(5WN)), with three files per part of speech. `index` has sorted
lines, so that bisection finds a word. Its lines point to byte offsets in `data`, which has the
synsets. `.exc` has the irregular forms.
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
# ending:replacement rules that turn an inflected form into a base form (morphy(7WN))
_ENDINGS = {
    "noun": ("s:", "ses:s", "ves:f", "xes:x", "zes:z", "ches:ch", "shes:sh", "men:man", "ies:y"),
    "verb": ("s:", "ies:y", "es:e", "es:", "ed:e", "ed:", "ing:e", "ing:"),
    "adj": ("er:", "est:", "er:e", "est:e"),
    "adv": (),
}
_FILES = [f"{kind}.{part}" for kind in ("index", "data") for part in _ENDINGS]
_FILES += [f"{part}.exc" for part in _ENDINGS]


def _contents(path: pathlib.Path) -> dict[str, bytes | mmap.mmap] | None:
    """WordNet's files by name, from a folder or a zip file; None if some are missing.

    Files in a folder are mapped. A zip file is read into memory (30 MB).
    """
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
    if not file.stat().st_size:  # an empty file cannot be mapped
        return b""
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def usual_folders() -> Iterator[pathlib.Path]:
    """The default locations of WordNet: Debian's folder, then those that NLTK searches."""
    yield pathlib.Path("/usr/share/wordnet")
    roots = [*filter(None, os.environ.get("NLTK_DATA", "").split(os.pathsep)), "~/nltk_data"]
    roots += [f"{sys.prefix}/{at}nltk_data" for at in ("", "share/", "lib/")]
    roots += [f"/usr/{at}nltk_data" for at in ("share/", "local/share/", "lib/", "local/lib/")]
    for root in roots:
        for name in ("wordnet", "wordnet.zip"):
            yield pathlib.Path(root).expanduser() / "corpora" / name


class WordNet:
    """The WordNet at `path`, else at $WORDNET or $WNHOME, else at the usual places.

    The files are mapped, so processes share their memory. Many threads may use one instance.

    Raises `ConfigError` if there is no WordNet, and `DataError` if it is damaged.
    """

    def __init__(self, path: str = ""):
        settings = {"wordnet": path} | {f"${n}": os.environ.get(n) for n in ("WORDNET", "WNHOME")}
        setting, folder = next(((k, v) for k, v in settings.items() if v), ("", ""))
        home = pathlib.Path(folder).expanduser()
        candidates = [home, home / "dict"] if folder else list(usual_folders())
        files = next(filter(None, map(_contents, candidates)), None)
        if files is None:
            raise ConfigError(
                "config.data.text_augment.wordnet",
                f"no WordNet in {folder!r}, the value of {setting}"
                if folder
                else "no WordNet in the usual places",
                f"a folder or zip with {', '.join(_FILES[:2])}, ..., {_FILES[-1]}",
                f'{INSTALL}; or set operations=("swap", "delete"), which need no WordNet',
            )
        self._files = files
        self._irregular = {part: _exceptions(files[f"{part}.exc"]) for part in _ENDINGS}

    def lemmas(self, word: str) -> list[str]:
        """The distinct lemma names of all synsets of `word` and its base forms, in WordNet's order
        and with its `_` and `-`. Empty if there is no synset."""
        names = {}
        for part in _ENDINGS:
            for form in self._base_forms(word.lower(), part):
                for offset in self._synsets(form, part):
                    names |= dict.fromkeys(self._synset(offset, part))
        return list(names)

    def noun(self, offset: int) -> list[str]:
        """The lemma names of the noun synset at a byte offset; [] if none starts there."""
        try:
            return self._synset(offset, "noun")
        except DataError:
            return []

    def _base_forms(self, word: str, part: str) -> list[str]:
        """`word` and its possible base forms, which need not be in the index."""
        forms = self._irregular[part].get(word)
        if forms is None:
            rules = (rule.split(":") for rule in _ENDINGS[part])
            forms = [word.removesuffix(old) + new for old, new in rules if word.endswith(old)]
        # an ending such as "ing" can be a word, but leaves ""
        return [form for form in dict.fromkeys([word, *forms]) if form]

    def _synsets(self, form: str, part: str) -> list[int]:
        """The offsets of the synsets of a word in the index.

        Fields of a line: lemma, part of speech, number of synsets, number of pointers, the
        pointers, two counts, the offsets.
        """
        line = _line(self._files[f"index.{part}"], form.encode("utf-8", "replace")).split()
        try:
            return [int(offset) for offset in line[-int(line[2]) :]] if line else []
        except (ValueError, IndexError):
            raise DataError(
                f"WordNet's index.{part} has a damaged line for {form!r}; install WordNet again"
            ) from None

    def _synset(self, offset: int, part: str) -> list[str]:
        """The words of the synset at a byte offset in the data.

        Fields of a line: offset, file, type, number of words (hexadecimal), then each word with its
        sense. The position of an adjective may follow its word, as in `galore(ip)`.
        """
        data = self._files[f"data.{part}"]
        inside = 0 <= offset < len(data)
        fields = data[offset : data.find(b"\n", offset)].split() if inside else []
        if not fields or fields[0] != b"%08d" % offset:
            raise DataError(
                f"WordNet's data.{part} has no synset at byte {offset}: the file does not belong "
                f"to index.{part}, or is damaged; install WordNet again"
            )
        try:
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        except (ValueError, IndexError):
            raise DataError(
                f"WordNet's data.{part} has a damaged line at byte {offset}; install WordNet again"
            ) from None
        return [word.partition(b"(")[0].decode("utf-8", "replace") for word in words]


def _exceptions(data: bytes | mmap.mmap) -> dict[str, list[str]]:
    lines = (line.split() for line in bytes(data).decode("utf-8", "replace").splitlines())
    return {line[0]: line[1:] for line in lines if line}


def _line(data: bytes | mmap.mmap, word: bytes) -> bytes:
    """The line of a sorted file that starts with `word` and a space; b'' if none does."""
    low, high = 0, len(data)
    while low < high:  # both are always the start of a line
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
