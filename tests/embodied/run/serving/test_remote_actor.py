"""A training run's actor for which a policy server decides."""

import time

import pytest
from served import make_policy, publish, published

from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.rundir import RunDir
from embodied.run.actor import Actor
from embodied.run.config import load_train
from embodied.run.remote import policy
from embodied.weights.store import WeightStore


class Recorded(LocalBuffer):
    """A buffer that also keeps the policy versions of what was not an intervention."""

    def __init__(self, path):
        super().__init__(path)
        self.versions = []

    def add(self, step):
        super().add(step)
        if not step.final and not step.intervention:
            self.versions.append(step.policy_version)


class Run:
    """One actor of a run of its own, whose learner is the test."""

    def __init__(self, path, address, *overrides):
        self.run = RunDir(path)
        self.run.path.mkdir()
        self.config = load_train(
            [
                "task=pointmass",
                "demonstrations.episodes=1",
                "actors.count=1",
                "actors.rows=2",
                f"inference.remote={address}",
                *overrides,
            ]
        )
        self.sink = Recorded(self.run.buffer)
        self.actor = Actor(
            self.config,
            0,
            self.sink,
            WeightStore(self.run.weights),
            lambda result: None,
            sitting=1,
            speed=0.0,
            holder="test",
        )

    def until(self, condition):
        ends_s = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < ends_s, self.actor.fault
            self.actor.poll_weights()
            self.actor.tick()

    def close(self):
        self.actor.close()
        self.sink.close()


@pytest.fixture
def begin(tmp_path):
    made = []

    def run(*arguments):
        made.append(Run(tmp_path / "own", *arguments))
        return made[-1]

    yield run
    for run_made in made:
        run_made.close()


@pytest.fixture
def other(tmp_path):
    """A run whose newest version is 5."""
    run = published(tmp_path / "other")
    for _ in range(5):
        publish(run, make_policy())
    return run


def test_an_actor_needs_no_weights_of_its_own(start, other, begin):
    server = start(other.path)
    run = begin(server.address)
    publish(run.run, make_policy(1))
    run.until(lambda: len(run.sink.versions) >= 20)
    assert set(run.sink.versions) == {5} and run.actor.version == 5


def test_an_actor_falls_back_to_its_runs_weights_and_goes_on_taking_them(
    start, other, begin, monkeypatch
):
    monkeypatch.setattr(policy, "_ANSWER_S", 0.5)
    server = start(other.path)
    run = begin(server.address, "inference.fallback=true")
    publish(run.run, make_policy(1))
    run.until(lambda: 5 in run.sink.versions)
    server.kill()
    run.until(lambda: run.sink.versions[-1] == 1)
    publish(run.run, make_policy(2))
    run.until(lambda: run.sink.versions[-1] == 2)
    assert set(run.sink.versions) == {1, 2, 5} and run.actor.version == 2
