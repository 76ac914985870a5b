"""Every setting of a foreign config is obeyed, compared, harmless or named."""

import json

import numpy as np
import pytest
from support.towers import BOTH, TEXT, VIT, few_words, model

from clipx.errors import ConfigError
from clipx.interop import huggingface, load, open_clip, preprocessing
from clipx.interop.settings import Section
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.ops import photometry

SIDE = VIT["image_size"]
BOTH_SIDES = {"height": SIDE, "width": SIDE}
SIGLIP_PICTURES = {"image_processor_type": "SiglipImageProcessor", "image_mean": [0.5] * 3}


@pytest.fixture(scope="module")
def written():
    words, text = few_words()
    return model(ViT(**VIT, **BOTH), TextTransformer(**text, **BOTH), words)


@pytest.fixture
def folder(written, tmp_path):
    """A folder of transformers' CLIP."""
    huggingface.HuggingFace().write(written, tmp_path, str(tmp_path))
    return tmp_path


@pytest.fixture
def native(written, tmp_path):
    """A folder of open_clip."""
    open_clip.OpenClip().write(written, tmp_path, str(tmp_path))
    return tmp_path


def change(folder, name, *path, **values):
    """Changes values of a JSON file, inside of the object at `path`; None deletes a key."""
    file = folder / name
    whole = inner = json.loads(file.read_text())
    for key in path:
        inner = inner.setdefault(key, {})
    inner |= values
    file.write_text(json.dumps(whole))


def differences(folder):
    return [line.partition(":")[0] for line in load.load(folder).differences]


def pictures(values, siglip=False):
    return preprocessing.huggingface(values, SIDE, siglip, "preprocessor_config.json")


@pytest.mark.parametrize(
    "values, resize",
    [
        ({}, "shortest"),
        ({"size": SIDE, "crop_size": SIDE}, "shortest"),  # CLIP's first files
        (
            {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
            "shortest",
        ),
        ({"size": BOTH_SIDES}, "squash"),
        ({"size": BOTH_SIDES, "do_center_crop": False}, "squash"),
        ({"size": [SIDE, SIDE]}, "squash"),
        ({"size": SIDE, "default_to_square": True}, "squash"),
        (SIGLIP_PICTURES, "squash"),
        (SIGLIP_PICTURES | {"size": BOTH_SIDES, "do_center_crop": None}, "squash"),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "do_pad": False}, "shortest"),
    ],
)
def test_sizes_as_transformers_writes_them(values, resize):
    found = pictures(values)
    assert (found.resize, found.interpolation, found.differences) == (resize, "bicubic", ())


@pytest.mark.parametrize(
    "values, name, text",
    [
        (
            {"size": {"shortest_edge": 48}},
            "size",
            "the shorter side to 48, then the centre 32 x 32",
        ),
        ({"size": 48}, "size", "the shorter side to 48"),
        ({"crop_size": 24}, "size", "then the centre 24 x 24 in the model"),
        ({"crop_size": {"height": 32, "width": 24}}, "size", "24 x 32"),
        ({"size": {"height": 40, "width": 32}}, "size", "to 32 x 40"),
        ({"do_center_crop": False}, "size", "the shorter side to 32 in the model"),
        ({"do_resize": False}, "size", "as large as it is"),
        (SIGLIP_PICTURES | {"size": SIDE}, "size", "the shorter side to 32 in the model"),
        ({"resample": 1}, "resample", "lanczos"),
        ({"resample": 0}, "resample", "nearest"),
        ({"resample": "box"}, "resample", "box"),
        (
            {"image_processor_type": "ViTImageProcessor"},
            "image_processor_type",
            "ViTImageProcessor",
        ),
        ({"do_pad": True}, "do_pad", "true in the model"),
        ({"max_num_patches": 256}, "max_num_patches", "256 in the model"),
    ],
)
def test_pictures_that_clipx_cannot_make_are_listed(values, name, text):
    (line,) = pictures(values).differences
    assert line.startswith(f"preprocessing.{name}: ") and text in line


def test_pictures_are_normalised_as_the_file_says():
    """The same numbers as transformers' rescale and normalise, from pixels in 0..255."""
    x, mean, std = np.arange(256.0), np.array([0.2, 0.3, 0.4]), np.array([0.5, 0.6, 0.7])
    ways = {
        "as usual": ({}, 1 / 255, mean, std),
        "not normalised": ({"do_normalize": False}, 1 / 255, 0, 1),
        "not rescaled": ({"do_rescale": False}, 1, mean, std),
        "neither": ({"do_rescale": False, "do_normalize": False}, 1, 0, 1),
        "to -1..1": ({"rescale_factor": 1 / 127.5}, 1 / 127.5, mean, std),
    }
    for values, factor, mu, sigma in ways.values():
        found = pictures({"image_mean": list(mean), "image_std": list(std)} | values)
        expected = (x[:, None] * factor - mu) / sigma * np.ones(3)
        ours = (x[:, None] / 255 - np.array(found.mean)) / np.array(found.std)
        np.testing.assert_allclose(ours, expected, atol=1e-9)
        assert not found.differences
    assert pictures({}).mean == photometry.OPENAI_MEAN and pictures({}, siglip=True).mean[0] == 0.5
    assert pictures({"resample": 2}).interpolation == "bilinear"


