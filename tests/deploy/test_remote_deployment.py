"""A wheel is built, and a host behind a real sshd becomes a robot's host."""

import json
import socket
import sys

import pytest
from certificates import Hosts
from sshd import SshHost, need_sshd

from deploy.wheel import build_wheel
from embodied.cli.main import main

AGENT = "+robot@robots.sim=simulated robots.sim.driver.task=so101/reach gpus=false"


@pytest.fixture
def robot_host(tmp_path):
    need_sshd()
    made = SshHost(tmp_path)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_host_is_deployed_once_and_again(robot_host, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    identity = Hosts(tmp_path).robot("arm-1")
    (tmp_path / "wheels").mkdir()
    python = f"{sys.base_prefix}/bin/python3.{sys.version_info[1]}"
    gateway = socket.create_server(("127.0.0.1", 0))
    command = ["deploy", "agent", "robot", "--ssh-config", str(robot_host.config)]
    command += ["--identity", str(identity), "--python", python]
    command += ["--wheelhouse", str(tmp_path / "wheels"), "--agent", AGENT]
    command += ["--gateway", f"127.0.0.1:{gateway.getsockname()[1]}"]

    assert main([*command, "--dry-run"]) == 0  # with a wheel of its own
    said = capsys.readouterr().out
    assert "-m venv" in said and "deploy units" in said
    assert not robot_host.root.exists()

    command += ["--wheel", str(build_wheel(tmp_path).path)]
    with gateway:
        assert main(command) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "robot sim" in said and "robot 'arm-1'" in said and "answers in" in said

    kept = robot_host.root / "identity"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert (kept / "key.pem").stat().st_mode & 0o777 == 0o600
    assert (kept / "key.pem").read_bytes() == (identity / "key.pem").read_bytes()
    calls = robot_host.calls()
    units = "embodied-agent.service embodied-site.service"
    assert f"systemctl --user enable {units}" in calls
    assert f"systemctl --user restart {units}" in calls
    assert any(call.startswith("loginctl enable-linger ") for call in calls)
    program = str(robot_host.root / "current" / "bin" / "embodied")
    rows = json.loads(robot_host.ssh(program, "devices", "--json"))
    assert {row["id"]: row["health"] for row in rows}["sim"] in ("ready", "degraded")
    assert "releases" in robot_host.ssh(program, "doctor", "--json")  # its own Python, not ours
    pid = (robot_host.home / "agent.pid").read_text()

    (robot_host.home / "calls").unlink()
    assert main(command) == 1  # as the gateway is gone
    said = capsys.readouterr().out
    assert said.count("was there") == 3 and "cannot be reached" in said
    assert f"systemctl --user start {units}" in robot_host.calls()
    assert not any(" restart " in call for call in robot_host.calls())
    assert (robot_host.home / "agent.pid").read_text() == pid


def test_a_host_whose_key_is_not_known_is_not_spoken_to(robot_host, tmp_path, capsys):
    (tmp_path / "known_hosts").write_text("")
    command = ["deploy", "agent", "robot", "--ssh-config", str(robot_host.config), "--agent", AGENT]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "cannot be reached by ssh" in said and "accepts no new host keys" in said
    assert (tmp_path / "known_hosts").read_text() == ""


def test_a_host_without_a_python_that_will_do_is_left_as_it_is(robot_host, tmp_path, capsys):
    command = ["deploy", "agent", "robot", "--ssh-config", str(robot_host.config), "--agent", AGENT]
    assert main([*command, "--python", "/nonexistent/python; touch $HOME/harmed"]) == 1
    said = capsys.readouterr().out
    assert "is not found" in said
    assert not robot_host.root.exists() and not (robot_host.home / "harmed").exists()
