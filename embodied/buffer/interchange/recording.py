"""Episodes of a buffer as arrays, for exports."""

from collections.abc import Mapping

import numpy as np

from embodied.buffer.steps.schema import FLAGS
from embodied.buffer.upkeep.contents import Contents, Episode
from embodied.buffer.upkeep.maintenance import Selection
from embodied.core.errors import ConfigError

_COLUMNS = {
    "reward": np.float32,
    "policy_version": np.int64,
    "t_ns": np.int64,
    **dict.fromkeys(FLAGS, np.bool_),
}


def episode_arrays(contents: Contents, episode: Episode) -> dict[str, np.ndarray]:
    """Observation features, action, reward, policy_version, t_ns and flags of a closed episode:
    each [T + 1, …], of the final observation last. Raises CorruptDataError that names a step."""
    steps = [stored.step() for stored in contents.of_episode(episode)]
    arrays = {key: np.stack([s.observation[key] for s in steps]) for key in steps[0].observation}
    arrays["action"] = np.stack([step.action for step in steps])
    for name, dtype in _COLUMNS.items():
        arrays[name] = np.array([getattr(step, name) for step in steps], dtype)
    return arrays


def closed_episodes(
    contents: Contents,
    selection: Selection,
    *,
    successful: bool = False,
    limit: int | None = None,
) -> list[Episode]:
    """Selected episodes that are complete, in the order in which they began.

    Raises ConfigError for a stream, task or number that is not there, if there is nothing to
    select, and if the arrays of two selected streams differ.
    """
    selection.check(contents)
    chosen = [
        episode
        for episode in contents.episodes.values()
        if episode.closed and episode in selection and (episode.success or not successful)
    ][:limit]
    if not chosen:
        what = "successful" if successful else "complete"
        raise ConfigError(f"{contents.path} has no {what} episode of what was selected")
    first = chosen[0]
    for episode in chosen[1:]:
        contents.schemas[first.parts[0].schema].check_same_arrays(
            contents.schemas[episode.parts[0].schema],
            f"stream '{episode.key[0]}'",
            f"stream '{first.key[0]}', which is exported with it (choose by streams=[…]),",
        )
    return chosen


def tick_hz(arrays: Mapping[str, np.ndarray]) -> float | None:
    """Steps a second by an episode's times; None if it was recorded without."""
    between_ns = np.diff(arrays["t_ns"])
    median_ns = float(np.median(between_ns)) if len(between_ns) else 0.0
    return 1e9 / median_ns if median_ns > 0 else None
