"""Each cleaning rule gives the results of its method's own code."""

from __future__ import annotations

import pytest

from clipx.data.text import cleaning


@pytest.mark.parametrize(
    ("rule", "text", "cleaned"),
    [
        ("clip", " It's\tschÃ¶n &amp;amp; \n “so” ", 'It\'s schön & "so"'),
        ("clip", "a  plain\ndog", "a plain dog"),
        ("clip", "a\u200b\u0000b", "a\u200bb"),  # a NUL is removed, as all control characters are
        ("ascii", "café au lait – yes", "caf au lait yes"),
        ("ascii", "&eacute;t&eacute; 猫", "été"),  # entities are unescaped after the deletion
        ("none", " It's  &amp; “so”\n", "It's &amp; “so”"),
        (
            "clip_lite",
            "A Café's  left-hand <person> /sign: (STOP)!  ",
            "a cafes left hand person sign stop",
        ),
        ("clip_lite", "you & me — “so” [x] $5", "you & me — “so” [x] $5"),
        ("clip_lite", "a-b/c", "a b c"),
        ("clip_lite", "one\ttab, two\t\ttabs\n", "one\ttab two tabs"),
        ("clip_lite", "w " * 40, "w " * 29 + "w"),
        ("clip_lite", "İ ﬁne x\u0302", "i fine x"),
        ("siglip", " It's\tA <red>_ball — “So” & CAFÉ!  \n", "its a redball — “so” café"),
    ],
)
def test_rules(rule, text, cleaned):
    assert cleaning.RULES[rule](text) == cleaned


@pytest.mark.parametrize("rule", cleaning.RULES)
@pytest.mark.parametrize(
    "text", ["", " \n\t", "!?", "\u0301", "مرحبا 👨‍👩‍👧", "x" * 10_000, "a \ud83d"]
)
def test_odd_texts(rule, text):
    cleaned = cleaning.RULES[rule](text)
    assert cleaned == cleaned.strip() or rule == "raw"
    assert bool(cleaned.strip()) <= bool(text.strip())
    assert cleaned.encode("utf-8").decode("utf-8") == cleaned


def test_left_and_right_are_swapped_as_substrings():
    text = "left … right bright leftover Left"
    assert cleaning.swap_left_right(text) == "right … left bleft rightover Left"
    assert cleaning.swap_left_right(cleaning.swap_left_right(text)) == text


def test_has_cjk_knows_the_characters_that_declip_excludes():
    assert cleaning.has_cjk("a 猫") and cleaning.has_cjk("\u4e00") and cleaning.has_cjk("\u9fa5")
    assert not cleaning.has_cjk("kana カナ, hangul 한, \u4dff \u9fa6")
