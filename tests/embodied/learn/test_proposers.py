"""Processes that propose beside a learner: who is served first, deaths, refusals, the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.core.errors import CorruptDataError, EmbodiedError
from embodied.learn.proposers import ROWS, Proposers
from embodied.learn.updates.proposals import ProposalCache
from embodied.weights.store import WeightStore

STATE = "observation.state"
_SERVE = """
import os, socket, sys, time
import numpy as np
from embodied.comms.channels import error_reply
from embodied.comms.pair import PairEnd
from embodied.core.errors import CorruptDataError, LinkError
from embodied.core.processes import die_with_parent
from embodied.learn.proposers import REQUESTS, Proposed

gate, parent, link = sys.argv[1:]
die_with_parent(int(parent))
end = PairEnd(socket.socket(fileno=int(link)), REQUESTS)
try:
    while True:
        request = end.receive()
        open(gate + ".asked", "a").close()
        while not os.path.exists(gate):
            time.sleep(0.01)
        state = request.arrays["observation.state"][:, 0, :1]
        if state[0, 0] == 13:
            end.send(request.id, error_reply(CorruptDataError("thirteen")), {})
            continue
        if state[0, 0] == 14:
            os._exit(9)
        count = request.header.count
        chunks = np.broadcast_to(state[:, None, None] + 1000, (len(state), count, 3, 1))
        end.send(request.id, Proposed(), {"chunks": chunks})
except LinkError:
    pass
"""

_LEARN = """
import sys, time
from pathlib import Path
import numpy as np
from embodied.learn.proposers import Proposers
from embodied.weights.store import WeightStore

store = WeightStore(Path(sys.argv[1]))
proposers = Proposers(sys.argv[2:], 1, proposals=2, seed=1, weights=store)
proposers.ask({b"1": 1}, 5, lambda keys: {"observation.state": np.ones((1, 1, 1), np.float32)})
while not proposers.pids:
    time.sleep(0.01)
