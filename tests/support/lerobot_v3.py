"""Writes LeRobotDataset v3 folders by hand, without LeRobot: fast, and as others' tools may."""

import io
import json

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

VIDEO = "observation.images.top"


def picture(episode, frame, height=32, width=48):
    """A picture that tells its episode and frame, and survives H.264."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = 30 + 10 * frame
    image[..., 1] = 60 + 40 * episode
    image[: height // 2, : width // 2, 2] = 200
    return image


def png(image):
    """The bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def encode(path, frames, fps):
    """Write frames as an H.264 file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", fps, options={"crf": "18", "g": "2"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")):
                output.mux(packet)
        for packet in stream.encode():
            output.mux(packet)


def write(
    root,
    lengths=(5, 3),
    *,
    fps=10,
    extra=None,
    tasks=("push",),
    video=False,
    pictures=None,
    note=None,
    version="v3.0",
):
    """A data set of episodes with these lengths; `extra`: name → (dtype, function of episode and
    length that gives its column). Task of episode k: tasks[k % len(tasks)]."""
    features = {
        "observation.state": {"dtype": "float32", "shape": [2], "names": None},
        "action": {"dtype": "float32", "shape": [3], "names": None},
    }
    for name, (dtype, _) in (extra or {}).items():
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    if video:
        features[VIDEO] = {"dtype": "video", "shape": [3, 32, 48], "names": ["channels", "h", "w"]}
    if pictures:
        features[pictures] = {"dtype": "image", "shape": [32, 48, 3], "names": ["height", "w", "c"]}
    info = {
        "codebase_version": version,
        "fps": fps,
        "total_episodes": len(lengths),
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    if note is not None:
        (root / "meta/embodied.json").write_text(json.dumps(note))
    names = pa.array(list(tasks))
    pq.write_table(
        pa.table({"task_index": pa.array(range(len(tasks))), "__index_level_0__": names}),
        root / "meta/tasks.parquet",
    )
    rows, tables, frames = [], [], []
    for episode, length in enumerate(lengths):
        state = np.stack([np.full(length, episode), np.arange(length)], 1).astype(np.float32)
        action = np.stack([np.arange(length) + 100 * episode] * 3, 1).astype(np.float32)
        columns = {
            "observation.state": pa.FixedSizeListArray.from_arrays(state.reshape(-1), 2),
            "action": pa.array(action.tolist(), pa.list_(pa.float32())),
            "timestamp": pa.array((np.arange(length) / fps).astype(np.float32)),
            "frame_index": pa.array(range(length), pa.int64()),
            "episode_index": pa.array([episode] * length, pa.int64()),
            "task_index": pa.array([episode % len(tasks)] * length, pa.int64()),
        }
        for name, (_, make) in (extra or {}).items():
            columns[name] = pa.array(make(episode, length))
        if pictures:
            columns[pictures] = pa.array(
                [{"bytes": png(picture(episode, frame)), "path": None} for frame in range(length)]
            )
        tables.append(pa.table(columns))
        row = {"episode_index": episode, "length": length}
        row |= {"data/chunk_index": 0, "data/file_index": 0}
        if video:
            row |= {f"videos/{VIDEO}/chunk_index": 0, f"videos/{VIDEO}/file_index": 0}
            row[f"videos/{VIDEO}/from_timestamp"] = sum(lengths[:episode]) / fps
            frames += [picture(episode, frame) for frame in range(length)]
        rows.append(row)
    pq.write_table(pa.concat_tables(tables), root / "data/chunk-000/file-000.parquet")
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    if video:
        encode(root / f"videos/{VIDEO}/chunk-000/file-000.mp4", frames, fps)
    return root
