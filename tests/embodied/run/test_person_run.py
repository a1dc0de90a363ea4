"""A person beside a training run's leased robot: takes over, says again, halts, stops the run."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from simhost import EMBODIED, SimulatedHost
from terminal import Terminal

from embodied.buffer.read.replay import ReplayReader
from embodied.core.config import convert
from embodied.core.rundir import RunDir
from embodied.run import build
from embodied.run.config import TrainConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DEMONSTRATIONS = 2
TRAIN = (
    "train",
    "task=pointmass",
    "actors.devices='id=sim'",
    "actors.count=1",
    f"demonstrations.episodes={DEMONSTRATIONS}",
    "policy.n_obs_steps=1",
    "policy.horizon=8",
    "policy.n_action_steps=4",
    "+policy.network.width=32",
    "+policy.network.depth=1",
    "learner.batch_size=32",
    "learner.steps=1000000",
    "learner.publish_every=50",
    "learner.warmup_steps=10",
    "learner.samples_per_insert=32",
    "evaluation.episodes=0",
    "evaluation.final_episodes=0",
)
FIRST_READ = 12
PERSON = f"""
import json, os
from pathlib import Path
from sim.driver import ScriptedTeleoperator

class Person(ScriptedTeleoperator):
    # Leaves demonstrations alone; later drives to the goal after some ticks; writes down what it
    # did. Signals what a file says.

    episode = -1

    def begin(self, spec):
        super().begin(spec)
        self.episode, self.reads = self.episode + 1, 0

    def read(self, observation):
        self.engaged = self.episode >= {DEMONSTRATIONS} and self.reads >= {FIRST_READ}
        self.reads += 1
        wanted = super().read(observation)
        if wanted is not None:
            # Digits of its own: no policy says exactly this.
            wanted = (0.9 * wanted + 0.0001 * self.reads).clip(-1, 1).astype("float32")
            with open(os.environ["PERSON_LOG"], "a") as log:
                log.write(json.dumps(wanted.tolist()) + "\\n")
        return wanted

    def events(self):
        said = Path(os.environ["PERSON_SAYS"])
        if self.reads < 5 or not said.exists():
            return []
        words = said.read_text().split()
        said.unlink()
        return words
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
    monkeypatch.setenv("PERSON_SAYS", str(tmp_path / "says"))
    return tmp_path


@pytest.fixture
def host(person):
    folder = Path(tempfile.mkdtemp(prefix="ep-"))
    running = SimulatedHost(folder, "robots.sim.driver.task=pointmass")
    yield running
    running.close()
    shutil.rmtree(folder, ignore_errors=True)


def rows(file):
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line[-1:] in "}]"]


def until(true, timeout_s, said):
    deadline_s = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline_s, said()
        time.sleep(0.05)
    return found


def drawn(run, algorithm, batch_size=256):
    """Actions [N, D] that are labels in a batch of this algorithm's own source of the run."""
    config = convert(RunDir(run).read_config(), TrainConfig)
    config = msgspec.structs.replace(config, algorithm={"name": algorithm})
    reader = build.make_reader(RunDir(run), config)
    reader.refresh()
    sampler = build.make_sampling(config, reader).sampler
    batch = sampler.sample(batch_size, np.random.default_rng(0))
    return batch["action"][~batch["action_is_pad"].astype(bool)]


