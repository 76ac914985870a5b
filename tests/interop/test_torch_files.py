"""Torch files are read without running them: scripted models give the arrays that torch gives, and
what only code of the file can make, or what would harm the reader, is refused in one block."""

import contextlib
import io
import json
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from support.libraries import asked, missing
from support.torch_files import HOSTILE, SCRIPTS, module, tensor, text, write

from clipx.errors import ConfigError
from clipx.interop import libraries, torch_script, weights

with_torch = asked(missing("torch"))


def refused(file) -> str:
    with pytest.raises(ConfigError) as caught:
        weights.read(file, "config.init_from")
    assert len(str(caught.value).splitlines()) <= 5 and str(file) in str(caught.value)
    return str(caught.value)


@with_torch
@pytest.mark.parametrize("traced", [False, True])
def test_scripted_models_give_torchs_arrays(traced, tmp_path):
    """Bit for bit, by torch's names: dtypes, views, tied weights; plain attributes stay out."""
    torch = libraries.require("torch")

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 3).half().t())
            self.mask = torch.ones(5)  # neither a parameter nor a buffer

        def forward(self, x):
            return x + self.weight.sum() + self.mask.sum()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 2)
            self.visual, self.blocks = Inner(), torch.nn.Sequential(Inner(), torch.nn.ReLU())
            self.tied = self.visual
            self.scale = torch.nn.Parameter(torch.tensor(4.6))
            self.register_buffer("brain", torch.randn(3).bfloat16())
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x):
            return self.tied(self.blocks(self.visual(self.conv(x)))) * self.scale

    with libraries.quiet():
        made = Model().eval()
        x = torch.zeros(1, 3, 4, 4)
        script = torch.jit.trace(made, x) if traced else torch.jit.script(made)
        script.save(file := tmp_path / "model.pt")
        theirs = torch.jit.load(file).state_dict()
    ours = torch_script.read(file)
    assert list(ours) == list(theirs) and "visual.mask" not in ours and len(ours) == 8
    for name, array in ours.items():
        assert str(array.dtype) == str(theirs[name].dtype).removeprefix("torch.")
        assert array.astype(np.float64).tolist() == theirs[name].double().tolist(), name
    plain = weights.read(file, "-")
    assert plain["visual.weight"].dtype == np.float32 and plain["visual.weight"].flags.c_contiguous


@with_torch
def test_code_of_an_archive_does_not_run(tmp_path):
    """TorchScript may restore a module by code of its own, which torch.jit.load runs."""
    torch = libraries.require("torch")
    mark = str(tmp_path / "mark")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Linear(2, 2)
            self.mark: str = mark

        @torch.jit.export
        def __getstate__(self):
            return (self.visual.weight, self.mark, self.training)

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
            self.training = state[2]
            self.mark = state[1]
            torch.save(state[0], state[1])

        def forward(self, x):
            return self.visual(x)

    with libraries.quiet():
        Model.__setstate__.__annotations__["state"] = tuple[torch.Tensor, str, bool]
        torch.jit.script(Model()).save(file := tmp_path / "model.pt")
    message = refused(file)
    assert "Model, which only code of the file can make" in message
    assert "this runs the code in the file" in message
    assert not pathlib.Path(mark).exists()
    with libraries.quiet(), contextlib.suppress(RuntimeError):  # of fields that nothing has set
        torch.jit.load(file)
    assert pathlib.Path(mark).exists()  # what is promised not to happen


def test_a_scripted_model_needs_no_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "require", None)
    inner = module("Inner", weight=tensor(offset=1, shape=(5,), strides=(1,)), other=b"N")
    file = write(tmp_path / "a.pt", module("M", visual=inner, empty=tensor((0, 3))), True)
    assert weights.read(file, "-")["visual.weight"].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("script", [True, False])
def test_hostile_pickles_are_refused(kind, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not script and missing("torch"):
        pytest.skip("torch is not installed")
    value, said = HOSTILE[kind]
    message = refused(write(tmp_path / "a.pt", value, script))
    assert said in message and not (tmp_path / "mark").exists()
    if not script:  # torch's layout before 1.6
        parts = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {})]
        (tmp_path / "old.pt").write_bytes(b"".join(parts) + b"\x80\x02" + value + b"." + parts[2])
        assert said in refused(tmp_path / "old.pt")


@pytest.mark.parametrize("kind", SCRIPTS)
def test_hostile_scripts_are_refused(kind, tmp_path):
    value, said = SCRIPTS[kind]
    assert said in refused(write(tmp_path / "a.pt", value, True))


@with_torch
def test_what_unpacks_to_too_much_is_refused(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(1 << 26))
    (tmp_path / "a.pt").write_bytes(out.getvalue())
    assert "67,108,868 bytes when it is unpacked" in refused(tmp_path / "a.pt")
    value = write(tmp_path / "b.pt", module("M", visual=tensor(), w=text("x" * (1 << 24))), True,
                  zipfile.ZIP_DEFLATED)  # fmt: skip
    assert "data.pkl of 16," in refused(value)


def test_an_index_that_leaves_its_folder_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    index = tmp_path / "in" / "model.safetensors.index.json"
    for name in ("../a.safetensors", str(tmp_path / "a.safetensors"), "x/../../a.safetensors"):
        index.write_text(json.dumps({"weight_map": {"visual.x": name}}))
        message = refused(index)
        assert "parts in the folder of the index" in message and name[:20] in message
