"""Secrets stay inside of the process; what looks like one and is none stays as it is."""

import subprocess
import sys

import pytest

from clipx.config import secrets
from clipx.errors import CheckpointError, ConfigError, DataError, RunError

PASSWORD = "h7nter-zwei"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("https://me:pw@host/a.tar", "https://***@host/a.tar"),
        ("no https://me@host:80/a, s3://k:s/e@b", "no https://***@host:80/a, s3://***@b"),
        ("ftp://me:p@w@host/a@b.tar", "ftp://***@host/a@b.tar"),
        ("zip://a.csv::https://:pw@host/x.zip", "zip://a.csv::https://***@host/x.zip"),
        ("'https://me:pw@h/a' or \"s3://k:s@b\"", "'https://***@h/a' or \"s3://***@b\""),
        ("https://h/a?n=1&token=abc&x=2", "https://h/a?n=1&token=***&x=2"),
        ("https://h/a?X-Amz-Signature=ab%2F&n=1", "https://h/a?X-Amz-Signature=***&n=1"),
        ("https://h/a?sv=1&sig=ab#access_token=x y", "https://h/a?sv=1&sig=***#access_token=*** y"),
        ("?AWSAccessKeyId=AK&Signature=s", "?AWSAccessKeyId=***&Signature=***"),
        ("?n=1&amp;api_key=z", "?n=1&amp;api_key=***"),
    ],
)  # fmt: skip
def test_secrets_of_urls_are_cut(text, expected):
    assert secrets.cut(text) == expected and secrets.hidden(secrets.cut(text))
    assert secrets.cut_all({"a": [text, 3], text: None}) == {"a": [expected, 3], expected: None}


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/a@b.tar",
        "http://localhost:80 and me@mail",
        "gs://bucket/folder/{000..005}.tar",
        "hf://datasets/org/name@main/a.parquet",
        "github://org:repo@branch/a.csv",
        "https://h/a?design=1&page=2#part=3",
        "a=b; key=value, monkey=3",
        "$FLICKR8K/train-*.tar",
        "https://$LOGIN@host/a, https://me:${PASSWORD}@host/a?token=$TOKEN&n=1",
    ],
)
def test_what_is_no_secret_stays(text):
    assert secrets.cut(text) == text and not secrets.hidden(text)


def test_values_of_variables(monkeypatch):
    monkeypatch.setenv("CLIPX_LOGIN", f"me:{PASSWORD}")
    monkeypatch.setenv("CLIPX_PASSWORD", PASSWORD)
    monkeypatch.setenv("CLIPX_BUCKET", "bucket-of-mine")
    monkeypatch.setenv("CLIPX_FOLDER", "/data/pairs")
    monkeypatch.setenv("CLIPX_TOKENIZERS", "falsefalse")
    monkeypatch.setenv("CLIPX_KEY", "abc")
    text = f"falsefalse abc bucket-of-mine /data/pairs me:{PASSWORD} {PASSWORD}"
    assert (
        secrets.cut(text)
        == "falsefalse abc bucket-of-mine /data/pairs $CLIPX_LOGIN $CLIPX_PASSWORD"
    )
    path = "s3://$CLIPX_BUCKET/${CLIPX_FOLDER}/$CLIPX_KEY"
    monkeypatch.setattr(secrets, "_named", set())
    assert secrets.expand(path) == "s3://bucket-of-mine//data/pairs/abc"
    assert secrets.cut(text).startswith("falsefalse abc $CLIPX_BUCKET /data/pairs $CLIPX_LOGIN")
    with pytest.raises(secrets.MissingVariable, match="CLIPX_NOTHING is not set"):
        secrets.expand("$CLIPX_NOTHING/a")


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("config.data.path", "https://me:pw@h", "a file", "--x=https://me:pw@h"),
        *(kind("no https://me:pw@h") for kind in (DataError, RunError, CheckpointError)),
    ],
)
def test_errors_are_cut(error):
    assert "me:pw" not in str(error) and "https://***@h" in str(error)


def test_what_is_printed_is_cut():
    """Uncaught exceptions too, and the streams are the old ones afterwards."""
    code = (
        "import sys; from clipx.config import secrets\n"
        "with secrets.guarded():\n"
        "    print('a https://me:pw@h', 3, file=sys.stderr)\n"
        "    print('b https://me:pw@h'); assert not sys.stdout.isatty()\n"
        "print(type(sys.stdout).__name__, flush=True)\n"
        "with secrets.guarded():\n"
        "    try: raise ValueError('c https://me:pw@h')\n"
        "    except ValueError: sys.excepthook(*sys.exc_info())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "b https://***@h\nTextIOWrapper\n"
    assert "a https://***@h 3" in done.stderr and "c https://***@h" in done.stderr
    assert "pw" not in done.stderr.replace("me:pw@h'", "")  # of the code that is quoted
