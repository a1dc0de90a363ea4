"""Closed episodes of a buffer as a LeRobotDataset v3."""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from embodied.buffer.interchange import lerobot
from embodied.buffer.interchange.recording import episode_arrays, tick_hz
from embodied.buffer.steps.schema import RESERVED
from embodied.buffer.upkeep.contents import Contents, Episode
from embodied.buffer.upkeep.maintenance import appearing
from embodied.core.errors import ConfigError, EmbodiedError, SpecError
from embodied.core.files import write_atomic

_SCALAR = {"shape": (1,), "names": None}


def export(
    contents: Contents,
    episodes: Sequence[Episode],
    target: Path,
    *,
    fps: int | None = None,
    images: Literal["video", "image"] = "video",
    final: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[int, int]:
    """Write complete episodes with the same arrays to the folder `target`, which must not exist;
    it appears whole or not at all.

    fps: steps a second; None: by the steps' times. images: as H.264 videos (LeRobot's settings:
    yuv420p, CRF 30) or as PNG files, which lose nothing. final: keep each episode's final
    observation as a last frame. on_step: called for each frame. Returns (episodes, frames).
    Raises MissingDependencyError without the extra [lerobot], ConfigError and SpecError for what
    LeRobot cannot hold.
    """
    if target.exists():
        raise ConfigError(f"{target} is already there; choose another folder for the export")
    first = episode_arrays(contents, episodes[0])
    fps = _rate(first) if fps is None else fps
    features = _features(first, images)
    frames = 0
    notes = []
    with appearing(target) as folder, _quiet():
        data = _create(folder, fps, features)
        for episode in episodes:
            arrays = episode_arrays(contents, episode)
            length = len(arrays["action"]) - (not final)
            if length < 2:
                raise ConfigError(
                    f"{episode} has one step, too few for LeRobot's statistics: export it with "
                    "its final observation (final=true)"
                )
            columns = _columns(arrays, features)
            for index in range(length):
                data.add_frame(
                    {name: column[index] for name, column in columns.items()}
                    | {"task": episode.task}
                )
                on_step()
            _save(data, str(episode))
            notes.append(lerobot.EpisodeNote(*episode.key, episode.seed, length))
            frames += length
        data.finalize()
        shutil.rmtree(folder / "images", ignore_errors=True)
        kinds = {
            name: (array.dtype.name, array.shape[1:])
            for name, array in first.items()
            if name not in RESERVED or name == "action"
        }
        note = lerobot.Note(format=1, features=kinds, episodes=notes)
        write_atomic(folder / lerobot.NOTE, msgspec.json.format(msgspec.json.encode(note)))
    return len(episodes), frames


@contextmanager
def _quiet() -> Any:
    """Without LeRobot's progress bars of its own and the encoder's reports on stderr."""
    try:
        import datasets
        from av import logging as av_logging
    except ModuleNotFoundError as error:
        raise lerobot.missing(error.name) from error
    av_logging.set_libav_level(av_logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        av_logging.set_libav_level(av_logging.INFO)  # libav's own default


def _create(folder: Path, fps: int, features: dict[str, Any]) -> Any:
    """An empty LeRobotDataset."""
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ModuleNotFoundError as error:
        raise lerobot.missing(error.name) from error
    return LeRobotDataset.create(
        f"local/{folder.name.strip('.')}",
        fps=fps,
        features=features,
        root=folder,
        use_videos=any(feature["dtype"] == "video" for feature in features.values()),
        vcodec="h264",
        video_backend="pyav",
    )


def _save(data: Any, where: str) -> None:
    """End an episode. LeRobot 0.4.4 stacks values of shape [1] to [n, 1], each of which it then
    converts by float(), what NumPy 2.4 no longer does: it gets them as scalars."""
    for name, feature in data.features.items():
        values = data.episode_buffer[name]
        if feature["shape"] == (1,) and isinstance(values, list):
            data.episode_buffer[name] = [np.asarray(value).reshape(()) for value in values]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of its histograms of bool columns
        try:
            data.save_episode(parallel_encoding=False)
        except (TypeError, ValueError, RuntimeError) as error:
            raise EmbodiedError(f"LeRobot cannot store {where}: {error}") from error


def _rate(arrays: Mapping[str, np.ndarray]) -> int:
    rate = tick_hz(arrays)
    if rate is None:
        raise ConfigError("the steps were recorded without times: give their rate as fps=...")
    if rate < 0.5 or abs(rate - round(rate)) > 0.05 * rate:
        raise ConfigError(f"the steps' rate is {rate:.3g} Hz; LeRobot wants a whole one: give fps")
    return round(rate)


def _features(arrays: Mapping[str, np.ndarray], images: str) -> dict[str, Any]:
    """LeRobot's declaration of every column."""
    taken = {*lerobot.ITS_OWN, *lerobot.STEP_COLUMNS.values()}
    taken |= {lerobot.REWARD, lerobot.DONE, lerobot.FINAL}
    features: dict[str, Any] = {}
    for name, array in arrays.items():
        if name in RESERVED and name != "action":
            continue
        if "/" in name or name in taken:
            raise SpecError(
                f"observation '{name}' cannot be exported: LeRobot "
                + ("uses this name itself" if name in taken else "allows no '/' in names")
            )
        shape = array.shape[1:]
        if lerobot.is_picture(array):
            if images == "video" and (shape[0] % 2 or shape[1] % 2):
                raise SpecError(
                    f"'{name}' has {shape[0]}×{shape[1]} pixels; H.264 wants even sides: export it "
                    "with images=image"
                )
            names = ["height", "width", "channels"]
            features[name] = {"dtype": images, "shape": (*shape[:2], 3), "names": names}
        elif len(shape) > 5 or 0 in shape:
            raise SpecError(f"'{name}' has shape {list(shape)}; LeRobot holds 1 to 5 axes")
        else:
            features[name] = {"dtype": array.dtype.name, "shape": shape or (1,), "names": None}
    features[lerobot.REWARD] = {"dtype": "float32", **_SCALAR}
    for name in (lerobot.DONE, lerobot.FINAL):
        features[name] = {"dtype": "bool", **_SCALAR}
    for name, column in lerobot.STEP_COLUMNS.items():
        features[column] = {"dtype": arrays[name].dtype.name, **_SCALAR}
    return features


def _columns(
    arrays: Mapping[str, np.ndarray], features: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """LeRobot's columns of an episode. Its last frame, the final observation, repeats the other
    values of the one before (but for times)."""
    length = len(arrays["action"])
    repeated = np.minimum(np.arange(length), length - 2)
    columns: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name not in RESERVED and name in features:
            if features[name]["dtype"] in ("video", "image") and array.shape[3] == 1:
                array = np.repeat(array, 3, axis=3)
            columns[name] = array if array.ndim > 1 else array[:, None]
    action = arrays["action"][repeated]
    columns["action"] = action if action.ndim > 1 else action[:, None]
    columns[lerobot.REWARD] = arrays["reward"][repeated].astype(np.float32)[:, None]
    done = arrays["terminated"] | arrays["truncated"]
    columns[lerobot.DONE] = done[repeated][:, None]
    columns[lerobot.FINAL] = (np.arange(length) == length - 1)[:, None]
    for name, column in lerobot.STEP_COLUMNS.items():
        values = arrays[name] if name == "t_ns" else arrays[name][repeated]
        columns[column] = values[:, None]
    return columns
