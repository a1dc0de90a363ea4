"""How good a success classifier is, by observations and by episodes; and its threshold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embodied.core.errors import ConfigError

LEAST_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts of observations: truly and falsely positive and negative."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int

    @property
    def precision(self) -> float:
        """Share of the calls that are right; 1 without a call."""
        called = self.true_positive + self.false_positive
        return self.true_positive / called if called else 1.0

    @property
    def recall(self) -> float:
        """Share of what is success that is called so; 1 if nothing is."""
        there = self.true_positive + self.false_negative
        return self.true_positive / there if there else 1.0

    @property
    def accuracy(self) -> float:
        """Share that is called what it is."""
        right = self.true_positive + self.true_negative
        return right / max(1, right + self.false_positive + self.false_negative)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """How episodes would have ended, had the classifier judged them.

    in_time: successful ones judged so at a labelled observation. early: before the first one, on
    average by early_by observations. missed: not within the recording. refused, accepted: failed
    ones that would not, or would, have succeeded.
    """

    in_time: int
    early: int
    missed: int
    refused: int
    accepted: int
    early_by: float = 0.0


@dataclass(frozen=True, slots=True)
class Scored:
    """An episode's labels, bool [T + 1], and the probabilities of success, [T + 1]."""

    positive: np.ndarray
    probability: np.ndarray


def confusion(episodes: Sequence[Scored], threshold: float) -> Confusion:
    """Of all observations."""
    positive = np.concatenate([episode.positive for episode in episodes])
    called = np.concatenate([episode.probability for episode in episodes]) >= threshold
    pairs = ((True, True), (False, True), (True, False), (False, False))
    counts = [int(((positive == label) & (called == call)).sum()) for label, call in pairs]
    return Confusion(*counts)


def ends_at(probability: np.ndarray, threshold: float, patience: int) -> int | None:
    """Index of the observation at which `patience` in a row, the first observation left out, have
    been called success; None if never."""
    count = 0
    for index in range(1, len(probability)):
        count = count + 1 if probability[index] >= threshold else 0
        if count >= patience:
            return index
    return None


def verdicts(episodes: Sequence[Scored], threshold: float, patience: int) -> Verdicts:
    """Of all episodes."""
    counts = dict.fromkeys(("in_time", "early", "missed", "refused", "accepted"), 0)
    too_soon: list[int] = []
    for episode in episodes:
        end = ends_at(episode.probability, threshold, patience)
        if not episode.positive.any():
            counts["refused" if end is None else "accepted"] += 1
        elif end is None:
            counts["missed"] += 1
        else:
            first = int(episode.positive.argmax())
            counts["early" if end < first else "in_time"] += 1
            too_soon += [first - end] if end < first else []
    return Verdicts(**counts, early_by=float(np.mean(too_soon)) if too_soon else 0.0)


def choose_threshold(episodes: Sequence[Scored], false_positives: float) -> float:
    """The least threshold, LEAST_THRESHOLD at least, at which no more than a share
    `false_positives` of the negative observations is called success.

    ConfigError if not even a probability of 1 is certain enough.
    """
    negative = np.concatenate([e.probability[~e.positive] for e in episodes])
    allowed = int(false_positives * len(negative))
    ranked = np.sort(negative)[::-1]
    if allowed >= len(ranked) or ranked[allowed] < LEAST_THRESHOLD:
        return LEAST_THRESHOLD
    threshold = float(np.nextafter(ranked[allowed], np.inf))
    if threshold > 1:
        raise ConfigError(
            f"more than {false_positives:.3g} of the negative observations look like success for "
            "certain: label more episodes, let it see more (observations), or allow more "
            "(false_positives)"
        )
    return threshold
