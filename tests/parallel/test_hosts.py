"""Processes find each other, or report within a bounded time who is missing and what differs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from absl import flags
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost
from support import ROOT, broken_runs
from support.runs import SMALL, free_port, parameters, rows, small, wait_for
from support.shards import pairs, shard

from clipx import cli
from clipx.errors import ConfigError, HostsError
from clipx.parallel import processes
from clipx.parallel.environment import ProcessInfo, find_process, read_metadata
from clipx.parallel.processes import meet, refuse_skew, refuse_uneven
from clipx.train import train
from clipx.training.checkpoint import Checkpoints
from clipx.training.loop import Stop

NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "a:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "4101",
    "SLURM_STEP_NODELIST": "gpu[007-009,12],login",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
TPU_VM = {
    "attributes/worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2",
    "attributes/agent-worker-number": "1",
    "attributes/tpu-env": "ZONE: 'us-central2-b'\n",
}
SLICES = {"attributes/tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"}
SLICES["attributes/tpu-env"] += "MEGASCALE_COORDINATOR_ADDRESS: '10.1.0.1:8080'\n"


@pytest.mark.parametrize(
    "environment, metadata, expected",
    [
        ({}, {}, None),
        (EXPLICIT, {}, ("a:1234", 4, 3, None)),
        (SLURM, {}, ("gpu007:61445", 4, 2, None)),  # one task per node owns all of its devices
        (SLURM | {"SLURM_NTASKS": "32", "SLURM_LOCALID": "6"}, {}, ("gpu007:61445", 32, 2, (6,))),
        (SLURM | {"SLURM_NTASKS": "32", "CUDA_VISIBLE_DEVICES": "6"}, {},
         ("gpu007:61445", 32, 2, None)),
        (SLURM | {"SLURM_NTASKS": "1"}, {}, None),
        ({"SLURM_JOB_ID": "4101", "SLURM_NTASKS": "4"}, {}, None),  # not in a step
        (SLURM | EXPLICIT, {}, ("a:1234", 4, 3, None)),
        (MPI, {}, ("10.96.0.1:62624", 8, 5, (1,))),
        (MPI | {"OMPI_MCA_orte_hnp_uri": "", "JAX_COORDINATOR_ADDRESS": "b:9"}, {},
         ("b:9", 8, 5, (1,))),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}, {}, ("t0:8482", 2, 1, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {}, None),
        ({}, TPU_VM, ("10.0.0.1:8482", 2, 1, None)),
        ({}, TPU_VM | SLICES, ("10.1.0.1:8482", 4, 3, None)),
        ({"JAX_PLATFORMS": "cpu"}, TPU_VM, None),
    ],
)  # fmt: skip
def test_the_environment_tells_who_we_are(environment, metadata, expected):
    environment = dict(environment) if metadata else environment | NO_TPU
    found = find_process(environment, lambda key: metadata.get(key, ""))
    assert expected == (found and (found.address, found.processes, found.process, found.devices))


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES=(absent), JAX_PROCESS_ID=(absent)"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "a"}, "JAX_COORDINATOR_ADDRESS=a"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "less than JAX_NUM_PROCESSES=4"),
        (MPI | {"OMPI_MCA_orte_hnp_uri": ""}, "JAX_COORDINATOR_ADDRESS=(absent)"),
    ],
)
def test_half_an_environment_is_an_error(environment, said):
    with pytest.raises(ConfigError, match=".*") as error:
        find_process(environment | NO_TPU)
    assert said in str(error.value)


def gather(number, facts, wait=20.0, address=None):
    """What `meet` returns, or the message of its error, in each process of `facts`."""
    address = address or f"127.0.0.1:{free_port()}"
    results = {}

    def one(process):
        try:
            info = ProcessInfo(address, number, process, None, "a test")
            results[process] = meet(info, facts[process], wait)
        except HostsError as error:
            results[process] = str(error)

    threads = [threading.Thread(target=one, args=(process,)) for process in facts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_have_one_table():
    results = gather(4, {i: {"x": i} for i in (2, 0, 3, 1)})
    assert all(results[i] == results[0] for i in range(4))
    assert [word["facts"]["x"] for word in results[0]] == [0, 1, 2, 3]
    assert results[0][3]["host"] == socket.gethostname()


def test_who_is_missing_is_named_everywhere():
    results = gather(4, {0: {}, 2: {}}, wait=1.0)
    assert set(results) == {0, 2}
    for said in results.values():
        assert "process 1, process 3 of 4" in said and "did not come" in said, said
        assert f"process 2 ({socket.gethostname()})" in said


def test_no_process_0_is_said_in_time():
    said = gather(2, {1: {}}, wait=0.5)[1]
    assert "did not reach process 0" in said and "refused" in said


def test_a_foreign_listener_is_said():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def answer():
            with contextlib.suppress(OSError), listener.accept()[0] as peer:
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert "earlier run" in gather(2, {1: {}}, wait=0.5, address=address)[1]
        thread.join()
        assert "cannot listen" in gather(2, {0: {}}, wait=0.5, address=address)[0]


def test_other_programs_at_the_port_are_ignored():
    port = free_port()

    def other_program():
        for _ in range(100):
            with contextlib.suppress(OSError):
                with socket.create_connection(("127.0.0.1", port), 1) as peer:
                    peer.sendall(b"GET / HTTP/1.1\r\n")
                return
            threading.Event().wait(0.02)

    thread = threading.Thread(target=other_program)
    thread.start()
    facts = {0: {}, 1: {}}
    results = gather(2, facts, address=f"127.0.0.1:{port}")
    thread.join()
    assert len(results[0]) == 2 and results[0] == results[1]


def word(process, host, **facts):
    empty = {"versions": {}, "config": {}, "command": {}}
    return {"process": process, "host": host, "facts": empty | facts}


@pytest.mark.parametrize(
    "facts, said",
    [
        ({"versions": {"jax": "0.10.3"}}, "versions.jax: '0.10.2' -> '0.10.3'"),
        ({"config": {"train": {"seed": 1}}}, "config.train.seed: 0 -> 1"),
        ({"command": {"workdir": "b"}}, "command.workdir: 'a' -> 'b'"),
    ],
)
def test_skew_names_the_host_and_both_values(facts, said):
    same = {
        "versions": {"jax": "0.10.2"}, "config": {"train": {"seed": 0}},
        "command": {"workdir": "a"},
    }  # fmt: skip
    refuse_skew([word(0, "a", **same), word(1, "b", **same)])
    with pytest.raises(ConfigError) as error:
        refuse_skew([word(0, "a", **same), word(1, "b", **same), word(2, "c", **same | facts)])
    assert said in str(error.value)
    assert "process 0 (a) -> process 2 (c)" in str(error.value)


def test_own_facts_name_the_files():
    facts = processes.facts({"a": (1, 2)}, workdir="w")
    assert {"python", "jax", "jaxlib", "flax", "clipx files"} <= set(facts["versions"])
    assert facts["config"] == {"a": [1, 2]} and facts["command"] == {"workdir": "w"}


def test_uneven_devices_are_named():
    table = [word(0, "a"), word(1, "b")]
    refuse_uneven([0, 0, 1, 1], table)
    with pytest.raises(HostsError, match=r"process 1 \(b\): 1"):
        refuse_uneven([0, 0, 1], table)


@pytest.mark.parametrize("text", ["0", "-1", "soon"])
def test_the_wait_is_a_number(text, monkeypatch):
    monkeypatch.setenv("CLIPX_WAIT_SECONDS", text)
    with pytest.raises(ConfigError, match="CLIPX_WAIT_SECONDS"):
        processes.seconds()


def test_metadata_without_a_server_is_empty():
    assert read_metadata("x", f"http://127.0.0.1:{free_port()}/") == ""


def test_processes_stop_at_one_call(monkeypatch):
    """Steps, evaluations and episodes all count as calls. Once `Stop` has returned True it stays
    True without asking again."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda n: asked.append(n) or n == 3
    )
    with Stop() as stop:
        assert [stop() for _ in range(5)] == [False, False, True, True, True]
    assert asked == [1, 2, 3]


