"""A folder of videos, from the files to windows of a buffer."""

import subprocess

import av
import imageio_ffmpeg
import numpy as np
import pytest
from lerobot_v3 import encode

from embodied.buffer.interchange.dataset import fitted
from embodied.buffer.interchange.video_folder import VideoFolder
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.samplers import WindowSampler, WindowSpec
from embodied.cli.main import main
from embodied.core.config import convert
from embodied.core.errors import ConfigError, CorruptDataError

KEY = "observation.images.top"


def counting(count, mark=0, height=32, width=48):
    """Frames whose left half says by its grey which one it is, and whose right half has a mark."""
    frames = np.full((count, height, width, 3), mark, np.uint8)
    frames[:, :, : width // 2] = (10 + 6 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    return list(frames)


def numbers(pictures):
    """Which frame each picture shows."""
    left = pictures[:, :, : pictures.shape[2] // 3]
    return np.rint((left.mean(axis=(1, 2, 3)) - 9) / 6).astype(int)


def folder(path, hz=10.0, size=(16, 24), **options):
    given = {"path": str(path), "key": KEY, "image_size": size, "hz": hz, **options}
    return VideoFolder(convert(given, VideoFolder.Config))


def shown(path, hz):
    (steps,) = folder(path, hz).episodes()
    return numbers(np.stack([step.observation[KEY] for step in steps])).tolist()


def test_two_videos_become_a_buffer_whose_windows_show_the_right_ticks(tmp_path):
    encode(tmp_path / "clips" / "a.mp4", counting(31), fps=30)
    encode(tmp_path / "clips" / "kitchen" / "b.MOV", counting(9, mark=240), fps=10)
    (tmp_path / "clips" / "notes.txt").write_text("no video")
    words = ["buffer", "import", "format=videos", f"path={tmp_path / 'clips'}", "hz=10"]
    words += [f"to={tmp_path / 'buffer'}", f"key={KEY}", "image_size=[16,24]", "task=cook"]
    assert main(words) == 0
    with ReplayReader(tmp_path / "buffer") as reader:
        reader.refresh()
        first, second = reader.closed_episodes()
        assert [len(first.rows), len(second.rows)] == [10, 8]
        assert first.task == "cook" and first.stream.startswith("clips/a.mp4-")
        assert second.stream.startswith("clips/kitchen/b.MOV-")
        assert reader.take("held", first.rows).all() and not first.success
        assert np.diff(reader.take("t_ns", second.rows)).tolist() == [100_000_000] * 7
        spec = WindowSpec(2, 4, (KEY,), future=(3,), future_keys=(KEY,))
        batch = WindowSampler(reader, spec).sample(64, np.random.default_rng(0))
    assert batch["action"].shape == (64, 4, 1) and batch["action_is_pad"].all()
    files = set()
    found = zip(batch[KEY], batch["future." + KEY], batch["future_is_pad"][:, 0], strict=True)
    for seen, later, pad in found:
        marked = bool(seen[-1, :, -4:].mean() > 120)
        stride, last = (1, 8) if marked else (3, 30)  # of 30 frames a second every third is shown
        before, now = numbers(seen)
        assert now % stride == 0 and before == max(now - stride, 0)
        assert numbers(later)[0] == min(now + 3 * stride, last)
        assert pad == (now + 3 * stride > last)
        files.add(marked)
    assert files == {False, True}


@pytest.mark.parametrize(
    ("fps", "hz", "wanted"),
    [
        (10, 10, list(range(12))),
        (30, 10, [0, 3, 6, 9]),
        (25, 10, [0, 2, 5, 7, 10]),
        (10, 30, [0, 0] + [k for k in range(1, 11) for _ in range(3)] + [11, 11, 11]),
        (24, 20, [0, 1, 2, 4, 5, 6, 7, 8, 10, 11]),
    ],
)
def test_each_tick_shows_the_nearest_frame(tmp_path, fps, hz, wanted):
    encode(tmp_path / "a.mp4", counting(12), fps=fps)
    assert shown(tmp_path, hz) == wanted


def test_times_that_the_file_rounds_to_milliseconds_lose_no_frame(tmp_path):
    encode(tmp_path / "a.mkv", counting(40), fps=30)
    assert shown(tmp_path, 30) == list(range(40))


def test_the_centre_is_seen_in_its_proportions(tmp_path):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:, 16:48] = 200
    frame[:16, 16:32] = (200, 0, 0)
    encode(tmp_path / "a.mp4", [frame] * 3, fps=10)
    (steps,) = folder(tmp_path, size=(8, 8)).episodes()
    picture = steps[0].observation[KEY].astype(int)
    assert picture.shape == (8, 8, 3)
    assert (picture[4:].min(axis=(1, 2)) > 150).all()
    assert picture[1:3, 1:3, 0].min() > 150 and picture[1:3, 1:3, 1].max() < 60


def test_pictures_are_averaged_over_areas():
    picture = np.random.default_rng(0).integers(0, 256, (8, 20, 1), np.uint8)
    blocks = picture[:, 4:16].reshape(2, 4, 3, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(fitted(picture, (2, 3))[..., 0], blocks, atol=1)
    colours = np.repeat(picture, 3, axis=2)
    assert (fitted(colours, (2, 3)) == fitted(picture, (2, 3))).all()


def test_pictures_are_turned_as_the_file_says(tmp_path):
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:16, :24] = 240
    encode(tmp_path / "plain.mp4", [frame] * 3, fps=10)
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error"]
    turn = ["-display_rotation", "90", "-i", str(tmp_path / "plain.mp4"), "-c", "copy"]
    (tmp_path / "turned").mkdir()
    subprocess.run([*ffmpeg, *turn, str(tmp_path / "turned" / "a.mp4")], check=True)
    (steps,) = folder(tmp_path / "turned", size=(24, 16)).episodes()
    bright = steps[0].observation[KEY][..., 0] > 120
    assert bright[13:, :7].all() and not bright[:11].any() and not bright[:, 9:].any()


def test_names_depend_on_file_and_rate_alone_so_that_importing_again_adds_nothing(tmp_path):
    encode(tmp_path / "b.mp4", counting(5), fps=10)
    (before,) = folder(tmp_path).episodes()
    encode(tmp_path / "a.mp4", counting(5), fps=10)
    first, second = folder(tmp_path).episodes()
    assert second[0].key == before[0].key != first[0].key
    other = list(folder(tmp_path, hz=5).episodes())[1]
    assert other[0].key != before[0].key and folder(tmp_path).tasks == {tmp_path.name}


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        folder(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"no video file.*\.mp4"):
        folder(tmp_path)
    with pytest.raises(ConfigError, match="image_size"):
        folder(tmp_path, size=(0, 8))
    encode(tmp_path / "a.mp4", counting(3), fps=10)
    with pytest.raises(CorruptDataError, match=r"a\.mp4 gives 1 pictures at 1\.0 Hz"):
        list(folder(tmp_path, hz=1.0).episodes())
    whole = (tmp_path / "a.mp4").read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"#EXTM3U", bytes(64)):
        (tmp_path / "a.mp4").write_bytes(damage)
        with pytest.raises(CorruptDataError, match=r"a\.mp4 cannot be decoded"):
            list(folder(tmp_path).episodes())
    with av.open(str(tmp_path / "a.mp4"), "w") as output:
        sound = output.add_stream("aac", 8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        output.mux([*sound.encode(silence), *sound.encode(None)])
    with pytest.raises(CorruptDataError, match="no pictures"):
        list(folder(tmp_path).episodes())


def test_a_video_that_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("embodied.buffer.interchange.video_folder._MAX_BYTES", 16 * 24 * 3 * 4)
    encode(tmp_path / "a.mp4", counting(8), fps=10)
    with pytest.raises(ConfigError, match="cut it into several files"):
        list(folder(tmp_path).episodes())
