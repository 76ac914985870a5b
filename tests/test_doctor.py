"""What the doctor finds, and that it says what to mend."""

import os
import subprocess
import sys

import jax
import pytest
from support import ROOT

from clipx import cli
from clipx.errors import ConfigError, install_hint
from clipx.planning import host


def found(findings):
    return {finding.what: finding for finding in findings}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A folder of programs that are found before all others."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def program(name, text):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    return program


def test_a_healthy_host_needs_nothing(tmp_path):
    config = cli.load_config(str(ROOT / "configs" / "quickstart.py"), [("data.size", "64")])
    findings = list(host.examine(config, str(tmp_path / "run")))
    assert [f for f in findings if f.mend and f.fatal] == []
    told = found(findings)
    assert told["devices"].found == "8 x cpu, 1 process(es)"
    assert "GB/s for each of 8 devices" in told["all-reduce"].found
    assert "64 rows" in told["config.data"].found
    assert list((tmp_path / "run").iterdir()) == []


def test_all_reduce_counts_bytes():
    assert host.all_reduce(jax.devices()[:2], size=2**16) > 0


def test_a_gpu_that_jax_does_not_see(path, monkeypatch):
    path("nvidia-smi", "echo 'NVIDIA H200, 575.57'; echo 'NVIDIA H200, 575.57'")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    gpu = found(host.check_drivers())["gpu driver"]
    assert gpu.found == "2 x NVIDIA H200, 575.57; JAX sees none of them"
    assert gpu.mend == install_hint("cuda")
    path("nvidia-smi", "exit 9")
    assert "mend NVIDIA's driver" in found(host.check_drivers())["gpu driver"].mend


def test_a_stale_lock_file(path, monkeypatch, tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr(host, "TPU_LOCK", str(lock))
    assert "tpu lock" not in found(host.check_drivers())  # it hinders nobody where no TPU is
    monkeypatch.setattr(host.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    path("fuser", "exit 1")
    assert f"sudo rm {lock}" in found(host.check_drivers())["tpu lock"].mend
    path("fuser", "echo 4242")
    assert "end process 4242" in found(host.check_drivers())["tpu lock"].mend


def test_data_that_is_not_there(tmp_path):
    config = {"data": {"source": "webdataset", "path": str(tmp_path / "x-*.tar")}}
    told = found(host.check_data(config))["config.data"]
    assert "x-*.tar" in told.found and told.fatal and told.mend


@pytest.mark.parametrize(
    "zone, location, fine",
    [
        ("projects/1/zones/us-central2-b", "US-CENTRAL2", True),
        ("projects/1/zones/us-central2-b", "US", True),
        ("projects/1/zones/europe-west4-a", "EU", True),
        ("projects/1/zones/us-central2-b", "US-CENTRAL1", False),
        ("projects/1/zones/us-central2-b", "EUROPE-WEST4", False),
        ("", "EUROPE-WEST4", True),
    ],
)
def test_a_bucket_elsewhere(path, zone, location, fine):
    path("gcloud", f"echo {location}")
    config = {"data": {"path": ["gs://pictures/a.tar", "b"]}, "evals": {"x": "gs://pictures/c"}}
    told = found(host.check_buckets(config, zone))
    assert list(told) == ["gs://pictures"]
    assert bool(told["gs://pictures"].mend) != fine


def test_a_bucket_that_cannot_be_read_is_advice(path):
    path("gcloud", "exit 1")
    [told] = host.check_buckets({"a": "gs://pictures/x"}, "")
    assert told.mend and not told.fatal


def test_a_workdir_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--workdir"):
        list(host.check_workdir(str(tmp_path / "file")))


@pytest.mark.slow  # a start of its own
def test_the_command_ends_with_what_is_to_mend(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "clipx.doctor", "--config=configs/clip.py:small",
         f"--config.data.path={tmp_path}/none-*.tar"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == cli.EXIT_CONFIG, done.stderr
    assert "MEND config.data: " in done.stdout and "to mend" in done.stdout