def test_a_broken_collective_says_who_has_gone(monkeypatch):
    """`lost` returns "" for errors of other kinds, and in a run of one process."""

    def late(name, wait):
        raise HostsError(f"process 1 (b) did not come to {name!r} within {wait:.0f} s: look there")

    broken = jax.errors.JaxRuntimeError("UNKNOWN: Gloo ReduceScatter failed: Connection reset")
    assert processes.lost(broken) == ""
    monkeypatch.setattr(processes, "hosts", lambda: ["a", "b"])
    monkeypatch.setattr(processes, "barrier", late)
    assert "process 1 (b) did not answer within 10 s: look there" in processes.lost(broken)
    assert processes.lost(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB")) == ""
    monkeypatch.setattr(processes, "barrier", lambda name, wait: None)
    assert "all of them still answer" in processes.lost(broken)


TIMED_OUT = """DEADLINE_EXCEEDED: Barrier timed out. Id: clipx/x::0.
# of tasks that reached the barrier: 1/3.
The first task at the barrier: 0. Some timed out task names:
1
2


RPC: /xla.coordination.CoordinationService/Barrier"""


def test_a_barrier_says_whom_it_waited_for(monkeypatch):
    def wait(*, key, timeout_ms):
        assert (key, timeout_ms) == ("clipx/x", 7000)
        raise jax.errors.JaxRuntimeError(TIMED_OUT)

    monkeypatch.setenv("CLIPX_WAIT_SECONDS", "7")
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost, "get_barrier_sync_fn", lambda: wait)
    monkeypatch.setattr(processes, "hosts", lambda: ["a", "b", "c"])
    with pytest.raises(HostsError, match=r"process 1 \(b\), process 2 \(c\) did not come to 'x'"):
        processes.barrier("x")


