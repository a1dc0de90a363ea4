"""A run's gateway and robot hosts in this process, with real links between them."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from embodied.core.config import compose, convert
from embodied.core.rundir import RunDir
from embodied.run.config import load_train
from embodied.run.site.config import Site, SiteConfig
from embodied.run.site.gateway import Gateway
from embodied.run.site.hostlink import HostLink
from embodied.run.site.status import write_status
from embodied.weights.store import WeightStore

RUN = "run-1"


@contextlib.contextmanager
def run_gateway(folder: Path, identity: Path | None = None, run: str = RUN) -> Iterator[Gateway]:
    """The gateway of a run under `folder`, on any loopback port; its site's sockets lie there."""
    directory = RunDir(folder / run)
    directory.path.mkdir(exist_ok=True)
    options = ["task=pointmass", "gateway.listen=127.0.0.1:0"]
    if identity is not None:
        options.append(f"gateway.identity={identity}")
    gateway = Gateway(directory, load_train(options), str(folder))
    try:
        yield gateway
    finally:
        gateway.close()


class Learner:
    """A run whose gateway serves; whoever uses it is its learner."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDir(folder / "run")
        self.run.acquire()
        self.sockets = str(folder)
        self.store = WeightStore(self.run.weights)
        self.address = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        overrides = ["task=pointmass", f"gateway.listen={self.address}"]
        config = load_train(overrides)
        self.run.write_config(config)
        self.gateway = Gateway(self.run, config, self.sockets)
        self.address = self.gateway.address

    def publish(self, value: float, *, final: bool = False) -> int:
        arrays = {"w": np.full(2000, value, np.float32)}
        metadata = {"sitting": self.run.sitting(), "final": final}
        return self.store.publish(arrays, {"name": "flow"}, metadata).version

    def look(self):
        status = self.gateway.look()
        write_status(self.run.path, status)
        return status

    def close(self) -> None:
        self.gateway.close()
        self.run.release()


class Robots:
    """A host's link role, and the file in which its actors write how episodes ended."""

    def __init__(self, folder: Path, name: str, learner: Learner, *overrides, address=None) -> None:
        self.run = RunDir(folder / name)
        self.run.acquire()
        self.name = name
        options = [f"gateway={address or learner.address}", f"name={name}", *overrides]
        config = convert(compose("site", options), SiteConfig)
        self.site = Site(name, learner.run.path.name, learner.run.id(), config)
        self.sockets = str(folder)
        self.start()

    def start(self) -> None:
        self.link = HostLink(self.run, self.site, self.sockets)
        write_status(self.run.path, self.link.status())

    @property
    def version(self) -> int | None:
        return self.link.status().hosts[0].version

    def pump(self):
        self.link.pump()
        status = self.link.status()
        write_status(self.run.path, status)
        return status

    def ends(self, success: bool) -> None:
        """An episode of the version that is here."""
        row = {"version": self.version, "success": success, "interventions": 0, "mixed": False}
        self.run.metrics("actor0", row)

    def close(self) -> None:
        self.link.close()
        self.run.release()


def until(condition, *parts, timeout_s=30.0):
    """Let hosts pump and gateways look until the condition holds; what it returned."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "timed out"
        for part in parts:
            part.look() if isinstance(part, Learner) else part.pump()
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def closing(*parts):
    """Close all in the end, the last first."""
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.callback(lambda part=part: part.close())
        yield parts
