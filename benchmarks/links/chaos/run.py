"""A run that is struck by one fault after the other, and the account of it."""

import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import msgspec

from benchmarks.links.chaos.faults import sequence
from benchmarks.links.chaos.lab import Lab
from benchmarks.links.chaos.ledger import check_steps
from benchmarks.links.chaos.recovery import Observer, Recovery, Watch

_BEGIN_S = 180.0
_DELIVER_S = 120.0
_QUIET_S = 2.0
_PAUSE_S = (0.2, 1.5)


class Account(msgspec.Struct, frozen=True):
    """What was seen in all. steps: the host's, each once in its spool and at the learner's site.
    published: weights by the learner; acted: whole ones seen at the host, compared: of these, with
    what the learner still had. faults: promises that did not hold."""

    steps: int
    published: int
    acted: int
    compared: int
    recoveries: tuple[Recovery, ...]
    faults: tuple[str, ...]


def suffer(
    folder: Path, kills: int, seed: int, timeout_s: float, report: Callable[[Recovery], None]
) -> Account:
    """Start a learner's site and a robot's host under `folder`, strike so many times, end them.

    timeout_s: for all to be back after a fault. report: told of each fault. Raises StuckError if
    something does not come back, does not end, or does not deliver.
    """
    rng = Random(f"{seed}/faults")
    recoveries: list[Recovery] = []
    with Lab(folder, seed) as lab:
        watch = Watch(lab)
        try:
            _begin(lab, watch)
            for fault in sequence(kills, seed):
                _pause(lab, watch, rng.uniform(*_PAUSE_S))
                observer = Observer(lab, watch, fault)
                fault.strike(lab, rng)
                recoveries.append(observer.measure(timeout_s))
                report(recoveries[-1])
            _deliver(lab, watch)
        finally:
            watch.close()
        weights = watch.weights
        steps, faults = check_steps(lab, weights.published)
        faults += weights.faults + [fault for one in recoveries for fault in one.faults]
        return Account(
            steps=steps,
            published=weights.published,
            acted=len(weights.acted),
            compared=weights.compared,
            recoveries=tuple(recoveries),
            faults=tuple(faults),
        )


def _begin(lab: Lab, watch: Watch) -> None:
    """Until the robot has acted by weights that came over the link, and a killed learner can go
    on from a checkpoint."""

    def acts() -> bool:
        watch.refresh()
        return max(watch.buffer.versions, default=0) >= 1 and any(lab.learner.checkpoints.iterdir())

    lab.until(acts, _BEGIN_S, lambda: "the robot does not act by what was learned")


def _pause(lab: Lab, watch: Watch, duration_s: float) -> None:
    until_s = time.monotonic() + duration_s

    def over() -> bool:
        watch.refresh()
        device = lab.device()
        return time.monotonic() > until_s and device is not None and bool(device.holder)

    lab.until(over, duration_s + _BEGIN_S, lambda: "nobody holds the robot")


def _deliver(lab: Lab, watch: Watch) -> None:
    """Let the robot stop, wait for what is on its way, then end both sites."""
    lab.stop("agent")
    steps, grown_s = 0, time.monotonic()

    def delivered() -> bool:
        nonlocal steps, grown_s
        watch.refresh()
        if len(watch.spool.payloads) > steps:
            steps, grown_s = len(watch.spool.payloads), time.monotonic()
        quiet = time.monotonic() - grown_s > _QUIET_S
        return quiet and watch.spool.payloads.keys() == watch.buffer.payloads.keys()

    lab.until(delivered, _DELIVER_S, lambda: "not all steps are delivered")
    lab.stop("site")
    lab.stop("train")
    watch.refresh()