LATE = """
import sys, time
from clipx.errors import HostsError
from clipx.parallel import environment, processes
info = environment.ProcessInfo(sys.argv[1], 2, int(sys.argv[2]), None, "a test")
processes.start(info)
processes.barrier("first")
if info.process == 1:
    time.sleep(6)
try:
    processes.barrier("second")
    print("together")
except HostsError as error:
    print(error)
"""


def environment(**more):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | more


@contextlib.contextmanager
def running(commands):
    """Runs the commands at once, and kills their processes at the end of the block."""
    with contextlib.ExitStack() as stack:
        processes = []
        for words, environment in commands:
            processes.append(
                subprocess.Popen(
                    words, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, env=environment,
                )
            )  # fmt: skip
            stack.callback(processes[-1].kill)
        yield processes


def ended(processes, seconds=900):
    """The output and the exit code of each process."""
    said = [process.communicate(timeout=seconds)[0] for process in processes]
    return said, [process.returncode for process in processes]


def started(commands):
    """Runs the commands at once. Returns the output and the exit code of each."""
    with running(commands) as processes:
        return ended(processes)


@pytest.mark.slow  # two starts of JAX
def test_a_barrier_names_the_late():
    address = f"127.0.0.1:{free_port()}"
    said, codes = started(
        [([sys.executable, "-c", LATE, address, str(i)], environment(CLIPX_WAIT_SECONDS="2"))
         for i in range(2)]
    )  # fmt: skip
    assert codes == [0, 0], said
    late = f"process 1 ({socket.gethostname()}) did not come to 'second' within 2 s"
    assert late in said[0] and "together" not in said[0] + said[1]


def command(workdir, *more):
    arguments = [f"--config.{path}={text}" for path, text in [*SMALL, *more]]
    return [sys.executable, "-m", "clipx.train", "--config=configs/quickstart.py",
            f"--workdir={workdir}", *arguments]  # fmt: skip


def place(i, number, address):
    return {
        "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number),
        "JAX_PROCESS_ID": str(i),
    }  # fmt: skip


