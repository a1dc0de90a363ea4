import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from tmpfs import script_in_tmpfs

from embodied.buffer.log.storage import Storage
from embodied.buffer.log.tail import LogReader
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.serve.messages import REPLIES, AppendRequest
from embodied.buffer.serve.service import BufferClient, BufferService, LocalBuffer
from embodied.buffer.steps.records import decode_header, encode_step
from embodied.buffer.steps.schema import Codecs, encode_schema
from embodied.buffer.write.progress import StepOrderError
from embodied.comms.channels import RequestClient
from embodied.core.errors import (
    CorruptDataError,
    LinkError,
    RunInUseError,
    SpecError,
    StorageFullError,
)

SERVE = """
import sys
from pathlib import Path
from embodied.buffer.serve.service import BufferService
service = BufferService(Path(sys.argv[1]), sys.argv[2], 1 << 18)
print("up", flush=True)
service.serve(lambda: False)
"""


@contextmanager
def serving(path, address):
    with BufferService(path, address, 1 << 18) as service:
        stop = threading.Event()
        thread = threading.Thread(target=service.serve, args=(stop.is_set, 0.01))
        thread.start()
        try:
            yield service
        finally:
            stop.set()
            thread.join()


def start(path, address):
    child = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(path), address], stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"up\n"
    return child


def keys_in_log(path):
    """Keys of all steps in the log, in its order, read without the index that drops duplicates."""
    reader = LogReader(path)
    headers = [decode_header(r.payload)[0] for r in reader.poll() if r.schema > 1]
    assert reader.damaged == []
    return [(h.stream, h.episode, h.index) for h in headers]


def test_steps_arrive_and_are_counted(tmp_path, make_episode):
    address = f"ipc://{tmp_path}/s"
    with (
        serving(tmp_path / "log", address) as service,
        BufferClient(address, "a") as a,
        BufferClient(service.address, "b") as b,
    ):
        assert a.next_episode() == 0
        for client, stream in ((a, "a"), (b, "b")):
            for episode in range(3):
                for step in make_episode(stream, episode, 20):
                    client.add(step)
        assert a.next_episode() == 3 and a.next_episode("c") == 0
        a.flush()
        b.flush()
        assert a.unacknowledged == b.unacknowledged == 0
        assert a.next_episode("b") == 3
        stats = a.stats()
        assert (stats.steps, stats.episodes, stats.num_bad) == (120, 6, 0)
        assert stats.streams["a"].closed == 3 and stats.durable_seq >= 125
        for step in make_episode("a", 0, 20):
            a.add(step)
        a.flush()
        assert a.stats().steps == 120
    reader = ReplayReader(tmp_path / "log")
    assert reader.refresh() == 120 and reader.num_closed == 6


def test_an_answer_that_came_while_the_client_stood_still_is_taken(
    tmp_path, make_episode, monkeypatch
):
    """As a process that was stopped finds it: its time is over, and the answer there."""
    address = f"ipc://{tmp_path}/s"
    with serving(tmp_path / "log", address), BufferClient(address, "a") as client:
        pump = client.pump

        def late():
            pump()
            time.sleep(0.3)
            if client.unacknowledged:  # however long the service takes on a busy machine
                client._client.wait(10.0)

        steps = make_episode("a", 0, 5)
        for step in steps:
            client.add(step)
        monkeypatch.setattr(client, "pump", late)
        client.flush(0.1)
        assert client.unacknowledged == 0
    assert keys_in_log(tmp_path / "log") == [step.key for step in steps]


def test_service_killed_while_the_client_adds(tmp_path, make_episode):
    """Promise 1: nothing that was acknowledged or is still pending is lost, nothing is doubled."""
    log, address = tmp_path / "log", f"ipc://{tmp_path}/s"
    steps = [step for episode in range(60) for step in make_episode("a", episode, 49)]
    kills = sorted(random.Random(1).sample(range(200, len(steps) - 200), 4))
    child = start(log, address)
    acknowledged = 0
    try:
        with BufferClient(address, "a", batch_steps=32, resend_s=0.3) as client:
            for i, step in enumerate(steps):
                client.add(step)
                time.sleep(0.0002)
                if i in kills:
                    acknowledged = i + 1 - client.unacknowledged
                    child.kill()
                    child.wait()
                    found = keys_in_log(log)
                    assert len(found) >= acknowledged > 0
                    child = start(log, address)
            client.flush(30)
            assert client.unacknowledged == 0 and client.num_resent > 0
    finally:
        child.kill()
        child.wait()
    assert keys_in_log(log) == [step.key for step in steps]
    reader = ReplayReader(log)
    assert reader.refresh() == 60 * 49 and reader.num_closed == 60
    rows = np.concatenate([np.append(info.rows, info.final_row) for info in reader.finished()])
    assert (reader.take("action", rows) == [step.action for step in steps]).all()


