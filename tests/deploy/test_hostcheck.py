"""What a host says of itself, and what is made of it."""

import pytest

from deploy.hostcheck import Facts, Needs, check
from embodied.core.errors import EmbodiedError

NEEDS = Needs(python=None, serial=True, torch=False, system=False)
GOOD = {
    "system": "Linux",
    "machine": "aarch64",
    "home": "/home/me",
    "user": "me",
    "uid": "1000",
    "groups": "me dialout",
    "free_kib": str(20 << 20),
    "python": "/usr/bin/python3.11",
    "version": "3.11",
    "venv": "yes",
    "systemd": "systemd 252",
    "manager": "yes",
}


def states(facts, needs=NEEDS):
    return {finding.name: finding for finding in check(facts, needs)}


def test_a_host_that_will_do():
    assert {f.state for f in check(Facts(GOOD, 0.4, 0.6), NEEDS)} == {"ok"}


@pytest.mark.parametrize(
    ("said", "name", "text", "fix"),
    [
        ({"system": "Darwin"}, "system", "Darwin", "Linux"),
        ({"machine": "armv7l"}, "system", "armv7l", "64-bit"),
        ({"python": "", "other": "python3 3.13"}, "Python", "3.13 is there", "--python"),
        ({"venv": ""}, "Python", "virtual environments", "python3.11-venv"),
        ({"free_kib": "1000"}, "disk", "0.0 GiB", "1 GiB"),
        ({"groups": "me"}, "serial ports", "not in the group dialout", "usermod -aG dialout me"),
        ({"systemd": ""}, "systemd", "does not run", "docs/deploy.md"),
        ({"manager": ""}, "systemd", "no systemd of its own", "enable-linger me"),
    ],
)
def test_what_is_missing_fails_and_says_what_to_do(said, name, text, fix):
    found = states(Facts(GOOD | said, 0.0, 0.6))
    assert found[name].state == "failure"
    assert text in found[name].text and fix in found[name].fix
    assert [f.state for f in found.values()].count("failure") == 1


def test_a_port_is_needed_only_by_robots_that_have_one():
    needs = Needs(python=None, serial=False, torch=False, system=False)
    assert states(Facts(GOOD | {"groups": "me"}, 0, 0.6), needs)["serial ports"].state == "ok"
    denied = Facts(GOOD | {"groups": "me", "denied": "/dev/ttyACM0"}, 0, 0.6)
    assert states(denied, needs)["serial ports"].state == "warning"


def test_torch_needs_more_room():
    facts = Facts(GOOD | {"free_kib": str(5 << 20)}, 0, 0.6)
    torch = Needs(python=None, serial=False, torch=True, system=False)
    assert states(facts)["disk"].state == "ok" and states(facts, torch)["disk"].state == "failure"


@pytest.mark.parametrize(
    ("skew_s", "uncertain_s", "state"),
    [(1.0, 1.0, "ok"), (-20.0, 30.0, "ok"), (-5.0, 0.6, "warning"), (3600.0, 0.6, "failure")],
)
def test_a_clock_is_wrong_by_what_the_journey_does_not_explain(skew_s, uncertain_s, state):
    assert states(Facts(GOOD, skew_s, uncertain_s))["clock"].state == state


def test_sudo_that_asks_is_said():
    system = Needs(python=None, serial=False, torch=False, system=True)
    found = states(Facts(GOOD | {"manager": ""}, 0, 0.6), system)
    assert found["systemd"].state == "failure" and "password" in found["systemd"].text


@pytest.mark.parametrize("home", ["", "relative", "/home/a\x1bb"])
def test_a_home_that_is_none_is_refused(home):
    with pytest.raises(EmbodiedError, match="home directory"):
        Facts(GOOD | {"home": home}, 0, 0.6).home  # noqa: B018
