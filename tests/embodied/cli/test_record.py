"""Demonstrations and teleoperation on an agent's simulated robot, as a person would call them."""

import os
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from simhost import EMBODIED, SimulatedHost
from terminal import Terminal

from embodied.buffer.read.replay import ReplayReader
from embodied.cli.main import main
from embodied.core.frames import Frame
from embodied.run.record_session import finished
from hal.remote import RemoteDevice
from sim import family
from sim.family import SimConfig
from sim.so101.virtual import VirtualArm

TASK = "so101/reach"
BY_SCRIPT = ("record", "device=sim", f"task={TASK}", "teleoperator=scripted")


@pytest.fixture(scope="module")
def host():
    folder = Path(tempfile.mkdtemp(prefix="er-"))
    robot = "robots.sim"
    running = SimulatedHost(
        folder, f"{robot}.driver.task={TASK}", f"{robot}.safety.start_tolerance=0.02"
    )
    yield running
    running.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def by_hand(host):
    """A command on a terminal."""
    started = []

    def start(*arguments):
        host.wait("ready")
        started.append(Terminal([*EMBODIED, *arguments], env=host.env))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()
    for latch in (Path(host.env["EMBODIED_STATE"]) / "latches").glob("*.halt"):
        latch.unlink()


def episodes(path):
    reader = ReplayReader(path)
    reader.refresh()
    return reader


def held(reader, episode):
    return int(reader.take("held", episode.rows).sum())


@pytest.mark.slow
def test_a_script_demonstrates_and_a_killed_recorder_loses_no_finished_episode(host, tmp_path):
    first = host.start(*BY_SCRIPT, "episodes=50", f"output={tmp_path}")
    line = first.stdout.readline()
    assert ": success" in line, line
    time.sleep(0.3)
    first.kill()
    first.communicate()
    before = episodes(tmp_path)
    assert 1 <= before.num_closed < before.num_episodes <= 3
    wanted = before.num_closed + 1
    options = (f"episodes={wanted}", "count=successful")
    said = host.run(*BY_SCRIPT, *options, f"output={tmp_path}")
    assert said.count(": success") == 1 and f"{wanted} of {wanted} successful" in said, said
    after = episodes(tmp_path)
    closed = after.closed_episodes()
    assert len(closed) == wanted and not after.damaged
    assert [e.seed for e in closed[:-1]] == [e.seed for e in before.closed_episodes()]
    assert len({e.seed for e in closed}) == wanted and finished(tmp_path, TASK) == [True] * wanted
    assert finished(tmp_path, "other") == []
    for episode in closed:
        assert (episode.stream, episode.task) == (f"{TASK}.sim", TASK) and episode.success
        assert episode.interventions == len(episode.rows), "held ticks are the person's as well"
        assert held(after, episode) < len(episode.rows) / 2
        state = after.take("observation.state", episode.rows)
        action = after.take("action", episode.rows)
        driven = ~after.take("held", episode.rows)
        assert np.abs(action - state)[driven].max() < 0.3, "actions are what was executed"
    assert host.robot.holder == "", "the lease is given back"


@pytest.mark.slow
def test_a_robot_lost_in_the_middle_is_waited_for(host, tmp_path):
    host.wait("ready")
    lost = host.servo_pid()
    recording = host.start(*BY_SCRIPT, "episodes=2", f"output={tmp_path}")
    line = recording.stdout.readline()
    assert ": success" in line, line + recording.stdout.read()
    time.sleep(0.3)
    os.kill(lost, signal.SIGKILL)
    said, _ = recording.communicate(timeout=120)
    assert recording.returncode == 0 and "2 of 2" in said, said
    reader = episodes(tmp_path)
    assert reader.num_closed == 2 and host.servo_pid() != lost
    assert reader.num_episodes == 3, "the episode in which it was lost stays open"