print(*proposers.pids, flush=True)
time.sleep(600)
"""


@pytest.fixture
def gate(tmp_path):
    return tmp_path / "gate"


@pytest.fixture
def asked(tmp_path):
    return (tmp_path / "gate.asked").exists


@pytest.fixture
def start(tmp_path, gate):
    started = []

    def start(**options):
        command = [sys.executable, "-c", _SERVE, str(gate)]
        weights = WeightStore(tmp_path / "weights")
        started.append(Proposers(command, 1, proposals=2, seed=1, weights=weights, **options))
        return started[-1]

    yield start
    for proposers in started:
        proposers.close()


def wait_for(condition, timeout_s=120.0):
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return value


def key(value):
    return b"%d" % value


def ask(proposers, *values):
    """Each of them is the step in which there were proposals for it; returns what was let in."""
    taken = []

    def observe(keys):
        taken.extend(map(int, keys))
        return {STATE: np.array([int(k) for k in keys], np.float32)[:, None, None]}

    proposers.ask({key(v): v for v in values}, 500, observe)
    return taken


def answered(proposers, count):
    answers = []

    def enough():
        answers.extend(proposers.take())
        return sum(len(answer.keys) for answer in answers) >= count

    wait_for(enough)
    return answers


def test_the_oldest_come_first_as_far_as_there_is_room(start, gate, asked):
    proposers = start()
    assert ask(proposers, 7) == [7]
    wait_for(asked)
    room = 2 * ROWS
    assert ask(proposers, 7, *range(300, 100, -1)) == list(range(101, 101 + room))
    assert ask(proposers, 7, 101, 5) == []
    gate.touch()
    answers = answered(proposers, 1 + room)
    assert [[int(k) for k in answer.keys] for answer in answers] == [
        [7],
        list(range(101, 101 + ROWS)),
        list(range(101 + ROWS, 101 + room)),
    ]
    for answer in answers:
        values = np.array([int(k) + 1000 for k in answer.keys])
        assert set(answer.steps) == {500} and answer.chunks.shape == (len(values), 2, 3, 1)
        assert (answer.chunks == values[:, None, None, None]).all()
    assert ask(proposers, 7) == [7] and answered(proposers, 1)[0].keys == [key(7)]
    ask(proposers, 13)
    with pytest.raises(CorruptDataError, match="thirteen"):
        wait_for(proposers.take)


def test_a_killed_process_is_started_and_asked_again(start, gate, asked):
    reasons = []
    proposers = start(on_restart=reasons.append)
    ask(proposers, 1, 2)
    wait_for(asked)
    [pid] = proposers.pids
    os.kill(pid, signal.SIGKILL)
    gate.touch()
    assert answered(proposers, 2)[0].keys == [key(1), key(2)]
    assert reasons == [f"process {pid}, which proposes chunks, ended with status -9"]


@pytest.mark.slow
def test_a_process_that_keeps_dying_is_an_error(start, gate):
    gate.touch()
    proposers = start()
    ask(proposers, 14)
    with pytest.raises(EmbodiedError, match=r"ended with status 9, 4 times within a minute"):
        wait_for(proposers.take)


def test_closing_waits_for_no_answer_and_leaves_no_process(start):
    proposers = start()
    ask(proposers, 1)
    [pid] = wait_for(lambda: proposers.pids)
    started_s = time.monotonic()
    proposers.close()
    assert time.monotonic() - started_s < 5.0 and not Path(f"/proc/{pid}").exists()
    proposers.close()


@pytest.mark.slow
def test_a_killed_learner_leaves_no_process(tmp_path, gate, asked):
    """While it is at work: it looks at no link then."""
    command = [sys.executable, "-c", _SERVE, str(gate)]
    weights = str(tmp_path / "weights")
    with subprocess.Popen(
        [sys.executable, "-c", _LEARN, weights, *command], stdout=subprocess.PIPE, text=True
    ) as learner:
        assert learner.stdout is not None
        pid = learner.stdout.readline().strip()
        wait_for(asked)
        learner.kill()
        wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_weights_are_offered_once(start, tmp_path):
    proposers = start()
    for value in (1.0, 2.0):
        arrays = {"w": np.full(3, value, np.float32)}
        proposers.offer(lambda arrays=arrays: ({}, arrays), step=4)
    store = WeightStore(tmp_path / "weights")
    arrays, manifest = store.load(1)
    assert store.latest_version() == 1 and arrays["w"].tolist() == [1.0] * 3
    assert manifest.metadata == {"step": 4}


def test_old_proposals_are_used_until_new_ones_come_and_only_missing_ones_are_drawn_here(
    start, gate, asked
):
    cache, drawn = ProposalCache(3, start()), []

    def draw(observation):
        drawn.append(observation[STATE][:, 0, 0].tolist())
        return observation[STATE][:, :, None].expand(-1, 2, 3, -1)

    def found(step, *values, cache=cache):
        state = torch.tensor(values)[:, None, None]
        return cache.of({STATE: state}, step, draw)[:, 0, 0, 0].tolist()

    assert found(0, 1.0, 2.0, 1.0) == [1.0, 2.0, 1.0]
    assert found(2, 1.0) == [1.0] and not asked()
    assert found(3, 1.0, 3.0) == [1.0, 3.0]
    assert found(9, 1.0) == [1.0], "what is there is used, however old it is"
    assert drawn == [[1.0, 2.0], [3.0]]
    assert cache.metrics() == {"proposals_age": 2.0, "proposals_drawn": 3.0}
    assert cache.metrics() == {}
    gate.touch()
    wait_for(lambda: found(5, 1.0) == [1001.0])
    assert found(5, 1.0, 2.0) == [1001.0, 2.0]
    assert drawn == [[1.0, 2.0], [3.0]]
    again = ProposalCache(3)
    again.load(cache.tensors(), torch.device("cpu"))
    assert found(5, 1.0, cache=again) == [1001.0]
    assert found(6, 1.0, cache=again) == [1.0], "its age counts from when it was asked for"
