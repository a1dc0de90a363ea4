"""A LeRobotDataset v3 folder as episodes, read offline and from front to back."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from embodied.buffer.interchange import lerobot, lerobot_tables
from embodied.buffer.interchange.dataset import Episode, Side, fitted, last_step, source_stream
from embodied.buffer.interchange.lerobot_tables import EpisodeRow
from embodied.buffer.interchange.video import VideoFile
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, CorruptDataError


class LeRobotEpisodes:
    """Episodes that LeRobot, or `embodied buffer export`, has recorded.

    What LeRobot need not have:

    - The final observation. `final: last_frame` takes an episode's last frame for it and drops
      its action, so that nothing is made up; `final: repeat` keeps that action, and with it its
      reward and success, and repeats the last frame as what came of it. `auto`: the last frame if
      it is marked (`complementary_info.final`) or padded as LeRobot pads recordings of its
      simulators (`next.done` of the last two frames) or if there are neither rewards nor ends to
      be lost, as in recordings of people; else repeat.
    - Ends. Without `next.terminated` and `next.truncated`, the last step is terminated if
      `next.done` says so and `next.success` does not deny it, else truncated.
    - Success, who acted, and rewards: see Config; rewards are 0.
    """

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """path: folder with meta/, data/, videos/. task: name to give to its episodes; None: the
        data set's own. only_tasks: take these of its tasks alone. observation: keys to take, or
        these and their names here; None: all that begin with "observation". image_size: [height,
        width] of all pictures (see `fitted`); None: their own. final: see above. expert: whether
        all actions are an expert's where the data set does not say. success: whether every episode
        succeeded where the data set does not say."""

        path: str
        task: str | None = None
        only_tasks: tuple[str, ...] = ()
        observation: tuple[str, ...] | dict[str, str] | None = None
        image_size: tuple[Side, Side] | None = None
        final: Literal["auto", "last_frame", "repeat"] = "auto"
        expert: bool = True
        success: bool = False

    def __init__(self, config: Config) -> None:
        self._config = config
        self._root = Path(config.path)
        self._info = lerobot.read_info(self._root)
        self._note: lerobot.Note | None = None
        if (self._root / lerobot.NOTE).is_file():
            self._note = lerobot.read_json(self._root / lerobot.NOTE, lerobot.Note)
        features = self._info.features
        self._keys = self._observation_keys(features)
        chosen = config.observation
        self._names: dict[str, str] = chosen if isinstance(chosen, dict) else {}
        if len(set(self._names.values())) < len(self._names):
            raise ConfigError(f"observation={self._names} gives one name to two keys")
        self._videos = {key: features[key] for key in self._keys if features[key].dtype == "video"}
        self._columns = [key for key in (*self._keys, "action") if key not in self._videos]
        known = (lerobot.REWARD, lerobot.DONE, lerobot.FINAL, *lerobot.STEP_COLUMNS.values())
        self._extra = [key for key in known if key in features]
        self._tasks = lerobot_tables.read_tasks(self._root)
        if unknown := sorted(set(config.only_tasks) - set(self._tasks.values())):
            raise ConfigError(
                f"{self._root} has no task {', '.join(unknown)}; it has "
                f"{'; '.join(sorted(self._tasks.values()))}"
            )
        self._episodes = lerobot_tables.read_episodes(self._root, list(self._videos))
        if self._note is not None and any(
            note.frames != episode.length
            for note, episode in zip(self._note.episodes, self._episodes, strict=False)
        ):
            raise CorruptDataError(
                f"{self._root / lerobot.NOTE} does not belong to these episodes: their lengths "
                "differ. Remove it to import them as a data set of unknown origin"
            )

    def _observation_keys(self, features: Mapping[str, lerobot.FeatureInfo]) -> list[str]:
        noted = [] if self._note is None else [k for k in self._note.features if k != "action"]
        keys = [
            key
            for key in features
            if (key in noted if noted else key.split(".")[0] == "observation")
            and features[key].dtype != "string"
        ]
        if self._config.observation is not None:
            if unknown := sorted(set(self._config.observation) - set(features)):
                raise ConfigError(
                    f"{self._root} has no {', '.join(unknown)}; its observations are "
                    f"{', '.join(keys)}"
                )
            keys = list(self._config.observation)
        if "action" not in features or not keys:
            raise ConfigError(
                f"{self._root} has the columns {', '.join(features)}; 'action' and at least one "
                "that begins with 'observation' are needed (or name them by observation=[…])"
            )
        for key in keys:
            try:
                _ = features[key].is_image and features[key].image_shape
            except ValueError as error:
                raise CorruptDataError(
                    f"{self._root / lerobot.INFO}: '{key}' is {error}"
                ) from error
        return keys

    def __len__(self) -> int:
        return len(self._episodes)

    @property
    def tasks(self) -> frozenset[str]:
        """See Dataset."""
        if self._config.task is not None:
            return frozenset({self._config.task})
        return frozenset(self._config.only_tasks or self._tasks.values())

    def episodes(self, limit: int | None = None) -> Iterator[list[Step]]:
        """Episodes in the data set's order; decoding is sequential."""
        wanted = self._episodes[:limit] if not self._config.only_tasks else self._episodes
        columns = [*self._columns, *self._extra, "task_index", "timestamp"]
        columns += ["episode_index", "frame_index"]
        files: dict[str, VideoFile] = {}
        stream = ""
        count = 0
        try:
            tables = lerobot_tables.read_frames(self._root, self._info, wanted, columns)
            for row, table in zip(wanted, tables, strict=True):
                where = f"{self._root}, episode {row.index}"
                arrays = {
                    key: self._column(table, key, where) for key in (*self._columns, *self._extra)
                }
                if not stream:
                    stream = source_stream(self._root.resolve().name, arrays["action"])
                task = self._task_of(table, where)
                if self._config.only_tasks and task not in self._config.only_tasks:
                    continue
                if count == limit:
                    return
                count += 1
                for key in self._videos:
                    arrays[key] = self._video(files, key, row, where)
                yield self._episode(row, arrays, table, stream, task, where).steps()
        finally:
            for file in files.values():
                file.close()

    def _column(self, table: Any, key: str, where: str) -> np.ndarray:
        feature = self._info.features[key]
        read = lerobot_tables.pictures if feature.is_image else lerobot_tables.numbers
        return read(table, key, feature, where)

    def _task_of(self, table: Any, where: str) -> str:
        found = set(table["task_index"].to_pylist())
        if len(found) != 1 or not found <= self._tasks.keys():
            raise CorruptDataError(f"{where}: tasks {sorted(found)}; one of tasks.parquet is right")
        return self._tasks[found.pop()]

    def _video(
        self, files: dict[str, VideoFile], key: str, row: EpisodeRow, where: str
    ) -> np.ndarray:
        chunk, file, from_s = row.videos[key]
        path = lerobot.file_path(self._root, self._info.video_path, chunk, file, key)
        if key not in files or files[key].path != path:
            if key in files:
                files[key].close()
            files[key] = VideoFile(path, self._info.features[key].image_shape)
        return files[key].read(from_s, row.length, self._info.fps, f"{where}, '{key}'")

    def _episode(
        self,
        row: EpisodeRow,
        arrays: dict[str, np.ndarray],
        table: Any,
        stream: str,
        task: str,
        where: str,
    ) -> Episode:
        """Steps out of frames: which of them is the final observation, and how it ended."""
        flat = {key: arrays[key].reshape(row.length, -1)[:, 0] for key in self._extra}
        repeat = self._repeats(flat, where)
        length = row.length if repeat else row.length - 1
        steps = slice(0, length)
        observation: dict[str, np.ndarray] = {}
        for key in self._keys:
            array = self._restored(key, arrays[key])
            if self._config.image_size is not None and self._info.features[key].is_image:
                array = np.stack([fitted(picture, self._config.image_size) for picture in array])
            array = np.concatenate([array, array[-1:]]) if repeat else array
            observation[self._names.get(key, key)] = array
        noted = [] if self._note is None else self._note.episodes
        note = noted[row.index] if row.index < len(noted) else None
        values = {
            name: flat[column][steps]
            for name, column in lerobot.STEP_COLUMNS.items()
            if column in flat and name != "t_ns"
        }
        return Episode(
            where=where,
            stream=f"{stream}/{note.stream}"[:256] if note else stream,
            number=note.episode if note else row.index,
            task=task if self._config.task is None else self._config.task,
            observation=observation,
            action=self._restored("action", arrays["action"])[steps],
            reward=flat.get(lerobot.REWARD, np.zeros(row.length, np.float32))[steps],
            t_ns=self._times(flat, table, repeat),
            flags=self._flags(values, flat.get(lerobot.DONE), length),
            policy_version=values.get("policy_version"),
            seed=note.seed if note else -1,
        )

    def _repeats(self, flat: Mapping[str, np.ndarray], where: str) -> bool:
        """Whether the last frame is repeated as the final observation, instead of being it."""
        final, done = flat.get(lerobot.FINAL), flat.get(lerobot.DONE)
        if final is not None and final[:-1].any():
            raise CorruptDataError(f"{where}: {lerobot.FINAL} holds before the last frame")
        if final is not None and final[-1]:
            return False
        if self._config.final != "auto":
            return self._config.final == "repeat"
        padded = done is not None and bool(done[-2:].all())
        return not padded and (done is not None or lerobot.REWARD in flat)

    def _restored(self, key: str, array: np.ndarray) -> np.ndarray:
        """The array as it was before LeRobot gave scalars an axis and grey pictures colours."""
        if self._note is None or key not in self._note.features:
            return array
        dtype, shape = self._note.features[key]
        if array.ndim == 4 and shape[-1:] == (1,):
            array = array[..., :1]
        if array.dtype.name != dtype or array[0].size != int(np.prod(shape)):
            raise CorruptDataError(
                f"{self._root / lerobot.NOTE}: '{key}' is {dtype} {list(shape)}; the data set has "
                f"{array.dtype.name} {list(array.shape[1:])}"
            )
        return array.reshape(len(array), *shape)

    def _times(self, flat: Mapping[str, np.ndarray], table: Any, repeat: bool) -> np.ndarray:
        if (column := lerobot.STEP_COLUMNS["t_ns"]) in flat:
            t_ns = flat[column].astype(np.int64)
        else:
            t_ns = np.round(table["timestamp"].to_numpy().astype(np.float64) * 1e9).astype(np.int64)
        return np.append(t_ns, t_ns[-1] + round(1e9 / self._info.fps)) if repeat else t_ns

    def _flags(
        self, values: Mapping[str, np.ndarray], done: np.ndarray | None, length: int
    ) -> dict[str, np.ndarray]:
        flags = {name: value for name, value in values.items() if name != "policy_version"}
        last = last_step(length)
        if "success" not in flags:
            flags["success"] = last & self._config.success
        if "intervention" not in flags:
            flags["intervention"] = np.full(length, self._config.expert)
        if "terminated" not in flags:
            ended = last & bool(done is not None and done[:length][-1:].any())
            if "success" in values:
                ended &= bool(np.asarray(flags["success"]).any())
            flags["terminated"] = ended & ~flags.get("truncated", np.zeros(length, bool))
        if "truncated" not in flags:
            flags["truncated"] = last & ~flags["terminated"]
        return flags
