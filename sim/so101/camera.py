"""Virtual cameras: pictures of the virtual arm as MJPEG over HTTP, as an IP camera gives them.

A process beside the arm's, so that rendering never delays the bus: `/front.mjpg`, `/wrist.mjpg`
are streams, `/front.jpg`, `/wrist.jpg` single pictures. OpenCV's VideoCapture opens the streams.
Its FFmpeg backend refuses to set size and rate, and LeRobot's OpenCVCamera sets what its config
holds, which a robot's config must hold: set width, height and fps of the camera object, not of
the config, to None before `connect`.
"""

import argparse
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import numpy as np

from embodied.comms.channels import RequestClient
from embodied.core.errors import EmbodiedError, LinkError
from embodied.core.processes import die_with_parent
from sim.rendering import Cameras
from sim.so101 import messages
from sim.so101.arm import N, load_model, mujoco

WIDTH, HEIGHT, FPS = 640, 480, 30
CAMERAS = ("front", "wrist")
_QUALITY = 85
_NICENESS = 10
_ANSWER_S = 1.0
_FIRST_S, _FRESH_S = 30.0, 5.0
"""Waited for a camera's first picture, which a renderer is built for, and for others."""
_BOUNDARY = b"picture"


@dataclass
class Stream:
    """The newest picture of one camera, and how many are watching."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    watchers: int = 0
    jpeg: bytes = b""
    count: int = 0

    def publish(self, jpeg: bytes) -> None:
        """Replace the picture; a watcher that is slow misses some."""
        with self.changed:
            self.jpeg, self.count = jpeg, self.count + 1
            self.changed.notify_all()

    def wait(self, count: int) -> tuple[bytes, int]:
        """The first picture after number `count`, with its number; LinkError if none comes."""
        with self.changed:
            timeout_s = _FRESH_S if self.count else _FIRST_S
            if not self.changed.wait_for(lambda: self.count > count, timeout_s):
                raise LinkError("no new picture; is the arm's process running?")
            return self.jpeg, self.count


class PictureServer(ThreadingHTTPServer):
    """Serves streams on an inherited listening socket."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, streams: dict[str, Stream]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.streams = streams


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name, _, kind = self.path.lstrip("/").partition(".")
        streams = cast(PictureServer, self.server).streams
        stream = streams.get(name)
        if stream is None or kind not in ("mjpg", "jpg"):
            self.send_error(HTTPStatus.NOT_FOUND, f"only {', '.join(streams)}")
            return
        with stream.changed:
            stream.watchers += 1
            count = stream.count
        try:
            self._single(stream, count) if kind == "jpg" else self._stream(stream, count)
        except (OSError, LinkError):
            self.close_connection = True
        finally:
            with stream.changed:
                stream.watchers -= 1

    def _single(self, stream: Stream, count: int) -> None:
        jpeg, _ = stream.wait(count)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(jpeg)))
        self.end_headers()
        self.wfile.write(jpeg)

    def _stream(self, stream: Stream, count: int) -> None:
        self.send_response(HTTPStatus.OK)
        kind = f"multipart/x-mixed-replace; boundary={_BOUNDARY.decode()}"
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        while True:
            jpeg, count = stream.wait(count)
            head = b"--%b\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
            self.wfile.write(head % (_BOUNDARY, len(jpeg)) + jpeg + b"\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


def encode_jpeg(picture: np.ndarray) -> bytes:
    """A picture [height, width, 3], uint8, as JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def film(control: str, streams: dict[str, Stream], stopping: threading.Event) -> None:
    """Render what is watched, FPS times a second, as the arm behind `control` stands."""
    model = load_model()
    data = mujoco.MjData(model)
    cameras = Cameras(model, shadows=False)
    client = RequestClient(control, messages.State)
    due_s = time.monotonic()
    try:
        while not stopping.is_set():
            due_s = max(due_s + 1 / FPS, time.monotonic() - 1 / FPS)
            watched = [name for name, stream in streams.items() if stream.watchers]
            if watched:
                _, arrays = client.request(messages.ReadState(), {}, _ANSWER_S)
                data.qpos[:N] = arrays["q_rad"]
                mujoco.mj_forward(model, data)
            for name in watched:
                streams[name].publish(encode_jpeg(cameras.render(data, name, WIDTH, HEIGHT)))
            stopping.wait(max(0.0, due_s - time.monotonic()))
    finally:
        client.close()
        cameras.close()


def start_cameras(port: int, control: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start the process for the arm behind `control`; returns it and its HTTP port (0: any).

    It ends with its parent. Without OpenGL it ends at once, and connections are refused.
    """
    with socket.create_server(("127.0.0.1", port)) as listener:
        command = [sys.executable, "-m", "sim.so101.camera", "--control", control]
        command += ["--fd", str(listener.fileno()), "--parent", str(os.getpid())]
        process = subprocess.Popen(
            command,
            env={**os.environ, "LP_NUM_THREADS": "1"},  # of Mesa's software renderer
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
        )
        return process, int(listener.getsockname()[1])


def main() -> int:
    """Entry of the process that `start_cameras` starts."""
    parser = argparse.ArgumentParser(prog="python -m sim.so101.camera", description=__doc__)
    parser.add_argument("--control", required=True, help="the arm's control channel")
    parser.add_argument("--fd", type=int, required=True, help="listening socket, inherited")
    parser.add_argument("--parent", type=int, required=True, help="end when this process dies")
    arguments = parser.parse_args()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(arguments.parent)
    os.nice(_NICENESS)
    streams = {name: Stream() for name in CAMERAS}
    server = PictureServer(socket.socket(fileno=arguments.fd), streams)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        film(arguments.control, streams, stopping)
    except EmbodiedError as error:
        sys.stderr.write(f"camera: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
