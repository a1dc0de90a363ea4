"""The parquet files of a LeRobotDataset v3, read episode by episode."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from embodied.buffer.interchange import lerobot
from embodied.buffer.interchange.dataset import MAX_FRAMES, picture_frames
from embodied.comms.codec import DTYPES
from embodied.core.errors import ConfigError, CorruptDataError

_BATCH_ROWS = 256


@dataclass(frozen=True)
class EpisodeRow:
    """An episode by meta/episodes: its number, length, files, and where it begins in videos (s)."""

    index: int
    length: int
    data: tuple[int, int]
    videos: dict[str, tuple[int, int, float]]


def arrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. Raises MissingDependencyError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise lerobot.missing(error.name) from error
    return pyarrow, pyarrow.parquet


def read_tasks(root: Path) -> dict[int, str]:
    """Task strings by their index."""
    pyarrow, _ = arrow()
    path = root / lerobot.TASKS
    table = _table(path)
    text = [
        name
        for name in table.column_names
        if pyarrow.types.is_string(table[name].type)
        or pyarrow.types.is_large_string(table[name].type)
    ]
    if "task_index" not in table.column_names or len(text) != 1:
        raise CorruptDataError(
            f"{path} has columns {table.column_names}; task_index and one of strings are right"
        )
    rows = zip(table["task_index"].to_pylist(), table[text[0]].to_pylist(), strict=True)
    return {int(index): str(task) for index, task in rows}


def read_episodes(root: Path, video_keys: Sequence[str]) -> list[EpisodeRow]:
    """All episodes in their order."""
    episodes: list[EpisodeRow] = []
    names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for key in video_keys:
        names += [
            f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")
        ]
    for path in sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet")):
        table = _table(path, names)
        for row in table.to_pylist():
            if any(row[name] is None for name in names):
                raise CorruptDataError(f"{path}: episode {row['episode_index']} has no {names}")
            videos = {
                key: (
                    int(row[f"videos/{key}/chunk_index"]),
                    int(row[f"videos/{key}/file_index"]),
                    float(row[f"videos/{key}/from_timestamp"]),
                )
                for key in video_keys
            }
            data = int(row["data/chunk_index"]), int(row["data/file_index"])
            episodes.append(EpisodeRow(int(row["episode_index"]), int(row["length"]), data, videos))
    episodes.sort(key=lambda episode: episode.index)
    if [episode.index for episode in episodes] != list(range(len(episodes))):
        raise CorruptDataError(f"{root / 'meta/episodes'}: its episodes are not numbered 0, 1, …")
    for episode in episodes:
        if not 1 <= episode.length <= MAX_FRAMES:
            raise CorruptDataError(
                f"{root / 'meta/episodes'}: episode {episode.index} has {episode.length} frames; "
                f"1 to {MAX_FRAMES} are right"
            )
    return episodes


def read_frames(
    root: Path, info: lerobot.Info, episodes: Sequence[EpisodeRow], columns: Sequence[str]
) -> Iterator[Any]:
    """A table of each episode's rows, one after the other."""
    pyarrow, _ = arrow()
    position = 0
    while position < len(episodes):
        here = episodes[position].data
        path = lerobot.file_path(root, info.data_path, *here)
        pieces: list[Any] = []
        for piece in _pieces(path, columns):
            if position == len(episodes) or episodes[position].data != here:
                break  # the file has more episodes than are wanted
            episode = episodes[position]
            found = piece["episode_index"][0].as_py()
            if found < episode.index:
                continue
            where = f"{path}, episode {episode.index}"
            pieces.append(piece)
            rows = sum(len(part) for part in pieces)
            if found != episode.index or rows > episode.length:
                raise CorruptDataError(
                    f"{where}: {rows} rows and a row of episode {found} stand where "
                    f"{episode.length} frames should"
                )
            if rows == episode.length:
                table = pyarrow.concat_tables(pieces)
                numbers = table["frame_index"].to_pylist()
                if numbers != list(range(episode.length)):
                    raise CorruptDataError(f"{where}: its frames are not numbered 0, 1, …")
                yield table
                pieces = []
                position += 1
        if position < len(episodes) and episodes[position].data == here:
            episode = episodes[position]
            raise CorruptDataError(
                f"{path} ends before frame {episode.length - 1} of episode {episode.index}"
            )


def _pieces(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Tables of consecutive rows that belong to one episode each."""
    pyarrow, parquet = arrow()
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, columns)
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns)):
                table = pyarrow.Table.from_batches([batch])
                numbers = table["episode_index"].to_numpy()
                for rows in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers)) + 1):
                    if len(rows):
                        yield table.slice(int(rows[0]), len(rows))
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _table(path: Path, columns: Sequence[str] | None = None) -> Any:
    pyarrow, parquet = arrow()
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, columns or ())
            return file.read(columns=list(columns) if columns else None)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _check_columns(path: Path, there: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in there]:
        raise CorruptDataError(f"{path} has no column {', '.join(missing)}")


def _damaged(path: Path, error: Exception) -> CorruptDataError:
    return CorruptDataError(
        f"{path} cannot be read as parquet: {str(error).splitlines()[0]}. A recording that was "
        "never finalized has no footers; record it again or fetch the file again"
    )


def numbers(table: Any, key: str, feature: lerobot.FeatureInfo, where: str) -> np.ndarray:
    """A column of numbers [n, *shape] (shape [1]: [n, 1])."""
    pyarrow, _ = arrow()
    if feature.dtype not in DTYPES:
        raise ConfigError(f"{where}: '{key}' is of type {feature.dtype}, which cannot be stored")
    values = table[key].combine_chunks()
    shape = list(feature.shape)
    if hasattr(values, "storage"):
        values = values.storage
    sides = [] if shape == [1] and not pyarrow.types.is_nested(values.type) else shape
    for side in sides:
        length = getattr(values.type, "list_size", None)
        if pyarrow.types.is_nested(values.type) and length is None:
            lengths = pyarrow.compute.unique(values.value_lengths()).to_pylist()
            length = lengths[0] if len(lengths) == 1 else None
        if length != side or values.null_count:
            raise CorruptDataError(f"{where}: '{key}' is not {feature.dtype} {shape} in each frame")
        values = values.flatten()
    primitive = pyarrow.types.is_primitive(values.type) and not values.null_count
    if not primitive or len(values) != len(table) * int(np.prod(sides)):
        raise CorruptDataError(f"{where}: '{key}' is not {feature.dtype} {shape} in each frame")
    array = values.to_numpy(zero_copy_only=False).astype(DTYPES[feature.dtype])
    return array.reshape(len(table), *shape)


def pictures(table: Any, key: str, feature: lerobot.FeatureInfo, where: str) -> np.ndarray:
    """A column of PNG or JPEG files: uint8 [n, h, w, c]."""
    found = picture_frames(where, len(table), feature.image_shape)
    for index, value in enumerate(table[key]):
        data = (value.as_py() or {}).get("bytes")
        if not isinstance(data, bytes):
            raise CorruptDataError(f"{where}: '{key}' of frame {index} holds no picture")
        try:
            found[index] = _picture(data, feature.image_shape)
        except Exception as error:  # what Pillow raises for bad data is not specified
            raise CorruptDataError(f"{where}: '{key}' of frame {index}: {error}") from error
    return found


def _picture(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        if image.size != (shape[1], shape[0]) or image.mode not in ("L", "RGB"):
            raise ValueError(
                f"a picture of {image.height}×{image.width} {image.mode}; info.json says "
                f"{shape[0]}×{shape[1]}, and RGB or L is right"
            )
        return np.asarray(image.convert("RGB"))[..., : shape[2]]