def test_what_a_person_does_is_learned_and_what_they_say_is_done(host, person):
    run = person / "run"
    log = (person / "train.log").open("w+")
    command = [*EMBODIED, *TRAIN, "algorithm=hg_dagger", f"run.dir={run}"]
    command += ["actors.teleoperator=scripted", "actors.teleoperator.name=person"]
    train = subprocess.Popen(
        command, env=host.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )

    def said():
        log.flush()
        return (person / "train.log").read_text() + "".join(
            file.read_text()[-1500:] for file in (run / "logs").glob("*.log")
        )

    def episodes():
        assert train.poll() is None, said()
        return len(rows(run / "metrics" / "actor0.jsonl"))

    def say(word):
        (person / "says").write_text(word)
        until(lambda: not (person / "says").exists(), 30, said)

    try:
        until(lambda: episodes() >= DEMONSTRATIONS + 4, 90, said)
        say("rerecord")
        before = episodes()
        until(lambda: episodes() >= before + 1, 30, said)
        say("estop")
        latches = Path(host.env["EMBODIED_STATE"]) / "latches"
        assert until(lambda: list(latches.glob("*.halt")), 5, said)
        time.sleep(1.5)
        before = episodes()
        time.sleep(1.5)
        assert episodes() == before and not host.robot.holder, "it stays until a person clears it"
        host.run("estop", "--clear", "sim")
        until(lambda: episodes() >= before + 1, 60, said)
        say("stop")
        assert train.wait(60) == 130, said()
    finally:
        train.kill()
        train.wait()
        log.close()
    events = [row["event"] for row in rows(run / "events.jsonl")]
    assert "stopped by the person" in events and events.count("run interrupted") == 1
    assert host.robot.holder == "", "the robot is given back"

    reader = ReplayReader(run / "buffer")
    reader.refresh()
    closed = reader.closed_episodes()
    assert len(closed) < reader.num_episodes, "what is done again or halted stays open"
    by_person = {np.float32(action).tobytes() for action in rows(person / "person.jsonl")}
    for number, episode in enumerate(closed):
        column = {
            name: reader.take(name, episode.rows)
            for name in ("action", "intervention", "held", "policy_version")
        }
        flagged, driven = column["intervention"].astype(bool), ~column["held"].astype(bool)
        persons = np.array([action.tobytes() in by_person for action in column["action"]])
        if number < DEMONSTRATIONS:
            assert flagged.all() and not persons.any()
            continue
        np.testing.assert_array_equal(flagged[driven], persons[driven])
        assert (column["policy_version"][~flagged & driven] >= 0).all()
        assert not flagged[:FIRST_READ].any(), "the policy acts until the person takes over"
    assert sum(episode.interventions for episode in closed[DEMONSTRATIONS:]) > 0
    for algorithm in ("hg_dagger", "dagger", "filtered_bc"):
        labels = drawn(run, algorithm)
        share = np.mean([label.tobytes() in by_person for label in labels])
        assert share > 0.1, (algorithm, share)


def test_the_keyboard_of_the_terminal_takes_over_and_stops(host, person):
    run = person / "run"
    command = [*EMBODIED, *TRAIN, "algorithm=hg_dagger", f"run.dir={run}"]
    with Terminal([*command, "actors.teleoperator=keyboard"], env=host.env) as terminal:
        terminal.wait("Tab take over", 30)
        metrics = run / "metrics" / "actor0.jsonl"
        until(lambda: len(rows(metrics)) > DEMONSTRATIONS, 90, lambda: terminal.output[-2000:])
        assert not any(row["interventions"] for row in rows(metrics)[DEMONSTRATIONS:])
        terminal.keys("\t")
        terminal.wait("moving", 20)
        terminal.hold("q", 1.0)
        until(
            lambda: any(row["interventions"] for row in rows(metrics)[DEMONSTRATIONS:]),
            30,
            lambda: terminal.output[-2000:],
        )
        assert not terminal.cooked
        terminal.keys("\x1b")
        assert terminal.end(60) == 130, terminal.output[-2000:]
        assert "Interrupted" in terminal.output and terminal.restored


def test_a_persons_key_takes_the_place_of_the_tasks_own_judgement(host, person):
    run = person / "run"
    metrics = run / "metrics" / "actor0.jsonl"
    command = [*EMBODIED, *TRAIN, "algorithm=hg_dagger", f"run.dir={run}", "reward=success_key"]
    with Terminal([*command, "actors.teleoperator=keyboard"], env=host.env) as terminal:
        terminal.wait("Tab take over", 60)

        def judged(key, count):
            """Press until so many episodes have ended; keys between two say nothing."""

            def ended():
                terminal.keys(key)
                time.sleep(0.3)
                return len(rows(metrics)) >= count

            until(ended, 150, lambda: terminal.output[-2000:])

        judged("\n", DEMONSTRATIONS)
        until(lambda: rows(run / "metrics" / "learner.jsonl"), 150, lambda: terminal.output[-2000:])
        judged("x", len(rows(metrics)) + 2)
        judged("\n", len(rows(metrics)) + 2)
        terminal.keys("\x1b")
        assert terminal.end(60) == 130, terminal.output[-2000:]
    said = rows(metrics)
    assert all(row["success"] and row["demonstration"] for row in said[:DEMONSTRATIONS])
    acted = [row["success"] for row in said if not row["demonstration"]]
    assert acted[-1] and False in acted, "whatever the task itself would have said"
    reader = ReplayReader(run / "buffer")
    reader.refresh()
    for episode in reader.closed_episodes():
        ended = reader.take("terminated", episode.rows)
        assert not ended[:-1].any() and reader.take("reward", episode.rows).sum() == episode.success
        assert ended[-1] or not episode.success


def test_without_a_terminal_the_keyboard_is_refused(host, person):
    run = person / "run"
    said = host.start(
        *TRAIN, "algorithm=hg_dagger", f"run.dir={run}", "actors.teleoperator=keyboard"
    )
    text, _ = said.communicate(timeout=60)
    assert said.returncode != 0 and "standard input is not a terminal" in " ".join(text.split())
