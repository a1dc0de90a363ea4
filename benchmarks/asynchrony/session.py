"""A run of `embodied train` whose actors and learner can be stopped, and go on, each by itself.

They are stopped by SIGSTOP, the learner together with its loader; nothing else of the run knows.
A simulated robot's time stands still with its actor and is not made up for afterwards.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.links.lab import Lab
from embodied.core.errors import EmbodiedError
from embodied.run.context import kind_of

LOG_STEPS = 50
"""Gradient steps between two rows of metrics/learner.jsonl."""

SETTLE_S = 0.05
"""From a row until its writer is stopped, so that a learner is not stopped while it publishes, an
actor not while it waits for the buffer. It is so in every window: n rows are n episodes, or
n × LOG_STEPS steps, all the same."""

ENDLESS = (
    *("learner.steps=1000000000", "algorithm=dagger", "+algorithm.roll_in=1000"),
    *("evaluation.episodes=0", "evaluation.final_episodes=0", "evaluation.videos=0"),
)
"""No end, nothing evaluated, and an expert who takes over practically never."""

_LOOK_S = 0.002
_PATIENCE_S = 120.0
_START_S = 600.0


class Rows:
    """The rows of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.count = 0

    def look(self) -> int:
        """How many there are now."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
            self._offset += len(new)
            self.count += new.count(b"\n")
        return self.count


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds that processes were on a core, and that they were ready while none was free."""

    cpu_s: float = 0.0
    ready_s: float = 0.0

    def __sub__(self, earlier: "Spent") -> "Spent":
        return Spent(self.cpu_s - earlier.cpu_s, self.ready_s - earlier.ready_s)


def spent(pids: Sequence[int]) -> Spent:
    """Of all threads of these processes, since they began."""
    cpu_ns = ready_ns = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            cpu, ready, _ = (thread / "schedstat").read_text().split()
            cpu_ns, ready_ns = cpu_ns + int(cpu), ready_ns + int(ready)
    return Spent(cpu_ns / 1e9, ready_ns / 1e9)


class Session:
    """A run in which a policy acts and is learned, while the block lasts; all stand still at first.

    folder: a new one. pids: of its roles, by name.
    """

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        folder.mkdir(parents=True)
        self._lab = Lab(folder)
        self._overrides = overrides
        self.run = self._lab.run
        self.pids: dict[str, int] = {}
        self.learned = Rows(self.run.path / "metrics" / "learner.jsonl")
        self.episodes = Rows(self.run.path / "metrics" / "actor0.jsonl")

    def __enter__(self) -> Self:
        words = ("train", *ENDLESS, *self._overrides, f"run.dir={self.run.path}")
        self._lab.command("train", "-m", "embodied.cli.main", *words)
        try:
            self._lab.until(self._acts, "an episode of a policy has ended", _START_S)
            started = [event for event in self.run.events() if event["event"] == "role started"]
            self.pids = {event["role"]: event["pid"] for event in started}
            self.settle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(EmbodiedError):
            self.go("actor", "learner")
        self._lab.__exit__(*error)

    def _acts(self) -> bool:
        rows: list[dict[str, Any]] = self.run.read("metrics", "actor0")
        return any(row["version"] >= 1 and not row["demonstration"] for row in rows)

    def go(self, *kinds: str) -> None:
        """Let "actor" or "learner" go on, or both; what is not named stops."""
        ended: list[str] = []
        for name, pid in self.pids.items():
            kind = kind_of(name)
            if kind in ("actor", "learner"):
                # Each role leads a group of its own, which the learner's loader belongs to as well.
                try:
                    os.killpg(pid, signal.SIGCONT if kind in kinds else signal.SIGSTOP)
                except ProcessLookupError:
                    ended.append(name)
        if ended:
            said = (self.run.path / "logs" / f"{ended[0]}.log").read_text().strip()
            raise EmbodiedError(f"{', '.join(ended)} ended meanwhile: {said}")

    def settle(self) -> None:
        """Stop the first actor where an episode ends, the learner where a row is written."""
        self.generate(1)
        self.learn(1)

    def generate(self, count: int) -> float:
        """Seconds of so many episodes, with nothing learned."""
        began_s = time.perf_counter()
        self.go("actor")
        self.wait(self.episodes, count)
        time.sleep(SETTLE_S)
        self.go()
        return time.perf_counter() - began_s

    def learn(self, rows: int, *beside: str) -> float:
        """Seconds of so many rows' gradient steps, alone or with "actor" beside."""
        began_s = time.perf_counter()
        self.go("learner", *beside)
        self.wait(self.learned, rows)
        time.sleep(SETTLE_S)
        self.go()
        return time.perf_counter() - began_s

    def wait(self, rows: Rows, count: int) -> None:
        """Until so many more rows are there."""
        wanted = rows.look() + count
        self.until(lambda: rows.look() >= wanted)

    def until(self, condition: Callable[[], bool]) -> None:
        """Until it is true, while the run goes on; EmbodiedError if that takes too long."""
        deadline_s = time.perf_counter() + _PATIENCE_S
        while not condition():
            self._lab.check()
            if time.perf_counter() > deadline_s:
                raise EmbodiedError(f"nothing new for {_PATIENCE_S:.0f} s; see {self.run.path}")
            time.sleep(_LOOK_S)
