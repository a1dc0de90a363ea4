import http.server
import threading
import time

import numpy as np
import pytest

from embodied.core import config
from embodied.core.errors import ConfigError, DeviceLostError
from hal.drivers.opencv import OpenCVCamera, OpenCVConfig

cv2 = pytest.importorskip("cv2")


def picture(red, green=0, blue=0):
    return np.full((48, 64, 3), (blue, green, red), np.uint8)


def camera(source, **options):
    return OpenCVCamera(OpenCVConfig(source=source, **({"width": 64, "height": 48} | options)))


@pytest.fixture
def film(tmp_path):
    path = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 30, (64, 48))
    for k in range(6):
        writer.write(picture(40 * k, blue=20))
    writer.release()
    return path


@pytest.fixture
def stream():
    """A camera on the network that gives pictures until `stop` is set, then nothing for ten s."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=x")
            self.end_headers()
            data = cv2.imencode(".jpg", picture(200))[1].tobytes()
            head = f"--x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            while not stop.wait(0.02):
                self.wfile.write(head.encode() + data + b"\r\n")
            end.wait(10)

        def log_message(self, *_):
            pass

    stop, end = threading.Event(), threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/front.mjpg", stop
    stop.set()
    end.set()
    server.shutdown()
    server.server_close()


def test_reads_every_picture_of_a_film_as_rgb(film):
    options = {"name": "opencv", "source": film, "width": 64, "height": 48, "fps": 30}
    cls, typed = config.component("cameras", options, "cameras.front")
    opened = cls(typed)
    assert opened.spec.shape == (48, 64, 3) and opened.spec.rate_hz == 30.0
    opened.open()
    for k in range(6):
        found = opened.read()
        assert found.shape == (48, 64, 3) and found.dtype == np.uint8
        assert np.abs(found.mean(axis=(0, 1)) - (40 * k, 0, 20)).max() < 8
    with pytest.raises(DeviceLostError, match="no more pictures"):
        opened.read()
    opened.close()
    opened.close()
    opened.open()
    assert opened.read().mean() < 20
    opened.close()
    with pytest.raises(DeviceLostError, match="call open"):
        opened.read()


def test_a_stream_that_stops_is_an_error_in_time(stream):
    url, stop = stream
    opened = camera(url, timeout_s=0.4)
    opened.open()
    assert opened.read()[..., 0].mean() > 180
    stop.set()
    start_s = time.monotonic()
    with pytest.raises(DeviceLostError, match=r"no picture within 0\.4 s|no more pictures"):
        for _ in range(1000):
            opened.read()
    assert time.monotonic() - start_s < 5.0, "the stream itself would last for ten"
    opened.close()


def test_another_size_than_configured_is_refused(film):
    with pytest.raises(ConfigError, match="gives pictures of 64x48; 32x48 are configured"):
        camera(film, width=32).open()


@pytest.mark.parametrize("source", [93, "/dev/video93", "nowhere.avi"])
def test_what_is_not_there_is_named(source):
    opened = camera(source)
    with pytest.raises(DeviceLostError, match=f"camera {source}: cannot be opened"):
        opened.open()
    opened.close()


@pytest.mark.parametrize("wrong", [{"width": 0}, {"timeout_s": 0.0}, {"fourcc": "MJPEG"}])
def test_senseless_options_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        camera(0, **wrong)
