"""Runs whose robots are elsewhere: other state directories, a bad network between, processes."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from certificates import Hosts
from sizes import full_only

from embodied.buffer.read.replay import ReplayReader
from embodied.core.rundir import RunDir
from embodied.run.site.status import read_status
from hal.listing import DeviceRow
from sim.links import profile_named
from sim.network import Relay

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]

LEARNER = [
    "task=pointmass",
    "actors.count=1",
    "actors.speed=10",
    "demonstrations.episodes=4",
    "policy.n_obs_steps=1",
    "policy.horizon=8",
    "policy.n_action_steps=4",
    "+policy.network.width=64",
    "+policy.network.depth=1",
    "learner.batch_size=64",
    "learner.publish_every=100",
    "learner.warmup_steps=10",
    "evaluation.episodes=0",
    "evaluation.final_episodes=4",
    "evaluation.rows=4",
    "evaluation.videos=0",
    "buffer.segment_mib=1",
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Lab:
    """A learner's site and robot hosts, each with a state directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = RunDir(folder / "run")
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *arguments: str) -> subprocess.Popen:
        state = self.folder / f"state-{name}"
        state.mkdir(exist_ok=True)
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "embodied.cli.main", *arguments],
                env={**os.environ, "EMBODIED_STATE": str(state)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.processes[name]

    def learner(self, *overrides: str) -> str:
        """Start it; where its gateway listens."""
        listen = f"gateway.listen=127.0.0.1:{free_port()}"
        self.start("learner", "train", *LEARNER, listen, *overrides, f"run.dir={self.run.path}")
        return self.until(self.listening, 60)

    def listening(self) -> str:
        found = [e["address"] for e in self.events(self.run) if e["event"] == "gateway listens"]
        return found[-1] if found else ""

    def site(self, name: str, address: str, *overrides: str) -> None:
        root = self.folder / f"root-{name}"
        speed = ["actors.speed=10", f"name={name}", f"root={root}"]
        self.start(name, "site", f"gateway={address}", *speed, *overrides)

    def folder_of(self, name: str) -> RunDir:
        [path] = self.until(lambda: list((self.folder / f"root-{name}").glob("*/config.json")), 60)
        return RunDir(path.parent)

    def end(self, name: str, timeout_s: float = 150.0) -> str:
        """Its output once it has ended by itself."""
        status = self.processes[name].wait(timeout_s)
        said = self.said(name)
        assert status == 0, said
        return said

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    @staticmethod
    def events(run: RunDir) -> list[dict]:
        return run.events()

    def pid(self, run: RunDir, role: str) -> int:
        started = [e for e in run.events() if e["event"] == "role started" and e["role"] == role]
        return started[-1]["pid"]

    def until(self, condition, timeout_s: float):
        deadline_s = time.monotonic() + timeout_s
        while not (found := condition()):
            for name, process in self.processes.items():
                assert process.poll() in (None, 0), (name, self.said(name))
            assert time.monotonic() < deadline_s, {n: self.said(n) for n in self.processes}
            time.sleep(0.1)
        return found

    def close(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def lab(tmp_path):
    made = Lab(tmp_path)
    yield made
    made.close()


def recorded(run: RunDir, prefix: str):
    """Episodes of a host's streams in a run's buffer; nothing damaged, no number twice."""
    reader = ReplayReader(run.buffer)
    try:
        reader.refresh()
        assert not reader.damaged
        found = [episode for episode in reader.episodes if episode.stream.startswith(prefix)]
    finally:
        reader.close()
    keys = [(episode.stream, episode.episode) for episode in found]
    assert len(keys) == len(set(keys))
    return found


def test_a_host_behind_a_bad_network_acts_learns_and_delivers_everything(lab, tmp_path):
    """Its link, the gateway and the whole host are killed in the middle; the network is cut."""
    (tmp_path / "pki").mkdir()
    hosts = Hosts(tmp_path / "pki")
    hub, arm = hosts.gateway(), hosts.robot("arm-1", runs=["run"])
    # Time enough for what is broken on the way, on a busy machine as well.
    address = lab.learner("learner.steps=1000000", "learner.minutes=1.2", f"gateway.identity={hub}")
    port = int(address.rpartition(":")[2])
    with Relay(("127.0.0.1", port), profile_named("cross-city")) as relay:
        where = f"127.0.0.1:{relay.address[1]}"
        lab.site("arm-1", where, f"identity={arm}")
        site = lab.folder_of("arm-1")
        acted = lambda: [e for e in recorded(lab.run, "arm-1/") if e.policy_versions[1] >= 1]  # noqa: E731
        lab.until(acted, 90)
        os.kill(lab.pid(site, "link"), signal.SIGKILL)
        relay.cut(2.0)
        before = len(acted())
        lab.until(lambda: len(acted()) > before + 1, 60)
        os.killpg(lab.processes["arm-1"].pid, signal.SIGKILL)
        lab.processes.pop("arm-1").wait()
        lab.site("arm-1", where, f"identity={arm}")
        before = len(acted())
        lab.until(lambda: len(acted()) > before + 1, 90)
        lab.end("learner")
        assert "everything is delivered" in lab.end("arm-1")
    here = {(e.stream, e.episode): len(e.rows) for e in recorded(site, "arm-1/") if e.closed}
    there = {(e.stream, e.episode): len(e.rows) for e in recorded(lab.run, "arm-1/") if e.closed}
    assert here == there and len(there) > 4
    versions = {e.policy_versions[1] for e in recorded(lab.run, "arm-1/")}
    assert len(versions - {-1}) > 1, "newer weights came over the link"
    assert read_status(site.path).over


@full_only
def test_a_restarted_gateway_is_found_again_and_other_hosts_are_listed(lab):
    address = lab.learner("learner.steps=1000000", "learner.minutes=0.8")
    for name in ("east", "west"):
        lab.site(name, address)
    both = ("east/", "west/")
    lab.until(lambda: all(recorded(lab.run, prefix) for prefix in both), 90)
    os.kill(lab.pid(lab.run, "gateway"), signal.SIGKILL)
    before = [len(recorded(lab.run, prefix)) for prefix in both]

    def both_go_on():
        return all(len(recorded(lab.run, p)) > n for p, n in zip(both, before, strict=True))

    lab.until(both_go_on, 60)
    listed = subprocess.run(
        [sys.executable, "-m", "embodied.cli.main", "devices", "--json"],
        env={**os.environ, "EMBODIED_STATE": str(lab.folder / "state-learner")},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = msgspec.json.decode(listed.stdout, type=list[DeviceRow])
    assert {"east", "west"} <= {row.host for row in rows if row.kind == "pointmass"}
    lab.end("learner")
    for name in ("east", "west"):
        assert "everything is delivered" in lab.end(name)
    status = read_status(lab.run.path)
    assert {host.name for host in status.hosts} == {"east", "west"} and status.over
    assert all(host.spool_steps == 0 for host in status.hosts)


def test_a_host_without_a_policy_asks_the_learners_site_however_far_that_is(lab):
    address = lab.learner("learner.steps=1000000", "learner.minutes=1.2", "gateway.serve=true")
    port = int(address.rpartition(":")[2])
    with Relay(("127.0.0.1", port), profile_named("bad-4g")) as relay:
        lab.site("thin", f"127.0.0.1:{relay.address[1]}", "remote=always")
        site = lab.folder_of("thin")
        acted = lambda: [e for e in recorded(lab.run, "thin/") if e.policy_versions[1] >= 1]  # noqa: E731
        lab.until(acted, 150)
        assert read_status(site.path).hosts[0].traffic["inference"].received > 0
        lab.end("learner")
        assert "everything is delivered" in lab.end("thin")


def test_what_a_host_is_refused_for_is_said(lab, tmp_path):
    (tmp_path / "pki").mkdir()
    hosts = Hosts(tmp_path / "pki")
    hub, stranger = hosts.gateway(), hosts.robot("arm-2", runs=["other"])
    address = lab.learner("learner.steps=200", f"gateway.identity={hub}")
    lab.site("arm-2", address, f"identity={stranger}")
    lab.until(lambda: re.search("waiting for .*run", lab.said("arm-2")), 60)
    lab.processes["arm-2"].send_signal(signal.SIGTERM)
    assert lab.processes.pop("arm-2").wait(30) == 130
