"""Units are written, started, and started anew only when something changed."""

import os
import sys
from pathlib import Path

import pytest
from certificates import Hosts
from sshd import end_agent, fake_systemd

from deploy.services import Manager, deployment_root, start
from deploy.units import AGENT, SITE, Services
from embodied.cli.main import main
from embodied.core.errors import ConfigError, EmbodiedError, IdentityError, MissingDependencyError

ROBOT = "+robot@robots.sim=simulated robots.sim.driver.task=pointmass gpus=false"
GATEWAY = ["--gateway", "127.0.0.1:7443"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with the software in it, and a systemd that writes down what it is told."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", f"{fake_systemd(tmp_path / 'bin')}:{os.environ['PATH']}")
    program = deployment_root() / "current" / "bin" / "embodied"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m embodied.cli.main "$@"\n')
    program.chmod(0o755)
    yield tmp_path
    end_agent(tmp_path)


def calls(home: Path) -> list[str]:
    """What systemd was told since the last time."""
    found = (home / "calls").read_text().splitlines()
    (home / "calls").unlink()
    return [call for call in found if "is-active" not in call]


@pytest.mark.slow
def test_units_are_started_once_and_anew_after_a_change(home):
    units = f"{AGENT} {SITE}"
    assert main(["deploy", "units", "--agent", ROBOT, *GATEWAY]) == 0
    said = calls(home)
    assert said[:2] == ["systemctl --user daemon-reload", f"systemctl --user enable {units}"]
    assert said[2].startswith("loginctl enable-linger ")
    assert said[3:] == [f"systemctl --user restart {units}"]
    pid = (home / "agent.pid").read_text()

    assert main(["deploy", "units", "--agent", ROBOT, *GATEWAY]) == 0
    assert calls(home)[3:] == [f"systemctl --user start {units}"]
    assert (home / "agent.pid").read_text() == pid

    assert main(["deploy", "units", "--agent", ROBOT + " host=bench"]) == 0
    said = calls(home)
    assert f"systemctl --user disable --now {SITE}" in said
    assert said[-1] == f"systemctl --user restart {AGENT}"
    assert (home / "agent.pid").read_text() != pid


def test_nothing_is_started_that_could_not_work(home):
    root, manager = deployment_root(), Manager(system=False)
    services = Services(ROBOT, "", "127.0.0.1:7443")
    hosts = Hosts(home)
    hosts.gateway(output=root / "identity")
    with pytest.raises(IdentityError, match="needs a robot's"):
        start(services, root, manager)
    (root / "current" / "bin" / "embodied").unlink()
    with pytest.raises(ConfigError, match="install the wheel"):
        start(Services(ROBOT), home / "elsewhere", manager)
    assert not (home / "calls").exists()


def test_what_systemd_refuses_is_told_in_its_words(home):
    (home / "bin" / "systemctl").write_text("#!/bin/sh\necho no bus here >&2\nexit 1\n")
    with pytest.raises(EmbodiedError, match=r"daemon-reload` failed .*: no bus here"):
        start(Services(ROBOT), deployment_root(), Manager(system=False))


def test_a_host_without_systemd_is_told_what_to_do(home, monkeypatch):
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(MissingDependencyError, match="there is no `systemctl`"):
        start(Services(ROBOT), deployment_root(), Manager(system=False))


def test_lingering_that_is_refused_is_a_failure_with_its_remedy(home):
    (home / "bin" / "loginctl").write_text("#!/bin/sh\necho access denied >&2\nexit 1\n")
    found = Manager(system=False).linger()
    assert found.state == "failure" and "access denied" in found.text
    assert found.fix.startswith("sudo loginctl enable-linger ")
