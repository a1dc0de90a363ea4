"""Each check of a host, as it should be and not."""

import json
import os
import socket
from datetime import timedelta

from certificates import Hosts, long_ago

from deploy import doctor
from deploy.findings import Finding, failed, failure, ok, warning
from deploy.packages import check_packages, needed
from embodied.cli.main import main


def test_the_python_that_is_needed():
    assert doctor.check_python((3, 12)).state == "ok"
    for version in ((3, 10), (3, 13)):
        found = doctor.check_python(version)
        assert found.state == "failure" and "3.11 or 3.12" in found.fix


def test_a_state_directory_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path / "state"))
    assert doctor.check_state() == ok("state directory", str(tmp_path / "state"))
    (tmp_path / "file").write_text("")
    for wrong in ("relative", str(tmp_path / "file" / "state")):
        monkeypatch.setenv("EMBODIED_STATE", wrong)
        found = doctor.check_state()
        assert found.state == "failure" and "EMBODIED_STATE" in found.fix


def test_little_space_is_said_of_a_folder_that_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path / "not" / "yet"))
    assert str(tmp_path) in doctor.check_disk().text
    assert doctor.check_disk(little_gib=1e9).state == "warning"


def test_the_clock_and_real_time_are_told_without_changing_anything():
    policy = os.sched_getscheduler(0)
    for found in (doctor.check_clock(), doctor.check_realtime(), doctor.check_opengl()):
        assert found.state == "ok" or (found.state == "warning" and found.fix)
    assert os.sched_getscheduler(0) == policy


def test_devices_by_what_is_wrong_with_them():
    assert doctor.check_devices("cameras", [], "video") == [ok("cameras", "none")]
    rows = [
        {"id": "so101:/dev/a", "kind": "robot", "detail": "servos 1, 2"},
        {"id": "serial:/dev/b", "kind": "robot", "fault": "in use by embodied, pid 3"},
        {"id": "serial:/dev/c", "kind": "robot", "fault": "/dev/c: Permission denied"},
    ]
    found = doctor.check_devices("serial ports", rows, "dialout")
    assert [f.state for f in found] == ["ok", "ok", "warning"]
    assert "usermod -aG dialout" in found[2].fix and "Permission denied" in found[2].text


def test_a_port_that_cannot_be_used_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBODIED_SERIAL_PORTS", str(tmp_path / "pulled"))
    names = [f for f in doctor.examine(None, None) if f.name == "serial ports"]
    assert any(f.state == "warning" and "pulled" in f.text for f in names)


def test_packages_by_base_and_extra():
    base, extras = needed(
        [
            "numpy>=2.2,<2.5",
            "diffusers<0.36,>=0.35.2; extra == 'policy'",
            'jinja2<4,>=3.1; python_version > "3" and extra == "train"',
            "embodied-stack[policy]; extra == 'train'",
            "embodied-stack[policy,train]; extra == 'all'",
        ]
    )
    assert base == {"numpy"} and extras == {"policy": {"diffusers"}, "train": {"jinja2"}}
    assert [f.state for f in check_packages()] == ["ok", "ok"]


def test_an_identity_by_its_dates_and_place(tmp_path):
    hosts = Hosts(tmp_path)
    assert doctor.check_identity(hosts.robot("arm-1")).state == "ok"
    expired = doctor.check_identity(hosts.robot("arm-2", starts=long_ago()))
    assert expired.state == "failure" and "expired" in expired.text
    missing = doctor.check_identity(tmp_path / "nowhere")
    assert missing.state == "failure" and "docs/security.md" in missing.fix
    assert expired.fix and "issue" in expired.fix


def test_a_gateway_is_reached_or_not_and_never_without_a_certificate():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert doctor.check_gateway(address, False).state == "ok"
    refused = doctor.check_gateway(address, False)
    assert refused.state == "failure" and "refused" in refused.text
    for wrong in ("hub.example.org:7443", "no address"):
        assert doctor.check_gateway(wrong, False).state == "failure"


def test_the_command_fails_where_something_needed_does(tmp_path, capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"Python", "packages", "extras", "disk", "clock", "GPU"} <= {f["name"] for f in found}
    assert main(["doctor", "--identity", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in " ".join(capsys.readouterr().out.split())


def test_what_works_less_well_is_no_failure():
    fine: list[Finding] = [ok("a", "b"), warning("a", "b", "c")]
    assert not failed(fine) and failed([*fine, failure("a", "b", "c")])


def test_a_certificate_that_ends_soon_is_to_be_renewed(tmp_path):
    folder = Hosts(tmp_path).robot("arm-1", lifetime=timedelta(days=1))
    found = doctor.check_identity(folder)
    assert found.state == "warning" and "renew" in found.fix