def test_a_command_tells_its_config(monkeypatch):
    """The processes compare the config with its overrides, and the workdir."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", "configs/quickstart.py", "", flag_values=values)
    flags.DEFINE_string("workdir", "w", "", flag_values=values)
    values.mark_as_parsed()
    told = []
    monkeypatch.setattr(cli.flags, "FLAGS", values)
    monkeypatch.setattr(cli, "find_process", lambda environment: "a place")
    monkeypatch.setattr(processes, "start", lambda *args, **more: told.append((*args, more)))
    monkeypatch.chdir(ROOT)
    cli.start_processes([("seed", "7")])
    [(place, config, command)] = told
    assert place == "a place" and config["seed"] == 7 and "data" in config
    assert command == {"workdir": "w", "deterministic": None, "overrides": {"seed": "7"}}


@pytest.mark.slow  # two whole starts
def test_the_command_refuses_another_config(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    said, codes = started(
        [(command(tmp_path / "run", ("seed", str(i))), environment(**place(i, 2, address)))
         for i in range(2)]
    )  # fmt: skip
    assert codes == [2, 2], said
    assert all("config.seed: 0 -> 1" in text for text in said), said


LONG = [("train.total_steps", "60"), ("train.save_every_steps", "5")]


def pair(workdir, *more):
    """Two processes of one run."""
    address = f"127.0.0.1:{free_port()}"
    return running(
        [(command(workdir, *LONG, *more), environment(**place(i, 2, address))) for i in range(2)]
    )


def after(step, workdir, processes):
    """Waits until the run has logged `step`."""
    log = workdir / "metrics.jsonl"

    def there():
        return log.exists() and any(row["step"] >= step for row in rows(workdir))

    wait_for(there, processes[0], seconds=300)


@pytest.mark.slow  # four starts
def test_told_to_stop_then_killed_they_go_on(tmp_path):
    """One of two processes is told to stop: both save at the same step. Then one is killed: the
    other soon reports which. Started again, they end where an uninterrupted run of one process
    ends."""
    workdir = tmp_path / "two"
    with pair(workdir, ("train.eval_every_steps", "1")) as processes:  # mostly in an evaluation
        after(3, workdir, processes)
        processes[1].send_signal(signal.SIGTERM)
        said, codes = ended(processes, 60)
    assert codes == [cli.EXIT_PREEMPTED] * 2, said
    saved = Checkpoints(workdir).latest
    assert 3 < saved < 60 and f"saved step {saved}" in said[0]
    assert "saved step" not in said[1]  # only process 0 prints

    with pair(workdir) as processes:
        after(saved + 6, workdir, processes)
        processes[1].kill()
        said, codes = ended(processes, 180)
    # It ends at once while it computes. While it waits to save, JAX ends it after 100 s.
    assert codes[0] in (cli.EXIT_LOST, -signal.SIGABRT), said[0][-3000:]
    assert f"continuing from step {saved}" in said[0]
    if codes[0] == cli.EXIT_LOST:
        assert f"process 1 ({socket.gethostname()}) did not answer" in said[0], said[0]
        assert "Traceback" not in said[0]
    else:
        assert "Task 1 heartbeat timeout" in said[0] or "task:1" in said[0], said[0][-3000:]

    with pair(workdir) as processes:
        said, codes = ended(processes)
    assert codes == [0, 0], said
    assert train(small(*LONG), str(tmp_path / "one")) == 0
    two, one = ([r["loss"] for r in rows(tmp_path / n) if "loss" in r] for n in ("two", "one"))
    np.testing.assert_allclose(two, one, rtol=1e-4)


@pytest.mark.slow  # two whole starts
def test_two_processes_prove_and_check_together(tmp_path):
    """Each proves what it wrote. After one bit of the second one's part has changed, both go on
    from the checkpoint before, and end where they had ended."""
    ten = ("train.total_steps", "10")
    with pair(tmp_path, ten) as processes:
        said, codes = ended(processes)
    assert codes == [0, 0], said
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    newest = tmp_path / "checkpoints" / "10"
    proven = json.loads((newest / "proof_1.json").read_text())["files"]
    assert proven and all("process_1" in name for name in proven)
    broken_runs.flip(newest / max(proven, key=proven.__getitem__))
    with pair(tmp_path, ten) as processes:
        said, codes = ended(processes)
    assert codes == [0, 0], said
    assert "other bytes than were written); renamed to 10.damaged. Step 5 is taken" in said[0]
    assert "damaged" not in said[1] and "continuing from step 5" in said[0]
    assert [row["loss"] for row in rows(tmp_path) if "loss" in row] == losses


@pytest.mark.slow  # two whole starts
def test_an_error_of_one_ends_the_other(tmp_path):
    """One host lacks the data: that process ends with its own error and code, and the other reports
    which is missing."""

    shard(tmp_path / "a.tar")
    (tmp_path / "config.py").write_text(
        f"def get_config(variant):\n    return {pairs('$PAIRS/a.tar')!r}\n"
    )
    words = [sys.executable, "-m", "clipx.train", f"--config={tmp_path / 'config.py'}",
             f"--workdir={tmp_path / 'run'}"]  # fmt: skip
    address, more = f"127.0.0.1:{free_port()}", {"CLIPX_WAIT_SECONDS": "15"}
    said, codes = started(
        [(words, environment(**place(i, 2, address), **more, PAIRS=str(tmp_path / where)))
         for i, where in enumerate((".", "elsewhere"))]
    )  # fmt: skip
    assert codes == [cli.EXIT_LOST, cli.EXIT_CONFIG], said
    assert "its folder does not exist" in said[1] and "Traceback" not in said[1]
    assert f"process 1 ({socket.gethostname()}) did not come to 'tokenizer'" in said[0], said
    assert "Traceback" not in said[0]


DECLIP = [
    ("objective.name", "declip"),
    ("objective.queue_size", "64"),
    ("objective.simsiam_width", "32"),
    ("tokenizer.mask", "true"),
    ("data.text_augment.operations", "('swap', 'delete')"),
]


@pytest.mark.slow  # about a minute each
@pytest.mark.parametrize("more", [[("mesh.fsdp", "4")], DECLIP], ids=["clip", "declip"])
def test_four_processes_are_one(tmp_path, more):
    """Law 1 across four processes with two devices each: with parameters and optimizer state that
    are sharded over two of the processes, and with a shared queue, hidden words and a head with
    BatchNorm."""
    shorter = [("train.total_steps", "8"), ("train.save_every_steps", "4"), *more]
    address = f"127.0.0.1:{free_port()}"
    said, codes = started(
        [(command(tmp_path / "four", *shorter), environment(**place(i, 4, address)))
         for i in range(4)]
    )  # fmt: skip
    assert codes == [0] * 4, said
    assert "4 process(es)" in said[0] and not any("step" in text for text in said[1:]), said
    assert train(small(*shorter), str(tmp_path / "one")) == 0
    for x, y in zip(*(jax.tree.leaves(parameters(tmp_path / n)) for n in ("four", "one"))):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    four, one = ([r["loss"] for r in rows(tmp_path / n) if "loss" in r] for n in ("four", "one"))
    np.testing.assert_allclose(four, one, rtol=1e-5)


@pytest.mark.slow  # two starts
def test_two_start_from_a_model(tmp_path):
    """Each process reads the model of `init_from`, and holds its shards of the parameters."""
    assert train(small(("train.total_steps", "2")), str(tmp_path / "first")) == 0
    more = [("init_from", str(tmp_path / "first")), ("seed", "1"), ("train.total_steps", "4"),
            ("mesh.fsdp", "4")]  # fmt: skip
    address = f"127.0.0.1:{free_port()}"
    said, codes = started(
        [(command(tmp_path / "two", *more), environment(**place(i, 2, address))) for i in range(2)]
    )
    assert codes == [0, 0], said
    assert train(small(*more), str(tmp_path / "one")) == 0
    two, one = ([r["loss"] for r in rows(tmp_path / n) if "loss" in r] for n in ("two", "one"))
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert train(small(*more, ("init_from", "")), str(tmp_path / "scratch")) == 0
    scratch = [row["loss"] for row in rows(tmp_path / "scratch") if "loss" in row]
    assert abs(one[0] - scratch[0]) > 1e-3


@contextlib.contextmanager
def network(number):
    """Creates `number` network namespaces on one bridge, with the addresses 10.213.7.1 and up, and
    yields their names. Each has an /etc/hosts that lists all of them."""
    tag = f"cx{os.getpid() % 10000}"
    names = [f"{tag}h{i}" for i in range(number)]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    with contextlib.ExitStack() as stack:

        def undo(*words):
            stack.callback(subprocess.run, ["ip", *words], capture_output=True)

        ip("link", "add", tag, "type", "bridge")
        undo("link", "del", tag)
        ip("link", "set", tag, "up")
        table = "127.0.0.1 localhost\n"
        table += "".join(f"10.213.7.{i + 1} {name}\n" for i, name in enumerate(names))
        for i, name in enumerate(names):
            ip("netns", "add", name)
            undo("netns", "del", name)
            folder = f"/etc/netns/{name}"
            os.makedirs(folder)
            stack.callback(subprocess.run, ["rm", "-r", folder])
            with open(f"{folder}/hosts", "w") as file:
                file.write(table)
            ip("link", "add", f"{tag}v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{tag}v{i}", "master", tag, "up")
            ip("-n", name, "addr", "add", f"10.213.7.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names


@pytest.mark.slow  # about half a minute
def test_hosts_with_addresses_of_their_own(tmp_path):
    """Two hosts, each with its own network, name and address, train together. Then one becomes
    unreachable."""
    with contextlib.ExitStack() as stack:
        try:
            names = stack.enter_context(network(2))
        except (OSError, subprocess.CalledProcessError) as error:
            why = str(getattr(error, "stderr", "") or error).strip()
            pytest.skip(f"no rights to make network namespaces here: {why}")
        address = f"{names[0]}:9301"
        inside = [
            ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c",
             f'hostname {name}; exec "$@"', "sh"]
            for name in names
        ]  # fmt: skip
        said, codes = started(
            [(inside[i] + command(tmp_path / "run", ("train.total_steps", "2")),
              environment(**place(i, 2, address))) for i in range(2)]
        )  # fmt: skip
        assert codes == [0, 0], said
        assert "2 process(es)" in said[0]
        subprocess.run(["ip", "-n", names[1], "link", "set", "eth0", "down"], check=True)
        more = environment(**place(0, 2, address), CLIPX_WAIT_SECONDS="2")
        said, codes = started([(inside[0] + command(tmp_path / "run"), more)])
        assert codes == [1] and "process 1 of 2" in said[0], said
        assert f"process 0 ({names[0]})" in said[0]
