"""A run's links for Prometheus, on this host's loopback only."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from embodied.core.errors import ConfigError, EmbodiedError
from embodied.run.site.status import LinksStatus, read_status

if TYPE_CHECKING:
    from prometheus_client import Metric


@contextmanager
def serve_metrics(port: int | None, folder: Path) -> Generator[None]:
    """Serve http://127.0.0.1:PORT/metrics while the block runs; nothing if port is None.

    ConfigError if the port is taken.
    """
    if port is None:
        yield
        return
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(_Links(folder))
    try:
        server, thread = start_http_server(port, "127.0.0.1", registry)
    except OSError as error:
        raise ConfigError(f"metrics_port={port}: {error.strerror}; choose another") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Links:
    """Makes the metrics anew from the run's file at each scrape."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable["Metric"]:
        """All metrics; none before the run's file is there."""
        try:
            status = read_status(self._folder)
        except EmbodiedError:
            return []
        return _metrics(status)


def _metrics(status: LinksStatus) -> Iterable["Metric"]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    host, kind = ["host"], ["host", "kind"]
    gauges = {
        "connected": ("whether the host has a session", lambda h: float(h.connected)),
        "rtt_seconds": ("round trip", lambda h: None if h.rtt_ms is None else h.rtt_ms / 1e3),
        "weights_version": ("weights at the host", lambda h: h.version),
        "weights_age_seconds": ("since the learner confirmed them", lambda h: h.weights_age_s),
        "waits": ("whether episodes wait for newer weights", lambda h: float(bool(h.waits))),
        "spool_steps": ("steps not yet durable at the learner's site", lambda h: h.spool_steps),
        "spool_bytes": ("their bytes", lambda h: h.spool_bytes),
        "spool_oldest_seconds": ("wait of the oldest of them", lambda h: h.oldest_s),
    }
    for name, (text, value) in gauges.items():
        gauge = GaugeMetricFamily(f"embodied_host_{name}", text, labels=host)
        for each in status.hosts:
            if (found := value(each)) is not None:
                gauge.add_metric([each.name], found)
        yield gauge
    for field, text in (
        ("sent_bytes", "bytes sent"),
        ("received_bytes", "bytes received"),
        ("dropped", "messages that gave way"),
    ):
        counter = CounterMetricFamily(f"embodied_link_{field}", text, labels=kind)
        for each in status.hosts:
            for name, traffic in each.traffic.items():
                counter.add_metric([each.name, name], getattr(traffic, field))
        yield counter
    newest = GaugeMetricFamily("embodied_weights_version", "newest weights at the gateway")
    if status.version is not None:
        newest.add_metric([], status.version)
    yield newest
