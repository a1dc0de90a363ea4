"""GPUs as this host's nvidia-smi lists them: offered, leased one by one, given back.

nvidia-smi is a script here, since the hardware is not: all else is as it is on a GPU host.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from embodied.core.errors import ConfigError, LeaseError
from hal.discovery import devices
from hal.gpus import LeasedGpu, offer_gpus, one_gpu
from hal.pool.pool import Pool
from hal.pool.state import pool_path

HOST = socket.gethostname()
ROWS = "0, NVIDIA H200, 10, 143771, 7, 35\n1, NVIDIA H200, 0, 143771, [N/A], 33\n"

RUN = """
import json, sys
from hal.gpus import LeasedGpu
with LeasedGpu(sys.argv[1], "gpu", 10.0) as gpu:
    sys.stdout.write(json.dumps([gpu.id, gpu.environment]) + "\\n"); sys.stdout.flush()
    sys.stdin.readline()
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """The nvidia-smi that is first on the path lists two GPUs."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    (tmp_path / "rows").write_text(ROWS)
    tool.write_text(f"#!/bin/sh\necho called >> {tmp_path}/called\ncat {tmp_path}/rows\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.fixture
def start(smi):
    """Starts a process that leases a GPU until a line comes; gives what it got."""
    processes = []

    def run(name):
        command = [sys.executable, "-c", RUN, name]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process, *json.loads(process.stdout.readline())

    yield run
    for process in processes:
        process.kill()
        process.wait()


def pooled():
    with Pool(pool_path()) as pool:
        return {row.id: row for row in pool.devices()}


def until(true, timeout_s=10.0):
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, pooled()
        time.sleep(0.05)


def test_two_runs_get_one_gpu_each_and_a_third_is_told_who_holds_them(start):
    first, gpu0, environment0 = start("run1/learner")
    _, gpu1, environment1 = start("run2/learner")
    assert {gpu0, gpu1} == {f"{HOST}/gpu:0", f"{HOST}/gpu:1"}
    for gpu, environment in ((gpu0, environment0), (gpu1, environment1)):
        assert environment["CUDA_VISIBLE_DEVICES"] == gpu[-1]
        assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    shown = {row.id: row for row in devices() if row.kind == "gpu"}
    assert {gpu: row.holder for gpu, row in shown.items()} == {
        gpu0: "run1/learner",
        gpu1: "run2/learner",
    }
    assert "H200" in shown[gpu0].detail
    with pytest.raises(LeaseError) as refused:
        LeasedGpu("run3/learner", "gpu", 0.3).open()
    assert "no devices for" in str(refused.value) and "within 0.3 s" in str(refused.value)
    assert f"{gpu0} is held by run1/learner" in str(refused.value)
    assert f"{gpu1} is held by run2/learner" in str(refused.value)
    first.communicate("\n", timeout=20)
    with LeasedGpu("run3/learner", "gpu", 10.0) as third:
        assert third.id == gpu0 and not third.lost
        assert pooled()[gpu0].holder == "run3/learner"
    assert gpu0 not in pooled() or not pooled()[gpu0].holder


@pytest.mark.slow
def test_a_lease_outlives_the_run_that_offered_the_gpus(start):
    first, gpu0, _ = start("run1/learner")
    _, gpu1, _ = start("run2/learner")
    assert pooled()[gpu1].owner_pid == first.pid, "offered by whoever came first"
    first.send_signal(signal.SIGKILL)
    first.wait()
    until(lambda: pooled()[gpu1].owner_pid != first.pid)
    assert pooled()[gpu1].holder == "run2/learner"
    time.sleep(3.5)
    assert pooled()[gpu1].health == "leased" and pooled()[gpu0].health in ("ready", "leased")
    with LeasedGpu("run3/learner", "gpu", 15.0) as third:
        assert third.id == gpu0, "the killed run's lease ended by itself"


@pytest.mark.slow
def test_what_is_offered_stays_usable_and_goes_when_nobody_needs_it(smi):
    closing = threading.Event()
    with Pool(pool_path()) as pool:
        thread = threading.Thread(target=offer_gpus, args=(pool, closing))
        thread.start()
        try:
            until(lambda: len(pooled()) == 2)
            seen = set()
            deadline_s = time.monotonic() + 6
            while time.monotonic() < deadline_s:
                seen |= {row.health for row in pooled().values()}
                time.sleep(0.1)
            assert seen == {"ready"}, "also between two looks at nvidia-smi"
            assert (smi / "called").read_text().count("called") < 6
            held = pool.acquire("run1/learner", f"id={HOST}/gpu:1")
        finally:
            closing.set()
            thread.join(10)
        assert list(pooled()) == [f"{HOST}/gpu:1"], "one that is leased is not taken away"
        pool.release(held)


def test_a_named_gpu_is_leased_and_what_cannot_be_is_said(smi, monkeypatch):
    with LeasedGpu("run/learner", f"id={HOST}/gpu:1", 5.0) as gpu:
        assert gpu.environment["CUDA_VISIBLE_DEVICES"] == "1"
    with pytest.raises(LeaseError, match=r"no device has the id nowhere/gpu:0"):
        LeasedGpu("run/learner", "id=nowhere/gpu:0", 0.0).open()
    with pytest.raises(ConfigError, match="ask for one GPU"):
        one_gpu("2 gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match=r"is '3', and the lease decides that: unset it"):
        LeasedGpu("run/learner", "gpu", 5.0).open()


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 0", "not there, or lists none"),
        ("echo 'Failed to initialize NVML' >&2; exit 9", "Failed to initialize NVML"),
    ],
)
def test_a_host_without_a_usable_gpu_says_why(smi, script, why):
    (smi / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(ConfigError, match=f"no GPU that can be used.*{why}"):
        LeasedGpu("run/learner", "gpu", 5.0).open()