def test_acknowledgement_comes_after_the_sync(tmp_path, make_episode, monkeypatch):
    events = []
    real_sync = Storage.sync_data

    def slow_sync(self, fd):
        time.sleep(0.05)
        real_sync(self, fd)
        events.append("sync")

    monkeypatch.setattr(Storage, "sync_data", slow_sync)
    with serving(tmp_path / "log", f"ipc://{tmp_path}/s") as service:
        clients = [BufferClient(service.address, stream) for stream in "abcdefgh"]
        for client, stream in zip(clients, "abcdefgh", strict=True):
            client.stats()  # connected
            events.clear()
            for step in make_episode(stream, 0, 5):
                client.add(step)
        for client in clients:
            client.flush()
            assert events
            client.close()
        # One commit serves all requests that were pending: far fewer than one each.
        assert len(events) <= 2 * len(clients)


def test_nobody_there(tmp_path, make_episode):
    with BufferClient(f"ipc://{tmp_path}/s", "a", max_pending=10, block_s=0.1) as client:
        steps = make_episode("a", 0, 30)
        for step in steps[:10]:
            client.add(step)
        start_s = time.monotonic()
        with pytest.raises(LinkError, match="10 steps were not acknowledged"):
            client.add(steps[10])
        assert 0.1 <= time.monotonic() - start_s < 2
        with pytest.raises(LinkError, match="they are kept"):
            client.flush(0.05)
        with serving(tmp_path / "log", f"ipc://{tmp_path}/s"):
            client.flush(10)
            for step in steps[10:]:
                client.add(step)
            client.flush()
    assert keys_in_log(tmp_path / "log") == [step.key for step in steps]


def test_wrong_steps_are_refused_at_once(tmp_path, make_step):
    with BufferClient(f"ipc://{tmp_path}/s", "a") as client:
        client.add(make_step("a", 0, 0))
        with pytest.raises(SpecError, match="action of step"):
            client.add(make_step("a", 0, 1, action=np.zeros(9)))
        with pytest.raises(StepOrderError, match="whose last step has index 0"):
            client.add(make_step("a", 0, 2))
        client.add(make_step("a", 0, 1, final=True))
        with pytest.raises(StepOrderError, match="final observation at index 1 closed"):
            client.add(make_step("a", 0, 2))
        assert client.unacknowledged == 2


def test_what_the_service_refuses_is_raised_and_stays(tmp_path, make_step):
    address = f"ipc://{tmp_path}/s"
    with serving(tmp_path / "log", address):
        with BufferClient(address, "a") as first:
            first.add(make_step("a"))
            first.flush()
        with BufferClient(address, "b") as client:
            client.add(make_step("a", index=1, action=np.zeros(9)))
            for _ in range(2):
                with pytest.raises(SpecError, match="action of step at stream 'a', episode 0, in"):
                    client.flush()
        with BufferClient(address, "c", resend_s=0.1) as client:
            client.add(make_step("c", 0, 5))
            with pytest.raises(StepOrderError, match="index 0 is next"):
                client.flush(0.5)


