"""A learner's site that takes experience in, an actor's steps, and what arrived of them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from embodied.buffer.log.tail import LogReader
from embodied.buffer.serve.messages import REPLIES
from embodied.buffer.serve.service import BufferService
from embodied.buffer.spool.messages import UPLOAD_REPLIES, UPLOADS, UploadRequest, unwrap
from embodied.buffer.spool.receiver import Receiver
from embodied.buffer.spool.uploader import Uploader
from embodied.buffer.steps.records import decode_header
from embodied.comms.channels import RequestClient, RequestServer
from embodied.core.episodes import Step

HOST = "robot-1"
STREAM = "robot-1/arm"
MOST_PUMPS = 20_000


def make_step(episode, index, length, stream=STREAM, numbers=8, **fields):
    """A step whose arrays tell where it belongs; at index `length` the final observation."""
    state = np.full(numbers, episode * 1000 + index, np.float32)
    observation = fields.pop("observation", {"observation.state": state})
    action = np.array([episode, index], np.float32)
    return Step(stream, episode, index, observation, action, final=index == length, **fields)


def record(buffer, episode, length=9, stream=STREAM, **fields):
    """Add a whole episode to a buffer."""
    for index in range(length + 1):
        buffer.add(make_step(episode, index, length, stream, **fields))


def payloads_in(path):
    """Key → payloads of all steps in a log, in its order, read without any index."""
    reader = LogReader(path)
    found: dict[tuple[str, int, int], list[bytes]] = {}
    for entry in reader.poll():
        if entry.schema > 1:
            header, _ = decode_header(entry.payload)
            key = (header.stream, header.episode, header.index)
            found.setdefault(key, []).append(bytes(entry.payload))
    assert reader.damaged == []
    return found


def check_arrived(source, target, *, without=()):
    """Every step of the source's log is in the target's, once, the same, and in order."""
    want, found = payloads_in(source), payloads_in(target)
    assert all(len(copies) == 1 for copies in found.values()), "a step is there twice"
    assert {k: v for k, v in want.items() if k[:2] not in without} == found
    seen: dict[tuple[str, int], int] = {}
    for stream, episode, index in found:
        assert seen.get((stream, episode), -1) < index
        seen[stream, episode] = index


class Gateway:
    """A gateway for one host, serving in a thread of its own until it is cut."""

    def __init__(self, folder: Path, host: str = HOST) -> None:
        self._stop = threading.Event()
        self._up = threading.Event()
        self._folder, self._host = folder, host
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        assert self._up.wait(10)

    def _serve(self) -> None:
        with (
            RequestClient(f"ipc://{self._folder}/b", REPLIES) as requests,
            RequestServer(
                f"ipc://{self._folder}/g", UPLOADS, Receiver(self._host, requests).handle
            ) as server,
        ):
            self._up.set()
            while not self._stop.is_set():
                server.poll(0.01)

    def cut(self) -> None:
        """End it."""
        self._stop.set()
        self.thread.join(20)


@contextmanager
def learners_buffer(folder: Path, name: str = "b") -> Iterator[Path]:
    """A BufferService in a thread, on the socket `name`; yields the folder of its log."""
    stop = threading.Event()
    with BufferService(folder / "learner", f"ipc://{folder}/{name}", 1 << 20) as service:
        thread = threading.Thread(target=service.serve, args=(stop.is_set, 0.01))
        thread.start()
        try:
            yield folder / "learner"
        finally:
            stop.set()
            thread.join(20)


@contextmanager
def learners_site(folder: Path) -> Iterator[Path]:
    """A BufferService and a gateway; yields the folder of its log."""
    with learners_buffer(folder) as log:
        gateway = Gateway(folder)
        try:
            yield log
        finally:
            gateway.cut()


class Link(RequestClient):
    """The link, which notes the steps of each batch that it takes: (stream, episode, index)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"ipc://{folder}/g", UPLOAD_REPLIES)
        self.batches: list[list[tuple[str, int, int]]] = []
        self.nbytes = 0

    def send(self, header, arrays):
        number = super().send(header, arrays)
        if number is not None and isinstance(header, UploadRequest):
            data, lengths = unwrap(header, arrays)
            batch, start = [], 0
            for length in lengths:
                step, _ = decode_header(data[start : start + length])
                batch.append((step.stream, step.episode, step.index))
                start += length
            self.batches.append(batch)
            self.nbytes += arrays["payloads"].nbytes
        return number

    def reach(self) -> None:
        """Wait until somebody is connected."""
        assert self.wait(10, 2)

    @property
    def sent(self) -> list[tuple[str, int, int]]:
        """All steps that were sent, in order."""
        return [key for batch in self.batches for key in batch]


def pump_until(uploader: Uploader, link: RequestClient, done) -> None:
    """Pump until done() is true; fails after many pumps."""
    for _ in range(MOST_PUMPS):
        if not uploader.pump():
            if done():
                return
            link.wait(0.01)
    raise AssertionError(f"not done: {uploader.status()}")


def pump_all(uploader: Uploader, link: RequestClient) -> None:
    """Pump until everything that the spool holds is acknowledged."""
    pump_until(uploader, link, lambda: uploader.status().depth_steps == 0)
