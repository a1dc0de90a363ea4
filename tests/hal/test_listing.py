"""Devices of other hosts in the table of this one."""

import msgspec
import pytest

from embodied.core.errors import CorruptDataError
from hal import listing
from hal.discovery import devices
from hal.listing import DeviceRow, devices_of_hosts, note_host


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path))
    return tmp_path


ROW = DeviceRow(
    "left", "so101", "what it calls itself", "leased", holder="run/actor0", tick_hz=50.0
)


def test_a_hosts_devices_are_listed_under_its_name_and_replaced_by_what_it_tells_next():
    note_host("bench", [ROW])
    note_host("bench", [msgspec.structs.replace(ROW, health="ready")])
    note_host("lab", [msgspec.structs.replace(ROW, id="right")])
    found = {(row.host, row.id): row for row in devices()}
    assert found["bench", "left"].health == "ready"
    assert found["lab", "right"].holder == "run/actor0"
    assert len(devices_of_hosts()) == 2


def test_devices_of_a_silent_host_are_lost_and_forgotten_after_an_hour(monkeypatch):
    note_host("bench", [ROW])
    told_s = listing._since_boot_s()
    monkeypatch.setattr(listing, "_since_boot_s", lambda: told_s + listing.SILENT_S + 1)
    [row] = devices_of_hosts()
    assert row.health == "lost" and "bench is silent for 6 s" in row.reason and not row.holder
    monkeypatch.setattr(listing, "_since_boot_s", lambda: told_s + listing.FORGOTTEN_S + 1)
    assert devices_of_hosts() == []
    monkeypatch.undo()
    assert devices_of_hosts() == [], "its file is gone"


def test_what_was_told_before_a_reboot_is_not_believed(monkeypatch):
    note_host("bench", [ROW])
    monkeypatch.setattr(listing, "_since_boot_s", lambda: 1.0)
    assert devices_of_hosts() == []


def test_a_damaged_file_is_named(state):
    note_host("bench", [ROW])
    [path] = (state / "hosts").glob("*.json")
    path.write_bytes(b'{"host": 3}')
    with pytest.raises(CorruptDataError, match=path.name):
        devices_of_hosts()
