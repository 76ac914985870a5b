#!/usr/bin/env python3
"""Starts a run on a Kubernetes cluster that has JobSet, as GKE has: fills in gke_jobset.yaml for a
size and an image, and gives it to kubectl. Needs nothing but Python and kubectl.

    launch/gke_jobset.py --name=run1 --size=v5e:4x4 --image=IMAGE [--dry_run] -- \\
        --config=configs/clip.py --workdir=/mnt/runs/run1 ...

Sizes: v4, v5e, v5p and v6e with a topology (v5e:16x16), h100, h200 and a100 with nodes x GPUs
(h100:8x8), cpu with nodes (cpu:4). The workdir is a folder that all pods share (a mounted bucket or
NFS): add its volume to gke_jobset.yaml.
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

HERE = pathlib.Path(__file__).parent
EXIT_CONFIG = 2
# What GKE calls them (Plan TPUs in GKE; Run GPUs in GKE), and chips on a host of a larger slice.
TPUS = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
}
GPUS = {"a100": "nvidia-tesla-a100", "h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb"}


class SizeError(Exception):
    """A size that nothing has; one line with those that are known."""


def pods(size: str) -> dict:
    """Hosts of a slice, and what a host needs: nodeSelector, limits and tolerations."""
    kind, _, shape = size.partition(":")
    found = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)
    sides = [int(side) for side in shape.split("x")] if found else []
    label, chips = TPUS.get(kind, ("", 0))
    if label and len(sides) == (2 if kind in ("v5e", "v6e") else 3):
        total = math.prod(sides)
        on_host = min(total, chips) if shape != "2x4" else 8  # one host of eight
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
    name: str, size: str, image: str, arguments: list[str], slices=1, restarts=10, doctor=False
) -> str:
    """The JobSet's YAML; `arguments` are clipx.train's, or clipx.doctor's."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise SizeError(f"--name={name}: expected at most 40 of a-z, 0-9 and -, from a letter")
    told = pods(size)
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"  # a slice is one node pool's
    on_tpu = "google.com/tpu" in told["limits"]
    values = {
        "name": name,
        "image": image,
        "module": "clipx.doctor" if doctor else "clipx.train",
        "slices": slices,
        "hosts": told["hosts"],
        "processes": told["hosts"] * slices,
        "restarts": restarts,
        "annotations": {exclusive: "cloud.google.com/gke-nodepool"} if on_tpu else {},
        "node_selector": told["node_selector"],
        "tolerations": told.get("tolerations", []),
        "resources": {"limits": told["limits"]},
        "arguments": arguments,
    }
    flat = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}  # JSON: YAML
    return string.Template((HERE / "gke_jobset.yaml").read_text()).substitute(flat)


def main(argv: list[str]) -> int:
    about = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about.add_argument("--name", required=True, help="of the JobSet")
    about.add_argument("--size", required=True, help="v5e:4x4, h100:8x8, cpu:4, ...")
    about.add_argument("--image", required=True, help="built from launch/Dockerfile")
    about.add_argument("--slices", type=int, default=1, help="how many of that size")
    about.add_argument("--restarts", type=int, default=10, help="after failures; preempted: free")
    about.add_argument("--build", action="store_true", help="build and push the image first")
    about.add_argument("--doctor", action="store_true", help="clipx.doctor in place of training")
    about.add_argument("--dry_run", action="store_true", help="print every command, run none")
    about.add_argument("arguments", nargs="+", help="after --: the arguments of clipx.train")
    asked = about.parse_args(argv)
    try:
        text = render(
            asked.name,
            asked.size,
            asked.image,
            asked.arguments,
            asked.slices,
            asked.restarts,
            asked.doctor,
        )
    except SizeError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    kind = asked.size.partition(":")[0]
    device = "tpu" if kind in TPUS else "cuda" if kind in GPUS else "cpu"
    build = ["docker", "build", f"--file={HERE / 'Dockerfile'}", f"--build-arg=DEVICE={device}"]
    commands = [[*build, f"--tag={asked.image}", str(HERE.parent)], ["docker", "push", asked.image]]
    commands = commands if asked.build else []
    commands.append(["kubectl", "apply", "--filename=-"])
    pods_of = f"--selector=job-name={asked.name}-train-0"
    logs = ["kubectl", "logs", "--follow", "--prefix", pods_of]
    commands.append([*logs, "--max-log-requests=1024", "--pod-running-timeout=30m"])
    for command in commands:
        if asked.dry_run:
            print(shlex.join(command) + (" <<'YAML'" if "apply" in command else ""))
            if "apply" in command:
                print(text.rstrip() + "\nYAML")
            continue
        given = text if "apply" in command else None
        code = subprocess.run(command, input=given, text=True).returncode
        if code:
            print(f"{shlex.join(command)} ended with {code}", file=sys.stderr)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
