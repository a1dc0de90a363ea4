"""Seconds per episode of a robot whose learner is in another city, on the four network profiles.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.links.cross_city --output FOLDER [--quick]

One learner's site learns all the time, publishes every PUBLISH_EVERY steps, and serves its policy.
Robots act for it, each a process of its own, on one simulated task with a camera; they take as long
as real ones do and wait for each decision, one every --actions ticks:

  same     an actor of the learner's own site, without gateway, link or emulation
  local    a robot host behind the emulated network with policy and spool of its own: experience
           goes up and weights come down all the time, decisions stay on the host
  central  a robot host behind the same network that asks for every decision (remote=always),
           picture included; its experience goes up as well

`same` acts all the time, so that a host's ratio to it is of the same minutes and the same load;
"alone" is `same` before hosts are started. Links are gRPC with mutual TLS. Episodes have --ticks
ticks; one that ends earlier counts for as much as its ticks. Ratios are of the medians within a
window of --seconds; of all windows of a profile: median (least to greatest).
"""

import argparse
import statistics
import time
from typing import Any

from benchmarks.buffer.measure import load
from benchmarks.links.lab import Lab, arguments, print_table, shown, summary, write_result
from embodied.core.errors import EmbodiedError
from embodied.core.rundir import RunDir
from embodied.run.site.status import HostStatus, read_status
from sim.links import PROFILES
from sim.network import Relay

PUBLISH_EVERY = 20
HOSTS = {"local": "never", "central": "always"}
TASKS = {"so101/reach": ("front", 50.0), "pointmass": ("top", 20.0)}
"""Name → camera, ticks a second."""

WANTED = 1.10
_LOOK_S = 0.02
_STATUS_S = 0.5
_PATIENCE_S = 180.0

LEARNER = (
    *("sim.image_size=96", "observations=[observation.state,'observation.images.*']"),
    *("policy/images=vit", "policy.images.crop=1.0"),
    "+policy.images.encoder={patch: 16, width: 64, depth: 2, heads: 4, features: 64}",
    *("policy.n_obs_steps=1", "policy.num_steps=4", "policy.horizon=16"),
    *("+policy.network.width=256", "+policy.network.depth=2"),
    "+algorithm.roll_in=1000",  # the expert practically never takes over: the policy decides
    *("demonstrations.episodes=6", "actors.count=1", "actors.speed=1", "gateway.serve=true"),
    *("learner.batch_size=32", "learner.samples_per_insert=6", "learner.steps=1000000000"),
    *(f"learner.publish_every={PUBLISH_EVERY}", "learner.checkpoint_every=1000000000"),
    *("evaluation.episodes=0", "evaluation.final_episodes=0", "evaluation.videos=0"),
)


class Episodes:
    """How long a robot's episodes take, as they end. ticks: that a whole episode has."""

    def __init__(self, run: RunDir, ticks: int) -> None:
        self._run, self._ticks = run, ticks
        self._seen = len(self._rows())
        self._ended_s: float | None = None
        self.seconds: list[float] = []

    def _rows(self) -> list[dict[str, Any]]:
        return self._run.read("metrics", "actor0")

    def acts(self) -> bool:
        """Whether an episode has ended in which published weights decided."""
        return any(row["version"] >= 1 and not row["interventions"] for row in self._rows())

    def look(self) -> None:
        """Note the episodes that have ended; the first of all only begins the next one."""
        rows, now_s = self._rows(), time.monotonic()
        for row in rows[self._seen :]:
            if self._ended_s is not None and not row["interventions"]:
                self.seconds.append((now_s - self._ended_s) * self._ticks / row["ticks"])
            self._ended_s = now_s
        self._seen = len(rows)


