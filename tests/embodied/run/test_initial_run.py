"""Runs that begin with an earlier run's weights."""

import pytest
import torch

from embodied.buffer.sample.statistics import FeatureStats
from embodied.cli.main import main
from embodied.core.errors import ConfigError
from embodied.run.build import policy_format, stored_policy
from embodied.run.config import load_train
from policies.checkpoint import load_policy

SMALL = [
    *("task=pointmass", "policy=uva", "run.mode=lockstep", "algorithm=bc", "actors.speed=0"),
    *("policy.horizon=8", "policy.n_action_steps=4", "+policy.width=16", "+policy.heads=2"),
    *("+policy.head_width=16", "demonstrations.episodes=2", "buffer.segment_mib=1"),
    *("learner.batch_size=16", "learner.steps=20", "evaluation.episodes=0"),
    *("evaluation.final_episodes=0", "evaluation.videos=0"),
]
STATISTICS = FeatureStats(
    mean=[0.0] * 2, std=[1.0] * 2, min=[-9.0] * 2, max=[9.0] * 2, q01=[-9.0] * 2, q99=[9.0] * 2,
    count=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A finished run that learned what follows, without actions."""
    path = tmp_path_factory.mktemp("initial") / "videos"
    assert main(["train", *SMALL, "policy.modes=[video]", f"run.dir={path}"]) == 0
    return path


def made(*overrides):
    """The policy that a run begins with."""
    format_ = policy_format(load_train([*SMALL, *overrides]))
    return format_.make({key: STATISTICS for key in format_.statistics})


def test_all_modes_are_learned_from_where_videos_ended(videos, tmp_path):
    earlier, policy = load_policy(videos / "policy"), made(f"initial={videos}")
    assert policy.config.modes != earlier.config.modes
    for name, array in earlier.state_dict().items():
        assert torch.equal(policy.state_dict()[name], array), name
    fresh = made()
    assert any(not torch.equal(fresh.state_dict()[n], x) for n, x in earlier.state_dict().items())
    path = tmp_path / "run"
    assert main(["train", *SMALL, f"initial={videos / 'policy'}", f"run.dir={path}"]) == 0
    assert stored_policy(path)[0].config.modes == policy.config.modes


def test_what_does_not_fit_is_refused_before_anything_runs(videos, tmp_path):
    for initial, other, message in (
        (tmp_path, "", r"initial=\S+ is no policy's folder"),
        (videos, "policy=flow", r"a policy of kind 'uva'; the run trains 'flow'"),
        (videos, "policy.n_obs_steps=1", r"n_obs_steps is 2 there and 1 here"),
    ):
        own = [x for x in SMALL if not (other == "policy=flow" and x.startswith(("policy", "+")))]
        with pytest.raises(ConfigError, match=message):
            load_train([*own, *([other] if other else []), f"initial={initial}"])
    with pytest.raises(ConfigError, match=r"other arrays .*; its sizes must be the same"):
        made("+policy.head_depth=1", f"initial={videos}")
