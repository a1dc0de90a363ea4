"""The study's table, of what is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embodied.core.intervals import bootstrap_mean, paired_bootstrap, wilson
from embodied.core.rundir import RunDir

HEAD = (
    "| contender | parameters | gradient steps | trained (s) | threads | score (95 %) | "
    "mean max coverage | success (95 %) | score − LeRobot's best (95 %) | chunk (ms) |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Entry:
    """A contender's row. known: what its training left. peaks: of each seed's episode."""

    name: str
    known: dict[str, Any]
    peaks: list[dict[str, float]]

    def values(self, signal: str) -> list[float]:
        """Greatest value of a signal in each episode."""
        return [peak[signal] for peak in self.peaks]

    @property
    def score(self) -> float:
        """Mean over episodes of the greatest min(1, coverage / 0.95)."""
        return float(np.mean(self.values("reward")))


def entry(run: RunDir, name: str, sampler: str, seeds: Sequence[int]) -> Entry | None:
    """None while something is missing."""
    known = [row for row in run.read("metrics", "trained") if row["sampler"] == sampler]
    found = {row["seed"]: row["peaks"] for row in run.read("metrics", sampler)}
    if not known or any(seed not in found for seed in seeds):
        return None
    return Entry(f"{name} {sampler}", known[-1], [found[seed] for seed in seeds])


def markdown(entries: Sequence[Entry]) -> str:
    """Rows under their head; differences are paired, over the same start states."""
    theirs = [e for e in entries if e.name.startswith("lerobot")]
    best = max(theirs, key=lambda e: e.score, default=None)
    return "\n".join([HEAD, *(_line(e, best) for e in entries)])


def _line(e: Entry, best: Entry | None) -> str:
    scores, coverage = e.values("reward"), e.values("coverage")
    won, n = int(sum(value > 0 for value in e.values("success"))), len(e.peaks)
    low, high = wilson(won, n)
    difference = "–"
    if best is not None and e is not best:
        difference = "{:+.3f} ({:+.3f} to {:+.3f})".format(
            *paired_bootstrap(scores, best.values("reward"))
        )
    cells = [
        e.name,
        f"{e.known['parameters'] / 1e6:.2f} M",
        f"{e.known['steps']:,}",
        f"{e.known['seconds']:.0f}",
        str(e.known["threads"]),
        f"{e.score:.3f} {_interval(scores)}",
        f"{np.mean(coverage):.3f} {_interval(coverage)}",
        f"{won}/{n} ({100 * low:.0f}–{100 * high:.0f} %)",
        difference,
        f"{e.known['latency_ms']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _interval(values: Sequence[float]) -> str:
    low, high = bootstrap_mean(values)
    return f"({low:.3f}–{high:.3f})"
