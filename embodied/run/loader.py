"""A process that makes a learner's batches; its arguments are run, start, parent, and link.

start: the how manieth learner of the run it is for, so that none draws what another did.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from mmap import mmap
from pathlib import Path

from embodied.buffer.load.loader import Loader, LoaderClient
from embodied.core.config import convert
from embodied.core.processes import die_with_parent
from embodied.core.rundir import RunDir
from embodied.core.seeds import make_rng
from embodied.run import build
from embodied.run.config import TrainConfig


class RunLoader:
    """Starts the loader of a run's learner. If the run continues, its data are there: the loader is
    started at once then, while the learner imports what it needs."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._early = self._start() if any(run.checkpoints.glob("*.safetensors")) else None

    def __call__(self, on_ring: Callable[[mmap], None]) -> LoaderClient:
        """The loader, for one learner. on_ring: see LoaderClient."""
        client, self._early = self._early or self._start(), None
        client.on_ring(on_ring)
        return client

    def close(self) -> None:
        """End a loader that nobody has asked for."""
        if self._early is not None:
            self._early.close()

    def _start(self) -> LoaderClient:
        run = self._run
        starts = sum(
            event["event"] == "role started" and event["role"] == "learner"
            for event in run.events()
        )
        command = [sys.executable, "-m", "embodied.run.loader", str(run.path)]
        command += [str(starts), str(os.getpid())]
        return LoaderClient(command, lambda reason: run.event("loader restarted", reason=reason))


def main() -> None:
    """Serve batches over the link until the learner hangs up."""
    path, start, parent, link = sys.argv[1:]
    die_with_parent(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = RunDir(Path(path))
    config = convert(run.read_config(), TrainConfig)
    reader = build.make_reader(run, config)
    sampler = build.make_sampling(config, reader).sampler
    rng = make_rng(config.seed, "loaded batches", int(start))
    with socket.socket(fileno=int(link)) as connection:
        Loader(reader, sampler, connection, config.learner.batch_size, rng).run(lambda: False)


if __name__ == "__main__":
    main()
