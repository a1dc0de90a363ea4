"""What measurements of whole sites share: their processes, certificates, figures, results."""

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from benchmarks.buffer.measure import load, machine
from embodied.comms.identity.authority import Authority
from embodied.comms.identity.peer import Peer
from embodied.core.errors import EmbodiedError
from embodied.core.rundir import RunDir

T = TypeVar("T")

_READY_S = 120.0
_END_S = 30.0
_LOOK_S = 0.05
_SAID_BYTES = 2000


def arguments(description: str | None, parser: argparse.ArgumentParser | None = None) -> Any:
    """Of the command line: --output, --quick and what the parser has already."""
    parser = parser or argparse.ArgumentParser()
    parser.description = description
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="a new folder for all results")
    parser.add_argument("--quick", action="store_true", help="under a minute: a smoke test")
    found = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # so that what was started ends as well
    found.output.mkdir(parents=True)
    return found


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least, greatest and number of the values."""
    if not values:
        raise EmbodiedError("nothing was measured; see the logs in the output folder")
    middle = statistics.median(values)
    return {"median": middle, "low": min(values), "high": max(values), "count": len(values)}


def shown(found: dict[str, float], digits: int = 2) -> str:
    """A summary in a cell: median (least to greatest)."""
    low, high = found["low"], found["high"]
    return f"{found['median']:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def write_result(folder: Path, name: str, result: dict[str, Any], before: str) -> None:
    """NAME.json in the output folder, with the machine and its load. before: its load at first."""
    found = {"machine": machine(), "load_before": before, "load_after": load(), **result}
    path = folder / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    print(f"\n{machine()}; load before: {before}; after: {load()}; {path}")


class Lab:
    """A learner's site and robot hosts: commands as processes, each with its own pool of devices.

    A context manager. run: the learner's; everything lies under `folder`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.run = RunDir(self.folder / "run")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._authority: Authority | None = None

    def identity(self, name: str) -> Path:
        """The folder of a robot host's certificate, or of the gateway's, "hub"."""
        if self._authority is None:
            self._authority = Authority.create(self.folder / "authority", "benchmark")
        output = self.folder / f"identity-{name}"
        if not output.exists():
            peer = Peer("gateway", name) if name == "hub" else Peer("robot", name, ("*",))
            address = ["127.0.0.1"] if name == "hub" else []
            self._authority.issue(peer, output, ip=address)
        return output

    def command(self, name: str, *words: str) -> None:
        """Start `python WORDS` as the process `name`."""
        state = self.folder / f"state-{name}"
        state.mkdir(exist_ok=True)
        with open(self.folder / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *words],
                env={**os.environ, "EMBODIED_STATE": str(state)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def learner(self, overrides: Sequence[str]) -> tuple[str, int]:
        """Start the learner's site; where its gateway listens, with certificates."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.command(
            "learner",
            *("-m", "embodied.cli.main", "train", *overrides, f"run.dir={self.run.path}"),
            *(f"gateway.listen=127.0.0.1:{port}", f"gateway.identity={self.identity('hub')}"),
        )
        self.until(self.gateway_address, "the gateway listens")
        return "127.0.0.1", port

    def site(self, name: str, gateway: tuple[str, int], *overrides: str) -> RunDir:
        """Start a robot host; its run's folder there, once it has joined."""
        root = self.folder / f"root-{name}"
        where = f"gateway={gateway[0]}:{gateway[1]}"
        identity = f"identity={self.identity(name)}"
        words = ("-m", "embodied.cli.main", "site", where, identity, f"root={root}")
        self.command(name, *words, *overrides)
        [found] = self.until(lambda: list(root.glob("*/config.json")), f"{name} joins")
        return RunDir(found.parent)

    def pid_of(self, role: str) -> int:
        """Process id of a role of the learner's site, as it was started last."""
        started = (e for e in self.run.events() if e["event"] == "role started")
        return [event["pid"] for event in started if event["role"] == role][-1]

    def gateway_address(self) -> str:
        """Where the gateway listens, "" before it does."""
        events = self.run.events()
        return next((e["address"] for e in events if e["event"] == "gateway listens"), "")

    def until(self, condition: Callable[[], T], what: str, timeout_s: float = _READY_S) -> T:
        """What the condition returned, once it is true; EmbodiedError if a process ends before."""
        deadline_s = time.monotonic() + timeout_s
        while not (found := condition()):
            self.check()
            if time.monotonic() > deadline_s:
                raise EmbodiedError(f"waited {timeout_s:.0f} s until {what}; see {self.folder}")
            time.sleep(_LOOK_S)
        return found

    def check(self) -> None:
        """Raise EmbodiedError if a process has ended, with its last words."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                said = (self.folder / f"{name}.log").read_text()[-_SAID_BYTES:]
                raise EmbodiedError(f"{name} ended with {process.returncode}: {said}")

    def end(self, *names: str) -> None:
        """Ask processes to end, and wait for them."""
        ending = [self._processes.pop(name) for name in names]
        for process in ending:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in ending:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        hosts = [name for name in self._processes if name != "learner"]
        self.end(*hosts)
        self.end(*self._processes)