@pytest.mark.parametrize(
    "values, where",
    [
        ({"size": {"longest_edge": 32}}, "size.height"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "size"),
        ({"size": "big"}, "size"),
        ({"crop_size": 0}, "crop_size"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"rescale_factor": -1}, "rescale_factor"),
        ({"do_resize": "yes"}, "do_resize"),
    ],
)
def test_pictures_of_no_meaning_are_refused(values, where):
    with pytest.raises(ConfigError) as caught:
        pictures(values)
    assert caught.value.where == f"preprocessor_config.json: {where}"


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, ("shortest", "bicubic", 0)),
        ({"interpolation": "random", "size": 999, "fill_color": 3}, ("shortest", "bicubic", 0)),
        ({"interpolation": "bilinear", "resize_mode": "squash"}, ("squash", "bilinear", 0)),
        ({"resize_mode": "longest", "fill_color": 128}, ("longest", "bicubic", 1)),
    ],
)
def test_pictures_of_open_clip(values, expected):
    found = preprocessing.open_clip(values, "open_clip_config.json: preprocess_cfg")
    assert (found.resize, found.interpolation, len(found.differences)) == expected
    assert preprocessing.open_clip({"mean": 0.5}, "-").mean == (0.5, 0.5, 0.5)
    for bad in ({"mode": "L"}, {"interpolation": "lanczos"}, {"resize_mode": "pad"}, {"std": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            preprocessing.open_clip(values | bad, "-")


def test_a_setting_of_no_known_name_is_listed(folder):
    """In each section; keys that change nothing, and empty ones, are passed over."""
    usual = {"torch_dtype": "float16", "top_k": 50, "pruned_heads": {}, "id2label": {"0": "a"}}
    change(folder, "config.json", use_new_thing=True, **usual)
    change(folder, "config.json", "text_config", rotary=True, attention_dropout=0.1, **usual)
    change(folder, "config.json", "vision_config", layer_scale=1e-5, drop_path=None, **usual)
    change(folder, "preprocessor_config.json", sharpen=2, do_convert_rgb=True)
    names = ["preprocessing.sharpen", "settings.use_new_thing"]
    names += ["settings.vision_config.layer_scale", "settings.text_config.rotary"]
    assert differences(folder) == names
    given = load.load(folder)
    towers = {"image": given.image, "text": given.text}
    with pytest.raises(ConfigError, match=r"settings.text_config.rotary: true in the model"):
        load.fit(given, **towers, faults=given.differences)
    ignore = ("settings", "preprocessing.*")  # as the message advises, with wildcards
    assert load.fit(given, **towers, ignore=ignore, faults=given.differences)["params"]


def test_a_setting_of_open_clip_of_no_known_name_is_listed(native):
    change(native, "open_clip_config.json", "model_cfg", custom_text=True, novel=1)
    change(native, "open_clip_config.json", "model_cfg", "vision_cfg", patch_dropout=0.5, rope=True)
    change(native, "open_clip_config.json", "model_cfg", "text_cfg", gating="swish")
    names = ["settings.novel", "settings.vision_cfg.rope", "settings.text_cfg.gating"]
    assert differences(native) == names


def test_the_old_form_of_configs_counts(folder, written):
    """transformers reads `text_config_dict` in place of `text_config`, defaults included."""
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    old = {"text_config_dict": text, "vision_config_dict": vision}
    other = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3, "num_attention_heads": 4}
    change(folder, "config.json", **old, text_config=text | other, vision_config=vision | other)
    again = load.load(folder)
    assert again.text.unseen_settings == written.text.unseen_settings
    assert again.image.unseen_settings == written.image.unseen_settings
    without = {k: v for k, v in text.items() if k not in ("hidden_act", "eos_token_id")}
    change(folder, "config.json", text_config_dict=without | {"eos_token_id": 2})
    again = load.load(folder)
    assert (again.text.activation, again.text.eot_id) == ("quick_gelu", 38) and not differences(
        folder
    )


@pytest.mark.parametrize(
    "section, key, value, says",
    [
        ("text_config", "eos_token_id", None, "null"),
        ("text_config", "eos_token_id", 49407, "49407 with a vocabulary of 39"),
        ("text_config", "hidden_size", "64", '"64"'),
        ("text_config", "num_attention_heads", 5, "5 heads for a width of 32"),
        ("text_config", "hidden_act", "gelu_new", "gelu_new"),
        ("vision_config", "layer_norm_eps", 0, "greater than 0"),
        ("vision_config", "image_size", [32, 48], "32, 48"),
        ("vision_config", "patch_size", 5, "32 pixels with a patch of 5"),
        ("vision_config", "num_channels", 4, "4"),
        ("vision_config", "hidden_size", 1e400, "a whole number"),
        (None, "text_config", [1], "a JSON object"),
        (None, "model_type", "clipseg", "'clip' or 'siglip'"),
        (None, "projection_dim", None, "null"),
    ],
)
def test_a_value_of_no_meaning_is_refused_by_name(folder, section, key, value, says):
    path = (section,) if section else ()
    change(folder, "config.json", *path, **{key: value})
    with pytest.raises(ConfigError) as caught:
        load.load(folder)
    assert says in str(caught.value).replace("Infinity", "a whole number")
    assert "config.json" in caught.value.where
    assert key in caught.value.where or key == "patch_size"


@pytest.mark.parametrize(
    "section, values, says",
    [
        ("vision_cfg", {"head_width": 0}, "head_width"),
        ("vision_cfg", {"head_width": 15}, "15 with a width of 32"),
        ("vision_cfg", {"layers": [1, 2]}, "four numbers"),
        ("vision_cfg", {"image_size": [32, 48]}, "image_size"),
        ("vision_cfg", {"norm_kwargs": {"eps": 1e-5, "bias": False}}, "norm_kwargs"),
        ("vision_cfg", {"act_kwargs": {"approximate": "none"}}, "act_kwargs"),
        ("text_cfg", {"heads": 3}, "3 heads for a width of 32"),
        ("text_cfg", {"pool_type": "avg_all"}, "pool_type"),
        ("text_cfg", {"layers": None}, "layers"),
        ("text_cfg", {"ls_init_value": 0.1}, "ls_init_value"),
    ],
)
def test_a_value_of_open_clip_is_refused_by_name(native, section, values, says):
    change(native, "open_clip_config.json", "model_cfg", section, **values)
    with pytest.raises(ConfigError, match=says) as caught:
        load.load(native)
    assert caught.value.file.endswith(open_clip.WEIGHTS)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["[1]", "", "{", "version https://git-lfs"])
