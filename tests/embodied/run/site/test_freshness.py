"""Weights that get old at a host: its link is cut, its episodes wait, and go on."""

import socket
import time
import urllib.request

import msgspec
import pytest
from served import make_policy, publish
from sites import Learner, Robots, closing, until

from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.rundir import RunDir
from embodied.run.actor import Actor
from embodied.run.config import load_train
from embodied.run.site.freshness import EpisodeGate, forget_freshness
from embodied.run.site.metrics import serve_metrics
from embodied.run.site.status import HostStatus, read_status, write_status
from embodied.weights.staleness import StalenessBound
from embodied.weights.store import WeightStore
from sim.links import Profile
from sim.network import Relay


@pytest.mark.slow
@pytest.mark.parametrize("without_link", ["hold", "act"])
def test_a_cut_link_makes_episodes_wait_or_not_as_configured(tmp_path, without_link):
    learner = Learner(tmp_path)
    port = int(learner.address.rpartition(":")[2])
    with Relay(("127.0.0.1", port), Profile(delay_s=0.005)) as relay, closing(learner):
        bound = ("staleness.max_staleness_s=1.0", f"staleness.without_link={without_link}")
        address = f"127.0.0.1:{relay.address[1]}"
        host = Robots(tmp_path, "arm", learner, *bound, address=address)
        gate = EpisodeGate(host.run, host.site.config.staleness)
        with closing(host):
            assert "has not confirmed" in gate.refusal(-1) or without_link == "act"
            learner.publish(1.0)
            until(lambda: host.version == 1 and not gate.refusal(1), host, learner)
            until(lambda: told(learner).weights_age_s is not None, host)
            relay.cut(3.0)
            down = lambda: not read_status(host.run.path).hosts[0].connected  # noqa: E731
            until(down, host)
            cut_s = time.monotonic()
            if without_link == "hold":
                until(lambda: "last confirmed" in gate.refusal(1), host)
                assert down() and host.link.status().hosts[0].waits
                until(lambda: not gate.refusal(1), host, learner)
            else:
                while down():
                    assert not gate.refusal(1)
                    host.pump()
            assert time.monotonic() - cut_s > 1.0
            until(lambda: not told(learner).waits, host)


def told(learner):
    """What the gateway knows of its one host."""
    return next(iter(learner.look().hosts), HostStatus("", False, 0, 0, None, {}, None, 0, 0, 0, 0))


def test_versions_behind_count_from_what_acts(tmp_path):
    learner = Learner(tmp_path)
    host = Robots(tmp_path, "arm", learner)
    gate = EpisodeGate(host.run, StalenessBound(max_versions_behind=1))
    with closing(learner, host):
        for value in (1.0, 2.0, 3.0):
            learner.publish(value)
        until(lambda: host.version == 3 and not gate.refusal(3), host, learner)
        assert not gate.refusal(2)
        assert "2 versions behind" in gate.refusal(1)


def test_what_an_earlier_link_role_told_confirms_nothing(tmp_path):
    learner = Learner(tmp_path)
    host = Robots(tmp_path, "arm", learner, "staleness.max_staleness_s=60")
    with closing(learner, host):
        learner.publish(1.0)
        until(lambda: read_status(host.run.path).hosts[0].confirmed_ns, host, learner)
        assert not EpisodeGate(host.run, host.site.config.staleness).refusal(1)
        forget_freshness(host.run)
        assert EpisodeGate(host.run, host.site.config.staleness).refusal(1)


def test_metrics_say_how_old_weights_are_and_that_episodes_wait(tmp_path):
    learner = Learner(tmp_path)
    host = Robots(tmp_path, "arm", learner, "staleness.max_staleness_s=60")
    with closing(learner, host):
        learner.publish(1.0)
        until(lambda: read_status(host.run.path).hosts[0].confirmed_ns, host, learner)
        found = metrics_of(host.run)
        assert 0 <= found["embodied_host_weights_age_seconds"] < 30
        assert found["embodied_host_waits"] == 0.0
        status = read_status(host.run.path)
        waiting = msgspec.structs.replace(status.hosts[0], waits="old")
        write_status(host.run.path, msgspec.structs.replace(status, hosts=(waiting,)))
        assert metrics_of(host.run)["embodied_host_waits"] == 1.0


def metrics_of(run):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        serve_metrics(port, run.path),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page,
    ):
        lines = page.read().decode().splitlines()
    return {line.split("{")[0]: float(line.split()[-1]) for line in lines if "{" in line}


def test_an_actor_finishes_its_episode_and_begins_none_until_it_may(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    publish(run, make_policy())
    config = load_train(["task=pointmass", "demonstrations.episodes=1", "actors.count=1"])
    config = msgspec.structs.replace(
        config, demonstrations=msgspec.structs.replace(config.demonstrations, source="none")
    )
    sink, ended, why = LocalBuffer(run.buffer), [], [""]
    actor = Actor(
        config,
        0,
        sink,
        WeightStore(run.weights),
        ended.append,
        sitting=1,
        speed=0.0,
        holder="test",
        refusal=lambda version: why[0] if version == 1 else "",
    )

    def ticks(condition):
        for _ in range(20_000):
            if condition():
                return
            actor.tick()
        raise AssertionError("it did not come so far")

    try:
        actor.poll_weights()
        ticks(lambda: not actor.idle)
        why[0] = "old"
        ticks(lambda: actor.idle)
        for _ in range(50):
            actor.tick()
        assert len(ended) == 1 and actor.idle and actor.waiting == "old"
        publish(run, make_policy(1))
        actor.poll_weights()
        ticks(lambda: len(ended) == 2)
        assert not actor.waiting
    finally:
        actor.close()
        sink.close()
