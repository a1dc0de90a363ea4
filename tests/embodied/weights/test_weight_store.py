import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.numpy

from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError, SpecError
from embodied.weights.manifests import tensors
from embodied.weights.store import VersionGoneError, WeightStore, WeightWatcher

CONFIG = {"policy": "flow", "width": 256}


def weights(seed, size=50):
    rng = np.random.default_rng(seed)
    return {
        "net.weight": rng.normal(size=(size, 3)).astype(np.float32),
        "net.steps": np.array(seed, np.int64),
        "half": rng.normal(size=4).astype(np.float16),
        "empty": np.zeros((0, 3), np.float32),
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x08
    path.write_bytes(data)


def test_round_trip_is_bit_exact(tmp_path):
    store = WeightStore(tmp_path)
    assert store.latest_version() is None
    published = store.publish(weights(1), CONFIG, {"loss": 0.5})
    assert (published.version, published.base) == (1, None)
    arrays, manifest = WeightStore(tmp_path).load(1)
    assert_same(arrays, weights(1))
    assert manifest == published == store.manifest(1)
    assert manifest.config == CONFIG and manifest.metadata == {"loss": 0.5}
    assert store.publish(weights(1), b'{"policy": "flow"}').config == {"policy": "flow"}


def test_non_contiguous_arrays_are_stored_by_value(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    store = WeightStore(tmp_path)
    store.publish({"t": array.T, "s": array[:, ::2]}, {})
    arrays, _ = store.load(1)
    assert (arrays["t"] == array.T).all() and (arrays["s"] == array[:, ::2]).all()


def test_versions_grow_across_restarts_and_pruning(tmp_path):
    for expected in (1, 2, 3):
        assert WeightStore(tmp_path).publish(weights(expected), CONFIG).version == expected
    store = WeightStore(tmp_path)
    assert store.prune(1) == [1, 2]
    assert store.publish(weights(4), CONFIG).version == 4
    assert store.versions() == [3, 4] and store.latest_version() == 4


def test_equal_weights_share_a_blob_that_outlives_one_of_them(tmp_path):
    store = WeightStore(tmp_path)
    first, second = store.publish(weights(1), CONFIG), store.publish(weights(1), CONFIG)
    assert first.sha256 == second.sha256 and len(list((tmp_path / "blobs").iterdir())) == 1
    store.prune(1)
    assert_same(store.load(2)[0], weights(1))


PUBLISH = """
import sys
import numpy as np
from embodied.weights.store import WeightStore
store = WeightStore(sys.argv[1])
sys.stdin.readline()
for i in range(15):
    array = np.full(1000, int(sys.argv[2]) * 100 + i)
    print(store.publish({"w": array}, {}, {"first": int(array[0])}).version, array[0], flush=True)
"""


def test_concurrent_publishers_do_not_overwrite_each_other(tmp_path):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISH, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    published = {}
    for child in children:
        for line in child.communicate(timeout=120)[0].splitlines():
            version, first = map(int, line.split())
            assert version not in published
            published[version] = first
        assert child.returncode == 0
    assert sorted(published) == list(range(1, 31))
    store = WeightStore(tmp_path)
    for version, first in published.items():
        arrays, manifest = store.load(version)
        assert arrays["w"][0] == manifest.metadata["first"] == first


def test_a_publisher_without_the_lock_still_takes_no_version_twice(tmp_path, monkeypatch):
    from embodied.weights import store as store_module

    store = WeightStore(tmp_path)
    store.publish(weights(1), CONFIG)
    stale = iter([0, 0])
    real = WeightStore.latest_version
    monkeypatch.setattr(
        store_module.WeightStore, "latest_version", lambda self: next(stale, real(self))
    )
    assert store.publish(weights(2), CONFIG).version == 2
    assert_same(store.load(1)[0], weights(1))


def test_every_damage_is_found_and_names_file_and_version(tmp_path):
    store = WeightStore(tmp_path)
    manifest = store.publish(weights(1), CONFIG)
    blob = tmp_path / "blobs" / f"{manifest.sha256}.safetensors"
    whole = blob.read_bytes()
    for at in range(0, len(whole), 13):
        flip(blob, at)
        with pytest.raises(CorruptDataError, match=rf"{manifest.sha256}.*version 1"):
            store.load(1)
        blob.write_bytes(whole)
    for size in (0, len(whole) - 1, len(whole) + 1):
        blob.write_bytes((whole + b"x")[:size])
        with pytest.raises(CorruptDataError, match=f"has {size} bytes"):
            store.load(1)
    blob.unlink()
    with pytest.raises(CorruptDataError, match="is missing"):
        store.load(1)
    assert store.publish(weights(1), CONFIG).version == 2  # which heals the blob of both
    assert_same(store.load(1)[0], weights(1))
    path = tmp_path / "versions" / "00000001.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        flip(path, at)
        with pytest.raises(CorruptDataError, match=r"00000001.json.*version 1"):
            store.manifest(1)
        path.write_bytes(whole)
    path.write_bytes(b"[" * 200_000)
    with pytest.raises(CorruptDataError):
        store.manifest(1)


def test_a_manifest_cannot_name_another_file(tmp_path):
    import hashlib

    import msgspec

    store = WeightStore(tmp_path)
    raw = msgspec.to_builtins(store.publish(weights(1), CONFIG)) | {"sha256": "../../etc/passwd"}
    data = msgspec.json.encode(raw)
    envelope = {"manifest": msgspec.Raw(data), "sha256": hashlib.sha256(data).hexdigest()}
    (tmp_path / "versions" / "00000001.json").write_bytes(msgspec.json.encode(envelope))
    with pytest.raises(CorruptDataError, match="cannot be decoded"):
        store.load(1)


def test_prune_keeps_the_newest_and_the_pinned(tmp_path):
    store = WeightStore(tmp_path)
    for seed in range(1, 7):
        store.publish(weights(seed), CONFIG)
    store.pin(2)
    (tmp_path / "blobs" / ".left.tmp").write_bytes(b"x")
    assert store.prune(2) == [1, 3, 4]
    assert store.versions() == [2, 5, 6]
    assert len(list((tmp_path / "blobs").iterdir())) == 3
    for version in (2, 5, 6):
        assert_same(store.load(version)[0], weights(version))
    store.unpin(2)
    assert store.prune(2) == [2]
    with pytest.raises(VersionGoneError, match=r"version 2 .* the newest is 6"):
        store.load(2)
    with pytest.raises(VersionGoneError):
        store.pin(2)
    with pytest.raises(ConfigError, match="at least 1"):
        store.prune(0)
    assert issubclass(VersionGoneError, FileNotFoundError)
    assert issubclass(VersionGoneError, EmbodiedError)


def test_prune_deletes_no_blob_while_a_manifest_is_damaged(tmp_path):
    store = WeightStore(tmp_path)
    for seed in (1, 2, 3):
        store.publish(weights(seed), CONFIG)
    flip(tmp_path / "versions" / "00000003.json", 40)
    assert store.prune(1) == [1, 2]
    assert len(list((tmp_path / "blobs").iterdir())) == 3


def test_readers_during_publishing_and_pruning(tmp_path):
    store, stop, problems, loads = WeightStore(tmp_path), threading.Event(), [], []

    def read():
        watcher = WeightWatcher(WeightStore(tmp_path))
        while not stop.is_set():
            loaded = watcher.poll()
            if watcher.last_error is not None:
                problems.append(watcher.last_error)
            if loaded is not None:
                assert loaded[0]["net.steps"] == loaded[1].version
                loads.append(loaded[1].version)

    thread = threading.Thread(target=read)
    thread.start()
    for seed in range(1, 80):
        store.publish(weights(seed), CONFIG)
        store.prune(1)
    stop.set()
    thread.join()
    assert problems == [] and loads == sorted(set(loads)) and loads


def test_prune_waits_for_a_version_that_is_being_published(tmp_path, monkeypatch):
    """Its blob is there before its manifest, and looks as if nobody needed it."""
    from embodied.weights import store as store_module

    WeightStore(tmp_path).publish(weights(1), CONFIG)
    pruning = threading.Thread(target=lambda: WeightStore(tmp_path).prune(1))
    real = store_module._create

    def create(path, data):
        pruning.start()
        pruning.join(0.2)
        assert pruning.is_alive()
        return real(path, data)

    monkeypatch.setattr(store_module, "_create", create)
    WeightStore(tmp_path).publish(weights(2), CONFIG)
    pruning.join()
    assert_same(WeightStore(tmp_path).load(2)[0], weights(2))


def test_watcher_takes_the_latest_and_skips(tmp_path):
    store = WeightStore(tmp_path)
    watcher = WeightWatcher(store)
    assert watcher.poll() is None
    for seed in (1, 2, 3):
        store.publish(weights(seed), CONFIG)
    loaded = watcher.poll()
    assert loaded is not None and loaded[1].version == watcher.version == 3
    assert watcher.poll() is None
    assert WeightWatcher(store, version=3).poll() is None


def test_watcher_keeps_the_old_policy_when_the_newest_is_damaged(tmp_path):
    store = WeightStore(tmp_path)
    watcher = WeightWatcher(store)
    store.publish(weights(1), CONFIG)
    assert watcher.poll() is not None
    manifest = store.publish(weights(2), CONFIG)
    flip(tmp_path / "blobs" / f"{manifest.sha256}.safetensors", -1)
    for _ in range(3):
        assert watcher.poll() is None
        assert watcher.version == 1 and watcher.num_errors == 1
        assert isinstance(watcher.last_error, CorruptDataError)
    store.publish(weights(3), CONFIG)
    loaded = watcher.poll()
    assert loaded is not None and loaded[1].version == 3 and watcher.last_error is None


def test_arrays_are_read_as_safetensors_reads_them_into_memory_that_is_there(tmp_path):
    store = WeightStore(tmp_path)
    kinds = ["bool", *(f"{k}{8 * n}" for k in ("uint", "int") for n in (1, 2, 4, 8))]
    kinds += ["float16", "float32", "float64"]
    rng = np.random.default_rng(0)
    arrays = {kind: rng.integers(0, 2, (2, 3)).astype(kind) for kind in kinds}
    arrays |= {"number": np.array(1.5), "nothing": np.zeros((0, 4), np.float32)}
    manifest = store.publish(arrays, CONFIG)
    theirs = safetensors.numpy.load_file(tmp_path / "blobs" / f"{manifest.sha256}.safetensors")
    memory = np.empty(manifest.num_bytes + 9, np.uint8)
    for given in (None, memory, memory[:5]):
        found, _ = store.load(1, given)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == theirs[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
            assert found[name].size == 0 or np.shares_memory(found[name], memory) == (
                given is memory
            )


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b'{"w":{"dtype":"F9","shape":[1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[-4,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,3]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":0}}',
    ],
)
def test_a_header_that_lies_is_refused(header):
    blob = np.frombuffer(len(header).to_bytes(8, "little") + header + bytes(4), np.uint8)
    with pytest.raises(CorruptDataError, match="no safetensors"):
        tensors(blob)


def test_watcher_takes_the_newer_one_when_it_loses_against_prune(tmp_path, monkeypatch):
    store = WeightStore(tmp_path)
    store.publish(weights(1), CONFIG)
    real = store.load

    def load(version, memory):
        if version == 1:
            store.publish(weights(2), CONFIG)
            store.prune(1)
        return real(version, memory)

    monkeypatch.setattr(store, "load", load)
    loaded = WeightWatcher(store).poll()
    assert loaded is not None and loaded[1].version == 2


def test_wrong_input(tmp_path):
    store = WeightStore(tmp_path)
    for config in (b"[1]", b"{", b"\xff", {"x": object()}):
        with pytest.raises(ConfigError, match="no JSON object"):
            store.publish(weights(1), config)
    for array in (np.array([object()]), np.zeros(2, ">f4")):
        with pytest.raises(SpecError, match="dtype"):
            store.publish({"w": array}, {})
    assert store.latest_version() is None


KILLED = """
import sys
import numpy as np
from embodied.weights.store import WeightStore
store = WeightStore(sys.argv[1])
i = (store.latest_version() or 0)
while True:
    i += 1
    print(store.publish({"w": np.full(200_000, i)}, {}).version, flush=True)
"""


def test_a_publisher_killed_at_any_moment_leaves_whole_versions(tmp_path):
    import time

    acknowledged = 0
    for trial in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.013 * trial)
        child.kill()
        lines = child.stdout.read().splitlines()
        child.wait()
        acknowledged = max([acknowledged, *map(int, lines[:-1])])
        store = WeightStore(tmp_path)
        versions = store.versions()
        assert versions == list(range(1, len(versions) + 1)) and len(versions) >= acknowledged
        for version in versions:
            assert store.load(version)[0]["w"][0] == version
    store.prune(2)
    assert not list(tmp_path.rglob("*.tmp"))
