"""Weights as people keep them are read to the bit, or refused in one block that names the cause."""

import argparse
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.libraries import asked, missing
from support.towers import BOTH, VIT, few_words, model

from clipx.errors import ConfigError
from clipx.interop import huggingface, libraries, load, open_clip, torch_files
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT

with_torch = asked(missing("torch"))
NATIVE, CONFIG = open_clip.WEIGHTS, open_clip.CONFIG


@pytest.fixture(scope="module")
def written():
    words, text = few_words()
    both = BOTH | {"activation": "quick_gelu"}
    return model(ViT(**VIT, **both), TextTransformer(**text, **both), words)


@pytest.fixture
def folder(written, tmp_path):
    open_clip.OpenClip().write(written, tmp_path, str(tmp_path))
    return tmp_path


@pytest.fixture
def foreign(written, tmp_path):
    huggingface.HuggingFace().write(written, tmp_path, str(tmp_path))
    return tmp_path


def same(a, b):
    return a.flat.keys() == b.flat.keys() and all(
        x.tobytes() == b.flat[name].tobytes() for name, x in a.flat.items()
    )


def renamed(file, rename):
    save_file({rename(name): x for name, x in load_file(file).items()}, file)


def refused(path):
    with pytest.raises(ConfigError) as caught:
        load.load(path)
    assert caught.value.where.startswith("config.init_from")
    return str(caught.value)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "module._orig_mod.",
        "_fsdp_wrapped_module.",
        "model._orig_mod.module.",
        "clip_model.",
        "ema.module.",
    ],
)
@pytest.mark.parametrize("kind", ["native", "foreign"])
def test_prefixes_of_wrappers(prefix, kind, written, tmp_path):
    format_ = open_clip.OpenClip() if kind == "native" else huggingface.HuggingFace()
    format_.write(written, tmp_path, str(tmp_path))
    plain = load.load(tmp_path)
    renamed(tmp_path / format_.weights, lambda name: prefix + name)
    assert same(load.load(tmp_path), plain)


def test_wrappers_inside_of_names(folder):
    """FSDP and activation checkpoints wrap blocks, and DDP may wrap one tower."""
    plain = load.load(folder)

    def wrapped(name):
        name = name.replace("resblocks.0.", "resblocks.0._checkpoint_wrapped_module.")
        name = name.replace("resblocks.1.", "resblocks.1._fsdp_wrapped_module._orig_mod.")
        return "model." + name.replace("visual.", "visual.module.")

    renamed(folder / NATIVE, wrapped)
    assert same(load.load(folder), plain)


def test_names_that_two_arrays_or_models_have(folder):
    arrays = load_file(folder / NATIVE)
    save_file(arrays | {f"module.{k}": x for k, x in arrays.items()}, folder / NATIVE)
    assert "two arrays that are" in refused(folder)
    both = {f"{p}.{k}": x for p in ("model", "model_ema") for k, x in arrays.items()}
    save_file(both, folder / NATIVE)
    assert "several models, under 'model.', 'model_ema.'" in refused(folder)
    save_file({f"model.{k}": x for k, x in arrays.items()} | {"head": np.zeros(3)}, folder / NATIVE)
    assert "found:    head" in refused(folder)
    save_file({"_fsdp_wrapped_module._flat_param": np.zeros(9)}, folder / NATIVE)
    assert "FSDP's flattened parameters" in refused(folder)
    save_file({"transformer.wte": np.zeros(9)}, folder / NATIVE)
    assert "no visual.conv1.weight" in refused(folder)


@pytest.mark.parametrize("prefix", ["text.", "encode_text."])
def test_text_towers_of_a_module_of_their_own(prefix, folder):
    """open_clip's CustomTextCLIP and DeCLIP's code."""
    plain = load.load(folder)
    keep = ("visual.", "logit_")
    renamed(folder / NATIVE, lambda name: name if name.startswith(keep) else prefix + name)
    assert same(load.load(folder), plain)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 605156676\n"