def test_malformed_requests_do_no_harm(tmp_path, make_step):
    step = make_step("a")
    schema = Codecs().schema_of(step)
    payload = np.frombuffer(bytes(encode_step(step, schema)), np.uint8)
    lengths = np.array([payload.size], np.uint32)
    request = AppendRequest(encode_schema(schema))
    with (
        serving(tmp_path / "log", f"ipc://{tmp_path}/s") as service,
        RequestClient(service.address, REPLIES) as client,
    ):
        bad = [
            (request, {}),
            (request, {"payloads": payload, "lengths": lengths, "more": lengths}),
            (request, {"payloads": payload, "lengths": lengths + 1}),
            (request, {"payloads": payload, "lengths": lengths.astype(np.int64)}),
            (request, {"payloads": payload[:-8], "lengths": lengths - 8}),
            (request, {"payloads": payload[:0], "lengths": lengths[:0]}),
            (request, {"payloads": payload, "lengths": np.array([2**32 - 1, 1], np.uint32)}),
            (AppendRequest(b"\xff"), {"payloads": payload, "lengths": lengths}),
            (AppendRequest(b"\x91" * 9999), {"payloads": payload, "lengths": lengths}),
        ]
        for header, arrays in bad:
            with pytest.raises(CorruptDataError):
                client.request(header, arrays, 5)
        reply, _ = client.request(request, {"payloads": payload, "lengths": lengths}, 5)
        assert (reply.num_new, reply.num_duplicate) == (1, 0)
        reply, _ = client.request(request, {"payloads": payload, "lengths": lengths}, 5)
        assert (reply.num_new, reply.num_duplicate) == (0, 1)
    assert keys_in_log(tmp_path / "log") == [step.key]


def test_a_second_service_does_not_take_the_address_over(tmp_path, make_episode):
    address = f"ipc://{tmp_path}/s"
    with serving(tmp_path / "log", address), BufferClient(address, "a") as client:
        with pytest.raises(RunInUseError):
            BufferService(tmp_path / "log", address)
        for step in make_episode("a"):
            client.add(step)
        client.flush(5)


def test_a_full_disk_is_named_and_passes(tmp_path, make_episode):
    script = """
import os, sys
from pathlib import Path
from embodied.buffer.serve.service import BufferService
mount, address, freed = sys.argv[1:]
with open(mount + "/ballast", "wb") as file:
    file.write(bytes(3_950_000))
service = BufferService(Path(mount) / "log", address, 40_000)
print("up", flush=True)
def tick():
    if os.path.exists(freed) and os.path.exists(mount + "/ballast"):
        os.unlink(mount + "/ballast")
    return False
service.serve(tick, 0.02)
"""
    (tmp_path / "mnt").mkdir()
    address, freed = f"ipc://{tmp_path}/s", tmp_path / "freed"
    child = subprocess.Popen(
        script_in_tmpfs(script, tmp_path / "mnt", address, freed, size="4m"),
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        with BufferClient(address, "a", batch_steps=16, resend_s=0.2, block_s=0.5) as client:
            steps = [step for episode in range(50) for step in make_episode("a", episode, 19)]
            for step in steps:
                client.add(step)
            with pytest.raises(
                StorageFullError, match=r"no space left on the file system of .*mnt"
            ):
                client.flush(1)
            stats = client.stats()
            assert 0 < stats.steps < 950
            freed.touch()
            client.flush(10)
            stats = client.stats()
            assert (stats.steps, stats.episodes) == (950, 50)
    finally:
        child.kill()
        child.wait()


def test_local_buffer_is_the_same_sink(tmp_path, make_episode):
    for _ in range(2):
        with LocalBuffer(tmp_path, "a") as sink:
            for step in make_episode("a", 0, 5) + make_episode("b", 0, 2):
                sink.add(step)
            sink.flush()
            assert (sink.next_episode(), sink.next_episode("c")) == (1, 0)
            assert (sink.counts().steps, sink.counts().episodes) == (7, 2)


def test_nobody_waits_for_a_service_that_has_ended_for_good(tmp_path, make_episode):
    address, gone = f"ipc://{tmp_path}/s", threading.Event()
    with BufferClient(address, "a", max_pending=20, block_s=60, over=gone.is_set) as client:
        *steps, last = make_episode("a", 0, 20)
        for step in steps:
            client.add(step)
        threading.Timer(0.3, gone.set).start()
        started_s = time.monotonic()
        with pytest.raises(LinkError, match="has ended"):
            client.next_episode(timeout_s=60)
        with pytest.raises(LinkError, match=r"20 steps were not acknowledged .* before it ended"):
            client.add(last)
        with pytest.raises(LinkError, match="before it ended"):
            client.flush(timeout_s=60)
        assert time.monotonic() - started_s < 20
