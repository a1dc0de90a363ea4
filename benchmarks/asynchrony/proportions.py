"""Generation and training at once, beside each alone and beside both in turns.

A proportion is of the time of an episode to the time of the gradient steps that are made for it.
Those steps are whole rows of the learner's metrics, and the robot is as fast as the proportion
then wants it: it takes real time and costs little. Each repetition measures, in one run and in
turns: an episode alone, its gradient steps alone (both together: the synchronous way), and two
episodes during which the learner goes on. Figures are medians of the repetitions, ratios of the
repetitions' ratios.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.asynchrony.session import LOG_STEPS, SETTLE_S, Session
from benchmarks.buffer.measure import Row, spread

MOST = 1.15
TICKS, TICK_HZ = 60, 20.0
"""Of an episode of pointmass, and of its robot at speed 1."""

TASK = (
    *("task=pointmass", f"sim.horizon={TICKS}", "demonstrations.episodes=4", "actors.count=1"),
    *("policy=flow", "policy.n_obs_steps=1", "policy.horizon=8", "policy.n_action_steps=4"),
    *("policy.num_steps=4", "+policy.network.width=256", "+policy.network.depth=2"),
    "learner.batch_size=256",
    "learner.learning_rate=1e-9",  # what never succeeds has episodes of one length
)
_EPISODE_S = 3.0
_CALIBRATION_ROWS = 6
_PROBE = np.random.default_rng(0).normal(size=(128, 128))


@dataclass(frozen=True, slots=True)
class Proportion:
    """generate, train: in any unit. speedup: USER's asynchronous way over its synchronous one, of
    episodes and of updates (arXiv 2602.07837); none for a proportion of ours."""

    generate: float
    train: float
    speedup: tuple[float, float] | None = None


PROPORTIONS = {
    # USER: s an episode, s an update, asynchronously; updates an episode, synchronously.
    "π0 + HG-DAgger": Proportion(37.54, 7.90 * 45.07 / 45.01, (1.20, 5.70)),
    "CNN + SAC": Proportion(13.11, 0.14 * 20.29 / 0.64, (1.55, 4.61)),
    "equal": Proportion(1.0, 1.0),
}


def plan(proportion: Proportion, step_s: float) -> tuple[int, float]:
    """Rows of gradient steps for an episode of about _EPISODE_S, and the robot's speed then."""
    train_s = _EPISODE_S * proportion.train / proportion.generate
    rows = max(1, round(train_s / step_s / LOG_STEPS))
    episode_s = rows * LOG_STEPS * step_s * proportion.generate / proportion.train
    return rows, TICKS / TICK_HZ / episode_s


def calibrate(folder: Path) -> float:
    """Seconds of a gradient step, alone."""
    with Session(folder, TASK) as session:
        return session.learn(_CALIBRATION_ROWS) / (_CALIBRATION_ROWS * LOG_STEPS)


def probe() -> float:
    """Seconds of the same arithmetic each time: how much the machine itself varies."""
    began_s = time.perf_counter()
    for _ in range(200):
        np.matmul(_PROBE, _PROBE)
    return time.perf_counter() - began_s


@dataclass(frozen=True, slots=True)
class Repetition:
    """Seconds of an episode and of its gradient steps, alone and together; of the probe."""

    generate: float
    train: float
    generate_beside: float
    train_beside: float
    probe: float


def together(session: Session, rows: int) -> tuple[float, float]:
    """Seconds of an episode, and of so many rows, while robot and learner go on at once."""
    ends_s: list[float] = []
    rows_s: list[float] = []
    episodes, learned = session.episodes.look(), session.learned.look()
    began_s = time.perf_counter()

    def looked() -> bool:
        now_s = time.perf_counter()
        ends_s.extend([now_s] * (session.episodes.look() - episodes - len(ends_s)))
        rows_s.extend([now_s] * (session.learned.look() - learned - len(rows_s)))
        return len(ends_s) >= 2 and len(rows_s) > rows

    session.go("actor", "learner")
    session.until(looked)
    session.go()
    taken_s = (rows_s[-1] - rows_s[0]) / (len(rows_s) - 1)
    # The first of the episodes was SETTLE_S old.
    return (ends_s[-1] - began_s + SETTLE_S) / len(ends_s), taken_s * rows


def repeat(session: Session, rows: int) -> Repetition:
    """One repetition, from and to where an episode ends and a row is written."""
    probed_s = probe()
    generate_s, train_s = session.generate(1), session.learn(rows)
    beside = together(session, rows)
    session.settle()
    return Repetition(generate_s, train_s, *beside, probed_s)


def measure(folder: Path, name: str, step_s: float, repetitions: int) -> list[Row]:
    """Rows of one proportion. step_s: see calibrate."""
    rows, speed = plan(PROPORTIONS[name], step_s)
    overrides = (*TASK, f"actors.speed={speed:.6f}", f"learner.publish_every={rows * LOG_STEPS}")
    with Session(folder, overrides) as session:
        found = [repeat(session, rows) for _ in range(repetitions)]
    return table(PROPORTIONS[name], rows, found)


def table(proportion: Proportion, rows: int, found: list[Repetition]) -> list[Row]:
    """What the repetitions say, in rows."""
    wanted = proportion.train / proportion.generate
    had = statistics.median(r.train / r.generate for r in found)
    noise = f"probe {spread([r.probe for r in found])}"
    lines: list[Row] = []
    stages = {
        "generation": ("s/episode", [(r.generate, r.generate_beside) for r in found]),
        "training": (f"s/{rows * LOG_STEPS} steps", [(r.train, r.train_beside) for r in found]),
    }
    for place, (stage, (unit, pairs)) in enumerate(stages.items()):
        alone, beside = zip(*pairs, strict=True)
        turns = [r.generate + r.train for r in found]
        gain = statistics.median(a / b for a, b in zip(turns, beside, strict=True))
        most = statistics.median(a / b for a, b in zip(turns, alone, strict=True))
        users = "" if proportion.speedup is None else f"; USER {proportion.speedup[place]:.2f}"
        slower = statistics.median(b / a for a, b in pairs)
        shares = f"{had:.3f} to 1 episode, wanted {wanted:.3f}; " if place else ""
        lines += [
            Row(stage, "alone", statistics.median(alone), unit, note=shares + spread(alone)),
            Row(
                stage,
                "together",
                statistics.median(beside),
                unit,
                slower,
                MOST,
                at_most=True,
                note=f"ratio to alone; {spread(beside)}; {noise}",
            ),
            Row(
                stage,
                "in turns",
                statistics.median(turns),
                unit,
                gain,
                note=f"ratio to together; {most:.2f} if together were alone{users}",
            ),
        ]
    return lines
