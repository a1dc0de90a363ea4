"""Which observations of recorded episodes show success. T actions, hence T + 1 observations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from embodied.buffer.read.episodes import EpisodeInfo
from embodied.core.errors import ConfigError
from embodied.core.seeds import make_rng


class HandLabel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a person says of one episode: first and last index, from 0, of each stretch of
    observations that show success; none if it never does."""

    stream: str
    episode: int
    successes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Labelled:
    """One episode. rows: row ids of its observations, int64 [T + 1]. positive: bool [T + 1]."""

    key: tuple[str, int]
    rows: np.ndarray
    positive: np.ndarray

    @property
    def successful(self) -> bool:
        """Whether any observation shows success."""
        return bool(self.positive.any())

    def history(self, steps: int) -> np.ndarray:
        """Rows [T + 1, steps] up to each observation; the first stands in for those before it."""
        at = np.arange(len(self.rows))[:, None] + np.arange(1 - steps, 1)
        return self.rows[np.maximum(at, 0)]


def read_hand_labels(path: Path) -> dict[tuple[str, int], HandLabel]:
    """Labels of a JSON file, a list of HandLabel, by stream and episode."""
    try:
        labels = msgspec.json.decode(path.read_bytes(), type=list[HandLabel])
    except FileNotFoundError:
        raise ConfigError(f"labels={path} does not exist") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"labels={path} cannot be read ({error}); a list of "
            '{"stream": "…", "episode": 0, "successes": [[40, 52]]} is right'
        ) from error
    return {(label.stream, label.episode): label for label in labels}


def label_episodes(
    episodes: Sequence[EpisodeInfo],
    positives: int,
    by_hand: Mapping[tuple[str, int], HandLabel],
) -> list[Labelled]:
    """Label closed episodes: the last `positives` observations of a successful one are positive,
    all others negative, unless a person has said otherwise.

    ConfigError for a label by hand of an episode, or an observation, that is not there.
    """
    found = {episode.key: episode for episode in episodes}
    for key in by_hand:
        if key not in found:
            raise ConfigError(
                f"a label by hand names episode {key[1]} of stream '{key[0]}', which is not there"
            )
    return [_label(episode, positives, by_hand.get(episode.key)) for episode in episodes]


def _label(episode: EpisodeInfo, positives: int, by_hand: HandLabel | None) -> Labelled:
    rows = np.append(episode.rows, episode.final_row)
    positive = np.zeros(len(rows), np.bool_)
    if by_hand is None:
        positive[-positives:] = episode.success
        positive[0] = False
        return Labelled(episode.key, rows, positive)
    for first, last in by_hand.successes:
        if not 0 <= first <= last < len(rows):
            raise ConfigError(
                f"a label by hand says {first} to {last} of episode {episode.episode} of stream "
                f"'{episode.stream}', whose observations are 0 to {len(rows) - 1}"
            )
        positive[first : last + 1] = True
    return Labelled(episode.key, rows, positive)


def divide(
    episodes: Sequence[Labelled], shares: Sequence[float], seed: int
) -> list[list[Labelled]]:
    """Divide episodes at random into a part for each share and a first one with what is left.

    Successful and failed ones are divided apart; a part with a share has one of each at least, if
    there are as many as parts. ConfigError if there are too few successful ones.
    """
    parts: list[list[Labelled]] = [[] for _ in range(len(shares) + 1)]
    for successful in (True, False):
        group = [episode for episode in episodes if episode.successful == successful]
        if successful and len(group) < len(parts):
            raise ConfigError(
                f"{len(group)} successful episodes; at least {len(parts)} are needed: to learn "
                "from, to choose the threshold by, and to test with"
            )
        order = make_rng(seed, "division", str(successful)).permutation(len(group))
        enough = len(group) >= len(parts)
        counts = [max(int(enough), round(share * len(group))) for share in shares]
        if sum(counts) >= len(group):
            counts = [int(enough)] * len(shares)
        cuts = np.cumsum([len(group) - sum(counts), *counts])[:-1]
        for part, chosen in zip(parts, np.split(order, cuts), strict=True):
            part += [group[index] for index in chosen]
    return parts


def balanced(
    episodes: Sequence[Labelled], steps: int, batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches without end, half of them positive: rows [B, steps] and float32 labels [B]."""
    rows = np.concatenate([episode.history(steps) for episode in episodes])
    positive = np.concatenate([episode.positive for episode in episodes])
    places = [np.flatnonzero(positive), np.flatnonzero(~positive)]
    counts = [batch_size // 2, batch_size - batch_size // 2]
    labels = np.repeat(np.array([1, 0], np.float32), counts)
    while True:
        pairs = zip(places, counts, strict=True)
        chosen = np.concatenate([rng.choice(of, count) for of, count in pairs])
        yield rows[chosen], labels
