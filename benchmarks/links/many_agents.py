"""Robot hosts on one gateway and one learner: does each get its share, and does memory stay?

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.links.many_agents --output FOLDER [--quick]

The learner's site is the product's, learning at full speed on the same cores. Each host is a
process with certificate, link, spool and weights of the product and a synthetic robot, see
light_agent.py: 20 steps a second, each with a picture of 48 × 48 pixels of noise. Two phases:

  paced      all at 20 Hz for --minutes: is every stream alive, does memory grow?
  saturated  all as fast as they are acknowledged, for --saturated seconds: who gets how much?

Steps are counted where they are durable, in the learner's buffer. Unfairness is (most − least) /
mean of the hosts' counts in the phase; a stream is alive if every --slot seconds bring steps of it.
Memory (resident, and without pages of files) is sampled every 5 s; its slope is of a least-squares
line through means of 30 s after --warm-up, with that line's standard error. What the buffer and the
loader keep for each step is meant to grow with the steps: the last column divides by them.
"""

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.buffer.measure import load
from benchmarks.links.lab import Lab, arguments, print_table, write_result
from benchmarks.links.light_agent import RATE_HZ, SATURATE, TALLY, Tally
from embodied.buffer.read.replay import ReplayReader

WANTED = 0.20
ROLES = ("gateway", "learner", "buffer")
_SAMPLE_S = 5.0
_MEAN_S = 30.0
_LOOK_S = 0.25

LEARNER = (
    *("task=pointmass", "sim.cameras=[top]", "sim.image_size=48"),
    "observations=[observation.state,observation.environment_state]",
    *("actors.count=1", "actors.speed=1", "demonstrations.episodes=4", "buffer.ram_mib=64"),
    *("learner.batch_size=64", "learner.steps=1000000000", "learner.checkpoint_every=1000000000"),
    *("evaluation.episodes=0", "evaluation.final_episodes=0", "evaluation.videos=0"),
)


class Site:
    """The learner's site and its hosts, while they run."""

    def __init__(self, lab: Lab, names: list[str]) -> None:
        self._lab, self.names = lab, names
        self._reader = ReplayReader(lab.run.buffer, ram_bytes=64 << 20)
        self.pids = {role: lab.pid_of(role) for role in ROLES}
        self.pids["loader"] = child_of(self.pids["learner"])

    def root(self, name: str) -> Path:
        """A host's folder."""
        return self._lab.folder / f"root-{name}"

    def counts(self) -> dict[str, int]:
        """Steps of each host that are durable in the learner's buffer."""
        self._reader.refresh()
        found: Counter[str] = Counter()
        for episode in self._reader.episodes:
            found[episode.stream.partition("/")[0]] += len(episode.rows)
        return {name: found[name] for name in self.names}

    def tallies(self) -> dict[str, Tally]:
        """What each host told last."""
        data = {name: (self.root(name) / TALLY).read_bytes() for name in self.names}
        return {name: msgspec.json.decode(found, type=Tally) for name, found in data.items()}

    def memory(self) -> dict[str, tuple[float, float]]:
        """MB of each process: resident, and without files' pages."""
        return {role: memory_mb(pid) for role, pid in self.pids.items()}

    def close(self) -> None:
        """Close the reader."""
        self._reader.close()


def child_of(pid: int) -> int:
    """The process that another one has started."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return next(int(child) for path in children for child in path.read_text().split())


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident, and anonymous, MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    resident, anonymous = (int(fields[key].split()[0]) for key in ("VmRSS", "RssAnon"))
    return resident * 1.024e-3, anonymous * 1.024e-3


def phase(lab: Lab, site: Site, seconds: float, slot_s: float) -> dict[str, Any]:
    """Counts and memory while all go on."""
    began_s = time.monotonic()
    first = before = site.counts()
    slots: list[dict[str, int]] = []
    samples: list[tuple[float, dict[str, tuple[float, float]]]] = []
    while (elapsed_s := time.monotonic() - began_s) < seconds:
        lab.check()
        if elapsed_s >= len(samples) * _SAMPLE_S:
            samples.append((elapsed_s, site.memory()))
        if elapsed_s >= (len(slots) + 1) * slot_s:
            now = site.counts()
            slots.append({name: now[name] - before[name] for name in site.names})
            before = now
        time.sleep(_LOOK_S)
    last = site.counts()
    steps = {name: last[name] - first[name] for name in site.names}
    tallies = site.tallies()
    return {
        "seconds": elapsed_s,
        "steps": steps,
        "unfairness": (max(steps.values()) - min(steps.values())) / statistics.mean(steps.values()),
        "alive": all(count > 0 for slot in slots for count in slot.values()),
        "least_in_a_slot": min(count for slot in slots for count in slot.values()),
        "waiting": {name: tally.waiting for name, tally in tallies.items()},
        "connected": all(tally.connected for tally in tallies.values()),
        "reconnects": sum(tally.reconnects for tally in tallies.values()),
        "versions": {name: tally.version for name, tally in tallies.items()},
        "memory": samples,
    }


def slope(times_s: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Of a line through the values, per minute, and its standard error."""
    minutes = times_s / 60
    line, level = np.polyfit(minutes, values, 1)
    rest = values - level - line * minutes
    spread = np.sum((minutes - minutes.mean()) ** 2)
    freedom = max(1, len(values) - 2)
    return float(line), float(np.sqrt(np.sum(rest**2) / freedom / spread))


