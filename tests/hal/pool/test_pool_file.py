"""The pool's file: damaged, foreign, deleted, on a full disk; and the directory it is in."""

import os
import sqlite3
import stat
import subprocess

import msgspec
import pytest
from pooling import arm
from tmpfs import script_in_tmpfs

from embodied.core.errors import ConfigError, CorruptDataError, LeaseError
from hal.pool.pool import Pool
from hal.pool.state import check_local, pool_path, state_dir


def test_a_damaged_file_is_named(tmp_path, clock):
    path = tmp_path / "pool.sqlite"
    path.write_bytes(b"these are no devices" * 100)
    with pytest.raises(CorruptDataError, match=r"pool.sqlite is damaged: file is not a database"):
        Pool(path)
    path.unlink()
    with Pool(path, clock=clock) as pool:
        for k in range(200):
            pool.register(arm(f"a:{k}"))
    data = bytearray(path.read_bytes())
    data[4096 * 2 : 4096 * 5] = os.urandom(4096 * 3)
    path.write_bytes(data)
    with pytest.raises(CorruptDataError, match="damaged"), Pool(path, clock=clock) as pool:
        pool.devices()


def test_damage_under_a_running_pool_is_named(pool, tmp_path):
    pool.register(arm("a"))
    pool._file._connection.execute("UPDATE devices SET record = '{'")
    with pytest.raises(CorruptDataError, match="damaged DeviceRecord"):
        pool.devices()


def test_a_foreign_file_is_left_alone(tmp_path):
    path = tmp_path / "pool.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="SQLite file of another program"):
        Pool(path)
    assert path.read_bytes() == before


def test_another_version_is_refused(tmp_path, clock):
    path = tmp_path / "pool.sqlite"
    Pool(path, clock=clock).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="has version 99 of the pool's format"):
        Pool(path)


def test_a_deleted_file_is_begun_anew_by_all(tmp_path, clock):
    path = tmp_path / "pool.sqlite"
    with Pool(path, clock=clock) as pool, Pool(path, clock=clock) as other:
        pool.register(arm("a"))
        held = pool.acquire("h", "arm")
        for file in tmp_path.glob("pool.sqlite*"):
            file.unlink()
        with pytest.raises(LeaseError, match="register it"):
            other.update("a", "ready")
        other.register(arm("a"))
        again = other.acquire("h", "arm", timeout_s=0)
        assert again.request == held.request  # what tells them apart is the token
        again = msgspec.structs.replace(again, devices=())
        for stale in (held, again):
            with pytest.raises(LeaseError):
                pool.renew(stale)
            assert not pool.release(stale)
        with pytest.raises(LeaseError, match="held by h"):
            pool.acquire("i", "arm", timeout_s=0)
        other.close()
        assert pool.devices()[0].holder == "h"


def test_a_pool_needs_a_directory_and_closes_twice(tmp_path, clock):
    with pytest.raises(ConfigError, match=r"cannot be used.*EMBODIED_STATE"):
        Pool(tmp_path / "none" / "pool.sqlite")
    with pytest.raises(ConfigError, match="cannot be used"):
        Pool(tmp_path)
    pool = Pool(tmp_path / "pool.sqlite", clock=clock)
    pool.close()
    pool.close()
    with pytest.raises(Exception, match="is closed"):
        pool.devices()


FULL = """
import os, sys
from embodied.core.errors import StorageFullError
from hal.pool.pool import DeviceRecord, Pool
folder = sys.argv[1]
pool = Pool(folder + "/pool.sqlite")
pool.register(DeviceRecord("kept", "so101"))
held = pool.acquire("h", "so101", ttl_s=600)
ballast = os.open(folder + "/ballast", os.O_WRONLY | os.O_CREAT)
try:
    while True:
        os.write(ballast, bytes(1 << 12))
except OSError:
    pass
full = 0
for k in range(300):
    try:
        pool.register(DeviceRecord(f"d:{k}", "so101", labels={"x": "y" * 3000}))
    except StorageFullError as error:
        assert "/pool.sqlite" in str(error), error
        full += 1
assert full > 10, full
os.ftruncate(ballast, 0)
assert pool.renew(held).devices == held.devices
assert len(pool.devices()) == 301 - full
pool.register(DeviceRecord("later", "so101"))
print("ok")
"""


def test_a_full_disk_is_named_and_passes(tmp_path):
    done = subprocess.run(
        script_in_tmpfs(FULL, tmp_path), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "ok\n", done.stderr


def test_the_state_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("EMBODIED_STATE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_dir() == tmp_path / "home/.local/state/embodied"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state_dir() == tmp_path / "xdg/embodied"
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path / "mine"))
    assert pool_path() == tmp_path / "mine/pool.sqlite"
    assert stat.S_IMODE(os.stat(tmp_path / "mine").st_mode) == 0o700
    monkeypatch.setenv("EMBODIED_STATE", "mine")
    with pytest.raises(ConfigError, match="EMBODIED_STATE is 'mine'; it must be an absolute path"):
        state_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot be made"):
        state_dir()


def test_a_pool_on_a_network_file_system_is_refused(tmp_path, monkeypatch):
    check_local(tmp_path)
    monkeypatch.setattr("hal.pool.state._filesystem", lambda path: "nfs4")
    with pytest.raises(ConfigError, match=r"network file system \(nfs4\)"):
        Pool(tmp_path / "pool.sqlite")
