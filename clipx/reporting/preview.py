"""One page that shows rows of a set as a model will see them: pictures, captions, views, tokens."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from clipx.data import pictures
from clipx.data.base import Example, Source
from clipx.data.text.tokenizers import Tokenizer

_SIDE = 320  # pixels of a source picture on the page, at most


class Text(NamedTuple):
    """One text view."""

    kind: str  # caption, augmented, other
    ids: Int32[np.ndarray, " n"]


class Shown(NamedTuple):
    """One row of the set."""

    row: int
    key: str
    pixels: UInt8[np.ndarray, "h w 3"]
    captions: Sequence[str]
    label: str | None
    views: Sequence[UInt8[np.ndarray, "side side 3"]]  # after photometry
    texts: Sequence[Text]
    bad: Sequence[str] = ()  # rows in whose place this one stands, and why


class Remembering:
    """A source that keeps the examples it gave, by row id: an id need not be a row's place."""

    def __init__(self, source: Source):
        self._source, self.classes = source, source.classes
        self.seen: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Example:
        example = self._source[row]
        return self.seen.setdefault(example.row, example)

    def keys(self) -> Iterator[str]:
        return self._source.keys()


def shown(
    source: Remembering,
    pieces: Mapping[str, np.ndarray],
    views: Sequence[UInt8[np.ndarray, "b side side 3"]],
    texts: Sequence[str],
) -> Iterator[Shown]:
    """What a `Feed` over `source` loaded, row by row; `views` are its pictures after photometry,
    `texts` the kinds of its texts."""
    names = dict(enumerate(source.classes))
    for i, (row, bad) in enumerate(zip(pieces["row"].tolist(), pieces["bad"].tolist())):
        example = source.seen[row]
        label = names.get(example.label, example.label)
        yield Shown(
            row=row,
            key=example.key,
            pixels=pictures.decode(example),
            captions=example.texts,
            label=None if label is None else str(label),
            views=[view[i] for view in views],
            texts=list(map(Text, texts, pieces["text"][i])),
            bad=["{key}: {reason}".format(**one) for one in json.loads(bad or "[]")],
        )


def describe(scale: tuple[float, float], flip: bool, photometry: Any) -> str:
    """What is done to a picture view, in words."""
    said = [f"a crop of {scale[0]:.0%} to {scale[1]:.0%} of the area"]
    said += ["mirrored half of the time"] * flip
    for name, words in (
        ("jitter", "colours jittered"),
        ("grey", "grey"),
        ("blur", "blurred"),
        ("solarise", "solarised"),
    ):
        if probability := getattr(photometry, name):
            said.append(f"{words} ({probability:.0%})")
    return ", ".join(said)


def page(
    title: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[tuple[str, str]],
    rows: Sequence[Shown],
    tokenizer: Tokenizer,
) -> str:
    """The page, self-contained. `facts` are values and what they are of; `notes` names of views
    and what was done to them."""
    tiles = "".join(f"<div><b>{_text(v)}</b><span>{_text(k)}</span></div>" for v, k in facts)
    legend = "".join(f"<li><b>{_text(k)}</b> {_text(said)}</li>" for k, said in notes)
    cards = "".join(_card(shown, tokenizer) for shown in rows)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_CSS}</style></head><body><main>"
        f'<header><p class="eyebrow">clipx data preview</p><h1>{_text(title)}</h1>'
        f'<div class="tiles">{tiles}</div><ul class="legend">{legend}</ul></header>'
        f"{cards}</main></body></html>\n"
    )


def _card(shown: Shown, tokenizer: Tokenizer) -> str:
    height, width = shown.pixels.shape[:2]
    source = (
        f'<figure class="source"><img src="{_jpeg(shown.pixels)}" alt="the picture of the set">'
        f"<figcaption>as it is, {width} × {height}</figcaption></figure>"
    )
    views = "".join(
        f'<figure class="view"><img src="{_png(view)}" alt="view {i}">'
        f"<figcaption>view {i}, {view.shape[1]} × {view.shape[0]}</figcaption></figure>"
        for i, view in enumerate(shown.views, start=1)
    )
    used = {tuple(text.ids.tolist()) for text in shown.texts}
    captions = "".join(
        f'<li class="{"used" if tuple(ids.tolist()) in used else ""}" dir="auto">{_text(caption)}'
        "</li>"
        for caption, ids in zip(shown.captions, tokenizer(shown.captions))
    )
    label = "" if shown.label is None else f'<span class="label">{_text(shown.label)}</span>'
    bad = "".join(f'<p class="bad">stands in for {_text(said)}</p>' for said in shown.bad)
    texts = "".join(_tokens(text, tokenizer) for text in shown.texts)
    return (
        f'<article><h2><span class="row">row {shown.row:,}</span> {_text(shown.key)}{label}</h2>'
        f'{bad}<div class="pictures">{source}<div class="views">{views}</div></div>'
        f'<ul class="captions">{captions}</ul>{texts}</article>'
    )


