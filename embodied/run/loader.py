"""A process that makes a learner's batches; its arguments are run, step, parent, and link."""

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


def start_loader(run: RunDir, step: int, on_ring: Callable[[mmap], None]) -> LoaderClient:
    """Start the loader of a run whose learner has taken `step` gradient steps."""
    command = [sys.executable, "-m", "embodied.run.loader", str(run.path)]
    command += [str(step), str(os.getpid())]
    return LoaderClient(
        command, lambda reason: run.event("loader restarted", reason=reason), on_ring
    )


def main() -> None:
    """Serve batches over the link until the learner hangs up."""
    path, step, parent, link = sys.argv[1:]
    die_with_parent(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = RunDir(Path(path))
    config = convert(run.read_config(), TrainConfig)
    reader = build.make_reader(run, config)
    sampler = build.make_sampler(config, reader)
    rng = make_rng(config.seed, "loaded batches", int(step))
    with socket.socket(fileno=int(link)) as connection:
        Loader(reader, sampler, connection, config.learner.batch_size, rng).run(lambda: False)


if __name__ == "__main__":
    main()
