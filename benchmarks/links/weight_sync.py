"""From publishing to acting, the pause of a control loop, and the learner's time, by policy size.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.links.weight_sync --output FOLDER [--quick]

Delay: gateway and buffer of a learner's site, and a robot host behind each emulated network, are
processes of the product with mutual TLS between; this process stands in the learner's place and
publishes. An update is EVERY steps of Adam's size at --learning-rate on a flow policy with an MLP;
what travels is bfloat16. Times are from the return of WeightStore.publish to the first decision
with that version, on one monotonic clock; the next update follows a second later.

Pause: the host's actor on so101/reach (50 Hz, a decision every 8 ticks) is the product's own loop
with a clock beside it, see timed_actor.py. A step's extra time is its own time less the median of
all steps more than a second away from an update. "around": from a second before new weights have
arrived on the host until half a second after they first act; "elsewhere": all other steps.

Learner: see step_time.py; CPU, one thread, the default interval.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.buffer.measure import load
from benchmarks.links.lab import Lab, arguments, print_table, shown, summary, write_result
from benchmarks.links.step_time import step_time
from benchmarks.links.timed_actor import Acted, extra_times
from embodied.buffer.sample.statistics import FeatureStats
from embodied.core.config import compose, convert
from embodied.core.errors import EmbodiedError
from embodied.core.rundir import RunDir
from embodied.run import build
from embodied.run.config import TrainConfig, load_train
from embodied.run.site.config import Site, SiteConfig, write_site
from embodied.run.site.host import join
from embodied.run.site.status import read_status
from embodied.run.supervisor import Crew, Supervisor
from embodied.weights.store import WeightStore
from sim.links import PROFILES
from sim.network import Relay

SIZES = {"10 MB": (640, 256), "100 MB": (2048, 64)}
"""Name → the network's width, the learner's batch."""

EVERY = 8
_TASK = (
    *("task=so101/reach", "sim.horizon=300", "+algorithm.roll_in=1000000"),
    *("policy.n_obs_steps=1", "policy.num_steps=2", "+policy.network.depth=3"),
)
_JOINTS = 6
_WAIT_S = 240.0
_REST_S = 1.0
_AFTER_S = 0.5
_LOOK_S = 0.005


class Publishing:
    """Weights that change as Adam changes them."""

    def __init__(self, store: WeightStore, config: TrainConfig, rate: float, seed: int) -> None:
        self._store, self._rate = store, rate
        self._rng = np.random.default_rng(seed)
        made = build.policy_format(config)
        values = np.linspace(0.1, 1.0, _JOINTS)
        feature = FeatureStats(*([values.tolist()] * 6), count=1000)
        self._described, self._arrays = made.pack(
            made.make(dict.fromkeys(made.statistics, feature))
        )
        self.num_bytes = sum(array.nbytes for array in self._arrays.values())

    def publish(self) -> tuple[int, float]:
        """The version, and when publishing had returned (monotonic)."""
        scale = np.float32(0.5 * self._rate * EVERY**0.5)
        for name, array in self._arrays.items():
            if name.startswith("network."):
                array += scale * self._rng.standard_normal(array.shape, np.float32)
        metadata = {"sitting": 1, "final": False, "step": 0, "published_ns": time.monotonic_ns()}
        version = self._store.publish(self._arrays, self._described, metadata).version
        now_s = time.monotonic()
        self._store.prune(3)
        return version, now_s


@contextlib.contextmanager
def crew(run: RunDir, roles: tuple[str, ...]) -> Generator[str]:
    """Roles of the product under their supervisor, in a thread of this process; their sockets."""
    ending = threading.Event()
    made = Crew(roles, last=roles[-1:], threads=lambda role: 1)
    supervisor = Supervisor(run, made, lambda values: None, lambda: not ending.is_set())
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        yield supervisor.sockets
    finally:
        ending.set()
        thread.join()


class Host:
    """A robot host whose actor is timed."""

    def __init__(self, lab: Lab, name: str, address: tuple[str, int]) -> None:
        where = f"gateway={address[0]}:{address[1]}"
        options = [where, f"name={name}", f"identity={lab.identity(name)}"]
        site = convert(compose("site", options), SiteConfig)
        found = join(site, lambda: True, lambda why: None)
        assert found is not None
        theirs = convert(msgspec.json.decode(found[0].config, type=dict[str, Any]), TrainConfig)
        gateway = msgspec.structs.replace(theirs.gateway, listen=None, identity=None)
        nothing = msgspec.structs.replace(theirs.demonstrations, source="none")
        config = msgspec.structs.replace(
            theirs, actors=site.actors, demonstrations=nothing, gateway=gateway
        )
        self.run = RunDir(lab.folder / name)
        self.run.acquire()
        self.run.write_config(config)
        write_site(self.run, Site(name, found[0].name, found[0].id, site))
        self.run.event("run started")

    @contextlib.contextmanager
    def acting(self) -> Generator[None]:
        """Its roles, actor included."""
        with crew(self.run, ("buffer", "link")) as sockets:
            words = ("actor0", str(self.run.path), sockets, str(os.getpid()), str(self.run.path))
            with open(self.run.path / "logs" / "actor0.log", "ab") as log:
                actor = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.links.timed_actor", *words],
                    stdout=log,
                    stderr=log,
                )
            try:
                yield
            finally:
                actor.terminate()
                actor.wait()
        self.run.release()

    def acted(self, version: int) -> float:
        """When this version first decided (monotonic)."""
        deadline_s = time.monotonic() + _WAIT_S
        path = self.run.path / "acted.jsonl"
        while time.monotonic() < deadline_s:
            lines = path.read_bytes().splitlines() if path.exists() else []
            acted = msgspec.json.decode(lines[-1], type=Acted) if lines else None
            if acted is not None and acted.version >= version:
                return acted.t_s
            time.sleep(_LOOK_S)
        raise EmbodiedError(f"version {version} does not act; see {self.run.path}/logs")

    def arrived(self) -> dict[int, float]:
        """When each version was whole and durable on the host (monotonic)."""
        offset_s = time.time() - time.monotonic()
        adopted = (e for e in self.run.events() if e["event"] == "weights adopted")
        return {event["version"]: event["time"] - offset_s for event in adopted}

    def received_bytes(self) -> int:
        """Of weights, as the link counts them."""
        traffic = read_status(self.run.path).hosts[0].traffic
        return traffic["weights"].received_bytes if "weights" in traffic else 0


def follow(
    host: Host, publishing: Publishing, updates: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Delays of so many updates, and the extra times (ms) of steps: around, elsewhere, swapping,
    and the times of polls that swapped."""
    with host.acting():
        version, _ = publishing.publish()
        host.acted(version)
        time.sleep(2 * _REST_S)
        before = host.received_bytes()
        times: list[tuple[int, float, float]] = []
        for _ in range(updates):
            version, published_s = publishing.publish()
            times.append((version, published_s, host.acted(version)))
            time.sleep(_REST_S)
        received = (host.received_bytes() - before) / updates
        arrived = host.arrived()
    found = {
        "acting_s": [acted_s - published_s for _, published_s, acted_s in times],
        "arrival_s": [arrived[version] - published_s for version, published_s, _ in times],
        "update_bytes": received,
    }
    stretches = [(arrived[version] - _REST_S, acted_s + _AFTER_S) for version, _, acted_s in times]
    return found, extra_times(np.load(host.run.path / "steps.npy"), stretches, times[0][1] - 1)


