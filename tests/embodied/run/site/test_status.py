"""The state of links: its file, `embodied status`, and Prometheus."""

import socket
import urllib.request

import msgspec
import pytest

from embodied.cli.main import main
from embodied.core.errors import ConfigError, CorruptDataError
from embodied.run.site.metrics import serve_metrics
from embodied.run.site.status import (
    FILE,
    HostStatus,
    KindStatus,
    LinksStatus,
    read_status,
    write_status,
)

HOST = HostStatus(
    name="bench",
    connected=True,
    since_s=1.0,
    heard_s=0.4,
    rtt_ms=41.5,
    traffic={"experience": KindStatus(3, 1200, 400, 7_300_000, 2, 1)},
    version=7,
    episodes=12,
    spool_steps=340,
    spool_bytes=2_000_000,
    oldest_s=8.0,
)
AWAY = msgspec.structs.replace(
    HOST, name="lab", connected=False, rtt_ms=None, traffic={}, version=None, reason="refused: no"
)
STATUS = LinksStatus(
    run="reach", site="gateway", address="127.0.0.1:7443", version=9, over=False, hosts=(HOST, AWAY)
)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_what_was_written_is_read(tmp_path):
    with pytest.raises(ConfigError, match="has no links"):
        read_status(tmp_path)
    write_status(tmp_path, STATUS)
    assert read_status(tmp_path) == STATUS
    (tmp_path / FILE).write_bytes(b'{"run": 1}')
    with pytest.raises(CorruptDataError, match=r"links\.json is damaged"):
        read_status(tmp_path)


def test_status_shows_hosts_links_and_spools(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write_status(tmp_path, STATUS)
    assert main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for words in ("weights v9", "bench", "up", "41.5 ms", "v7", "340 steps (2.0 MB)", "7.3 MB"):
        assert words in shown
    assert "down" in shown and "refused: no" in shown
    old = msgspec.structs.replace(STATUS, t_s=STATUS.t_s - 60)
    write_status(tmp_path, old)
    assert main(["status", str(tmp_path)]) == 0
    assert "its process does not run" in capsys.readouterr().out
    assert main(["status", "--json", str(tmp_path)]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=LinksStatus) == old


def test_metrics_follow_the_file_on_loopback(tmp_path):
    port = free_port()
    with serve_metrics(port, tmp_path):

        def scraped():
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                return page.read().decode().splitlines()

        assert not any("embodied_host" in line for line in scraped())
        write_status(tmp_path, STATUS)
        lines = scraped()
        assert 'embodied_host_connected{host="bench"} 1.0' in lines
        assert 'embodied_host_connected{host="lab"} 0.0' in lines
        assert 'embodied_host_rtt_seconds{host="bench"} 0.0415' in lines
        assert not any("rtt_seconds" in line and "lab" in line for line in lines)
        expected = 'embodied_link_received_bytes_total{host="bench",kind="experience"} 7.3e+06'
        assert expected in lines
        assert "embodied_weights_version 9.0" in lines
        with (
            pytest.raises(ConfigError, match=f"metrics_port={port}"),
            serve_metrics(port, tmp_path),
        ):
            pass
    with socket.create_server(("127.0.0.1", port)):
        pass
