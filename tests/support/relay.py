"""A TCP relay that can cut, stall and count: a bad network in one process."""

import contextlib
import socket
import struct
import threading

_RESET = struct.pack("ii", 1, 0)


class Relay:
    """Passes connections on to a port of this host.

    cut_after: bytes of both directions after which a connection is cut; each new connection takes
    the next of `cuts`, and passes everything when there are none left. counted: bytes passed.
    """

    def __init__(self, port: int, cuts: list[int] | None = None) -> None:
        self._target = port
        self.cuts = list(cuts or [])
        self.counted = 0
        self.connections = 0
        self.flowing = threading.Event()
        self.flowing.set()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                left = [self.cuts.pop(0) if self.cuts else 1 << 60]
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            with self._lock:
                self._open |= {near, far}
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(*ends, left), daemon=True).start()

    def _pump(self, source, sink, left) -> None:
        try:
            while data := source.recv(1 << 16):
                self.flowing.wait()
                with self._lock:
                    part = data[: left[0]]
                    left[0] -= len(part)
                    self.counted += len(part)
                sink.sendall(part)
                if left[0] == 0:
                    break
        except OSError:
            pass
        self._cut(source, sink)

    def _cut(self, *ends) -> None:
        with self._lock:
            self._open -= set(ends)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut(self) -> None:
        """Cut all connections; new ones are taken."""
        with self._lock:
            ends = list(self._open)
        self._cut(*ends)

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        self.flowing.set()
        self.cut()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
