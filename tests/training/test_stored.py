"""What a run on stored features may not be is refused by name."""

from __future__ import annotations

import pytest
from support import tiny

from clipx.data.config import DataConfig, FeaturesConfig
from clipx.errors import ConfigError
from clipx.training import stored

CENTER = "augmentation=center"
BOTH = ("image", "text")


def check(
    name,
    *,
    locked=BOTH,
    image="F",
    text=None,
    cache=(),
    views=0,
    source="shapes",
    crop=None,
    **data,
):
    module = tiny.objective(name).clone(locked_features=locked, crop_scale=crop)
    towers = {side: getattr(module, side).clone(cache=True) for side in cache}
    features = FeaturesConfig(image, text, views)
    stored.checked(module.clone(**towers), DataConfig(source, features=features, **data))


@pytest.mark.parametrize(
    "name, options",
    [
        (f"clip:{CENTER}", {"text": "G"}),
        (f"siglip:{CENTER}", {"image": None, "cache": ("image", "text")}),
        (f"clip_lite:{CENTER}", {"text": "G"}),
        (f"protoclip:{CENTER}", {"text": "G"}),
        ("clip_lite:text_terms=true", {"image": None, "text": "G"}),
        ("slip:", {"image": None, "cache": ("image",), "views": 3}),
        ("declip:", {"image": None, "cache": ("image",), "views": 8}),
        ("filip:contrast_clean_caption=true", {"image": None, "text": "G"}),
        ("clip:", {"image": None, "text": None, "locked": ()}),  # nothing is stored
    ],
)
def test_what_stored_features_can_give_is_accepted(name, options):
    check(name, **options)


@pytest.mark.parametrize(
    "name, options, said",
    [
        (f"clip:{CENTER}", {"locked": ("text",)}, "optimizer.freeze=('^image/(?!projection)',)"),
        (f"clip:{CENTER}", {"cache": ("image",)}, "config.image.cache=false"),
        (f"clip:{CENTER}", {"source": "mixture"}, "in which rows repeat"),
        ("clip:", {"image": None, "cache": ("image",)}, "or config.objective.augmentation=center"),
        ("clip:", {"image": None, "cache": ("image",), "crop": (0.5, 1)}, "crop_scale=None"),
        (f"clip:{CENTER}", {"image": None, "cache": ("image",), "views": 2}, "views=0"),
        ("slip:", {"image": None, "cache": ("image",), "views": 2}, "config.data.features.views=3"),
        ("declip:", {"image": None, "cache": ("image",)}, "asks for 2 random view(s)"),
        ("declip:", {"image": None, "text": "G"}, "DeCLIP hides words"),
        ("filip:", {"image": None, "text": "G"}, "FILIP hides words"),
        (
            "declip:masked_lm_weight=0,contrast_clean_caption=true",
            {"image": None, "text": "G"},
            "changes words of each caption anew",
        ),
        ("clip_lite:augmentation=clip_lite_flip", {}, "swap left and right"),
        ("clip:", {"image": None, "text": "G", "reject_cjk": True}, "reject_cjk=false"),
    ],
)
def test_what_they_cannot_is_refused_with_a_fix(name, options, said):
    with pytest.raises(ConfigError) as error:
        check(name, **options)
    assert said in str(error.value) and error.value.fix