def delays(options: argparse.Namespace, size: str) -> dict[str, Any]:
    """All profiles for one size."""
    width, _ = SIZES[size]
    found: dict[str, Any] = {}
    pauses: list[list[np.ndarray]] = []
    lab = Lab(options.output / size.replace(" ", ""))
    lab.folder.mkdir()
    overrides = [*_TASK, f"+policy.network.width={width}", f"run.dir={lab.run.path}"]
    listen = ["gateway.listen=127.0.0.1:0", f"gateway.identity={lab.identity('hub')}"]
    config = load_train([*overrides, *listen])
    lab.run.acquire()
    lab.run.write_config(config)
    lab.run.event("run started")
    publishing = Publishing(WeightStore(lab.run.weights), config, options.learning_rate, seed=0)
    publishing.publish()
    with crew(lab.run, ("buffer", "gateway")):
        port = int(lab.until(lab.gateway_address, "the gateway listens").rpartition(":")[2])
        for number, profile in enumerate(options.profiles.split(",")):
            with Relay(("127.0.0.1", port), PROFILES[profile], seed=number) as relay:
                host = Host(lab, f"host-{profile}", relay.address)
                found[profile], extra = follow(host, publishing, options.updates)
            pauses.append(extra)
            print(f"{size}, {profile}: {shown(summary(found[profile]['acting_s']))} s", flush=True)
    lab.run.release()
    names = ("around_ms", "elsewhere_ms", "swapping_ms", "swap_poll_ms")
    joined = [np.concatenate(parts) for parts in zip(*pauses, strict=True)]
    return {
        "bytes": publishing.num_bytes,
        "profiles": found,
        "pause": {name: quantiles(values) for name, values in zip(names, joined, strict=True)},
    }


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Of times."""
    p50, p99 = np.percentile(values, (50, 99))
    most = float(values.max())
    return {"p50": float(p50), "p99": float(p99), "max": most, "count": len(values)}


def report(result: dict[str, Any]) -> None:
    """The tables."""
    delay_rows, pause_rows, step_rows = [], [], []
    for size, found in result["sizes"].items():
        for profile, one in found["profiles"].items():
            times = (shown(summary(one[key])) for key in ("acting_s", "arrival_s"))
            delay_rows.append((size, profile, f"{one['update_bytes'] / 1e6:.2f}", *times))
        for name, one in found["pause"].items():
            figures = (f"{one[key]:.2f}" for key in ("p50", "p99", "max"))
            pause_rows.append((size, name.removesuffix("_ms"), *figures, one["count"]))
        if step := found.get("step_time"):
            keys = ("step_ms", "publish_ms", "share_percent", "slower_percent")
            figures = (shown(summary(step[key])) for key in keys)
            step_rows.append((size, step["batch_size"], step["interval_steps"], *figures))
    print()
    head = ("policy", "profile", "MB an update")
    print_table((*head, "publish to acting, s", "publish to arrival, s"), delay_rows)
    print("\nExtra time of control steps (≤ 1 ms at p99 is wanted), and of polls that swap:\n")
    print_table(("policy", "steps", "p50, ms", "p99, ms", "max, ms", "number"), pause_rows)
    print()
    head = ("policy", "batch", "steps between", "step, ms", "publication, ms")
    print_table((*head, "of the steps, %", "slower with, % (≤ 3)"), step_rows)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--profiles", default=",".join(PROFILES), help="with commas between")
    parser.add_argument("--sizes", default=",".join(SIZES), help="with commas between")
    parser.add_argument("--updates", type=int, default=9, help="on each profile")
    parser.add_argument("--rounds", type=int, default=5, help="of the learner's blocks")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    options = arguments(__doc__, parser)
    interval = None
    if options.quick:
        options.profiles, options.sizes = "cross-city", "10 MB"
        options.updates, options.rounds, interval = 3, 2, 10
    before = load()
    sizes: dict[str, Any] = {}
    for size in options.sizes.split(","):
        sizes[size] = delays(options, size)
        width, batch_size = SIZES[size]
        folder = Path(options.output) / f"learner-{size.replace(' ', '')}"
        overrides = [*_TASK, f"+policy.network.width={width}"]
        sizes[size]["step_time"] = step_time(
            folder, overrides, batch_size, options.rounds, interval
        )
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    result = {"settings": settings, "sizes": sizes}
    report(result)
    write_result(options.output, "weight_sync", result, before)


if __name__ == "__main__":
    main()