@pytest.mark.parametrize("name", [NATIVE, "model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize(
    "content, says",
    [
        (POINTER, "a pointer of Git LFS in place of.*fix: +git -C .* lfs pull"),
        (b"", "which is empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n" + b"x" * 600, "Keras weights"),
        (b"\x1f\x8b\x08" + b"x" * 600, "a gzip file"),
        (b"x" * 257 + b"ustar" + b"x" * 600, "a tar archive"),
    ],
)
def test_what_is_no_weights_file_is_named(name, content, says, folder):
    (folder / NATIVE).unlink()
    (folder / name).write_bytes(content)
    message = refused(folder)
    assert re.search(says, message, re.DOTALL) and name in message


def test_weights_of_other_libraries_are_named(folder):
    np.savez(folder / "params.npz", x=np.zeros(3))
    assert "NumPy arrays" in refused(folder / "params.npz")
    shutil.copy(folder / "params.npz", folder / "renamed.pt")
    assert "NumPy arrays" in refused(folder / "renamed.pt")
    (folder / "model.onnx").write_bytes(b"\x08\x07\x12")
    assert "an ONNX graph" in refused(folder / "model.onnx")
    (folder / "flax_model.msgpack").write_bytes(b"\x81\xa1a\x01")
    (folder / NATIVE).rename(folder / "epoch_3.safetensors")
    assert f"fix:      name the file: {folder / 'epoch_3.safetensors'}" in refused(folder)
    assert load.load(folder / "epoch_3.safetensors")
    (folder / "epoch_3.safetensors").unlink()
    (folder / "renamed.pt").unlink()
    message = refused(folder)
    assert "flax_model.msgpack is Flax weights" in message
    assert f"put the same model's {NATIVE} there" in message
    assert "without a weight_map" in refused(folder / CONFIG)


def test_truncated_files_are_named(folder):
    whole = (folder / NATIVE).read_bytes()
    for cut in (4, 100, len(whole) // 2, len(whole) - 1):
        (folder / NATIVE).write_bytes(whole[:cut])
        assert "a complete safetensors file" in refused(folder)


def test_an_index_whose_part_is_missing(foreign):
    arrays = load_file(foreign / "model.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(sorted(arrays))}
    plain = load.load(foreign)
    (foreign / "model.safetensors").unlink()
    for name in names:
        save_file({k: x for k, x in arrays.items() if where[k] == name}, foreign / name)
    index = foreign / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert same(load.load(foreign), plain)
    assert f"fix:      name {index}" in refused(foreign / names[0])
    assert same(load.load(index), plain)
    lost = next(k for k in where if where[k] == names[0])
    save_file(
        {k: x for k, x in arrays.items() if where[k] == names[0] and k != lost}, foreign / names[0]
    )
    assert f"no {lost} in {names[0]}" in refused(foreign)
    (foreign / names[0]).unlink()
    assert f"no {names[0]} beside model.safetensors.index.json, which lists 2" in refused(foreign)
    index.write_text('{"weight_map": {}}')
    assert "without a weight_map" in refused(foreign)


def test_weights_without_a_config_say_what_to_put_beside(folder, written):
    """The advice works when it is obeyed: the config that the message shows, filled in."""
    plain = load.load(folder)
    (folder / CONFIG).unlink()
    message = refused(folder / NATIVE)
    assert "do not tell the activation and the number of attention heads" in message
    path, text = re.search(r"write (\S+) with (\{.*\}), where", message).groups()
    for name, value in {"QUICK_GELU": "true", "HEAD_WIDTH": "16", "HEADS": "2"}.items():
        assert text.count(name) == 1
        text = text.replace(name, value)
    assert path == str(folder / CONFIG)
    (folder / CONFIG).write_text(text)
    again = load.load(folder)
    assert same(again, plain)
    for tower, other in ((again.image, plain.image), (again.text, plain.text)):
        assert tower.unseen_settings == other.unseen_settings


@pytest.mark.parametrize(
    "image, text",
    [
        (VIT | {"mlp_ratio": 3.0, "pre_norm": False}, {"projection_bias": True}),
        (VIT | {"image_size": 48, "depth": 1}, {"mlp_ratio": 2.5, "context": 9}),
    ],
)
def test_the_shown_config_has_the_arrays_sizes(image, text, tmp_path):
    words, fields = few_words()
    both = BOTH | {"activation": "quick_gelu"}
    first = model(ViT(**image, **both), TextTransformer(**fields | text, **both), words)
    open_clip.OpenClip().write(first, tmp_path, str(tmp_path))
    plain = load.load(tmp_path)
    (tmp_path / CONFIG).unlink()
    text = re.search(r"with (\{.*\}), where", refused(tmp_path / NATIVE))[1]
    text = text.replace("QUICK_GELU", "true").replace("HEAD_WIDTH", "16").replace("HEADS", "2")
    (tmp_path / CONFIG).write_text(text)
    assert same(load.load(tmp_path), plain)


def test_what_a_config_cannot_mend_is_said_at_once(folder, foreign):
    """Arrays beyond the towers (as Long-CLIP has), towers of timm, and transformers' weights."""
    arrays = load_file(folder / NATIVE)
    (folder / CONFIG).unlink()
    save_file(arrays | {"positional_embedding_res": np.zeros((16, 32))}, folder / NATIVE)
    assert "positional_embedding_res" in refused(folder / NATIVE)
    save_file({"visual.trunk.x": np.zeros(3), "logit_scale": np.zeros(1)}, folder / NATIVE)
    assert "towers of timm or transformers and no open_clip_config.json" in refused(folder / NATIVE)
    (foreign / "config.json").unlink()
    message = refused(foreign / "model.safetensors")
    assert "no config.json beside it" in message and f"into {foreign}" in message


def test_openais_own_archives_need_no_config(tmp_path):
    """Their activation and heads are known; three numbers beside the weights tell them apart."""
    words, text = few_words()
    wide = {"width": 64, "heads": 1}
    both = BOTH | {"activation": "quick_gelu"}
    first = model(ViT(**VIT | wide, **both), TextTransformer(**text | wide, **both), words)
    open_clip.OpenClip().write(first, tmp_path, str(tmp_path))
    plain = load.load(tmp_path)
    arrays = load_file(tmp_path / NATIVE)
    (tmp_path / CONFIG).unlink()
    marks = {"input_resolution": 32, "context_length": 16, "vocab_size": 39}
    save_file(arrays | {k: np.array(v) for k, v in marks.items()}, tmp_path / NATIVE)
    again = load.load(tmp_path / NATIVE)
    assert same(again, plain)
    for tower, other in ((again.image, plain.image), (again.text, plain.text)):
        assert tower.unseen_settings == other.unseen_settings


@pytest.mark.parametrize("kind", ["native", "foreign"])
def test_a_file_without_a_scale_lists_it(kind, written, tmp_path):
    format_ = open_clip.OpenClip() if kind == "native" else huggingface.HuggingFace()
    format_.write(written, tmp_path, str(tmp_path))
    arrays = load_file(tmp_path / format_.weights)
    scale = arrays.pop("logit_scale")
    save_file(arrays, tmp_path / format_.weights)
    assert load.load(tmp_path).logit_scale is None
    save_file(arrays | {"logit_scale": scale.reshape(1)}, tmp_path / format_.weights)
    assert load.load(tmp_path).logit_scale == scale
    save_file(arrays | {"logit_scale": np.zeros(3, np.float32)}, tmp_path / format_.weights)
    assert "logit_scale of shape (3,)" in refused(tmp_path)


def test_a_config_of_another_size_names_both_shapes(folder, foreign):
    def changed(file, section, **values):
        whole = json.loads(file.read_text())
        inner = whole.get("model_cfg", whole)
        (inner[section] if section else inner).update(values)
        file.write_text(json.dumps(whole))
        message = refused(folder / (NATIVE if file.name == CONFIG else "model.safetensors"))
        file.write_text(text)
        return message

    text = (folder / CONFIG).read_text()
    message = changed(folder / CONFIG, "vision_cfg", width=64)
    assert "visual.conv1.weight: (32, 3, 16, 16) in the file, (64, 3, 16, 16) by the c" in message
    assert f"file:     {folder / NATIVE}" in message and "among them" in message
    message = changed(folder / CONFIG, "vision_cfg", width=32768)  # too large to be made
    assert "visual.conv1.weight: (32, 3, 16, 16) in the file, image/patch_embed" in message
    message = changed(folder / CONFIG, "", embed_dim=20)
    assert "visual.proj: (32, 24) in the file, (32, 20) by the config" in message
    assert "text_projection: (32, 24) in the file, (32, 20)" in message
    message = changed(folder / CONFIG, "text_cfg", vocab_size=50)
    assert "token_embedding.weight: (39, 32) in the file, (50, 32)" in message
    text = (foreign / "config.json").read_text()
    message = changed(foreign / "config.json", "text_config", hidden_size=16)
    assert "(39, 32) in the file, (39, 16)" in message
    message = changed(foreign / "config.json", "", projection_dim=12)
    assert "visual_projection.weight: (24, 32) in the file, (12, 32)" in message
    message = changed(foreign / "config.json", "vision_config", intermediate_size=96)
    assert "mlp.fc1.weight: (128, 32) in the file, (96, 32)" in message


def is_array(x):
    return isinstance(x, np.ndarray)


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("state_dict",),
        ("model",),
        ("ema",),
        ("model_state_dict",),
        ("checkpoint", "model"),
        ("anything",),
    ],
)
def test_the_dict_that_holds_the_model(keys, tmp_path):
    state = {"visual.conv1.weight": np.zeros(3), "logit_scale": np.zeros(())}
    value = state
    for key in reversed(keys):
        value = {key: value, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": np.ones(2)}}}}
    assert torch_files.model_state(value, is_array, tmp_path / "a.pt", "-") is state


def test_a_checkpoint_of_none_or_two_models_is_refused(tmp_path):
    state = {"vision_model.x": np.zeros(3)}
    file = tmp_path / "a.pt"
    with pytest.raises(ConfigError, match="with the weights of state_dict, state_dict_ema"):
        twice = {"state_dict": state, "state_dict_ema": dict(state)}
        torch_files.model_state(twice, is_array, file, "-")
    for value in ({"epoch": 1, "optimizer": {}}, {}, [1], {"bert.x": np.zeros(3)}):
        with pytest.raises(ConfigError, match="image tower included"):
            torch_files.model_state(value, is_array, file, "-")


@pytest.mark.parametrize(
    "name, fix",
    [
        ("openai/clip-vit-base-patch32", "hf download openai/clip-vit-base-patch32 --local-dir"),
        ("hf-hub:laion/CLIP-ViT-B-32", "hf download laion/CLIP-ViT-B-32 "),
        ("runs/clip.pt", None),
        ("./my/model", None),
        ("ViT-B-32", None),
        ("gs://bucket/clip", "copy it to a local disk first, and name the copy"),
    ],
)
def test_a_name_of_the_hub_says_how_to_download_it(name, fix):
    message = refused(name)
    assert ("fix:" in message) == (fix is not None) and (fix or "") in message


def test_a_folder_of_the_hubs_cache_names_its_snapshot(tmp_path):
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    assert f"fix:      name the snapshot: {tmp_path / 'snapshots' / 'abc'}" in refused(tmp_path)


def test_a_folder_of_both_libraries_with_weights_of_one(folder, written):
    """As LAION's on the Hub, of which one file was downloaded."""
    huggingface.HuggingFace().write(written, folder, str(folder))
    plain = load.load(folder)
    (folder / NATIVE).unlink()
    assert same(load.load(folder), plain)


@with_torch
def test_torchs_files_of_training(folder):
    """Numbers of NumPy and a command's arguments may lie beside the arrays. No other object is
    made, and the command that the message names saves the arrays alone."""
    torch = libraries.require("torch")
    plain = load.load(folder)
    arrays = {k: torch.from_numpy(x) for k, x in load_file(folder / NATIVE).items()}
    wrapped = {f"model.{k}": x for k, x in arrays.items()}
    kinds = {
        "last.ckpt": {"state_dict": wrapped, "pytorch-lightning_version": "2.0"},
        "best.pth.tar": {"model": arrays, "best": np.float64(0.5), "step": np.int64(3)},
        "slip.pt": {"state_dict": arrays, "args": argparse.Namespace(lr=1)},
        "half.pt": {k: x.double() for k, x in arrays.items()},
    }
    for name, value in kinds.items():
        torch.save(value, folder / name)
        assert same(load.load(folder / name), plain), name
    torch.save(arrays, folder / "old.bin", _use_new_zipfile_serialization=False)
    assert same(load.load(folder / "old.bin"), plain)
    whole = (folder / "half.pt").read_bytes()
    for cut in (3, 100, len(whole) // 2):
        (folder / "cut.pt").write_bytes(whole[:cut])
        assert "a complete torch file" in refused(folder / "cut.pt")

    torch.save({"state_dict": arrays, "head": torch.nn.Linear(2, 2)}, folder / "code.pt")
    message = refused(folder / "code.pt")
    assert "with an object of torch.nn.modules.linear.Linear" in message
    command = shlex.split(message[message.index("python -c") :])
    exec(command[2])  # as the message advises
    torch.save({"state_dict": arrays, "ema": arrays}, folder / "two.pt")
    command = refused(folder / "two.pt")
    assert "the weights of state_dict, ema" in command
    exec(shlex.split(command[command.index("python -c") :])[2])
    assert same(load.load(folder / "weights.pt"), plain)
