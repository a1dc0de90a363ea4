import contextlib
import subprocess
import sys

import numpy as np
import pytest

from embodied.buffer.log.segments import segment_path
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.serve.sink import LocalBuffer
from embodied.buffer.upkeep.contents import Contents
from embodied.buffer.upkeep.maintenance import Selection, compact, merge, split, verify
from embodied.buffer.write.writer import ReplayWriter
from embodied.core.errors import ConfigError, RunInUseError, SpecError

SEGMENT_BYTES = 1024  # a few steps


@pytest.fixture
def write(make_episode):
    """Write episodes: (stream, number) or (stream, number, fields)."""

    def _write(path, *episodes, **options):
        with LocalBuffer(path, segment_bytes=SEGMENT_BYTES, **options) as buffer:
            for stream, number, *fields in episodes:
                for step in make_episode(stream, number, **(fields[0] if fields else {})):
                    buffer.add(step)
        return path

    return _write


def stored(path):
    """Every closed episode's steps, as comparable values, by key."""
    found = {}
    with ReplayReader(path) as reader:
        reader.refresh()
        for episode in reader.finished():
            found[episode.key] = [
                (
                    step.index,
                    step.reward,
                    step.task,
                    step.seed,
                    step.final,
                    step.action.tolist(),
                    {key: value.tolist() for key, value in step.observation.items()},
                )
                for step in reader.steps(episode)
            ]
    return found


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def place_of(path, stream, number, index):
    """Segment file and byte offset of a step's record."""
    contents = Contents(path)
    for part in contents.episodes[stream, number].parts:
        if index in part.indices:
            at = part.offsets.tolist()[part.indices.tolist().index(index)]
            return segment_path(path, part.segment, sealed=True), at
    raise KeyError(index)


# verify


def test_a_sound_buffer_verifies(tmp_path, write):
    path = write(tmp_path / "buffer", ("r0", 0), ("r1", 0), ("r0", 1, {"closed": False}))
    sizes = []
    report = verify(path, on_bytes=sizes.append)
    assert report.ok and report.findings == ()
    assert (report.episodes, report.closed, report.steps) == (3, 2, 15)
    assert report.segments == len(sizes) > 2 and sum(sizes) == report.nbytes


def test_damage_is_named_by_file_offset_stream_episode_and_step(tmp_path, write):
    path = write(tmp_path / "buffer", *(("r0", n) for n in range(5)))
    file, offset = place_of(path, "r0", 2, 3)
    flip(file, offset + 40)
    report = verify(path)
    assert not report.ok
    (finding,) = report.findings
    assert (finding.kind, finding.file, finding.offset) == ("record", file.name, offset)
    (loss,) = finding.lost
    assert (loss.stream, loss.episode, loss.steps) == ("r0", 2, (3,))
    assert "lost: stream 'r0', episode 2, steps 3" in str(finding)


@pytest.mark.parametrize("index", [0, 5])
def test_without_its_column_file_a_lost_step_is_a_gap_or_an_unfinished_episode(
    tmp_path, write, index
):
    path = write(tmp_path / "buffer", *(("r0", n) for n in range(3)))
    file, offset = place_of(path, "r0", 1, index)
    flip(file, offset + 40)
    file.with_suffix(".cols").unlink()
    kinds = {finding.kind: finding for finding in verify(path).findings}
    assert kinds["record"].offset == offset and kinds["columns"].file == f"{file.stem}.cols"
    if index == 0:
        assert kinds["gap"].lost[0].steps == (0,)
    else:
        assert "gap" not in kinds  # nothing tells a lost final observation from one still to come


def test_a_truncated_segment_and_a_damaged_header_are_named(tmp_path, write):
    path = write(tmp_path / "buffer", *(("r0", n) for n in range(5)))
    file, offset = place_of(path, "r0", 2, 3)
    file.write_bytes(file.read_bytes()[: offset + 10])
    first = segment_path(path, 1, sealed=True)
    flip(first, 3)
    findings = verify(path).findings
    (cut,) = (f for f in findings if f.file == file.name)
    assert (cut.kind, cut.offset) == ("record", offset) and "truncated" in cut.message
    assert 3 in next(loss.steps for loss in cut.lost if loss.episode == 2)
    assert any(f.file == first.name and f.offset == 0 for f in findings)


def test_orphans_foreign_files_and_torn_tails_are_told_but_are_no_damage(tmp_path, write):
    path = write(tmp_path / "buffer", ("r0", 0))
    (path / "notes.txt").write_text("mine")
    (path / "00000099.cols").write_bytes(b"x")
    writer = ReplayWriter(path, SEGMENT_BYTES)
    (path / ".00000001.cols.1.2.tmp").write_bytes(b"x")
    try:
        report = verify(path)
    finally:
        writer.close()
    assert report.ok
    found = {(finding.kind, finding.file) for finding in report.findings}
    assert ("foreign", "notes.txt") in found and ("orphan", ".00000001.cols.1.2.tmp") in found