def _tokens(text: Text, tokenizer: Tokenizer) -> str:
    """The ids of one text up to its end mark, each as the piece of text that it stands for."""
    ids = text.ids.tolist()
    end = ids.index(tokenizer.eot_id) + 1 if tokenizer.eot_id in ids else len(ids)
    marks = {tokenizer.sot_id: "start", tokenizer.eot_id: "end"}
    pieces = "".join(
        f'<i class="mark" title="{i}">{marks[i]}</i>'
        if i in marks
        else f'<i title="{i}">{_text(tokenizer.decode([i])) or "·"}</i>'
        for i in ids[:end]
    )
    full = ' full" title="as many as there is room for: the text may be cut' * (end == len(ids))
    return (
        f'<div class="tokens"><span class="kind{full}">{_text(text.kind)}'
        f"<small>{end} of {len(ids)} tokens</small></span><p>{pieces}</p></div>"
    )


def _jpeg(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((_SIDE, _SIDE))
    return _uri(picture, "jpeg", quality=88)


def _png(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """Every pixel as the model sees it."""
    return _uri(Image.fromarray(np.ascontiguousarray(pixels)), "png", optimize=True)


def _uri(picture: Image.Image, kind: str, **options) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def _text(value: object) -> str:
    return html.escape(str(value).encode("utf-8", "replace").decode())


_CSS = """
:root{color-scheme:light dark;--bg:#fafaf8;--card:#fff;--ink:#1d1f22;--soft:#666b72;--line:#e3e3de;
--accent:61 127 193;--warn:#b4552d}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--card:#1d2024;--ink:#e6e7e9;--soft:#9aa0a8;
--line:#2f343a;--accent:96 160 222;--warn:#e0895f}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:40px 24px 64px;display:grid;gap:16px;
grid-template-columns:repeat(auto-fill,minmax(520px,1fr))}
header{grid-column:1/-1}
h1{font-size:30px;line-height:1.2;margin:2px 0 0;letter-spacing:-.01em}
h2{font-size:13px;font-weight:600;margin:0 0 12px;display:flex;gap:8px;align-items:baseline;
overflow-wrap:anywhere}
.row{color:var(--soft);font-weight:400;white-space:nowrap;font-variant-numeric:tabular-nums}
.label{margin-left:auto;padding:1px 9px;border-radius:9px;background:rgb(var(--accent)/.16);
white-space:nowrap}
.eyebrow{margin:0;color:var(--soft);font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:1px;
margin-top:20px;background:var(--card);border:1px solid var(--line);border-radius:8px;
overflow:hidden}
.tiles div{box-shadow:0 0 0 1px var(--line);padding:12px 14px}
.tiles b{display:block;font-size:17px;font-weight:600;overflow-wrap:anywhere;
font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:12px}
.legend{list-style:none;margin:14px 0 6px;padding:0;color:var(--soft);font-size:13px}
.legend b{color:var(--ink);font-weight:600;margin-right:6px}
article{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px 16px;
min-width:0}
figure{margin:0;min-width:0}
figcaption{font-size:11px;color:var(--soft);margin-top:4px;font-variant-numeric:tabular-nums}
.pictures{display:flex;gap:14px;align-items:flex-start}
.source{flex:0 0 auto}
.source img{display:block;height:150px;max-width:210px;object-fit:contain;border-radius:5px}
.views{display:flex;flex-wrap:wrap;gap:10px;padding-left:14px;border-left:1px solid var(--line)}
.view img{display:block;width:150px;height:150px;border-radius:5px;image-rendering:pixelated}
.captions{margin:12px 0 10px;padding:0;list-style:none;font-size:14px}
.captions li{color:var(--soft);padding:1px 0 1px 14px;border-left:3px solid transparent;
overflow-wrap:anywhere}
.captions .used{color:var(--ink);border-color:rgb(var(--accent))}
.tokens{display:flex;gap:12px;border-top:1px solid var(--line);padding-top:9px;margin-top:9px}
.kind{flex:0 0 92px;font-size:12px;font-weight:600}
.kind small{display:block;color:var(--soft);font-weight:400;font-variant-numeric:tabular-nums}
.kind.full small{color:var(--warn)}
.tokens p{margin:0;display:flex;flex-wrap:wrap;align-content:flex-start;gap:3px;min-width:0}
.tokens i{font:12px/1.6 ui-monospace,monospace;padding:0 5px;border-radius:4px;white-space:pre-wrap;
background:rgb(var(--accent)/.13);overflow-wrap:anywhere}
.tokens .mark{background:none;box-shadow:inset 0 0 0 1px var(--line);color:var(--soft)}
.bad{margin:0 0 10px;color:var(--warn);font-size:13px;overflow-wrap:anywhere}
@media (max-width:600px){main{grid-template-columns:1fr;padding:24px 14px}
.pictures{flex-wrap:wrap}.views{border:0;padding:0}}
"""
