import sys

import numpy as np
import pytest

from embodied.core.episodes import Step


def _make_step(stream="r0", episode=0, index=0, **fields):
    """A step whose arrays tell where it belongs."""
    state = np.array([episode, index, sum(stream.encode())], np.float32)
    image = np.full((2, 2, 3), (episode * 31 + index) % 256, np.uint8)
    observation = {"observation.state": state, "observation.images.front": image}
    action = np.array([episode * 1000 + index, -index], np.float32)
    return Step(
        stream,
        episode,
        index,
        fields.pop("observation", observation),
        fields.pop("action", action),
        **fields,
    )


def _make_episode(stream="r0", episode=0, length=5, closed=True, **fields):
    steps = [_make_step(stream, episode, i, reward=float(i), **fields) for i in range(length)]
    return steps + [_make_step(stream, episode, length, final=True)] * closed


@pytest.fixture
def make_step():
    return _make_step


@pytest.fixture
def make_episode():
    return _make_episode


@pytest.fixture
def in_tmpfs():
    """Argument vector that runs a Python script with a tmpfs of 1 MiB of its own mounted at
    argv[1]; skips where the kernel does not allow that."""
    import subprocess

    probe = 'mount -t tmpfs -o size=1m tmpfs "$0"'
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):
        try:
            done = subprocess.run(
                [*unshare, "sh", "-c", probe, "/mnt"], capture_output=True, check=False
            )
        except FileNotFoundError:
            break
        if done.returncode == 0:
            run = f'{probe} && exec "$@"'

            def command(script, mount, *args, unshare=unshare, run=run):
                python = [sys.executable, "-c", script, str(mount), *map(str, args)]
                return [*unshare, "sh", "-c", run, str(mount), *python]

            return command
    pytest.skip("no private mount namespace here")
