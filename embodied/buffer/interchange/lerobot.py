"""LeRobotDataset v3: the names it uses, and the note that an export of ours leaves beside it.

A frame holds an observation and the action taken upon it. LeRobot has columns of its own for
rewards and ends (`next.…`); what else a step has goes by `complementary_info.…`, LeRobot's prefix
for further values of a transition. The final observation is a last frame whose other values repeat
the frame before it, as in the recordings that LeRobot makes of its simulators.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, CorruptDataError, MissingDependencyError

INFO = "meta/info.json"
NOTE = "meta/embodied.json"
TASKS = "meta/tasks.parquet"

REWARD, DONE = "next.reward", "next.done"
FINAL = "complementary_info.final"
STEP_COLUMNS = {
    "terminated": "next.terminated",
    "truncated": "next.truncated",
    "success": "next.success",
    "intervention": "complementary_info.intervention",
    "held": "complementary_info.held",
    "policy_version": "complementary_info.policy_version",
    "t_ns": "complementary_info.t_ns",
}
"""Column of each field of a step but reward and final."""

ITS_OWN = ("timestamp", "frame_index", "episode_index", "index", "task_index", "task")
"""Columns that LeRobot writes itself."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_Side = Annotated[int, msgspec.Meta(ge=0, le=1 << 26)]
_FIELDS = re.compile(r"\{(video_key|(?:chunk|file)_index(?::0?[1-9]d)?)\}")


class FeatureInfo(msgspec.Struct, frozen=True):
    """A column by info.json. dtype: numpy's name, "image", "video" or "string"."""

    dtype: str
    shape: Annotated[tuple[_Side, ...], msgspec.Meta(max_length=8)]
    names: Any = None

    @property
    def is_image(self) -> bool:
        """Whether it is a picture, stored as a file or in a video."""
        return self.dtype in ("image", "video")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a picture, which info.json may give channels first."""
        if len(self.shape) != 3:
            raise ValueError(f"a picture of shape {list(self.shape)}")
        a, b, c = self.shape
        first = str(self.names[0]).startswith("channel") if isinstance(self.names, list) else False
        return (b, c, a) if first or (c not in (1, 3) and a in (1, 3)) else (a, b, c)


class Info(msgspec.Struct, frozen=True):
    """meta/info.json, as far as it is needed."""

    codebase_version: str
    fps: Annotated[float, msgspec.Meta(gt=0)]
    total_episodes: _Count
    features: dict[str, FeatureInfo]
    data_path: str
    video_path: str | None = None


class EpisodeNote(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Whose an exported episode is. frames: those in the data set."""

    stream: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    episode: _Count
    seed: int
    frames: _Count


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """meta/embodied.json: what LeRobot has no place for. features: dtype and shape of each array
    of an observation, and of the action."""

    format: int
    features: dict[str, tuple[str, tuple[_Side, ...]]]
    episodes: list[EpisodeNote]


def read_json(path: Path, kind: Any) -> Any:
    """A file of the data set as `kind`. Raises CorruptDataError that names it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise CorruptDataError(f"{path} cannot be read: {error}") from error


def read_info(root: Path) -> Info:
    """meta/info.json of a data set. Raises ConfigError for a folder that is none of version 3."""
    if not (root / INFO).is_file():
        raise ConfigError(
            f"{root} is no LeRobot data set: it has no {INFO}. Give the folder that holds meta/, "
            "data/ and videos/"
        )
    info = read_json(root / INFO, Info)
    if not info.codebase_version.startswith("v3."):
        raise ConfigError(
            f"{root} has LeRobot's format {info.codebase_version}; format v3 is read. Convert it "
            "with python -m lerobot.datasets.v30.convert_dataset_v21_to_v30"
        )
    return info


def file_path(root: Path, template: str | None, chunk: int, file: int, key: str = "") -> Path:
    """A data or video file by info.json's template. Raises CorruptDataError for an unsafe one."""
    plain = _FIELDS.sub("", template or "")
    relative = Path(template or "")
    if not template or "{" in plain or "}" in plain or relative.is_absolute():
        raise CorruptDataError(f"{root / INFO}: path template {template!r} cannot be used")
    named = Path(template.format(chunk_index=chunk, file_index=file, video_key=key))
    if ".." in named.parts or named.is_absolute() or "\0" in str(named):
        raise CorruptDataError(
            f"{root / INFO}: path template {template!r} with {key[:80]!r} leaves the data set"
        )
    return root / named


def is_picture(array: np.ndarray) -> bool:
    """Whether frames [n, …] are pictures: uint8 [n, h, w, 3] or [n, h, w, 1]."""
    return array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] in (1, 3)


def missing(package: str | None) -> MissingDependencyError:
    """The error for a package of the extra that is not installed."""
    return MissingDependencyError(
        f"LeRobot data sets need the package '{package}', which is not installed; "
        "pip install 'embodied-stack[lerobot]' brings it"
    )
