"""Which records the real samplers ask for, without reading any: traces for cache policies."""

from collections.abc import Callable, Iterator

import numpy as np

from embodied.buffer.read.episodes import EpisodeInfo
from embodied.buffer.sample.draws import DrawStrategy, Recency, Uniform
from embodied.buffer.sample.priorities import Prioritised
from embodied.buffer.sample.samplers import Draw, WindowSampler, WindowSpec
from embodied.buffer.sample.sources import MixtureDraw, MixtureSampler
from embodied.buffer.steps.schema import Feature

BATCH = 256
_LENGTH = 200
_IMAGE = "image"


class Episodes:
    """Closed episodes whose rows are numbered from `first` on; a StepReader that reads nothing."""

    def __init__(self, steps: int, first: int = 0) -> None:
        self._next = first
        self._closed: list[EpisodeInfo] = []
        self.grow(steps)

    def grow(self, steps: int) -> None:
        """So many more steps, rounded up to whole episodes."""
        for _ in range(-(-steps // _LENGTH)):
            rows = np.arange(self._next, self._next + _LENGTH)
            self._next += _LENGTH + 1
            number = len(self._closed)
            self._closed.append(
                EpisodeInfo(
                    "r", number, "t", 0, rows, self._next - 1, True, False, 0, (number, number)
                )
            )

    def feature(self, name: str) -> Feature:
        """An image, or the action."""
        image = name == _IMAGE
        return Feature(name, "uint8" if image else "float32", (8, 8, 3) if image else (7,))

    def closed_episodes(self, since: int = 0) -> list[EpisodeInfo]:
        """All of them."""
        return self._closed[since:]

    def removed_episodes(self, since: int = 0) -> list[tuple[str, int]]:
        """None."""
        return []


def rows_of(draw: Draw | MixtureDraw) -> np.ndarray:
    """Rows whose images a draw needs."""
    parts = draw.parts if isinstance(draw, MixtureDraw) else (draw,)
    return np.concatenate([part.rows.observed.ravel() for part in parts if part is not None])


Trace = Callable[[int, int], Iterator[np.ndarray]]
"""(steps at the end, batches) → the rows of each batch."""


def _sampler(episodes: Episodes, strategy: DrawStrategy | None = None) -> WindowSampler:
    return WindowSampler(episodes, WindowSpec(1, 16, (_IMAGE,)), strategy=strategy)


def _growing(strategy: Callable[[int], DrawStrategy], *, fixed: bool = False) -> Trace:
    """Steps come at a steady pace, from a fifth of all at the beginning; or all are there."""

    def batches(steps: int, count: int) -> Iterator[np.ndarray]:
        start = steps if fixed else steps // 5
        episodes = Episodes(start)
        sampler = _sampler(episodes, strategy(steps))
        rng = np.random.default_rng(8)
        errors = rng.lognormal(0.0, 1.0, 2 * steps)
        due = 0.0
        for _ in range(count):
            due += (steps - start) / count
            if due >= _LENGTH:
                episodes.grow(_LENGTH)
                due -= _LENGTH
                sampler.refresh()
            draw = sampler.draw(BATCH, rng)
            rows = rows_of(draw)
            if sampler.weighted:  # the error falls with every visit
                errors[rows] *= 0.8
                sampler.update(draw, errors[rows])
            yield rows

    return batches


def _mixed(steps: int, count: int) -> Iterator[np.ndarray]:
    """Demonstrations, a tenth of all steps, and what robots record meanwhile: half and half."""
    demonstrations, online = Episodes(steps // 10, first=10 * steps), Episodes(steps // 10)
    sampler = MixtureSampler(
        {"demonstrations": _sampler(demonstrations), "online": _sampler(online)},
        {"demonstrations": 0.5, "online": 0.5},
    )
    rng = np.random.default_rng(9)
    due = 0.0
    for _ in range(count):
        due += 0.8 * steps / count
        if due >= _LENGTH:
            online.grow(_LENGTH)
            due -= _LENGTH
            sampler.refresh()
        yield rows_of(sampler.draw(BATCH, rng))


TRACES: dict[str, Trace] = {
    "uniform, no new steps": _growing(lambda steps: Uniform(), fixed=True),
    "uniform, growing": _growing(lambda steps: Uniform()),
    "recency, last quarter": _growing(lambda steps: Recency(Recency.Config(last_steps=steps // 4))),
    "recency, half-life a tenth": _growing(
        lambda steps: Recency(Recency.Config(half_life_steps=steps / 10))
    ),
    "prioritised": _growing(lambda steps: Prioritised()),
    "demonstrations and online, half and half": _mixed,
}