def growth(paced: dict[str, Any], warm_up_s: float, mean_s: float) -> dict[str, Any]:
    """Of each process: slopes (MB a minute) with standard errors, first and last MB."""
    found: dict[str, Any] = {}
    steps_min = 60 * sum(paced["steps"].values()) / paced["seconds"]
    kept = [(t_s, memory) for t_s, memory in paced["memory"] if t_s >= warm_up_s]
    groups = np.array([int((t_s - warm_up_s) / mean_s) for t_s, _ in kept])
    times_s = np.array([t_s for t_s, _ in kept])
    means = [np.flatnonzero(groups == group) for group in sorted(set(groups))]
    for role in kept[0][1]:
        entry: dict[str, Any] = {}
        for place, name in enumerate(("resident", "anonymous")):
            values = np.array([memory[role][place] for _, memory in kept])
            at_s = np.array([times_s[rows].mean() for rows in means])
            middle = np.array([values[rows].mean() for rows in means])
            entry[name] = dict(zip(("mb_min", "error"), slope(at_s, middle), strict=True))
            entry[name] |= {"first_mb": float(middle[0]), "last_mb": float(middle[-1])}
        entry["bytes_a_step"] = 1e6 * entry["anonymous"]["mb_min"] / steps_min
        found[role] = entry
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both phases."""
    names = [f"arm-{number + 1}" for number in range(options.hosts)]
    with Lab(options.output) as lab:
        host, port = lab.learner(LEARNER)
        for name in names:
            words = (f"gateway={host}:{port}", f"name={name}", f"identity={lab.identity(name)}")
            root = f"root={lab.folder}/root-{name}"
            lab.command(name, "-m", "benchmarks.links.light_agent", *words, root)
        told = lambda: all((lab.folder / f"root-{n}" / TALLY).exists() for n in names)  # noqa: E731
        lab.until(told, "all hosts have told how they are")
        learns = lambda: any(r["steps_per_s"] > 0 for r in lab.run.read("timings", "learner"))  # noqa: E731
        lab.until(learns, "the learner learns")
        site = Site(lab, names)
        lab.until(lambda: all(site.counts().values()), "all hosts have delivered")
        paced = phase(lab, site, 60 * options.minutes, options.slot)
        for name in names:
            (site.root(name) / SATURATE).touch()
        time.sleep(options.slot / 2)
        saturated = phase(lab, site, options.saturated, options.slot)
        site.close()
        learner = lab.run.read("timings", "learner")
    return {
        "paced": paced,
        "saturated": saturated,
        "growth": growth(paced, options.warm_up, options.mean),
        "learner_steps_s": statistics.median(row["steps_per_s"] for row in learner),
    }


def report(result: dict[str, Any]) -> None:
    """The tables."""
    rows = []
    for name in ("paced", "saturated"):
        found = result[name]
        counts = sorted(found["steps"].values())
        rates = [f"{count / found['seconds']:.1f}" for count in (counts[0], counts[-1])]
        met = "ok" if found["unfairness"] <= WANTED else "**missed**"
        rows.append(
            (
                *(name, len(counts), f"{found['seconds']:.0f}", *rates),
                *(
                    f"{100 * found['unfairness']:.1f} % {met}",
                    "yes" if found["alive"] else "**no**",
                ),
                *(max(found["waiting"].values()), found["reconnects"]),
            )
        )
    print(f"\nEach robot makes {RATE_HZ:g} steps a second when paced; the learner takes "
          f"{result['learner_steps_s']:.1f} gradient steps a second.\n")  # fmt: skip
    head = ("phase", "hosts", "seconds", "steps/s, least", "most")
    fair = f"(most − least) / mean (≤ {100 * WANTED:.0f} %)"
    print_table((*head, fair, "all alive", "undelivered at the end", "reconnects"), rows)
    print()
    rows = []
    for role, found in result["growth"].items():
        cells = []
        for kind in ("resident", "anonymous"):
            one = found[kind]
            cells += [f"{one['first_mb']:.1f} → {one['last_mb']:.1f}"]
            cells += [f"{one['mb_min']:+.2f} ± {one['error']:.2f}"]
        rows.append((role, *cells, f"{found['bytes_a_step']:.0f}"))
    head = ("process", "resident, MB", "MB/min", "without files, MB", "MB/min", "bytes a step")
    print_table(head, rows)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the paced phase")
    parser.add_argument("--saturated", type=float, default=60.0, help="seconds")
    parser.add_argument("--slot", type=float, default=5.0, help="seconds in which all must deliver")
    parser.add_argument("--warm-up", type=float, default=180.0, help="seconds")
    options = arguments(__doc__, parser)
    options.mean = _MEAN_S
    if options.quick:
        options.hosts, options.minutes, options.saturated = 3, 0.3, 6.0
        options.slot, options.warm_up, options.mean = 3.0, 3.0, _SAMPLE_S
    before = load()
    result = measure(options)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    report(result)
    write_result(options.output, "many_agents", {"settings": settings, **result}, before)


if __name__ == "__main__":
    main()