class Crossing:
    """What crossed a host's link in a window, and whether experience kept up."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._first = self._last = self._status()
        self._depths = [self._first.spool_steps]
        self._oldest_s = [self._first.oldest_s]

    def _status(self) -> HostStatus:
        return read_status(self._run.path).hosts[0]

    def look(self) -> None:
        """Note how it stands."""
        self._last = self._status()
        self._depths.append(self._last.spool_steps)
        self._oldest_s.append(self._last.oldest_s)

    def found(self, seconds: float) -> dict[str, Any]:
        """Of the window: Mbit/s by kind, versions, depth of the spool in steps."""
        first, last = self._first.traffic, self._last.traffic

        def mbit_s(kind: str, field: str) -> float:
            before = getattr(first[kind], field) if kind in first else 0
            return 8e-6 * (getattr(last[kind], field) - before) / seconds if kind in last else 0.0

        return {
            "experience_mbit_s": mbit_s("experience", "sent_bytes"),
            "weights_mbit_s": mbit_s("weights", "received_bytes"),
            "asked_mbit_s": mbit_s("inference", "sent_bytes"),
            "versions": (self._last.version or 0) - (self._first.version or 0),
            "spool_steps_median": statistics.median(self._depths),
            "spool_steps_last": self._depths[-1],
            "spool_steps_most": max(self._depths),
            "oldest_s_most": max(self._oldest_s),
            "rtt_ms": self._last.rtt_ms or 0.0,
            "reconnects": self._last.reconnects - self._first.reconnects,
        }


def watch(lab: Lab, robots: list[Episodes], crossing: Crossing | None, seconds: float) -> float:
    """Look for a window, which goes on until each robot has ended two episodes; its seconds."""
    began_s = looked_s = time.monotonic()
    while (now_s := time.monotonic()) - began_s < seconds or any(
        len(robot.seconds) < 2 for robot in robots
    ):
        for robot in robots:
            robot.look()
        if now_s - looked_s > _STATUS_S:
            looked_s = now_s
            lab.check()
            if crossing is not None:
                crossing.look()
        if now_s - began_s > seconds + _PATIENCE_S:
            raise EmbodiedError(f"a robot has not ended two episodes; see {lab.folder}")
        time.sleep(_LOOK_S)
    return time.monotonic() - began_s


def window(
    lab: Lab, gateway: tuple[str, int], case: tuple[str, str, int], options: argparse.Namespace
) -> dict[str, Any]:
    """One window. case: profile, host and round; the host is new, and so is its network."""
    profile, arm, number = case
    name = f"{arm}-{profile}-{number}"
    with Relay(gateway, PROFILES[profile], seed=number) as relay:
        run = lab.site(name, relay.address, f"name={name}", f"remote={HOSTS[arm]}")
        acts = Episodes(run, options.ticks).acts
        lab.until(acts, f"{name} acts", _PATIENCE_S)
        host, same = Episodes(run, options.ticks), Episodes(lab.run, options.ticks)
        crossing = Crossing(run)
        took_s = watch(lab, [host, same], crossing, options.seconds)
        lab.end(name)
        return {
            "profile": profile,
            "host": arm,
            "round": number,
            "episode_s": host.seconds,
            "same_s": same.seconds,
            "ratio": statistics.median(host.seconds) / statistics.median(same.seconds),
            "crossed": crossing.found(took_s),
            "cuts": relay.cuts,
        }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All windows; profiles and hosts take turns in each round."""
    windows: list[dict[str, Any]] = []
    alone: list[float] = []
    camera, tick_hz = TASKS[options.task]
    overrides = (
        *(f"task={options.task}", f"sim.cameras=[{camera}]", f"sim.horizon={options.ticks}"),
        f"policy.n_action_steps={options.actions}",
    )
    with Lab(options.output) as lab:
        gateway = lab.learner((*LEARNER, *overrides))
        lab.until(Episodes(lab.run, options.ticks).acts, "published weights act", _PATIENCE_S)
        for number in range(options.rounds):
            before = Episodes(lab.run, options.ticks)
            watch(lab, [before], None, options.seconds / 2)
            alone += before.seconds
            for profile in options.profiles.split(","):
                for arm in HOSTS:
                    found = window(lab, gateway, (profile, arm, number), options)
                    windows.append(found)
                    ratio = f"{found['ratio']:.2f} of same"
                    print(f"round {number + 1}, {profile}, {arm}: {ratio}", flush=True)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    return {
        "settings": {**settings, "tick_hz": tick_hz, "learner": [*LEARNER, *overrides]},
        "alone_s": alone,
        "windows": windows,
    }


