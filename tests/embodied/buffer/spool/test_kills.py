"""Promise 1 along the whole way: spool's writer, uploader, gateway and learner's buffer are killed
at any instant; what the actor recorded is in the learner's log once, in order."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import spool_process
from spooling import STREAM, make_step, payloads_in

from embodied.buffer.log.segments import list_segments
from embodied.buffer.serve.client import BufferClient

ROLES = ("spool", "learner", "gateway", "uploader")
LENGTH = 24


class Processes:
    """All four; kill() takes one at random and starts it again at once."""

    def __init__(self, folder, seed):
        self._rng = random.Random(seed)
        self._parent = subprocess.Popen(
            [sys.executable, spool_process.__file__, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.killed = dict.fromkeys(ROLES, -1)
        for role in ROLES:
            self._start(role)

    def _start(self, role):
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(f"{role}\n".encode())
        self._parent.stdin.flush()
        assert int(self._parent.stdout.readline()) > 0
        self.killed[role] += 1

    def kill(self):
        self._start(self._rng.choice(ROLES))

    def close(self):
        self._parent.kill()
        self._parent.wait(20)
        for pipe in (self._parent.stdin, self._parent.stdout):
            assert pipe is not None
            pipe.close()


def suffer(folder, kills, seed):
    """Record while processes are killed; returns the keys of all steps, in order."""
    processes, rng = Processes(folder, seed), random.Random(seed + 1)
    keys, learner = [], folder / "learner"
    try:
        with BufferClient(
            f"ipc://{folder}/s", STREAM, batch_steps=16, resend_s=0.3, block_s=30
        ) as actor:
            episode, index = 0, 0
            for _ in range(kills):
                until_s = time.monotonic() + rng.uniform(0.02, 0.3)
                while time.monotonic() < until_s:
                    step = make_step(episode, index, LENGTH, numbers=30)
                    actor.add(step)
                    keys.append(step.key)
                    episode, index = (episode, index + 1) if not step.final else (episode + 1, 0)
                    time.sleep(0.003)
                processes.kill()
            actor.flush(30)
        assert sum(processes.killed.values()) == kills
        deadline_s = time.monotonic() + 60
        while len(payloads_in_live(learner)) < len(keys):
            assert time.monotonic() < deadline_s, (len(keys), processes.killed)
            time.sleep(0.1)
    finally:
        processes.close()
    return keys


def payloads_in_live(path):
    return payloads_in(path) if path.exists() else {}


def check(folder, keys):
    found = payloads_in(folder / "learner")
    assert sorted(found) == sorted(keys)
    assert all(len(copies) == 1 for copies in found.values())
    by_episode: dict[int, list[int]] = {}
    for _, episode, index in found:
        by_episode.setdefault(episode, []).append(index)
    assert all(indices == sorted(indices) for indices in by_episode.values())


@pytest.mark.alone
def test_ten_kills(tmp_path):
    keys = suffer(tmp_path, 10, seed=1)
    check(tmp_path, keys)


@pytest.mark.slow
@pytest.mark.alone
def test_a_hundred_kills(tmp_path):
    keys = suffer(tmp_path, 100, seed=2)
    check(tmp_path, keys)
    # Acknowledged segments were deleted meanwhile, so the spool stayed small.
    spool: Path = tmp_path / "spool"
    assert min(list_segments(spool)) > 1