def test_a_person_records_anew_judges_and_stops(host, by_hand, tmp_path):
    terminal = by_hand(
        "record",
        "device=sim",
        "robot_task=pick_place",
        "robot_task.reset={name: person, text: Ready?}",
        "episodes=5",
        f"output={tmp_path}",
    )
    terminal.wait("Ready?")
    terminal.keys("\n")
    terminal.hold("q", 0.4)
    terminal.keys("u")
    terminal.until(lambda: terminal.output.count("Ready?") == 2, "second try")
    terminal.keys("\n")
    terminal.hold("q", 0.4)
    terminal.keys("\n")
    terminal.until(lambda: terminal.output.count("Ready?") == 3, "second episode")
    terminal.keys("\n")
    terminal.hold("a", 0.4)
    terminal.keys("x")
    terminal.until(lambda: terminal.output.count("Ready?") == 4, "third episode")
    terminal.keys("\x1b")
    assert terminal.end() == 0 and terminal.restored
    assert "2 of 5 finished episodes of pick-place" in terminal.output
    reader = episodes(tmp_path)
    assert [(e.closed, e.success) for e in reader.episodes] == [
        (False, False),
        (True, True),
        (True, False),
    ]
    up, down = (reader.take("observation.state", e.rows)[:, 0] for e in reader.closed_episodes())
    assert up[-1] > up[0] + 0.1 and down[-1] < down[0] - 0.1
    assert all(e.interventions > 5 for e in reader.episodes)


def test_a_persons_key_takes_the_place_of_the_tasks_own_judgement(host, by_hand, tmp_path):
    terminal = by_hand(
        *("record", "device=sim", f"task={TASK}", "reward=success_key", "teleoperator=keyboard"),
        *("episodes=2", f"output={tmp_path}"),
    )
    for done, (key, said) in enumerate((("\n", ": success"), ("x", ": no success"))):
        running = re.compile(rf"{done}/2 let go · \d\.[1-9] s")
        terminal.until(lambda running=running: running.search(terminal.output), "a running episode")
        terminal.hold("q", 0.4)
        terminal.keys(key)
        terminal.wait(said)
    assert terminal.end() == 0 and terminal.restored
    reader = episodes(tmp_path)
    assert [(e.closed, e.success) for e in reader.episodes] == [(True, True), (True, False)]
    for episode in reader.episodes:
        ended = reader.take("terminated", episode.rows)
        assert ended[-1] and not ended[:-1].any(), "neither is where the task ends"
        assert reader.take("reward", episode.rows).sum() == episode.success


@pytest.mark.slow
def test_a_rule_judges_a_leased_robot(host, tmp_path):
    host.wait("ready")
    success = "{key: observation.state, index: 0, low: 0.2}"
    said = host.run(
        *BY_SCRIPT,
        *("reward=rule", f"reward.success=[{success}]", "reward.held_ticks=5"),
        *("episodes=1", f"output={tmp_path}"),
    )
    assert ": success" in said, said
    reader = episodes(tmp_path)
    (episode,) = reader.closed_episodes()
    base = reader.take("observation.state", np.append(episode.rows, episode.final_row))[:, 0]
    assert (base[-5:] >= 0.2).all() and base[-6] < 0.2, "held for five ticks, then at once"


@pytest.mark.slow
def test_a_classifier_judges_a_leased_robot(host, tmp_path):
    """Learned from the simulator's episodes, of which it takes those with a short horizon for
    failures; its success is the real one, or nearly."""
    seen, success, output = (tmp_path / name for name in ("seen", "success", "judged"))
    for wanted, horizon in ((16, "null"), (1, "25")):
        options = (f"demonstrations.episodes={wanted}", f"sim.horizon={horizon}", "rows=2")
        main(["collect", f"task={TASK}", *options, f"output={seen}"])
    learned = (f"buffer={seen}", f"output={success}", "positives=3", "patience=2", "steps=400")
    assert main(["reward", "train", *learned, "observations=[observation.state]"]) == 0
    host.wait("ready")
    said = host.run(
        *BY_SCRIPT,
        *("reward=classifier", f"reward.path={success}", "episodes=2", f"output={output}"),
    )
    assert said.count(": success") == 2, said
    reader = episodes(output)
    reach = family.find(TASK)[0].make_task("reach", SimConfig()).reward
    for episode in reader.closed_episodes():
        pose = reader.take("observation.state", np.array([episode.final_row]))[0]
        assert reach.distance_m(Frame(0, {"observation.state": pose}, {})) < 0.06


