"""A person takes over from a policy in the middle of recorded episodes, by the command line."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from simhost import EMBODIED, SimulatedHost

from embodied.buffer.read.replay import ReplayReader
from embodied.weights.store import WeightStore

SMALL = (
    "task=pointmass",
    "actors.speed=10",
    "demonstrations.episodes=4",
    "policy.n_obs_steps=1",
    "policy.horizon=8",
    "policy.n_action_steps=4",
    "+policy.network.width=32",
    "+policy.network.depth=1",
    "learner.batch_size=32",
    "learner.steps=100",
    "learner.publish_every=50",
    "learner.warmup_steps=10",
    "evaluation.episodes=1",
    "evaluation.final_episodes=1",
    "evaluation.rows=1",
    "evaluation.videos=0",
)
COLUMNS = ("intervention", "policy_version", "held", "action", "observation.state")
TAKE_OVERS = ((8, 18), (30, 38))
PERSON = f"""
import json, os
from sim.driver import ScriptedTeleoperator

class Person(ScriptedTeleoperator):
    # Drives away from the goal in some ticks of an episode, and writes down what it did.

    episode = -1

    def begin(self, spec):
        super().begin(spec)
        self.episode, self.reads = self.episode + 1, 0

    def read(self, observation):
        self.engaged = any(a <= self.reads < b for a, b in {TAKE_OVERS})
        self.reads += 1
        wanted = super().read(observation)
        if wanted is not None:
            # Three digits of its own: no policy says exactly this.
            wanted = (-0.9 * wanted + 0.001 * self.reads).clip(-1, 1).astype("float32")
        with open(os.environ["PERSON_LOG"], "a") as log:
            state = observation["observation.state"].tolist()
            action = None if wanted is None else wanted.tolist()
            log.write(json.dumps([self.episode, state, action]) + "\\n")
        return wanted
"""


@pytest.fixture
def person(tmp_path, monkeypatch):
    """A teleoperator of a third party, registered as such by its package's entry point."""
    site = tmp_path / "site"
    package = site / "person-1.0.dist-info"
    package.mkdir(parents=True)
    (site / "person.py").write_text(PERSON)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: person\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[embodied.teleoperators]\nperson = person:Person\n")
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    monkeypatch.setenv("PERSON_LOG", str(tmp_path / "person.jsonl"))
    return tmp_path / "person.jsonl"


@pytest.fixture
def host(person):
    folder = Path(tempfile.mkdtemp(prefix="et-"))
    running = SimulatedHost(folder, "robots.sim.driver.task=pointmass")
    yield running
    running.close()
    shutil.rmtree(folder, ignore_errors=True)


def blocks(flags):
    """First and last index of each run of true ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    return [(int(a), int(b) - 1) for a, b in edges.reshape(-1, 2)]


@pytest.mark.slow
def test_steps_are_the_persons_where_it_drove_and_the_policys_elsewhere(host, person, tmp_path):
    run = tmp_path / "run"
    trained = subprocess.run(
        [*EMBODIED, "train", *SMALL, f"run.dir={run}"], capture_output=True, text=True, check=False
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    version = WeightStore(run / "weights").latest_version()
    assert version is not None and version >= 0
    said = host.run(
        "record",
        "device=sim",
        "task=pointmass",
        "teleoperator=scripted",
        "teleoperator.name=person",
        f"checkpoint={run}",
        "episodes=3",
        f"output={tmp_path / 'recorded'}",
    )
    assert "3 of 3 finished" in said, said
    read = [json.loads(line) for line in person.read_text().splitlines()]
    reader = ReplayReader(tmp_path / "recorded")
    reader.refresh()
    episodes = reader.closed_episodes()
    assert len(episodes) == 3
    taken_over = 0
    numbers = sorted({n for n, _, _ in read})
    for number, episode in zip(numbers, episodes, strict=True):
        rows = episode.rows
        column = {name: reader.take(name, rows) for name in COLUMNS}
        driven = {np.float32(action).tobytes() for n, _, action in read if n == number and action}
        by_person = np.array([action.tobytes() in driven for action in column["action"]])
        flagged, held = column["intervention"].astype(bool), column["held"].astype(bool)
        np.testing.assert_array_equal(flagged[~held], by_person[~held])
        for k in np.flatnonzero(held):
            assert k == 0 or flagged[k] == flagged[k - 1], "a held tick is of who drove last"
        np.testing.assert_array_equal(column["policy_version"], np.where(flagged, -1, version))
        assert episode.interventions == flagged.sum()
        first = next((state for n, state, action in read if n == number and action), None)
        if first is not None:
            states = column["observation.state"]
            [begun] = np.flatnonzero((states == np.float32(first)).all(axis=1))[-1:]
            assert not flagged[:begun].any(), "nobody but the policy drove until then"
            taken_over += len(blocks(flagged))
        assert not flagged[:5].any() and (~held[:5]).any(), "the policy begins"
    assert taken_over >= 2, "the person drove, at least twice"
