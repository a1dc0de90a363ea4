"""The process of a policy server: a socket, a thread that answers at it, and the policy."""

import fcntl
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec

from embodied.comms.deferred import DeferredServer
from embodied.comms.sockets import check_address
from embodied.core.errors import ConfigError, RunInUseError
from embodied.run.remote import messages as m
from embodied.run.serving.server import BatchingConfig, PolicyServer
from embodied.run.serving.weights import Served
from hal.pool.state import state_dir
from policies.acting import InferenceConfig

_POLL_S = 0.1


class ServeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """checkpoint: a policy folder or a run directory. listen: ipc:///absolute/path or
    tcp://127.0.0.1:PORT; null for a Unix socket in the state directory. follow: take newer weights
    of the run as they are published. report_s: time between two lines about a server in use."""

    checkpoint: str
    listen: str | None
    follow: bool
    report_s: float
    batching: BatchingConfig
    inference: InferenceConfig = msgspec.field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        """Raise ConfigError for what a server cannot do."""
        if self.inference.remote is not None:
            raise ConfigError("a policy server decides itself: leave inference.remote null")
        if not self.inference.warm_up:
            raise ConfigError("a policy server is ready once it is warm: inference.warm_up=true")
        if not self.report_s > 0:
            raise ConfigError(f"report_s is {self.report_s}; it must be positive")
        check_address(self.address)

    @property
    def address(self) -> str:
        """Where to listen."""
        return self.listen or f"ipc://{state_dir()}/policy.sock"


def serve(
    config: ServeConfig, keep_going: Callable[[], bool], on_round: Callable[[PolicyServer], None]
) -> None:
    """Serve until keep_going() is false. on_round: called between two batches, once it is ready.

    RunInUseError if another process serves there; errors of PolicyServer.run.
    """

    def load() -> Served:
        return Served(
            Path(config.checkpoint),
            config.inference,
            rows=config.batching.rows,
            follow=config.follow,
        )

    server = PolicyServer(load, config.batching)
    closing = threading.Event()

    def answer(socket: DeferredServer) -> None:
        while not closing.is_set():
            socket.poll(_POLL_S)
        socket.poll(0.0)  # tells those who still wait that the server ends
        socket.close()

    with _address_held(config.address), ThreadPoolExecutor(1, "requests") as executor:
        socket = DeferredServer(config.address, m.REQUESTS, server.submit)
        answering = executor.submit(answer, socket)

        def going() -> bool:
            if answering.done():
                answering.result()
            on_round(server)
            return keep_going()

        try:
            server.run(going)
        finally:
            closing.set()


@contextmanager
def _address_held(address: str) -> Generator[None]:
    """Hold a Unix socket's address against a second server, as long as this process lives."""
    kind, _, path = address.partition("://")
    if kind != "ipc":
        yield
        return
    try:
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"listen={address}: {path}.lock: {error.strerror}") from error
    try:
        _lock(fd, address)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, address: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunInUseError(
            f"another process serves at {address}; stop it, or listen elsewhere"
        ) from None
