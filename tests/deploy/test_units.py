"""The units' texts, and what they never let through."""

import os
import shlex
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.units import AGENT, SITE, Services, quote, render
from embodied.core.errors import ConfigError

ROBOT = "+robot@robots.sim=simulated robots.sim.driver.task=so101/reach"


def commands(units):
    """The words of each unit's command, read as systemd.service(5) has it."""
    found = {}
    for name, text in units.items():
        [line] = [line for line in text.splitlines() if line.startswith("ExecStart=")]
        words = shlex.split(line.removeprefix("ExecStart="))
        found[name] = [word.replace("%%", "%").replace("$$", "$") for word in words]
    return found


def test_an_agent_alone_is_told_to_stop_by_itself_and_has_real_time_priority(tmp_path):
    units = render(Services(ROBOT), tmp_path / "current/bin/embodied", tmp_path)
    assert list(units) == [AGENT]
    lines = units[AGENT].splitlines()
    for line in ("KillMode=process", "LimitRTPRIO=10", "Restart=always", "NoNewPrivileges=yes"):
        assert line in lines
    assert "PrivateTmp=yes" not in lines and not any(line.startswith("User=") for line in lines)
    assert "WantedBy=default.target" in lines and "$" not in units[AGENT]
    [program, command, *overrides] = commands(units)[AGENT]
    assert program == str(tmp_path / "current/bin/embodied") and command == "agent"
    assert overrides == ROBOT.split()


def test_a_site_is_given_its_identity_where_there_is_one(tmp_path):
    services = Services(ROBOT, "actors.count=2", "hub.example.org:7443", system=True)
    assert not any("identity=" in w for w in commands(render(services, tmp_path, tmp_path))[SITE])
    (tmp_path / "identity").mkdir()
    units = render(services, tmp_path / "embodied", tmp_path)
    words = commands(units)[SITE]
    assert f"identity='{tmp_path}/identity'" in words and "gateway='hub.example.org:7443'" in words
    assert words[-1] == "actors.count=2"
    assert "\nUser=" in units[SITE] and "WantedBy=multi-user.target" in units[SITE]
    assert "network-online.target" in units[SITE]


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))))
def test_a_word_is_one_word_to_systemd_and_nothing_in_it_is_expanded(word):
    quoted = quote(word)
    [read] = shlex.split(quoted)
    bare = read.replace("%%", "").replace("$$", "")
    assert read.replace("%%", "%").replace("$$", "$") == word
    assert "%" not in bare and "$" not in bare


@pytest.mark.parametrize("word", ["a\nExecStartPre=/bin/harm", "a\rb", "a\0b", "\x1b[2J"])
def test_a_word_cannot_begin_a_line_of_its_own(word):
    with pytest.raises(ConfigError, match="control characters"):
        quote(word)


@pytest.mark.parametrize(
    ("services", "message"),
    [
        (Services(""), "names no robot"),
        (Services("'"), "No closing quotation"),
        (Services("--config-dir=/tmp"), "is not key=value"),
        (Services(ROBOT + " gpus=perhaps"), "gpus"),
        (Services(ROBOT + " gpu=false"), "gpus"),
        (Services("+robot@robots.left=so100"), "so101"),
        (Services("+robot@robots.left=so101"), "port"),
        (Services(ROBOT, "actors.count=1"), "needs --gateway"),
        (Services(ROBOT, gateway="hub.example.org:7443"), "certificate"),
        (Services(ROBOT, gateway="hub.example.org"), "HOST:PORT"),
        (Services(ROBOT, gateway="127.0.0.1:7443' run='x"), "HOST:PORT"),
        (Services(ROBOT, gateway="unix:/tmp/socket"), "HOST:PORT"),
        (Services(ROBOT, "root=/tmp", "127.0.0.1:7443"), "leave it out"),
        (Services(ROBOT, "actors.counts=1", "127.0.0.1:7443"), "actors.count"),
    ],
)
def test_what_the_commands_would_refuse_is_refused_before(services, message):
    with pytest.raises(ConfigError, match=message):
        services.check(has_identity=False)


@pytest.mark.parametrize("system", [False, True])
def test_systemd_finds_nothing_wrong(tmp_path, system):
    if shutil.which("systemd-analyze") is None:
        why = "needs Debian's systemd"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    program = tmp_path / "a 50% $folder/embodied"
    program.parent.mkdir()
    program.symlink_to("/bin/true")
    services = Services(ROBOT + r" '+x=\"$HOME;%n\\'", "", "hub.example.org:7443", system)
    for name, text in render(services, program, program.parent).items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / n) for n in (AGENT, SITE))],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"SYSTEMD_LOG_LEVEL": "warning"},
    )
    about = [line for line in done.stderr.splitlines() if "embodied-" in line]
    assert not about, done.stderr