def test_a_config_that_is_no_object_is_one_line(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=f"(?s){name}.*a JSON") as caught:
        load.load(folder)
    assert caught.value.where == "config.init_from"


def test_two_preprocessors_that_disagree_are_listed(folder):
    """transformers takes the one inside of processor_config.json."""
    settings = json.loads((folder / huggingface.PREPROCESSOR).read_text())
    file = folder / huggingface.PROCESSOR
    file.write_text(json.dumps({"image_processor": settings}))
    assert not differences(folder)
    file.write_text(json.dumps({"image_processor": settings | {"image_mean": [0.5] * 3}}))
    assert differences(folder) == ["preprocessing.files"]
    assert load.load(folder).mean == (0.5, 0.5, 0.5)


def test_tanh_is_read_as_what_it_is(folder):
    change(folder, "config.json", "vision_config", hidden_act="gelu_pytorch_tanh")
    given = load.load(folder)
    assert (given.image.activation, given.text.activation) == ("gelu_tanh", "gelu")
    with pytest.raises(ConfigError, match="image.activation: 'gelu_tanh', and 'gelu' in the"):
        load.fit(given, given.image.clone(activation="gelu"), given.text)


@pytest.mark.parametrize(
    "name, activation",
    [
        ("vit_base_patch16_siglip_224", "gelu"),
        ("vit_base_patch32_siglip_256", "gelu_tanh"),
        ("vit_large_patch16_siglip_384", "gelu"),
        ("vit_large_patch16_siglip_gap_512", "gelu_tanh"),
        ("vit_so400m_patch14_siglip_378", "gelu"),
        ("vit_so400m_patch16_siglip_gap_256", "gelu_tanh"),
    ],
)
def test_timms_names_of_siglip_tell_the_activation(name, activation):
    from clipx.interop import guest_towers

    section = {"timm_model_name": name, "timm_pool": "map", "timm_proj": "none"}
    size = int(name.rpartition("_")[2])
    tower = guest_towers.image_tower(Section(section, "-", "vision_cfg"), 64, size, {})
    assert tower.activation == activation


def test_text_widths_are_open_clips(native):
    """open_clip cuts `width * mlp_ratio` to a whole number."""
    change(native, "open_clip_config.json", "model_cfg", "text_cfg", mlp_ratio=4.03)
    tower = load.load(native).text
    assert round(tower.width * tower.mlp_ratio) == 128 == 4 * TEXT["width"]