def test_space_halts_the_robot_until_a_person_clears_it(host, by_hand, monkeypatch):
    terminal = by_hand("teleop", "device=sim")
    terminal.wait("is leased")
    terminal.hold("w", 0.3)
    terminal.keys(" ")
    terminal.wait("`embodied estop --clear sim`")
    terminal.until(lambda: host.robot.health == "halted", "halt in the pool")
    assert not host.robot.holder
    monkeypatch.setenv("EMBODIED_STATE", host.env["EMBODIED_STATE"])
    assert main(["estop", "--clear", "sim"]) == 0
    terminal.wait("let go")
    terminal.until(lambda: host.robot.holder.startswith("teleop by"), "new lease")
    terminal.keys("\x1b")
    assert terminal.end() == 0 and terminal.restored


def test_keys_move_the_robot_and_nothing_else_does(host, by_hand):
    terminal = by_hand("teleop", "device=sim")
    terminal.wait("is leased")
    assert not terminal.cooked and host.robot.holder.startswith("teleop by")
    with RemoteDevice(host.robot.address) as robot:
        start = robot.latest().observation["observation.state"].copy()
        terminal.hold("q", 0.8)
        time.sleep(0.6)
        robot.advance(robot.tick + 60)
        end = robot.latest().observation["observation.state"]
    moved = end - start
    assert moved[0] > 0.3 and np.abs(moved[1:]).max() < 0.05
    terminal.keys("\x03")
    assert terminal.end() == 130 and terminal.restored
    assert host.robot.holder == "", "Ctrl-C gives robot and terminal back"


@pytest.mark.slow
def test_a_leader_arm_far_away_is_met_smoothly(host, by_hand, tmp_path):
    pose = np.array([0.0, -0.5, 0.4, 0.3, 0.4, 0.6])
    with RemoteDevice(host.robot.address) as robot:
        rest = robot.latest().observation["observation.state"]
    pose[0] = rest[0] - np.copysign(0.8, rest[0])  # far from wherever the tests before left it
    with VirtualArm(tmp_path, seed=4, leader=True) as leader:
        leader.write_calibration(tmp_path / "leader.json")
        leader.lead(pose)
        options = (f"port={leader.port}", f"calibration={tmp_path}/leader.json", "answer_ms=20.0")
        terminal = by_hand(
            "teleop",
            "device=sim",
            "align_speed=0.8",
            "teleoperator=so101_leader",
            *(f"++teleoperator.{option}" for option in options),
        )
        terminal.wait("is leased")
        with RemoteDevice(host.robot.address) as robot:
            first = robot.tick
            robot.advance(first + 130)
            frames = robot.frames(first)
        terminal.keys("\x1b")
        assert terminal.end() == 0 and "rejected: start" not in terminal.output
    at = np.array([frame.observation["observation.state"] for frame in frames])
    assert at[-1] == pytest.approx(pose, abs=0.05)
    assert np.abs(np.diff(at, axis=0)).max() * 50 < 2.5
    assert sum(frame.held for frame in frames[60:-1]) < 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["record", "device=sim", f"task={TASK}"], "not a terminal"),
        (["record", "device=sim"], "name one task"),
        (["record", "device=sim", "task=x", "robot_task=pick_place"], "name one task"),
        (["record", f"task={TASK}"], "device"),
        (["record", "device=2 arm", f"task={TASK}"], "ask for one device"),
        ([*BY_SCRIPT, "wait_s=0"], "no devices for 'sim'"),
        (["record", "device=sim", "teleoperator=nobody", f"task={TASK}"], "somebody has to act"),
        ([*BY_SCRIPT, "checkpoint=nowhere"], "neither a policy folder nor a run"),
        ([*BY_SCRIPT, "episodes=0"], "at least 1"),
        ([*BY_SCRIPT, "count=all"], "count"),
        (["teleop", "device=sim", "teleoperator=joystick"], "Known: gamepad"),
        (["teleop", "device=sim", "teleoperator=gamepad"], "there is none"),
        (["teleop", "device=sim", "align_speed=0", "teleoperator=gamepad"], "align_speed"),
    ],
)
def test_wrong_input_ends_in_one_paragraph(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert words in message and "Traceback" not in message