def report(result: dict[str, Any]) -> None:
    """The tables."""
    settings, windows = result["settings"], result["windows"]
    robot_s = settings["ticks"] / settings["tick_hz"]
    print(f"\nThe robot's own time: {robot_s:.2f} s; alone: {shown(summary(result['alone_s']))} s")
    times: list[tuple[Any, ...]] = []
    crossed: list[tuple[Any, ...]] = []
    for profile in settings["profiles"].split(","):
        of = {h: [w for w in windows if (w["profile"], w["host"]) == (profile, h)] for h in HOSTS}
        same = summary([s for one in windows if one["profile"] == profile for s in one["same_s"]])
        seconds = {h: summary([s for one in of[h] for s in one["episode_s"]]) for h in HOSTS}
        ratio = {h: summary([one["ratio"] for one in of[h]]) for h in HOSTS}
        met = "ok" if ratio["local"]["median"] <= WANTED else "**missed**"
        pairs = zip(of["central"], of["local"], strict=True)
        both = summary([central["ratio"] / local["ratio"] for central, local in pairs])
        waits_s = seconds["central"]["median"] - seconds["local"]["median"]
        times.append(
            (
                *(profile, shown(same), shown(seconds["local"]), shown(seconds["central"])),
                *(f"{shown(ratio['local'])} {met}", shown(ratio["central"]), shown(both)),
                f"{1e3 * waits_s * settings['actions'] / settings['ticks']:.0f}",
            )
        )
        crossed += [(profile, arm, *crossing_cells(of[arm])) for arm in HOSTS]
    head = ("profile", "same, s", "local, s", "central, s")
    ratios = (f"local / same (≤ {WANTED})", "central / same", "central / local")
    print_table((*head, *ratios, "more per decision, ms"), times)
    print()
    head = ("profile", "host", "experience, Mbit/s", "weights, Mbit/s", "questions, Mbit/s")
    depth = ("undelivered steps, median", "at most", "at the end", "oldest at most, s")
    print_table((*head, "versions", *depth, "round trip, ms", "reconnects"), crossed)


def crossing_cells(windows: list[dict[str, Any]]) -> list[str]:
    """Medians over windows of what crossed, and the most that was undelivered in any."""
    found = [one["crossed"] for one in windows]
    middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
    most = {key: max(one[key] for one in found) for key in found[0]}
    rates = ("experience_mbit_s", "weights_mbit_s", "asked_mbit_s")
    return [
        *(f"{middle[key]:.2f}" for key in rates),
        f"{middle['versions']:.0f}",
        f"{middle['spool_steps_median']:.0f}",
        *(str(most[key]) for key in ("spool_steps_most", "spool_steps_last")),
        f"{most['oldest_s_most']:.1f}",
        f"{middle['rtt_ms']:.0f}",
        str(most["reconnects"]),
    ]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", default="so101/reach", choices=TASKS)
    parser.add_argument("--profiles", default=",".join(PROFILES), help="with commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=35.0, help="of a window")
    parser.add_argument("--ticks", type=int, default=250, help="of an episode")
    parser.add_argument("--actions", type=int, default=8, help="ticks between two decisions")
    options = arguments(__doc__, parser)
    if options.quick:
        options.profiles, options.rounds = "cross-city", 1
        options.task, options.seconds, options.ticks, options.actions = "pointmass", 3.0, 20, 4
    before = load()
    result = measure(options)
    report(result)
    write_result(options.output, "cross_city", result, before)


if __name__ == "__main__":
    main()
