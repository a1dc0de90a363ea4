"""When a learner publishes, and what its governor is told."""

import time

import msgspec
import numpy as np
import pytest

from embodied.core.errors import SpecError
from embodied.core.rundir import RunDir
from embodied.learn.publishing import Publisher
from embodied.run.config import load_train
from embodied.run.feedback import PublishFeedback
from embodied.run.site.status import HostStatus, LinksStatus, write_status
from embodied.weights.deliveries import Delivery
from embodied.weights.governor import GovernorConfig, PublishGovernor
from embodied.weights.store import WeightStore


class Weights:
    """What a Publisher needs of a learner; `wait_s` is how long its arrays take to arrive."""

    def __init__(self, wait_s=0.0):
        self.step, self.seconds, self.wait_s = 0, 0.0, wait_s

    def snapshot(self):
        return {"name": "flow"}, self

    def arrays(self):
        time.sleep(self.wait_s)
        return {"w": np.full(4, self.step, np.float32)}


def make(tmp_path, governor, device="cpu", every=10, **options):
    learner = load_train([]).learner
    config = msgspec.structs.replace(learner, device=device, publish_every=every, **options)
    return Publisher(WeightStore(tmp_path), config, sitting=0, governor=governor)


def learn(publisher, learner, steps, step_s):
    """Steps that take as long as said; the steps at which weights went out."""
    went = []
    for _ in range(steps):
        learner.step += 1
        publisher.stepped(step_s)
        if publisher.due(learner.step):
            publisher.publish(learner, final=False)
            went.append(learner.step)
    return went


def test_without_a_governor_steps_alone_decide(tmp_path):
    publisher = make(tmp_path, None)
    assert learn(publisher, Weights(wait_s=0.01), 45, step_s=1e-6) == [10, 20, 30, 40]
    assert publisher.decisions() == {}


def test_the_newest_weights_and_pinned_ones_are_kept(tmp_path):
    publisher, store = make(tmp_path, None, weights_kept=2), WeightStore(tmp_path)
    learner = Weights()
    learn(publisher, learner, 10, step_s=1e-6)
    store.pin(1)
    learn(publisher, learner, 40, step_s=1e-6)
    publisher.finish()
    assert store.versions() == [1, 4, 5]


def test_who_waits_for_data_publishes_the_first_weights_early(tmp_path):
    publisher, learner = make(tmp_path, None), Weights()
    learner.step = 3
    assert not publisher.due(3) and publisher.due(3, waiting=True)
    publisher.publish(learner, final=False)
    assert not publisher.due(4, waiting=True)


def test_the_governor_keeps_dear_publications_to_their_share(tmp_path):
    publisher = make(tmp_path, PublishGovernor(GovernorConfig(max_share=0.1)))
    went = learn(publisher, Weights(wait_s=0.02), 200, step_s=0.01)
    told = publisher.decisions()
    assert told["published"] == len(went) and told["publish_cost_s"] >= 0.02
    assert told["publish_interval_s"] >= 0.2
    # 2 s of steps pay for a tenth of them; the first publication is not paid for beforehand.
    assert 2 <= len(went) <= 11 and went[0] == 10
    spent_s = told["publish_share"] * 2.0 / (1 - told["publish_share"])
    assert spent_s <= 0.1 * 2.0 + 2 * told["publish_interval_s"] * 0.1 + told["publish_cost_s"]


def test_steps_at_least_lie_between_cheap_ones(tmp_path):
    publisher = make(tmp_path, PublishGovernor(GovernorConfig(max_share=0.9)), every=25)
    assert learn(publisher, Weights(), 100, step_s=1.0) == [25, 50, 75, 100]


def test_one_in_the_background_costs_what_it_slows_the_steps(tmp_path):
    governor = PublishGovernor(GovernorConfig(max_share=0.5))
    publisher, learner = make(tmp_path, governor, "cuda", every=1), Weights(wait_s=0.3)
    publisher.stepped(0.1)
    learner.step = 1
    assert publisher.due(1)
    publisher.publish(learner, final=False)
    learner.step = 9
    assert not publisher.due(9), "earlier weights are still being written"
    publisher.stepped(0.4)
    publisher.finish()
    assert 0.3 <= publisher.decisions()["publish_cost_s"] < 0.35


def test_an_error_in_the_background_is_raised(tmp_path):
    publisher = make(tmp_path, PublishGovernor(GovernorConfig()), "cuda")
    learner = Weights()
    learner.arrays = lambda: {"w": np.array(["no tensor"], object)}
    publisher.publish(learner, final=False)
    with pytest.raises(SpecError, match="dtype"):
        publisher.finish()


HOST = HostStatus("a", True, 1.0, 0.1, 40.0, {}, 7, 0, 0, 0, 0.0)


def test_the_governor_hears_of_the_quickest_robot_and_the_slowest_link(tmp_path):
    run = RunDir(tmp_path / "run")
    run.acquire()
    run.timings("actor0", {"rollout_s": [9.0]})  # of an earlier sitting
    governor = PublishGovernor(GovernorConfig(link_share=0.5))
    feedback = PublishFeedback(run, governor)
    feedback.poll()
    assert governor.interval_s == 0.0
    run.timings("actor0", {"rollout_s": [2.0, 0.5]})
    run.timings("actor1", {"rollout_s": []})
    feedback.poll()
    assert governor.interval_s == pytest.approx(0.5)

    def tell(*hosts):
        write_status(run.path, LinksStatus(run="r", site="gateway", address="", version=7,
                                           over=False, hosts=hosts))  # fmt: skip

    quick = msgspec.structs.replace(HOST, delivery=Delivery(7, 1000, 0.1))
    slow = msgspec.structs.replace(HOST, name="b", delivery=Delivery(7, 1000, 4.0))
    away = msgspec.structs.replace(
        HOST, name="c", connected=False, delivery=Delivery(7, 1000, 60.0)
    )
    tell(quick, slow, away)
    feedback.poll()
    assert governor.interval_s == pytest.approx(8.0), "half of the time, the slow link is free"
    feedback.poll()
    tell(msgspec.structs.replace(quick, delivery=Delivery(8, 1000, 0.1)), slow)
    feedback.poll()
    assert governor.interval_s < 8.0, "what is known already does not count again"
    run.release()
