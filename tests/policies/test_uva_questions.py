"""What unified video and action answers, and what it leaves unread."""

import numpy as np
import pytest

from embodied.core.errors import ConfigError, SpecError
from embodied.core.specs import ArraySpec, DeviceSpec
from policies.build import build_policy
from tests.policies.test_uva import STATE, batch_of, build, later, observed


def test_what_only_fills_tokens_up_says_nothing_in_training_and_sampling(make):
    policy = build(make, modes=["video"])
    assert not policy.frames.counts_LP.all()
    told = []
    policy.video_head.register_forward_pre_hook(lambda m, given: told.append(given[0]))
    batch = batch_of(policy, 4)
    policy.loss(batch)
    assert told and all((x * ~policy.frames.counts_LP == 0).all() for x in told)
    told.clear()
    policy.infer(observed(policy, batch), want={"next_obs"}, seed=np.arange(4))
    places = policy.frames.counts_LP.sum() * policy.config.frames * 4
    assert len(told) == policy.config.num_steps
    assert all((x != 0).sum() <= places for x in told)


@pytest.mark.parametrize(
    ("modes", "question", "missing"),
    [
        (["policy"], {"want": {"next_obs"}}, "video or joint"),
        (["video", "policy"], {"actions": True, "want": {"next_obs"}}, "forward"),
        (["video", "policy"], {"next_obs": True, "want": {"actions"}}, "inverse"),
        (["video", "policy"], {"want": {"actions", "next_obs"}}, "joint"),
    ],
)
def test_what_no_mode_teaches_is_not_answered(make, modes, question, missing):
    policy = build(make, modes=modes)
    batch = batch_of(policy, 2)
    given = {"actions": batch["action"], "next_obs": later(policy, batch)}
    asked = {key: given.get(key, value) for key, value in question.items()}
    with pytest.raises(SpecError, match=f"never learned that.*has no {missing}"):
        policy.infer(observed(policy, batch), seed=np.arange(2), **asked)
    policy.infer(observed(policy, batch), want={"actions"}, seed=np.arange(2))


@pytest.mark.parametrize("name, option", [("uwm", "width"), ("uva", "head_width")])
def test_noise_that_cannot_pass_through_the_network_is_refused(name, option):
    device = DeviceSpec({STATE: ArraySpec((40,))}, ArraySpec((2,), low=(-1.0,), high=(1.0,)), 10.0)
    sizes = {"token_size": 40, "frames": 1, "head_width": 39} if name == "uva" else {"width": 39}
    heads = {"heads": 3, "width": 39} if name == "uwm" else {}
    with pytest.raises(ConfigError, match=f"has 40 numbers, and policy.{option}=39"):
        build_policy(name, {**sizes, **heads}, device, [STATE], {}, seed=0)
