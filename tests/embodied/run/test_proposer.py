"""The process that proposes beside a learner: by which weights, and in a run of processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.buffer.sample.statistics import FeatureStats
from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from embodied.core.seeds import derive_seed
from embodied.run import build
from embodied.run.config import load_train
from embodied.run.proposer import OFFERED, start_proposers
from embodied.weights.store import WeightStore
from policies.checkpoint import policy_state

SMALL = [
    *("task=pointmass", "algorithm=parl", "sim.horizon=60", "actors.count=1", "actors.speed=2"),
    *("demonstrations.episodes=4", "policy.n_obs_steps=1", "policy.horizon=8"),
    *("policy.n_action_steps=4", "policy.num_steps=2", "+policy.network.width=32"),
    *("+policy.network.depth=1", "buffer.segment_mib=1", "algorithm.cloning_steps=40"),
    *("algorithm.offline_steps=100", "algorithm.critic.width=32", "algorithm.critic.members=2"),
    *("algorithm.proposers=1", "algorithm.proposals_age=10", "learner.batch_size=16"),
    *("learner.publish_every=20", "learner.checkpoint_every=40", "evaluation.episodes=0"),
    *("evaluation.final_episodes=2", "evaluation.rows=2", "evaluation.videos=0"),
]
KEY = b"an observation"


def statistics(size):
    one, zero = [1.0] * size, [0.0] * size
    low = [-1.0] * size
    return FeatureStats(mean=zero, std=one, min=low, max=one, q01=low, q99=one, count=10)


@pytest.fixture
def config():
    return load_train(SMALL)


@pytest.fixture
def make_policy(config):
    """An improved policy with random weights of this seed, without training."""
    form, spec = build.policy_format(config), build.policy_spec(config)
    sizes = {**{k: a.size for k, a in spec.observation.items()}, "action": spec.action.size}

    def make(seed):
        policy = form.make({key: statistics(sizes[key]) for key in form.statistics})
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.policy.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
        return policy.eval()

    return make


def answer(proposers, observation, step):
    rows = {key: value[None] for key, value in observation.items()}
    proposers.ask({KEY: 0}, step, lambda keys: rows)
    deadline_s = time.monotonic() + 240
    while not (answers := proposers.take()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return answers[0].chunks[0]


@pytest.mark.slow
def test_it_proposes_what_the_newest_weights_would(tmp_path, config, make_policy):
    run = RunDir(tmp_path / "run")
    first, second, third = map(make_policy, (1, 2, 3))
    rng, spec = np.random.default_rng(0), first.policy.spec
    observation = {
        key: rng.uniform(-1, 1, (spec.n_obs_steps, *array.shape)).astype(np.float32)
        for key, array in spec.observation.items()
    }

    def drawn(policy, step, number):
        seed = derive_seed(derive_seed(config.seed, "proposers"), step, number)
        obs = {key: torch.from_numpy(value[None]) for key, value in observation.items()}
        return policy.policy.sample(obs, 8, seed=seed)[0].numpy()

    published = WeightStore(run.weights)
    proposers = start_proposers(run, config)
    try:
        proposers.offer(lambda: policy_state(first), step=40)
        np.testing.assert_array_equal(answer(proposers, observation, 45), drawn(first, 45, 1))
        config_2, arrays_2 = policy_state(second)
        published.publish(arrays_2, config_2, {"step": 100})
        np.testing.assert_array_equal(answer(proposers, observation, 102), drawn(second, 102, 2))
        config_3, arrays_3 = policy_state(third)
        WeightStore(run.path / OFFERED).publish(arrays_3, config_3, {"step": 90})
        np.testing.assert_array_equal(answer(proposers, observation, 103), drawn(second, 103, 3))
        assert not (drawn(first, 103, 3) == drawn(second, 103, 3)).all()
    finally:
        proposers.close()


def processes(run):
    """Of this run, by what each was started as."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(word.startswith(str(run.path)) for word in words) and "-m" in words:
            found[int(folder.name)] = words[words.index("-m") + 1]
    return found


def proposer_of(run, but=()):
    names = processes(run)
    return next((p for p, n in names.items() if n == "embodied.run.proposer" and p not in but), 0)


def wait_for(condition, process, timeout_s=280.0):
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return value


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_outlives_its_proposer_and_leaves_none(tmp_path):
    run = RunDir(tmp_path / "run")
    command = [sys.executable, "-m", "embodied.cli.main", "train", *SMALL, f"run.dir={run.path}"]
    process = subprocess.Popen(
        [*command, "learner.steps=200"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def reached(step):
        rows = run.read("metrics", "learner")
        return bool(rows) and rows[-1]["step"] >= step

    try:
        wait_for(lambda: reached(100), process)
        first = proposer_of(run)
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: proposer_of(run, but=[first]), process)
        output, _ = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert not processes(run)
    reasons = [e["reason"] for e in run.events() if e["event"] == "proposer restarted"]
    assert reasons == [f"process {first}, which proposes chunks, ended with status -9"]
    last = run.read("metrics", "learner")[-1]
    assert last["step"] == 200 and last["proposals_age"] > 0 and last["proposals_drawn"] < 32


@pytest.mark.parametrize(
    "change, words",
    [
        ("run.mode=lockstep", r"set algorithm\.proposers=0"),
        ("algorithm.proposals_age=0", r"algorithm\.proposals_age, and 0 keeps nothing"),
        ("algorithm.proposers=-1", r"algorithm\.proposers"),
    ],
)
def test_proposers_that_cannot_be_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        load_train([*SMALL, change])
