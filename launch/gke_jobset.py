#!/usr/bin/env python3
"""Starts a run on a Kubernetes cluster with JobSet, such as GKE: fills in gke_jobset.yaml for a
size and an image, and passes it to kubectl. Needs only Python and kubectl.

    launch/gke_jobset.py --name=run1 --size=v5e:4x4 --image=IMAGE [--dry_run] -- \\
        --config=configs/clip.py --workdir=/mnt/runs/run1 ...

Sizes: v4, v5e, v5p and v6e with a topology (v5e:16x16); h100, h200 and a100 with nodes x GPUs
(h100:8x8); cpu with a number of nodes (cpu:4). All pods must share the workdir, for example a
mounted bucket or NFS: add its volume to gke_jobset.yaml.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import shlex
import string
import subprocess
import sys
from typing import Any

HERE = pathlib.Path(__file__).parent
EXIT_CONFIG = 2
# GKE's names (its pages "Plan TPUs in GKE" and "Run GPUs in GKE"), and a TPU host's number of chips
TPUS = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
}
GPUS = {"a100": "nvidia-tesla-a100", "h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb"}


class SizeError(Exception):
    """A wrong --size or --name; one line that says what is expected."""


def pods(size: str) -> dict[str, Any]:
    """The number of hosts of a slice (`hosts`), and a host's `node_selector`, `limits` and
    `tolerations`. Raises `SizeError` for an unknown size."""
    kind, _, shape = size.partition(":")
    valid = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)
    sides = [int(side) for side in shape.split("x")] if valid else []
    label, chips = TPUS.get(kind, ("", 0))
    if label and len(sides) == (2 if kind in ("v5e", "v6e") else 3):
        total = math.prod(sides)
        on_host = min(total, chips) if shape != "2x4" else 8  # one host with eight chips
        if total % on_host == 0:
            selector = {
                "cloud.google.com/gke-tpu-accelerator": label,
                "cloud.google.com/gke-tpu-topology": shape,
            }
            limits = {"google.com/tpu": on_host}
            return {"hosts": total // on_host, "node_selector": selector, "limits": limits}
    if kind in GPUS and len(sides) == 2:
        selector = {"cloud.google.com/gke-accelerator": GPUS[kind]}
        return {
            "hosts": sides[0],
            "node_selector": selector,
            "limits": {"nvidia.com/gpu": sides[1]},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        }
    if kind == "cpu" and len(sides) == 1:
        return {"hosts": sides[0], "node_selector": {}, "limits": {}}
    known = "v5e:4x4 or v6e:16x16, v4:2x2x4 or v5p:4x4x4, h100:8x8 (also h200, a100), cpu:4"
    raise SizeError(f"--size={size}: expected a kind and its shape, such as {known}")


def render(
    name: str,
    size: str,
    image: str,
    arguments: list[str],
    slices: int = 1,
    restarts: int = 10,
    doctor: bool = False,
) -> str:
    """The YAML of the JobSet. arguments: of clipx.train, or with `doctor` of clipx.doctor. Raises
    `SizeError` for a wrong size or name."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise SizeError(
            f"--name={name}: expected at most 40 characters of a-z, 0-9 and -, with a letter first "
            "and no - last"
        )
    host = pods(size)
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"  # one node pool per slice
    on_tpu = "google.com/tpu" in host["limits"]
    values = {
        "name": name,
        "image": image,
        "module": "clipx.doctor" if doctor else "clipx.train",
        "slices": slices,
        "hosts": host["hosts"],
        "processes": host["hosts"] * slices,
        "restarts": restarts,
        "annotations": {exclusive: "cloud.google.com/gke-nodepool"} if on_tpu else {},
        "node_selector": host["node_selector"],
        "tolerations": host.get("tolerations", []),
        "resources": {"limits": host["limits"]},
        "arguments": arguments,
    }
    # JSON is valid YAML
    flat = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    return string.Template((HERE / "gke_jobset.yaml").read_text()).substitute(flat)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="name of the JobSet")
    parser.add_argument("--size", required=True, help="size of a slice: v5e:4x4, h100:8x8, cpu:4")
    parser.add_argument("--image", required=True, help="image built from launch/Dockerfile")
    parser.add_argument("--slices", type=int, default=1, help="number of slices of that size")
    parser.add_argument(
        "--restarts", type=int, default=10, help="restarts after failures; preemptions do not count"
    )
    parser.add_argument("--build", action="store_true", help="build and push the image first")
    parser.add_argument("--doctor", action="store_true", help="run clipx.doctor, do not train")
    parser.add_argument("--dry_run", action="store_true", help="print every command, run none")
    parser.add_argument("arguments", nargs="+", help="after --: the arguments of clipx.train")
    options = parser.parse_args(argv)
    try:
        text = render(
            options.name,
            options.size,
            options.image,
            options.arguments,
            options.slices,
            options.restarts,
            options.doctor,
        )
    except SizeError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    kind = options.size.partition(":")[0]
    device = "tpu" if kind in TPUS else "cuda" if kind in GPUS else "cpu"
    build = ["docker", "build", f"--file={HERE / 'Dockerfile'}", f"--build-arg=DEVICE={device}"]
    commands = []
    if options.build:
        commands.append([*build, f"--tag={options.image}", str(HERE.parent)])
        commands.append(["docker", "push", options.image])
    commands.append(["kubectl", "apply", "--filename=-"])
    selector = f"--selector=job-name={options.name}-train-0"
    logs = ["kubectl", "logs", "--follow", "--prefix", selector]
    commands.append([*logs, "--max-log-requests=1024", "--pod-running-timeout=30m"])
    for command in commands:
        if options.dry_run:
            print(shlex.join(command) + (" <<'YAML'" if "apply" in command else ""))
            if "apply" in command:
                print(text.rstrip() + "\nYAML")
            continue
        stdin = text if "apply" in command else None
        code = subprocess.run(command, input=stdin, text=True).returncode
        if code:
            print(f"{shlex.join(command)} failed with exit code {code}", file=sys.stderr)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