def test_a_torn_tail_is_told(tmp_path, write, make_episode):
    path = write(tmp_path / "buffer", ("r0", 0))
    sealed = max(path.glob("*.seg"))
    opened = sealed.with_name(sealed.name + ".open")
    opened.write_bytes(sealed.read_bytes() + b"\xe5REC torn" + bytes(64))
    sealed.unlink()
    report = verify(path)
    assert report.ok and [f.kind for f in report.findings if f.file == opened.name] == ["tail"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no buffer folder"):
        verify(tmp_path / "nothing")


# merge


def test_merging_keeps_streams_and_drops_duplicates(tmp_path, write):
    one = write(tmp_path / "one", ("r0", 0), ("r0", 1), ("r1", 0))
    two = write(tmp_path / "two", ("r0", 1), ("r0", 2, {"task": "lift", "seed": 3}))
    result = merge([one, two], tmp_path / "both")
    assert (result.episodes, result.duplicates) == (4, 1)
    assert stored(tmp_path / "both") == stored(one) | stored(two)
    assert list(tmp_path.iterdir()) and not list(tmp_path.glob(".*"))
    assert merge([one, two], tmp_path / "both").episodes == 0
    assert verify(tmp_path / "both").ok


def test_merging_into_a_buffer_adds_to_it_and_continues_open_episodes(tmp_path, write):
    target = write(tmp_path / "target", ("r0", 0), ("r1", 0, {"length": 3, "closed": False}))
    source = write(tmp_path / "source", ("r1", 0), ("r1", 1))
    assert merge([source], target).episodes == 2
    assert stored(target).keys() == {("r0", 0), ("r1", 0), ("r1", 1)}
    assert stored(target)["r1", 0] == stored(source)["r1", 0]


def test_different_steps_under_one_name_stop_before_anything_is_written(tmp_path, write):
    one = write(tmp_path / "one", ("r0", 0), ("r0", 1))
    two = write(tmp_path / "two", ("r0", 2), ("r0", 1, {"task": "another"}))
    target = write(tmp_path / "target", ("r9", 0))
    before = stored(target)
    with pytest.raises(ConfigError, match=r"stream 'r0', episode 1, step 0 .*one.*two"):
        merge([one, two], target)
    assert stored(target) == before
    with pytest.raises(ConfigError):
        merge([one, two], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_arrays_in_one_stream_stop_a_merge(tmp_path, write, make_step):
    one = write(tmp_path / "one", ("r0", 0))
    two = tmp_path / "two"
    with LocalBuffer(two) as buffer:
        for final in (False, True):
            buffer.add(make_step("r0", 5, int(final), action=np.zeros(7), final=final))
    target = write(tmp_path / "target", ("r1", 0))
    before = stored(target)
    with pytest.raises(SpecError, match=r"action of stream 'r0' in .*two is float64 \[7\]"):
        merge([one, two], target)
    assert stored(target) == before


def test_a_merge_takes_the_sound_copy_and_refuses_damage_otherwise(tmp_path, write):
    one, two = (write(tmp_path / name, ("r0", 0), ("r0", 1)) for name in ("one", "two"))
    file, offset = place_of(one, "r0", 1, 2)
    flip(file, offset + 40)
    assert merge([one, two], tmp_path / "mended").episodes == 2
    assert stored(tmp_path / "mended") == stored(two)
    with pytest.raises(ConfigError, match=r"1 episodes have lost steps.*stream 'r0', episode 1"):
        merge([one], tmp_path / "alone")
    result = merge([one], tmp_path / "alone", drop_damaged=True)
    assert result.dropped == ("stream 'r0', episode 1",)
    assert stored(tmp_path / "alone").keys() == {("r0", 0)}


def test_records_are_copied_as_they_are(tmp_path, write, make_episode):
    rng = np.random.default_rng(0)
    source = tmp_path / "source"
    with LocalBuffer(source, codecs={"observation.images.*": "jpeg:80"}) as buffer:
        for step in make_episode("r0", 0):
            step.observation["observation.images.front"] = rng.integers(
                0, 255, (24, 24, 3), np.uint8
            )
            buffer.add(step)
    merge([source], tmp_path / "copy")
    assert stored(tmp_path / "copy") == stored(source)
    codecs = {f.codec for s in Contents(tmp_path / "copy").schemas.values() for f in s.observation}
    assert "jpeg:80" in codecs


def test_a_target_in_use_or_given_twice_is_an_error(tmp_path, write):
    one = write(tmp_path / "one", ("r0", 0))
    with pytest.raises(ConfigError, match="given twice"):
        merge([one, one], tmp_path / "new")
    with pytest.raises(ConfigError, match="given twice"):
        merge([one], one)
    target = write(tmp_path / "target", ("r1", 0))
    with ReplayWriter(target), pytest.raises(RunInUseError):
        merge([one], target)


# split


def test_a_split_divides_by_task_stream_and_episode(tmp_path, write):
    tasks = [("r0", 0, {"task": "lift"}), ("r0", 1, {"task": "push"}), ("r1", 0, {"task": "lift"})]
    source = write(tmp_path / "source", *tasks)
    selection = Selection(tasks=("lift",))
    chosen, rest = split(source, tmp_path / "lift", selection, rest=tmp_path / "rest")
    assert (chosen.episodes, rest.episodes) == (2, 1)
    assert stored(tmp_path / "lift") | stored(tmp_path / "rest") == stored(source)
    assert stored(tmp_path / "rest").keys() == {("r0", 1)}
    split(source, tmp_path / "some", Selection(streams=("r0",), episodes=(1,)))
    assert stored(tmp_path / "some").keys() == {("r0", 1)}


def test_a_selection_of_what_is_not_there_names_what_is(tmp_path, write):
    source = write(tmp_path / "source", ("r0", 0, {"task": "lift"}))
    with pytest.raises(ConfigError, match="no task lft; it has lift"):
        split(source, tmp_path / "new", Selection(tasks=("lft",)))
    with pytest.raises(ConfigError, match="no stream r7; it has r0"):
        split(source, tmp_path / "new", Selection(streams=("r7",)))
    assert not (tmp_path / "new").exists()


# compact


def test_compaction_drops_deleted_episodes_for_good(tmp_path, write):
    path = write(tmp_path / "buffer", *(("r0", n) for n in range(6)), ("r1", 0, {"closed": False}))
    with ReplayWriter(path, SEGMENT_BYTES) as writer:
        for number in (1, 5):
            writer.delete("r0", number)
    before, size = stored(path), Contents(path).nbytes
    result = compact(path)
    assert (result.episodes, result.nbytes < size) == (5, True)
    assert stored(path) == before
    assert len(list(path.glob("*.seg"))) == 1 and not list(tmp_path.glob(".*"))
    assert verify(path).ok
    with LocalBuffer(path) as buffer:
        assert buffer.next_episode("r0") == 6, "the numbers of deleted episodes stay taken"
        assert buffer.next_episode("r1") == 1
    write(path, ("r0", 1))
    assert stored(path) == before, "a deleted episode does not come back"


def test_an_open_episode_goes_on_after_compaction(tmp_path, write):
    path = write(tmp_path / "buffer", ("r0", 0, {"length": 3, "closed": False}))
    compact(path)
    write(path, ("r0", 0))
    assert len(stored(path)["r0", 0]) == 6


def test_compaction_waits_for_the_writer_and_spares_foreign_files(tmp_path, write):
    path = write(tmp_path / "buffer", ("r0", 0))
    with ReplayWriter(path), pytest.raises(RunInUseError):
        compact(path)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        compact(path)
    assert (path / "notes.txt").exists()


def test_compaction_that_is_cut_off_leaves_the_buffer_as_it_was(tmp_path, write, monkeypatch):
    from embodied.buffer.upkeep import maintenance

    path = write(tmp_path / "buffer", ("r0", 0), ("r0", 1))
    before = stored(path)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(maintenance, "_exchange", die)
        patch.setattr(maintenance.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            compact(path)
    assert stored(path) == before
    assert (tmp_path / ".buffer.compacting").exists()
    compact(path)
    assert stored(path) == before and not list(tmp_path.glob(".*"))


def test_compaction_refuses_damage_unless_it_may_drop_it(tmp_path, write):
    path = write(tmp_path / "buffer", ("r0", 0), ("r0", 1))
    file, offset = place_of(path, "r0", 0, 2)
    flip(file, offset + 40)
    with pytest.raises(ConfigError, match="drop_damaged=true"):
        compact(path)
    assert compact(path, drop_damaged=True).dropped == ("stream 'r0', episode 0",)
    assert stored(path).keys() == {("r0", 1)}


@pytest.mark.slow
def test_compaction_survives_being_killed(tmp_path, write):
    path = write(tmp_path / "buffer", *(("r0", n) for n in range(150)))
    with ReplayWriter(path, SEGMENT_BYTES) as writer:
        for number in range(0, 150, 3):
            writer.delete("r0", number)
    before = stored(path)
    code = (
        "import sys; from pathlib import Path\n"
        "from embodied.buffer.upkeep.maintenance import compact\n"
        "print('ready', flush=True); compact(Path(sys.argv[1]), segment_bytes=2048)"
    )
    rng = np.random.default_rng(0)
    endings = set()
    for _ in range(25):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 0.6))
        process.kill()
        endings.add(process.wait() == 0)
        assert stored(path) == before
    compact(path)
    assert stored(path) == before and verify(path).ok
    assert [entry.name for entry in tmp_path.iterdir()] == ["buffer"]
    assert False in endings
