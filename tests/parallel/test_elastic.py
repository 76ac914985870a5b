"""A run saved by two processes on eight devices goes on on 1, 2, 4 and 16, in other meshes: it sees
the same rows, and its losses agree within rounding."""

import shutil

import numpy as np
import pytest
from support import elastic
from support.runs import NO_EVALS, small

STEPS, SAVED = 8, 4
MESHES = [
    (1, {}),
    (2, {"data": 1, "fsdp": 2}),
    (4, {"data": 2, "tensor": 2}),
    (16, {"data": 4, "fsdp": 2, "tensor": 2}),
]
DECLIP = {"simsiam_width": 16, "queue_size": 48, "second_text": "other"}
OBJECTIVES = {  # fields that make a method small
    "clip": {},
    "siglip": {},
    "slip": {"head_width": 16, "head_dim": 8},
    "filip": {"token_width": 8, "top_k": 4},
    "declip": DECLIP,
    "defilip": {**DECLIP, "late_interaction_weight": 0.2, "token_width": 8, "top_k": 4},
    "clip_lite": {"width": 16},
    "protoclip": {
        "k": 5,
        "projection_dim": 8,
        "projection_hidden": 16,
        "iterations": 3,
        "restarts": 2,
        "episode_size": 96,  # three steps: the checkpoint is within an episode
        "with_replacement": False,
    },
}


def config(name, **mesh):
    fields = {f"objective.{field}": str(value) for field, value in OBJECTIVES[name].items()}
    return small(
        ("objective.name", name.replace("defilip", "declip")),
        *fields.items(),
        ("tokenizer.mask", "true"),
        ("train.total_steps", str(STEPS)),
        ("train.save_every_steps", str(SAVED)),
        *((f"mesh.{axis}", str(size)) for axis, size in mesh.items()),
        ("mesh.max_replicated", "1.0"),
        *NO_EVALS,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_goes_on_on_any_number_of_devices(name, tmp_path):
    saved = tmp_path / "saved"
    run = {"workdir": str(saved), "config": config(name, data=2, fsdp=2, tensor=2), "devices": None}
    parts = [results[0] for results in elastic.start(tmp_path / "saving", [run], 4, processes=2)]
    expected = {
        step: sorted({row for part in parts for row in part["rows"][str(step)]})
        for step in range(STEPS)
    }
    shutil.rmtree(saved / "checkpoints" / str(STEPS))
    runs = [
        {
            "workdir": shutil.copytree(saved, tmp_path / str(devices)).as_posix(),
            "config": config(name, **mesh),
            "devices": devices,
        }
        for devices, mesh in MESHES
    ]
    (results,) = elastic.start(tmp_path / "resumed", runs, 16)
    losses = [parts[0]["losses"][str(step)] for step in range(1, STEPS + 1)]
    for (devices, _), result in zip(MESHES, results, strict=True):
        seen = {int(step): rows for step, rows in result["rows"].items()}
        assert seen == {step: expected[step] for step in range(SAVED, STEPS)}
        got = [result["losses"][str(step)] for step in range(1, STEPS + 1)]
        print(name, devices, np.abs(np.divide(got, losses) - 1).max())
        assert got[:SAVED] == losses[:SAVED]
        np.testing.assert_allclose(got, losses, rtol=1e-4, err_msg=f"{devices} devices")
