"""Names that are no hosts, and commands that stay one command whatever is in them."""

import json
import shlex
import subprocess
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.remote import Remote, check_target
from deploy.rollout import Software, ask, doctor_command, plan, start_command
from deploy.units import Services
from deploy.wheel import Wheel, constraints, read_wheel
from embodied.core.errors import ConfigError, EmbodiedError, LinkError

HOSTILE = "it's $(touch harmed) `touch harmed`; touch harmed\\\" && #"


@pytest.mark.parametrize(
    "target", ["robot", "me@bench-1", "me@10.1.2.3", "me@fe80::1", "a.b@host_2.example.org"]
)
def test_hosts(target):
    assert check_target(target) == target


@pytest.mark.parametrize(
    "target",
    [
        "",
        "@host",
        "me@",
        "-oProxyCommand=touch harmed",
        "me@-oProxyCommand=x",
        "me@host;touch harmed",
        "me@host command",
        "$(id)@host",
        "me@host\n",
        "me@host:22",
        "ssh://me@host",
        "a@b@host",
    ],
)
def test_what_is_no_host_is_not_dialled(target):
    with pytest.raises(ConfigError, match=r"is not \[USER@\]HOST"):
        Remote(target)


@pytest.mark.parametrize("option", ["-p2222", "Port 2222", "Port=", "A=b\nProxyCommand=x"])
def test_what_is_no_option_of_ssh_is_refused(option):
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        Remote("host", [option])


def test_ssh_is_never_told_to_trust_a_host_or_to_ask():
    words = Remote("me@host", ["Port=2222"]).command("true")
    assert "BatchMode=yes" in words and "Port=2222" in words
    assert "StrictHostKeyChecking" not in " ".join(words)
    assert words[words.index("--") + 1] == "me@host" and len(words) == words.index("--") + 3


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_a_script_reaches_the_hosts_sh_as_it_is(script):
    *_, line = Remote("host").command(script)
    assert shlex.split(line) == ["sh", "-c", script]


def software(path, **more):
    wheel = Wheel(path, "0.1.0", "0" * 64, frozenset({"policy"}))
    options = {"constraints": "numpy==2.3", "extras": (), "wheelhouse": None, "python": "python3"}
    return Software(wheel, **(options | more))


def test_scripts_with_hostile_names_do_nothing_else(tmp_path):
    """Every step, run here by a real sh in a home of that name, with a `python` that fails."""
    home = tmp_path / HOSTILE.replace("/", "")
    home.mkdir()
    identity = tmp_path / "identity"
    identity.mkdir()
    (identity / HOSTILE).write_bytes(b"")
    steps = plan(str(home), software(tmp_path / "a.whl", python=HOSTILE), identity)
    for step in steps:
        for script in (step.done, step.script):
            subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, timeout=120)
    services = Services(HOSTILE, HOSTILE, HOSTILE)
    for command in (start_command(str(home), services), doctor_command(str(home), services, True)):
        subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, timeout=120)
        assert shlex.split(command)[0] == f"{home}/current/bin/embodied"
    assert not list(tmp_path.rglob("harmed*"))


def test_a_release_is_named_by_all_that_is_in_it(tmp_path):
    path = tmp_path / "a.whl"
    first = software(path)
    others = [
        software(path, constraints="numpy==2.4"),
        software(path, extras=("policy",)),
        software(path, python="python3.12"),
    ]
    names = {one.release for one in (first, *others)}
    assert len(names) == 4 and software(path).release == first.release


def test_without_a_wheelhouse_the_host_decides_where_packages_come_from(tmp_path):
    [install, _] = plan("/home/me", software(tmp_path / "a.whl"), None)
    assert "--no-index" not in install.script and "://" not in install.script
    assert b"#sha256=" + b"0" * 64 in install.files["requirements.txt"]
    [install, _] = plan("/home/me", software(tmp_path / "a.whl", wheelhouse=tmp_path), None)
    assert "--no-index --find-links" in install.script
    assert install.files["wheelhouse"] == tmp_path


def test_versions_come_from_the_lock(tmp_path):
    versions = constraints(None)
    assert "--hash" not in versions and "\\" not in versions
    pinned = [line for line in versions.splitlines() if line.startswith("mujoco==")]
    assert pinned == ["mujoco==3.3.0"]
    with pytest.raises(ConfigError, match="--lock"):
        constraints(tmp_path / "none.lock")


def test_a_file_that_is_no_wheel_of_ours_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_wheel(tmp_path / "none.whl")
    (tmp_path / "text.whl").write_text("no archive")
    with pytest.raises(ConfigError, match="is no wheel"):
        read_wheel(tmp_path / "text.whl")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other-1.dist-info/METADATA", "Name: other\nVersion: 1\n")
    with pytest.raises(ConfigError, match="no wheel of embodied-stack"):
        read_wheel(tmp_path / "other.whl")


def test_extras_that_the_wheel_lacks_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"polices: a\.whl has policy"):
        software(tmp_path / "a.whl").wheel.check_extras(("polices",))


class Local(Remote):
    """This host, without ssh."""

    def command(self, script):
        return ["sh", "-c", script]


def test_files_and_folders_arrive_with_their_permissions_in_a_folder_of_that_name(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").write_bytes(bytes(100_000))
    place = tmp_path / HOSTILE.replace("/", "")
    place.mkdir()
    (place / "old").write_text("")
    files = {"key.pem": b"secret", "wheels": tmp_path / "wheels"}
    Local("here").put(str(place), files, 30)
    assert {path.name for path in place.iterdir()} == {"key.pem", "wheels"}
    assert (place / "key.pem").stat().st_mode & 0o777 == 0o600
    assert place.stat().st_mode & 0o777 == 0o700
    assert (place / "wheels" / "a.whl").read_bytes() == bytes(100_000)


def test_a_host_that_takes_no_files_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LinkError, match="cannot be written"):
        Local("here").put(str(tmp_path / "file" / "x"), {"a": bytes(10_000_000)}, 30)


def test_a_host_that_hangs_is_given_up():
    with pytest.raises(LinkError, match="did not finish in 0 s"):
        Local("here").run("exec sleep 60", 0.1)


def test_findings_are_read_strictly():
    good = json.dumps([{"name": "a", "state": "ok", "text": "b"}])
    [finding] = ask(Local("here"), f"echo noise; echo {shlex.quote(good)}")
    assert finding.name == "a"
    for bad in (good.replace("ok", "fine"), "[{}]", "{"):
        with pytest.raises(EmbodiedError, match="gives no findings"):
            ask(Local("here"), f"echo {shlex.quote(bad)}")
    with pytest.raises(EmbodiedError, match="broken"):
        ask(Local("here"), "echo broken >&2; exit 2")
