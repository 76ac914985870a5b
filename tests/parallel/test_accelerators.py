"""Whether a machine has an accelerator, and what a command does where it has libtpu alone."""

import importlib.util

import jax
import pytest

from clipx import cli
from clipx.parallel.environment import has_accelerator

MARKS = ["dev/accel0", "dev/vfio/1", "dev/nvidia0", "dev/kfd"]


def test_a_machine_by_its_files(tmp_path):
    assert not has_accelerator(str(tmp_path))
    vendor = tmp_path / "sys" / "bus" / "pci" / "devices" / "0000:00:04.0" / "vendor"
    vendor.parent.mkdir(parents=True)
    vendor.write_text("0x8086\n")
    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    (tmp_path / "dev" / "vfio" / "vfio").touch()  # is there without a device too
    assert not has_accelerator(str(tmp_path))
    vendor.write_text("0x1ae0\n")
    assert has_accelerator(str(tmp_path))


@pytest.mark.parametrize("mark", MARKS)
def test_a_device_file_is_one(tmp_path, mark):
    (tmp_path / mark).parent.mkdir(parents=True)
    (tmp_path / mark).touch()
    assert has_accelerator(str(tmp_path))


@pytest.mark.parametrize(
    ("libtpu", "accelerator", "given", "taken"),
    [(True, False, "", "cpu"), (False, False, "", None), (True, True, "", None),
     (True, False, "tpu", None)],
)  # fmt: skip
def test_the_cpu_is_taken_where_libtpu_would_only_complain(
    monkeypatch, libtpu, accelerator, given, taken
):
    chosen = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: libtpu or None)
    monkeypatch.setattr(cli.environment, "has_accelerator", lambda: accelerator)
    monkeypatch.setattr(jax.config, "update", lambda name, value: chosen.append((name, value)))
    monkeypatch.setenv("JAX_PLATFORMS", given)
    cli.use_no_absent_tpu()
    assert chosen == ([("jax_platforms", taken)] if taken else [])
