"""Robots that an actor leases from its host's pool."""

import msgspec
import pytest
from pooling import arm
from served import make_policy, publish, published

from embodied.buffer.serve.sink import LocalBuffer
from embodied.run import robots
from embodied.run.actor import Actor
from embodied.run.config import load_train
from embodied.run.robots import LeasedRobots
from embodied.weights.store import WeightStore
from hal.pool.pool import Pool
from hal.pool.state import pool_path
from sim.pointmass import PointMassDriver


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path))
    monkeypatch.setattr(robots, "_POLL_S", 0.0)
    with Pool(pool_path()) as opened:
        yield opened


def test_a_request_that_the_pool_forgot_is_made_anew(pool):
    """An actor that was too busy to poll for ten seconds loses its place, and nothing else."""
    pool.register(arm("a"), health="lost")
    leased = LeasedRobots("arm", "run/actor0", PointMassDriver.spec)
    try:
        assert leased.acquire() is None
        [first] = pool.queue()
        assert pool.cancel(first.request)
        assert leased.acquire() is None and "is not known" in leased.waiting_for
        assert leased.acquire() is None
        [second] = pool.queue()
        assert second.holder == first.holder and second.request != first.request
    finally:
        leased.close()
    assert pool.queue() == []


def test_an_actor_asks_for_a_robot_once_there_is_something_to_do_with_it(pool, tmp_path):
    """Until then others may have it, and no import of a policy costs it its heartbeat."""
    run = published(tmp_path / "run")
    config = load_train(
        ["task=pointmass", "actors.devices=arm", "algorithm=dagger", "demonstrations.episodes=1"]
    )
    for source, at_once in (("none", False), ("expert", True)):
        demonstrations = msgspec.structs.replace(config.demonstrations, source=source)
        with LocalBuffer(tmp_path / source) as sink:
            actor = Actor(
                msgspec.structs.replace(config, demonstrations=demonstrations),
                0,
                sink,
                WeightStore(run.weights),
                lambda result: None,
                sitting=1,
                speed=1.0,
                holder="run/actor0",
            )
            try:
                actor.poll_weights()
                assert actor.tick() == [] and bool(pool.queue()) == at_once
                assert actor.fault.startswith("waits for arm: ") == at_once
                if not at_once:
                    publish(run, make_policy())
                    assert actor.poll_weights()
                    assert actor.tick() == [] and pool.queue()
                    assert actor.fault.endswith("no device is registered")
            finally:
                actor.close()
