"""A light robot host: the product's link, spool and weights, and steps from a synthetic robot.

    python -m benchmarks.links.light_agent OPTIONS…        (key=value, as of embodied site)

It joins a run, records steps of the task's own features at RATE_HZ, or as fast as they are
delivered while the file `saturate` lies in its folder, and writes a Tally to tally.json twice a
second. It has no policy, so it needs no torch; everything else is what a site's buffer and link
roles do, in one process.
"""

import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.config import compose, convert
from embodied.core.episodes import Step
from embodied.core.files import write_atomic
from embodied.core.rundir import RunDir
from embodied.core.specs import DeviceSpec
from embodied.run.build import device_spec
from embodied.run.config import TrainConfig
from embodied.run.site.config import Site, SiteConfig, write_site
from embodied.run.site.host import join
from embodied.run.site.hostlink import HostLink

RATE_HZ = 20.0
TALLY = "tally.json"
SATURATE = "saturate"

_EPISODE = 100
_AHEAD_STEPS = 256
_LOOK_S = 0.05
_FLUSH_S = 0.05
_TALLY_S = 0.5
_IDLE_S = 0.01


class Tally(msgspec.Struct, frozen=True):
    """How a host is. waiting: steps that are not delivered."""

    recorded: int
    waiting: int
    connected: bool
    reconnects: int
    version: int | None
    reason: str


class Robot:
    """Steps of a spec, with noise in the place of everything: pictures do not shrink."""

    def __init__(self, sink: LocalBuffer, spec: DeviceSpec, stream: str, task: str) -> None:
        self._sink, self._spec, self._stream, self._task = sink, spec, stream, task
        self._rng = np.random.default_rng(sum(map(ord, stream)))
        self._episode = sink.next_episode(stream)
        self._index = 0
        self.recorded = 0

    def step(self) -> None:
        """Record one more."""
        final = self._index == _EPISODE
        observation = {}
        for key, spec in self._spec.observation.items():
            if spec.dtype == "uint8":
                observation[key] = self._rng.integers(0, 256, spec.shape, np.uint8)
            else:
                observation[key] = self._rng.standard_normal(spec.shape).astype(spec.dtype)
        self._sink.add(
            Step(
                stream=self._stream,
                episode=self._episode,
                index=self._index,
                observation=observation,
                action=np.zeros(self._spec.action.shape, np.float32),
                truncated=self._index == _EPISODE - 1,
                task=self._task,
                final=final,
            )
        )
        self.recorded += 1
        self._index = 0 if final else self._index + 1
        self._episode += final


def main() -> None:
    """Record and deliver until told to end."""
    site = convert(compose("site", sys.argv[1:]), SiteConfig)
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    found = join(site, lambda: not ended, lambda why: print(why, flush=True))
    if found is None:
        return
    assignment, name = found
    config = convert(msgspec.json.decode(assignment.config, type=dict[str, Any]), TrainConfig)
    run = RunDir(Path(site.root))
    run.acquire()
    description = Site(name, assignment.name, assignment.id, site)
    write_site(run, description)
    with LocalBuffer(run.buffer, segment_bytes=16 << 20) as sink:
        link = HostLink(run, description, site.root)
        robot = Robot(sink, device_spec(config), f"{name}/actor0.robot0", config.tasks[0])
        try:
            _serve(run, link, robot, sink, ended)
        finally:
            link.close()
    run.release()


def _serve(run: RunDir, link: HostLink, robot: Robot, sink: LocalBuffer, ended: list[int]) -> None:
    due_s = looked_s = flushed_s = told_s = time.monotonic()
    while not ended:
        now_s = time.monotonic()
        if now_s - looked_s > _LOOK_S and (run.path / SATURATE).exists():
            [host] = link.status().hosts
            for _ in range(_AHEAD_STEPS - host.spool_steps):
                robot.step()
            looked_s = due_s = now_s
        while due_s <= now_s:
            robot.step()
            due_s += 1 / RATE_HZ
        if now_s - flushed_s > _FLUSH_S:
            flushed_s = now_s
            sink.flush()
        busy = link.pump()
        if now_s - told_s > _TALLY_S:
            told_s = now_s
            [host] = link.status().hosts
            tally = Tally(
                *(robot.recorded, host.spool_steps, host.connected),
                *(host.reconnects, host.version, host.reason),
            )
            write_atomic(run.path / TALLY, msgspec.json.encode(tally))
        if not busy:
            time.sleep(_IDLE_S)


if __name__ == "__main__":
    main()
