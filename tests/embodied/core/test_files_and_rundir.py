import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from embodied.core import files
from embodied.core.errors import ConfigError, CorruptDataError, RunInUseError, StorageFullError
from embodied.core.rundir import RunDir
from embodied.run.config import load_train


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomic(path, b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFullError, match="intact"):
        files.write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_tensors_come_back_bit_for_bit(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.array(7, np.int64)}
    files.write_tensors(tmp_path / "t", arrays, b'{"x":1}')
    back, header = files.read_tensors(tmp_path / "t")
    assert header == b'{"x":1}'
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype


def test_no_damaged_byte_goes_unnoticed(tmp_path):
    path = tmp_path / "t"
    files.write_tensors(path, {"a": np.arange(64, dtype=np.float32)}, b"{}")
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            arrays, header = files.read_tensors(path)
        except CorruptDataError as error:
            assert str(path) in str(error)
        else:  # a flip in the padding between header and data changes nothing
            np.testing.assert_array_equal(arrays["a"], np.arange(64))
            assert header == b"{}"
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptDataError):
            files.read_tensors(path)


HOLD = """
import sys
from pathlib import Path
from embodied.core.rundir import RunDir
run = RunDir(Path(sys.argv[1])); run.acquire()
print("held", flush=True); sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        run = RunDir(tmp_path / "run")
        assert run.in_use()
        with pytest.raises(RunInUseError, match=str(holder.pid)):
            run.acquire()
    finally:
        holder.kill()
        holder.wait()
    assert not run.in_use()
    run.acquire()
    run.release()


def test_rows_survive_a_torn_line(tmp_path):
    run = RunDir(tmp_path)
    run.acquire()
    run.metrics("learner", {"step": 1})
    run.release()
    with open(tmp_path / "metrics" / "learner.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    run.metrics("learner", {"step": 3})
    assert [row["step"] for row in run.read("metrics", "learner")] == [1, 3]
    assert run.streams("metrics") == ["learner"]


def test_the_configuration_is_stored_typed_and_damage_is_named(tmp_path):
    run = RunDir(tmp_path)
    run.acquire()
    with pytest.raises(ConfigError, match="holds no run"):
        run.read_config()
    run.write_config(load_train(["seed=5"]))
    assert run.read_config()["seed"] == 5
    (tmp_path / "config.json").write_text('{"seed": 5')
    with pytest.raises(ConfigError, match="damaged"):
        run.read_config()


def test_a_runs_id_is_drawn_once_and_kept(tmp_path):
    run, other = RunDir(tmp_path / "a"), RunDir(tmp_path / "b")
    for each in (run, other):
        each.acquire()
        each.release()
    found = run.id()
    assert run.id() == RunDir(tmp_path / "a").id() == found != other.id()
    (tmp_path / "a" / "id").write_text("no id")
    with pytest.raises(CorruptDataError, match="id is damaged"):
        run.id()
