"""A damaged file of any kind is read, or refused in one block that names it."""

import collections
import signal

import numpy as np
import pytest
from support import damage

from clipx.errors import ConfigError, DataError

SECONDS = 20  # in which a file of a few kilobytes is read


class TooSlow(BaseException):
    """Nothing that reads a file may catch it."""


def out_of_time(*_):
    raise TooSlow


@pytest.fixture(autouse=True)
def clock():
    before = signal.signal(signal.SIGALRM, out_of_time)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(kind, file, said):
    """Whether the file is read; refused is a `DataError` or a `ConfigError` of a few lines."""
    signal.alarm(SECONDS)
    try:
        kind.read(file)
    except (ConfigError, DataError) as error:
        assert len(str(error).splitlines()) <= 6, f"{said}\n{error}"
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
    return "read"


@pytest.mark.parametrize("kind", damage.KINDS, ids=lambda kind: kind.name)
def test_whole_files_are_read(kind, tmp_path):
    for name, data in (*kind.beside.items(), (kind.name, kind.data())):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
    expected = "refused" if kind.name == "prompts.md" else "read"  # two of its ten classes
    assert outcome(kind, tmp_path / kind.name, kind.name) == expected


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_files(count, tmp_path, monkeypatch, capsys):
    rng, seen = np.random.default_rng(count), collections.Counter()
    for kind in damage.KINDS:
        for name, data in kind.beside.items():
            file = tmp_path / kind.name.replace(".", "_") / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        (tmp_path / kind.name.replace(".", "_")).mkdir(exist_ok=True)
    whole = [kind.data() for kind in damage.KINDS]
    for i in range(count):
        kind = damage.KINDS[i % len(damage.KINDS)]
        data, accidents = damage.damaged(whole[i % len(damage.KINDS)], rng)
        file = tmp_path / kind.name.replace(".", "_") / kind.name
        file.write_bytes(data)
        seen[outcome(kind, file, f"{kind.name}, number {i}: {accidents}")] += 1
        file.unlink()
    with capsys.disabled():
        print(f"\n{count} files: {dict(seen)}")
    assert min(seen["read"], seen["refused"]) > count / 10
