"""The GPU of a run's learner: leased before it starts, told to it, given back."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from embodied.core.errors import ConfigError, LeaseError
from embodied.core.rundir import RunDir
from embodied.run.config import load_train
from embodied.run.local import learner_gpu
from hal.gpus import LeasedGpu
from hal.pool.pool import Pool
from hal.pool.state import pool_path

GPU = f"{socket.gethostname()}/gpu"
CUDA = ["task=pointmass", "learner.device=cuda", "learner.gpu_wait_s=0.5"]


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A script in place of nvidia-smi lists two GPUs, which this machine need not have."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    rows = "0, NVIDIA H200, 10, 143771, 7, 35\\n1, NVIDIA H200, 0, 143771, 0, 33\\n"
    tool.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nprintf '{rows}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "called"


def test_each_run_on_cuda_leases_its_own_gpu_and_one_too_many_is_told(smi, tmp_path):
    config = load_train(CUDA)
    runs = [RunDir(tmp_path / name) for name in ("one", "two", "three")]
    for run in runs:
        run.acquire()
    gpus = [learner_gpu(run, config) for run in runs[:2]]
    try:
        assert sorted(gpu.environment["CUDA_VISIBLE_DEVICES"] for gpu in gpus) == ["0", "1"]
        with pytest.raises(LeaseError, match=r"gpu:0 is held by one/.*gpu:1 is held by two/"):
            learner_gpu(runs[2], config)
    finally:
        for gpu in gpus:
            gpu.close()
    assert runs[1].events()[-1]["gpu"] == gpus[1]._selector.host + "/gpu:1"
    for run in runs:
        run.release()


def test_a_run_on_the_cpu_looks_for_no_gpu(smi, tmp_path):
    assert learner_gpu(RunDir(tmp_path / "run"), load_train(["task=pointmass"])) is None
    assert not smi.exists() and not pool_path().exists()


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["learner.gpu=2 gpu"], "ask for one GPU"),
        (["run.mode=lockstep", "learner.minutes=null"], "needs learner.device=cpu"),
        (["learner.gpu_wait_s=-1"], "gpu_wait_s is -1"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(overrides, match):
    with pytest.raises(ConfigError, match=match):
        load_train([*CUDA, *overrides])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the learner must not find a GPU here")
def test_the_learners_process_is_told_its_gpu_and_the_lease_ends_with_the_run(smi, tmp_path):
    run = tmp_path / "run"
    with LeasedGpu("other/learner", f"id={GPU}:0", 5.0):
        command = [sys.executable, "-m", "embodied.cli.main", "train", *CUDA, f"run.dir={run}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 2
        said = " ".join(ended.stderr.split())
        assert "cannot use a GPU here (CUDA_VISIBLE_DEVICES=1)" in said
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        assert f"{GPU}:1" in [event.get("gpu") for event in events]
        with Pool(pool_path()) as pool:
            rows = {row.id: row.holder for row in pool.devices()}
        assert rows[f"{GPU}:0"] == "other/learner" and not rows.get(f"{GPU}:1")
